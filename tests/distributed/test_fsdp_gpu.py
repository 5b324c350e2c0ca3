"""FSDP2 on GPUs, over NCCL and on FSDP's own streams: one rank per GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from magc import Plan
from magc.nn import Mamba2Config, Mamba2LM
from tests.distributed.ranks import Ranks
from tests.distributed.stacks import InTurn, OnGrid, loss_of, whole_gradients

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("gpus"), "nccl", min(torch.cuda.device_count(), 2))
    yield ranks
    ranks.close()


def compare(rank: int, steps: int) -> list[float]:
    """For each parameter, the difference of the last step's gradients from those without a grid, relative to the largest."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    x = torch.randn(1, 4096, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(rank))
    gradients: list[list[torch.Tensor]] = []
    for plan in (None, Plan(layers=1, tokens=512)):
        torch.manual_seed(0)
        layers = [Block(layer) for layer in Mamba2LM(Mamba2Config(d_model=256, n_layer=4, vocab_size=64)).cuda().layers]
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
        model = InTurn(layers) if plan is None else OnGrid(layers, plan)
        fully_shard(model, mp_policy=policy)
        for _ in range(steps):
            model.zero_grad()
            loss_of(model(x)).backward()
        gradients.append(whole_gradients(model))
    return [
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(gradients[1], gradients[0], strict=True)
    ]


class Block(torch.nn.Module):
    """A block whose two streams are added at once, so that it maps a tensor to a tensor."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, state: object = None) -> tuple[torch.Tensor, object]:
        (hidden, residual), new_state = self.block(x, state)
        return (hidden + residual).to(x.dtype), new_state


def test_gradients_over_nccl(gpus: Ranks) -> None:
    for errors in gpus.run(compare, 3):
        assert max(errors) < 0.03  # the rounding of bf16
