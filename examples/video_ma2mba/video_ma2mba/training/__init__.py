"""Training: configuration, optimizer, data parallelism, checkpoints, logs, and the loop."""
