"""A pre-norm block of transformers' Mamba models as a layer of the contract, and a model of such blocks on a grid."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magc.ambient import is_output_needed
from magc.integrations.forward import Adapted, GridForward, Settings
from magc.integrations.transformers.causal_lm import Input, LMForward, TrunkForward, require_part
from magc.integrations.transformers.head import Loss
from magc.integrations.transformers.mixers import require_conv, rms_norm
from magc.integrations.transformers.tokens import Tokens
from magc.nn.operators import Choice, Impl, choose


class BlockLayer(nn.Module):
    """Norm, mixer, residual addition, with a state in and out; holds the block itself, not copies of its parameters.

    Args:
        block: `MambaBlock` or its like.
        impl: see `magc.nn.operators.Impl`.
        final_norm: applied behind the block: the trunk's, on its last block.
    """

    def __init__(self, block: nn.Module, impl: Impl, final_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.impl: Impl = impl
        self.final_norm = final_norm

    def mix(self, x_BLD: Tensor, state: Any, tokens: Tokens, *, output_needed: bool) -> tuple[Tensor, Any]:
        """The mixer over a segment: its output, with any values unless it is needed, and the new state."""
        raise NotImplementedError

    def obstacle(self) -> str:
        """Why the Triton kernels do not take the mixer's sizes; empty if they do."""
        raise NotImplementedError

    def forward(
        self,
        x_BLD: Tensor,
        state: Any = None,
        *,
        attention_mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Run a segment.

        Args:
            x_BLD: `(batch, length, hidden)`.
            state: of the mixer; None at the start of the sequence.
            attention_mask: see `Tokens.mask`.
            documents: see `Tokens`.

        Returns:
            The residual stream behind the block, normed behind the last one, and the new state.
        """
        block: Any = self.block
        hidden = rms_norm(block.norm, x_BLD.to(block.norm.weight.dtype), self.impl)
        if block.residual_in_fp32:
            x_BLD = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
        # The gradient of the final norm depends on what it norms.
        needed = self.final_norm is not None or is_output_needed(self)
        hidden, new_state = self.mix(hidden, state, Tokens(attention_mask, documents), output_needed=needed)
        x_BLD = x_BLD + hidden
        return x_BLD if self.final_norm is None else rms_norm(self.final_norm, x_BLD, self.impl), new_state

    def implementation(self, device: torch.device, dtype: torch.dtype | None = None) -> Choice:
        """What `impl` stands for on a device; `dtype` is that of the activations, if known."""
        return choose(self.impl, device, dtype, self.obstacle())


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one of transformers' families from another.

    Attributes:
        module: where its classes are.
        prefix: what their names begin with.
        layer: a block of it as a layer.
        operators: what runs on magc's operators, for the report.
    """

    module: str
    prefix: str
    layer: type[BlockLayer]
    operators: str


def adapt_blocks(model: Any, settings: Settings, family: Family) -> Adapted:
    """Put a trunk of blocks, or a language model of ``backbone`` and ``lm_head``, on a grid.

    Raises:
        InputError: a part is not what the family has in its place, so its mathematics is not known.
        LayerContractError: a convolution that the operators cannot run.
    """
    classes: Any = importlib.import_module(family.module)

    def known(name: str) -> Any:
        return getattr(classes, family.prefix + name)

    trunk = model if isinstance(model, known("Model")) else model.backbone
    bypassed: dict[str, nn.Module] = {"norm_f": trunk.norm_f}
    for index, block in enumerate(trunk.layers):
        name = f"layers.{index}"
        require_part(name, block, known("Block"))
        require_part(f"{name}.mixer", block.mixer, known("Mixer"))
        require_conv(f"{name}.mixer", block.mixer)
        bypassed |= {name: block, f"{name}.norm": block.norm}
        bypassed |= {f"{name}.mixer": block.mixer, f"{name}.mixer.conv1d": block.mixer.conv1d}
    last = len(trunk.layers) - 1
    grid = settings.grid(
        family.layer(block, settings.impl, trunk.norm_f if index == last else None)
        for index, block in enumerate(trunk.layers)
    )
    parts = {"layers": trunk.layers, **bypassed}
    forward = TrunkForward(trunk, grid, bypassed, known("Output"), Input(), parts)
    forwards: tuple[GridForward, ...] = (forward,)
    mixer = family.prefix + "Mixer"
    notes = [
        f"{family.operators} of {mixer} run on magc's operators with the model's own parameters, since {mixer} carries "
        f"no state with gradients from one segment to the next; its projections are called as modules"
    ]
    if trunk is not model:
        head = LMForward(model, forward, known("CausalLMOutput"), Loss.of(settings))
        forwards += (head,)
        notes.append(head.loss.note)
    return Adapted(grid, forwards, tuple(notes), has_loss=trunk is not model)
