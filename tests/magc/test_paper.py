"""The paper's numbers and its choice of cells."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from magc.errors import PlanError
from magc.paper import (
    PAPER_TABLE_3,
    PAPER_TABLE_8,
    PaperCosts,
    choose,
    memory_elements,
    unit_memory,
    unit_optimum,
)

D_MODEL = {"370m": 1024, "1.3b": 2048, "2.7b": 2560}


@pytest.mark.parametrize(
    ("model", "costs"),
    [
        ("370m", PaperCosts(1_024, 269_056, 6_432, 264_448)),
        ("1.3b", PaperCosts(2_048, 537_344, 12_608, 528_640)),
        ("2.7b", PaperCosts(2_560, 671_488, 15_696, 660_736)),
    ],
)
def test_table_7(model: str, costs: PaperCosts) -> None:
    assert PaperCosts.from_mamba2(D_MODEL[model]) == costs


def test_code_mode_counts_float32_twice() -> None:
    # 2.7b: 5120 channels, 80 heads, 5376 channels in the convolution.
    assert PaperCosts.from_mamba2(2560, mode="code") == PaperCosts(
        c_layer=2560 + 2 * 2560,
        c_sequence=2 * 5120 * 128 + 3 * 5376,
        c_grid=10576 + 5120,
        c_state=5376 + 4 * 80 + 3 * 5120 * 128 // 256 + 2 * 256,
    )


def test_memory_is_the_sum_of_the_four_terms() -> None:
    L, S, layers, tokens = 64, 2**14, 8, 512
    terms = (
        (PaperCosts(1, 0, 0, 0), L * S / layers),
        (PaperCosts(0, 1, 0, 0), L * S / tokens),
        (PaperCosts(0, 0, 1, 0), layers * tokens),
        (PaperCosts(0, 0, 0, 1), tokens),
    )
    for costs, elements in terms:
        assert memory_elements(L, S, layers, tokens, costs) == elements
    assert unit_memory(L, S, layers, tokens) == memory_elements(L, S, layers, tokens, PaperCosts(1, 1, 1, 0))


def test_unit_optimum_in_the_three_regions() -> None:
    inside = unit_optimum(64, 512)  # L S = 2^15
    assert (inside.layers, inside.tokens, inside.memory) == pytest.approx((32, 32, 3 * 2**10))  # Eq. 7
    long = unit_optimum(8, 2**20)
    assert (long.layers, long.tokens, long.memory) == pytest.approx((8, 2**10, 2**20 + 2 * 8 * 2**10))  # Eq. 8
    deep = unit_optimum(2**20, 8)
    assert (deep.layers, deep.tokens, deep.memory) == pytest.approx((2**10, 8, 2**20 + 2 * 8 * 2**10))  # Eq. 9


@pytest.mark.parametrize(("L", "S"), [(1, 1), (64, 4096), (64, 4095), (48, 2**20), (100, 9), (100, 10), (7, 7)])
def test_unit_optimum_is_the_least_over_all_cells(L: int, S: int) -> None:
    best = unit_optimum(L, S)
    assert 1 <= best.layers <= L
    assert 1 <= best.tokens <= S
    rng = random.Random(0)
    for _ in range(500):
        layers, tokens = rng.uniform(1, L), rng.uniform(1, S)
        assert unit_memory(L, S, layers, tokens) >= best.memory * (1 - 1e-12)
        near = (
            min(max(best.layers * rng.uniform(0.9, 1.1), 1), L),
            min(max(best.tokens * rng.uniform(0.9, 1.1), 1), S),
        )
        assert unit_memory(L, S, *near) >= best.memory * (1 - 1e-12)


@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("L", [1, 2, 48, 64])
@pytest.mark.parametrize("S", [1, 2, 100, 255, 256, 257, 511, 512, 5000, 2**14])
def test_choose_equals_brute_force(L: int, S: int, mode: Any) -> None:
    costs = PaperCosts.from_mamba2(2560, mode=mode)
    step = 256 if S >= 256 else 1
    cells = [(layers, tokens) for layers in range(1, L + 1) for tokens in range(step, S + 1, step)]
    assert choose(L, S, costs) == min(cells, key=lambda cell: memory_elements(L, S, *cell, costs))


def test_choose_equals_brute_force_for_odd_costs() -> None:
    rng = random.Random(1)
    for _ in range(50):
        L, S = rng.randint(1, 30), rng.randint(256, 6000)
        costs = PaperCosts(*(rng.choice([0, 1, 10, 1000, 10**6]) for _ in range(4)))
        cells = [(layers, tokens) for layers in range(1, L + 1) for tokens in range(256, S + 1, 256)]
        least = min(memory_elements(L, S, *cell, costs) for cell in cells)
        assert memory_elements(L, S, *choose(L, S, costs), costs) == pytest.approx(least, rel=1e-12)


def test_choose_is_fast() -> None:
    costs = PaperCosts.from_mamba2(2560)
    choose(64, 2**10, costs)
    started = time.perf_counter()
    layers, tokens = choose(64, 2**21, costs)
    assert time.perf_counter() - started < 0.02
    assert 1 <= layers <= 64
    assert tokens % 256 == 0


def test_model_explains_what_the_paper_measured() -> None:
    # The model leaves out the head, the allocator's slack and more of a layer's backward, which the longest
    # sequences show most: there it gives half of what was measured.
    for model, L in (("370m", 48), ("1.3b", 48), ("2.7b", 64)):
        costs = PaperCosts.from_mamba2(D_MODEL[model])
        for power, measured in enumerate(PAPER_TABLE_3["ma-gc"][model], start=10):
            S = 2**power
            predicted = 2 * memory_elements(L, S, *choose(L, S, costs), costs) / 1e9
            assert 0.49 < predicted / measured < 1.2, (model, power)


def test_tables_agree_with_the_text() -> None:
    # "a 35% reduction in throughput", "up to 32x longer" (appendix D).
    assert 1 - PAPER_TABLE_8["ma-gc"][1] / PAPER_TABLE_8["gc-off"][1] == pytest.approx(0.35, abs=0.005)
    assert PAPER_TABLE_8["ma-gc"][0] == 32 * PAPER_TABLE_8["gc-off"][0]
    for method, (tokens, _) in PAPER_TABLE_8.items():
        assert 2 ** (9 + len(PAPER_TABLE_3[method]["2.7b"])) == tokens


def test_refuses_bad_sizes() -> None:
    with pytest.raises(PlanError, match="headdim=60 does not divide"):
        PaperCosts.from_mamba2(1024, headdim=60)
    with pytest.raises(PlanError, match="at least 1, got d_model=0"):
        PaperCosts.from_mamba2(0)
    with pytest.raises(PlanError, match="use 'paper' or 'code'"):
        PaperCosts.from_mamba2(1024, mode="table")  # pyright: ignore[reportArgumentType]
    for call in (lambda: unit_optimum(0, 1), lambda: choose(1, 0, PaperCosts(1, 1, 1, 1))):
        with pytest.raises(PlanError, match="at least one layer and one token"):
            call()
