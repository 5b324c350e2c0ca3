"""The model: vision tower, projector and Mamba-2, in the parts that magc's grid takes."""
