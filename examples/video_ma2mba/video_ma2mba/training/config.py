"""What a training run is, as frozen values: the same names in Python, in YAML and on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from magc.nn.operators import Impl
from magc.units import parse_bytes
from video_ma2mba.data.loader import OnProblem
from video_ma2mba.data.records import Form
from video_ma2mba.errors import ConfigError
from video_ma2mba.model.model import Part

Format = Literal["llava", "llava_video_178k", "scenewalk_v1", "scenewalk_v2"]
Parallel = Literal["zero1", "ddp", "fsdp2"]
Precision = Literal["float32", "bfloat16", "float64"]
Kind = Literal["cosine", "linear", "constant"]

_CHANGEABLE = ("out", "log.", "checkpoints.", "memory.", "guard.", "device", "start.frame_chunk", "start.impl")
_CHANGEABLE_DATA = ("data.workers", "data.cache", "data.stream", "data.on_problem")


@dataclass(frozen=True)
class StartConfig:
    """The model to begin with: a folder of this package, or the parts of one as they are published.

    Attributes:
        folder: what an earlier stage saved; its tokenizer too.
        vision: a CLIP or SigLIP folder in transformers' layout.
        language: a folder in the layout of state-spaces/mamba2-*.
        tokenizer: a folder with GPT-NeoX's tokenizer.json.
        untie: give the head a weight of its own (1.8B and 3.1B).
        layer: whose features of the tower are used.
        fps: frames a second.
        frame_chunk: frames that go through the vision tower at once.
        impl: of Mamba-2's operators.
    """

    folder: Path | None = None
    vision: Path | None = None
    language: Path | None = None
    tokenizer: Path | None = None
    untie: bool = False
    layer: int = -2
    fps: float = 1.0
    frame_chunk: int = 32
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        parts = {"vision": self.vision, "language": self.language, "tokenizer": self.tokenizer}
        given = [name for name, path in parts.items() if path is not None]
        if self.folder is not None and (given or self.untie):
            raise ConfigError(f"start.folder={self.folder} is a whole model; leave {', '.join(given) or 'untie'} out")
        if self.folder is None and len(given) < len(parts):
            missing = ", ".join(f"start.{name}" for name in parts if name not in given)
            raise ConfigError(f"no model to begin with: give start.folder, or else {missing}")
        _at_least("start", frame_chunk=(self.frame_chunk, 1))


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples.

    Attributes:
        format: of the annotations.
        path: the annotation file, or the folder of LLaVA-Video-178K.
        media: the folder that media are relative to; None is the annotation file's own, or each source's for
            LLaVA-Video-178K.
        samples: so many, chosen at random by the run's seed; None is all.
        kinds: of LLaVA-Video-178K: captions, open-ended questions, multiple choice.
        form: of SceneWalk: clips and captions in turn, or as questions and answers.
    """

    format: Format
    path: Path
    media: Path | None = None
    samples: int | None = None
    kinds: tuple[str, ...] = ("cap", "oe", "mc")
    form: Form = "interleaved"

    def __post_init__(self) -> None:
        if self.samples is not None:
            _at_least(f"source {self.path}", samples=(self.samples, 1))


