"""Models of the library transformers on a grid; `magc.wrap` finds its way here by the model's class."""

from magc.integrations.transformers.checkpointing import install, uninstall

__all__ = ["install", "uninstall"]
