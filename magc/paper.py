"""The memory model of the paper, kept to reproduce its numbers and its choice of cells.

Source: Lee et al., "Look Every Frame All at Once: Video-Ma2mba for Efficient Long-form Video Understanding
with Multi-Axis Gradient Checkpointing", arXiv 2411.19460, section 3.3 and appendices C and D.

It counts elements by the sizes of a Mamba-2 layer (magc's own planner measures bytes and seconds instead). In
the paper's symbols, ``num_layers`` is L, ``seq_len`` is S, a cell has ``layers`` (l) by ``tokens`` (s), and M
is the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cbrt, sqrt
from typing import Literal, Self

import numpy as np

from magc.errors import PlanError

TOKEN_MULTIPLE = 256
"""Cells have a multiple of this many tokens, the chunk size of Mamba-2's scan (section 4.1)."""


@dataclass(frozen=True, slots=True)
class PaperCosts:
    """Elements per layer that Eqs. 13-16 multiply; an element has the two bytes of bfloat16.

    Attributes:
        c_layer: kept per token at each layer border, ``C_L-ckpt``.
        c_sequence: kept per layer at each segment border (the layer's state), ``C_S-ckpt``.
        c_grid: kept per token and layer of the cell being back-propagated, ``C_grid``.
        c_state: recomputed per token in the backward of one layer, ``C_state``.
    """

    c_layer: int
    c_sequence: int
    c_grid: int
    c_state: int

    @classmethod
    def from_mamba2(
        cls,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        d_conv: int = 4,
        ngroups: int = 1,
        headdim: int = 64,
        mode: Literal["paper", "code"] = "paper",
    ) -> Self:
        """Costs of a Mamba-2 layer.

        ``mode="paper"`` gives Table 7. Its caption says that the states, which are float32, count as two
        elements; its numbers count them once, and count a whole state per token in ``C_state``.

        ``mode="code"`` counts as the authors' published implementation does for bfloat16 with a float32
        residual: float32 twice, the residual beside the layer's output at layer borders, and states in
        ``C_state`` once per chunk of 256 tokens.

        Raises:
            PlanError: a size is less than 1, ``headdim`` does not divide ``expand * d_model``, or ``mode``
                is another.
        """
        if min(d_model, d_state, expand, d_conv, ngroups, headdim) < 1:
            raise PlanError(
                f"sizes of a Mamba-2 layer must be at least 1, got d_model={d_model}, d_state={d_state}, "
                f"expand={expand}, d_conv={d_conv}, ngroups={ngroups}, headdim={headdim}."
            )
        d_inner = expand * d_model
        if d_inner % headdim:
            raise PlanError(f"headdim={headdim} does not divide expand * d_model = {d_inner}.")
        nheads = d_inner // headdim
        conv_channels = d_inner + 2 * ngroups * d_state
        conv_state = (d_conv - 1) * conv_channels
        ssm_state = d_inner * d_state
        grid = d_inner + conv_channels + nheads + d_inner  # the input projection's output, and the scan's
        match mode:
            case "paper":
                return cls(d_model, ssm_state + conv_state, grid, ssm_state + conv_channels)
            case "code":
                scan = 2 * 2 * nheads + 3 * ssm_state // TOKEN_MULTIPLE + 2 * TOKEN_MULTIPLE
                return cls(3 * d_model, 2 * ssm_state + conv_state, grid, conv_channels + scan)
            case _:
                raise PlanError(f"mode={mode!r} is unknown: use 'paper' or 'code'.")


@dataclass(frozen=True, slots=True)
class UnitOptimum:
    """Cell of least ``unit_memory`` over real ``1 <= l <= L`` and ``1 <= s <= S``, and that memory."""

    layers: float
    tokens: float
    memory: float


def unit_memory(num_layers: int, seq_len: int, layers: float, tokens: float) -> float:
    """Eq. 4, all costs one: ``M = L S / l + L S / s + l s``."""
    return num_layers * seq_len * (1 / layers + 1 / tokens) + layers * tokens


def unit_optimum(num_layers: int, seq_len: int) -> UnitOptimum:
    """Where Eq. 4 is least (Eqs. 5-9).

    In the interior ``l = s = (L S)^(1/3)`` and ``M = 3 (L S)^(2/3)`` (Eq. 7); with ``L^2 <= S`` all layers,
    ``s = sqrt(S)`` and ``M = S + 2 L sqrt(S)`` (Eq. 8); with ``S^2 <= L`` all tokens, ``l = sqrt(L)`` and
    ``M = L + 2 S sqrt(L)`` (Eq. 9).

    Raises:
        PlanError: ``num_layers`` or ``seq_len`` is less than 1.
    """
    _check(num_layers, seq_len)
    if num_layers**2 <= seq_len:
        layers, tokens = float(num_layers), sqrt(seq_len)
    elif seq_len**2 <= num_layers:
        layers, tokens = sqrt(num_layers), float(seq_len)
    else:
        layers = tokens = cbrt(num_layers * seq_len)
    return UnitOptimum(layers, tokens, unit_memory(num_layers, seq_len, layers, tokens))


