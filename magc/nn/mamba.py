"""The Mamba-1 layer: Gu and Dao, "Mamba", arXiv 2312.00752, section 3.4.

Parameter names, shapes and their order inside the projections are those of mamba-ssm's `Mamba`, so state dicts go both
ways. Shape letters: B batch, L length, D d_model, E d_inner, R dt_rank, G groups (one), N d_state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from magc.errors import InputError
from magc.nn import segments
from magc.nn.carried import CarriesState, StateParts
from magc.nn.fused import is_plain, taps_of
from magc.nn.linear import Linear
from magc.nn.operators import Choice, Impl, Operators, check_impl, choose, operators
from magc_kernels._packing import keep_if
from magc_kernels.linear.autograd import linear

if TYPE_CHECKING:
    from magc_kernels.configs import KernelConfigs

TRITON_D_STATES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sizes that `magc_kernels.selective_scan.autograd` takes, known here without Triton."""


class MambaState(NamedTuple):
    """What a Mamba-1 layer carries from one segment to the next."""

    conv: Tensor
    """Last inputs of the convolution, oldest first, `(batch, d_conv - 1, d_inner)`, in the input's type."""
    ssm: Tensor
    """State of the scan, `(batch, d_inner, d_state)`, float32 (float64 for float64 activations)."""
    seq_idx: Tensor | None = None
    """Document of the last token, `(batch,)` int32; None unless sequences are packed."""


