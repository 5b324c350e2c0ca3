"""Causal self-attention over segments: the state holds the keys and values of the tokens before.

Exact: gradients flow to earlier keys and values through the state. A layer's state keeps its shape from segment to
segment, so the state has room for the keys and values of the whole sequence from the start, and so has every copy that is
kept at a segment boundary. Host memory for states, or few `Plan.snapshots`, keeps that small on the device. With a sliding
window the state holds a window and no more.

Shape letters: B batch, L tokens of the segment, T tokens of the sequence, H heads, K heads of keys and values, P head size,
W tokens of the state: T, or one less than the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import bias as causal

from magc.errors import InputError
from magc.integrations.transformers.mixers import project
from magc.integrations.transformers.tokens import Tokens

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class KVState(NamedTuple):
    """What an attention layer carries from one segment to the next."""

    keys: Tensor
    """Keys `(batch, W, heads, head size)`: of the tokens so far with room for the rest, or of a window's last tokens."""
    values: Tensor
    """Values, likewise."""
    marks: Tensor | None
    """`(batch, W)` int32: the document of each token, 1 where rows are padded only, and 0 for padding and for no token yet;
    None without padding and packing."""


class Attention(NamedTuple):
    """How queries, keys and values are combined; the rest of what an attention layer is."""

    scale: float
    dropout: float = 0.0
    window: int | None = None
    """Tokens that one attends to, itself included; None: all before it."""


def segment_heads(projected_BLE: Tensor, head_dim: int) -> Tensor:
    """`(batch, length, heads * head size)` to `(batch, heads, length, head size)`."""
    return projected_BLE.view(*projected_BLE.shape[:2], -1, head_dim).transpose(1, 2)


def attend_module(
    attention: Any,
    rotary: nn.Module | None,
    rotate: Rotate | None,
    x_BLD: Tensor,
    state: KVState | None,
    tokens: Tokens,
    *,
    key_scale: float = 1.0,
) -> tuple[Tensor, KVState]:
    """Self-attention of a segment to itself and everything before it, by transformers' usual kind of module.

    Args:
        attention: the module with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        rotary: `(x, positions)` to the cosines and sines of rotary embeddings; None: without.
        rotate: applies them to queries and keys `(batch, heads, length, head size)`.
        x_BLD: `(batch, length, hidden)`.
        state: of the token before; None at the start of the sequence.
        tokens: with places and positions.
        key_scale: multiplies keys.

    Returns:
        The output, shaped as ``x_BLD``, and the state after the segment.
    """

    def heads(projection: nn.Module) -> Tensor:
        return segment_heads(project(projection, x_BLD), attention.head_dim)

    q_BHLP, k_BKLP, v_BKLP = heads(attention.q_proj), heads(attention.k_proj) * key_scale, heads(attention.v_proj)
    if rotary is not None and rotate is not None:
        q_BHLP, k_BKLP = rotate(q_BHLP, k_BKLP, *rotary(x_BLD, tokens.positions))
    y_BLE, new_state = attend(q_BHLP, k_BKLP, v_BKLP, state, tokens, options_of(attention))
    return project(attention.o_proj, y_BLE), new_state


def options_of(attention: Any) -> Attention:
    """The options of an attention module of transformers."""
    return Attention(attention.scaling, attention.attention_dropout if attention.training else 0.0)


