"""AdamW that keeps float32 copies of weights in lower precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

BUCKET = 1 << 26
"""Elements that are converted to float32 at once."""


class MasterAdamW(Optimizer):
    """AdamW on float32 copies ("masters") of bf16 weights; weights in float32 or float64 are their own.

    Small updates, which bf16 would round away, add up in the copies. Of a parameter sharded by FSDP its local shard is
    updated; the state holds plain tensors.

    Args:
        params: as of any optimizer.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights from their gradients; parameters without one stay."""
        if closure is not None:
            raise TypeError("MasterAdamW evaluates no closure; compute the loss before step()")
        for group in self.param_groups:
            for bucket in _buckets([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(group, bucket)

    def _update(self, group: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        weights = [local(parameter) for parameter in parameters]
        masters = [state.get("master", weight) for state, weight in zip(states, weights, strict=True)]
        adamw(
            masters,
            [local(cast(Tensor, each.grad)).to(master.dtype) for each, master in zip(parameters, masters, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=masters[0].is_cuda,
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for weight, master in zip(weights, masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            weight = local(parameter)
            precise = torch.promote_types(weight.dtype, torch.float32)
            # The fused kernel counts steps on the device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device if weight.is_cuda else "cpu")
            state["exp_avg"] = torch.zeros_like(weight, dtype=precise)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=precise)
            if weight.dtype != precise:
                state["master"] = weight.to(precise)
        return state

    # torch's own state dict would round masters to the weights' type.
    def named_state(self, names: Mapping[Tensor, str]) -> dict[str, dict[str, Tensor]]:
        """The state by the parameters' names; the tensors are the optimizer's own."""
        return {
            names[parameter]: dict(self.state[parameter]) for parameter in self._parameters() if self.state[parameter]
        }

    def load_named_state(self, names: Mapping[Tensor, str], state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `named_state` gave.

        Raises:
            KeyError: it is of other parameters.
        """
        mine = {names[parameter]: parameter for parameter in self._parameters()}
        if other := set(state) - set(mine):
            raise KeyError(f"the state has {', '.join(sorted(other)[:3])}, which this optimizer does not train")
        for name, values in state.items():
            own = self._state_of(mine[name])
            for key, value in values.items():
                own[key].copy_(value)

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]


def local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor that FSDP has sharded, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one type, at most `BUCKET` elements at a time (a larger one alone)."""
    bucket: list[Tensor] = []
    count = 0
    for parameter in parameters:
        if bucket and (count + parameter.numel() > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, count = [], 0
        bucket.append(parameter)
        count += parameter.numel()
    if bucket:
        yield bucket
