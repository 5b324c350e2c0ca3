"""The vision tower: transformers' CLIP or SigLIP up to the layer whose features are used, and pooling."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from video_ma2mba.model.config import VisionConfig


class VisionTower(nn.Module):
    """Frames to features.

    What comes after the layer that is used (later layers, the last norm, SigLIP's pooling head) is kept as it was loaded,
    but neither runs nor trains.

    Args:
        config: which tower, layer and pooling.
        device, dtype: of all parameters.
    """

    def __init__(
        self, config: VisionConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device or torch.get_default_device()):
            if config.kind == "clip":
                model = CLIPVisionModel(CLIPVisionConfig(**config.tower))
            else:
                model = SiglipVisionModel(SiglipVisionConfig(**config.tower))
        self.model = cast(nn.Module, model).to(dtype=dtype or torch.get_default_dtype())
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> VisionTower:
        """Train or freeze the parts that run; the others stay frozen."""
        super().requires_grad_(False)
        for part in self._parts():
            part.requires_grad_(requires_grad)
        return self

    @property
    def trains(self) -> bool:
        """Whether any parameter does."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def dropout(self) -> float:
        """Probability with which attention drops weights in training mode."""
        return float(getattr(cast(Any, self.model).config, "attention_dropout", 0.0)) if self.training else 0.0

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of frames.

        Args:
            pixels: `(frames, size, size, 3)` uint8.

        Returns:
            `(frames, tokens_per_frame, width)` in the parameters' type.
        """
        model = cast(Any, self.model)
        hidden = model.embeddings(self._normalized(pixels))
        if self.config.kind == "clip":
            hidden = model.pre_layrnorm(hidden)
        for layer in self._layers():
            hidden = self._through(layer, hidden)
        if self.config.kind == "clip":
            hidden = hidden[:, 1:]  # without the class token
        elif self.config.layer == -1:
            hidden = model.post_layernorm(hidden)  # SigLIP's last hidden state is normed
        return self._pooled(hidden)

    def _through(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer. One that trains keeps its input, a twentieth of its activations, and runs again in the backward."""
        if not (torch.is_grad_enabled() and self.trains):
            return layer(hidden, None)
        return cast(Tensor, checkpoint(layer, hidden, None, use_reentrant=False, preserve_rng_state=self.dropout > 0))

    def _normalized(self, pixels: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        x = pixels.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32)) / 255
        # Filled on the device: a copy from the host would make it wait, which a CUDA graph cannot hold.
        mean, std = (
            torch.stack([torch.full((), value, dtype=x.dtype, device=x.device) for value in values]).view(1, 3, 1, 1)
            for values in (self.config.mean, self.config.std)
        )
        return ((x - mean) / std).to(dtype)

    def _pooled(self, hidden: Tensor) -> Tensor:
        """Bilinear interpolation to a grid of `pool` times fewer patches a side."""
        if self.config.pool == 1:
            return hidden
        side, target = self.config.side, math.isqrt(self.config.tokens_per_frame)
        grid = hidden.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(target, target), mode="bilinear")
        return grid.flatten(2).transpose(1, 2)

    def _layers(self) -> list[nn.Module]:
        layers = list(cast(Any, self.model).encoder.layers)
        return layers[: len(layers) + 1 + self.config.layer]

    def _parts(self) -> list[nn.Module]:
        model = cast(Any, self.model)
        parts: list[nn.Module] = [model.embeddings, *self._layers()]
        if self.config.kind == "clip":
            parts.append(model.pre_layrnorm)
        elif self.config.layer == -1:
            parts.append(model.post_layernorm)
        return parts
