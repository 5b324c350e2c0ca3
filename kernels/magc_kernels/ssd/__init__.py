"""Selective state-space scan of Mamba-2 (SSD)."""
