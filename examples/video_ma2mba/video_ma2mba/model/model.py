"""The whole model, and its parts in the form that magc's grid takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from magc.nn import Mamba2Block, Mamba2LM
from magc.nn.lm import LMHead, LMState
from magc.nn.operators import Impl
from video_ma2mba.data.batch import Segment, VideoTokens
from video_ma2mba.data.chat import ChatEncoder, TextTokenizer
from video_ma2mba.data.media import MediaOptions
from video_ma2mba.errors import ConfigError
from video_ma2mba.model.config import VideoMa2mbaConfig
from video_ma2mba.model.stem import Projector, VideoStem
from video_ma2mba.model.vision import VisionTower

Part = Literal["language", "vision", "projector"]


class VideoMa2mba(nn.Module):
    """Vision tower, projector and Mamba-2.

    Trains with `grid.loss(batch.inputs, batch.targets, stem=model.stem, head=model.head)`, where `grid` is a
    `magc.GridCheckpoint(model.layers, ...)`: neither embeddings nor logits of the whole sequence ever exist.

    Args:
        config: sizes and options; the parts must fit it.
        language, vision, projector: the parts.
        frame_chunk: frames that go through the tower at once; bounds memory, changes nothing else.
    """

    def __init__(
        self,
        config: VideoMa2mbaConfig,
        language: Mamba2LM,
        vision: VisionTower,
        projector: Projector,
        *,
        frame_chunk: int = 32,
    ) -> None:
        super().__init__()
        self.config = config
        self.language, self.vision, self.projector = language, vision, projector
        # In a tuple, so that nn.Module does not register it: its parameters belong to the three parts above.
        self._stem = (VideoStem(language.stem, vision, projector, frame_chunk=frame_chunk),)

    @classmethod
    def random(
        cls,
        config: VideoMa2mbaConfig,
        *,
        frame_chunk: int = 32,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model with random weights.

        Args:
            config: sizes and options.
            frame_chunk: as of the class.
            impl: of Mamba-2's operators, see `magc.nn.operators.Impl`.
            device: of all parameters.
            dtype: of all parameters.
        """
        return cls(
            config,
            Mamba2LM(config.language, impl=impl, device=device, dtype=dtype),
            VisionTower(config.vision, device=device, dtype=dtype),
            Projector(config.vision.width, config.language.d_model, device=device, dtype=dtype),
            frame_chunk=frame_chunk,
        )

    @property
    def stem(self) -> VideoStem:
        """A segment of tokens and frames to the first block's input; the same object at every call."""
        return self._stem[0]

    @property
    def layers(self) -> Sequence[Mamba2Block]:
        """Mamba-2's blocks."""
        return self.language.layers

    @property
    def head(self) -> LMHead:
        """The last block's output and targets to (summed cross entropy, count)."""
        return self.language.head

    def train_only(self, parts: Collection[Part]) -> None:
        """Let the parameters of these parts be trained, and freeze the others'.

        Raises:
            ConfigError: there is no such part.
        """
        if unknown := set(parts) - set(get_args(Part)):
            raise ConfigError(
                f"the model has no part {', '.join(sorted(unknown))}; choose from {', '.join(get_args(Part))}"
            )
        self.language.requires_grad_("language" in parts)
        self.vision.requires_grad_("vision" in parts)
        self.projector.requires_grad_("projector" in parts)

    def train(self, mode: bool = True) -> VideoMa2mba:
        """Set the mode of all parts, the stem itself included."""
        super().train(mode)
        self.stem.train(mode)
        return self

    def encoder(self, tokenizer: TextTokenizer) -> ChatEncoder:
        """Samples and questions to this model's tokens."""
        return ChatEncoder(tokenizer, self.config.vision.tokens_per_frame, self.config.chat)

    def media_options(self, *, max_frames: int | None = None, stream: bool = False) -> MediaOptions:
        """How media become this model's frames."""
        return MediaOptions(self.config.vision.transform, self.config.fps, max_frames, stream)

    def forward(
        self, segment: Segment, state: LMState | None = None, *, num_last_tokens: int | None = None
    ) -> tuple[Tensor, LMState]:
        """Run a segment, as plain PyTorch.

        Args:
            segment: of `VideoTokens`, on the model's device.
            state: of the tokens before; None at the start.
            num_last_tokens: return logits of that many last tokens only; None: of all.

        Returns:
            Logits `(batch, length or num_last_tokens, padded vocabulary)` and the state after the last token.
        """
        x, new_states = self.stem(segment), []
        for index, layer in enumerate(self.layers):
            x, new_state = layer(x, None if state is None else state[index])
            new_states.append(new_state)
        if num_last_tokens is not None:
            hidden, residual = x
            x = hidden[:, -num_last_tokens:], residual[:, -num_last_tokens:]
        return self.head.logits(x), tuple(new_states)

    def segment_of(self, tokens: VideoTokens, start: int, stop: int) -> Segment:
        """A segment on the model's device."""
        device = self.language.stem.weight.device
        segment = tokens.segment(start, stop)
        return Segment(
            ids=segment["ids"].to(device),
            frame=segment["frame"].to(device),
            patch=segment["patch"].to(device),
            pixels=segment["pixels"].to(device),
        )
