"""Error of the bfloat16 scan on the GPU at the shape of a Mamba-2 2.7B layer, and beside mamba-ssm's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.autotuning import take_smallest_candidates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# dA, dD and dt_bias are a few numbers each, whose errors are luck.
PER_TOKEN_AND_STATES = ("y", "final", "dx", "ddt", "dB", "dC", "dinitial_state")


# y and dC are products with the chunk states, which are kept in bfloat16.
FROM_STATES = ("y", "dC")


def test_error_is_near_that_of_rounding_inputs_and_outputs() -> None:
    """The reference with bfloat16 inputs computes in float32: its error is that of rounding what it takes and
    returns, which no kernel can avoid.
    """
    from benchmarks import beside_mamba_ssm as beside

    exact, dy, dfinal = beside.scan_inputs(1024, 1, torch.float64)
    rounded, dy_16, dfinal_32 = beside.scan_inputs(1024, 1, torch.bfloat16)
    truth = beside.plain(exact, dy, dfinal, torch.float64)
    reference = beside.plain(rounded, dy_16, dfinal_32)
    actual = beside.ours(rounded, dy_16, dfinal_32)
    for name in PER_TOKEN_AND_STATES:
        error, bound = (beside.relative_l2(values[name], truth[name]) for values in (actual, reference))
        assert error <= (1.25 if name in FROM_STATES else 1.1) * bound, (name, error, bound)


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm")
def test_error_is_at_most_a_tenth_above_that_of_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same bfloat16 inputs, so that only what the kernels round counts."""
    from benchmarks import beside_mamba_ssm as beside

    take_smallest_candidates(monkeypatch)
    for name, our, their in beside.errors(beside.load(None), 1024):
        if name in PER_TOKEN_AND_STATES:
            assert our <= 1.1 * their, (name, our, their)
