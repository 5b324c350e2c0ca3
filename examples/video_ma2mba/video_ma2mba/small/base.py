"""Makes the small base: `python -m video_ma2mba.small.base --out base`, hours on one CPU core."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from video_ma2mba.command import errors_as_lines
from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.errors import ConfigError
from video_ma2mba.model.config import VideoMa2mbaConfig
from video_ma2mba.model.folder import load_pretrained, save_pretrained
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.model.stem import Projector
from video_ma2mba.small.language import LanguageRecipe, examine, train_language
from video_ma2mba.small.sight import VISION, SightRecipe, train_sight
from video_ma2mba.small.texts import SCHEMA, train_tokenizer

EXAMINED_SECONDS = (16, 32, 64, 128)


def main(
    out: Path,
    language: LanguageRecipe = LanguageRecipe(),  # noqa: B008 (frozen)
    sight: SightRecipe = SightRecipe(),  # noqa: B008 (frozen)
    start: Path | None = None,
    device: str = "cpu",
    examined: int = 128,
) -> None:
    """Train a tokenizer, a language model and a vision tower that know nothing of each other, and save them as one model.

    Args:
        out: a folder for the model and `recipe.json`, which says how it was made and what its parts can do.
        language: how the language model is trained.
        sight: how the tower is trained.
        start: the folder of a model made before: its tokenizer and tower are kept, and its language model learns on.
        device: of the training.
        examined: held-out questions of each kind and length that the language model is asked.
    """
    if (out / "model.safetensors").exists():
        raise ConfigError(f"out={out} holds a model already; give another folder")
    started = time.perf_counter()
    before = None if start is None else load_pretrained(start)
    if start is None or before is None:
        tokenizer, made = train_tokenizer(), []
        with tqdm(total=sight.steps, desc="sight") as bar:
            tower, seen = train_sight(sight, lambda count, news: _tell(bar, count, news), device)
    else:
        tokenizer, tower = BpeTokenizer.from_folder(start), before.vision
        known = json.loads((start / "recipe.json").read_text(encoding="utf-8"))
        sight, seen = SightRecipe(**known["sight"]), known["sight knows"]
        made = [*known.get("language before", []), known["language"]]
    with tqdm(total=language.steps, desc="language") as bar:
        model = train_language(
            language,
            tokenizer,
            device,
            lambda count, news: _tell(bar, count, news),
            start=None if before is None else before.language,
        )
    skills = {f"{seconds} s": examine(model, tokenizer, seconds, examined) for seconds in EXAMINED_SECONDS}
    config = VideoMa2mbaConfig(model.config, VISION, SCHEMA, fps=1.0)
    torch.manual_seed(language.seed)
    projector = Projector(VISION.width, model.config.d_model)
    whole = VideoMa2mba(config, model.cpu(), tower, projector)
    save_pretrained(whole, out, tokenizer)
    recipe = {
        "language": asdict(language),
        "language before": made,
        "sight": asdict(sight),
        "device": device,
        "seconds": round(time.perf_counter() - started),
        "language knows": skills,
        "sight knows": seen,
    }
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(recipe, indent=2))


def _tell(bar: tqdm, count: int, news: str) -> None:
    bar.set_postfix_str(news, refresh=False)
    bar.update(count)


if __name__ == "__main__":
    with errors_as_lines():
        auto_cli(main, as_positional=False)
