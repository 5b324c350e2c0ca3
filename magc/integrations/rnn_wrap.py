"""`magc.wrap` for ``torch.nn.LSTM``, ``GRU`` and ``RNN``: one layer of the grid for each layer of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from magc.errors import InputError, LayerContractError
from magc.integrations.forward import Adapted, GridForward, ModelGrid, Settings
from magc.integrations.torch_rnn import RNNLayer, RNNState, from_torch_state, split_rnn, to_torch_state


class RNNForward(GridForward):
    """The forward of a torch RNN: ``y, state = module(x, state)`` with padded batches."""

    def __init__(self, module: nn.RNNBase, grid: ModelGrid) -> None:
        super().__init__(module, {})
        self.grid = grid

    def takes(self, call: dict[str, Any]) -> bool:
        """Whether the input is a tensor.

        Raises:
            InputError: it is packed.
        """
        if isinstance(call["input"], nn.utils.rnn.PackedSequence):
            raise InputError(
                f"this {type(self.module).__name__}, wrapped by magc, was given a PackedSequence in a training forward, whose "
                f"tokens cannot be cut into segments. Pass a padded tensor (torch.nn.utils.rnn.pad_packed_sequence), "
                f"or magc.unwrap(module)"
            )
        return call["input"].dim() in (2, 3)  # torch says what is wrong with others

    def run(self, call: dict[str, Any]) -> Any:
        """The output and the final state, as torch gives them; of one sequence without a batch axis too."""
        module = cast(nn.RNNBase, self.module)
        self._follow(module)
        x, hx = call["input"], call.get("hx")
        if x.dim() == 3:
            y, final = self.grid(x, from_torch_state(module, hx))
            return y, to_torch_state(cast("tuple[RNNState, ...]", final))
        axis = 0 if module.batch_first else 1
        y, final = self.grid(x.unsqueeze(axis), from_torch_state(module, _each(hx, lambda h: h.unsqueeze(1))))
        return y.squeeze(axis), _each(to_torch_state(cast("tuple[RNNState, ...]", final)), lambda h: h.squeeze(1))

    def _follow(self, module: nn.RNNBase) -> None:
        """Take over what was replaced in the module since: parameters, the training mode."""
        for index, layer in enumerate(self.grid.layers):
            for name, held in [*layer.named_parameters(recurse=False)]:
                now: object = getattr(module, f"{name}_l{index}")
                if not isinstance(now, nn.Parameter):
                    raise LayerContractError(
                        f"{name}_l{index} of this {type(module).__name__} is no parameter any more but is computed or handed in "
                        f"(weight norm, pruning, torch.func.functional_call), and its gradient would be lost. Undo that, or "
                        f"magc.unwrap(module)"
                    )
                if now is not held:
                    layer.register_parameter(name, now)
            if layer.training != module.training:
                layer.train(module.training)


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state, one tensor or two, changed; None stays."""
    if isinstance(state, tuple):
        return tuple(change(part) for part in cast("tuple[Tensor, ...]", state))
    return None if state is None else change(state)


def adapt(module: nn.RNNBase, settings: Settings) -> Adapted:
    """Put an RNN on a grid.

    Raises:
        LayerContractError: as `split_rnn`, for a bidirectional one above all.
    """
    layers: list[RNNLayer] = split_rnn(module)
    grid = settings.grid(layers, seq_dim=layers[0].seq_dim)
    note = "each layer runs torch's own fused operator, segment by segment; dropout between layers draws its own masks"
    return Adapted(grid, (RNNForward(module, grid),), (note,))
