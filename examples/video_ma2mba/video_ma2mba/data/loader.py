"""Batches without end, in an order that seed and epoch fix, from any position."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import torch

from video_ma2mba.data.batch import Batch, Example, collate
from video_ma2mba.data.chat import IGNORED, ChatEncoder
from video_ma2mba.data.frames import Frames, JoinedFrames
from video_ma2mba.data.media import MediaOptions, open_media
from video_ma2mba.data.records import Media, Sample
from video_ma2mba.errors import ConfigError, MediaError, ProblemKind

OnProblem = Literal["skip", "stop"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A sample that could not be used.

    Attributes:
        sample: its id, which others may have too.
        kind: why.
        path: of the file.
        detail: what was found.
        index: its number among the samples; None for a malformed record, which never became one.
    """

    sample: str
    kind: ProblemKind
    path: str
    detail: str
    index: int | None = None


@dataclass(frozen=True)
class Preparation:
    """Opens a sample's media and encodes its text.

    Attributes:
        encoder: text to tokens.
        media: media to frames.
        max_tokens: a longer sequence is a problem; None for any length.
        open: opens a medium.
    """

    encoder: ChatEncoder
    media: MediaOptions
    max_tokens: int | None = None
    open: Callable[[Media, MediaOptions], Frames] = open_media

    def __call__(self, sample: Sample) -> Example:
        """The sample, ready to be learnt.

        Raises:
            MediaError: a medium cannot be used, the sequence is too long, or there is no answer in it.
        """
        frames = [self.open(media, self.media) for media in sample.media]
        tokens = self.encoder.sample(sample, [len(each) for each in frames])
        path = sample.media[0].path if sample.media else sample.id
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            raise MediaError(ProblemKind.TOO_LONG, path, f"{len(tokens)} tokens, where {self.max_tokens} are allowed")
        if bool((tokens.labels[1:] == IGNORED).all()):
            raise MediaError(ProblemKind.NOTHING_TO_LEARN, path, "no token of the sample is an answer's")
        return Example(sample.id, tokens, JoinedFrames(frames))


