"""Benchmarks from local copies in their published formats, by their published rules."""
