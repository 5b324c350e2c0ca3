"""A step of all ranks: every one runs its own micro-batches; gradients are summed; the optimizer is shared out.

The grid hands over all gradients at once, at the end of its backward, so there is nothing that their reduction could
overlap with; `Replicas` adds them up in float32 after the last micro-batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from magc import GridCheckpoint
from video_ma2mba.data.batch import Batch
from video_ma2mba.model.model import VideoMa2mba
from video_ma2mba.training.config import TrainConfig
from video_ma2mba.training.groups import ParameterGroup
from video_ma2mba.training.optimizer import MasterAdamW, local
from video_ma2mba.training.plans import Plans
from video_ma2mba.training.ranks import Ranks

OptimizerState = Mapping[str, Mapping[str, Tensor]]


class SummedLoss(nn.Module):
    """A micro-batch to its summed loss, on magc's grid.

    Args:
        model: the model.
        plans: of the grid.
        runner: of its cells.
    """

    def __init__(self, model: VideoMa2mba, plans: Plans, runner: Any) -> None:
        super().__init__()
        self.model = model
        self._plans = plans
        self._grid = (GridCheckpoint(model.layers, plans, runner=runner),)  # the layers are the model's already

    def forward(self, batch: Batch) -> Tensor:
        """Cross entropy of all learnt tokens, a scalar."""
        self._plans.prepare(self.model, batch)
        stem, head = self.model.stem, self.model.head
        total = self._grid[0].loss(batch.inputs, batch.targets, stem=stem, head=head, reduction="sum")
        if not batch.inputs.frames:
            # Without frames the tower and the projector get no gradient, but ranks must agree on what they reduce.
            for parameter in (*self.model.vision.parameters(), *self.model.projector.parameters()):
                if parameter.requires_grad:
                    total = total + 0.0 * parameter.sum()
        return total


class Strategy(Protocol):
    """How ranks share weights, gradients and optimizer. Gradients are sums over the tokens of all ranks."""

    def backward(self, batch: Batch, *, last: bool) -> Tensor:
        """Add a micro-batch's gradients, and return its summed loss; `last` is the step's last one."""
        ...

    def reduce(self) -> None:
        """Add up the gradients of all ranks; call once after the last micro-batch."""
        ...

    def norm(self) -> float:
        """Norm of all gradients together."""
        ...

    def update(self, scale: float, factor: float) -> None:
        """Multiply gradients by `scale` and rates by `factor`, update the weights, drop the gradients."""
        ...

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state, as far as this rank has it, by parameter."""
        ...

    def load_state_dict(self, state: OptimizerState) -> None:
        """Take over what `state_dict` gave."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """The model's state dict on the first rank; all ranks call it."""
        ...


def make_strategy(
    config: TrainConfig, model: VideoMa2mba, groups: Sequence[ParameterGroup], plans: Plans, ranks: Ranks
) -> Strategy:
    """The strategy that a configuration asks for; the model is on its device, its parts frozen or not."""
    loss = SummedLoss(model, plans, config.memory.runner)
    if config.parallel == "fsdp2":
        return Shards(config, loss, groups, ranks)
    return Replicas(config, loss, groups, ranks)


