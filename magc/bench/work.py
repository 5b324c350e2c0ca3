"""Cases carried out: a model with random weights, a plan, steps that are metered and timed."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magc.bench.cases import Case, config_of
from magc.bench.choose import make_plan, without_gradients
from magc.bench.peak import MakesSums, Peak, measure_peak, sums_made_by
from magc.bench.result import Result, Status
from magc.checkpoint import GridCheckpoint
from magc.cost import CostModel
from magc.errors import BudgetError, MagcError
from magc.estimate import estimate
from magc.forecast import Forecast
from magc.nn import Mamba2LM
from magc.pinned import PIECE_BYTES, PinnedBlock, PinnedPool
from magc.plan import Plan
from magc.profile import profile
from magc.runners.choice import Runner
from magc.sizes import Head, LastToken

Progress = Callable[[str], None]

_EXAMPLE_TOKENS = {"cpu": 1024, "cuda": 4096}
_WARM_SEGMENTS = 4
_IGNORED = -100
_PINNED_BYTES = 1 << 28
"""Pinning less than this does not matter to a step's time."""
_LEFT_BYTES = 1 << 28
"""Less than this is what libraries keep for themselves."""
_RESERVE = 1.2
"""Steps are expected to take this much longer than they are."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much time a case may take.

    Attributes:
        steps: timed steps at most, the median counts.
        patience: seconds; no further step is timed when those before took more.
        limit: a case whose step is expected to take more seconds is not run.
        disk_dir: for checkpoints on disk; None for the system's temporary folder.
        seconds_left: of the run; a case that is expected to take more is put off.
    """

    steps: int = 3
    patience: float = 10.0
    limit: float = 600.0
    disk_dir: str | None = None
    seconds_left: float = math.inf

    def verdict(self, seconds: float, began: float) -> tuple[Status, str] | None:
        """Why a case is not to be run; None if it is.

        Args:
            seconds: that a step is expected to take.
            began: `time.perf_counter` when ``seconds_left`` held.
        """
        if seconds > self.limit:
            return Status.TOO_SLOW, f"a step is expected to take {seconds:.0f} s, more than {self.limit:.0f} s"
        left = self.seconds_left - (time.perf_counter() - began)
        if _RESERVE * seconds > left:
            return Status.POSTPONED, f"a step is expected to take {seconds:.0f} s, and {max(0, left):.0f} s are left"
        return None


