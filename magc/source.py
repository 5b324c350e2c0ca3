"""Where segments come from: tensors cut on demand, or the user's own source (frames on disk, a tokenised file)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from magc.errors import InputError
from magc.tree import Flat, PyTree, describe, flatten


@runtime_checkable
class Segmented(Protocol):
    """Anything that yields the tokens from ``start`` to ``stop``; nothing longer than a segment need exist at once."""

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def segment(self, start: int, stop: int) -> PyTree:
        """The pytree of tensors for tokens ``start`` to ``stop``; the same tensors every time it is asked."""
        ...


def is_segmented(value: object) -> TypeGuard[Segmented]:
    """Whether ``value`` is a source of segments rather than a pytree."""
    return isinstance(value, Segmented) and not isinstance(value, Tensor | Sequence)


class SegmentSource:
    """A pytree of tensors with a sequence axis, or a `Segmented` object, seen segment by segment on one device.

    Args:
        what: how errors name it.
        value: the pytree or the `Segmented` object.
        seq_dim: the sequence axis.
        device: where segments are wanted; None leaves them where they are.

    Raises:
        InputError: no tensor in it, a tensor without the sequence axis, ragged or zero lengths, a negative ``seq_dim``.
    """

    def __init__(self, what: str, value: PyTree, seq_dim: int, device: torch.device | None) -> None:
        if seq_dim < 0:
            raise InputError(
                f"seq_dim={seq_dim}: count the sequence axis from the front (0, 1, ...), since tensors of a pytree may differ "
                f"in their number of axes"
            )
        self.what = what
        self._device = device
        self._seq_dim = seq_dim
        self._own = value if is_segmented(value) else None
        self.flat = Flat((), flatten(what, ()).spec) if self._own is not None else flatten(what, value)
        self.length = len(self._own) if self._own is not None else self._tensor_length()
        if self.length < 1:
            raise InputError(f"{what} has {self.length} tokens along axis {seq_dim}; a sequence needs at least one")

    def _tensor_length(self) -> int:
        lengths: dict[str, int] = {}
        for path, leaf in zip(self.flat.paths(), self.flat.leaves, strict=True):
            if leaf is None:
                continue
            if leaf.dim() <= self._seq_dim:
                raise InputError(
                    f"{self.what}{path} has shape {tuple(leaf.shape)}, which has no axis {self._seq_dim}; the sequence "
                    f"axis is seq_dim={self._seq_dim}: add the axis, or pass another seq_dim"
                )
            lengths[path] = leaf.shape[self._seq_dim]
        if not lengths:
            raise InputError(f"{self.what} holds no tensor")
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{self.what}{path}: {length}" for path, length in lengths.items())
            raise InputError(
                f"ragged lengths along axis {self._seq_dim} ({shown}); pad to one length, or pack the sequences and pass "
                f"seq_idx"
            )
        return next(iter(lengths.values()))

    def segment(self, start: int, stop: int) -> Flat:
        """Tokens ``start`` to ``stop``: views of the tensors, moved to the device if they are elsewhere.

        Raises:
            InputError: the user's own source gave another number of tokens, or a tensor that requires a gradient.
        """
        if self._own is not None:
            part = flatten(self.what, self._own.segment(start, stop))
            self._check(part, start, stop)
        else:
            part = self.flat.map(lambda leaf: leaf.detach().narrow(self._seq_dim, start, stop - start))
        device = self._device
        return part if device is None else part.map(lambda leaf: leaf.to(device, non_blocking=True))

    def _check(self, part: Flat, start: int, stop: int) -> None:
        for path, leaf in zip(part.paths(), part.leaves, strict=True):
            if leaf is None:
                continue
            if leaf.dim() <= self._seq_dim or leaf.shape[self._seq_dim] != stop - start:
                raise InputError(
                    f"{self.what}.segment({start}, {stop}) gave{path} {describe(leaf)}, which is not {stop - start} tokens "
                    f"along axis {self._seq_dim}; give exactly the tokens asked for"
                )
            if leaf.requires_grad:
                raise InputError(
                    f"{self.what}.segment({start}, {stop}) gave{path} a tensor that requires a gradient, but none flows to "
                    f"a source of segments; detach() it, pass a tensor, or make its trainable part the stem"
                )
