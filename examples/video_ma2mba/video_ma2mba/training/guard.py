"""Watches the loss: a run that goes wrong stops before it overwrites what was good."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from video_ma2mba.errors import VideoMa2mbaError
from video_ma2mba.training.config import GuardConfig


class TrainingStoppedError(VideoMa2mbaError):
    """The loss is not finite, or stays far above what it was; weights are those before the step it names."""


class Guard:
    """Tells steps that go well from those that do not.

    Args:
        config: what counts as going wrong.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._spikes = 0

    @property
    def calm(self) -> bool:
        """Whether the last step was no spike; only then is a checkpoint worth keeping."""
        return self._spikes == 0

    @property
    def recent(self) -> tuple[float, ...]:
        """The last losses that were no spikes."""
        return tuple(self._losses)

    def trouble(self, loss: float, norm: float) -> str | None:
        """Why the run should stop before this step's update, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss:g}, the gradient's norm {norm:g}"
        if not self._is_spike(loss):
            self._spikes = 0
            self._losses.append(loss)
            return None
        self._spikes += 1
        if self._spikes < self._config.patience:
            return None
        return (
            f"the loss is {loss:.4g}, for the {self._spikes}. time in a row more than {self._config.spike:g} times the "
            f"median {median(self._losses):.4g} of the last {len(self._losses)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"losses": list(self._losses), "spikes": self._spikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what another one did."""
        self._losses = deque(state["losses"], maxlen=self._config.window)
        self._spikes = int(state["spikes"])

    def _is_spike(self, loss: float) -> bool:
        """Judged once half the window is known: the first losses of a run fall fast."""
        if self._config.spike is None or len(self._losses) < self._config.window / 2:
            return False
        return loss > self._config.spike * median(self._losses)
