"""mamba-ssm's `MambaLMHeadModel`, `MixerModel`, and `Mamba`, `Mamba2` and `Mamba3` mixers on magc's layers.

mamba-ssm's own mixers overwrite their states or drop them, so no gradient crosses from one segment to the next. magc's
layers compute the same from the same parameters and submodules; nothing of mamba-ssm itself runs on the grid but
projections, embeddings and MLPs.

Shape letters: B batch, L length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.ambient import is_output_needed, output_unneeded
from magc.errors import InputError, LayerContractError
from magc.integrations.forward import Adapted, GridForward, ModelGrid, Settings
from magc.integrations.transformers.head import IGNORED, Head, Loss, Stem
from magc.nn.mamba import Mamba
from magc.nn.mamba2 import Mamba2
from magc.nn.mamba3 import Mamba3
from magc.nn.operators import Impl, operators
from magc.uncompiled import uncompiled

Stream = Tensor | tuple[Tensor, Tensor]
"""The last mixer's output and the residual before it, each `(batch, length, hidden)`; a bare tensor before the first."""

MixerLayer = Mamba | Mamba2 | Mamba3

_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
_NORMS = ("norm", "B_norm", "C_norm")
_PARAMETERS = ("dt_bias", "A_log", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")


class CausalLMOutput(NamedTuple):
    """What a language model returns for labels."""

    loss: Tensor
    logits: None = None


def mixer_layer(mixer: Any, impl: Impl = "auto") -> MixerLayer:
    """A layer of magc with the parameters and projections of a mixer of mamba-ssm, for `GridCheckpoint`.

    Args:
        mixer: a `mamba_ssm.Mamba`, `mamba_ssm.Mamba2` or `mamba_ssm.Mamba3`.
        impl: see `magc.nn.operators.Impl`.

    Returns:
        A layer ``y, new_state = layer(x, state, seq_idx=...)``.

    Raises:
        InputError: it is another kind of mixer, or its parameters are not those of mamba-ssm 2.3. LayerContractError: it is
            split over processes.
    """
    kind: type = mixer.__class__
    path = next((name for name in map(_path, kind.__mro__) if name in _MIXERS), "")
    if not path:
        raise InputError(
            f"{_path(kind)} is a mixer that magc does not know; it takes {', '.join(_MIXERS)}. Write a layer "
            f"y, new_state = layer(x, state) for magc.GridCheckpoint"
        )
    if getattr(mixer, "process_group", None) is not None:
        raise LayerContractError(
            f"this {type(mixer).__name__} is split over processes (process_group); magc runs whole layers. Build the model "
            f"without process_group, and spread it with FSDP"
        )
    with torch.device("meta"):
        # Only what shapes need: every parameter is replaced by the mixer's own.
        layer = _MIXERS[path](mixer, impl)
    _share(layer, mixer)
    return layer


def _mamba(mixer: Any, impl: Impl) -> Mamba:
    return Mamba(mixer.d_model, dt_rank=mixer.dt_rank, **_conv_sizes(mixer), impl=impl)


def _mamba2(mixer: Any, impl: Impl) -> Mamba2:
    return Mamba2(
        mixer.d_model,
        **_conv_sizes(mixer),
        headdim=mixer.headdim,
        d_ssm=mixer.d_ssm,
        ngroups=mixer.ngroups,
        D_has_hdim=mixer.D_has_hdim,
        rmsnorm=mixer.rmsnorm,
        norm_before_gate=mixer.norm_before_gate,
        dt_limit=(float(mixer.dt_limit[0]), float(mixer.dt_limit[1])),
        chunk_size=mixer.chunk_size,
        impl=impl,
    )


def _mamba3(mixer: Any, impl: Impl) -> Mamba3:
    layer = Mamba3(
        mixer.d_model,
        d_state=mixer.d_state,
        expand=mixer.expand,
        headdim=mixer.headdim,
        ngroups=mixer.num_bc_heads,
        rope_fraction=2 / mixer.rotary_dim_divisor,
        A_floor=mixer.A_floor,
        is_outproj_norm=mixer.is_outproj_norm,
        is_mimo=mixer.is_mimo,
        mimo_rank=mixer.mimo_rank,
        chunk_size=mixer.chunk_size,
        impl=impl,
    )
    # A young class: parameters that differ are other mathematics.
    theirs = _shapes(mixer)
    unlike = [name for name, shape in _shapes(layer).items() if theirs.pop(name, None) != shape] + list(theirs)
    if mixer.in_proj.out_features != layer.in_proj.out_features:
        unlike.append("in_proj")
    if unlike:
        raise InputError(
            f"this {type(mixer).__name__} is not the one of mamba-ssm 2.3: {', '.join(unlike)} differ. Install "
            f"mamba-ssm 2.3, or write a layer y, new_state = layer(x, state) for magc.GridCheckpoint"
        )
    return layer


_MIXERS: dict[str, Callable[[Any, Impl], MixerLayer]] = {
    "mamba_ssm.modules.mamba2.Mamba2": _mamba2,
    "mamba_ssm.modules.mamba_simple.Mamba": _mamba,
    "mamba_ssm.modules.mamba3.Mamba3": _mamba3,
}


class BlockLayer(nn.Module):
    """A `mamba_ssm.modules.block.Block` as a layer of the contract: add, norm, mixer, and perhaps add, norm, MLP.

    Args:
        block: the block.
        impl: see `magc.nn.operators.Impl`.
        final_norm: applied behind the block: the model's, on its last block.
    """

    def __init__(self, block: Any, impl: Impl, final_norm: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.impl: Impl = impl
        self.final_norm = final_norm
        self.mixer = mixer_layer(block.mixer, impl)

    def follow(self) -> None:
        """Take over what was replaced in the block since."""
        _share(self.mixer, self.block.mixer)

    def forward(self, x: Stream, state: Any = None, *, seq_idx: Tensor | None = None) -> tuple[Stream, Any]:
        """Run a segment.

        Args:
            x: what the block before returns.
            state: of the mixer; None at the start of the sequence.
            seq_idx: document of each token in packed rows, `(batch, length)` integers.

        Returns:
            The mixer's (or the MLP's) output and the residual, or the normed sum behind the last block; and the new state.
        """
        block: Any = self.block
        hidden, residual = (x, None) if isinstance(x, Tensor) else x
        hidden, residual = self._add_norm(block.norm, hidden, residual)
        # An MLP and the final norm compute with the mixer's output.
        needed = block.mlp is not None or self.final_norm is not None or is_output_needed(self)
        with nullcontext() if needed else output_unneeded(self.mixer):
            hidden, new_state = self.mixer(hidden, state, seq_idx=seq_idx)
        if block.mlp is not None:
            hidden, residual = self._add_norm(block.norm2, hidden, residual)
            hidden = block.mlp(hidden)
        if self.final_norm is None:
            return (hidden, residual), new_state
        return self._add_norm(self.final_norm, hidden, residual)[0], new_state

    def _add_norm(self, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normed sum and the sum."""
        wide = self.block.residual_in_fp32
        if not isinstance(norm, nn.LayerNorm):
            run = operators(self.impl, hidden.device, hidden.dtype)
            return run.add_rms_norm(hidden, residual, norm.weight, eps=norm.eps, residual_in_fp32=wide)
        total = hidden if residual is None else hidden + residual
        normed = norm(total.to(norm.weight.dtype))
        return normed, total.to(torch.promote_types(total.dtype, torch.float32)) if wide else total


class TrunkForward(GridForward):
    """The forward of a `MixerModel`: ids to the last hidden state."""

    def __init__(
        self, trunk: Any, grid: ModelGrid, bypassed: dict[str, nn.Module], parts: dict[str, nn.Module]
    ) -> None:
        super().__init__(trunk, bypassed, parts)
        self.grid = grid

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether a call has no inference cache.

        Raises:
            InputError: it has an argument that the grid cannot serve.
        """
        if "inference_params" in call:
            return False
        unknown = sorted(set(call) - {"input_ids", "seq_idx"})
        if unknown:
            raise InputError(
                f"{type(self.module).__name__}, wrapped by magc, was given {', '.join(unknown)} in a training forward; its "
                f"grid serves input_ids and seq_idx (packed rows, `(batch, length)` integers). Leave it out, call under "
                f"torch.no_grad(), or magc.unwrap(model)"
            )
        for layer in self.grid.layers:
            cast(BlockLayer, layer).follow()
        return True

    def run(self, call: dict[str, Any]) -> Any:
        """`(batch, length, hidden)`."""
        hidden, _ = self.grid(cast(Any, self.module).embedding(call["input_ids"]), seq_idx=call.get("seq_idx"))
        return hidden


class LMForward(GridForward):
    """The forward of a `MambaLMHeadModel`, which may be given ``labels`` too."""

    def __init__(self, model: Any, trunk: TrunkForward, loss: Loss) -> None:
        super().__init__(model, {"backbone": trunk.module, **trunk.bypassed}, trunk.parts_as("backbone"))
        self.trunk = trunk
        self.stem = Stem(model.backbone.embedding)
        self.head = Head(model.lm_head, loss)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `GridForward`; a loss is always computed on the grid, since mamba-ssm knows none."""
        if "labels" in kwargs:
            call = self.bind(args, kwargs)
            self.takes(call)
            self.require_as_wrapped()
            return self.run(call)
        return super().__call__(*args, **kwargs)

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether a loss is asked for.

        Raises:
            InputError: as `TrunkForward.takes`.
        """
        if "labels" not in call:
            return False
        beside = ("labels", "position_ids", "num_last_tokens")  # mamba-ssm does not use the second
        rest = {name: value for name, value in call.items() if name not in beside}
        if call.get("num_last_tokens") or not self.trunk.takes(rest):
            raise InputError(
                "labels need every token and no inference cache; leave out num_last_tokens and inference_params"
            )
        return True

    def run(self, call: dict[str, Any]) -> Any:
        """The mean loss over labels other than -100, each predicted by the token before it; without logits."""
        model: Any = self.module
        self.stem.embeddings, self.head.projection = model.backbone.embedding, model.lm_head
        targets = functional.pad(call["labels"], (0, 1), value=IGNORED)[..., 1:]
        loss = self.trunk.grid.loss(
            call["input_ids"], targets, stem=self.stem, head=self.head, seq_idx=call.get("seq_idx")
        )
        return CausalLMOutput(loss)


def adapt(model: Any, settings: Settings) -> Adapted:
    """Put a `MixerModel` or a `MambaLMHeadModel` on a grid.

    Raises:
        InputError: a mixer that magc does not know (attention).
        LayerContractError: a mixer that is split over processes.
    """
    trunk = getattr(model, "backbone", model)
    last = len(trunk.layers) - 1
    layers = [
        BlockLayer(block, settings.impl, trunk.norm_f if index == last else None)
        for index, block in enumerate(trunk.layers)
    ]
    bypassed: dict[str, nn.Module] = {"norm_f": trunk.norm_f}
    parts: dict[str, nn.Module] = {"norm_f": trunk.norm_f, "layers": trunk.layers}
    for index, block in enumerate(trunk.layers):
        bypassed |= {f"layers.{index}": block, f"layers.{index}.norm": block.norm}
        bypassed |= {f"layers.{index}.mixer": block.mixer}
        parts |= {f"layers.{index}.norm": block.norm, f"layers.{index}.mixer": block.mixer}
        if getattr(block, "norm2", None) is not None:
            parts[f"layers.{index}.norm2"] = block.norm2
        inside = {name: getattr(block.mixer, name, None) for name in ("conv1d", *_NORMS)}
        bypassed |= {f"layers.{index}.mixer.{name}": part for name, part in inside.items() if part is not None}
    grid = settings.grid(layers)
    forward = TrunkForward(trunk, grid, bypassed, parts)
    notes = [
        "mixers and norms run as magc's layers with mamba-ssm's own parameters; projections and MLPs are its modules"
    ]
    if any(isinstance(layer.mixer, Mamba3) for layer in layers):
        notes.append("the scan of Mamba-3 runs in plain PyTorch on every device")
    if trunk is model:
        return Adapted(grid, (forward,), tuple(notes))
    if settings.logits:
        raise InputError(
            "logits=True is for models that compute a loss themselves; mamba-ssm's return logits: leave labels out"
        )
    loss = Loss.of(settings)
    return Adapted(grid, (forward, LMForward(model, forward, loss)), (*notes, loss.note), has_loss=True)


def _share(layer: Any, mixer: Any) -> None:
    """Give a layer the submodules and parameters of a mixer, unless it has them."""
    for name in _PARTS:
        part = getattr(mixer, name, None)
        if part is not None and getattr(layer, name) is not part:
            setattr(layer, name, part)
    for name in _PARAMETERS:
        parameter = getattr(mixer, name, None)
        if parameter is not None and getattr(layer, name) is not parameter:
            layer.register_parameter(name, parameter)
    for name in _NORMS:
        norm = getattr(layer, name, None)
        theirs = getattr(mixer, name, None)
        if norm is not None and theirs is not None and norm.weight is not theirs.weight:
            norm.register_parameter("weight", theirs.weight)
            norm.eps, norm.group_size = theirs.eps, theirs.group_size


def _conv_sizes(mixer: Any) -> dict[str, Any]:
    """What Mamba and Mamba-2 have in common."""
    sizes: dict[str, Any] = {"d_state": mixer.d_state, "d_conv": mixer.d_conv, "expand": mixer.expand}
    return sizes | {"bias": mixer.in_proj.bias is not None, "conv_bias": mixer.conv1d.bias is not None}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of parameters, by name; without those of the projections, which are called as modules and may be LoRA's."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if not name.startswith(("in_proj.", "out_proj."))
    }


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