class Replicas:
    """Every rank holds the model; the optimizer is whole (`ddp`) or dealt out by parameter (`zero1`)."""

    def __init__(self, config: TrainConfig, loss: SummedLoss, groups: Sequence[ParameterGroup], ranks: Ranks) -> None:
        self._loss, self._ranks, self._groups = loss, ranks, groups
        parameters = dict(loss.model.named_parameters())
        self._parameters = [parameters[name] for group in groups for name in group.names]
        self._names: dict[Tensor, str] = {parameters[name]: name for group in groups for name in group.names}
        many = config.micro_batches(ranks.world) > 1
        precise = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self._parameters]
        # A parameter's own gradient cannot be more precise than it is, so several are added up beside it.
        self._sums = [
            torch.zeros_like(parameter, dtype=dtype) if many and dtype != parameter.dtype else None
            for parameter, dtype in zip(self._parameters, precise, strict=True)
        ]
        options = _options(config)
        if config.parallel == "zero1" and ranks.world > 1:
            self._zero = _zero_optimizer(_torch_groups(groups, parameters), options)
            self._optimizer = cast(MasterAdamW, self._zero.optim)
        else:
            self._zero = None
            self._optimizer = MasterAdamW(_torch_groups(groups, parameters), **options)

    def backward(self, batch: Batch, *, last: bool) -> Tensor:
        """See `Strategy`."""
        total = self._loss(batch)
        total.backward()
        for parameter, add_up in zip(self._parameters, self._sums, strict=True):
            if add_up is not None and parameter.grad is not None:
                add_up.add_(parameter.grad)
                parameter.grad = None
        return total.detach()

    def reduce(self) -> None:
        """See `Strategy`."""
        self._ranks.add_up(self._gradients())

    def norm(self) -> float:
        """See `Strategy`."""
        return math.sqrt(_square(self._gradients()))

    def update(self, scale: float, factor: float) -> None:
        """See `Strategy`."""
        for gradient in self._gradients():
            gradient.mul_(scale)
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            if total is not None:
                parameter.grad = total.to(parameter.dtype)
                total.zero_()
        optimizer = self._optimizer if self._zero is None else self._zero
        _set_rates(optimizer, self._groups, factor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """See `Strategy`."""
        return self._optimizer.named_state(self._names)

    def load_state_dict(self, state: OptimizerState) -> None:
        """See `Strategy`."""
        self._optimizer.load_named_state(self._names, state)

    def weights(self) -> dict[str, Tensor] | None:
        """See `Strategy`."""
        return self._loss.model.state_dict() if self._ranks.first else None

    def _gradients(self) -> list[Tensor]:
        """Of all trained parameters, zeros where a whole step gave none."""
        found: list[Tensor] = []
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            if total is None and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(cast(Tensor, parameter.grad) if total is None else total)
        return found


class Shards:
    """FSDP2: weights, gradients and optimizer are sharded; a micro-batch gathers the weights once, for forward and backward.

    One group holds everything, since the grid visits all layers again and again: sharding layer by layer would gather
    each of them once per cell. So weights and gradients are whole during a micro-batch and sharded between steps.
    """

    def __init__(self, config: TrainConfig, loss: SummedLoss, groups: Sequence[ParameterGroup], ranks: Ranks) -> None:
        self._ranks, self._groups = ranks, groups
        lower = torch.bfloat16 if config.precision == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32 if lower else None)
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        fully_shard(loss, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        self._loss: Any = cast(FSDPModule, loss)
        # Sums, as in `Replicas`; gloo knows no other reduction.
        self._loss.set_gradient_divide_factor(1.0)
        self._loss.set_force_sum_reduction_for_comms(True)
        parameters = {name.removeprefix("model."): each for name, each in loss.named_parameters()}
        self._parameters = [parameters[name] for group in groups for name in group.names]
        self._names: dict[Tensor, str] = {parameters[name]: name for group in groups for name in group.names}
        self._optimizer = MasterAdamW(_torch_groups(groups, parameters), **_options(config))

    def backward(self, batch: Batch, *, last: bool) -> Tensor:
        """See `Strategy`."""
        self._loss.set_requires_gradient_sync(last)
        total: Tensor = self._loss(batch)
        total.backward()
        return total.detach()

    def reduce(self) -> None:
        """See `Strategy`; the last micro-batch's backward has done it."""

    def norm(self) -> float:
        """See `Strategy`."""
        return math.sqrt(self._ranks.sum([_square(self._gradients())])[0])

    def update(self, scale: float, factor: float) -> None:
        """See `Strategy`."""
        for gradient in self._gradients():
            gradient.mul_(scale)
        _set_rates(self._optimizer, self._groups, factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """See `Strategy`."""
        return self._optimizer.named_state(self._names)

    def load_state_dict(self, state: OptimizerState) -> None:
        """See `Strategy`."""
        self._optimizer.load_named_state(self._names, state)

    def weights(self) -> dict[str, Tensor] | None:
        """See `Strategy`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = cast(dict[str, Tensor], get_model_state_dict(self._loss, options=options))
        return {name.removeprefix("model."): each for name, each in found.items()} if self._ranks.first else None

    def _gradients(self) -> list[Tensor]:
        return [local(cast(Tensor, parameter.grad)) for parameter in self._parameters]


def _zero_optimizer(groups: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():  # importing it compiles other optimizers with torch's own deprecated compiler
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(groups, MasterAdamW, **options)


def _options(config: TrainConfig) -> dict[str, Any]:
    return {"betas": config.optimizer.betas, "eps": config.optimizer.eps}


def _torch_groups(groups: Sequence[ParameterGroup], parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {
            "params": [parameters[name] for name in group.names],
            "lr": group.rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]


def _set_rates(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], factor: float) -> None:
    for mine, group in zip(optimizer.param_groups, groups, strict=True):
        mine["lr"] = group.rate * factor


def _square(tensors: Sequence[Tensor]) -> float:
    """The squared norm of tensors together, added in float64."""
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]
    return float(torch.stack(norms).double().square().sum())
