"""The Mamba-2 layer: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7.

Parameter names, shapes and their order inside the projections are those of mamba-ssm's `Mamba2`, so state
dicts go both ways. Shape letters: B batch, L length, D d_model, C conv channels, W conv width, H heads, P
headdim, G groups, N d_state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.ambient import is_output_needed
from magc.errors import InputError
from magc.nn import fused, segments
from magc.nn.carried import CarriesState, StateParts
from magc.nn.linear import Linear
from magc.nn.mamba2_values import Mamba2State
from magc.nn.norm import GatedRMSNorm
from magc.nn.operators import Choice, Impl, Operators, check_impl, choose, operators
from magc_kernels._packing import keep_if
from magc_kernels.mamba2.values import Keep

if TYPE_CHECKING:
    from magc_kernels.configs import KernelConfigs

TRITON_HEADDIMS = (16, 32, 64, 128)
TRITON_D_STATES = (16, 32, 64, 128, 256)
"""Sizes that `magc_kernels.ssd.autograd` takes, known here without Triton."""


class Mamba2(CarriesState[Mamba2State]):
    """Mamba-2 mixer with state in and out.

    Args:
        d_model: features of input and output.
        d_state: state size N per channel.
        d_conv: width of the causal convolution, 2 to 4.
        conv_init: initialise the convolution uniformly in ±conv_init; None for torch's default.
        expand: `d_inner = expand * d_model`.
        headdim: channels per head.
        d_ssm: channels that pass through the scan; the other `d_inner - d_ssm` form a gated MLP. None: all.
        ngroups: groups of heads that share B and C.
        A_init_range: range of the initial `-A`, drawn uniformly.
        D_has_hdim: one skip weight per channel instead of per head.
        rmsnorm: gated RMSNorm after the scan; without it the gate is applied alone.
        norm_before_gate: order of norm and gate.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes, drawn log-uniformly, and their floor.
        dt_limit: bounds the step sizes are clamped to.
        bias, conv_bias: whether the projections and the convolution have biases.
        chunk_size: most tokens in a chunk of the scan. An implementation may take less: results do not depend
            on it.
        keep: how much the Triton implementation keeps for the backward, from the least memory to the least work:
            "projection", "states" or "outputs"; bytes are in `magc_kernels.mamba2.autograd`. Results do not depend on
            it.
        configs: launch configurations of the Triton kernels (`magc_kernels.tune`); None for the shipped ones.
        impl: see `magc.nn.operators.Impl`.
        device, dtype: of all parameters.

    Raises:
        InputError: sizes that do not divide, ranges that make no sense, an unknown `impl`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        *,
        keep: Keep = "states",
        configs: KernelConfigs | None = None,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.d_inner = expand * d_model
        self.headdim = headdim
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.d_mlp = self.d_inner - self.d_ssm
        self.ngroups = ngroups
        self.A_init_range = A_init_range
        self.D_has_hdim = D_has_hdim
        self.dt_init = (dt_min, dt_max, dt_init_floor)
        self.dt_limit = dt_limit
        self.chunk_size = chunk_size
        self.keep: Keep = keep
        self.configs = configs
        self.impl: Impl = check_impl(impl)
        self._check_sizes()

        self.nheads = self.d_ssm // headdim
        self.conv_channels = self.d_ssm + 2 * ngroups * d_state
        # Order of the outputs: z and x of the MLP part, z, x, B, C, dt.
        self._in_proj_sizes = [self.d_mlp, self.d_mlp, self.d_ssm, self.conv_channels, self.nheads]
        self.in_proj = Linear(d_model, sum(self._in_proj_sizes), bias=bias, device=device, dtype=dtype)
        # Only holds the parameters under their usual names; the operator takes them from here.
        self.conv1d = nn.Conv1d(
            self.conv_channels,
            self.conv_channels,
            d_conv,
            groups=self.conv_channels,
            bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, device=device, dtype=dtype))
        self.A_log = nn.Parameter(torch.empty(self.nheads, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, device=device, dtype=dtype))
        self.norm = (
            GatedRMSNorm(
                self.d_ssm,
                group_size=self.d_ssm // ngroups,
                norm_before_gate=norm_before_gate,
                impl=impl,
                device=device,
                dtype=dtype,
            )
            if rmsnorm
            else None
        )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self._reset_scan_parameters()
        self.mark_no_weight_decay()

    def reset_parameters(self) -> None:
        """Initialise all parameters as mamba-ssm does."""
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        self.out_proj.reset_parameters()
        self._reset_scan_parameters()

    def mark_no_weight_decay(self) -> None:
        """Set `_no_weight_decay` on dt_bias, A_log and D, the mark mamba-ssm's training scripts look for."""
        for parameter in (self.dt_bias, self.A_log, self.D):
            vars(parameter).update(_no_weight_decay=True)

    def state_parts(self, batch: int, dtype: torch.dtype) -> StateParts:
        """See `CarriesState`."""
        return {
            "conv": ((batch, self.d_conv - 1, self.conv_channels), dtype),
            "ssm": ((batch, self.nheads, self.headdim, self.d_state), torch.promote_types(dtype, torch.float32)),
        }

    def make_state(self, *parts: Tensor, seq_idx: Tensor | None) -> Mamba2State:
        """See `CarriesState`."""
        return Mamba2State(*parts, seq_idx=seq_idx)

    def forward(
        self, x_BLD: Tensor, state: Mamba2State | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Run a segment. A segment of one token takes the recurrent form.

        Args:
            x_BLD: `(batch, length, d_model)`.
            state: of the token before the segment; None at the start of the sequence.
            seq_idx: document of each token when several are packed into a row, `(batch, length)` integers.
                Give it for every segment of a sequence or for none.

        Returns:
            The output, shaped as `x_BLD`, and the state after the last token.

        Raises:
            InputError: `x_BLD` or `seq_idx` has a wrong shape or type.
            StateError: `state` does not fit the layer, the input, or the use of `seq_idx`.
        """
        segments.check_segment("Mamba2", x_BLD, self.d_model, seq_idx)
        if fused.runs_fused(self, x_BLD):
            y, _, new_state = fused.run(self, x_BLD, state, seq_idx, output_needed=is_output_needed(self))
            return y, new_state
        z0, x0, z, xBC, dt = torch.split(self.in_proj(x_BLD), self._in_proj_sizes, dim=-1)
        self.check_state(state, xBC.shape[0], xBC.device, xBC.dtype, seq_idx)
        run = operators(self.impl, xBC.device, xBC.dtype, self._obstacle())
        # In the precision of the scan: a half-precision exp could overflow.
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        if x_BLD.shape[1] == 1:
            y, new_state = self._step(run, xBC, dt, z, A, state, seq_idx)
        else:
            y, new_state = self._scan(run, xBC, dt, z, A, state, seq_idx)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_mlp:
            y = torch.cat([functional.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y), new_state

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        return choose(self.impl, device, dtype, self._obstacle())

    def _obstacle(self) -> str:
        """Why the Triton scan does not take these sizes; empty if it does."""
        if self.headdim not in TRITON_HEADDIMS:
            return f"the Triton scan takes no headdim {self.headdim}"
        if self.d_state not in TRITON_D_STATES:
            return f"the Triton scan takes no d_state {self.d_state}"
        return "" if self.chunk_size >= 16 else "the Triton scan takes no chunk_size under 16"

    def _scan(
        self,
        run: Operators,
        xBC: Tensor,
        dt: Tensor,
        z: Tensor,
        A: Tensor,
        state: Mamba2State | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Mamba2State]:
        prev_seq_idx = None if state is None else state.seq_idx
        conv_config, scan_config = self._operator_configs(run, xBC.dtype)
        xBC, conv_state = run.causal_conv1d(
            xBC,
            *fused.taps_of(self.conv1d),
            activation="silu",
            initial_state=None if state is None else state.conv,
            seq_idx=seq_idx,
            prev_seq_idx=prev_seq_idx,
            **conv_config,
        )
        x, B, C = self._split_conv_output(xBC)
        y, ssm_state = run.ssd(
            x,
            dt,
            A,
            B,
            C,
            D=self._skip(),
            z=z.unflatten(-1, (self.nheads, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            prev_seq_idx=prev_seq_idx,
            chunk_size=min(self.chunk_size, run.max_chunk_size),
            **scan_config,
        )
        return y.flatten(-2), Mamba2State(conv_state, ssm_state, segments.last_document(seq_idx))

    def _step(
        self,
        run: Operators,
        xBC: Tensor,
        dt: Tensor,
        z: Tensor,
        A: Tensor,
        state: Mamba2State | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Mamba2State]:
        if state is None:
            state = self.initial_state(xBC.shape[0], device=xBC.device, dtype=xBC.dtype)
        conv_state, ssm_state = state.conv, state.ssm
        if seq_idx is not None and state.seq_idx is not None:
            same_document = seq_idx[:, 0] == state.seq_idx
            conv_state, ssm_state = keep_if(same_document, conv_state), keep_if(same_document, ssm_state)
        xBC_BC, conv_state = run.causal_conv1d_step(
            xBC.squeeze(1), *fused.taps_of(self.conv1d), conv_state, activation="silu"
        )
        x, B, C = self._split_conv_output(xBC_BC)
        y, ssm_state = run.ssd_step(
            x,
            dt.squeeze(1),
            A,
            B,
            C,
            ssm_state,
            D=self._skip(),
            z=z.squeeze(1).unflatten(-1, (self.nheads, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return y.flatten(-2).unsqueeze(1), Mamba2State(conv_state, ssm_state, segments.last_document(seq_idx))

    def _operator_configs(self, run: Operators, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        """Launch configurations of the convolution and the scan, as arguments that only the Triton ones take."""
        if self.configs is None or run.name != "triton":
            return {}, {}
        from magc_kernels.configs import ConvShape, SSDShape

        conv = self.configs.conv.get(ConvShape(dtype, self.d_conv))
        return {"config": conv}, {"config": self.configs.ssd.get(SSDShape(dtype, self.headdim, self.d_state))}

    def _split_conv_output(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group_sizes = [self.ngroups * self.d_state] * 2
        x, B, C = torch.split(xBC, [self.d_ssm, *group_sizes], dim=-1)
        leading = xBC.shape[:-1]
        return (
            x.reshape(*leading, self.nheads, self.headdim),
            B.reshape(*leading, self.ngroups, self.d_state),
            C.reshape(*leading, self.ngroups, self.d_state),
        )

    def _skip(self) -> Tensor:
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    @torch.no_grad()
    def _reset_scan_parameters(self) -> None:
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        self.dt_bias.copy_(segments.draw_step_bias(self.nheads, *self.dt_init, self.dt_bias.device))
        A = torch.empty(self.nheads, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(A.uniform_(*self.A_init_range).log())
        nn.init.ones_(self.D)

    def _check_sizes(self) -> None:
        sizes = {
            "d_model": self.d_model,
            "d_state": self.d_state,
            "expand * d_model": self.d_inner,
            "headdim": self.headdim,
            "ngroups": self.ngroups,
            "chunk_size": self.chunk_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        if not 2 <= self.d_conv <= 4:
            raise InputError(f"d_conv must be 2, 3 or 4, got {self.d_conv}")
        if not 1 <= self.d_ssm <= self.d_inner or self.d_ssm % self.headdim:
            raise InputError(
                f"d_ssm={self.d_ssm} must be a multiple of headdim={self.headdim} "
                f"and at most expand * d_model = {self.d_inner}; change headdim, d_ssm, expand or d_model"
            )
        if (self.d_ssm // self.headdim) % self.ngroups:
            raise InputError(
                f"ngroups={self.ngroups} must divide the number of heads, "
                f"d_ssm / headdim = {self.d_ssm // self.headdim}"
            )
        if self.keep not in get_args(Keep):
            raise InputError(f"keep={self.keep!r} is not one of {', '.join(map(repr, get_args(Keep)))}")
        low, high = self.A_init_range
        if not 0 < low <= high:
            raise InputError(f"A_init_range must be (low, high) with 0 < low <= high, got {self.A_init_range}")
        dt_min, dt_max, _ = self.dt_init
        if not 0 < dt_min <= dt_max:
            raise InputError(f"dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise InputError(f"dt_limit must be (low, high) with 0 <= low <= high, got {self.dt_limit}")
