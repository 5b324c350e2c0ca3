"""Documents of different lengths packed into rows, so that no token of a batch is padding in the middle of training text.

A wrapped model (`magc.wrap`) treats each document of a row as a sequence of its own: recurrent states start afresh, no
attention and no convolution reaches across, and gradients are those of separate rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magc.errors import InputError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class PackingCollator:
    """Makes packed batches; a ``data_collator`` for transformers' Trainer, or a DataLoader's ``collate_fn``.

    Documents go into rows in order of their length, longest first, each into the first row that has room. What is left of a
    row is filled with a document of its own that no loss counts.

    Attributes:
        tokens: of a row; None: one row, as long as all documents together.
        pad_token_id: what rows are filled with.

    Returns, when called with a list of documents (mappings with ``input_ids`` and perhaps ``labels``, sequences of integers):
        ``input_ids``, ``labels`` (``input_ids`` where a document has none; `IGNORED` at the first token of each, which nothing
        before it predicts), ``position_ids`` (from 0 in each document), all int64, and ``seq_idx`` (the number of the document
        in its row), int32; each `(rows, tokens)`.

    Raises:
        InputError: a document is empty, is longer than a row, or has other numbers of ids and labels.
    """

    tokens: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Refuse rows without tokens."""
        if self.tokens is not None and self.tokens < 1:
            raise InputError(
                f"tokens={self.tokens}: a row has at least one token; give None for one row of all documents"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """See the class."""
        documents = [_document(index, feature) for index, feature in enumerate(features)]
        rows = self._rows([len(ids) for ids, _ in documents])
        length = self.tokens or sum(len(ids) for ids, _ in documents)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "labels": torch.full((len(rows), length), IGNORED),
            "position_ids": torch.zeros(len(rows), length, dtype=torch.int64),
            "seq_idx": torch.zeros(len(rows), length, dtype=torch.int32),
        }
        for row, members in enumerate(rows):
            start = 0
            for number, member in enumerate(members):
                ids, labels = documents[member]
                part = slice(start, start + len(ids))
                batch["input_ids"][row, part] = ids
                batch["labels"][row, part] = labels
                batch["labels"][row, start] = IGNORED
                batch["position_ids"][row, part] = torch.arange(len(ids))
                batch["seq_idx"][row, part] = number
                start += len(ids)
            batch["position_ids"][row, start:] = torch.arange(length - start)
            batch["seq_idx"][row, start:] = len(members)
        return batch

    def _rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """The documents of each row."""
        if self.tokens is None:
            return [list(range(len(lengths)))]
        rows: list[list[int]] = []
        room: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if lengths[index] > self.tokens:
                raise InputError(
                    f"document {index} has {lengths[index]} tokens, and a row {self.tokens}; cut it up before, or give longer "
                    f"rows (tokens=)"
                )
            row = next((i for i, left in enumerate(room) if left >= lengths[index]), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(self.tokens)
            rows[row].append(index)
            room[row] -= lengths[index]
        return rows


def _document(index: int, feature: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
    given: Any = feature.get("labels")
    labels = ids if given is None else torch.as_tensor(given, dtype=torch.int64)
    if ids.ndim != 1 or not len(ids) or labels.shape != ids.shape:
        raise InputError(
            f"document {index} has input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)}; both must be one row of the "
            f"same number of integers, at least one"
        )
    return ids, labels
