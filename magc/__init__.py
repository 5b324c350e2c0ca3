"""Exact, memory-bounded training of recurrent and state-space models on sequences of any length."""

from magc.ambient import is_recomputing
from magc.checkpoint import GridCheckpoint, grid_checkpoint
from magc.contract import stateless
from magc.plan import Plan
from magc.source import Segmented
from magc.tiers import Tier

__all__ = ["GridCheckpoint", "Plan", "Segmented", "Tier", "grid_checkpoint", "is_recomputing", "stateless"]
