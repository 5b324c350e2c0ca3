"""A training step of Video-Ma²mba in stage 2's configuration, by the trainer's own parts, metered and timed.

The model, the parameter groups, magc's plans, the loss on the grid, the gradients' norm and the optimizer are those of
`video_ma2mba.training`. Only the frames and the text are made up, and so are the weights.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.video_report import Row
from benchmarks.video_setup import make_batch, model_config, random_frames
from magc.accumulate import GradAccumulator
from magc.bench.peak import MakesSums, Peak, idle_graph_bytes, measure_peak, sums_made_by
from magc.bench.work import Grid
from magc.grid import Grid as Cells
from magc.meter import MemoryMeter
from magc.plan import Plan
from magc.schedule import Action, Backward, Record, Run, Schedule
from magc.units import format_bytes, parse_bytes
from video_ma2mba.data.batch import Batch
from video_ma2mba.data.chat import IGNORED, NO_FRAME, Tokens
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.training.config import TrainConfig
from video_ma2mba.training.groups import parameter_groups
from video_ma2mba.training.parallel import Replicas, SummedLoss
from video_ma2mba.training.plans import Plans
from video_ma2mba.training.ranks import Ranks

_WARM_SEGMENTS = 5
"""Enough for captured cells of every kind."""
_WARM_FRAMES = 64
"""Enough for eager cells: kernels are compiled and the optimizer's state is made, whatever the length."""
_BLOCK = 512
"""Bytes that the CUDA allocator rounds up to."""


Told = Callable[[str], None]


class LentPlans(Plans):
    """The trainer's plans, where a short sequence can run by a long one's, to warm up for it."""

    @contextmanager
    def lent(self, length: int, short: int) -> Generator[None]:
        """Run sequences of `short` tokens by the plan for `length`."""
        before = dict(self._made)
        if length in before:
            self._made[short] = before[length]
        try:
            yield
        finally:
            self._made = before


class MeasuredLoss(SummedLoss):
    """The trainer's loss, which notes when its forward is done.

    Args:
        model: the model.
        plans: of the grid.
        runner: of its cells.

    Attributes:
        forward_ended: `time.perf_counter` then, the device waited for.
    """

    def __init__(self, model: VideoMa2mba, plans: Plans, runner: Any) -> None:
        super().__init__(model, plans, runner)
        self._measured = (Grid(model.layers, plans, runner=runner),)  # in a tuple: the layers are the model's already
        self._grid = self._measured
        self.forward_ended = 0.0

    @property
    def grid(self) -> Grid:
        """What runs the layers."""
        return self._measured[0]

    def forward(self, batch: Batch) -> Tensor:
        """As the base class."""
        total = super().forward(batch)
        self.forward_ended = _now(total.device)
        return total


@dataclass(frozen=True, slots=True)
class TowerWork:
    """What a pass over the grid has the tower do.

    Attributes:
        encoded: frames that are run; those in two segments count twice, and so do those that run again.
        propagated: frames that are back-propagated.
    """

    encoded: int
    propagated: int

    def seconds(self, running: float, propagating: float) -> float:
        """How long it takes at so many seconds a frame."""
        return self.encoded * running + self.propagated * propagating


def tower_work(actions: Iterable[Action], cells: Cells, tokens: Tokens) -> TowerWork:
    """Count frames over the cells that hold the stem, those of the first group of layers."""
    frames: list[int] = []
    for start, stop in cells.tokens.all_bounds():
        seen = tokens.frame[start:stop]
        frames.append(len(seen[seen != NO_FRAME].unique()))
    encoded = propagated = 0
    for action in actions:
        match action:
            case Run(0, segment) | Record(0, segment):
                encoded += frames[segment]
            case Backward(0, segment):
                propagated += frames[segment]
            case _:
                pass
    return TowerWork(encoded, propagated)


