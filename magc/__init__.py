"""Exact, memory-bounded training of recurrent and state-space models on sequences of any length."""

from magc.ambient import is_output_needed, is_recomputing
from magc.check import CheckReport, check
from magc.checkpoint import GridCheckpoint, grid_checkpoint
from magc.contract import stateless
from magc.integrations.wrap import unwrap, wrap, wrapped
from magc.meter import MemoryMeter
from magc.plan import Plan
from magc.planning import forecast, plan
from magc.source import Segmented
from magc.tiers import Tier

__all__ = [
    "CheckReport",
    "GridCheckpoint",
    "MemoryMeter",
    "Plan",
    "Segmented",
    "Tier",
    "check",
    "forecast",
    "grid_checkpoint",
    "is_output_needed",
    "is_recomputing",
    "plan",
    "stateless",
    "unwrap",
    "wrap",
    "wrapped",
]
