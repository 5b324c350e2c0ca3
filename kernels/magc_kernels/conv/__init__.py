"""Causal depthwise convolution with state."""
