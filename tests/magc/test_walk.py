"""Walks over modules find what torch's own find, in the same order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from magc.walk import modules_of, own_buffers, own_parameters, own_tensors


class Nest(nn.Module):
    """Shared modules, a child that is None, a parameter and a buffer that are None, a module inside itself twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
        self.again = self.first[0]
        self.none = None
        self.register_module("missing", None)
        self.register_parameter("absent", None)
        self.register_buffer("nothing", None)
        self.register_buffer("table", torch.zeros(2))
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.deep = nn.ModuleList([nn.ModuleDict({"a": nn.LSTM(2, 2), "b": self.first}), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return x


MODULES = [Nest(), nn.Linear(1, 1), nn.Sequential(), nn.TransformerEncoderLayer(4, 2)]


@pytest.mark.parametrize("root", MODULES, ids=lambda root: type(root).__name__)
def test_modules_come_as_torch_has_them(root: nn.Module) -> None:
    found, expected = modules_of(root), list(root.modules())
    assert len(found) == len(expected)
    assert all(one is other for one, other in zip(found, expected, strict=True))


def test_parameters_and_buffers_come_as_torch_has_them() -> None:
    for module in Nest().modules():
        parameters, buffers = list(module.named_parameters(recurse=False)), list(module.named_buffers(recurse=False))
        assert [name for name, _ in own_parameters(module)] == [name for name, _ in parameters]
        assert [name for name, _ in own_buffers(module)] == [name for name, _ in buffers]
        found = list(own_tensors(module))
        assert len(found) == len(parameters) + len(buffers)
        assert all(one is other for (_, one), (_, other) in zip(found, [*parameters, *buffers], strict=True))
