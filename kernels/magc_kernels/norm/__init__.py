"""RMSNorm, gated RMSNorm and residual add + RMSNorm."""
