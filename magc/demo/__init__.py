"""``magc demo``: train a byte-level Mamba-2 on long text in a small, fixed memory, and say what it took."""

from magc.demo.app import main

__all__ = ["main"]
