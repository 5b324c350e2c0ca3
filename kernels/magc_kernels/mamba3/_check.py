"""What Mamba-3's scan refuses."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from magc_kernels.mamba3.values import Mimo, Pairs, ScanState


def check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mimo: Mimo | None,
    pairs: str,
    state: ScanState | None,
    seq_idx: Tensor | None,
    prev_seq_idx: Tensor | None,
) -> None:
    """Refuse what the scan cannot work on: shapes, types and options. Arguments and errors as of `reference.mamba3`."""
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, length >= 1, heads, headdim), got {tuple(x.shape)}")
    batch, length, heads, headdim = x.shape
    if B.ndim != 5 or B.shape[:2] != (batch, length) or 0 in B.shape or heads % B.shape[3] or B.shape[4] % 2:
        raise ValueError(
            f"B must have shape ({batch}, {length}, rank, groups, d_state), groups dividing {heads} heads and d_state even; "
            f"got {tuple(B.shape)}"
        )
    rank, _, d_state = B.shape[2:]
    if angles.ndim != 3 or angles.shape[:2] != (batch, length) or 2 * angles.shape[2] > d_state:
        raise ValueError(
            f"angles must have shape ({batch}, {length}, at most d_state / 2 = {d_state // 2}), got {tuple(angles.shape)}"
        )
    if mimo is None and rank != 1:
        raise ValueError(f"B has {rank} ranks; pass mimo, the weights of each, or B of rank 1")
    if mimo is not None and (mimo.z is None) != (z is None):
        raise ValueError("z and mimo.z weight each other; pass both or neither")
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs={pairs!r} is not one of {', '.join(map(repr, get_args(Pairs)))}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (batch, length, heads)),
        "C": (C, tuple(B.shape)),
        "trap": (trap, (batch, length, heads)),
        "B_bias": (B_bias, (heads, rank, d_state)),
        "C_bias": (C_bias, (heads, rank, d_state)),
        "D": (D, (heads,)),
        "z": (z, tuple(x.shape)),
        "seq_idx": (seq_idx, (batch, length)),
    }
    if mimo is not None:
        weights = {"mimo.x": mimo.x, "mimo.z": mimo.z, "mimo.out": mimo.out}
        expected |= {name: (weight, (heads, rank, headdim)) for name, weight in weights.items()}
    if state is not None:
        expected["initial_state.turns"] = state.turns, (batch, heads, angles.shape[2])
        expected["initial_state.ssm"] = state.ssm, (batch, heads, headdim, d_state)
        expected["initial_state.B"] = state.B, (batch, rank, heads, d_state)
        expected["initial_state.x"] = state.x, (batch, heads, headdim)
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if prev_seq_idx is not None and seq_idx is None:
        raise ValueError("prev_seq_idx was given without seq_idx; pass both or neither")