class Grid(GridCheckpoint):
    """Measures costs as its own calls run, and says what it has pinned.

    Args:
        pools: pinned memory that other grids use too, for pinning takes longer than many a case.
        arguments: of the base class, with ``options``.
    """

    def __init__(self, *arguments: Any, pools: dict[torch.device, PinnedPool] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if pools is not None:
            self._pools = pools

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is pinned for checkpoints."""
        return sum(pool.reserved_bytes for pool in self._pools.values())

    def pin(self, nbytes: int) -> None:
        """Pin as much host memory now, so that a step that is timed need not. Call after a first step."""
        for pool in self._pools.values():
            blocks: list[PinnedBlock] = []
            while pool.reserved_bytes < nbytes:
                blocks.append(pool.take(PIECE_BYTES))
            for block in blocks:
                pool.give_back(block)

    @property
    def refusals(self) -> str:
        """Which cells could not be captured, and why."""
        return "; ".join(note for graphs in self._graphs.values() for note in graphs.notes())

    def costs(self, ids: Tensor, targets: Tensor, stem: nn.Module, head: nn.Module) -> CostModel:
        with torch.enable_grad():
            return profile(self._request(ids, None, {}, targets=targets, stem=stem, head=head))


@dataclass(slots=True)
class Prepared:
    """A case that is ready to run.

    Attributes:
        case: what is measured.
        plan: with a forecast.
        model: with its weights; shared by cases.
        grid: the layers under the plan.
        head: the model's, or that of the last token only.
        ids, targets: ``(1, tokens)`` on the device.
        taken: bytes that libraries had allocated for themselves before the case, cuBLAS's workspaces above all.
    """

    case: Case
    plan: Plan
    model: Mamba2LM
    grid: Grid
    head: nn.Module
    ids: Tensor
    targets: Tensor
    taken: int

    @property
    def forecast(self) -> Forecast:
        """The plan's."""
        assert self.plan.forecast is not None
        return self.plan.forecast

    @property
    def predicted_over(self) -> int:
        """Predicted peak over weights and gradient buffers, token ids and what libraries hold included."""
        found = estimate(self.plan, without_gradients(self.forecast.costs), self.case.tokens)
        return found.peak_bytes + self.ids.nbytes + self.targets.nbytes + self.taken

    def run(self, tokens: int | None = None) -> None:
        """Forward and backward of the last ``tokens`` tokens, gradients made afresh; waits for the device."""
        self.model.zero_grad(set_to_none=True)
        start = 0 if tokens is None else self.case.tokens - tokens  # the last token has a target under either head
        loss = self.grid.loss(self.ids[:, start:], self.targets[:, start:], stem=self.model.stem, head=self.head)
        torch.autograd.backward([loss])
        _wait(self.ids.device)

    def part(self, segments: int) -> int | None:
        """Tokens of so many segments, kept cells and those of another length among them; None for all, or no segments."""
        grid = self.plan.grid(len(self.model.layers), self.case.tokens)
        segments += -(-self.plan.kept_cells(grid) // grid.groups)
        if not isinstance(self.plan.tokens, int) or segments >= grid.segments:
            return None
        return self.case.tokens - (grid.segments - segments) * grid.tokens.part_length(0)

    def warm_up(self) -> float:
        """Compile, capture, set up: all but pinning host memory, on as few segments as have cells of every kind.

        Returns:
            Seconds that a step is expected to take, by the prediction, of a plan with segments corrected by a part of one.
        """
        tokens = self.part(_WARM_SEGMENTS)
        # Of a kind of cell that a step has once, a graph is captured in the second step.
        for _ in range(1 if self.case.runner == "eager" else 2):
            self.run(tokens)
        predicted = self.forecast.estimate.seconds
        if tokens is None:
            return predicted
        start = time.perf_counter()
        self.run(tokens)
        took = time.perf_counter() - start
        return took * predicted / estimate(self.plan, self.forecast.costs, tokens).seconds

    def metered(self) -> tuple[Peak, float]:
        """A step's peak, and its seconds, which on the CPU are longer for the meter."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()

        def step(accumulator: MakesSums) -> None:
            with sums_made_by(self.grid, accumulator):
                self.run()

        peak = measure_peak(step, list(self.model.parameters()), (self.ids, self.targets))
        return peak, time.perf_counter() - start

    def timed(self) -> float:
        """A step's seconds."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


class Workbench:
    """Measures cases on one device; keeps the model of the last case, what was measured to plan for it, and pinned memory.

    Args:
        device: where models run, with bf16 weights on a GPU and fp32 on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._name: tuple[str, str] | None = None
        self._model: Mamba2LM | None = None
        self._costs: dict[tuple[Runner, Head], CostModel] = {}
        self._pools: dict[torch.device, PinnedPool] = {}

    def measure(self, case: Case, effort: Effort | None = None, progress: Progress | None = None) -> Result:
        """Measure a case. What a step can fail with is a result: no memory, no plan, an error of magc.

        Args:
            case: what to measure.
            effort: how long it may take.
            progress: told what is being done.
        """
        effort, told = effort or Effort(), progress or _quiet
        try:
            return self._measure(case, effort, told)
        except BudgetError as error:
            found = Result(case=case, status=Status.NO_PLAN, message=str(error))
        except MagcError as error:
            cause = error.__cause__
            full = isinstance(cause, Exception) and is_out_of_memory(cause)  # no more can be pinned
            status = Status.OUT_OF_MEMORY if full else Status.FAILED
            found = Result(case=case, status=status, message=f"{type(error).__name__}: {error}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = Result(case=case, status=Status.OUT_OF_MEMORY, message=str(error).strip().split(". ")[0])
        self._clean()  # here, where the error holds no frame any more
        return found

    def is_clean(self) -> bool:
        """Whether nothing but the model is left on a GPU: what a case that failed took has come back."""
        return self._beside_weights() < _LEFT_BYTES

    def _beside_weights(self) -> int:
        """Bytes allocated on a GPU, less the model's."""
        if self.device.type != "cuda":
            return 0
        weights = 0 if self._model is None else sum(parameter.nbytes for parameter in self._model.parameters())
        return max(0, torch.cuda.memory_allocated(self.device) - weights)

    def _measure(self, case: Case, effort: Effort, progress: Progress) -> Result:
        began = time.perf_counter()
        with self.prepared(case, effort.disk_dir, progress) as step:
            found = step.forecast.estimate
            predicted: dict[str, Any] = {
                "predicted_bytes": step.predicted_over,
                "predicted_gross_bytes": found.peak_bytes + step.ids.nbytes + step.targets.nbytes + step.taken,
                "predicted_seconds": found.seconds,
                "host_bytes": found.host_bytes,
                "disk_bytes": found.disk_bytes,
                "plan": str(step.plan),
            }
            expected = found.seconds
            verdict = effort.verdict(expected, began) if step.part(_WARM_SEGMENTS) is None else None
            if verdict is None:
                progress("warming up")
                expected = step.warm_up()
                verdict = effort.verdict(expected, began)
            if verdict is not None:
                status, message = verdict
                return Result(case=case, status=status, message=message, expected_seconds=expected, **predicted)
            if found.host_bytes:
                progress("pinning host memory")
                step.grid.pin(found.host_bytes)
            progress("metering a step")
            pinned = step.grid.pinned_bytes
            peak, took = step.metered()
            # The meter slows the CPU down, and pinning takes 0.4 s per GiB: such a step's time counts for nothing.
            counts = self.device.type == "cuda" and step.grid.pinned_bytes - pinned < _PINNED_BYTES
            seconds = [took] if counts else []
            while not seconds or (
                len(seconds) < effort.steps
                and sum(seconds) < effort.patience
                and effort.verdict(seconds[-1], began) is None
            ):
                progress(f"timing step {len(seconds) + 1}")
                seconds.append(step.timed())
            return Result(
                case=case,
                status=Status.OK,
                message=step.grid.refusals,
                peak_bytes=peak.over_gradients,
                gross_bytes=peak.with_gradients,
                gradient_bytes=peak.gradients,
                delivered_bytes=peak.delivered,
                seconds=tuple(seconds),
                pinned_bytes=step.grid.pinned_bytes,
                **predicted,
            )

    @contextmanager
    def prepared(
        self, case: Case, disk_dir: str | None = None, progress: Progress | None = None
    ) -> Generator[Prepared]:
        """A case ready to run; graphs, pinned memory and gradients are let go in the end.

        Args:
            case: what to prepare.
            disk_dir: for checkpoints on disk.
            progress: told what is being done.

        Raises:
            BudgetError: no plan fits; says what would be needed.
        """
        told = progress or _quiet
        self._clean()
        told("making the model")
        model = self._model_of(case)
        head = model.head if case.head == "full" else LastToken(model.head)
        told("planning")
        costs = self._costs_of(case, model, head)
        self._clean()
        taken = self._beside_weights()
        plan = make_plan(case, costs, model.config, taken)
        grid = Grid(model.layers, plan, runner=case.runner, disk_dir=disk_dir, pools=self._pools)
        try:
            yield Prepared(case, plan, model, grid, head, *_batch(case, model.config.vocab_size, self.device), taken)
        finally:
            model.zero_grad(set_to_none=True)
            grid.release_graphs()
            del grid
            self._clean()

    def _model_of(self, case: Case) -> Mamba2LM:
        if self._name != (case.model, case.keep) or self._model is None:
            self._name, self._model = None, None
            self._costs.clear()
            self._clean()
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            random: Any = torch.random  # partly untyped
            with random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                random.manual_seed(0)
                self._model = Mamba2LM(config_of(case.model), keep=case.keep, device=self.device, dtype=dtype)
            self._name = case.model, case.keep
        return self._model

    def _costs_of(self, case: Case, model: Mamba2LM, head: nn.Module) -> CostModel:
        key = (case.runner, case.head)
        if key not in self._costs:
            # Longer than any case of its own: the same costs whichever case comes first.
            ids, targets = _tokens(_EXAMPLE_TOKENS[self.device.type], case.head, model.config.vocab_size, self.device)
            grid = Grid(model.layers, Plan.none(), runner=case.runner)
            self._costs[key] = grid.costs(ids, targets, model.stem, head)
            grid.release_graphs()
        return self._costs[key]

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory left; for the host, torch has no error of its own."""
    text = str(error).lower()
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    )


def _quiet(what: str) -> None:
    del what


def _batch(case: Case, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _tokens(case.tokens, case.head, vocabulary, device)


def _tokens(count: int, head: Head, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and targets, ``(1, count)``; under the head of the last token no other has a target."""
    drawn = torch.randint(vocabulary, (1, count + 1), generator=torch.Generator().manual_seed(0))
    ids, targets = drawn[:, :-1].clone(), drawn[:, 1:].clone()
    if head == "last":
        targets[:, :-1] = _IGNORED
    return ids.to(device), targets.to(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
