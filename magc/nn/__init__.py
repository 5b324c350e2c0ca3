"""Stateful layers that follow the contract ``y, new_state = layer(x, state)``, with standard state-dict
names.
"""

from magc.nn.block import Mamba2Block
from magc.nn.config import Mamba2Config
from magc.nn.lm import Mamba2LM
from magc.nn.mamba import Mamba, MambaState
from magc.nn.mamba2 import Mamba2
from magc.nn.mamba2_values import Mamba2State
from magc.nn.mamba3 import Mamba3, Mamba3State

__all__ = [
    "Mamba",
    "Mamba2",
    "Mamba2Block",
    "Mamba2Config",
    "Mamba2LM",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "MambaState",
]
