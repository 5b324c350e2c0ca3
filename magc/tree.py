"""Pytrees flattened to positional tensors.

The engine never saves a tensor inside a list or dict: torch's saved-tensor bookkeeping sees positional tensors only, so
nested ones would escape offload hooks, be kept alive, and corrupt gradients silently under in-place changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from magc.errors import InputError

PyTree = Any
"""A tensor, None, or nested tuples, lists, dicts and named tuples of them."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A pytree as its tensors (None where a leaf is None) and its structure."""

    leaves: tuple[Tensor | None, ...]
    spec: pytree.TreeSpec

    def tree(self) -> PyTree:
        """The pytree."""
        return pytree.tree_unflatten(list(self.leaves), self.spec)

    def with_leaves(self, leaves: Sequence[Tensor | None]) -> Flat:
        """The same structure around other tensors."""
        return Flat(tuple(leaves), self.spec)

    def map(self, function: Callable[[Tensor], Tensor]) -> Flat:
        """The same structure with ``function`` applied to each tensor."""
        return Flat(tuple(None if leaf is None else function(leaf) for leaf in self.leaves), self.spec)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if leaf is not None]

    def paths(self) -> list[str]:
        """A name for each leaf, e.g. ``[0]['mask']``; the empty string for a bare tensor."""
        keyed, _ = pytree.tree_flatten_with_path(self.tree(), is_leaf=lambda node: node is None)
        return [pytree.keystr(path) for path, _ in keyed]


def flatten(what: str, tree: PyTree) -> Flat:
    """Flatten ``tree``.

    Args:
        what: how an error names it, e.g. ``"x"``.
        tree: the pytree.

    Raises:
        InputError: a leaf is neither a tensor nor None.
    """
    leaves, spec = pytree.tree_flatten(tree, is_leaf=lambda node: node is None)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise InputError(f"{what} holds a {type(leaf).__name__} ({leaf!r}); every leaf must be a tensor or None")
    return Flat(tuple(leaves), spec)


def is_differentiable(tensor: Tensor | None) -> bool:
    """Whether a gradient of the tensor makes sense."""
    return tensor is not None and (tensor.is_floating_point() or tensor.is_complex())


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def describe(tensor: Tensor | None) -> str:
    """Shape, dtype and device in words."""
    if tensor is None:
        return "None"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def storage_id(tensor: Tensor) -> int:
    """Identity of the memory behind a tensor."""
    # Meta and empty tensors have no address; each then counts as memory of its own.
    return tensor.untyped_storage().data_ptr() or id(tensor)


def compact(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is a view that would keep a larger storage alive."""
    storage = tensor.untyped_storage()
    return tensor.clone() if storage.nbytes() > tensor.numel() * tensor.element_size() else tensor


def version(tensor: Tensor) -> int:
    """The tensor's in-place version; inference tensors have none and count as unchanged."""
    return 0 if tensor.is_inference() else tensor._version


def duplicate(tensor: Tensor) -> Tensor:
    """A differentiable copy that operators treat like the tensor: its axes in the same order, gaps where it has gaps,
    and every element at the same address modulo 64 bytes.

    ``clone`` closes the gaps of a segment cut from a longer sequence and aligns its start. Operators then fuse other
    axes, matrix libraries take other paths, and both round differently. A tensor with elements that share memory is
    returned as it is: torch refuses to write into it.
    """
    line = 64 // tensor.element_size()
    strides = [1] * tensor.dim()
    # Elements up to the last one so far, and the stride with which the next axis would follow without a gap; of both.
    reach, dense, copy_reach, copy_dense = 1, 1, 1, 1
    for axis in sorted(range(tensor.dim()), key=tensor.stride):
        size, stride = tensor.shape[axis], tensor.stride(axis)
        if size <= 1:
            continue
        if stride < reach:
            return tensor
        if stride == dense:
            strides[axis] = copy_dense
        else:
            strides[axis] = copy_reach + (stride - copy_reach) % line
            strides[axis] += line if strides[axis] == copy_dense else 0
        reach, dense = reach + (size - 1) * stride, size * stride
        copy_reach, copy_dense = copy_reach + (size - 1) * strides[axis], size * strides[axis]
    start = tensor.data_ptr() % 64 // tensor.element_size()
    with torch.no_grad():
        memory = torch.empty(start + copy_reach, dtype=tensor.dtype, device=tensor.device)
        copy = memory.as_strided(tensor.shape, strides, start).detach()
    return copy.copy_(tensor)