@dataclass(frozen=True)
class DataConfig:
    """What is learnt, and how it is loaded.

    Attributes:
        sources: read in this order, then shuffled together.
        group_by_media: questions about one video become one sequence.
        max_turns: most turns of such a sequence.
        max_frames: most frames of one medium, evenly spread; None for all at the model's rate.
        max_tokens: longer sequences are reported and left out; None for any length.
        batch_size: sequences of a micro-batch of one rank.
        multiple: lengths are padded to a multiple of this, so that few different ones are planned for.
        workers: threads that decode ahead; 0 decodes when asked.
        stream: decode frames when the stem asks for them, instead of holding a sample's frames in host memory; with
            on_problem="skip" a video is decoded once more when it is opened, to find damage before a step begins.
        cache: bytes of host memory, e.g. "1GiB", for decoded media that stay for other samples and later epochs.
        on_problem: leave out files that cannot be used and report them, or stop.
    """

    sources: tuple[SourceConfig, ...] = ()
    group_by_media: bool = False
    max_turns: int | None = None
    max_frames: int | None = None
    max_tokens: int | None = None
    batch_size: int = 1
    multiple: int = 1
    workers: int = 0
    stream: bool = False
    cache: str | None = None
    on_problem: OnProblem = "skip"

    def __post_init__(self) -> None:
        _at_least("data", batch_size=(self.batch_size, 1), multiple=(self.multiple, 1), workers=(self.workers, 0))
        limits = {"max_turns": self.max_turns, "max_frames": self.max_frames, "max_tokens": self.max_tokens}
        _at_least("data", **{name: (limit, 1) for name, limit in limits.items() if limit is not None})
        if self.cache is not None:
            parse_bytes(self.cache)
            if self.stream:
                raise ConfigError(
                    f"data.cache={self.cache!r} keeps decoded frames, data.stream=true holds none: choose"
                )


@dataclass(frozen=True)
class RatesConfig:
    """Learning rates at their highest; a part without one is frozen.

    Attributes:
        language: of Mamba-2.
        vision: of the tower.
        projector: of the projector.
    """

    language: float | None = None
    vision: float | None = None
    projector: float | None = None

    def __post_init__(self) -> None:
        if wrong := {part: rate for part, rate in asdict(self).items() if rate is not None and not rate > 0}:
            raise ConfigError(f"rates must be above 0, or null for a frozen part; got {wrong}")

    @property
    def trained(self) -> dict[Part, float]:
        """The parts that are trained, with their rates."""
        rates: dict[Part, float | None] = {
            "language": self.language,
            "vision": self.vision,
            "projector": self.projector,
        }
        return {part: rate for part, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
        betas: of its moments.
        eps: added to the root of the second moment.
        weight_decay: of matrices; norms, biases, A_log, D and dt_bias have none.
        clip: largest norm of the gradient of all trained parameters together; None does not clip.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or self.weight_decay < 0:
            raise ConfigError(f"{self}: betas lie in [0, 1), eps above 0, weight_decay at 0 or above")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"optimizer.clip={self.clip} must be above 0, or null for none")


