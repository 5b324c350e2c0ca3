"""Tiny random models of transformers, batches for them, and the comparison of a wrapped model with its own code."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from magc import Plan
from magc.integrations.wrap import wrap
from magc.plan import PlanOrRule

pytest.importorskip("transformers")

from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

VOCABULARY, TOKENS = 19, 11
_COMMON: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(cls: Any, config: Any, noise: float = 0.2) -> Any:
    """A model in training mode with every parameter off its special initial value.

    Much noise makes deep ones with norms of tiny vectors ill-conditioned: transformers' own gradients in float32 are then off
    by more than the tests allow.
    """
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other products of many experts take no float64
    return model.train()


def mamba2(**changes: Any) -> Any:
    sizes = {"num_heads": 4, "head_dim": 4, "state_size": 3, "n_groups": 2, "chunk_size": 4}
    return make(Mamba2ForCausalLM, Mamba2Config(**{**_COMMON, **sizes, **changes}))


def mamba(**changes: Any) -> Any:
    return make(MambaForCausalLM, MambaConfig(**{**_COMMON, "state_size": 3, "time_step_rank": 2, **changes}))


def falcon_mamba(**changes: Any) -> Any:
    sizes = {"state_size": 3, "time_step_rank": 2}
    return make(FalconMambaForCausalLM, FalconMambaConfig(**{**_COMMON, **sizes, **changes}))


def bamba(**changes: Any) -> Any:
    """A Mamba layer and two attention layers with grouped heads."""
    sizes = {
        "attn_layer_indices": [1, 2],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 3,
        "mamba_chunk_size": 4,
    }
    return make(BambaForCausalLM, BambaConfig(**{**_COMMON, "hidden_size": 16, **sizes, **changes}))


def falcon_h1(**changes: Any) -> Any:
    """Mixers side by side, with every multiplier off one."""
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 12,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 4,
        "mamba_d_head": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 3,
        "mamba_chunk_size": 4,
        "embedding_multiplier": 1.3,
        "lm_head_multiplier": 0.7,
        "mlp_multipliers": [1.2, 0.8],
        "key_multiplier": 1.4,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 1.1,
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.6,
        "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.3],
    }
    return make(FalconH1ForCausalLM, FalconH1Config(**{**_COMMON, "hidden_size": 16, **sizes, **changes}))


def granite(**changes: Any) -> Any:
    """Two Mamba layers and an attention layer, with experts and multipliers."""
    sizes = {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "shared_intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 3,
        "mamba_chunk_size": 4,
        "embedding_multiplier": 1.3,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.4,
    }
    config = GraniteMoeHybridConfig(**{**_COMMON, "hidden_size": 16, **sizes, **changes})
    return make(GraniteMoeHybridForCausalLM, config)


def nemotron_h(**changes: Any) -> Any:
    """One layer of each kind, and another Mamba layer behind them."""
    sizes = {
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 12,
        "mamba_num_heads": 4,
        "mamba_head_dim": 4,
        "n_groups": 2,
        "ssm_state_size": 3,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8,
    }
    common = {name: value for name, value in _COMMON.items() if name != "num_hidden_layers"}
    return make(NemotronHForCausalLM, NemotronHConfig(**{**common, "hidden_size": 16, **sizes, **changes}))


def qwen3_next(**changes: Any) -> Any:
    """Two delta rule layers and an attention layer between them, one MLP and two layers of experts."""
    sizes = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_only_layers": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "rms_norm_eps": 1e-2,
    }
    config = Qwen3NextConfig(**{**_COMMON, "hidden_size": 16, **sizes, **changes})
    return make(Qwen3NextForCausalLM, config, noise=0.1)


def zamba2(**changes: Any) -> Any:
    """Shared blocks in two of four layers, with adapters, the first layer among them."""
    sizes = {
        "num_hidden_layers": 4,
        "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 12,
        "mamba_expand": 1,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 4,
        "mamba_d_state": 3,
        "chunk_size": 4,
        "use_shared_attention_adapter": True,
        "adapter_rank": 2,
        "use_mem_rope": True,
        "rms_norm_eps": 1e-2,
    }
    config = Zamba2Config(**{**_COMMON, "hidden_size": 16, **sizes, **changes})
    return make(Zamba2ForCausalLM, config, noise=0.1)


FAMILIES: dict[str, Callable[..., Any]] = {
    "mamba2": mamba2,
    "mamba": mamba,
    "falcon_mamba": falcon_mamba,
    "bamba": bamba,
    "falcon_h1": falcon_h1,
    "granite": granite,
    "nemotron_h": nemotron_h,
    "qwen3_next": qwen3_next,
    "zamba2": zamba2,
}


def ragged(layers: int, tokens: int) -> Plan:
    """Groups and segments of different sizes."""
    return Plan(layers=(2, layers - 2), tokens=(1, 2, 5, tokens - 8))


PLANS: dict[str, PlanOrRule] = {
    "one cell": Plan(),
    "layers x segments": Plan(layers=1, tokens=4),
    "ragged": ragged,
    "rebuilt": Plan(layers=2, tokens=3, borders="rebuild", snapshots=1, keep=2),
}


def batch(padding: str | None = None) -> dict[str, Tensor]:
    """Two rows of ids; ``"left"`` or ``"right"`` pads them by 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, count in enumerate((3, 1)):
        mask[row, slice(0, count) if padding == "left" else slice(TOKENS - count, TOKENS)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def cache_name(model: Any) -> str:
    """What transformers calls the cache of a Mamba-2: "cache" since 5.24, "cache_params" before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "cache_params"


CHECKPOINTING = tuple(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(PreTrainedModel, f"{name}_enable")
)
"""What transformers calls its switch for checkpointing: the first is newer than 5.17, which knows the second alone."""


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The ids, with padding and one more token ignored."""
    labels = inputs["input_ids"].clone()
    labels[labels == 0] = -100
    labels[0, 6] = -100
    return labels


def wrapped_copy(model: Any, plan: PlanOrRule, **options: Any) -> Any:
    return wrap(copy.deepcopy(model), plan=plan, **options)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in found.values()), [name for name, grad in found.items() if grad is None]
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def assert_same_gradients(actual: Any, expected: Any, tolerance: float) -> None:
    """Gradients of two models, parameter by parameter, relative to the largest of each if that exceeds one."""
    theirs = gradients(expected)
    for name, grad in gradients(actual).items():
        assert theirs[name].abs().max() > 0, name
        assert_same(grad, theirs[name], tolerance, name)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), name
    bound = tolerance * max(1.0, float(expected.detach().abs().max()))
    assert float((actual - expected).detach().abs().max()) <= bound, name


class InDouble(TorchDispatchMode):
    """Turns every cast to float32 into one to float64: transformers' code has many, which hide small differences."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
