"""Parameter groups, and AdamW with float32 copies of bf16 weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.examples.tiny import make_config, make_model
from video_ma2mba.training import optimizer
from video_ma2mba.training.config import RatesConfig
from video_ma2mba.training.groups import parameter_groups
from video_ma2mba.training.optimizer import MasterAdamW

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("tied", [True, False])
def test_groups(tied: bool) -> None:
    model = make_model(make_config(tied=tied))
    groups = parameter_groups(model, RatesConfig(language=2.0, vision=1.0, projector=3.0), 0.05)
    assert [(group.part, group.rate, group.weight_decay) for group in groups] == [
        ("language", 2.0, 0.05),
        ("language", 2.0, 0.0),
        ("vision", 1.0, 0.05),
        ("vision", 1.0, 0.0),
        ("projector", 3.0, 0.05),
        ("projector", 3.0, 0.0),
    ]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(trained)
    assert sum(group.count for group in groups) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    decay = {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in groups[0].names}
    plain = {"embedding.weight", "in_proj.weight", "conv1d.weight", "out_proj.weight"}
    assert decay == (plain if tied else plain | {"lm_head.weight"})
    kept = {name.rsplit(".", 1)[-1] for name in groups[1].names}
    assert kept == {"A_log", "D", "dt_bias", "bias", "weight"}
    assert all("norm" in name for name in groups[1].names if name.endswith("weight"))
    assert groups[5].names == ("projector.0.bias", "projector.2.bias")


def test_frozen_parts_have_no_group() -> None:
    model = make_model()
    groups = parameter_groups(model, RatesConfig(projector=1.0), 0.05)
    assert {group.part for group in groups} == {"projector"}
    assert {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad} == {"projector"}


def gradients(step: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


SHAPES: list[tuple[int, ...]] = [(3, 4), (5,), (2, 2, 2)]


def update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, dtype: torch.dtype) -> None:
    for step in range(steps):
        for parameter, grad in zip(parameters, gradients(step + 1, SHAPES, dtype), strict=True):
            parameter.grad = grad.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bucket", [1, 1 << 26])
def test_precise_weights_are_updated_as_by_torch(
    dtype: torch.dtype, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "BUCKET", bucket)
    ours, theirs = ([nn.Parameter(each) for each in gradients(0, SHAPES, dtype)] for _ in range(2))
    update(MasterAdamW(ours, **OPTIONS), ours, 5, dtype)
    update(torch.optim.AdamW(theirs, **OPTIONS), theirs, 5, dtype)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_rounded_weights_follow_precise_ones() -> None:
    """The weights are those of float32 training, rounded, after many steps too small for bf16."""
    start = gradients(0, SHAPES, torch.bfloat16)
    options = {**OPTIONS, "lr": 1e-5}
    ours = [nn.Parameter(each.clone()) for each in start]
    theirs = [nn.Parameter(each.float()) for each in start]
    update(MasterAdamW(ours, **options), ours, 50, torch.bfloat16)
    update(torch.optim.AdamW(theirs, **options), theirs, 50, torch.bfloat16)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other.to(torch.bfloat16))


def test_updates_that_bf16_would_lose_add_up() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1e-3, weight_decay=0.0)
    seen: list[float] = []
    for _ in range(8):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        seen.append(parameter.item())
    assert seen[0] == 1.0  # 0.999 rounds to 1
    assert seen[-1] == pytest.approx(0.992, abs=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_exactly(dtype: torch.dtype) -> None:
    whole = [nn.Parameter(each) for each in gradients(0, SHAPES, dtype)]
    update(MasterAdamW(whole, **OPTIONS), whole, 6, dtype)

    first = [nn.Parameter(each) for each in gradients(0, SHAPES, dtype)]
    names = {parameter: str(index) for index, parameter in enumerate(first)}
    before = MasterAdamW(first, **OPTIONS)
    update(before, first, 3, dtype)
    state = before.named_state(names)

    second = [nn.Parameter(each.detach().clone()) for each in first]
    renamed = {parameter: str(index) for index, parameter in enumerate(second)}
    after = MasterAdamW(second, **OPTIONS)
    after.load_named_state(renamed, state)
    for step in range(3, 6):
        for parameter, grad in zip(second, gradients(step + 1, SHAPES, dtype), strict=True):
            parameter.grad = grad
        after.step()
    assert all(torch.equal(mine, other) for mine, other in zip(second, whole, strict=True))


def test_state_of_other_parameters_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(KeyError, match="has other, which this optimizer does not train"):
        MasterAdamW([parameter]).load_named_state({parameter: "mine"}, {"other": {}})


def test_parameters_without_gradient_stay() -> None:
    parameter = nn.Parameter(torch.ones(1))
    MasterAdamW([parameter], weight_decay=0.5).step()
    assert parameter.item() == 1.0