class Mamba(CarriesState[MambaState]):
    """Mamba-1 mixer with state in and out.

    Args:
        d_model: features of input and output.
        d_state: state size N per channel.
        d_conv: width of the causal convolution, 2 to 4.
        expand: `d_inner = expand * d_model`.
        dt_rank: size of what the step sizes are projected from; `"auto"`: a sixteenth of `d_model`, rounded up.
        dt_min, dt_max, dt_init_floor: range of the initial step sizes, drawn log-uniformly, and their floor.
        dt_init: how the step projection's weight begins, `"random"` (uniform) or `"constant"`.
        dt_scale: factor of its size, `dt_rank ** -0.5`.
        conv_bias, bias: whether the convolution and the outer projections have biases.
        configs: launch configurations of the Triton kernels (`magc_kernels.tune`); None for the shipped ones.
        impl: see `magc.nn.operators.Impl`.
        device, dtype: of all parameters, but `A_log` and `D` are at least float32.

    Raises:
        InputError: sizes below one, ranges that make no sense, an unknown `dt_init` or `impl`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        configs: KernelConfigs | None = None,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.dt_init = dt_init
        self.dt_scale = dt_scale
        self.configs = configs
        self.impl: Impl = check_impl(impl)
        self._check_sizes()

        # Order of the outputs: x, z.
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, device=device, dtype=dtype)
        # Only holds the parameters under their usual names; the operator takes them from here.
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias, device=device, dtype=dtype
        )
        # Order of the outputs: what the steps are projected from, B, C.
        self._x_proj_sizes = [self.dt_rank, d_state, d_state]
        self.x_proj = Linear(self.d_inner, sum(self._x_proj_sizes), bias=False, device=device, dtype=dtype)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, bias=True, device=device, dtype=dtype)
        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, device=device, dtype=dtype)
        self._reset_scan_parameters()
        self.mark_no_weight_decay()

    def reset_parameters(self) -> None:
        """Initialise all parameters as mamba-ssm does."""
        for part in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            part.reset_parameters()
        self._reset_scan_parameters()

    def mark_no_weight_decay(self) -> None:
        """Set `_no_weight_decay` on A_log and D, the mark mamba-ssm's training scripts look for."""
        for parameter in (self.A_log, self.D):
            vars(parameter).update(_no_weight_decay=True)

    def state_parts(self, batch: int, dtype: torch.dtype) -> StateParts:
        """See `CarriesState`."""
        return {
            "conv": ((batch, self.d_conv - 1, self.d_inner), dtype),
            "ssm": ((batch, self.d_inner, self.d_state), torch.promote_types(dtype, torch.float32)),
        }

    def make_state(self, *parts: Tensor, seq_idx: Tensor | None) -> MambaState:
        """See `CarriesState`."""
        return MambaState(*parts, seq_idx=seq_idx)

    def forward(
        self, x_BLD: Tensor, state: MambaState | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
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
        segments.check_segment("Mamba", x_BLD, self.d_model, seq_idx)
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        self.check_state(state, x_BLE.shape[0], x_BLE.device, x_BLE.dtype, seq_idx)
        run = operators(self.impl, x_BLE.device, x_BLE.dtype, self._obstacle())
        if x_BLD.shape[1] == 1:
            y_BLE, new_state = self._step(run, x_BLE, z_BLE, state, seq_idx)
        else:
            y_BLE, new_state = self._scan(run, x_BLE, z_BLE, state, seq_idx)
        return self.out_proj(y_BLE), new_state

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        return choose(self.impl, device, dtype, self._obstacle())

    def _obstacle(self) -> str:
        """Why the Triton scan does not take these sizes; empty if it does."""
        fits = self.d_state in TRITON_D_STATES
        return "" if fits else f"the Triton selective scan takes no d_state {self.d_state}"

    def _scan(
        self, run: Operators, x_BLE: Tensor, z_BLE: Tensor, state: MambaState | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        prev_seq_idx = None if state is None else state.seq_idx
        conv_options, scan_options = self._launch_options(run, x_BLE.dtype)
        x_BLE, conv_state = run.causal_conv1d(
            x_BLE,
            *taps_of(self.conv1d),
            activation="silu",
            initial_state=None if state is None else state.conv,
            seq_idx=seq_idx,
            prev_seq_idx=prev_seq_idx,
            **conv_options,
        )
        dt_BLE, dt_bias, B_BLN, C_BLN = self._projections(x_BLE)
        y_BLE, ssm_state = run.selective_scan(
            x_BLE,
            dt_BLE,
            self._rates(),
            B_BLN.unsqueeze(2),
            C_BLN.unsqueeze(2),
            D=self.D,
            z=z_BLE,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_state=None if state is None else state.ssm,
            seq_idx=seq_idx,
            prev_seq_idx=prev_seq_idx,
            **scan_options,
        )
        return y_BLE, MambaState(conv_state, ssm_state, segments.last_document(seq_idx))

    def _step(
        self, run: Operators, x_BLE: Tensor, z_BLE: Tensor, state: MambaState | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        if state is None:
            state = self.initial_state(x_BLE.shape[0], device=x_BLE.device, dtype=x_BLE.dtype)
        conv_state, ssm_state = state.conv, state.ssm
        if seq_idx is not None and state.seq_idx is not None:
            same_document = seq_idx[:, 0] == state.seq_idx
            conv_state, ssm_state = keep_if(same_document, conv_state), keep_if(same_document, ssm_state)
        x_BE, conv_state = run.causal_conv1d_step(
            x_BLE.squeeze(1), *taps_of(self.conv1d), conv_state, activation="silu"
        )
        dt_BE, dt_bias, B_BN, C_BN = self._projections(x_BE)
        y_BE, ssm_state = run.selective_scan_step(
            x_BE,
            dt_BE,
            self._rates(),
            B_BN.unsqueeze(1),
            C_BN.unsqueeze(1),
            ssm_state,
            D=self.D,
            z=z_BLE.squeeze(1),
            dt_bias=dt_bias,
            dt_softplus=True,
        )
        return y_BE.unsqueeze(1), MambaState(conv_state, ssm_state, segments.last_document(seq_idx))

    def _launch_options(self, run: Operators, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of the convolution and of the scan that only the Triton operators take."""
        if self.configs is None or run.name != "triton":
            return {}, {}
        from magc_kernels.configs import ConvShape, SelectiveScanShape

        conv = self.configs.conv.get(ConvShape(dtype, self.d_conv))
        scan = self.configs.selective_scan.get(SelectiveScanShape(dtype, self.d_state))
        return {"config": conv}, {"config": scan}

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Steps before their bias, which the scan adds in its own precision, that bias, and B and C."""
        low_rank, B, C = torch.split(self.x_proj(x), self._x_proj_sizes, dim=-1)
        if not is_plain(self.dt_proj):
            return self.dt_proj(low_rank), None, B, C  # LoRA, say, which adds the bias itself
        return linear(low_rank, self.dt_proj.weight), self.dt_proj.bias, B, C

    def _rates(self) -> Tensor:
        # In the precision of the scan: a half-precision exp could overflow.
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    @torch.no_grad()
    def _reset_scan_parameters(self) -> None:
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        size = self.dt_rank**-0.5 * self.dt_scale
        if self.dt_init == "constant":
            nn.init.constant_(weight, size)
        else:
            nn.init.uniform_(weight, -size, size)
        bias.copy_(segments.draw_step_bias(self.d_inner, *self.dt_range, bias.device))
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=bias.device, dtype=torch.float32).log())
        nn.init.ones_(self.D)

    def _check_sizes(self) -> None:
        sizes = {
            "d_model": self.d_model,
            "d_state": self.d_state,
            "expand * d_model": self.d_inner,
            "dt_rank": self.dt_rank,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        if not 2 <= self.d_conv <= 4:
            raise InputError(f"d_conv must be 2, 3 or 4, got {self.d_conv}")
        dt_min, dt_max, _ = self.dt_range
        if not 0 < dt_min <= dt_max:
            raise InputError(f"dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        if self.dt_init not in ("random", "constant"):
            raise InputError(f"dt_init must be 'random' or 'constant', got {self.dt_init!r}")
