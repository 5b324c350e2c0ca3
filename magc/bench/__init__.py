"""``magc bench``: memory and speed of training steps by length, model and method, as tables and pictures."""

from magc.bench.app import main

__all__ = ["main"]
