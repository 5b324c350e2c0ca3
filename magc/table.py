"""All plans that the planner considers, costed at once.

A base plan is a cell size, the tiers of borders and states, and a number of snapshots; its peak and time are linear in
the number of trailing columns kept, so the most columns that fit follow from the budget directly. Bases of which only
some cells of the last column are kept fill the step from one cell to a column. The list of bases
does not depend on the budget. Peaks here are upper bounds of ``magc.estimate`` (a column's ragged end counts as whole,
what is let go while a column is worked on counts to its end); seconds are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from magc import revolve
from magc.cost import CellCost, CostModel
from magc.grid import make_axis
from magc.plan import ALL, REBUILD, Plan
from magc.simulate import copies_block
from magc.tiers import Tier

_SHORTEST = 16
_ROUNDING = 16  # bytes by which sums over segments and numbers per token may differ
_MOST_SEGMENTS = 1 << 16
_SNAPSHOTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Floats = NDArray[np.float64]
Border = Tier | Literal["rebuild"]


@dataclass(frozen=True, slots=True)
class _Row:
    """Sums over the groups of one cell size. Bytes and seconds of one whole column unless said otherwise."""

    segments: float
    states_all: float
    states_trained: float
    borders: float
    border: float  # the largest
    tape: float
    top_tape: float
    run_work: float
    run_work_stored: float  # with the column's borders stored on the device
    record_work: float
    keep_work: float
    top_work: float
    alone_work: float  # a single column, borders stored on the device
    alone_work_away: float  # a single column, borders elsewhere
    grads: float
    output: float  # whole sequence
    input_grad: float  # whole sequence
    state: float  # the largest of a group's
    run_forward: float  # seconds of a run column
    run_backward: float
    keep_seconds: float
    last_keep_seconds: float
    last_forward: float  # the last column when only its last cells are kept
    last_backward: float
    again_seconds: float  # all groups run once more
    rebuild_seconds: float
    last_rebuild_seconds: float
    groups: float
    top: float  # how many cells of the last column are kept if no column is
    captured: float
    apart: float  # a kept column whose captured cells have memory of their own
    top_apart: float  # the same of the cells of ``top`` but the first


class PlanTable:
    """Costs of all candidate plans for one stack and sequence length.

    Args:
        costs: of the stack.
        seq_len: tokens.
        lowest_layer: the lowest layer that needs a gradient.
        host: whether checkpoints may go to host memory.
        disk: whether they may go to disk.
    """

    def __init__(self, costs: CostModel, seq_len: int, lowest_layer: int, *, host: bool, disk: bool) -> None:
        self._costs, self._seq_len = costs, seq_len
        self._sizes = [
            (layers, tokens, top)
            for tokens in token_sizes(seq_len)
            for layers in layer_sizes(costs.n_layers)
            for top in top_cells(costs.n_layers, layers)
        ]
        rows = [_row(costs, seq_len, lowest_layer, layers, tokens, top) for layers, tokens, top in self._sizes]
        self._rows: dict[str, Floats] = {
            field.name: np.array([getattr(row, field.name) for row in rows])[:, None, None] for field in fields(_Row)
        }
        offload = ([Tier.HOST] if host and not costs.host_is_device else []) + ([Tier.DISK] if disk else [])
        self._places = list(_placements(offload))
        self._snapshots: tuple[int | None, ...] = (None, *_SNAPSHOTS)
        self._cost()

    # ------------------------------------------------------------------ costs
    def _cost(self) -> None:
        row = self._rows
        segments = row["segments"]

        def flag(test: list[bool]) -> Floats:
            return np.array(test, dtype=np.float64)[None, :, None]

        states_on = {tier: flag([states is tier for states, _ in self._places]) for tier in Tier}
        borders_on = {tier: flag([borders is tier for _, borders in self._places]) for tier in Tier}
        rebuild = flag([borders == REBUILD for _, borders in self._places])
        counts = np.array([math.inf if count is None else count for count in self._snapshots])[None, None, :]
        some = np.isfinite(counts)
        states = np.where(rebuild > 0, row["states_all"], row["states_trained"])
        # Boundaries that hold states when nothing but the last cell is kept, and how many fewer each kept column means.
        held = np.where(some, np.minimum(counts + 2, segments), segments - 1)
        fewer = np.where(some, 0.0, 1.0)
        self._stored = {
            tier: states_on[tier] * states * held + borders_on[tier] * row["borders"] * segments for tier in Tier
        }
        self._less = {tier: states_on[tier] * states * fewer + borders_on[tier] * row["borders"] for tier in Tier}
        stored, self._slope = self._stored[Tier.DEVICE], self._less[Tier.DEVICE]
        single = segments == 1
        output = np.where(single, 0.0, row["output"])
        input_grad = row["input_grad"]
        run_work = np.where(borders_on[Tier.DEVICE] > 0, row["run_work_stored"], row["run_work"])
        # To spare, as in the estimate: a chain with snapshots may be advancing with states in hand.
        stored = stored + np.where(some, row["states_all"], 0.0)
        run = stored + output + 2 * row["states_all"] + run_work
        # Final states, gradients of states, and where a segment runs again the states it passes on.
        live = row["states_all"] * (2 + np.where(some | (rebuild > 0), 1.0, 0.0)) + rebuild * row["borders"]
        reruns = some | (rebuild > 0)
        work = row["record_work"] + row["border"]
        work = np.maximum(work, np.where(reruns, run_work + row["states_all"], 0.0))
        # What the next cell needs may be on its way back already.
        away = {
            tier for tier in Tier if tier is not Tier.DEVICE and not (tier is Tier.HOST and self._costs.host_is_device)
        }
        arriving = sum(
            (states_on[tier] * row["state"] + borders_on[tier] * row["border"] for tier in away),
            start=np.zeros_like(stored),
        )
        again = stored + output + input_grad + row["grads"] + live + work + arriving
        alone = np.where(borders_on[Tier.DEVICE] > 0, row["alone_work"], row["alone_work_away"])
        alone = alone + row["output"] + input_grad + row["states_all"] + arriving
        top = stored + output + 2 * row["states_all"] + row["border"] + row["top_tape"] + row["top_work"] + arriving
        self._recompute = np.where(single, np.maximum(run, alone), np.maximum(run, again)) + row["captured"]
        self._least = np.maximum(self._recompute, top + row["captured"]) + row["top_apart"]
        everything = np.where(single, row["output"], output) + input_grad
        self._keep = stored + everything + 2 * row["states_all"] + row["keep_work"] + arriving + row["captured"]
        self._tape = row["tape"]
        if self._costs.captured:
            # Each kept cell has memory of its own, which is there in the recompute of the others too.
            self._keep = np.maximum(self._keep - row["keep_work"], self._least) + row["states_all"]
            self._tape = row["apart"]
        self._time(states_on, borders_on, rebuild, counts, some)

    def _time(
        self,
        states_on: dict[Tier, Floats],
        borders_on: dict[Tier, Floats],
        rebuild: Floats,
        counts: Floats,
        some: Any,
    ) -> None:
        row = self._rows
        segments = row["segments"]
        bandwidth = {Tier.HOST: self._costs.bandwidths.host, Tier.DISK: self._costs.bandwidths.disk}
        # Checkpoints away from the device are all on one tier, so one copy of a column follows another.
        copies = np.zeros_like(self._keep)
        blocking = np.zeros_like(self._keep)
        snapshot_copies = np.zeros_like(self._keep)
        states = np.where(rebuild > 0, row["states_all"], row["states_trained"])
        for tier, speed in bandwidth.items():
            if tier is Tier.HOST and self._costs.host_is_device:
                continue
            column = np.where(some | (segments == 1), 0.0, states_on[tier] * states) + borders_on[tier] * row["borders"]
            column = column / speed
            copies = copies + column
            blocking = blocking + (column if copies_block(tier, self._costs) else 0.0)
            snapshot_copies = snapshot_copies + 2 / speed * states_on[tier] * states
        steps = np.broadcast_to(segments - (row["groups"] == 1), self._keep.shape)
        again = np.zeros_like(self._keep)
        for index, count in enumerate(self._snapshots):
            if count is not None:
                again[:, :, index] = [
                    [
                        revolve.optimal_advances(int(step), count) - (int(step) - 1) if step >= 1 else 0.0
                        for step in line
                    ]
                    for line in steps[:, :1, index]
                ]
        usable = (segments > 2) & (counts < segments - 3)
        self._usable = np.where(some, usable, True) & ((row["segments"] > 1) | (rebuild == 0))
        group_share = (row["groups"] - 1) / row["groups"]
        last_share = (row["groups"] - row["top"]) / row["groups"]
        twice = 1 + rebuild * group_share

        def seconds(forward: Floats, backward: Floats, share: Floats | float) -> Floats:
            there = np.maximum(forward + blocking * share, copies * share)
            return there + np.maximum(backward, copies * share * twice)

        self._run_seconds = seconds(row["run_forward"], row["run_backward"] + rebuild * row["rebuild_seconds"], 1.0)
        last = seconds(row["last_forward"], row["last_backward"] + rebuild * row["last_rebuild_seconds"], last_share)
        self._least_seconds = self._run_seconds * (segments - 1) + last + again * row["again_seconds"]
        every = np.maximum(1.0, steps // np.maximum(1.0, np.where(some, counts, 1.0)))
        self._least_seconds = self._least_seconds + np.where(
            some, snapshot_copies * (again / every + np.where(some, counts, 0.0)), 0.0
        )

    # ------------------------------------------------------------------ choices
    def best(self, device: float, host: float) -> Iterator[Plan]:
        """Plans that fit ``device`` and ``host`` bytes, fastest first, one for each base."""
        row = self._rows
        segments = row["segments"]
        growth = self._tape - self._slope
        room = device - self._keep
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.floor(np.where(growth > 0, room / growth, np.where(room >= 0, np.inf, -1.0)))
        most = np.minimum(most, np.broadcast_to(segments, most.shape))
        partly = (most < segments) & (self._recompute - self._slope * most > device)
        kept = np.where((most >= 1) & ~partly & np.isnan(self._counts()) & (row["top"] == 1), most, 0.0)
        host_fits = self._stored[Tier.HOST] - self._less[Tier.HOST] * kept <= host
        feasible = self._usable & host_fits & ((kept > 0) | (self._least <= device))
        rest = segments - kept
        seconds = np.where(
            kept > 0,
            self._run_seconds * rest + row["keep_seconds"] * (kept - 1) + row["last_keep_seconds"],
            self._least_seconds,
        )
        peak = np.where(kept > 0, self._keep + growth * kept, self._least)
        flat = np.flatnonzero(feasible)
        order = flat[np.lexsort((flat, peak.ravel()[flat], seconds.ravel()[flat]))]
        for index in order:
            yield self._plan(int(index), float(kept.ravel()[index]))

    def smallest(self, host: float) -> tuple[Plan, float]:
        """The plan with the least peak within ``host`` bytes, and that peak."""
        peak = np.where(self._usable & (self._stored[Tier.HOST] <= host), self._least, np.inf)
        index = int(np.argmin(peak))
        return self._plan(index, 0.0), float(peak.ravel()[index])

    def _counts(self) -> Floats:
        return np.array([math.nan if count is None else count for count in self._snapshots])[None, None, :]

    def _plan(self, index: int, kept: float) -> Plan:
        size, place, snapshots = np.unravel_index(index, self._keep.shape)
        layers, tokens, top = self._sizes[int(size)]
        states, borders = self._places[int(place)]
        segments, groups = (int(self._rows[name][size, 0, 0]) for name in ("segments", "groups"))
        keep: int | Literal["all"] = top if kept == 0 else ALL if kept >= segments else int(kept) * groups
        return Plan(
            layers=layers,
            tokens=tokens,
            borders=borders,
            states=states,
            keep=keep,
            snapshots=self._snapshots[int(snapshots)],
        )


def layer_sizes(n_layers: int) -> list[int]:
    """Layers per group to consider: all, halves of halves, and about the square root."""
    sizes = {1, max(1, round(math.sqrt(n_layers)))}
    size = n_layers
    while size > 1:
        sizes.add(size)
        size = -(-size // 2)
    return sorted(sizes)


def top_cells(n_layers: int, layers: int) -> list[int]:
    """How many cells of the last column to consider keeping: one, and about the quarters of a column."""
    groups = -(-n_layers // layers)
    return sorted({1, *(part for part in (groups // 4, groups // 2, 3 * groups // 4, groups - 1) if part > 1)})


def token_sizes(seq_len: int) -> list[int]:
    """Tokens per segment to consider: powers of two, and the whole sequence."""
    least = max(1, min(_SHORTEST, seq_len // 4), seq_len // _MOST_SEGMENTS)
    return sorted({size for size in (1 << power for power in range(40)) if least <= size < seq_len} | {seq_len})


def _placements(offload: list[Tier]) -> Iterator[tuple[Tier, Border]]:
    for states in (Tier.DEVICE, *offload):
        borders: list[Border] = [
            Tier.DEVICE,
            REBUILD,
            *((tier for tier in offload) if states is Tier.DEVICE else (states,)),
        ]
        for border in borders:
            yield states, border


def _row(costs: CostModel, seq_len: int, lowest_layer: int, layers: int, tokens: int, top: int) -> _Row:
    axis = make_axis("layers", costs.n_layers, layers)
    bounds = list(axis.all_bounds())
    segments = -(-seq_len // tokens)
    tail = seq_len - (segments - 1) * tokens
    lowest = next(group for group, (_, stop) in enumerate(bounds) if stop > lowest_layer)
    cells = [costs.cell(start, stop, tokens) for start, stop in bounds]
    last = cells if tail == tokens else [costs.cell(start, stop, tail) for start, stop in bounds]

    def column(name: str) -> Floats:
        return np.array([getattr(cell, name) for cell in cells], dtype=np.float64)

    inputs, states, tape = column("input_bytes"), column("state_bytes"), column("tape_bytes")
    run_peak, record_peak, backward = column("run_peak"), column("record_peak"), column("backward_peak")
    single = segments == 1
    first_backward = column("first_backward_peak_single" if single else "first_backward_peak")
    grads = column("grad_bytes_single" if single else "grad_bytes")
    grads[:lowest] = 0
    borders = inputs.copy()
    borders[: max(1, lowest)] = 0
    trained = slice(lowest, None)
    above = np.append(inputs[1:], 0.0)  # gradient of the next group's input

    def sum_above(values: Floats) -> Floats:
        return np.cumsum(values[::-1])[::-1] - values

    # Frozen groups are never kept.
    top = min(top, len(cells) - lowest)
    apart = np.array([costs.apart_bytes(cell) if costs.captured else 0 for cell in cells], dtype=np.float64)
    record_or_backward = np.maximum(tape + backward, record_peak)
    first = np.maximum(tape + first_backward, record_peak) + sum_above(grads) + above + states
    unkeep = first_backward + sum_above(grads) + above - sum_above(tape - 2 * states)
    # The column before: one less is kept, all accumulators are there.
    freed = sum_above(tape - 2 * states)
    unkeep_next = grads.sum() + (backward + above - freed)[trained].max() - tape[trained].sum() + states.sum()
    # Frozen groups below run in every column, the last too, when all but its own cells are kept already.
    frozen = (run_peak + inputs)[:lowest].max() + states.sum() - tape[trained].sum() if lowest else 0.0
    keep_record = record_peak - tape - sum_above(tape)
    top_tape = tape[-top:].sum() + inputs[-top]
    top_work = max(unkeep[-top:].max(), keep_record[-top:].max())
    if costs.captured:
        # The first of them is where every cell is; the others have memory of their own.
        top_tape = tape[-top] + inputs[-top]
        top_work = max((first_backward + sum_above(grads) + above)[-top:].max(), record_peak[-top] - tape[-top])
    return _Row(
        segments=segments,
        states_all=states.sum(),
        states_trained=states[trained].sum(),
        borders=borders.sum(),
        border=float(inputs.max()),
        tape=tape[trained].sum() + inputs[lowest],
        top_tape=top_tape,
        run_work=(run_peak + inputs).max(),
        run_work_stored=(run_peak + np.where(borders > 0, 0.0, inputs)).max(),
        record_work=(inputs + states + record_or_backward)[trained].max(),
        keep_work=max(unkeep[trained].max(), keep_record[trained].max(), unkeep_next if segments > 1 else 0.0, frozen),
        top_work=top_work,
        alone_work=(first + np.cumsum(borders) + np.where(borders > 0, 0.0, inputs))[trained].max(),
        alone_work_away=(first + inputs)[trained].max(),
        grads=grads.sum(),
        output=0.0 if costs.head is not None else math.ceil(cells[-1].output_bytes / tokens * seq_len) + _ROUNDING,
        input_grad=costs.input_bytes_per_token * seq_len if costs.needs_input_grad else 0.0,
        state=float(states.max()),
        run_forward=_forward_seconds(cells, lowest, len(cells)),
        run_backward=_backward_seconds(cells, lowest, len(cells)),
        keep_seconds=_forward_seconds(cells, lowest, 0) + _backward_seconds(cells, lowest, 0),
        last_keep_seconds=_forward_seconds(last, lowest, 0) + _backward_seconds(last, lowest, 0),
        last_forward=_forward_seconds(last, lowest, len(cells) - top),
        last_backward=_backward_seconds(last, lowest, len(cells) - top),
        again_seconds=sum(cell.run_seconds for cell in cells[lowest:]),
        rebuild_seconds=sum(cell.run_seconds for cell in cells[:-1]),
        last_rebuild_seconds=sum(cell.run_seconds for cell in last[: -top - 1]) if len(cells) - top > lowest else 0.0,
        groups=len(cells),
        top=top,
        captured=costs.captured_bytes((cells,) if tail == tokens else (cells, last)),
        apart=apart[trained].sum(),
        top_apart=apart[len(cells) - top + 1 :].sum(),
    )


def _forward_seconds(cells: list[CellCost], lowest: int, kept_from: int) -> float:
    """First pass over a column whose groups from ``kept_from`` on are kept."""
    keep = max(kept_from, lowest)
    return sum(cell.run_seconds for cell in cells[:keep]) + sum(cell.record_seconds for cell in cells[keep:])


def _backward_seconds(cells: list[CellCost], lowest: int, kept_from: int) -> float:
    """Records of the groups that were not kept, and backwards, of a column."""
    keep = max(kept_from, lowest)
    again = sum(cell.record_seconds for cell in cells[lowest:keep])
    return again + sum(cell.backward_seconds for cell in cells[lowest:])
