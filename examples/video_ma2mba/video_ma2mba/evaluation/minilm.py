"""A judge by likeness of sentence embeddings, from a local folder. It costs milliseconds where a language model costs a call,
and is a cheap stand-in for one: its figures are not comparable to published ones, nor to those of any other judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.evaluation.identity import digest_of_files
from video_ma2mba.evaluation.judges import Case, Verdict, normalized

DEFAULT_THRESHOLD = 0.75
"""With all-MiniLM-L6-v2, "sofa" for "couch" (0.86) and "soccer" for "football" (0.84) are right from here on, "cat" for "dog"
(0.66) and "blue" for "red" (0.73) wrong; some pairs fall on the wrong side of any threshold ("black" and "white", 0.76)."""
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_POOLING, _LIMIT = Path("1_Pooling") / "config.json", Path("sentence_bert_config.json")
_COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)}


class MiniLMJudge:
    """Right is what is like enough to the reference, by the cosine of embeddings.

    An embedding is the mean of a BERT's last hidden states over a text's tokens, scaled to length 1, as
    `sentence-transformers/all-MiniLM-L6-v2` is used. Similarity is the cosine, -1 to 1; an empty answer's is 0. A score is
    5 x similarity, and 0 where that is negative. VideoChatGPT's five aspects are not told apart: each gets the score of the
    answer, consistency that of the less similar of the two answers.

    Where the reference is "yes", "no" or a number (in digits, or a word up to twelve), likeness says nothing: "yes" and "no"
    have 0.73, "2" and "3" 0.87. For ActivityNet-QA's "match" the first such word in the answer is then compared instead, and
    the score is 0 or 5.

    Longer texts than the model takes (256 tokens of all-MiniLM-L6-v2) are cut; the verdict's words say so.

    Args:
        folder: `config.json`, `model.safetensors` and `tokenizer.json` of a BERT, in the Hugging Face layout.
        threshold: similarity from which an answer is right.

    Raises:
        ConfigError: the threshold is not between 0 and 1. FormatError: the folder is not such a model's.
    """

    def __init__(self, folder: str | PathLike[str], threshold: float = DEFAULT_THRESHOLD) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold={threshold}: give more than 0 and at most 1")
        path = Path(folder)
        digest = digest_of_files(path, (*_FILES, *([str(_LIMIT)] if (path / _LIMIT).is_file() else [])))
        _check_kind(path)
        self._model, self._tokenizer = _load(path)
        self._limit = _limit_of(path, int(self._model.config.max_position_embeddings))
        self._threshold = threshold
        self.name = f"minilm:{path.resolve().name} ({digest[:8]}, right from {threshold:g})"

    def decide(self, case: Case) -> Verdict:
        """See `Judge`."""
        if case.aspect == "match" and (kind := _closed(normalized(case.reference))):
            return _compared(kind, case)
        predictions = [case.prediction, *([case.second_prediction] if case.aspect == "consistency" else [])]
        similarity, words = self.similarities(case.reference, predictions)
        lowest = min(similarity)
        return Verdict(lowest >= self._threshold, 5 * max(0.0, lowest), words)

    def similarities(self, reference: str, predictions: Sequence[str]) -> tuple[list[float], str]:
        """The similarity of each prediction to the reference, and the same in words."""
        embedded, cut = self._embed([reference, *predictions])
        found = [
            float(embedded[0] @ other) if text.strip() else 0.0
            for other, text in zip(embedded[1:], predictions, strict=True)
        ]
        words = f"similarity {', '.join(f'{each:.4f}' for each in found)}"
        return found, words + (f"; {cut} of {len(embedded)} texts cut to {self._limit} tokens" if cut else "")

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """Embeddings `(texts, width)` of length 1, and how many texts were cut."""
        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]
        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._limit, return_tensors="pt")
        hidden = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1), sum(each > self._limit for each in lengths)


def _closed(word: str) -> str:
    """What kind of closed answer a word is: a number, yes or no, or none (empty)."""
    if word in ("yes", "no"):
        return "yes or no"
    return "number" if word in _NUMBERS or word.isdecimal() else ""


def _compared(kind: str, case: Case) -> Verdict:
    """Whether the first word of a kind in the prediction is the reference."""
    reference = normalized(case.reference)
    first = next((word for word in normalized(case.prediction).split() if _closed(word) == kind), None)
    right = first is not None and _NUMBERS.get(first, first) == _NUMBERS.get(reference, reference)
    return Verdict(right, 5.0 * right, f"compared as {kind}: {first or 'none'}")


def _check_kind(folder: Path) -> None:
    kind = _json(folder / "config.json").get("model_type")
    if kind != "bert":
        raise FormatError(f"{folder} holds a model of type {kind!r}; give a BERT's, such as all-MiniLM-L6-v2's folder")
    if (folder / _POOLING).is_file() and _json(folder / _POOLING).get("pooling_mode_mean_tokens") is not True:
        raise FormatError(f"{folder / _POOLING} asks for something else than means of tokens; this judge takes means")


def _load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; nothing is fetched."""
    try:
        loaded = cast(Any, AutoModel).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = cast(Any, AutoTokenizer).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        raise FormatError(f"{folder} cannot be loaded as a BERT with its tokenizer ({error})") from error
    model, report = loaded
    # The library fills what a file lacks with random numbers; the pooler is not used here.
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise FormatError(f"{folder / _FILES[1]} lacks {len(missing)} weights, e.g. {', '.join(missing[:3])}")
    return model.eval(), tokenizer


def _limit_of(folder: Path, most: int) -> int:
    """Tokens of a text at most."""
    if not (folder / _LIMIT).is_file():
        return most
    limit = _json(folder / _LIMIT).get("max_seq_length", most)
    if not isinstance(limit, int) or not 2 < limit <= most:
        raise FormatError(f"{folder / _LIMIT}: max_seq_length {limit!r} must be 3 to {most}")
    return limit


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold an object, got a {type(data).__name__}")
    return data
