"""Frames of any size to the square the vision tower takes, still as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Fit = Literal["crop", "stretch"]


@dataclass(frozen=True, slots=True)
class FrameTransform:
    """Bicubic resizing to a square, as the towers' own image processors do it.

    Attributes:
        size: side of the square in pixels.
        fit: "crop" resizes the shorter side and cuts out the centre (CLIP), "stretch" ignores the aspect (SigLIP).
    """

    size: int
    fit: Fit = "crop"

    def __call__(self, frame: NDArray[np.uint8]) -> Tensor:
        """Resize one frame.

        Args:
            frame: `(height, width, 3)` uint8, RGB.

        Returns:
            `(size, size, 3)` uint8, contiguous.
        """
        height, width, _ = frame.shape
        x_CHW = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
        if (height, width) != (self.size, self.size):
            target = self._target(height, width)
            x_CHW = functional.interpolate(x_CHW[None], size=target, mode="bicubic", antialias=True)[0]
        top, left = ((side - self.size) // 2 for side in x_CHW.shape[1:])
        x_CHW = x_CHW[:, top : top + self.size, left : left + self.size]
        return x_CHW.permute(1, 2, 0).contiguous()

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "stretch":
            return self.size, self.size
        short = min(height, width)
        # The longer side is rounded down, as in transformers' get_resize_output_image_size.
        return max(self.size, self.size * height // short), max(self.size, self.size * width // short)


def upright(frame: NDArray[Any], degrees: int) -> NDArray[Any]:
    """Turn a frame the way its file asks to be shown (a telephone held upright records lying frames).

    Args:
        frame: `(height, width, 3)`.
        degrees: counter-clockwise rotation of the display matrix, as PyAV tells it.
    """
    turns, rest = divmod(degrees % 360, 90)
    return frame if rest else np.rot90(frame, turns)
