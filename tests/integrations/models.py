"""Tiny random models of transformers, batches for them, and the comparison of a wrapped model with its own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from magc import Plan
from magc.integrations.wrap import wrap

pytest.importorskip("transformers")

from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
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


def make(cls: Any, config: Any) -> Any:
    """A model in training mode with every parameter off its special initial value."""
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
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


FAMILIES: dict[str, Callable[..., Any]] = {
    "mamba2": mamba2,
    "mamba": mamba,
    "falcon_mamba": falcon_mamba,
    "bamba": bamba,
}

PLANS = {
    "one cell": Plan(),
    "layers x segments": Plan(layers=1, tokens=4),
    "ragged": Plan(layers=(2, 1), tokens=(1, 2, 5, 3)),
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


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The ids, with padding and one more token ignored."""
    labels = inputs["input_ids"].clone()
    labels[labels == 0] = -100
    labels[0, 6] = -100
    return labels


def wrapped_copy(model: Any, plan: Plan, **options: Any) -> Any:
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
