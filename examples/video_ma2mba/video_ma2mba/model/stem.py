"""The stem of magc's grid: a segment's tokens and frames to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from video_ma2mba.data.batch import Segment, unpack_frames
from video_ma2mba.data.chat import NO_FRAME
from video_ma2mba.model.vision import VisionTower


class Projector(nn.Sequential):
    """Features to embeddings: linear, GELU, linear.

    Args:
        width: size of a feature.
        d_model: size of an embedding.
        device, dtype: of all parameters.
    """

    def __init__(
        self,
        width: int,
        d_model: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Linear(width, d_model, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(d_model, d_model, device=device, dtype=dtype),
        )


class VideoStem(nn.Module):
    """Embeds text, and frames chunk by chunk.

    A tower that trains keeps the inputs of its layers for every frame of the segment, and the activations of one layer exist
    for one chunk at a time; one that does not train keeps none.

    Args:
        embedding: token ids to embeddings.
        tower: frames to features.
        projector: features to embeddings.
        frame_chunk: frames that go through the tower at once.
    """

    def __init__(
        self, embedding: nn.Embedding, tower: VisionTower, projector: Projector, *, frame_chunk: int = 32
    ) -> None:
        super().__init__()
        self.embedding, self.tower, self.projector = embedding, tower, projector
        self.frame_chunk = frame_chunk

    def forward(self, segment: Segment) -> Tensor:
        """Embeddings `(batch, length, d_model)` of a segment."""
        embeddings = self.embedding(segment["ids"])
        pixels = unpack_frames(segment["pixels"], self.tower.config.image_size)
        if not len(pixels):
            return embeddings
        seen = self.frames(pixels).flatten(0, 1).to(embeddings.dtype)
        frame = segment["frame"]
        place = frame.clamp(min=0) * self.tower.config.tokens_per_frame + segment["patch"]
        return torch.where((frame == NO_FRAME)[..., None], embeddings, seen[place])

    def frames(self, pixels: Tensor) -> Tensor:
        """Embeddings of frames.

        Args:
            pixels: `(frames, size, size, 3)` uint8.

        Returns:
            `(frames, tokens_per_frame, d_model)`.
        """
        parts: list[Tensor] = []
        for chunk in pixels.split(self.frame_chunk):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.tower.trains):
                features = self.tower(chunk)
            parts.append(self.projector(features))
        return torch.cat(parts)
