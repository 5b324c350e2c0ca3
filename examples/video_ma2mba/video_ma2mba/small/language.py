"""First part of the small base: a Mamba-2 that learns from stand-ins of frames to tell, remember and order what was shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from magc.nn import Mamba2Config, Mamba2LM
from magc.nn.lm import LMState
from magc.nn.mamba2_values import Mamba2State
from video_ma2mba.data.chat import IGNORED, BpeTokenizer
from video_ma2mba.small.lessons import Batch, Lessons, Level, held_out_turns
from video_ma2mba.small.questions import KINDS
from video_ma2mba.small.standins import PLAIN, Disguise, StandIns
from video_ma2mba.small.world import COLOURS, DIRECTIONS, EVENTS, SHAPES

_FEWEST_FRAMES = 8
_PROBE_WEIGHT = 0.5


@dataclass(frozen=True)
class LanguageRecipe:
    """How the language model is trained.

    Attributes:
        d_model, n_layer, d_state, headdim: sizes.
        steps: how many.
        lr: at its highest; it falls to zero along a cosine.
        tokens: about as many in a batch.
        longest: most frames of a story; beyond what the small run asks for.
        grow: part of the steps over which stories grow to that.
        open: part of the steps whose questions are open.
        disguise: of the stand-ins.
        disguised: parts of the steps at which that begins, but for the noise, and is whole.
        seed: of weights and lessons.
        workers: processes that draw lessons, each its own: with another number of them the lessons are others; 0 draws
            in the training's own process what one would.
    """

    d_model: int = 128
    n_layer: int = 4
    d_state: int = 64
    headdim: int = 64
    steps: int = 10_000
    lr: float = 3e-3
    tokens: int = 2048
    longest: int = 160
    grow: float = 0.6
    open: float = 0.35
    disguise: Disguise = field(default_factory=Disguise)
    disguised: tuple[float, float] = (0.5, 0.9)
    seed: int = 0
    workers: int = 1

    def level(self, step: int) -> Level:
        """How hard the lessons of a step are."""
        part = step / self.steps
        growth = (self.longest / _FEWEST_FRAMES) ** (1.0 if part >= self.grow else part / self.grow)
        return Level(int(_FEWEST_FRAMES * growth), part >= self.open)

    def disguise_at(self, step: int) -> Disguise:
        """What stand-ins of a step are given."""
        part, (begins, whole) = step / self.steps, self.disguised
        share = min(1.0, max(0.0, (part - begins) / (whole - begins))) if whole > begins else float(part >= begins)
        return self.disguise.scaled(share)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Drawn(IterableDataset[Batch]):
    """The lessons of a recipe, step by step; of several workers, each draws those of its own steps."""

    def __init__(self, recipe: LanguageRecipe, tokenizer: BpeTokenizer) -> None:
        self._recipe, self._tokenizer = recipe, tokenizer

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Seeds of several workers differ in their millions, so that they are not those of another recipe.
        lessons = Lessons(self._tokenizer, seed=self._recipe.seed + 1_000_000 * first, tokens=self._recipe.tokens)
        for step in range(first, self._recipe.steps, every):
            yield Batch.of(lessons.draw(self._recipe.level(step)))


class Probes(nn.Module):
    """Linear readers of a middle layer at every frame; they are thrown away after the training.

    They ask how many things came so far, what came before the present or last one, and where that one goes. Without them
    it takes many times as long until the model orders what it sees at all.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        sizes = (EVENTS[1] + 1, len(COLOURS) + 1, len(SHAPES) + 1, len(DIRECTIONS) + 1)
        self.readers = nn.ModuleList(nn.Linear(d_model, size) for size in sizes)

    def forward(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Summed mean cross entropies of `(stories, frames, d_model)` against what is `probed`."""
        hidden = self.norm(hidden)
        losses = [
            functional.cross_entropy(reader(hidden).flatten(0, 1), target.flatten())
            for reader, target in zip(self.readers, wanted, strict=True)
        ]
        return torch.stack(losses).sum()


def train_language(
    recipe: LanguageRecipe,
    tokenizer: BpeTokenizer,
    device: str,
    progress: Callable[[int, str], None],
    *,
    start: Mamba2LM | None = None,
) -> Mamba2LM:
    """Train a language model.

    Args:
        recipe: how.
        tokenizer: its tokenizer.
        device: where.
        progress: told after each step how many more were done, and the loss.
        start: a model of the recipe's sizes to go on with instead of random weights; it is changed.

    Returns:
        The model, on the device.
    """
    torch.manual_seed(recipe.seed)
    config = Mamba2Config(
        d_model=recipe.d_model,
        n_layer=recipe.n_layer,
        vocab_size=tokenizer.size,
        d_state=recipe.d_state,
        headdim=recipe.headdim,
        chunk_size=64,
    )
    model = (Mamba2LM(config) if start is None else start).to(device)
    probes = Probes(recipe.d_model).to(device)
    model.tie_weights()
    standins = StandIns(tokenizer)
    # A lesson takes as long to draw as a step does on a GPU. Batches come from the workers in turn, so the order is fixed.
    ahead = 8 if recipe.workers else None
    batches = DataLoader(Drawn(recipe, tokenizer), batch_size=None, num_workers=recipe.workers, prefetch_factor=ahead)
    generator = torch.Generator().manual_seed(recipe.seed)
    parameters = [*model.parameters(), *probes.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.05},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    for step, drawn in enumerate(batches):
        batch: Batch = drawn.to(model.stem.weight.device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        x = batch.embed(model.stem.weight, standins, recipe.disguise_at(step), generator)
        loss = _turns_loss(model, probes, batch, x) if batch.turns else _rows_loss(model, batch, x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        progress(1, f"loss {loss.item():.3f}, up to {recipe.level(step).longest} frames")
    return model


def _turns_loss(model: Mamba2LM, probes: Probes, batch: Batch, x: Tensor) -> Tensor:
    middle = len(model.layers) // 2
    x, lower = _run(model, x, stop=middle)
    probe_loss = probes((x[0] + x[1])[:, -batch.things.shape[1] :], batch.probed)
    _, upper = _run(model, x, start=middle)
    out, targets = _answers(model, lower + upper, batch)
    total, count = model.head(out, targets)
    return total / count + _PROBE_WEIGHT * probe_loss


def _rows_loss(model: Mamba2LM, batch: Batch, x: Tensor) -> Tensor:
    out, _ = _run(model, x[:, :-1])
    total, count = model.head(out, batch.labels[:, 1:])
    return total / count


def _run(model: Mamba2LM, x: Any, states: LMState = (), start: int = 0, stop: int | None = None) -> tuple[Any, LMState]:
    """Some of the layers, and their new states."""
    found: list[Mamba2State] = []
    for index, layer in enumerate(list(model.layers)[start:stop]):
        x, state = layer(x, states[index] if states else None)
        found.append(state)
    return x, tuple(found)


def _answers(model: Mamba2LM, states: LMState, batch: Batch) -> tuple[Any, Tensor]:
    """The last layer's outputs on the turns, each begun from its story's state, and the targets."""
    times = batch.turns // len(batch.ids)
    forked = tuple(
        Mamba2State(state.conv.repeat_interleave(times, 0), state.ssm.repeat_interleave(times, 0), None)
        for state in states
    )
    return _run(model, model.stem(batch.turn_ids[:, :-1]), forked)[0], batch.turn_labels[:, 1:]


@torch.no_grad()
def examine(model: Mamba2LM, tokenizer: BpeTokenizer, seconds: int, count: int) -> dict[str, float]:
    """By kind, the part of questions about held-out stories whose whole answer is what the model would say."""
    lessons, standins = Lessons(tokenizer, seed=0, tokens=0), StandIns(tokenizer)
    found: dict[str, float] = {}
    for kind in KINDS:
        batch = Batch.of(held_out_turns(lessons, seconds, count, kind)).to(model.stem.weight.device)
        x = batch.embed(model.stem.weight, standins, PLAIN, torch.Generator())
        out, targets = _answers(model, _run(model, x)[1], batch)
        right = (model.head.logits(out).argmax(-1) == targets) | (targets == IGNORED)
        found[kind] = right.all(1).double().mean().item()
    return found
