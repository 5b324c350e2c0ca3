"""What a call says about its tokens besides their values: padding, documents of packed rows, positions.

Rows are packed if position_ids start again inside a row, or if seq_idx or cu_seq_lens_q say so: what transformers'
`DataCollatorWithFlattening` and `magc.data.PackingCollator` make. Every layer then treats each document as a sequence of
its own.

Shape letters: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from magc.errors import InputError

PACKING_ARGUMENTS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A segment's tokens.

    Attributes:
        mask: 1 for tokens and 0 for padding, `(batch, length)`; None without padding.
        documents: what tells apart the documents of packed rows, `(batch, length)` int32: one more than the index in the
            row of the first token of each token's document; None unless rows are packed.
        places: each token's index in its row, and the number of tokens of a row, `(2, length)`; None where no layer asks.
        positions: for rotary embeddings, `(batch or 1, length)`; None where no layer asks.
    """

    mask: Tensor | None = None
    documents: Tensor | None = None
    places: Tensor | None = None
    positions: Tensor | None = None


def side_inputs(call: dict[str, Any], inputs: Tensor, *, attends: bool) -> dict[str, Tensor | None]:
    """The side inputs of layers that make `Tokens` of them.

    Args:
        call: the arguments of the model's forward, by name.
        inputs: its ids or embeddings, `(batch, length, ...)`.
        attends: whether there are layers that ask for places and positions.

    Raises:
        InputError: an argument of another form than transformers' collators make, or rows both packed and padded.
    """
    mask = padding(call)
    documents = _documents(call, inputs, mask)
    side: dict[str, Tensor | None] = {"attention_mask": mask, "documents": documents}
    if not attends:
        return side
    index_L = torch.arange(inputs.shape[1], device=inputs.device)
    given = call.get("position_ids")
    positions_BL = index_L[None] if documents is None else index_L - (documents - 1)
    side["positions"] = positions_BL if given is None else _rows(given, inputs)
    side["places"] = torch.stack([index_L, torch.full_like(index_L, inputs.shape[1])])
    return side


def padding(call: dict[str, Any]) -> Tensor | None:
    """The attention mask, `(batch, length)`; None if nothing is padded.

    Raises:
        InputError: a mask of another form.
    """
    mask = call.get("attention_mask")
    if mask is None:
        return None
    given = call.get("input_ids", call.get("inputs_embeds"))
    wanted = tuple(given.shape[:2]) if isinstance(given, Tensor) else ()
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (wanted and tuple(mask.shape) != wanted):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        of = f" = {wanted}" if wanted else ""
        raise InputError(f"attention_mask must be (batch, length){of}, 1 for tokens and 0 for padding; got {shape}")
    return None if bool((mask == 1).all()) else mask


def _documents(call: dict[str, Any], inputs: Tensor, mask: Tensor | None) -> Tensor | None:
    """See `Tokens.documents`; None if every row is one document."""
    starts: dict[str, Tensor] = {}  # by the argument that says so, `(batch, length)`: whether a document starts there
    position_ids, seq_idx, ends = (call.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    if seq_idx is not None:
        starts["seq_idx"] = _steps(_rows(seq_idx, inputs, "seq_idx")) != 0
    if position_ids is not None:
        starts["position_ids"] = _steps(_rows(position_ids, inputs)) != 1
    if ends is not None:
        starts["cu_seq_lens_q"] = _starts_of(ends, inputs)
    # Between two tokens one of which is padding, positions may do anything.
    inside = None if mask is None else functional.pad((mask[:, 1:] == 1) & (mask[:, :-1] == 1), (1, 0), value=False)
    for name, found in starts.items():
        starts[name] = found = found if inside is None else found & inside
        found[:, 0] = True
    if not starts:
        return None
    (name, first), *others = starts.items()
    for other, found in others:
        if not torch.equal(first, found):
            raise InputError(f"{name} and {other} tell of different documents; give one of them, or two that agree")
    if not bool(first[:, 1:].any()):
        return None
    if mask is not None:
        raise InputError(
            f"the rows are packed by {name} and padded by attention_mask, which cannot be both. Leave out the attention_mask "
            f"and make the padding a document of its own (a new seq_idx, position_ids from 0, labels of -100), as "
            f"magc.data.PackingCollator does"
        )
    index_L = torch.arange(1, inputs.shape[1] + 1, device=first.device, dtype=torch.int32)
    return torch.where(first, index_L, 0).cummax(dim=1).values


def _rows(given: Tensor, inputs: Tensor, name: str = "position_ids") -> Tensor:
    """``given`` with a row for each of the batch."""
    batch, length = inputs.shape[:2]
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] != length:
        raise InputError(
            f"{name} must have one entry for each of {length} tokens of {batch} rows, got {tuple(given.shape)}"
        )
    return rows.expand(batch, length)


def _steps(ids_BL: Tensor) -> Tensor:
    """How much each entry is more than the one before; 0 at the start of a row."""
    return torch.diff(ids_BL, prepend=ids_BL[:, :1], dim=1)


def _starts_of(ends: Tensor, inputs: Tensor) -> Tensor:
    """Where documents start by cumulative lengths `(documents + 1,)`, which there are for a single row only."""
    batch, length = inputs.shape[:2]
    if batch != 1 or ends.ndim != 1 or int(ends[-1]) != length:
        raise InputError(
            f"cu_seq_lens_q goes with one row of {int(ends[-1])} tokens, got {batch} rows of {length}; give seq_idx instead"
        )
    starts = torch.zeros(1, length + 1, dtype=torch.bool, device=inputs.device)
    starts[0, ends.long()] = True
    return starts[:, :length]
