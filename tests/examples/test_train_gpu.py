"""Training on a GPU: bf16 on Triton kernels, the fused optimizer, plans by budget, and going on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from magc.nn import Mamba2Config
from tests.examples.runs import lines, make_run, weights, write_world
from tests.examples.tiny import make_config, make_model
from video_ma2mba.training.config import MemoryConfig, Parallel, Precision
from video_ma2mba.training.optimizer import MasterAdamW
from video_ma2mba.training.train import train

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    language = Mamba2Config(d_model=64, n_layer=4, vocab_size=257, d_state=64, headdim=64, tie_embeddings=False)
    model = make_model(replace(make_config(), language=language), dtype=torch.float32)
    return write_world(tmp_path_factory.mktemp("world"), model=model)


@pytest.mark.parametrize(
    ("precision", "parallel"), [("float32", "zero1"), ("bfloat16", "zero1"), ("bfloat16", "fsdp2")]
)
@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(budget="1GiB"), MemoryConfig(segment=64)])
def test_follows_the_cpu(
    world: Path, tmp_path: Path, precision: Precision, parallel: Parallel, memory: MemoryConfig
) -> None:
    expected = train(make_run(world, tmp_path / "cpu", precision="float32", steps=8))
    config = make_run(
        world, tmp_path / "gpu", precision=precision, parallel=parallel, memory=memory, data={"multiple": 128}, steps=8
    )
    found = train(replace(config, device="cuda"))
    tolerance = 1e-3 if precision == "float32" else 3e-2
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert all(step["peak_bytes"] > 0 for step in lines(tmp_path / "gpu", "step"))


def test_goes_on(world: Path, tmp_path: Path) -> None:
    """Sums of atomic additions may come in another order, so only nearly to the bit."""

    def end(done: int, _: Any) -> None:
        if done == 3:
            raise InterruptedError

    changes: dict[str, Any] = {"precision": "bfloat16", "device": "cuda"}
    whole = train(make_run(world, tmp_path / "whole", **changes))
    config = make_run(world, tmp_path / "killed", **changes)
    with pytest.raises(InterruptedError):
        train(config, on_step=end)
    found = train(config)
    assert found.losses == pytest.approx(whole.losses, rel=1e-2)
    for name, wanted in weights(whole.folder).items():
        torch.testing.assert_close(weights(found.folder)[name], wanted, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_updates_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, grads = torch.randn(300, 7).to(dtype), torch.randn(5, 300, 7).to(dtype)
    there, here = nn.Parameter(values.cuda()), nn.Parameter(values.clone())
    for parameter in (there, here):
        optimizer = MasterAdamW([parameter], lr=1e-2, weight_decay=0.1)
        for grad in grads:
            parameter.grad = grad.to(parameter.device)
            optimizer.step()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=tolerance, atol=tolerance)
