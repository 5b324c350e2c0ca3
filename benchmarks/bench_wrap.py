"""What `magc.wrap` gives to models of others: peak over weights and gradients, and speed, wrapped and not.

    python benchmarks/bench_wrap.py --out bench-wrap                    # on a GPU
    python benchmarks/bench_wrap.py --device cpu --small --out bench-wrap

``lstm``: ``torch.nn.LSTM`` of 8 layers of 1024, at the longest power of two that runs without magc, wrapped with an eighth
of the memory that took. ``mamba2``: transformers' Mamba-2 at the 2.7B shape, 2^18 tokens, loss in the grid, within 8 GiB.
Writes ``wrap.json`` and prints a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import magc
from magc.bench.work import is_out_of_memory
from magc.meter import MemoryMeter
from magc.units import format_bytes, parse_bytes

_STEPS = 3
_PATIENCE = 10.0
"""Seconds; no further step is timed when those before took more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        case: which model, wrapped or not.
        tokens: of the sequence.
        peak_bytes: over weights and gradients.
        seconds: of a training step, the median.
        budget: that was given to `magc.wrap`, None without.
        plan: that it chose.
    """

    case: str
    tokens: int
    peak_bytes: int
    seconds: float
    budget: int | None = None
    plan: str = ""

    def __str__(self) -> str:
        """A row of a markdown table."""
        speed = f"{self.tokens / self.seconds:,.0f}"
        return f"| {self.case} | {self.tokens:,} | {format_bytes(self.peak_bytes)} | {speed} | {self.plan} |"


def measure(model: nn.Module, step: Callable[[], None], device: torch.device) -> tuple[int, float]:
    """Peak over weights and gradients, and seconds, of a step. The first one compiles, plans and sets up."""
    step()
    model.zero_grad(set_to_none=True)
    _wait(device)
    start = time.perf_counter()
    with MemoryMeter(device) as meter:
        step()
        _wait(device)
    # On a GPU the allocator counts and takes no time; on a CPU the meter slows the step down.
    seconds = [time.perf_counter() - start] if device.type == "cuda" else []
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    while not seconds or (len(seconds) < _STEPS and sum(seconds) < _PATIENCE):
        model.zero_grad(set_to_none=True)
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return meter.peak_bytes - gradients, statistics.median(seconds)


def lstm(device: torch.device, small: bool) -> list[Row]:
    """As long as it runs, then wrapped with an eighth of the memory."""
    layers, width, powers = (4, 32, range(9, 7, -1)) if small else (8, 1024, range(20, 13, -1))
    torch.manual_seed(0)
    model = nn.LSTM(width, width, layers, batch_first=True).to(device)
    for power in powers:
        x = torch.randn(1, 2**power, width, device=device)

        def step(x: torch.Tensor = x) -> None:
            model(x)[0].square().mean().backward()

        try:
            peak, seconds = measure(model, step, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            model.zero_grad(set_to_none=True)
            _free(device)
            continue
        budget = peak // 8 + sum(parameter.numel() * 4 for parameter in model.parameters())
        plain = Row("LSTM", 2**power, peak, seconds)
        magc.wrap(model, budget=budget)
        peak, seconds = measure(model, step, device)
        return [plain, Row("LSTM, wrapped", 2**power, peak, seconds, budget, _plan(model))]
    raise SystemExit("the LSTM ran out of memory at every length")


def mamba2(device: torch.device, small: bool) -> list[Row]:
    """Wrapped only: without, its intermediates take hundreds of kilobytes for each token and layer."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes: dict[str, Any] = (
        {"hidden_size": 64, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 16, "state_size": 16, "vocab_size": 256}
        if small
        else {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80, "head_dim": 64, "vocab_size": 50277}
    )
    tokens, budget = (2**10, "16MiB") if small else (2**18, "8GiB")
    config = Mamba2Config(**{"state_size": 128, "n_groups": 1, "expand": 2, **sizes})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = Mamba2ForCausalLM(config)
    model.to(dtype=dtype).train()
    # Gradients are summed in float32 and the budget counts them; the aim is over weights and gradients.
    sums = sum(parameter.numel() * 4 for parameter in model.parameters())
    given = parse_bytes(budget) + sums
    magc.wrap(model, budget=given, host_budget=None if small else "64GiB")
    ids = torch.randint(3, config.vocab_size, (1, tokens), device=device)
    peak, seconds = measure(model, lambda: model(input_ids=ids, labels=ids).loss.backward(), device)
    return [Row("transformers' Mamba-2, wrapped", tokens, peak, seconds, given, _plan(model))]


CASES = {"lstm": lstm, "mamba2": mamba2}


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny models, to try it")
    parser.add_argument("--out", default="bench-wrap", help="folder for the results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    rows: list[Row] = []
    for name in options.cases.split(","):
        rows += CASES[name](device, options.small)
        _free(device)
        _write(Path(options.out), device, rows)
    print("| case | tokens | peak | tokens/s | plan |\n| --- | --- | --- | --- | --- |")
    print("\n".join(map(str, rows)))


def _write(out: Path, device: torch.device, rows: list[Row]) -> None:
    """After every case, so that a run that is cut off leaves what it measured."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    (out / "wrap.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _plan(model: nn.Module) -> str:
    lines = magc.wrapped(model).explain().splitlines()
    return next(line.removeprefix("plan").strip() for line in lines if line.startswith("plan"))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
