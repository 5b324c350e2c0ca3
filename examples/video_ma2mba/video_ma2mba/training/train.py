"""The training loop: one function for all stages, alone or on every rank of torchrun."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from magc.units import parse_bytes
from video_ma2mba.data.batch import Batch
from video_ma2mba.data.chat import IGNORED, BpeTokenizer
from video_ma2mba.data.loader import Loader, Preparation, Problem
from video_ma2mba.data.media import open_media
from video_ma2mba.data.records import Sample
from video_ma2mba.errors import ConfigError, VideoMa2mbaError
from video_ma2mba.model.folder import load_parts, load_pretrained, save_pretrained
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.training import checkpoint
from video_ma2mba.training.config import TrainConfig
from video_ma2mba.training.groups import parameter_groups
from video_ma2mba.training.guard import Guard, TrainingStoppedError
from video_ma2mba.training.log import RunLog, step_losses
from video_ma2mba.training.parallel import make_strategy
from video_ma2mba.training.plans import Plans
from video_ma2mba.training.ranks import Ranks, joined
from video_ma2mba.training.sources import KeptMedia, read_samples

_TOTALS = ("loss", "learnt", "tokens", "frames")
OnStep = Callable[[int, Mapping[str, Any]], None]
"""Told the number of steps done and what the log says of the last one."""


@dataclass(frozen=True)
class TrainResult:
    """A run that reached its end.

    Attributes:
        folder: the model, for `load_pretrained` and for the next stage's `start.folder`.
        steps: of the whole run.
        losses: mean nats per learnt token, of every step before its update.
        problems: malformed records, and samples that this process could not use since it started.
    """

    folder: Path
    steps: int
    losses: tuple[float, ...]
    problems: tuple[Problem, ...]


def train(
    config: TrainConfig, *, samples: Sequence[Sample] | None = None, on_step: OnStep | None = None
) -> TrainResult:
    """Run a stage, or go on with it from its last checkpoint; under torchrun all ranks call this.

    A step's loss is the mean over all learnt tokens of its global batch, however it is dealt to ranks and micro-batches.

    Args:
        config: the run.
        samples: what to learn instead of `config.data.sources`.
        on_step: called after every step; what it raises ends the run, which can be gone on with.

    Raises:
        ConfigError, FormatError: settings or files that cannot work; raised before work starts.
        MediaError: a file cannot be used, and `data.on_problem` is "stop".
        TrainingStoppedError: the loss went wrong; the last good checkpoint is kept.
    """
    with joined(config.device, group=config.parallel == "fsdp2") as ranks, _own_random_numbers(ranks.device):
        found, malformed = read_samples(config.data, config.seed) if samples is None else (samples, ())
        return _Run(config, ranks, found, malformed, on_step).run()


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        samples: Sequence[Sample],
        malformed: tuple[Problem, ...],
        on_step: OnStep | None,
    ) -> None:
        self._config, self._ranks, self._on_step = config, ranks, on_step
        self._malformed = malformed
        self._steps = config.total_steps(len(samples))
        self._micro_batches = config.micro_batches(ranks.world)
        last = ranks.gather(checkpoint.latest(config.out))[0]
        state = None if last is None else checkpoint.load(config, ranks, last)
        self._done = 0 if last is None else checkpoint.step_of(last)
        self._log = RunLog(config.out, config.log, steps=self._steps, done=self._done, speaks=ranks.first)

        torch.manual_seed(config.seed)  # a new projector is the same on all ranks
        self._model, self._tokenizer = _load_model(config, ranks.device, last)
        groups = parameter_groups(self._model, config.rates, config.optimizer.weight_decay)
        self._model.train()
        self._loader = _loader(config, self._model, self._tokenizer, samples, ranks)
        self._guard = Guard(config.guard)
        self._plans = Plans(config.memory, self._tell_plan)
        self._strategy = make_strategy(config, self._model, groups, self._plans, ranks)
        if state is None:
            torch.manual_seed(config.seed + ranks.rank)  # what is dropped out differs
        else:
            self._take_over(state)
        self._start = {
            "resumed": None if last is None else str(last),
            "steps": self._steps,
            "samples": len(samples),
            "malformed": len(malformed),
            "world": ranks.world,
            "micro_batches": self._micro_batches,
            "trained": dict(sum((Counter({group.part: group.count}) for group in groups), Counter[str]())),
            "config": config.to_json(),
        }

    def run(self) -> TrainResult:
        """All steps that are left, and the model."""
        config, log = self._config, self._log
        folder = config.out / "model"
        with log, closing(cast(Generator[Batch], iter(self._loader))) as batches:
            log.event("start", self._done, **self._start)
            log.problems(self._done, self._malformed)  # all ranks read the same
            try:
                while self._done < self._steps:
                    self._step(batches)
            except VideoMa2mbaError as error:
                log.event("stop", self._done, reason=str(error))
                raise
            self._tell_problems(everywhere=True)
            checkpoint.write_whole(folder, self._ranks, self._write_model)
            log.event("end", self._done, data=self._report(), model=str(folder))
        self._ranks.wait()
        return TrainResult(folder, self._steps, step_losses(config.out), self._malformed + self._loader.problems)

    # ------------------------------------------------------------------ a step
    def _step(self, batches: Iterator[Batch]) -> None:
        config, strategy = self._config, self._strategy
        clock = _Clock(self._ranks.device)
        mine = dict.fromkeys(_TOTALS, 0.0)
        names: list[str] = []
        for micro in range(self._micro_batches):
            batch = next(batches)
            clock.lap("data")
            names.extend(batch.ids)
            mine["tokens"] += batch.inputs.batch_size * len(batch.inputs)
            mine["frames"] += batch.inputs.frames
            mine["learnt"] += int((batch.targets != IGNORED).sum())
            mine["loss"] += float(strategy.backward(batch, last=micro == self._micro_batches - 1))
            clock.lap("compute")
        total = dict(zip(_TOTALS, self._ranks.sum([mine[key] for key in _TOTALS]), strict=True))
        strategy.reduce()
        clock.lap("reduce")
        loss, norm = total["loss"] / total["learnt"], strategy.norm() / total["learnt"]
        factor = config.schedule.factor(self._done, self._steps)
        self._stop_if_wrong(loss, norm, factor, names)
        clip = config.optimizer.clip
        clipped = 1.0 if clip is None or norm <= clip else clip / norm
        strategy.update(clipped / total["learnt"], factor)
        clock.lap("update")
        self._done += 1
        record = {
            "loss": loss,
            "norm": norm,
            "rates": {part: rate * factor for part, rate in config.rates.trained.items()},
            **{key: int(total[key]) for key in _TOTALS[1:]},
            "seconds": clock.laps,
            **clock.peak(),
        }
        self._log.step(self._done, record)
        self._tell_problems(everywhere=False)
        self._save_if_due()
        if self._on_step is not None:
            self._on_step(self._done, record)

    def _stop_if_wrong(self, loss: float, norm: float, factor: float, names: Sequence[str]) -> None:
        trouble = self._guard.trouble(loss, norm)
        if trouble is None:
            return
        good = checkpoint.latest(self._config.out)
        rates = ", ".join(f"{part} {rate * factor:.3g}" for part, rate in self._config.rates.trained.items())
        before = ", ".join(f"{each:.4g}" for each in self._guard.recent[-5:]) or "none"
        raise TrainingStoppedError(
            f"step {self._done + 1} of {self._steps}: {trouble}. Losses before: {before}; rates: {rates}; samples of rank "
            f"{self._ranks.rank}: {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}. The step was not taken. "
            + (
                "There is no checkpoint yet; begin anew with lower rates or a smaller optimizer.clip"
                if good is None
                else f"The last good checkpoint is {good}: look at those samples, then begin a run with start.folder={good}, "
                f"another out and lower rates or a smaller optimizer.clip, or go on with the same command and another guard"
            )
        )

    # ------------------------------------------------------------------ state
    def _save_if_due(self) -> None:
        config = self._config.checkpoints
        last = self._done == self._steps
        due = last or (config.every > 0 and self._done % config.every == 0)
        # What a spike has damaged must not take the place of what was good.
        if not due or not (self._guard.calm or last):
            return
        self._tell_problems(everywhere=True)
        state = {
            "loader": self._loader.state_dict(),
            "guard": self._guard.state_dict(),
            "plans": self._plans.state_dict(),
            "optimizer": self._strategy.state_dict(),
        }
        folder = checkpoint.save(self._config, self._ranks, self._done, state, self._write_model)
        self._log.event("checkpoint", self._done, folder=str(folder))

    def _take_over(self, state: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state["loader"])
        self._guard.load_state_dict(state["guard"])
        self._plans.load_state_dict(state["plans"])
        self._strategy.load_state_dict(state["optimizer"])
        checkpoint.set_random_state(state["random"], self._ranks.device)

    def _write_model(self, folder: Path) -> None:
        weights = self._strategy.weights()
        if weights is not None:
            save_pretrained(self._model, folder, self._tokenizer, weights=weights)

    # ------------------------------------------------------------------ reports
    def _tell_plan(self, length: int, plan: str) -> None:
        self._log.event("plan", self._done, length=length, plan=plan)

    def _report(self) -> str:
        report = self._loader.report()
        if not self._malformed:
            return report
        first = self._malformed[0]
        return f"{len(self._malformed)} malformed records were left out, e.g. {first.detail}\n{report}"

    def _tell_problems(self, *, everywhere: bool) -> None:
        """Those of this rank, or, when all ranks ask, of all."""
        mine = self._loader.problems
        for found in self._ranks.gather(mine) if everywhere else [mine]:
            self._log.problems(self._done, found)


class _Clock:
    """Seconds and peak memory of the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.laps: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last call to a part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def peak(self) -> dict[str, int]:
        """Most bytes allocated on a GPU since the start."""
        return {"peak_bytes": torch.cuda.max_memory_allocated(self._device)} if self._device.type == "cuda" else {}


