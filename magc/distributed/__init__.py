"""Grids on several processes: FSDP2's parameter groups gathered once per pass, and plans agreed among ranks."""
