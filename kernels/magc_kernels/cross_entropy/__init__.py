"""Projection to a vocabulary and cross entropy over it in one operator, which keeps no float32 logits."""
