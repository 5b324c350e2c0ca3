"""Where a checkpoint lives between the forward and the backward pass."""

from __future__ import annotations

import enum


class Tier(enum.StrEnum):
    """Storage tier of a checkpoint, fastest first. ``Tier("host") is Tier.HOST``."""

    DEVICE = "device"
    """On the device that computes."""

    HOST = "host"
    """In host memory: pinned if the device is a GPU; the device's own memory if it is the CPU."""

    DISK = "disk"
    """In a file on a local disk."""