@dataclass(frozen=True)
class ScheduleConfig:
    """The rates over a run.

    Attributes:
        kind: how they fall after the warm-up.
        warmup: share of all steps over which they rise.
        final: share of the rate at the end.
    """

    kind: Kind = "cosine"
    warmup: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1 or not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.warmup={self.warmup} and schedule.final={self.final} are shares from 0 to 1")

    def factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied by at a step, counted from 0.

        They rise by equal amounts and are at their highest at the last step of the warm-up and the first after it.
        """
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        falls = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.final + (1 - self.final) * falls[self.kind]


@dataclass(frozen=True)
class MemoryConfig:
    """How magc runs a step; without budget and segment nothing is checkpointed.

    Attributes:
        budget: device memory of one forward and backward beyond weights and optimizer, e.g. "40GiB": magc plans.
        segment: or a plan by hand: all layers on so many tokens at a time.
        host_budget: host memory for checkpoints, with a budget.
        runner: of magc's cells.
    """

    budget: str | None = None
    segment: int | None = None
    host_budget: str | None = None
    runner: Literal["eager", "cuda-graph"] = "eager"

    def __post_init__(self) -> None:
        if self.budget is not None and self.segment is not None:
            raise ConfigError(f"memory.budget={self.budget!r} and memory.segment={self.segment}: give one of them")
        if self.host_budget is not None and self.budget is None:
            raise ConfigError(f"memory.host_budget={self.host_budget!r} needs memory.budget")
        for size in (self.budget, self.host_budget):
            if size is not None:
                parse_bytes(size)
        if self.segment is not None:
            _at_least("memory", segment=(self.segment, 1))


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run can go on from.

    Attributes:
        every: steps between checkpoints; 0 saves at the end only.
        keep: how many stay.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least("checkpoints", every=(self.every, 0), keep=(self.keep, 1))


@dataclass(frozen=True)
class LogConfig:
    """What is told besides `log.jsonl`.

    Attributes:
        progress: a progress bar.
        tensorboard: event files in `tensorboard/`.
    """

    progress: bool = True
    tensorboard: bool = False


@dataclass(frozen=True)
class GuardConfig:
    """When a run stops by itself; NaN and infinity always stop it.

    Attributes:
        spike: a loss above so many times the median of the last ones is a spike; None allows any.
        window: how many last losses.
        patience: so many spikes in a row stop the run.
    """

    spike: float | None = 5.0
    window: int = 64
    patience: int = 3

    def __post_init__(self) -> None:
        _at_least("guard", window=(self.window, 2), patience=(self.patience, 1))
        if self.spike is not None and not self.spike > 1:
            raise ConfigError(f"guard.spike={self.spike} must be above 1, or null for none")


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        out: its folder: log, checkpoints and, at the end, the model.
        start: the model to begin with.
        rates: learning rates by part.
        global_batch: sequences of a step, over all ranks and micro-batches.
        data: what is learnt.
        epochs: passes over the data.
        steps: number of steps instead.
        optimizer: AdamW.
        schedule: the rates over the run.
        memory: how magc runs a step.
        parallel: what ranks share: zero1 the optimizer's state, fsdp2 parameters and gradients too, ddp nothing.
        precision: of weights and activations; bfloat16 keeps float32 copies of the weights in the optimizer.
        checkpoints: where the run can go on from.
        log: what is told.
        guard: when it stops by itself.
        device: None is the GPU if there is one.
        seed: of the order of the samples, and of a new projector.
    """

    out: Path
    start: StartConfig
    rates: RatesConfig
    global_batch: int
    data: DataConfig = field(default_factory=DataConfig)
    epochs: float = 1.0
    steps: int | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: Parallel = "zero1"
    precision: Precision = "float32"
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rates.trained:
            raise ConfigError("nothing is trained: give rates.language, rates.vision or rates.projector")
        if self.steps is not None:
            _at_least("", steps=(self.steps, 1))
        elif not self.epochs > 0:
            raise ConfigError(f"epochs={self.epochs} must be above 0")
        _at_least("", global_batch=(self.global_batch, 1))

    def micro_batches(self, world: int) -> int:
        """Micro-batches of a step on every rank.

        Raises:
            ConfigError: the global batch cannot be dealt out.
        """
        share = self.data.batch_size * world
        if self.global_batch % share:
            raise ConfigError(
                f"global_batch={self.global_batch} cannot be dealt to {world} ranks in micro-batches of "
                f"data.batch_size={self.data.batch_size}; it must be a multiple of {share}"
            )
        return self.global_batch // share

    def total_steps(self, samples: int) -> int:
        """Steps of the whole run over so many samples."""
        return self.steps or max(1, math.ceil(self.epochs * samples / self.global_batch - 1e-9))

    def to_json(self) -> dict[str, Any]:
        """For the log and `config.json`."""
        return _plain(asdict(self))

    def identity(self) -> dict[str, Any]:
        """By dotted name, what decides where a run ends up. Folders of output, logs, memory and threads do not."""
        flat = _flat(self.to_json())
        return {name: value for name, value in flat.items() if not name.startswith(_CHANGEABLE + _CHANGEABLE_DATA)}


def _at_least(where: str, **values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise ConfigError(f"{where + '.' if where else ''}{name}={value} must be at least {least}")


def _plain(value: Any) -> Any:
    match value:
        case Mapping():
            return {str(name): _plain(each) for name, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case Path():
            return str(value)
        case _:
            return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found
