"""The demo from the command line to its results."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from magc.demo.settings import Settings, parse
from magc.errors import InputError, MagcError, MissingExtraError
from magc.units import format_bytes, format_count

if TYPE_CHECKING:
    from torch import Tensor

    from magc.demo.corpus import Corpus
    from magc.demo.report import Machine, Results
    from magc.demo.screen import Screen
    from magc.nn import Mamba2LM

FILES = ("report.md", "memory.png", "loss.png", "plan.png", "results.json")

_TIMED_TOKENS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0; 2 after an error of magc, which goes to stderr in one line; 130 when interrupted, and nothing was written.
    """
    try:
        settings = parse(argv)
        for module in ("rich", "matplotlib"):
            if find_spec(module) is None:
                raise MissingExtraError(module, "demo", "magc demo")
        with _folder(settings.out):
            _run(settings)
    except MagcError as error:
        print(f"magc demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("magc demo: interrupted; no results were written", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _folder(out: Path) -> Generator[None]:
    """The results' folder: a mistake in it shows before the work, and an interrupted run leaves none behind."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot make this folder ({error.strerror}); give another one") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out}: cannot write to this folder; give another one")
    try:
        yield
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _run(settings: Settings) -> None:
    from magc.demo.corpus import Corpus, windows
    from magc.demo.model import make_model, threads
    from magc.demo.report import Machine
    from magc.demo.screen import Screen

    started = time.perf_counter()
    screen = Screen()
    corpus = Corpus.find(settings.corpus, settings.seed)
    text = corpus.training_tokens(settings.steps * settings.seq_len + 1)
    examples = windows(text, settings.seq_len, settings.steps)
    model = make_model(settings)
    ids, targets = (side[:, :_TIMED_TOKENS].to(settings.device) for side in examples[0])
    with threads(settings, model, ids, targets):
        machine = Machine.here(settings.device)
        screen.title("magc demo")
        screen.line(str(machine))
        screen.line(f"{corpus.root}: {len(corpus.train)} files to train on, {len(corpus.held_out)} held out")
        results = _work(settings, screen, machine, corpus, model, examples, started)
        with screen.working("drawing"):
            _write(results)
    screen.line(f"{results.seconds:.0f} s. Results: {', '.join(str(settings.out / name) for name in FILES)}")


def _work(
    settings: Settings,
    screen: Screen,
    machine: Machine,
    corpus: Corpus,
    model: Mamba2LM,
    examples: Sequence[tuple[Tensor, Tensor]],
    started: float,
) -> Results:
    from magc.demo import report
    from magc.demo.compare import compare
    from magc.demo.train import evaluate, make_plan, train

    parameters = sum(param.numel() for param in model.parameters())
    sizes = f"{settings.n_layer} layers of width {settings.d_model}, {parameters:,} parameters"
    screen.line(f"Mamba-2, {sizes}, one byte a token")

    screen.title(f"1. Plan for {settings.seq_len:,} tokens within {format_bytes(settings.budget)}")
    ids, targets = examples[0]
    with screen.working("planning") as news:
        plan = make_plan(settings, model, ids, targets, news)
    screen.line(f"plan: {plan.plan}")
    screen.table(report.TRAINING_COLUMNS, report.training_rows(settings, plan, None))

    screen.title(f"2. Every strategy on {settings.compare_len:,} tokens")
    ids, targets = (side[:, : settings.compare_len].to(settings.device) for side in examples[0])
    with screen.working("comparing") as news:
        comparison = compare(settings, model, ids, targets, news)
    screen.table(report.COLUMNS, [report.cells(row) for row in comparison.rows])
    screen.line(f"predicted to fit {format_bytes(settings.budget)}:")
    screen.table(report.REACH_COLUMNS, report.reach_rows(comparison))

    screen.title(f"3. Train on sequences of {settings.seq_len:,} tokens")
    held_out = corpus.draw_held_out(settings.eval_bytes)
    size = sum(path.stat().st_size + 1 for path in held_out)
    with screen.steps("held-out files", size, lines=1) as advance:
        before = evaluate(model, held_out, lambda tokens: advance(tokens, "bytes"))
    with screen.steps("training", settings.steps) as advance:
        training = train(
            settings,
            model,
            plan.plan,
            examples,
            lambda loss, speed: advance(1, f"loss {loss:.3f} nats per byte, {format_count(speed)} tokens/s"),
        )
    with screen.steps("held-out files", size, lines=1) as advance:
        after = evaluate(model, held_out, lambda tokens: advance(tokens, "bytes"))
    screen.table(report.TRAINING_COLUMNS, report.training_rows(settings, plan, training))
    screen.table(report.LOSS_COLUMNS, report.loss_rows(before, after))
    return report.Results(
        settings=settings,
        machine=machine,
        parameters=parameters,
        held_out=tuple(corpus.names(held_out)),
        comparison=comparison,
        plan=plan,
        training=training,
        before=before,
        after=after,
        seconds=time.perf_counter() - started,
    )


def _write(results: Results) -> None:
    """All files, or none of them if that is interrupted."""
    from magc.demo.figures import draw_loss, draw_memory

    out = results.settings.out
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out) as folder:
        made = Path(folder)
        draw_memory(made / "memory.png", results.settings, results.comparison, results.training.peak_bytes)
        draw_loss(made / "loss.png", results.settings, results.training, results.before, results.after)
        results.plan.plan.plot(made / "plan.png")
        (made / "report.md").write_text(results.as_markdown(), encoding="utf-8")
        (made / "results.json").write_text(results.as_json(), encoding="utf-8")
        for name in FILES:
            os.replace(made / name, out / name)
