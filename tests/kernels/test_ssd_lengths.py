"""The Triton scan where 32-bit offsets would wrap: millions of tokens, inputs as views with a layer's row pitch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_device import DEVICE  # isort: skip  (before Triton)

from magc_kernels.ssd import autograd
from tests.kernels.compare import randn

HEADDIM, D_STATE = 64, 128
SEGMENT = 1 << 18
EDGE = 1024


def views(length: int, pitch: int, heads: int) -> autograd.SSDInputs:
    """Inputs as columns of one buffer, whose rows are `pitch` apart. dt shares columns with C to save memory."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    buffer = torch.empty(1, length, pitch, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
    inner = heads * HEADDIM
    return autograd.SSDInputs(
        buffer[..., :inner].unflatten(-1, (heads, HEADDIM)),
        buffer[..., pitch - heads :],
        -torch.linspace(0.5, 16.0, heads, device=DEVICE),
        buffer[..., pitch - 2 * D_STATE : pitch - D_STATE].unsqueeze(2),
        buffer[..., pitch - D_STATE :].unsqueeze(2),
        D=randn(2, heads).float().to(DEVICE),
        dt_bias=torch.full((heads,), -4.0, device=DEVICE),
        initial_state=randn(3, 1, heads, HEADDIM, D_STATE).float().to(DEVICE),
        dt_softplus=True,
    )


def part(inputs: autograd.SSDInputs, start: int, state: Tensor | None) -> autograd.SSDInputs:
    """A dense copy of the tokens of one segment, from `state`."""
    changed = {n: getattr(inputs, n)[:, start : start + SEGMENT].contiguous() for n in ("x", "dt", "B", "C")}
    return autograd.SSDInputs(**{**vars(inputs), **changed, "initial_state": state})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "pitch", "heads"),
    [
        # A whole Mamba-2 2.7B layer, x a view of the convolution's output; as many heads of a 130M layer as fit
        # beside a buffer with the pitch of its projection.
        (1 << 21, 5376, 80),
        (1 << 23, 3352, 6),
    ],
)
def test_outputs_of_millions_of_tokens_equal_those_of_short_segments(length: int, pitch: int, heads: int) -> None:
    inputs = views(length, pitch, heads)
    y, final = autograd.forward(inputs)
    first, last = y[:, :EDGE].clone(), y[:, -EDGE:].clone()
    del y
    state = inputs.initial_state
    for start in range(0, length, SEGMENT):
        y_part, state = autograd.forward(part(inputs, start, state))
        if start == 0:
            assert torch.equal(y_part[:, :EDGE], first)
        if start == length - SEGMENT:
            assert torch.equal(y_part[:, -EDGE:], last)
    assert state is not None
    assert torch.equal(state, final)


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "pitch", "heads"), [(1 << 21, 10576, 16), (1 << 23, 1792, 6)])
def test_gradients_of_millions_of_tokens_equal_those_of_short_segments(length: int, pitch: int, heads: int) -> None:
    """The projection's pitch of a 2.7B layer and the convolution's of a 130M one, with as many heads as fit."""
    inputs = views(length, pitch, heads)
    # The same for every token, with stride 0: there is no memory for more.
    dy = randn(4, 1, 1, heads, HEADDIM).to(DEVICE, torch.bfloat16).expand(1, length, heads, HEADDIM)
    dfinal = randn(5, 1, heads, HEADDIM, D_STATE).float().to(DEVICE)
    _, _, saved = autograd.recompute(inputs, output=False)
    whole = autograd.vjp(saved, dy, dfinal)
    del saved
    edges = {
        n: (getattr(whole, n)[:, :EDGE].clone(), getattr(whole, n)[:, -EDGE:].clone()) for n in ("x", "dt", "B", "C")
    }
    dinitial = whole.initial_state
    del whole

    starts = list(range(0, length, SEGMENT))
    states = [inputs.initial_state]
    for start in starts:
        states.append(autograd.recompute(part(inputs, start, states[-1]), output=False)[1])
    dstate = dfinal
    for start, state in zip(reversed(starts), reversed(states[:-1]), strict=True):
        _, _, saved = autograd.recompute(part(inputs, start, state), output=False)
        d = autograd.vjp(saved, dy[:, start : start + SEGMENT], dstate)
        dstate = d.initial_state
        for name, (first, last) in edges.items():
            for wanted, edge, tokens in ((0, first, slice(EDGE)), (length - SEGMENT, last, slice(-EDGE, None))):
                if start == wanted:
                    actual = getattr(d, name)[:, tokens].float()
                    # The order in which heads are summed in dB and dC depends on the launch's size.
                    assert (actual - edge.float()).norm() <= 3e-3 * actual.norm(), (name, start)
                    assert name in ("B", "C") or torch.equal(actual, edge.float()), (name, start)
    assert torch.equal(dstate, dinitial)
