"""The Mamba-3 layer: Lahoti et al., "Mamba-3", arXiv 2603.15569, section 3.

Parameter names, shapes and their order inside the projections are those of mamba-ssm's `Mamba3`, so state dicts go both
ways. Shape letters: B batch, L length, D d_model, R rank, H heads, P headdim, G groups, N d_state, S angles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.errors import InputError
from magc.nn import segments
from magc.nn.carried import CarriesState, StateParts
from magc.nn.linear import Linear
from magc.nn.norm import GatedRMSNorm
from magc.nn.operators import Impl, check_impl
from magc_kernels._precision import compute_dtype
from magc_kernels.mamba3.reference import mamba3
from magc_kernels.mamba3.values import Mimo, ScanState


class Mamba3State(NamedTuple):
    """What a Mamba-3 layer carries from one segment to the next.

    Times 2 pi, `turns` is mamba-ssm's angle state; the other parts of the scan are its states as they are.
    """

    turns: Tensor
    """Angle of the rotation in turns of 2 pi, `(batch, heads, angles)`, float32 (float64 for float64 activations)."""
    ssm: Tensor
    """State of the scan, `(batch, heads, headdim, d_state)`, likewise."""
    B: Tensor
    """Input projections of the last token, with biases and turned, `(batch, rank, heads, d_state)`, likewise."""
    x: Tensor
    """Input of the scan at the last token, `(batch, heads, headdim)`, in the input's type."""
    seq_idx: Tensor | None = None
    """Document of the last token, `(batch,)` int32; None unless sequences are packed."""


