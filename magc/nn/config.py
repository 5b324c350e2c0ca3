"""Configuration of a Mamba-2 language model, and its form in the `config.json` of mamba-ssm checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from magc.errors import InputError
from magc.nn.mamba2_values import Mamba2Options
from magc_kernels.mamba2.values import Keep

_PUBLISHED = {
    "mamba2-130m": (768, 24),
    "mamba2-370m": (1024, 48),
    "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
}

# These say how a layer runs, not what the model computes.
_MIXER_FIELDS = tuple(name for name in Mamba2Options.__annotations__ if name not in ("keep", "configs"))

# Settings of mamba-ssm's kernels and ranks that do not change what the model computes.
_WITHOUT_EFFECT = {"fused_add_norm"}
_MIXER_WITHOUT_EFFECT = {"layer", "use_mem_eff_path", "sequence_parallel"}


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes and options of a `Mamba2LM`; names and defaults as in mamba-ssm's `MambaConfig` and `Mamba2`.

    Raises:
        InputError: a size below one, or block norms other than RMSNorm.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 128
    d_conv: int = 4
    conv_init: float | None = None
    expand: int = 2
    headdim: int = 64
    d_ssm: int | None = None
    ngroups: int = 1
    A_init_range: tuple[float, float] = (1.0, 16.0)
    D_has_hdim: bool = False
    rmsnorm: bool = True
    """Gated RMSNorm inside the mixer."""
    norm_before_gate: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    chunk_size: int = 256
    rms_norm: bool = True
    """RMSNorm in front of each mixer; the only kind there is."""
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 16
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rms_norm:
            raise InputError("rms_norm=False (LayerNorm blocks) is not supported; use rms_norm=True")

    @classmethod
    def named(cls, name: str) -> Self:
        """The configuration of a published model, `"mamba2-130m"`, `-370m`, `-780m`, `-1.3b` or `-2.7b`.

        Sizes are those in the `config.json` of `state-spaces/mamba2-*`.

        Raises:
            InputError: there is no such model.
        """
        if name not in _PUBLISHED:
            raise InputError(f"no published model is named {name!r}; choose one of {', '.join(_PUBLISHED)}")
        d_model, n_layer = _PUBLISHED[name]
        return cls(d_model=d_model, n_layer=n_layer, vocab_size=50277)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `pad_vocab_size_multiple`."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def mixer_options(self, keep: Keep = "states") -> Mamba2Options:
        """The options of each layer's `Mamba2`, with how much it keeps for its backward."""
        return Mamba2Options(
            keep=keep,
            d_state=self.d_state,
            d_conv=self.d_conv,
            conv_init=self.conv_init,
            expand=self.expand,
            headdim=self.headdim,
            d_ssm=self.d_ssm,
            ngroups=self.ngroups,
            A_init_range=self.A_init_range,
            D_has_hdim=self.D_has_hdim,
            rmsnorm=self.rmsnorm,
            norm_before_gate=self.norm_before_gate,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            dt_init_floor=self.dt_init_floor,
            dt_limit=self.dt_limit,
            bias=self.bias,
            conv_bias=self.conv_bias,
            chunk_size=self.chunk_size,
        )

    @classmethod
    def from_mamba_ssm(cls, data: Mapping[str, Any]) -> Self:
        """Read the contents of a mamba-ssm `config.json`.

        Raises:
            InputError: keys are missing or unknown, the layers are not Mamba-2, or there are attention or MLP
                layers.
        """
        if missing := [key for key in ("d_model", "n_layer", "vocab_size") if key not in data]:
            hint = " (this is the transformers layout, not mamba-ssm's)" if "hidden_size" in data else ""
            raise InputError(f"the configuration lacks {', '.join(missing)}{hint}; expected mamba-ssm's config.json")
        if data.get("attn_layer_idx"):
            raise InputError(f"attention layers are not supported, got attn_layer_idx={data['attn_layer_idx']}")
        if data.get("d_intermediate"):
            raise InputError(f"MLP layers are not supported, got d_intermediate={data['d_intermediate']}")
        mixer = dict(data.get("ssm_cfg") or {})
        # mamba-ssm takes a configuration without "layer" for Mamba-1.
        if (layer := mixer.get("layer", "Mamba1")) != "Mamba2":
            raise InputError(f'layers of type {layer!r} are not supported; ssm_cfg must say "layer": "Mamba2"')
        model_fields = {field.name for field in fields(cls)} - set(_MIXER_FIELDS)
        ignored = _WITHOUT_EFFECT | {"ssm_cfg", "attn_layer_idx", "attn_cfg", "d_intermediate"}
        unknown = sorted(set(data) - model_fields - ignored)
        unknown += sorted(f"ssm_cfg.{key}" for key in set(mixer) - set(_MIXER_FIELDS) - _MIXER_WITHOUT_EFFECT)
        if unknown:
            raise InputError(f"the configuration has unknown keys: {', '.join(unknown)}; remove or rename them")
        # mamba-ssm's own default, for files that do not say.
        options: dict[str, Any] = {"pad_vocab_size_multiple": 8}
        options.update({key: value for key, value in data.items() if key in model_fields})
        options.update({key: value for key, value in mixer.items() if key in _MIXER_FIELDS})
        for key in ("A_init_range", "dt_limit"):
            if key in options:
                low, high = options[key]
                options[key] = (float(low), float(high))
        return cls(**options)

    def to_mamba_ssm(self) -> dict[str, Any]:
        """The contents of a mamba-ssm `config.json`; mixer options and epsilon only where not the default."""
        default = {field.name: field.default for field in fields(self)}
        mixer = {name: getattr(self, name) for name in _MIXER_FIELDS if getattr(self, name) != default[name]}
        data: dict[str, Any] = {
            "d_model": self.d_model,
            "d_intermediate": 0,
            "n_layer": self.n_layer,
            "vocab_size": self.vocab_size,
            "ssm_cfg": {"layer": "Mamba2", **mixer},
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": self.rms_norm,
            "residual_in_fp32": self.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": self.pad_vocab_size_multiple,
            "tie_embeddings": self.tie_embeddings,
        }
        if self.norm_epsilon != default["norm_epsilon"]:
            data["norm_epsilon"] = self.norm_epsilon
        return data