class VideoBench:
    """A model with random weights and all that the trainer makes for it, on one device.

    Args:
        name: of the model, see `model_config`.
        config: the run; its budget is over gradient sums, which are added to it.
        ranks: this process alone.

    Attributes:
        model: in training mode, bf16.
        trained: number of trained parameters.
    """

    def __init__(self, name: str, config: TrainConfig, ranks: Ranks) -> None:
        self._name, self._device = name, ranks.device
        torch.manual_seed(config.seed)
        made = model_config(name)
        self.model = VideoMa2mba.random(
            made, frame_chunk=config.start.frame_chunk, device=ranks.device, dtype=getattr(torch, config.precision)
        )
        groups = parameter_groups(self.model, config.rates, config.optimizer.weight_decay)
        self.model.train()
        self.trained = sum(group.count for group in groups)
        self._sums = sum(
            each.numel() * torch.promote_types(each.dtype, torch.float32).itemsize
            for each in self.model.parameters()
            if each.requires_grad
        )
        given = config.memory.budget
        self._budget = None if given is None else parse_bytes(given)
        if self._budget is not None:
            # magc's budget holds the sums, which grow with the model alone; the aim is over them.
            config = replace(config, memory=replace(config.memory, budget=str(self._budget + self._sums)))
        self._config = config
        self._plans = LentPlans(config.memory)
        self._loss = MeasuredLoss(self.model, self._plans, config.memory.runner)
        self._strategy = Replicas(config, self._loss, groups, ranks)
        self._vision = self._vision_seconds()

    def measure(self, minutes: float, told: Told = print) -> Row:
        """A whole step on so many minutes of video, after short ones that compile, capture and make the optimizer's state.

        Args:
            minutes: of video.
            told: told what is being done.

        Raises:
            BudgetError: no plan fits; says what would be needed.
            FloatingPointError: the loss or the norm is not finite.
        """
        frames = max(1, round(60 * minutes))
        batch, tokens = make_batch(self.model.config, frames, self._config.data.multiple)
        self._loss.grid.release_graphs()
        self._clean()
        told(f"{minutes:g} min: {len(tokens):,} tokens; measuring the layers")
        start = _now(self._device)
        self._plans.prepare(self.model, batch)
        planning = _now(self._device) - start
        length = len(batch.inputs)
        plan = self._plans(len(self.model.layers), length)
        short = self._part(batch, plan)
        told(f"planned in {planning:.0f} s: {plan}; warming up on {len(short.inputs):,} tokens")
        with self._plans.lent(length, len(short.inputs)):
            # Of a kind of cell that a step has once, a graph is captured in the second step.
            for _ in range(1 if self._config.memory.runner == "eager" else 2):
                self._step(short, metered=False)
        del short
        self._clean()
        if plan.forecast is not None:
            expected = plan.forecast.estimate
            told(f"pinning {format_bytes(expected.host_bytes)}; then a step, expected to take {expected.seconds:.0f} s")
            self._loss.grid.pin(plan.forecast.estimate.host_bytes)  # 0.4 s per GiB, once: not a step's time
        step = self._step(batch, metered=True)
        schedule = Schedule(plan, plan.grid(len(self.model.layers), length))
        work = {
            "forward": tower_work(schedule.forward(), schedule.grid, tokens),
            "backward": tower_work(schedule.backward(), schedule.grid, tokens),
        }
        weights, optimizer = list(self.model.parameters()), self._state()
        # On a GPU peaks are of all that is allocated. On the CPU the meter knows nothing of what was there before.
        on_gpu = self._device.type == "cuda"
        there = 0 if on_gpu else _allocated((*weights, *optimizer), self._device)
        return Row(
            model=self._name,
            minutes=minutes,
            frames=frames,
            tokens=len(tokens),
            padded=length,
            runner=self._config.memory.runner,
            budget=self._budget,
            plan=str(plan),
            eager=self._loss.grid.refusals,
            weights=sum(each.nbytes for each in weights),
            optimizer=sum(each.nbytes for each in optimizer),
            sums=step.metered.gradients,
            delivered=step.delivered,
            peak={
                "passes": there + step.metered.delivered + (_allocated(weights, self._device) if on_gpu else 0),
                "update": there + step.update_peak,
            },
            reserved=step.reserved,
            over=step.metered.over_gradients - (_allocated(optimizer, self._device) if on_gpu else 0),
            pinned=self._loss.grid.pinned_bytes,
            seconds=step.seconds,
            encoded=work["forward"].encoded + work["backward"].encoded,
            vision={name: each.seconds(*self._vision) for name, each in work.items()},
            planning=planning,
            loss=step.loss,
            norm=step.norm,
        )

    # ------------------------------------------------------------------ a step
    def _step(self, batch: Batch, *, metered: bool) -> _Step:
        """As the trainer's, with one micro-batch."""
        device, strategy, parameters = self._device, self._strategy, list(self.model.parameters())
        learnt = int((batch.targets != IGNORED).sum())
        step = _Step()

        def passes(makes: MakesSums) -> None:
            with sums_made_by(self._loss.grid, makes):
                start = _now(device)
                step.loss = float(strategy.backward(batch, last=True)) / learnt
                end = _now(device)
            step.seconds |= {"forward": self._loss.forward_ended - start, "backward": end - self._loss.forward_ended}

        if metered:
            step.metered = measure_peak(passes, parameters, ())
        else:
            passes(GradAccumulator)
        step.note_reserved(device)
        step.delivered = sum(each.grad.nbytes for each in parameters if each.grad is not None)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else step.delivered
        with MemoryMeter(device) as meter:
            start = _now(device)
            strategy.reduce()
            step.norm = strategy.norm() / learnt
            normed = _now(device)
            if not (math.isfinite(step.loss) and math.isfinite(step.norm)):
                raise FloatingPointError(f"loss {step.loss}, norm of its gradient {step.norm}: no step can be taken")
            clip = self._config.optimizer.clip
            clipped = 1.0 if clip is None or step.norm <= clip else clip / step.norm
            strategy.update(clipped / learnt, 1.0)
            step.seconds |= {"norm": normed - start, "update": _now(device) - normed}
        step.update_peak = held + meter.peak_bytes + idle_graph_bytes(device)
        step.note_reserved(device)
        return step

    def _part(self, batch: Batch, plan: Plan) -> Batch:
        """A shorter sequence to warm up on, or the batch: captured, with cells of every kind that the plan makes."""
        if self._config.memory.runner == "eager":
            return self._beginning(batch, _WARM_FRAMES)
        grid = plan.grid(len(self.model.layers), len(batch.inputs))
        segments = _WARM_SEGMENTS + math.ceil(plan.kept_cells(grid) / grid.groups)
        if not isinstance(plan.tokens, int) or segments >= grid.segments:
            return batch
        return self._beginning(batch, math.ceil(segments * plan.tokens / self.model.config.vision.tokens_per_frame))

    def _beginning(self, batch: Batch, frames: int) -> Batch:
        """A sequence of fewer frames, or the batch."""
        if frames >= batch.inputs.frames:
            return batch
        return make_batch(self.model.config, frames, self._config.data.multiple)[0]

    def _state(self) -> list[Tensor]:
        """The optimizer's, on the device."""
        states = self._strategy.state_dict().values()
        return [each for state in states for each in state.values() if each.device.type == self._device.type]

    def _vision_seconds(self) -> tuple[float, float]:
        """Of a frame in tower and projector alone: of running it, and of back-propagating it, the second run of each layer
        that this begins with included.
        """
        stem, device = self.model.stem, self._device
        count = 4 * stem.frame_chunk
        pixels = random_frames(count, self.model.config.vision.image_size).to(device)
        trained = [
            each
            for part in (self.model.vision, self.model.projector)
            for each in part.parameters()
            if each.requires_grad
        ]

        def forward() -> None:
            with torch.no_grad():
                stem.frames(pixels)

        def both() -> None:
            seen = stem.frames(pixels)
            torch.autograd.grad(seen, trained, torch.ones_like(seen))

        once, twice = _best(forward, device), _best(both, device)
        return once / count, max(0.0, twice - once) / count

    def _clean(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(slots=True)
class _Step:
    """What is learnt of a step while it runs, in the units of `Row`."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    metered: Peak = field(default_factory=lambda: Peak(0, 0, 0, 0))
    loss: float = math.nan
    norm: float = math.nan
    delivered: int = 0
    update_peak: int = 0
    reserved: int = 0

    def note_reserved(self, device: torch.device) -> None:
        """Take note of what the process has reserved of the device."""
        if device.type == "cuda":
            now = max(torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))
            self.reserved = max(self.reserved, now)


def _allocated(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes that tensors take, as `MemoryMeter` counts them."""
    block = _BLOCK if device.type == "cuda" else 1
    return sum(-(-each.nbytes // block) * block for each in tensors)


def _best(run: Callable[[], None], device: torch.device, times: int = 3) -> float:
    """The shortest of a few runs, seconds."""
    found: list[float] = []
    for _ in range(times):
        start = _now(device)
        run()
        found.append(_now(device) - start)
    return min(found)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
