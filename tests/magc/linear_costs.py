"""A cost model of round numbers, for tests of what is said of a plan."""

from __future__ import annotations

from magc.cost import CostModel, StageCost, StageSample


def linear_costs(layers: int = 8, *, host_is_device: bool = False) -> CostModel:
    """Layers that keep 1000 bytes and take 10 us for each token, with states of 5 kB and 20 kB of gradients."""
    samples = tuple(
        StageSample(
            tokens=tokens,
            output_bytes=100 * tokens,
            kept_bytes=1000 * tokens + 5000,
            passed_bytes=0,
            run_peak=300 * tokens + 5000,
            record_peak=1100 * tokens + 5000,
            backward_peak=400 * tokens,
            run_seconds=2e-6 * tokens,
            record_seconds=2e-6 * tokens,
            backward_seconds=6e-6 * tokens,
        )
        for tokens in (64, 256)
    )
    # Not equal objects: the cost model tells stages apart by identity.
    stages = tuple(StageCost(samples, 5000, 20_000, 10_000) for _ in range(layers))
    return CostModel(stages, input_bytes_per_token=100.0, host_is_device=host_is_device, longest_sample=256)
