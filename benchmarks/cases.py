"""The models that the benchmarks train, sized for the device, and one measured training step of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import GridCheckpoint, MemoryMeter, Plan
from magc.cost import CostModel
from magc.integrations.torch_rnn import split_rnn
from magc.nn import Mamba2Config, Mamba2LM
from magc.profile import profile
from magc.request import make_request
from magc.stack import build_stack

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Case:
    """A language model and one batch: everything of a training step but the plan.

    Attributes:
        name: of the model.
        model: holds the parameters.
        layers, stem, head: its parts, as `GridCheckpoint.loss` takes them.
        plain: the summed loss without magc.
        inputs, targets: token ids ``(batch, seq_len)``.
    """

    name: str
    model: nn.Module
    layers: Sequence[nn.Module]
    stem: nn.Module
    head: nn.Module
    plain: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return self.inputs.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.inputs.device

    def step(self, plan: Plan | None, *, disk_dir: str | None = None) -> Callable[..., None]:
        """A forward and backward under a plan, of the first ``tokens`` tokens; None for plain PyTorch without magc."""
        grid = None if plan is None else GridCheckpoint(self.layers, plan, disk_dir=disk_dir)

        def run(tokens: int | None = None) -> None:
            for parameter in self.model.parameters():
                parameter.grad = None
            inputs, targets = self.inputs[:, :tokens], self.targets[:, :tokens]
            if grid is None:
                loss = self.plain(inputs, targets)
            else:
                loss = grid.loss(inputs, targets, stem=self.stem, head=self.head, reduction="sum")
            loss.backward()
            wait(self.device)

        return run

    def costs(self, lengths: Sequence[int]) -> CostModel:
        """Measured costs, at segment lengths of which those beyond the sequence are left out."""
        stack = build_stack(self.layers, stem=self.stem, head=self.head)
        with torch.enable_grad():
            request = make_request(stack, self.inputs, None, {}, targets=self.targets)
        return profile(request, sorted({length for length in lengths if length <= self.seq_len} | {self.seq_len}))


class _Head(nn.Module):
    """Projection to the vocabulary and summed cross entropy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.projection(x).flatten(0, 1).float()
        total = functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        return total, torch.tensor(targets.numel(), device=targets.device)


class _LSTM(nn.Module):
    """An LSTM language model."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(VOCABULARY, width)
        self.rnn = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = _Head(width)

    def plain(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.head(self.rnn(self.stem(inputs))[0], targets)[0]


def mamba2(device: torch.device, *, width: int, layers: int, seq_len: int, batch: int = 1) -> Case:
    """A Mamba-2 language model."""
    torch.manual_seed(0)
    config = Mamba2Config(d_model=width, n_layer=layers, vocab_size=VOCABULARY, d_state=32, headdim=32, chunk_size=64)
    model = Mamba2LM(config, device=device)

    def plain(inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), reduction="sum")

    return Case("mamba2", model, model.layers, model.stem, model.head, plain, *_batch(device, batch, seq_len))


def lstm(device: torch.device, *, width: int, layers: int, seq_len: int, batch: int = 1) -> Case:
    """An LSTM language model, its layers those of one ``torch.nn.LSTM``."""
    torch.manual_seed(0)
    model = _LSTM(width, layers).to(device)
    parts = split_rnn(model.rnn)
    return Case("lstm", model, parts, model.stem, model.head, model.plain, *_batch(device, batch, seq_len))


def _batch(device: torch.device, batch: int, seq_len: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device)


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes of a step beyond those before it. Let another step go first, which may set things up."""
    with MemoryMeter(device) as meter:
        step()
    return meter.peak_bytes


def forwards(step: Callable[[], None], case: Case) -> float:
    """How often a step runs each layer over each token, counted by hooks."""
    tokens = 0

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal tokens
        x = args[0]
        tokens += (x if isinstance(x, Tensor) else x[0]).shape[1]

    hooks = [layer.register_forward_pre_hook(count) for layer in case.layers]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return tokens / (len(case.layers) * case.seq_len)
