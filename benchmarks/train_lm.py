"""Train a Mamba-2 on real text twice, on the grid and without checkpointing, from the same seed on the same batches.

    python benchmarks/train_lm.py --out train-lm                       # 130m, 200 steps of 2^17 tokens, on a GPU
    python benchmarks/train_lm.py --model tiny --tokens 2^10 --steps 8 --segment 256 --device cpu --out train-lm

The text is Python's standard library, byte by byte. Weights are float32 under autocast to bf16 on a GPU. Writes
``losses.json`` (losses, memory and seconds of every step of both runs) and ``losses.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import magc
from magc.bench.cases import config_of, model_name
from magc.demo.corpus import VOCABULARY, Corpus, windows
from magc.demo.train import learning_rate_factor
from magc.meter import MemoryMeter
from magc.nn import Mamba2LM
from magc.plan import Plan
from magc.sizes import parse_tokens

_SETTINGS = ("model", "tokens", "segment", "steps", "lr", "seed", "device")


@dataclass(slots=True)
class Run:
    """What happened in one run.

    Attributes:
        name: of its plan.
        losses: nats per byte of each step, before its update.
        seconds: of each step.
        peak_bytes: of each step, beyond what was there before the first.
        left_bytes: what each step left behind, gradients freed; from the fourth step on anything is a leak.
    """

    name: str
    losses: list[float]
    seconds: list[float]
    peak_bytes: list[int]
    left_bytes: list[int]

    @property
    def tokens_per_second(self) -> float:
        """Median step, without the first three, in which kernels are compiled and cells captured."""
        return 1 / statistics.median(self.seconds[3:] or self.seconds)


def train(name: str, plan: Plan, runner: Any, options: argparse.Namespace, batches: Any) -> Run:
    """Train from the seed's weights."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    model = Mamba2LM(replace(config_of(model_name(options.model)), vocab_size=VOCABULARY)).to(device)
    stack = magc.GridCheckpoint(model.layers, plan, runner=runner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    run = Run(name, [], [], [], [])
    for step, (ids, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor(step, options.steps)
        _wait(device)
        start = time.perf_counter()
        with MemoryMeter(device) as meter:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = stack.loss(ids, targets, stem=model.stem, head=model.head)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.losses.append(float(loss.detach()))
            del loss
            run.left_bytes.append(meter.live_bytes)
            run.peak_bytes.append(meter.peak_bytes)
        _wait(device)
        run.seconds.append(time.perf_counter() - start)
        print(f"\r{name}: step {step + 1} of {options.steps}, loss {run.losses[-1]:.4f}   ", end="", flush=True)
    print()
    return run


def main(argv: list[str] | None = None) -> None:
    """Both runs, their comparison, the picture."""
    options = _options(argv)
    tokens = parse_tokens(options.tokens)
    corpus = Corpus.find(None, options.seed)
    batches = windows(corpus.training_tokens(tokens * options.steps + 1), tokens, options.steps)
    runner = "cuda-graph" if options.device == "cuda" else "eager"
    runs = [
        train("on the grid", Plan.sequence(parse_tokens(options.segment)), runner, options, batches),
        train("no checkpointing", Plan.none(), "eager", options, batches),
    ]
    grid, plain = runs
    apart = max(abs(a - b) for a, b in zip(grid.losses, plain.losses, strict=True))
    summary = {
        "model": options.model,
        "tokens": tokens,
        "steps": options.steps,
        "segment": parse_tokens(options.segment),
        "loss": {run.name: [run.losses[0], run.losses[-1]] for run in runs},
        "largest_difference": apart,
        "tokens_per_second": {run.name: tokens * run.tokens_per_second for run in runs},
        "peak_bytes": {run.name: max(run.peak_bytes) for run in runs},
        "left_bytes": {run.name: sum(run.left_bytes[3:]) for run in runs},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "commit": _commit(),
        "command": "python benchmarks/train_lm.py "
        + " ".join(f"--{name} {getattr(options, name)}" for name in _SETTINGS),
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {**summary, "runs": [asdict(run) for run in runs]}
    (out / "losses.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(runs, out / "losses.png", f"{options.model}, {tokens:,} tokens a step")
    print(json.dumps(summary, indent=1))


def draw(runs: list[Run], path: Path, title: str) -> None:
    """Loss curves over each other, and how far they are apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for run, style in zip(runs, ("-", "--"), strict=True):
        above.plot(run.losses, style, label=f"{run.name}, peak {max(run.peak_bytes) / 2**30:.2f} GiB")
    above.set(ylabel="nats per byte", title=title)
    above.legend()
    below.plot([a - b for a, b in zip(runs[0].losses, runs[1].losses, strict=True)], color="0.3")
    below.set(xlabel="step", ylabel="difference")
    figure.savefig(path, dpi=150)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="130m", help="130m, 370m, ... or tiny (130m)")
    option("--tokens", default="2^17", help="of a step (2^17)")
    option("--segment", default="2^13", help="tokens of a segment (2^13)")
    option("--steps", type=int, default=200, help="updates (200)")
    option("--lr", type=float, default=1e-3, help="highest learning rate (1e-3)")
    option("--seed", type=int, default=0, help="of weights and of the text's order (0)")
    option("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    option("--out", default="train-lm", help="folder for the results")
    return parser.parse_args(argv)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