@contextmanager
def _own_random_numbers(device: torch.device) -> Generator[None]:
    """Leave the caller's random numbers as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _load_model(config: TrainConfig, device: torch.device, resumed: Path | None) -> tuple[VideoMa2mba, BpeTokenizer]:
    start = config.start
    # FSDP keeps the precise weights itself and runs on rounded ones.
    rounded = config.precision == "bfloat16" and config.parallel == "fsdp2"
    dtype = torch.float32 if rounded else getattr(torch, config.precision)
    options: dict[str, Any] = {"frame_chunk": start.frame_chunk, "impl": start.impl, "device": device, "dtype": dtype}
    folder = start.folder if resumed is None else resumed
    if folder is not None:
        return load_pretrained(folder, **options), BpeTokenizer.from_folder(folder)
    assert start.vision is not None
    assert start.language is not None
    assert start.tokenizer is not None
    tokenizer = BpeTokenizer.from_folder(start.tokenizer)
    return (
        load_parts(start.vision, start.language, untie=start.untie, layer=start.layer, fps=start.fps, **options),
        tokenizer,
    )


def _loader(
    config: TrainConfig, model: VideoMa2mba, tokenizer: BpeTokenizer, samples: Sequence[Sample], ranks: Ranks
) -> Loader:
    data = config.data
    vocabulary = model.config.language.padded_vocab_size
    if tokenizer.size > vocabulary:
        raise ConfigError(f"the tokenizer has {tokenizer.size} tokens, the language model {vocabulary}; they don't fit")
    media = model.media_options(max_frames=data.max_frames, stream=data.stream)
    # A sample that turns out damaged in the middle of a step can no longer be left out of it.
    media = replace(media, check=data.on_problem == "skip")
    opened = open_media if data.cache is None else KeptMedia(parse_bytes(data.cache))
    return Loader(
        samples,
        Preparation(model.encoder(tokenizer), media, data.max_tokens, opened),
        batch_size=data.batch_size,
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
        on_problem=data.on_problem,
        multiple=data.multiple,
        workers=data.workers,
    )
