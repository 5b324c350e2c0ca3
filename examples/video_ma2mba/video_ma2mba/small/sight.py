"""Second part of the small base: a vision tower that learns from single frames to name what is there, and where."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from video_ma2mba.data.frames import read_video
from video_ma2mba.model.config import VisionConfig
from video_ma2mba.model.vision import VisionTower
from video_ma2mba.small.render import SIZE, write_story
from video_ma2mba.small.standins import describe
from video_ma2mba.small.world import COLOURS, SHAPES, THINGS, make_story

VISION = VisionConfig(
    tower={
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": 64,
    },
    layer=-1,
    pool=4,
)
"""4 x 4 patches become one token a frame."""
_SECONDS = 16
_PLACE_WEIGHT, _STANDARD_WEIGHT = 4.0, 0.1
_EXAMINED_STORIES = 40


@dataclass(frozen=True)
class SightRecipe:
    """How the tower is trained.

    Attributes:
        stories: videos whose frames it sees.
        steps, batch, lr: of the training; the rate falls to zero.
        seed: of weights and videos.
    """

    stories: int = 300
    steps: int = 1000
    batch: int = 96
    lr: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Labelled:
    """Frames and what they show.

    Attributes:
        pixels: `(frames, SIZE, SIZE, 3)` uint8.
        colours, shapes: `(frames,)` int64; the number of colours or shapes where there is nothing.
        middles: `(frames, 2)`, see `describe`.
    """

    pixels: Tensor
    colours: Tensor
    shapes: Tensor
    middles: Tensor

    def to(self, device: str) -> Labelled:
        """The same on a device."""
        parts = (self.pixels, self.colours, self.shapes, self.middles)
        return Labelled(*(part.to(device) for part in parts))


def labelled_frames(stories: int, seed: int) -> Labelled:
    """Frames of encoded and decoded videos."""
    draw = random.Random(f"sight {seed}")
    made = [make_story(draw, _SECONDS) for _ in range(stories)]
    pixels: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        for story in made:
            write_story(path, story, draw.randrange(1 << 30))
            frames = read_video(path, VISION.transform)
            pixels.append(frames.read(0, len(frames)))
    things, middles = describe(made)
    colour_of = torch.tensor([*(list(COLOURS).index(thing.colour) for thing in THINGS), len(COLOURS)])
    shape_of = torch.tensor([*(SHAPES.index(thing.shape) for thing in THINGS), len(SHAPES)])
    things = things.flatten()
    return Labelled(torch.cat(pixels), colour_of[things], shape_of[things], middles.flatten(0, 1))


class Readers(nn.Module):
    """Linear layers that read what is seen out of a frame's token; they are thrown away after the training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.middle = nn.Linear(width, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of colour and shape, and the middle, of `(frames, width)`."""
        return self.colour(features), self.shape(features), self.middle(features)


def train_sight(
    recipe: SightRecipe, progress: Callable[[int, str], None], device: str = "cpu"
) -> tuple[VisionTower, dict[str, float]]:
    """Train a tower.

    Args:
        recipe: how.
        progress: told after each step how many more were done, and the loss.
        device: where.

    Returns:
        The tower, on the CPU, and what its readers tell about frames that it never saw.
    """
    torch.manual_seed(recipe.seed)
    tower, readers = VisionTower(VISION).to(device), Readers(VISION.width).to(device)
    frames = labelled_frames(recipe.stories, recipe.seed).to(device)
    parameters = [*tower.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    for _ in range(recipe.steps):
        chosen = torch.randint(len(frames.pixels), (recipe.batch,))
        loss = _loss(tower, readers, frames, chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(1, f"loss {loss.item():.3f}")
    tower.eval().cpu()
    return tower, _examined(tower, readers.cpu(), labelled_frames(_EXAMINED_STORIES, recipe.seed + 1))


def _loss(tower: VisionTower, readers: Readers, frames: Labelled, chosen: Tensor) -> Tensor:
    features = tower(frames.pixels[chosen])[:, 0]
    colour, shape, middle = readers(features)
    there = frames.colours[chosen] < len(COLOURS)
    place = (middle - frames.middles[chosen])[there].square().mean()
    named = functional.cross_entropy(colour, frames.colours[chosen])
    # Features of mean 0 and variance 1 give a fresh projector outputs of the size of words. Nothing else holds them:
    # without this they reach a norm of 30, and stage 1 ends with frames a hundred times as large as words.
    standard = features.mean(0).square().mean() + (features.var(0) - 1).square().mean()
    named = named + functional.cross_entropy(shape, frames.shapes[chosen])
    return named + _PLACE_WEIGHT * place + _STANDARD_WEIGHT * standard


@torch.no_grad()
def _examined(tower: VisionTower, readers: Readers, frames: Labelled) -> dict[str, float]:
    colour, shape, middle = readers(tower(frames.pixels)[:, 0])
    there = frames.colours < len(COLOURS)
    return {
        "colour": (colour.argmax(1) == frames.colours).double().mean().item(),
        "shape": (shape.argmax(1) == frames.shapes).double().mean().item(),
        "mean distance, in halves of a side": (middle - frames.middles)[there].abs().mean().item(),
    }
