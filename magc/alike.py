"""Which stages of a stack cost the same, so that few need to be measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from magc.stack import Stack, Stage


@dataclass(frozen=True, slots=True)
class Chosen:
    """The stages to measure, and for every stage of the stack which measurements stand for it.

    Attributes:
        picked: stages to measure, in order.
        own: for every stage, the index into ``picked`` of its own numbers.
        passed: the same for what the next stage keeps of its output.
    """

    picked: list[Stage]
    own: list[int]
    passed: list[int]

    @classmethod
    def of(cls, stack: Stack) -> Chosen:
        chosen = cls([], [], [])
        stages = stack.stages
        start = 0
        while start < len(stages):
            stop = start + 1
            while stop < len(stages) and _signature(stages[stop]) == _signature(stages[start]):
                stop += 1
            first = len(chosen.picked)
            chosen.picked.extend(stages[start : min(stop, start + 2)])
            last = len(chosen.picked) - 1
            chosen.own.extend([first] + [last] * (stop - start - 1))
            chosen.passed.extend([first] * (stop - start - 1) + [last])
            start = stop
        return chosen


_NAMES_OF_POSITION = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number"})


def _signature(stage: Stage) -> object:
    """Equal for stages that cost the same: class, settings, parameter shapes and mode of every module in it."""
    if not isinstance(stage.call, nn.Module):
        return id(stage.call)
    return (
        stage.kind,
        repr(stage.call),
        tuple((tuple(param.shape), param.dtype, param.requires_grad) for param in stage.call.parameters()),
        tuple(
            (
                type(module),
                tuple(
                    (name, value)
                    for name, value in sorted(vars(module).items())
                    if isinstance(value, int | float | str | bool) and name not in _NAMES_OF_POSITION
                ),
            )
            for module in stage.call.modules()
        ),
    )
