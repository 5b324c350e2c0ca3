"""Layers and models of flash-linear-attention on a grid; `magc.wrap` finds its way here by the model's class."""

from magc.integrations.fla.layer import FLALayer, FLAState

__all__ = ["FLALayer", "FLAState"]
