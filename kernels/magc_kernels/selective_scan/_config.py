"""Fixed launch configurations of the selective scan's Triton kernels, one per state size."""

from __future__ import annotations

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
        return max(32, self.rows * self.lanes, self.backward_rows * self.backward_lanes)


def selective_scan_config(d_state: int) -> SelectiveScanConfig:
    """The configuration for a state size.

    Raises:
        ValueError: a size the kernels do not take.
    """
    if d_state not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        raise ValueError(
            f"the Triton selective scan takes a d_state that is a power of two up to 256, got {d_state}; "
            "use impl='reference' for others"
        )
    # At most 32 states in a thread of the forward, 16 in one of the backward.
    lanes = min(32, 1024 // d_state)
    backward_lanes = max(1, min(16, 256 // d_state))
    return SelectiveScanConfig(
        rows=max(1, min(2, 1024 // (lanes * d_state))),
        lanes=lanes,
        backward_rows=max(1, min(4, 512 // (backward_lanes * d_state))),
        backward_lanes=backward_lanes,
    )