class Mamba3(CarriesState[Mamba3State]):
    """Mamba-3 mixer with state in and out.

    Args:
        d_model: features of input and output.
        d_state: state size N per channel, even.
        expand: `d_inner = expand * d_model`.
        headdim: channels per head.
        ngroups: groups of heads that share B and C.
        rope_fraction: share of the state that rotates, 0.5 or 1.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes, drawn log-uniformly, and their floor.
        A_floor: least `-A`.
        is_outproj_norm: gated RMSNorm of each head after the scan; without it the gate is applied alone.
        is_mimo: several inputs and outputs per head.
        mimo_rank: how many; without `is_mimo` there is one.
        chunk_size: most tokens in a chunk of the scan. Results do not depend on it.
        impl: of the norms, see `magc.nn.operators.Impl`. The scan runs in plain PyTorch on every device.
        device: of all parameters.
        dtype: of the projections and norms; the other parameters are float32, float64 beside float64.

    Raises:
        InputError: sizes that do not divide, ranges that make no sense, an unknown `impl`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        *,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_inner = int(expand * d_model)
        self.headdim = headdim
        self.ngroups = ngroups
        self.rope_fraction = rope_fraction
        self.dt_init = (dt_min, dt_max, dt_init_floor)
        self.A_floor = A_floor
        self.is_outproj_norm = is_outproj_norm
        self.is_mimo = is_mimo
        self.rank = mimo_rank if is_mimo else 1
        self.chunk_size = chunk_size
        self.impl: Impl = check_impl(impl)
        self._check_sizes()

        self.nheads = self.d_inner // headdim
        self.num_angles = int(d_state * rope_fraction) // 2
        grouped = self.rank * ngroups * d_state
        # Order of the outputs: z, x, B, C, dt, A, trap, angles.
        self._in_proj_sizes = [self.d_inner] * 2 + [grouped] * 2 + [self.nheads] * 3 + [self.num_angles]
        self.in_proj = Linear(d_model, sum(self._in_proj_sizes), bias=False, device=device, dtype=dtype)

        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=wide))

        self.dt_bias = parameter(self.nheads)
        self.B_bias = parameter(self.nheads, self.rank, d_state)
        self.C_bias = parameter(self.nheads, self.rank, d_state)
        self.B_norm = GatedRMSNorm(d_state, impl=impl, device=device, dtype=dtype)
        self.C_norm = GatedRMSNorm(d_state, impl=impl, device=device, dtype=dtype)
        ranks = (self.nheads, self.rank, headdim)
        self.mimo_x = parameter(*ranks) if is_mimo else None
        self.mimo_z = parameter(*ranks) if is_mimo else None
        self.mimo_o = parameter(*ranks) if is_mimo else None
        self.D = parameter(self.nheads)
        self.norm = (
            GatedRMSNorm(self.d_inner, group_size=headdim, norm_before_gate=True, impl=impl, device=device, dtype=dtype)
            if is_outproj_norm
            else None
        )
        self.out_proj = Linear(self.d_inner, d_model, bias=False, device=device, dtype=dtype)
        self._reset_scan_parameters()
        self.mark_no_weight_decay()

    def reset_parameters(self) -> None:
        """Initialise all parameters as mamba-ssm does."""
        for part in (self.in_proj, self.B_norm, self.C_norm, self.norm, self.out_proj):
            if part is not None:
                part.reset_parameters()
        self._reset_scan_parameters()

    def mark_no_weight_decay(self) -> None:
        """Set `_no_weight_decay` on dt_bias and D, the mark mamba-ssm's training scripts look for."""
        for parameter in (self.dt_bias, self.D):
            vars(parameter).update(_no_weight_decay=True)

    def forward(
        self, x_BLD: Tensor, state: Mamba3State | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State]:
        """Run a segment.

        Args:
            x_BLD: `(batch, length, d_model)`.
            state: of the token before the segment; None at the start of the sequence.
            seq_idx: document of each token when several are packed into a row, `(batch, length)` integers. Give it for
                every segment of a sequence or for none.

        Returns:
            The output, shaped as `x_BLD`, and the state after the last token.

        Raises:
            InputError: `x_BLD` or `seq_idx` has a wrong shape or type.
            StateError: `state` does not fit the layer, the input, or the use of `seq_idx`.
        """
        segments.check_segment("Mamba3", x_BLD, self.d_model, seq_idx)
        z, x, B, C, dt, A, trap, angles = torch.split(self.in_proj(x_BLD), self._in_proj_sizes, dim=-1)
        self.check_state(state, x.shape[0], x.device, x.dtype, seq_idx)
        leading, wide = x.shape[:2], compute_dtype(x.dtype)
        x_BLHP = x.reshape(*leading, self.nheads, self.headdim)
        z_BLHP = z.reshape(*leading, self.nheads, self.headdim)
        grouped = (*leading, self.rank, self.ngroups, self.d_state)
        y, scan_state = mamba3(
            x_BLHP,
            functional.softplus(dt.to(wide) + self.dt_bias.to(wide)),
            torch.clamp(-functional.softplus(A.to(wide)), max=-self.A_floor),
            self.B_norm(B.reshape(grouped)),
            self.C_norm(C.reshape(grouped)),
            trap,
            angles,
            B_bias=self.B_bias,
            C_bias=self.C_bias,
            D=self.D,
            z=z_BLHP if self.norm is None else None,
            mimo=self._mimo(),
            pairs="halves" if self.is_mimo else "neighbours",
            initial_state=None if state is None else ScanState(*state[:4]),
            seq_idx=seq_idx,
            prev_seq_idx=None if state is None else state.seq_idx,
            chunk_size=self.chunk_size,
        )
        if self.norm is not None:
            y = self._gate(self.norm, y, z_BLHP)
        return self.out_proj(y.flatten(-2)), Mamba3State(*scan_state, segments.last_document(seq_idx))

    def state_parts(self, batch: int, dtype: torch.dtype) -> StateParts:
        """See `CarriesState`."""
        wide = torch.promote_types(dtype, torch.float32)
        return {
            "turns": ((batch, self.nheads, self.num_angles), wide),
            "ssm": ((batch, self.nheads, self.headdim, self.d_state), wide),
            "B": ((batch, self.rank, self.nheads, self.d_state), wide),
            "x": ((batch, self.nheads, self.headdim), dtype),
        }

    def make_state(self, *parts: Tensor, seq_idx: Tensor | None) -> Mamba3State:
        """See `CarriesState`."""
        return Mamba3State(*parts, seq_idx=seq_idx)

    def _mimo(self) -> Mimo | None:
        """Weights of the ranks; the gate and the sum over ranks are left to the norm if there is one."""
        if self.mimo_x is None:
            return None
        return Mimo(self.mimo_x) if self.norm is not None else Mimo(self.mimo_x, self.mimo_z, self.mimo_o)

    def _gate(self, norm: GatedRMSNorm, y: Tensor, z_BLHP: Tensor) -> Tensor:
        """Norm and gate; the sum over ranks, if there are several, comes after them."""
        if self.mimo_z is None or self.mimo_o is None:
            return norm(y.flatten(-2), z_BLHP.flatten(-2)).unflatten(-1, (self.nheads, self.headdim))
        # In the precision of the scan until the ranks are added up.
        wide = compute_dtype(y.dtype)
        z_BLRHP = z_BLHP.to(wide)[:, :, None] * self.mimo_z.to(wide).transpose(0, 1)
        y_BLRHP = norm(y.to(wide).flatten(-2), z_BLRHP.flatten(-2)).unflatten(-1, (self.nheads, self.headdim))
        return (y_BLRHP * self.mimo_o.to(wide).transpose(0, 1)).sum(2).to(y.dtype)

    @torch.no_grad()
    def _reset_scan_parameters(self) -> None:
        self.dt_bias.copy_(segments.draw_step_bias(self.nheads, *self.dt_init, self.dt_bias.device))
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)
        if self.mimo_x is not None and self.mimo_z is not None and self.mimo_o is not None:
            nn.init.constant_(self.mimo_x, 1 / self.rank)
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_o, 1 / self.rank)

    def _check_sizes(self) -> None:
        sizes = {
            "d_model": self.d_model,
            "d_state": self.d_state,
            "expand * d_model": self.d_inner,
            "headdim": self.headdim,
            "ngroups": self.ngroups,
            "mimo_rank": self.rank,
            "chunk_size": self.chunk_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        if self.d_inner % self.headdim:
            raise InputError(
                f"headdim={self.headdim} must divide expand * d_model = {self.d_inner}; change headdim, expand or d_model"
            )
        heads = self.d_inner // self.headdim
        if heads % self.ngroups:
            raise InputError(
                f"ngroups={self.ngroups} must divide the number of heads, expand * d_model / headdim = {heads}"
            )
        if self.rope_fraction not in (0.5, 1.0):
            raise InputError(f"rope_fraction must be 0.5 or 1, got {self.rope_fraction}")
        if self.d_state % 2 or int(self.d_state * self.rope_fraction) < 2:
            raise InputError(
                f"d_state={self.d_state} must be even and leave a pair that rotates, d_state * rope_fraction >= 2"
            )
        dt_min, dt_max, _ = self.dt_init
        if not 0 < dt_min <= dt_max:
            raise InputError(f"dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if self.A_floor < 0:
            raise InputError(f"A_floor must not be negative, got {self.A_floor}")
