"""The plug-in for lmms-eval, against a stand-in of the parts of its interface that it meets.

The stand-in follows lmms-eval's model guide and sources (`api/model.py`, `models/registry_v2.py`) as of 2026: a model is
named by a `ModelManifest` from an entry point, checked to be a subclass of `lmms` of the kind it was registered as, made
from `--model_args` plus batch size and device, given `task_dict`, and asked with `Instance` objects.
"""

from __future__ import annotations

import abc
import importlib
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.examples.clips import write_clip
from tests.examples.conftest import EXAMPLE
from tests.examples.tiny import make_model, make_tokenizer
from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.errors import ConfigError, MissingPackageError
from video_ma2mba.model.answer import VideoAnswerer
from video_ma2mba.model.folder import load_pretrained, save_pretrained


class Lmms(abc.ABC):
    """The abstract base class of models."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook: Any = SimpleNamespace(add_partial=lambda kind, request, answer: None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        pairs = [pair.split("=") for pair in arg_string.split(",") if pair]
        given = {name: int(value) if value.isdigit() else value for name, value in pairs}
        return cls(**given, **{name: value for name, value in (additional_config or {}).items() if value is not None})


@dataclass(frozen=True)
class ModelManifest:
    """What an entry point gives."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The plug-in, imported with the stand-in in lmms-eval's place."""
    parts: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "video_ma2mba.lmms", raising=False)
    yield importlib.import_module("video_ma2mba.lmms")
    sys.modules.pop("video_ma2mba.lmms", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        model.language.stem.weight.mul_(50)
    save_pretrained(model, folder / "model", make_tokenizer())
    for number in (1, 2):
        write_clip(folder / f"{number}.mp4", number)
    return folder


def make(plugin: ModuleType, folder: Path, more: str = "", **additional: Any) -> Any:
    """As lmms-eval makes a model, with a task of four rows about two videos."""
    arguments = f"pretrained={folder / 'model'},dtype=float32{more}"
    options = {"batch_size": 1, "max_batch_size": None, "device": "cpu", **additional}
    model = plugin.VideoMa2mbaForLmmsEval.create_from_arg_string(arguments, options)
    model.task_dict = {"videomme": {"test": [{"video": str(folder / f"{number}.mp4")} for number in (1, 2, 1, 2)]}}
    return model


def request(row: int, text: str, **options: Any) -> Any:
    """A request of a "simple" model."""
    options = {"max_new_tokens": 9, **options}
    return SimpleNamespace(args=(text, options, lambda doc: [doc["video"]], row, "videomme", "test"))


def expected(folder: Path, number: int, *questions: str) -> list[str]:
    answerer = VideoAnswerer(load_pretrained(folder / "model"), make_tokenizer())
    prompts = [Prompt(question, max_new_tokens=9) for question in questions]
    return list(answerer.answer(Media(folder / f"{number}.mp4"), prompts))


def test_the_entry_point_leads_to_the_model(plugin: ModuleType) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    (target,) = project["project"]["entry-points"]["lmms_eval.models"].values()
    module, name = target.split(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert (manifest.model_id, manifest.chat_class_path) == ("video_ma2mba", None)
    path, kind = manifest.simple_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(path), kind)
    assert issubclass(found, Lmms)
    assert found.is_simple


def test_answers_are_the_models(plugin: ModuleType, folder: Path) -> None:
    model = make(plugin, folder)
    kept: list[Any] = []
    model.cache_hook.add_partial = lambda *each: kept.append(each)
    found = model.generate_until([request(0, "What?"), request(2, "Who is it?")])
    assert found == expected(folder, 1, "What?", "Who is it?")
    assert kept[1] == ("generate_until", ("Who is it?", {"max_new_tokens": 9}), found[1])


def test_order_and_reading(plugin: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video is read once, wherever its questions stand; answers come in the order of the requests."""
    model = make(plugin, folder)
    asked: list[str] = []

    def answer(media: Media, prompts: list[Prompt]) -> list[str]:
        asked.append(media.path.name)
        return [f"{media.path.stem} {prompt.text} {prompt.max_new_tokens}" for prompt in prompts]

    monkeypatch.setattr(model._answerer, "answer", answer)
    found = model.generate_until([request(row, f"Q{row}", max_new_tokens=row + 1) for row in range(4)])
    assert asked == ["1.mp4", "2.mp4"]
    assert found == ["1 Q0 1", "2 Q1 2", "1 Q2 3", "2 Q3 4"]


def test_settings_come_from_model_args(plugin: ModuleType, folder: Path) -> None:
    model = make(plugin, folder, ",max_frames=1,segment=16")
    assert model._answerer.name == "model (1 frm)"
    assert len(model.generate_until([request(1, "What?")])) == 1


def test_texts_that_end_an_answer(plugin: ModuleType, folder: Path) -> None:
    model = make(plugin, folder)
    whole = model.generate_until([request(0, "What?")])[0]
    cut = model.generate_until([request(0, "What?", until=[whole[2], "\n\n\n"])])[0]
    assert cut == whole.split(whole[2])[0] != whole


@pytest.mark.parametrize(
    ("shown", "message"),
    [([], "row 0 shows nothing"), (["a", "b"], "row 0 shows str, str"), ([object()], "shows object; .* from the path")],
)
def test_visuals_that_are_no_file(plugin: ModuleType, folder: Path, shown: list[Any], message: str) -> None:
    model = make(plugin, folder)
    wrong = SimpleNamespace(args=("What?", {}, lambda doc: shown, 0, "videomme", "test"))
    with pytest.raises(ConfigError, match=message):
        model.generate_until([wrong])


def test_what_is_refused(plugin: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="batch_size=8: give 1"):
        make(plugin, folder, batch_size=8)
    with pytest.raises(ConfigError, match="dtype='int': give bfloat16"):
        plugin.VideoMa2mbaForLmmsEval(str(folder / "model"), dtype="int")
    with pytest.raises(ConfigError, match="max_frames=0: give a whole number"):
        make(plugin, folder, ",max_frames=0")
    with pytest.raises(ConfigError, match="device='cuda:99' cannot be used"):
        make(plugin, folder, device="cuda:99")
    model = make(plugin, folder)
    with pytest.raises(ConfigError, match="asks for sampling"):
        model.generate_until([request(0, "What?", do_sample=True)])
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="video_ma2mba answers"):
            ask([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="there are 2 processes; run lmms-eval in one"):
        make(plugin, folder)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "video_ma2mba.lmms", raising=False)
    with pytest.raises(
        MissingPackageError, match=r"video_ma2mba.lmms needs .* 'lmms_eval'.* pip install 'lmms-eval>=0.7'"
    ):
        importlib.import_module("video_ma2mba.lmms")
