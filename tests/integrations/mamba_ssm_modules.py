"""Modules with the names, attributes and parameters of mamba-ssm 2.3's, without its kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class Norm(nn.Module):
    """`RMSNorm` and `RMSNormGated`: only what magc reads."""

    def __init__(self, size: int, eps: float, group_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_parameter("bias", None)
        self.eps, self.group_size = eps, group_size


class Mamba2(nn.Module):
    """`mamba_ssm.modules.mamba2.Mamba2`."""

    def __init__(self, d_model: int, *, headdim: int, d_state: int, ngroups: int, d_conv: int = 4) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, 2
        self.headdim, self.ngroups, self.chunk_size = headdim, ngroups, 4
        self.d_ssm = self.d_inner = 2 * d_model
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = False, True, False
        self.dt_limit, self.process_group = (0.0, float("inf")), None
        channels = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_ssm + channels + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        for name in ("dt_bias", "A_log", "D"):
            self.register_parameter(name, nn.Parameter(torch.zeros(self.nheads)))
        self.norm = Norm(self.d_ssm, 1e-5, self.d_ssm // ngroups)
        self.out_proj = nn.Linear(self.d_ssm, d_model, bias=False)


class Mamba(nn.Module):
    """`mamba_ssm.modules.mamba_simple.Mamba`."""

    def __init__(self, d_model: int, *, d_state: int, dt_rank: int, d_conv: int = 4) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, 2, dt_rank
        inner = 2 * d_model
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, d_state))
        self.D = nn.Parameter(torch.zeros(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)


class Mamba3(nn.Module):
    """`mamba_ssm.modules.mamba3.Mamba3`."""

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        headdim: int,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 2,
        chunk_size: int = 4,
        A_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.expand, self.headdim = d_model, d_state, 2, headdim
        self.chunk_size, self.A_floor, self.is_outproj_norm = chunk_size, A_floor, is_outproj_norm
        self.is_mimo, self.mimo_rank = is_mimo, mimo_rank if is_mimo else 1
        self.d_inner = 2 * d_model
        self.nheads, self.num_bc_heads = self.d_inner // headdim, ngroups
        self.rotary_dim_divisor = int(2 / rope_fraction)
        self.num_rope_angles = int(d_state * rope_fraction) // 2
        grouped = d_state * ngroups * self.mimo_rank
        features = 2 * self.d_inner + 2 * grouped + 3 * self.nheads + self.num_rope_angles
        self.in_proj = nn.Linear(d_model, features, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.nheads))
        self.B_bias = nn.Parameter(torch.ones(self.nheads, self.mimo_rank, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.nheads, self.mimo_rank, d_state))
        self.B_norm, self.C_norm = Norm(d_state, 1e-5), Norm(d_state, 1e-5)
        if is_mimo:
            for name, value in {"mimo_x": 1 / mimo_rank, "mimo_z": 1.0, "mimo_o": 1 / mimo_rank}.items():
                weight = torch.full((self.nheads, self.mimo_rank, headdim), value)
                self.register_parameter(name, nn.Parameter(weight))
        self.D = nn.Parameter(torch.ones(self.nheads))
        if is_outproj_norm:
            self.norm = Norm(self.d_inner, 1e-5, headdim)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)


class Block(nn.Module):
    """`mamba_ssm.modules.block.Block`."""

    def __init__(self, d_model: int, mixer: nn.Module, eps: float) -> None:
        super().__init__()
        self.residual_in_fp32 = True
        self.norm = Norm(d_model, eps)
        self.mixer = mixer
        self.mlp = None


class MixerModel(nn.Module):
    """`mamba_ssm.models.mixer_seq_simple.MixerModel`."""

    def __init__(self, vocabulary: int, d_model: int, mixers: list[nn.Module], eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.layers = nn.ModuleList(Block(d_model, mixer, eps) for mixer in mixers)
        self.norm_f = Norm(d_model, eps)

    def forward(self, input_ids: Any, inference_params: Any = None, **mixer_kwargs: Any) -> Any:
        raise AssertionError("the grid runs instead")


class MambaLMHeadModel(nn.Module):
    """`mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`."""

    def __init__(self, vocabulary: int, d_model: int, mixers: list[nn.Module], eps: float = 1e-5) -> None:
        super().__init__()
        self.backbone = MixerModel(vocabulary, d_model, mixers, eps)
        self.lm_head = nn.Linear(d_model, vocabulary, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Any,
        position_ids: Any = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **more: Any,
    ) -> Any:
        hidden = self.backbone(input_ids, inference_params=inference_params, **more)
        return SimpleNamespace(logits=self.lm_head(hidden[:, -num_last_tokens:]))


for _cls, _module in {
    Mamba2: "modules.mamba2",
    Mamba: "modules.mamba_simple",
    Mamba3: "modules.mamba3",
    MixerModel: "models.mixer_seq_simple",
    MambaLMHeadModel: "models.mixer_seq_simple",
}.items():
    _cls.__module__ = f"mamba_ssm.{_module}"
