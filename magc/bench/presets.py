"""Questions that are asked often, as options of ``magc bench``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """A set of cases by name.

    Attributes:
        question: that it answers.
        parts: options of ``magc bench``, a tuple for each part, measured one after another. Options on the command line
            come after these, and the last one counts.
    """

    question: str
    parts: tuple[tuple[str, ...], ...]


_BIG = ("--models", "2.7b")
_WITHIN = ("--budget", "6GiB", "--host-budget", "112GiB")
_BEYOND = ("--budget", "8GiB", "--host-budget", "112GiB")

PRESETS: dict[str, Preset] = {
    "table3": Preset(
        "The paper's Table 3 for its three sizes: every method, and the planner within what the paper's method took.",
        (
            ("--models", "2.7b,1.3b,370m", "--lengths", "2^10..2^17", "--methods", "none,per-layer,sqrt,paper"),
            ("--models", "2.7b,1.3b,370m", "--lengths", "2^10..2^21", "--methods", "auto", "--budget", "paper"),
        ),
    ),
    "flat": Preset(
        "Is memory flat, and speed with it? One budget from 2^14 to 2^20 tokens, a larger one beyond, with host memory; "
        "under both losses.",
        (
            (*_BIG, "--lengths", "2^14..2^20", "--methods", "auto", *_WITHIN),
            (*_BIG, "--lengths", "2^14..2^18", "--methods", "auto", *_WITHIN, "--head", "full"),
            (*_BIG, "--lengths", "2^21,2^22", "--methods", "auto", *_BEYOND),
            (*_BIG, "--lengths", "2^19,2^20", "--methods", "auto", *_WITHIN, "--head", "full"),
        ),
    ),
    "frontier": Preset(
        "What does memory buy? Speed by budget at 2^14 tokens, between the usual methods.",
        (
            (
                *_BIG,
                "--lengths",
                "2^14",
                "--methods",
                "auto",
                "--budget",
                "40GiB,6GiB,24GiB,12GiB,3GiB,32GiB,16GiB,8GiB",
            ),
            (*_BIG, "--lengths", "2^14", "--methods", "auto", "--budget", "40GiB,24GiB", "--keep", "projection"),
            (*_BIG, "--lengths", "2^14", "--methods", "none,per-layer,sqrt,paper,minimum"),
        ),
    ),
    "runners": Preset(
        "What do CUDA graphs give, by the size of segments?",
        (
            (
                *(*_BIG, "--lengths", "2^15", "--methods", "plan", "--runner", "cuda-graph,eager"),
                *("--plan", "tokens=512", "--plan", "tokens=1024", "--plan", "tokens=2048", "--plan", "tokens=4096"),
            ),
        ),
    ),
    "smoke": Preset(
        "Does it work? Four narrow layers, every method, in half a minute on a CPU.",
        (("--models", "tiny", "--lengths", "2^9..2^11", "--budget", "1MiB,4MiB", "--plan", "tokens=256,keep=2"),),
    ),
}
