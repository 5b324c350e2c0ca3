"""Scan of Mamba-3: trapezoidal steps, a rotating state, one or several inputs per head."""
