"""Selective state-space scan of Mamba-1."""
