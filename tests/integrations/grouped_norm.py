"""The gated norm of mamba-ssm's Mamba-2 in that of transformers, whatever its release."""

from __future__ import annotations

import importlib
from typing import Any


def norm_in_groups(model: Any) -> Any:
    """Give a Mamba-2 of transformers norms over groups, as mamba-ssm's and this library's are; returns the model.

    transformers 5.17 norms the whole width, which is something else with several groups; 5.24 norms groups, with the code that
    5.17 has for Zamba2.
    """
    norm: Any = importlib.import_module("transformers.models.zamba2.modeling_zamba2").Zamba2RMSNormGated
    for block in model.backbone.layers:
        mixer = block.mixer
        if not hasattr(mixer.norm, "group_size"):
            grouped = norm(
                mixer.intermediate_size, mixer.intermediate_size // mixer.n_groups, mixer.norm.variance_epsilon
            )
            grouped.weight = mixer.norm.weight
            mixer.norm = grouped
    return model
