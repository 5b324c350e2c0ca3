"""Parameter gradients summed over cells, in fp32 by default, and delivered once.

Summing hundreds of segments' gradients in bf16 loses most of the mantissa (relative error about 2.7e-2 at 512 segments,
2.9e-3 in fp32), so each parameter has one accumulator in at least fp32. A parameter that only one cell uses needs none:
its gradient is delivered as it is.

Two ways in: gradients that autograd makes are added by `GradSink.add`; operators that know how (``magc.nn``'s, see
``magc_kernels._accumulate``) fetch the sum by the proxy's ``grad_sum()`` and add to it inside their own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, overload

import torch
from torch import Tensor, nn


class GradSink(Protocol):
    """Takes a parameter's gradient as soon as a cell has made it."""

    def add(self, index: int, grad: Tensor) -> None:
        """Take a gradient of parameter ``index``."""
        ...

    def total(self, index: int) -> Tensor | None:
        """The sum of parameter ``index``'s gradients, to be added to in place; None if there is to be no sum."""
        ...


class LentSums(GradSink, Protocol):
    """Sums that outlive one backward, and gradients that one cell makes."""

    def start_backward(self, single: Sequence[bool]) -> None:
        """Set sums to zero and forget gradients; ``single`` says of which parameters one cell makes it."""
        ...

    def held(self, index: int) -> Tensor | None:
        """Memory for the gradient of parameter ``index``, if there is any yet."""
        ...

    def result(self, index: int) -> Tensor | None:
        """The gradient of parameter ``index``; None if none was made."""
        ...


class GradAccumulator:
    """Sums of the gradients of a stack's parameters.

    Args:
        params: the parameters.
        dtype: the accumulation dtype; a parameter of higher precision accumulates in its own.
        single: whether every parameter gets exactly one gradient, which is then kept in its own dtype.
        lent: sums that belong to somebody else and stay where they are (CUDA graphs hold their addresses); these are
            zeroed first, and what is delivered is a copy.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        dtype: torch.dtype,
        single: Sequence[bool],
        lent: LentSums | None = None,
    ) -> None:
        self._lent = lent
        self._dtypes = [
            param.dtype if alone else torch.promote_types(param.dtype, dtype)
            for param, alone in zip(params, single, strict=True)
        ]
        self._params = tuple(params)
        self._single = tuple(single)
        # A parameter says by ``grad_dtype`` (torch 2.10) if its gradient may be more precise than itself.
        self._delivered = [getattr(param, "grad_dtype", None) or param.dtype for param in params]
        self._sums: list[Tensor | None] = [None] * len(params)

    def start(self) -> None:
        """Call before the first gradient."""
        if self._lent is not None:
            self._lent.start_backward(self._single)

    def add(self, index: int, grad: Tensor) -> None:
        """Add a gradient."""
        if self._lent is not None:
            self._lent.add(index, grad)
            return
        total = self._sums[index]
        if total is None:
            # A copy, unless nothing is ever added: autograd may hand two parameters views of one gradient.
            self._sums[index] = grad if self._single[index] else grad.to(self._dtypes[index], copy=True)
        else:
            total.add_(grad)

    def total(self, index: int) -> Tensor | None:
        """The sum, made when it is first asked for; None for a parameter with one gradient."""
        if self._lent is not None:
            return self._lent.total(index)
        if self._single[index]:
            return None
        total = self._sums[index]
        if total is None:
            total = torch.zeros_like(self._params[index], dtype=self._dtypes[index], requires_grad=False)
            self._sums[index] = total
        return total

    def deliver(self) -> list[Tensor | None]:
        """The sums in the parameters' dtypes, None for parameters without a gradient; the accumulator is empty then."""
        delivered: list[Tensor | None] = []
        for index, dtype in enumerate(self._delivered):
            if self._lent is not None:
                total = self._lent.result(index)
                delivered.append(None if total is None else total.to(dtype, copy=True))
                continue
            total, self._sums[index] = self._sums[index], None
            delivered.append(None if total is None else total.to(dtype))
        return delivered


class Proxy(nn.Parameter):
    """A leaf that shares a parameter's memory; its ``grad_sum()`` is what operators add gradients to themselves."""

    sink: GradSink
    place: int

    def grad_sum(self) -> Tensor | None:
        """See `GradSink.total`."""
        return self.sink.total(self.place)


class Proxies(Sequence[nn.Parameter]):
    """Leaves that share the parameters' memory and hand each gradient to the sink as soon as it is complete.

    Each is made when it is first asked for: calls whose cells are replayed need none.

    Args:
        params: the parameters.
        sink: what takes their gradients.
    """

    def __init__(self, params: Sequence[nn.Parameter], sink: GradSink) -> None:
        self._params, self._sink = params, sink
        self._made: dict[int, nn.Parameter] = {}

    def __len__(self) -> int:
        return len(self._params)

    @overload
    def __getitem__(self, index: int) -> nn.Parameter: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Parameter]: ...
    def __getitem__(self, index: int | slice) -> nn.Parameter | list[nn.Parameter]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def _make(self, place: int) -> nn.Parameter:
        proxy = Proxy(self._params[place].detach(), requires_grad=True)
        if isinstance(proxy, Proxy):  # pyright: ignore[reportUnnecessaryIsInstance]
            # Of a tensor subclass (DTensor) nn.Parameter makes one of that subclass: autograd makes its gradients.
            proxy.sink, proxy.place = self._sink, place
        proxy.register_post_accumulate_grad_hook(_hand_over(place, self._sink))  # pyright: ignore[reportUnknownMemberType]
        return proxy


def _hand_over(index: int, sink: GradSink):
    def hook(proxy: Tensor) -> None:
        grad, proxy.grad = proxy.grad, None
        if grad is not None:
            sink.add(index, grad)

    return hook
