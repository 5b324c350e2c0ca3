"""A layer of flash-linear-attention as a layer of the contract.

Its layers carry states through a cache object, and their kernels differentiate both the state that goes in and the one that
comes out. So the layer itself runs, with a cache that holds the state of one layer as a value: it is made for one segment,
hands out the state before it, and takes the state after it without writing into the first.

A segment in which documents begin is cut there, and each piece is a segment to the layer, with a state if its document goes
on from the segment before and with none if it begins: exact for every layer, at the price of a call per document.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from magc.errors import InputError, LayerContractError
from magc.integrations.fla.pieces import cut, joined, rows_joined, rows_of, tokens_of


class FLAState(NamedTuple):
    """What a layer of flash-linear-attention carries from one segment to the next; None where it keeps nothing of a kind."""

    recurrent: Any
    """The memory: tensors, float32."""
    conv: Any
    """Last inputs of its short convolutions, or of its token shift."""
    feed_forward: Any
    """Last input of its MLP's token shift."""


class SegmentCache:
    """Stands in for flash-linear-attention's ``Cache`` during one segment of one layer.

    Args:
        index: the layer's ``layer_idx``.
        state: before the segment; None at the start of the sequence.
        seen: tokens before the segment, a number or a 0-dim tensor; None if unknown.
    """

    def __init__(self, index: int, state: FLAState | None, seen: Tensor | int | None) -> None:
        self.index = index
        self.seen = seen
        names = ("recurrent_state", "conv_state", "ffn_state")
        self.before = None if state is None else dict(zip(names, state, strict=True)) | {"attn_state": None}
        self.after: dict[str, Any] = dict(self.before or dict.fromkeys((*names, "attn_state")))
        self.updated = False

    def __len__(self) -> int:
        """More than the layer's index if there is a state of it."""
        return 0 if self.before is None and not self.updated else self.index + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The layer's state as it is now."""
        return self.after

    def update(
        self, *, layer_idx: int = 0, offset: int | None = 1, cache_kwargs: Any = None, **state: Any
    ) -> dict[str, Any]:
        """Take what the layer hands over; what it leaves out stays."""
        if state.get("attn_state") is not None:
            raise InputError(
                "this layer of flash-linear-attention keeps keys and values, and its cache of them grows; magc takes its "
                "recurrent layers only"
            )
        self.after |= {name: value for name, value in state.items() if value is not None}
        self.updated = True
        return self.after

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Tokens before the segment."""
        if self.before is None:
            return self.seen if isinstance(self.seen, int) else 0
        if self.seen is None:
            raise InputError(
                "this layer of flash-linear-attention has rotary embeddings and must know where a segment is; give the grid "
                "places=, the index of each token in its row and the number of all tokens, (2, length). In packed rows, where "
                "it asks but has no module RotaryEmbedding, set the FLALayer's attribute rotates to True"
            )
        return int(self.seen)

    @property
    def state(self) -> FLAState:
        """After the segment."""
        return FLAState(self.after["recurrent_state"], self.after["conv_state"], self.after["ffn_state"])


class FLALayer(nn.Module):
    """A recurrent layer or block of flash-linear-attention as a layer of the contract, for `GridCheckpoint`.

    Args:
        module: a layer such as ``fla.layers.GatedLinearAttention``, made with a ``layer_idx``, or a block such as
            ``fla.models.gla.modeling_gla.GLABlock``.
        final_norm: applied behind it.
        takes_first: it is a block of RWKV-7, which also takes the first layer's values.
        is_first: it is the first of them.

    Attributes:
        rotates: it asks how many tokens came before a segment; rows of a batch that differ in it run one by one.
    """

    # Its kernels are others without grad mode: for few tokens, or one, which write into their states.
    rounds_by_grad_mode = True

    def __init__(
        self,
        module: nn.Module,
        final_norm: nn.Module | None = None,
        *,
        takes_first: bool = False,
        is_first: bool = False,
    ) -> None:
        super().__init__()
        index: Any = getattr(module, "layer_idx", None)
        if index is None:
            raise InputError(
                f"this {type(module).__name__} was made without layer_idx, and flash-linear-attention then takes no state. Give "
                f"it one, any number that differs from those of the other layers"
            )
        self.index: int = index
        self.module = module
        self.final_norm = final_norm
        self.takes_first = takes_first
        self.is_first = is_first
        self.rotates = any(type(part).__name__ == "RotaryEmbedding" for part in module.modules())

    def forward(
        self,
        x: Any,
        state: FLAState | None = None,
        *,
        places: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Any, FLAState]:
        """Run a segment.

        Args:
            x: `(batch, length, hidden)`; between blocks of RWKV-7 a pair of it and the first layer's values.
            state: of the token before; None at the start of the sequence.
            places: index of each token in its row, and the number of tokens, `(2, length)`; for rotary embeddings.
            positions: in packed rows, index of each token in its document, `(batch or 1, length)` integers: a document
                begins where it is 0. The host waits for them. None: a document begins at most where the sequence does.

        Returns:
            The output, shaped as ``x``, and the state after the segment: that of each row's last document.

        Raises:
            InputError: positions of another shape.
            LayerContractError: the layer hands no state over.
        """
        if positions is None:
            return self._run(x, state, None if places is None else places[0, 0])
        batch, length = (x if isinstance(x, Tensor) else x[0]).shape[:2]
        if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != length:
            raise InputError(
                f"positions must be ({batch} or 1, {length}), the index of each token in its document; got "
                f"{tuple(positions.shape)}"
            )
        groups = cut(positions.expand(batch, length), apart=self.rotates)
        ys: list[Any] = []
        states: list[Any] = []
        for group in groups:
            rows, now = rows_of(x, group.rows, batch), rows_of(state, group.rows, batch)
            parts: list[Any] = []
            for piece in group.pieces:
                y, now = self._run(tokens_of(rows, piece), now if piece.continues else None, piece.seen)
                parts.append(y)
            ys.append(joined(parts, 1))
            states.append(now)
        return rows_joined(ys, groups), rows_joined(states, groups)

    def _run(self, x: Any, state: FLAState | None, seen: Tensor | int | None) -> tuple[Any, FLAState]:
        """Run tokens of one document per row."""
        module: Any = self.module
        cache = SegmentCache(self.index, state, seen)
        more: dict[str, Any] = {}
        hidden = x
        if self.takes_first:
            hidden, first = (x, x.new_zeros(x.shape)) if self.is_first else x
            more = {"v_first": first}
        out: tuple[Any, ...] = module(hidden, past_key_values=cache, use_cache=True, **more)
        # transformers takes the cache away, or (since 5.24) leaves it and has the layer keep parts of its state.
        if not cache.updated or (module.training and getattr(module, "gradient_checkpointing", False)):
            raise LayerContractError(
                f"{type(module).__name__} was given a state and kept it to itself. transformers' own gradient checkpointing "
                f"takes caches from layers: switch it off with model.gradient_checkpointing_disable()"
            )
        y = out[0] if self.final_norm is None else self.final_norm(out[0])
        return (y, out[-1]) if self.takes_first and self.final_norm is None else y, cache.state
