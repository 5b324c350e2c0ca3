"""Fixed launch configurations of the selective scan's Triton kernels, one per class of devices and state size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SelectiveScanConfig:
    """Tile sizes. Only the state size chooses it, never the length: a recomputed segment must repeat its forward to
    the bit.

    A program is one warp. Triton lays its tile `(rows, d_state, lanes)` out with neighbouring channels on neighbouring
    threads: `lanes` of them, then as many states as threads are left for. The rest lies in registers.
    """

    rows: int
    lanes: int
    """A program of `scan` owns `rows * lanes` channels. With 32 lanes a sum over states stays in the thread."""
    backward_rows: int
    backward_lanes: int
    """Likewise of `scan_backward`, which sums over states and over channels, in turn cheap with many lanes of channels
    and with few. On an H100, 16 lanes of channels and 2 of states were the fastest."""
    tokens: int = 2
    """Tokens whose loads a program of `scan` has in flight together."""
    added_rows: int = 1
    added_tokens: int = 4
    """Likewise, with `lanes`, of `added_states` and `added_gradients`, which have less to hold in registers."""
    chunk: int = 64
    """Tokens in a chunk. States are kept from chunk to chunk, `d_state / chunk` floats per token and channel."""
    block: int = 2
    """Tokens whose states a program of the backward holds in registers at a time."""
    share: int = 8
    """Tiles of channels for which a program of the backward adds up dB and dC before it writes them out."""
    programs: int = 1056
    """Most programs of the backward in a launch: as many as an H100 runs at a time, so that the states which they put
    aside stay in its L2 cache. Any number gives the same bits."""

    @property
    def width(self) -> int:
        """Channels of a group are padded to a multiple of this, whole tiles of every kernel and whole panels of 32."""
        tiles = (self.rows * self.lanes, self.added_rows * self.lanes, self.backward_rows * self.backward_lanes)
        return max(32, *tiles)


def selective_scan_config(
    d_state: int, *, capability: tuple[int, int] | None = None, config: SelectiveScanConfig | None = None
) -> SelectiveScanConfig:
    """The configuration for a state size.

    Args:
        d_state: a power of two up to 256.
        capability: compute capability of the device; None for the interpreter.
        config: take this one, not the shipped one.

    Raises:
        ValueError: a size the kernels do not take, or a `config` they cannot run.
    """
    if d_state not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(
            f"the Triton selective scan takes a d_state that is a power of two up to 256, got {d_state}; "
            "use impl='reference' for others"
        )
    if config is not None:
        _check(config, d_state)
        return config
    shipped = _SHIPPED.get(capability, _default) if capability is not None else _default
    return shipped(d_state)


def _default(d_state: int) -> SelectiveScanConfig:
    # At most 32 states in a thread of the forward, 16 in one of the backward.
    lanes = min(32, 1024 // d_state)
    backward_lanes = max(1, min(16, 256 // d_state))
    return SelectiveScanConfig(
        rows=max(1, min(2, 1024 // (lanes * d_state))),
        lanes=lanes,
        backward_rows=max(1, min(4, 512 // (backward_lanes * d_state))),
        backward_lanes=backward_lanes,
    )


_SHIPPED: dict[tuple[int, int], Callable[[int], SelectiveScanConfig]] = {(9, 0): _default}
"""By compute capability; others get the default."""

_LIMITS = {
    "rows": (1, 32),
    "lanes": (1, 32),
    "backward_rows": (1, 32),
    "backward_lanes": (1, 32),
    "tokens": (1, 8),
    "added_rows": (1, 32),
    "added_tokens": (1, 8),
    "chunk": (8, 256),
    "block": (1, 8),
}
"""Of powers of two: then tokens and blocks divide the chunk, and tiles the panels."""

_MOST_STATES = 4096
"""States that one program may hold: 128 of the 255 registers of each of its 32 threads."""


def _check(config: SelectiveScanConfig, d_state: int) -> None:
    wrong = []
    for name, (low, high) in _LIMITS.items():
        value = getattr(config, name)
        if not (low <= value <= high and value & (value - 1) == 0):
            wrong.append(f"{name} {value} is not a power of two from {low} to {high}")
    for name in ("share", "programs"):
        if not 1 <= getattr(config, name) <= 1 << 16:
            wrong.append(f"{name} {getattr(config, name)} is not from 1 to {1 << 16}")
    held = {
        "rows * lanes": config.rows * config.lanes,
        "added_rows * lanes": config.added_rows * config.lanes,
        "block * backward_rows * backward_lanes": config.block * config.backward_rows * config.backward_lanes,
    }
    for name, channels in held.items():
        if channels * d_state > _MOST_STATES:
            wrong.append(f"{name} * d_state is {channels * d_state}, at most {_MOST_STATES} fit the registers")
    if wrong:
        raise ValueError(f"the selective scan cannot run with this SelectiveScanConfig: {'; '.join(wrong)}")