class Loader:
    """Endless batches of one rank, epoch after epoch.

    Batch k of rank r holds the samples at fixed places of the order, so the loader's state is one number, the same on all
    ranks. A sample that cannot be used is reported once and its place taken by the next one that can.

    Args:
        samples: what to learn.
        prepare: a sample to an example; raises `MediaError`.
        batch_size: samples of a batch of this rank.
        seed: of the order.
        rank, world: this process and how many there are; each gets other samples.
        on_problem: "skip" reports and goes on, "stop" raises.
        lengths: a rough length of each sample; similar ones then share a batch.
        pad: id of padding tokens.
        multiple: see `collate`.
        workers: threads that prepare ahead; 0 prepares when asked. Decoding runs outside Python's lock.

    Raises:
        ConfigError: no samples, or sizes that make no sense.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        prepare: Callable[[Sample], Example],
        *,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        on_problem: OnProblem = "skip",
        lengths: Sequence[int] | None = None,
        pad: int = 0,
        multiple: int = 1,
        workers: int = 0,
    ) -> None:
        if not samples:
            raise ConfigError("there is no sample to load")
        if min(batch_size, multiple) < 1 or not 0 <= rank < world or workers < 0:
            raise ConfigError(
                f"batch_size={batch_size}, rank={rank} of {world}, multiple={multiple}, workers={workers} make no sense"
            )
        if lengths is not None and len(lengths) != len(samples):
            raise ConfigError(f"{len(samples)} samples need as many lengths, got {len(lengths)}")
        self._samples, self._prepare = samples, prepare
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._on_problem, self._workers = on_problem, workers
        self._collate = partial(collate, pad=pad, multiple=multiple)
        self._lengths = lengths
        self._batches = 0
        self._problems: dict[int, Problem] = {}
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches of every rank see each sample once; the last may reach into the next epoch."""
        return -(-len(self._samples) // (self._batch_size * self._world))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Samples that could not be used so far."""
        return tuple(self._problems.values())

    def report(self) -> str:
        """The problems in words: how many of each kind, and the first of them."""
        if not self._problems:
            return "all samples could be used"
        counts = Counter(problem.kind for problem in self.problems)
        lines = [f"{len(self._problems)} of {len(self._samples)} samples could not be used"]
        for kind, count in counts.most_common():
            first = next(problem for problem in self.problems if problem.kind is kind)
            lines.append(f"  {count} x {kind}, e.g. sample {first.sample}: {first.path}: {first.detail}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, and what it is a position of."""
        return {"batches": self._batches, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            ConfigError: it is of other samples, another seed or other batch sizes.
        """
        identity = self._identity()
        other = {name: (state.get(name), value) for name, value in identity.items() if state.get(name) != value}
        if other:
            shown = "; ".join(f"{name} was {before!r}, is {now!r}" for name, (before, now) in other.items())
            raise ConfigError(f"the loader's state is of another run: {shown}")
        self._batches = int(state["batches"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position on."""
        if not self._workers:
            while True:
                batch = self._collate([self._usable(place) for place in self._places(self._batches)])
                self._batches += 1
                yield batch
        executor = ThreadPoolExecutor(self._workers)
        waiting: deque[list[Future[Example]]] = deque()
        try:
            ahead = self._batches
            while True:
                while len(waiting) * self._batch_size < 2 * self._workers or not waiting:
                    waiting.append([executor.submit(self._usable, place) for place in self._places(ahead)])
                    ahead += 1
                batch = self._collate([future.result() for future in waiting.popleft()])
                self._batches += 1
                yield batch
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ places and samples
    def _places(self, batch: int) -> range:
        """Places in the endless order of a batch of this rank."""
        start = (batch * self._world + self._rank) * self._batch_size
        return range(start, start + self._batch_size)

    def _usable(self, place: int) -> Example:
        """The example at a place, or the next one that can be used."""
        # The rest of an epoch and a part of the next may miss samples: a whole epoch has them all.
        count = len(self._samples)
        whole = -(-place // count) * count
        for later in range(place, whole + count):
            epoch, position = divmod(later, count)
            index = self._order(epoch)[position]
            if index in self._problems:
                continue
            sample = self._samples[index]
            try:
                return self._prepare(sample)
            except MediaError as error:
                if self._on_problem == "stop":
                    error.add_note(f"sample {sample.id}; on_problem='skip' goes on with the next")
                    raise
                self._problems[index] = Problem(sample.id, error.kind, error.path, error.detail, index)
        raise ConfigError(f"no sample can be used: {self.report()}")

    def _make_order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self._samples), generator=generator).tolist()
        if self._lengths is None:
            return order
        # Neighbours in a sorted window share a step; windows are large enough for their batches to stay random.
        step, lengths = self._batch_size * self._world, self._lengths
        grouped: list[int] = []
        for start in range(0, len(order), 50 * step):
            window = sorted(order[start : start + 50 * step], key=lambda index: lengths[index])
            steps = [window[first : first + step] for first in range(0, len(window), step)]
            ragged = [steps.pop()] if len(steps[-1]) < step else []
            shuffled = [steps[index] for index in torch.randperm(len(steps), generator=generator).tolist()]
            grouped.extend(index for each in [*shuffled, *ragged] for index in each)
        return grouped

    @cached_property
    def _digest(self) -> str:
        """Of all that the samples say, so that edited annotations are other data; made once, for millions take seconds."""
        digest = hashlib.sha256()
        for sample in self._samples:
            digest.update(repr(sample).encode(errors="surrogatepass") + b"\0")
        return digest.hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "samples": self._digest,
            "step": self._batch_size * self._world,
            "grouped": self._lengths is not None,
        }
