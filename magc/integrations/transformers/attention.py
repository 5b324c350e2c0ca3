"""Causal self-attention over segments: the state holds the keys and values of the tokens before.

Exact: gradients flow to earlier keys and values through the state. A layer's state keeps its shape from segment to
segment, so the state has room for the keys and values of the whole sequence from the start, and so has every copy that is
kept at a segment boundary. Host memory for states, or few `Plan.snapshots`, keeps that small on the device.

Shape letters: B batch, L tokens of the segment, T tokens of the sequence, H heads, K heads of keys and values, P head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import bias as causal

from magc.integrations.transformers.mixers import project

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class KVState(NamedTuple):
    """What an attention layer carries from one segment to the next."""

    keys: Tensor
    """Keys of the tokens so far and room for the rest, `(batch, tokens of the sequence, heads, head size)`."""
    values: Tensor
    """Values of the tokens so far, likewise."""
    live: Tensor | None
    """Which tokens so far are not padding, `(batch, tokens of the sequence)`; None if none is."""


def places_of(inputs: Tensor) -> Tensor:
    """The side input that tells every segment where it is, from ids or embeddings `(batch, tokens, ...)`.

    Returns:
        `(2, tokens)`: each token's position, and the number of all.
    """
    positions = torch.arange(inputs.shape[1], device=inputs.device)
    return torch.stack([positions, torch.full_like(positions, inputs.shape[1])])


def attend(
    attention: Any,
    rotary: nn.Module,
    rotate: Rotate,
    x_BLD: Tensor,
    state: KVState | None,
    mask_BL: Tensor | None,
    places_2L: Tensor,
) -> tuple[Tensor, KVState]:
    """Self-attention of a segment to itself and everything before it.

    Args:
        attention: the module with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.
        rotary: `(x, positions)` to the cosines and sines of rotary embeddings.
        rotate: applies them to queries and keys `(batch, heads, length, head size)`.
        x_BLD: `(batch, length, hidden)`.
        state: of the token before; None at the start of the sequence.
        mask_BL: 1 for tokens, 0 for padding; None without padding.
        places_2L: see `places_of`.

    Returns:
        The output, shaped as ``x_BLD``, and the state after the segment.
    """

    def heads(projection: nn.Module) -> Tensor:
        y_BLE = project(projection, x_BLD)
        return y_BLE.view(*y_BLE.shape[:2], -1, attention.head_dim).transpose(1, 2)

    positions_1L = places_2L[:1]
    q_BHLP, k_BKLP = rotate(heads(attention.q_proj), heads(attention.k_proj), *rotary(x_BLD, positions_1L))
    start, total = int(places_2L[0, 0]), int(places_2L[1, 0])
    k_BLKP, v_BLKP = k_BKLP.transpose(1, 2), heads(attention.v_proj).transpose(1, 2)
    if state is None:
        live = None if mask_BL is None else _room(mask_BL.bool(), total)
        state = KVState(_room(k_BLKP, total), _room(v_BLKP, total), live)
    keys, values = _written(state.keys, k_BLKP, start), _written(state.values, v_BLKP, start)
    live = None if state.live is None or mask_BL is None else _written(state.live, mask_BL.bool(), start)
    stop = start + x_BLD.shape[1]
    y_BHLP = functional.scaled_dot_product_attention(
        q_BHLP,
        keys[:, :stop].transpose(1, 2),
        values[:, :stop].transpose(1, 2),
        attn_mask=_bias(positions_1L, start, live),
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        is_causal=start == 0 and live is None,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    return project(attention.o_proj, y_BHLP.transpose(1, 2).flatten(-2)), KVState(keys, values, live)


def _bias(positions_1L: Tensor, start: int, live: Tensor | None) -> Any:
    """What a segment's tokens may attend to of all tokens up to its end; None for the first segment without padding."""
    length = positions_1L.shape[1]
    stop = start + length
    if live is None and start == 0:
        return None
    if live is None and positions_1L.is_cuda:
        # torch's fused kernels know this shape without a mask. (Elsewhere it is a mask, and refused in dispatch modes.)
        return cast(Any, causal).causal_lower_right(length, stop)
    past_LT = positions_1L[0, :, None] >= torch.arange(stop, device=positions_1L.device)
    return past_LT if live is None else past_LT & live[:, None, None, :stop]


def _room(part: Tensor, total: int) -> Tensor:
    """Zeros for ``total`` tokens like those of ``part``, in memory of one element."""
    return part.new_zeros(()).expand(part.shape[0], total, *part.shape[2:])


def _written(whole: Tensor, part: Tensor, start: int) -> Tensor:
    """``whole`` with ``part`` as its tokens from ``start`` on; a new tensor, since states are values."""
    return torch.cat([whole[:, :start], part.to(whole.dtype), whole[:, start + part.shape[1] :]], dim=1)
