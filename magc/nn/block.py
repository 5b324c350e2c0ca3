"""Pre-norm residual block around a Mamba-2 mixer, as in mamba-ssm's `Block`."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from magc.ambient import is_output_needed
from magc.nn import fused
from magc.nn.mamba2 import Mamba2
from magc.nn.mamba2_values import Mamba2Options, Mamba2State
from magc.nn.norm import AddRMSNorm
from magc.nn.operators import Impl

Stream = Tensor | tuple[Tensor, Tensor]
"""What flows between blocks: the last mixer's output and the residual before it; a bare tensor before the
first."""


class Mamba2Block(nn.Module):
    """Add, RMSNorm, Mamba-2.

    The addition to the residual stream comes first, so that it fuses with the norm; a block therefore hands
    on the pair (mixer output, residual) and whoever comes last adds the two.

    Args:
        d_model: features.
        norm_epsilon: of the RMSNorm.
        residual_in_fp32: keep the residual stream in float32.
        impl: see `magc.nn.operators.Impl`.
        device, dtype: of all parameters.
        **mixer: options of `Mamba2`.

    Raises:
        InputError: as `Mamba2`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        norm_epsilon: float = 1e-5,
        residual_in_fp32: bool = True,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer: Unpack[Mamba2Options],
    ) -> None:
        super().__init__()
        self.norm = AddRMSNorm(
            d_model,
            eps=norm_epsilon,
            residual_in_fp32=residual_in_fp32,
            impl=impl,
            device=device,
            dtype=dtype,
        )
        self.mixer = Mamba2(d_model, **mixer, impl=impl, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise all parameters."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters()

    def forward(
        self, x: Stream, state: Mamba2State | None = None, *, seq_idx: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], Mamba2State]:
        """Run a segment.

        Args:
            x: (hidden, residual), each `(batch, length, d_model)`, or hidden alone in front of the first
                block.
            state: as in `Mamba2.forward`.
            seq_idx: as in `Mamba2.forward`.

        Returns:
            The new (hidden, residual) and the state after the last token.

        Raises:
            InputError, StateError: as `Mamba2.forward`.
        """
        hidden, residual = (x, None) if isinstance(x, Tensor) else x
        if fused.runs_fused(self.mixer, hidden, self.norm) and not fused.hooked(self.mixer):
            around, needed = (self.norm, residual), is_output_needed(self)
            hidden, residual, new_state = fused.run(self.mixer, hidden, state, seq_idx, around, output_needed=needed)
            assert residual is not None
            return (hidden, residual), new_state
        hidden, residual = self.norm(hidden, residual)
        hidden, new_state = self.mixer(hidden, state, seq_idx=seq_idx)
        return (hidden, residual), new_state
