"""The judge by embeddings, on a tiny random BERT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from video_ma2mba.errors import ConfigError, FormatError
from video_ma2mba.evaluate import make_judge
from video_ma2mba.evaluation.judges import Case, SavedVerdicts, Verdict
from video_ma2mba.evaluation.minilm import MiniLMJudge

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "dog", "big", "it", "is"]
CASE = Case("q1", "match", "What?", "red dog", "it is red")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm") / "tiny-bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, initializer_range=0.02, **sizes))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    return folder


def copy(bert: Path, to: Path) -> Path:
    return Path(shutil.copytree(bert, to / "copy"))


def by_hand(bert: Path, first: str, second: str) -> float:
    """The cosine of means over tokens, one text at a time, without padding."""
    model = BertModel.from_pretrained(bert, local_files_only=True).eval()
    vectors: list[torch.Tensor] = []
    for text in (first, second):
        ids = [WORDS.index(word) for word in ("[CLS]", *text.split(), "[SEP]")]
        with torch.no_grad():
            vectors.append(model(torch.tensor([ids])).last_hidden_state[0].mean(0))
    return float(torch.cosine_similarity(vectors[0], vectors[1], dim=0))


def test_similarity_is_that_of_means_over_tokens(bert: Path) -> None:
    judge = MiniLMJudge(bert)
    (found,), words = judge.similarities("red dog", ["it is big blue dog"])
    assert found == pytest.approx(by_hand(bert, "red dog", "it is big blue dog"), abs=1e-5)
    assert words == f"similarity {found:.4f}"
    assert judge.similarities("red dog", ["red dog"])[0] == [pytest.approx(1, abs=1e-5)]
    assert judge.similarities("red dog", ["", " "]) == ([0.0, 0.0], "similarity 0.0000, 0.0000")


def test_right_from_the_threshold_on(bert: Path) -> None:
    similarity = by_hand(bert, CASE.reference, CASE.prediction)
    below, above = (MiniLMJudge(bert, similarity + by) for by in (-0.01, 0.01))
    assert 0.05 < similarity < 0.95
    for judge, right in ((below, True), (above, False)):
        verdict = judge.decide(CASE)
        assert (verdict.correct, verdict.score) == (right, pytest.approx(5 * similarity, abs=1e-4))


def test_scores_are_not_negative(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = MiniLMJudge(bert)
    monkeypatch.setattr(judge, "similarities", lambda reference, predictions: ([-0.3], "similarity -0.3000"))
    assert judge.decide(CASE) == Verdict(False, 0.0, "similarity -0.3000")


def test_consistency_is_the_worse_answers(bert: Path) -> None:
    case = replace(CASE, aspect="consistency", prediction="red dog", second_prediction="it is blue")
    verdict = MiniLMJudge(bert).decide(case)
    assert verdict.score == pytest.approx(5 * max(0.0, by_hand(bert, "red dog", "it is blue")), abs=1e-4)
    assert MiniLMJudge(bert).decide(replace(case, aspect="detail")).score == pytest.approx(5, abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "prediction", "right", "words"),
    [
        ("yes", "Yes, he is.", True, "compared as yes or no: yes"),
        ("no", "yes", False, "compared as yes or no: yes"),
        ("No.", "red", False, "compared as yes or no: none"),
        ("2", "two dogs", True, "compared as number: two"),
        ("two", "3", False, "compared as number: 3"),
        ("30", "30", True, "compared as number: 30"),
    ],
)
def test_closed_answers_are_compared(bert: Path, reference: str, prediction: str, right: bool, words: str) -> None:
    found = MiniLMJudge(bert).decide(replace(CASE, reference=reference, prediction=prediction))
    assert found == Verdict(right, 5.0 * right, words)


def test_cut_texts_are_named(bert: Path, tmp_path: Path) -> None:
    copied = copy(bert, tmp_path)
    (copied / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    (similarity,), words = MiniLMJudge(copied).similarities("red dog", ["it is big blue dog"])
    assert words == f"similarity {similarity:.4f}; 1 of 2 texts cut to 5 tokens"
    assert similarity == pytest.approx(by_hand(bert, "red dog", "it is big"), abs=1e-5)
    (copied / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    with pytest.raises(FormatError, match="max_seq_length 512 must be 3 to 16"):
        MiniLMJudge(copied)


def test_names_tell_thresholds_and_weights_apart(bert: Path, tmp_path: Path) -> None:
    name = MiniLMJudge(bert).name
    assert name.startswith("minilm:tiny-bert (")
    assert name.endswith(", right from 0.75)")
    assert make_judge(f"minilm:{bert}").name == name
    other = make_judge(f"minilm:{bert}", threshold=0.6)
    assert other.name == name.replace("0.75", "0.6")
    copied = copy(bert, tmp_path)
    weights = load_file(copied / "model.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    assert MiniLMJudge(copied).name.split("(")[1] != name.split("(")[1]
    SavedVerdicts(make_judge(f"minilm:{bert}"), tmp_path / "verdicts.jsonl").decide(CASE)
    with pytest.raises(ConfigError, match="holds verdicts of"):
        SavedVerdicts(other, tmp_path / "verdicts.jsonl")


def test_what_is_refused(bert: Path, tmp_path: Path) -> None:
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="give more than 0 and at most 1"):
            MiniLMJudge(bert, threshold)
    with pytest.raises(FormatError, match=r"config.json does not exist"):
        MiniLMJudge(tmp_path)
    copied = copy(bert, tmp_path)
    weights = load_file(copied / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "layer.1.output.dense.weight" not in name}
    save_file(lacking, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 1 weights, e.g. encoder.layer.1.output.dense.weight"):
        MiniLMJudge(copied)
    (copied / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be loaded as a BERT"):
        MiniLMJudge(copied)
    (copied / "1_Pooling").mkdir()
    (copied / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(FormatError, match="this judge takes means"):
        MiniLMJudge(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(FormatError, match="of type 'gpt2'; give a BERT's"):
        MiniLMJudge(copied)
