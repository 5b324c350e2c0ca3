"""Whole training steps of Video-Ma²mba at full size, random weights, on one GPU: memory and time by minutes of video.

    python benchmarks/bench_video.py --model 3.1b --minutes 10,30,60,120 --budget 8GiB --out bench-video-3.1b
    python benchmarks/bench_video.py --model 0.7b --minutes 360 --budget 8GiB --out bench-video-0.7b
    python benchmarks/bench_video.py --model tiny --minutes 0.2,0.5 --segment 64 --multiple 64 --device cpu --out bench-video
    python benchmarks/bench_video.py --draw bench-video-3.1b/video.json bench-video-0.7b/video.json --out bench-video

``3.1b`` is Mamba-2 2.7b with a head of its own, ``0.7b`` Mamba-2 370m, each with CLIP-ViT-L/14 at 336 pixels. All of it is
trained as ``examples/video_ma2mba/configs/stage2.yaml`` says: bf16 weights, AdamW with float32 master copies and moments,
clipping, by the trainer's own code, one sequence a step. The frames (one a second, bytes in host memory), one question and
its answer are random; the loss is the answer's. ``--budget`` is memory over weights, optimizer and gradient sums: the sums
are added to what magc is given. Run it from the repository's root; it needs the ``video`` extra.

For every length, shortest first: measure the layers and plan; run short sequences by that plan, which compiles kernels,
captures cells and makes the optimizer's state; then meter and time one whole step. ``video.json`` is written after every
length, ``video.png`` in the end. Memory over weights, gradients and optimizer is what is allocated less those that exist at
that moment, at its largest in forward and backward. A step's time is in four parts: forward and backward of the grid, the
gradients' norm, clipping and update. The tower's share of the first two cannot be timed inside the grid, so it is estimated:
tower and projector alone are timed on a few frames, forward, and forward with backward (which runs each layer once more),
and multiplied by the frames that the plan's schedule runs and back-propagates; a frame that a border cuts is encoded in both
segments and counts twice. On the CPU metering slows the step down.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, the folder of this file alone is there

from benchmarks.video_report import HEADER, OPTIMIZER, Row, draw
from magc.sizes import parse_tokens

_MODELS = ("3.1b", "1.8b", "0.7b", "tiny")
_BUDGET = "8GiB"


def main(argv: list[str] | None = None) -> None:
    """Measure, write, print and draw; or draw what was measured."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _options(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.draw:
        read = [json.loads(Path(path).read_text(encoding="utf-8")) for path in options.draw]
        rows = [Row.from_dict(values) for record in read for values in record["rows"]]
        print("\n".join([HEADER, *map(str, rows)]))
    else:
        rows = _measure(options, out, shlex.join(arguments))
    draw(rows, out / "video.png")


def _measure(options: argparse.Namespace, out: Path, arguments: str) -> list[Row]:
    # Here, since it needs the `video` extra: pytest imports all benchmarks to collect them, with or without.
    from benchmarks.video_case import VideoBench
    from benchmarks.video_setup import stage2
    from video_ma2mba.training.config import MemoryConfig
    from video_ma2mba.training.ranks import joined

    memory = MemoryConfig(
        budget=None if options.segment else options.budget or _BUDGET,
        segment=parse_tokens(options.segment) if options.segment else None,
        host_budget=options.host_budget,
        runner=options.runner,
    )
    config = stage2(memory, frame_chunk=options.frame_chunk, multiple=options.multiple, device=options.device)
    rows: list[Row] = []
    with joined(options.device) as ranks:
        bench = VideoBench(options.model, config, ranks)
        record: dict[str, Any] = {
            "model": options.model,
            "trained": bench.trained,
            "optimizer": OPTIMIZER,
            "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
            "command": f"python benchmarks/bench_video.py {arguments}",
            "config": config.to_json(),
        }
        print(
            f"{options.model}: {bench.trained:,} trained parameters on {record['device']}. {OPTIMIZER}.\n{HEADER}",
            flush=True,
        )
        for minutes in sorted(float(each) for each in options.minutes.split(",")):
            rows.append(bench.measure(minutes, _tell))
            written = {**record, "rows": [row.as_dict() for row in rows]}
            (out / "video.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
            print(rows[-1], flush=True)
            if rows[-1].eager:
                print(f"not captured: {rows[-1].eager}", flush=True)
    return rows


def _tell(what: str) -> None:
    """Beside the table, so that a run that is cut off has said where it was."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", choices=_MODELS, default="3.1b", help="of the paper's sizes, or tiny (3.1b)")
    option("--minutes", default="10,30,60,120", help="of video, at one frame a second (10,30,60,120)")
    plan = parser.add_mutually_exclusive_group()
    plan.add_argument("--budget", help=f"of a step over weights, optimizer and gradient sums; magc plans ({_BUDGET})")
    plan.add_argument("--segment", help="or a plan by hand: all layers on so many tokens at a time, e.g. 2^14")
    option("--host-budget", help="host memory for checkpoints, with a budget (none)")
    option("--runner", choices=("eager", "cuda-graph"), default="eager", help="of magc's cells (eager)")
    option("--frame-chunk", type=int, default=32, help="frames that go through the tower at once (32)")
    option("--multiple", type=int, default=4096, help="of tokens, to which sequences are padded (4096)")
    option("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    option("--out", default="bench-video", help="folder for the results")
    option("--draw", nargs="+", metavar="FILE", help="measure nothing: table and picture of these results")
    return parser.parse_args(arguments)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
