"""The small run from the command line to its results: `python -m video_ma2mba.small --help`."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from jsonargparse import auto_cli

from magc.errors import MissingExtraError
from video_ma2mba.command import errors_as_lines
from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.errors import ConfigError
from video_ma2mba.model.device import usable_device
from video_ma2mba.model.folder import load_pretrained
from video_ma2mba.small.pipeline import SeedResult, device_of, run_seed
from video_ma2mba.small.settings import BASE, Settings

FILES = ("result.md", "result.json", "contact-sheet.png", "losses.png", "lengths.png")


def main(
    out: Path = Path("small-run"),
    seeds: list[int] = [0],  # noqa: B006 (jsonargparse shows it)
    base: Path = BASE,
    device: str | None = None,
    quick: bool = False,
) -> None:
    """Render videos of moving shapes, train the three stages from the small base, and evaluate on held-out videos.

    Args:
        out: a new folder for videos, annotations, models, answers and results.
        seeds: one run for each: of videos, questions, the projector's first weights and the order of training.
        base: the model to begin with.
        device: None is the GPU if there is one.
        quick: a few seconds: every part runs, little is learnt.
    """
    settings = Settings(out, tuple(seeds), base=base, device=device)
    run_all(settings.quick() if quick else settings)


def run_all(settings: Settings) -> list[SeedResult]:
    """All seeds, shown on the screen and written to `settings.out`.

    Raises:
        ConfigError: the folder holds something else, or the device cannot be used.
        MissingExtraError: what draws or shows is not installed.
    """
    for module in ("rich", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "demo", "the small run")
    if not settings.seeds or len(set(settings.seeds)) != len(settings.seeds):
        raise ConfigError(f"seeds={list(settings.seeds)}: give one or more different ones")
    if settings.out.exists() and any(settings.out.iterdir()):
        raise ConfigError(f"out={settings.out} is not empty; give a new folder, or remove this one")
    usable_device(settings.device)
    from magc.demo.screen import Screen
    from video_ma2mba.small import figures, report

    started = time.perf_counter()
    screen = Screen()
    screen.title("Video-Ma²mba, the small run")
    described = describe(settings)
    screen.line(described)
    results: list[SeedResult] = []
    for seed in settings.seeds:
        screen.title(f"Seed {seed}")
        results.append(run_seed(settings, seed, settings.out / f"seed-{seed}", screen))
    screen.title("Results")
    for rows in (report.length_rows, report.kind_rows, report.seed_rows):
        screen.table(*rows(settings, results))
    for text, passed in report.verdicts(settings, results):
        screen.line(f"{'reached' if passed else 'MISSED '}  {text}")
    figures.draw_contact_sheet(settings.out / "contact-sheet.png", settings, results[0])
    figures.draw_losses(settings.out / "losses.png", settings, results)
    figures.draw_lengths(settings.out / "lengths.png", settings, results)
    (settings.out / "result.md").write_text(report.as_markdown(settings, results, described), encoding="utf-8")
    (settings.out / "result.json").write_text(report.as_json(settings, results), encoding="utf-8")
    seconds = time.perf_counter() - started
    screen.line(f"{seconds:.0f} s. Results: {', '.join(str(settings.out / name) for name in FILES)}")
    return results


def describe(settings: Settings) -> str:
    """The model and what it sees, in a sentence."""
    model = load_pretrained(settings.base)
    counts = {
        name: sum(each.numel() for each in part.parameters())
        for name, part in (("tower", model.vision), ("projector", model.projector), ("Mamba-2", model.language))
    }
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    tokens = model.config.vision.tokens_per_frame
    vocabulary = BpeTokenizer.from_folder(settings.base).size
    return (
        f"Parameters: {parts}; {tokens} token a frame, {vocabulary} words and pieces; {device_of(settings)}, "
        f"{model.config.fps:g} frame a second."
    )


def run(arguments: list[str] | None = None) -> None:
    """`main` with arguments of the command line, which may come from a YAML file (`--config`)."""
    with errors_as_lines():
        auto_cli(main, args=arguments, as_positional=False)
