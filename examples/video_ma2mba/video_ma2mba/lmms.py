"""The model for lmms-eval, which finds it by the entry point `lmms_eval.models` once this package is installed.

    python -m lmms_eval --model video_ma2mba --model_args pretrained=my-model,max_frames=128 --tasks videomme

Written for the interface that lmms-eval documents in its model guide (0.7 and later: `ModelManifest`, the "simple" kind of
model, whose requests carry the task's own text and the paths of its media). Nothing else of this package imports it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.data.records import Media, Prompt
from video_ma2mba.errors import ConfigError, MissingPackageError
from video_ma2mba.model.answer import VideoAnswerer, check_limits
from video_ma2mba.model.device import usable_device
from video_ma2mba.model.folder import load_pretrained

try:
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise MissingPackageError("lmms_eval", "lmms-eval>=0.7", __name__) from error

_ALONE = "run lmms-eval in one process: it reads a video once for all its questions"


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="video_ma2mba", simple_class_path=f"{__name__}.VideoMa2mbaForLmmsEval")


class VideoMa2mbaForLmmsEval(lmms):
    """Greedy answers; questions about one video share its reading.

    Args:
        pretrained: a folder that training saved.
        device: None is the GPU if there is one.
        batch_size: must be 1.
        max_batch_size: not used.
        dtype: of the parameters.
        max_frames: most frames of a video, evenly spread; None takes all at the model's rate.
        segment: tokens read at once.

    Raises:
        ConfigError: another batch size, several processes, a limit below 1, or a device that cannot be used.
        FormatError: the folder is not a model's.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        dtype: str = "bfloat16",
        max_frames: int | None = None,
        segment: int = 4096,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ConfigError(f"batch_size={batch_size}: give 1; questions about one video share its reading")
        if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(f"there are {world} processes; {_ALONE}")
        if dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"dtype={dtype!r}: give bfloat16 or float32")
        check_limits(segment=segment, max_frames=max_frames)
        self._answerer = VideoAnswerer(
            load_pretrained(pretrained, device=usable_device(device), dtype=getattr(torch, dtype)),
            BpeTokenizer.from_folder(pretrained),
            segment=segment,
            max_frames=max_frames,
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests, whose `args` are (text, options, visuals of a row, row, task, split).

        Raises:
            ConfigError: a row has not one video or image in a file. MediaError: it cannot be used.
        """
        waiting: dict[Media, list[int]] = {}
        for index, request in enumerate(requests):
            _, _, visuals_of, row, task, split = request.args
            waiting.setdefault(_medium(f"{task}, row {row}", visuals_of(self.task_dict[task][split][row])), []).append(
                index
            )
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="video_ma2mba", unit=" questions") as bar:
            for media, indices in waiting.items():
                prompts = [_prompt(requests[index]) for index in indices]
                for index, answer in zip(indices, self._answerer.answer(media, prompts), strict=True):
                    text, options = requests[index].args[:2]
                    answers[index] = _until(answer, options.get("until"))
                    self.cache_hook.add_partial("generate_until", (text, options), answers[index])
                    bar.update()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the paper's benchmarks are all answered in words."""
        raise NotImplementedError("video_ma2mba answers in words; choose tasks with output_type: generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("video_ma2mba answers one question at a time; choose tasks with one round")


def _medium(where: str, visuals: Any) -> Media:
    found = list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    if len(found) != 1 or not isinstance(found[0], str | os.PathLike):
        shown = ", ".join(type(each).__name__ for each in found) or "nothing"
        raise ConfigError(f"{where} shows {shown}; video_ma2mba reads one video or image from the path of its file")
    return Media(Path(found[0]))


def _prompt(request: Any) -> Prompt:
    text, options = request.args[:2]
    if options.get("do_sample") or (options.get("temperature") or 0) > 0:
        raise ConfigError(f"{options} asks for sampling; video_ma2mba answers greedily: give temperature=0")
    return Prompt(text, max_new_tokens=int(options.get("max_new_tokens", 1024)))


def _until(answer: str, ends: str | Sequence[str] | None) -> str:
    """The answer up to the first of the texts that end it."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        answer = answer.split(end)[0]
    return answer
