"""Which classes `magc.wrap` takes, and why it does not take others."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import cast

from torch import nn

from magc.errors import InputError, LayerContractError
from magc.integrations.forward import Adapter

_HF = "transformers.models"
_ADAPTERS: dict[str, str | Adapter] = {
    f"torch.nn.modules.rnn.{name}": "magc.integrations.rnn_wrap" for name in ("LSTM", "GRU", "RNN")
}
_FAMILIES = {
    "mamba": "Mamba",
    "mamba2": "Mamba2",
    "falcon_mamba": "FalconMamba",
    "bamba": "Bamba",
    "falcon_h1": "FalconH1",
    "granitemoehybrid": "GraniteMoeHybrid",
    "nemotron_h": "NemotronH",
    "qwen3_next": "Qwen3Next",
    "zamba2": "Zamba2",
}
for _family, _prefix in _FAMILIES.items():
    for _name in (f"{_prefix}Model", f"{_prefix}ForCausalLM"):
        _ADAPTERS[f"{_HF}.{_family}.modeling_{_family}.{_name}"] = f"magc.integrations.transformers.{_family}"

for _name in ("MambaLMHeadModel", "MixerModel"):
    _ADAPTERS[f"mamba_ssm.models.mixer_seq_simple.{_name}"] = "magc.integrations.mamba_ssm"

_FLA_FAMILIES = {
    "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet",
    "gla": "GLA",
    "gsa": "GSA",
    "kda": "KDA",
    "linear_attn": "LinearAttention",
    "retnet": "RetNet",
    "rwkv7": "RWKV7",
}
for _family, _prefix in _FLA_FAMILIES.items():
    for _name in (f"{_prefix}Model", f"{_prefix}ForCausalLM"):
        _ADAPTERS[f"fla.models.{_family}.modeling_{_family}.{_name}"] = "magc.integrations.fla.models"

_UNKNOWN = (
    "For other models give layers with y, new_state = layer(x, state) to magc.GridCheckpoint, or teach wrap the class with "
    "magc.integrations.registry.register"
)


def register(model_class: type[nn.Module], adapter: Adapter) -> None:
    """Let `wrap` take a class of models.

    Args:
        model_class: the class; a subclass is taken too unless it has a forward of its own.
        adapter: ``adapter(model, settings)``, which makes contract layers of the model's parts, ``settings.grid`` of
            these, and a `GridForward` for every module whose forward changes, the model's last.
    """
    _ADAPTERS[_path(model_class)] = adapter


def supported() -> tuple[str, ...]:
    """The classes that `wrap` takes, by their full names."""
    return tuple(sorted(_ADAPTERS))


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a model's class.

    Raises:
        InputError: there is none, or the class has a forward of its own.
        LayerContractError: the model is bidirectional.
    """
    _refuse_bidirectional(model)
    for base in type(model).__mro__:
        adapter = _ADAPTERS.get(_path(base))
        if adapter is None:
            continue
        if type(model).forward is not cast(type[nn.Module], base).forward:
            raise InputError(
                f"{type(model).__name__} has a forward of its own, which the grid for {base.__name__} would not run. Wrap "
                f"the {base.__name__} inside it, or write layers for magc.GridCheckpoint"
            )
        return cast(Adapter, importlib.import_module(adapter).adapt) if isinstance(adapter, str) else adapter
    inside = [f"model.{name}" for name, part in _parts(model) if name and _path(type(part)) in _ADAPTERS]
    remedy = f"magc.wrap({inside[0]}, ...) wraps the part of it that is known" if inside else _UNKNOWN
    if type(model).__module__.startswith("fla.layers"):
        remedy = "magc.integrations.fla.FLALayer(layer) makes a layer for magc.GridCheckpoint of it"
    if type(model).__module__.startswith("mamba_ssm.modules"):
        remedy = "magc.integrations.mamba_ssm.mixer_layer(mixer) makes a layer for magc.GridCheckpoint of it"
    names = ", ".join(path.rpartition(".")[2] for path in supported())
    raise InputError(f"magc.wrap does not know {_path(type(model))}. {remedy}. It takes {names}")


def _refuse_bidirectional(model: nn.Module) -> None:
    """Refuse models in which a token sees later ones: no order of segments serves them."""
    config = getattr(model, "config", None)
    reason = ""
    for flag, wanted in (("is_encoder_decoder", True), ("bidirectional", True), ("is_causal", False)):
        if getattr(config, flag, None) is wanted:
            reason = f"its configuration says {flag}={wanted}"
    for name, part in _parts(model):
        for flag, wanted in (("bidirectional", True), ("is_causal", False)):
            if getattr(part, flag, None) is wanted:
                where = name or "the model"
                reason = reason or f"{where} ({type(part).__name__}) has {flag}={wanted}"
    if reason:
        raise LayerContractError(
            f"{type(model).__name__} is not causal: {reason}. Its outputs depend on later tokens, so it cannot run segment "
            f"by segment. Use a causal model, checkpoint it by layers only (torch.utils.checkpoint), or wrap one model "
            f"per direction, the second on the flipped sequence"
        )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from cast(Iterator[tuple[str, nn.Module]], model.named_modules())


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
