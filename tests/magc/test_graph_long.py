"""Captured cells at full size: a Mamba-2 of 2.7B parameters against the eager runner, and its layers against float32."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from magc import GridCheckpoint, Plan
from magc.nn import Mamba2Config, Mamba2LM
from magc.plan import PlanOrRule
from magc.runners.choice import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CONFIG = Mamba2Config.named("mamba2-2.7b")


def gradients(model: Mamba2LM, ids: Tensor, plan: PlanOrRule, runner: Runner) -> list[Tensor]:
    """Loss and gradients; a captured cell's in the second call of one, when all are replayed."""
    grid = GridCheckpoint(model.layers, plan, runner=runner)
    for _ in range(1 if runner == "eager" else 2):
        loss = grid.loss(ids[:, :-1], ids[:, 1:], stem=model.stem, head=model.head)
        found = torch.autograd.grad(loss, list(model.parameters()))
    grid.release_graphs()
    return [loss.detach(), *found]


def tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CONFIG.vocab_size, (1, count + 1), generator=generator).cuda()


def test_bits_of_the_eager_runner_at_65536_tokens() -> None:
    torch.manual_seed(0)
    model = Mamba2LM(CONFIG, device="cuda", dtype=torch.bfloat16)
    plan = Plan(layers=CONFIG.n_layer, tokens=4096)
    ids = tokens(2**16)
    eager = [value.cpu() for value in gradients(model, ids, plan, "eager")]
    gc.collect()
    torch.cuda.empty_cache()
    captured = gradients(model, ids, plan, "cuda-graph")
    assert all(torch.isfinite(value).all() for value in captured)
    for a, e in zip(captured, eager, strict=True):
        assert torch.equal(a.cpu(), e)


def test_no_further_from_float32_than_bfloat16_without_checkpoints() -> None:
    config = replace(CONFIG, n_layer=4)
    torch.manual_seed(0)
    exact = Mamba2LM(config, device="cuda", impl="reference")
    plain = Mamba2LM(config, device="cuda", impl="reference", dtype=torch.bfloat16)
    ours = Mamba2LM(config, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in exact.parameters():  # so that all models have the same weights
            parameter.copy_(parameter.bfloat16())
    for model in (plain, ours):
        model.load_state_dict(exact.state_dict())
    ids = tokens(2048)
    truth, rounded = (gradients(model, ids, Plan.none(), "eager") for model in (exact, plain))
    captured = gradients(ours, ids, Plan(layers=2, tokens=512), "cuda-graph")

    def error(found: list[Tensor]) -> float:
        return sum(float((a.float() - e).square().sum()) for a, e in zip(found, truth, strict=True)) ** 0.5

    assert 0 < error(captured) <= 1.1 * error(rounded)
