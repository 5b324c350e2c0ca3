"""The collator of packed batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from magc.data import PackingCollator
from magc.errors import InputError


def made(*lengths: int) -> list[dict[str, Any]]:
    """Documents of ids that tell which they belong to."""
    return [{"input_ids": [10 * (i + 1) + j for j in range(n)]} for i, n in enumerate(lengths)]


def test_one_row_in_the_order_given() -> None:
    batch = PackingCollator()(made(2, 1, 3))
    assert batch["input_ids"].tolist() == [[10, 11, 20, 30, 31, 32]]
    assert batch["labels"].tolist() == [[-100, 11, -100, -100, 31, 32]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert batch["seq_idx"].dtype == torch.int32


def test_rows_are_filled_by_a_document_that_nothing_counts() -> None:
    batch = PackingCollator(tokens=5, pad_token_id=7)(made(2, 4, 3))
    assert batch["input_ids"].tolist() == [[20, 21, 22, 23, 7], [30, 31, 32, 10, 11]]
    assert batch["labels"].tolist() == [[-100, 21, 22, 23, -100], [-100, 31, 32, -100, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]


def test_labels_of_ones_own() -> None:
    batch = PackingCollator()([{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, -100, 3])}])
    assert batch["labels"].tolist() == [[-100, -100, 3]]


def test_documents_are_not_written_into() -> None:
    ids = torch.tensor([4, 5])
    PackingCollator(tokens=3)([{"input_ids": ids, "labels": ids}])
    assert ids.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (made(6), "document 0 has 6 tokens, and a row 5"),
        (made(2, 0), "document 1 has input_ids"),
        ([{"input_ids": [1, 2], "labels": [1]}], "same number"),
    ],
)
def test_refused_with_a_remedy(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackingCollator(tokens=5)(features)


def test_rows_without_tokens() -> None:
    with pytest.raises(InputError, match="at least one token"):
        PackingCollator(tokens=0)
