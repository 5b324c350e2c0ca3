"""Stateful sequence operators: state in, state out, gradients of both.

Each operator is a package with a plain PyTorch `reference`, which needs only torch and defines what every
other implementation must compute:

- `magc_kernels.ssd`: the selective state-space scan of Mamba-2;
- `magc_kernels.mamba3`: the scan of Mamba-3;
- `magc_kernels.selective_scan`: the selective scan of Mamba-1;
- `magc_kernels.conv`: causal depthwise convolution;
- `magc_kernels.norm`: RMSNorm, gated RMSNorm and residual add + RMSNorm.
"""
