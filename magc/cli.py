"""The command line: ``magc plan``, ``magc doctor``, ``magc demo``, ``magc bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from magc.errors import MagcError
from magc.units import format_bytes, format_count, parse_bytes

if TYPE_CHECKING:
    from magc.plan import Plan
    from magc.sizes import SizedModel

_EPILOG = """\
examples:
  magc plan --model mamba2-2.7b --seq-len 2^20 --budget 40GiB
  magc plan --model mamba2-1.3b --seq-len 262144 --budget 24GiB --host-budget 64GiB --plot plan.png
  magc plan --model mamba2-2.7b --seq-len 2^18 --budget 40GiB --paper
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0; 1 after a self-test that fails; 2 after an error of magc, which goes to stderr in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] in (["demo"], ["bench"]):  # read their own options
            return int(import_module(f"magc.{arguments[0]}").main(arguments[1:]) or 0)
        options = _parser().parse_args(arguments)
        return _doctor(options.self_test) if options.command == "doctor" else _plan(options)
    except MagcError as error:
        print(f"magc: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="magc", description="Exact, memory-bounded training of recurrent and state-space models."
    )
    parser.add_argument("--version", action="version", version=f"magc {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("demo", help="train on a long sequence in a small, fixed memory", add_help=False)
    commands.add_parser("bench", help="measure memory and speed by length and method", add_help=False)
    doctor = commands.add_parser("doctor", help="what is installed, what runs natively here, and why the rest does not")
    doctor.add_argument(
        "--self-test",
        action="store_true",
        help="instead, run the Triton kernels in every launch configuration that is shipped for this GPU, against float64",
    )
    plan = commands.add_parser(
        "plan",
        help="plan for a published Mamba-2 size within a memory budget",
        description="Plan for a published Mamba-2 size. No weights are made and nothing is computed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("--model", required=True, help="mamba2-130m, -370m, -780m, -1.3b or -2.7b")
    plan.add_argument("--seq-len", required=True, metavar="N", help="tokens: 1048576, 2^20, 1Mi (2^20) or 1M (10^6)")
    plan.add_argument(
        "--budget", required=True, metavar="SIZE", help="device memory beyond weights and optimizer state, e.g. 24GiB"
    )
    plan.add_argument("--host-budget", metavar="SIZE", help="host memory for checkpoints; none without this")
    plan.add_argument("--disk", action="store_true", help="allow checkpoints on disk")
    plan.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at a time (1)")
    plan.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="weights and activations (bf16)"
    )
    plan.add_argument(
        "--head", choices=("full", "last"), default="full", help="loss of every token, or of the last only (full)"
    )
    plan.add_argument("--plot", metavar="PATH", help="draw the plan into a .png, .svg or .pdf file")
    plan.add_argument("--paper", action="store_true", help="set the paper's constants, cells and memory beside it")
    return parser


def _version() -> str:
    try:
        return metadata.version("magc")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _doctor(self_test: bool) -> int:
    from magc import doctor

    if not self_test:
        print(doctor.as_text(doctor.examine()))
        return 0
    tested, failures = doctor.self_test(lambda line: print(line, file=sys.stderr, flush=True))
    print(doctor.self_test_as_text(tested, failures))
    return 1 if failures else 0


def _plan(options: argparse.Namespace) -> int:
    from magc.report import paragraph
    from magc.sizes import DTYPES, parse_tokens, trace

    seq_len = parse_tokens(options.seq_len)
    budget = parse_bytes(options.budget)
    host_budget = 0 if options.host_budget is None else parse_bytes(options.host_budget)
    if options.plot is not None:
        from magc.plot import make_figure

        make_figure(Path(options.plot))  # says now what it would say in the end
    dtype = DTYPES[options.dtype]
    progress = _progress if sys.stderr.isatty() else None
    model = trace(options.model, batch=options.batch, dtype=dtype, head=options.head, progress=progress)
    if progress is not None:
        print("\r\033[K", end="", file=sys.stderr)
    plan = model.plan(seq_len, budget=budget, host_budget=host_budget, disk=options.disk)
    weights = (
        f"{model.parameters:,} parameters, {format_bytes(model.weight_bytes)} of weights in {options.dtype} (they and "
        f"the optimizer's state come on top of the budget)"
    )
    print(paragraph("model", [f"{model.name}, {options.batch} x {seq_len:,} tokens: {weights}"]))
    print(plan.explain())
    if options.paper:
        print(paragraph("paper", _paper(model, plan, seq_len)))
    if options.plot is not None:
        print(paragraph("plot", [str(plan.plot(options.plot))]))
    return 0


def _progress(what: str) -> None:
    print(f"\r\033[K{what} ...", end="", file=sys.stderr, flush=True)


def _paper(model: SizedModel, plan: Plan, seq_len: int) -> list[str]:
    """The paper's constants, its choice of cells and their memory by its own equations, beside this plan."""
    from magc import paper
    from magc.plan import Plan

    config = model.config
    costs = paper.PaperCosts.from_mamba2(
        config.d_model, config.d_state, config.expand, config.d_conv, config.ngroups, config.headdim
    )
    layers, tokens = paper.choose(config.n_layer, seq_len, costs)
    elements = model.batch * paper.memory_elements(config.n_layer, seq_len, layers, tokens, costs)
    same = model.forecast(Plan(layers=layers, tokens=tokens), seq_len).forecast
    ours = plan.forecast
    assert same is not None
    assert ours is not None
    lines = [
        f"arXiv 2411.19460, Table 7, elements of 2 bytes for each layer: C_L {costs.c_layer:,}, C_S "
        f"{costs.c_sequence:,}, C_grid {costs.c_grid:,}, C_state {costs.c_state:,}",
        f"its choice: cells of {layers} layers x {tokens:,} tokens, {format_bytes(2 * elements)} by Eq. 12-16 (without "
        f"gradients of parameters)",
        f"those cells here: {format_bytes(same.peak_bytes)} predicted peak with gradients of parameters, "
        f"{format_count(same.tokens_per_second)} tokens/s, {same.estimate.forwards_per_cell:.2f} forwards per cell",
        f"this plan: {format_bytes(ours.peak_bytes)} predicted peak, {format_count(ours.tokens_per_second)} tokens/s, "
        f"{ours.estimate.forwards_per_cell:.2f} forwards per cell",
    ]
    measured = paper.PAPER_TABLE_3["ma-gc"].get(model.name.removeprefix("mamba2-"), ())
    power = seq_len.bit_length() - 1
    if seq_len == 1 << power and 0 <= power - 10 < len(measured) and model.batch == 1:
        lines.append(
            f"measured in the paper (Table 3, A100 80GB, without weights and gradients): {measured[power - 10]} GB"
        )
    return lines
