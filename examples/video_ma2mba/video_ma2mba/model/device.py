"""Where a model runs, tried before anything is loaded."""

from __future__ import annotations

import torch

from video_ma2mba.errors import ConfigError


def usable_device(name: str | None = None) -> torch.device:
    """The device of a name; None is the GPU if there is one.

    Raises:
        ConfigError: there is no such device, or it cannot be used here.
    """
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch raises either, by what it was built with
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ConfigError(f"device={wanted!r} cannot be used here ({reason}); give another, e.g. cpu") from error
    return device