def memory_elements(num_layers: int, seq_len: int, layers: float, tokens: float, costs: PaperCosts) -> float:
    """Eqs. 12-16: ``M = (L S / l) C_L + (L S / s) C_S + l s C_grid + s C_state`` two-byte elements."""
    cells = num_layers * seq_len
    kept = cells / layers * costs.c_layer + cells / tokens * costs.c_sequence
    return kept + layers * tokens * costs.c_grid + tokens * costs.c_state


def choose(num_layers: int, seq_len: int, costs: PaperCosts) -> tuple[int, int]:
    """The cell ``(layers, tokens)`` of least ``memory_elements``.

    Layers are 1 to ``num_layers``. Tokens are the multiples of 256 up to ``seq_len``; sequences shorter than
    256 tokens, of which the paper says nothing, may be cut anywhere. Of equal cells the one with fewer
    layers, then fewer tokens, is taken.

    Raises:
        PlanError: ``num_layers`` or ``seq_len`` is less than 1.
    """
    _check(num_layers, seq_len)
    step = TOKEN_MULTIPLE if seq_len >= TOKEN_MULTIPLE else 1
    layers = np.arange(1, num_layers + 1, dtype=np.float64)[:, None]
    # For given layers, memory is a / s + b s + c: convex in s, so the best multiple is next to sqrt(a / b).
    slope = np.maximum(layers * costs.c_grid + costs.c_state, 1e-100)  # costs may be zero
    best = np.sqrt(num_layers * seq_len * costs.c_sequence / slope)
    below = np.clip(np.floor(best / step), 1, seq_len // step)
    above = np.clip(below + 1, 1, seq_len // step)
    tokens = step * np.concatenate([below, above], axis=1)
    cells = num_layers * seq_len
    memory = cells / layers * costs.c_layer + cells / tokens * costs.c_sequence
    memory = memory + layers * tokens * costs.c_grid + tokens * costs.c_state
    row, column = divmod(int(np.argmin(memory)), 2)
    return row + 1, int(tokens[row, column])


def _check(num_layers: int, seq_len: int) -> None:
    if num_layers < 1 or seq_len < 1:
        raise PlanError(f"need at least one layer and one token, got {num_layers} layers and {seq_len} tokens.")


PAPER_TABLE_3: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "gc-off": {
        "370m": (0.9, 1.7, 3.3, 6.6, 13.3, 26.5, 52.9),
        "1.3b": (1.7, 3.3, 6.5, 13.1, 26.0, 52.1),
        "2.7b": (2.7, 5.4, 10.7, 21.4, 42.6),
    },
    "gc-on": {
        "370m": (0.4, 0.7, 1.3, 2.7, 5.5, 10.9, 21.9, 43.7),
        "1.3b": (0.7, 1.4, 2.7, 5.5, 10.9, 21.8, 43.5),
        "2.7b": (1.1, 2.2, 4.4, 8.7, 17.4, 34.7, 69.3),
    },
    "sqrt-gc": {
        "370m": (0.2, 0.4, 0.8, 1.6, 3.1, 6.2, 12.3, 24.6, 49.3),
        "1.3b": (0.4, 0.8, 1.5, 3.1, 6.1, 12.1, 24.3, 48.5),
        "2.7b": (0.6, 1.1, 2.2, 4.4, 8.7, 17.3, 34.6, 69.3),
    },
    "ma-gc": {
        "370m": (0.3, 0.5, 0.6, 1.1, 1.6, 2.4, 3.8, 5.5, 8.8, 15.4, 23.1, 40.2),
        "1.3b": (0.5, 0.9, 1.2, 2.1, 3.7, 4.8, 7.4, 11.3, 17.7, 30.8, 45.8),
        "2.7b": (0.7, 1.1, 1.8, 2.7, 4.2, 6.9, 10.5, 17.2, 25.9, 42.2),
    },
}
"""Table 3: measured memory in GB without weights and gradients, by method and Mamba-2 model, for sequences of
``2^10, 2^11, ...`` tokens as far as an A100 80GB goes. (The paper's 350M is the model published as 370m.)"""

PAPER_TABLE_8: Mapping[str, tuple[int, float]] = {
    "gc-off": (2**14, 12_167.86),
    "gc-on": (2**16, 8_449.93),
    "sqrt-gc": (2**17, 8_617.66),
    "ma-gc": (2**19, 7_913.58),
}
"""Table 8: sequence length and tokens per second (forward and backward), Mamba-2 2.7b, A100 80GB."""
