"""The whole Mamba-2 layer, with or without the residual addition and norm in front of it, as one operator."""
