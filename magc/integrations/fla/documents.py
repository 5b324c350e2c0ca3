"""Where documents begin in rows that are packed, or padded on the left, as layers of flash-linear-attention are told of it.

Shape letters: B batch, L length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from magc.errors import InputError


class Positions:
    """Index of each token in its document, for the segments that must be cut (a `magc.Segmented`).

    Where documents begin is read once, here. A segment in which none begins gives None: its layers run as ever, and nobody
    waits for a GPU.

    Args:
        positions_BL: the indices, integers; 0 where a document begins.
        everywhere: give them for every segment, for layers that must know how much of a document they have seen.
    """

    def __init__(self, positions_BL: Tensor, *, everywhere: bool) -> None:
        self._positions = positions_BL
        self._everywhere = everywhere
        begins = cast(list[int], (positions_BL == 0).any(0).nonzero().flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
        self._begins = [index for index in begins if index > 0]  # a row begins without a state anyway

    def __len__(self) -> int:
        """Tokens of a row."""
        return self._positions.shape[1]

    def segment(self, start: int, stop: int) -> Tensor | None:
        """Those of tokens ``start`` to ``stop``, `(batch, stop - start)`; None if no document begins at any of them."""
        is_cut = bisect_left(self._begins, start) < bisect_left(self._begins, stop)
        return self._positions[:, start:stop] if is_cut or self._everywhere else None


def positions_of(side: Mapping[str, Tensor | None]) -> Tensor | None:
    """Index of each token in its document, `(batch, length)`; None if every row is a document from its first token on.

    Padding on the left is a document of its own. Padding on the right belongs to the document before it, where it changes
    nothing: what comes later never does.

    Args:
        side: what `magc.integrations.transformers.tokens.side_inputs` says, with places.

    Raises:
        InputError: padding between tokens, or a mask of other values than 0 and 1.
    """
    places, documents, mask = side["places"], side["documents"], side["attention_mask"]
    assert places is not None
    index_L = places[0]
    if documents is not None:
        return index_L - (documents - 1)
    return None if mask is None else _behind_padding(mask, index_L)


def _behind_padding(mask_BL: Tensor, index_L: Tensor) -> Tensor | None:
    is_token = mask_BL == 1
    runs_B = is_token[:, 0].long() + (is_token[:, 1:] & ~is_token[:, :-1]).sum(1)
    if bool((runs_B > 1).any()) or not bool((is_token | (mask_BL == 0)).all()):
        raise InputError(
            "attention_mask has padding between tokens of a row, or other values than 0 and 1. Pad on one side (or both) of a "
            "row's tokens; of several documents in a row, tell by position_ids or seq_idx (magc.data.PackingCollator)"
        )
    first_B1 = is_token.long().argmax(1, keepdim=True)
    if not bool(first_B1.any()):
        return None
    return torch.where(index_L < first_B1, index_L, index_L - first_B1)