def attend(
    q_BHLP: Tensor, k_BKLP: Tensor, v_BKLP: Tensor, state: KVState | None, tokens: Tokens, options: Attention
) -> tuple[Tensor, KVState]:
    """Attention of a segment's queries to its own and all earlier keys.

    Args:
        q_BHLP: queries; heads of keys and values serve several of them.
        k_BKLP: keys of the segment.
        v_BKLP: values of the segment.
        state: of the token before; None at the start of the sequence.
        tokens: with places.
        options: of the layer.

    Returns:
        `(batch, length, heads * head size)` and the state after the segment.
    """
    places_2L = cast(Tensor, tokens.places)
    start, total = int(places_2L[0, 0]), int(places_2L[1, 0])
    k_BLKP, v_BLKP, marks_BL = k_BKLP.transpose(1, 2), v_BKLP.transpose(1, 2), _marks(tokens)
    room = total if options.window is None else options.window - 1
    if state is None:
        marks = None if marks_BL is None else _room(marks_BL, room)
        state = KVState(_room(k_BLKP, room), _room(v_BLKP, room), marks)
    keys, seen_keys = _joined(state.keys, k_BLKP, start, options)
    values, seen_values = _joined(state.values, v_BLKP, start, options)
    marks = seen_marks = None
    if state.marks is not None and marks_BL is not None:
        marks, seen_marks = _joined(state.marks, marks_BL, start, options)
    # Index in the row of the first token that is seen; negative if the state has room for tokens before the row.
    first = 0 if options.window is None else start - room
    if tokens.documents is not None and options.window is None:
        first = int(tokens.documents.min()) - 1  # no one looks at earlier documents
        seen_keys, seen_values = seen_keys[:, first:], seen_values[:, first:]
        seen_marks = None if seen_marks is None else seen_marks[:, first:]
    bias = _bias(places_2L[0], first, start + q_BHLP.shape[2], tokens, seen_marks, options.window)
    y_BHLP = functional.scaled_dot_product_attention(
        q_BHLP,
        seen_keys.transpose(1, 2),
        seen_values.transpose(1, 2),
        attn_mask=bias,
        dropout_p=options.dropout,
        is_causal=bias is None,
        scale=options.scale,
        enable_gqa=q_BHLP.shape[1] != k_BKLP.shape[1],
    )
    return y_BHLP.transpose(1, 2).flatten(-2), KVState(keys, values, marks)


def _joined(kept: Tensor, part: Tensor, start: int, options: Attention) -> tuple[Tensor, Tensor]:
    """A part of the state after a segment, a new tensor since states are values, and what the segment sees of it."""
    length = part.shape[1]
    if options.window is not None:
        seen = torch.cat([kept, part.to(kept.dtype)], dim=1)
        return seen[:, length:], seen
    whole = torch.cat([kept[:, :start], part.to(kept.dtype), kept[:, start + length :]], dim=1)
    return whole, whole[:, : start + length]


def require_rotary(rotary: Any) -> None:
    """Refuse rotary embeddings whose frequencies depend on how long the sequence is: a segment does not know that.

    Raises:
        InputError: naming the kind.
    """
    kind = getattr(rotary, "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        raise InputError(
            f"rotary embeddings of the kind {kind!r} depend on the longest position in a call, so segments would differ from "
            f"the whole. Use a fixed kind ('default', 'linear', 'yarn', 'llama3'), or leave the model unwrapped"
        )


def _marks(tokens: Tokens) -> Tensor | None:
    """`KVState.marks` of a segment."""
    if tokens.documents is not None:
        return tokens.documents
    return None if tokens.mask is None else tokens.mask.to(torch.int32)


def _bias(index_L: Tensor, first: int, stop: int, tokens: Tokens, marks_BW: Tensor | None, window: int | None) -> Any:
    """What a segment's tokens may attend to of those from ``first`` to ``stop``; None: what comes before each."""
    length = index_L.shape[0]
    if marks_BW is None and first == stop - length:
        return None if window is None else _causal(index_L, first, stop, window)
    if marks_BW is None and window is None and index_L.is_cuda:
        # torch's fused kernels know this shape without a mask. (Elsewhere it is a mask, and refused in dispatch modes.)
        return cast(Any, causal).causal_lower_right(length, stop - first)
    past_LW = _causal(index_L, first, stop, window)
    if marks_BW is None:
        return past_LW
    seen_BLW = marks_BW[:, None] != 0
    if tokens.documents is not None:
        seen_BLW = marks_BW[:, None] == tokens.documents[:, :, None]
    return (past_LW & seen_BLW)[:, None]


def _causal(index_L: Tensor, first: int, stop: int, window: int | None) -> Tensor:
    others_W = torch.arange(first, stop, device=index_L.device)
    behind_LW = index_L[:, None] - others_W
    past_LW = (behind_LW >= 0) & (others_W >= 0)
    return past_LW if window is None else past_LW & (behind_LW < window)


def _room(part: Tensor, tokens: int) -> Tensor:
    """Zeros for so many tokens like those of ``part``, in memory of one element."""
    return part.new_zeros(()).expand(part.shape[0], tokens, *part.shape[2:])
