"""``torch.nn.LSTM``, ``GRU`` and ``RNN`` as layers of the contract ``y, state = layer(x, state)``.

``split_rnn`` makes one layer for each layer of the module. The layers hold the module's own Parameter
objects, so its optimizer, state dict and initialisation stay in use, and run PyTorch's own fused operators
one layer at a time.

The state of a layer is ``(h, c)`` for an LSTM and ``h`` for the others, of shape ``(batch, hidden_size)``
each (an LSTM's ``h`` with ``proj_size``: ``(batch, proj_size)``): the batch comes first as in the states of
other layers, and there is no layer axis. ``from_torch_state`` and ``to_torch_state`` convert from and to
PyTorch's ``(num_layers, batch, hidden_size)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from magc.errors import InputError, LayerContractError, StateError

RNNState = Tensor | tuple[Tensor, Tensor]
"""``h (batch, hidden)``, or ``(h, c)`` for an LSTM."""

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

_CUDNN_TOKENS = 1 << 15
"""Longest part that cuDNN is given: from 65,536 tokens on it refuses (seen on an H200 with PyTorch 2.11)."""


class RNNLayer(nn.Module):
    """One layer of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, sharing its parameters.

    Dropout is as in ``torch.nn``: on the outputs of every layer but the last, in training only. Each
    segment draws its own mask, in the order of the calls; on a GPU the masks differ from those that cuDNN
    draws for the whole module. The layer has its own ``training`` flag, taken from the module.

    The parameters are read at each call under the names ``weight_ih``, ``weight_hh``, ``bias_ih``,
    ``bias_hh`` and ``weight_hr``. cuDNN wants the weights of a call in one chunk of memory, and the chunk
    of a module of several layers is laid out across its layers. So on a GPU the weights of a layer are
    copied into a chunk of its own at each call, and gradients flow through the copy; the memory of the
    parameters is not touched, and the module may be used as before. Nothing is copied if the module has one
    layer, with bias.

    Args:
        module: the module to take the layer from; see ``split_rnn`` for what is refused.
        index: which of its layers, from 0.

    Attributes:
        seq_dim: the sequence axis of x and y, 1 if ``batch_first`` and else 0.
    """

    rounds_by_grad_mode = True

    def __init__(self, module: nn.RNNBase, index: int) -> None:
        super().__init__()
        self.mode = module.mode
        self.input_size = module.input_size if index == 0 else module.proj_size or module.hidden_size
        self.hidden_size = module.hidden_size
        self.proj_size = module.proj_size
        self.bias = module.bias
        self.batch_first = module.batch_first
        self.dropout = float(module.dropout) if index < module.num_layers - 1 else 0.0
        names = ["weight_ih", "weight_hh"]
        names += ["bias_ih", "bias_hh"] if module.bias else []
        names += ["weight_hr"] if module.proj_size else []
        parameters = dict(module.named_parameters(recurse=False))
        for name in names:
            parameter = parameters.get(f"{name}_l{index}")
            if parameter is None:
                raise LayerContractError(
                    f"{type(module).__name__} computes {name}_l{index} instead of holding it as a parameter "
                    "(a parametrization or weight norm). Remove it, for instance with "
                    "torch.nn.utils.parametrize.remove_parametrizations."
                )
            self.register_parameter(name, parameter)
        self._names = tuple(names)
        self.train(module.training)

    @property
    def seq_dim(self) -> int:
        """Sequence axis of x and y."""
        return 1 if self.batch_first else 0

    def forward(self, x: Tensor, state: RNNState | None = None) -> tuple[Tensor, RNNState]:
        """Run a segment.

        Args:
            x: ``(batch, tokens, input_size)`` if ``batch_first``, else ``(tokens, batch, input_size)``.
            state: ``(h, c)`` or ``h``, see the module's docstring; None means zeros, the start of a sequence.

        Returns:
            ``y``, as x with ``proj_size or hidden_size`` features, and the state after the segment.

        Raises:
            InputError: x is a packed sequence, is not batched, has no token or another number of features.
            StateError: the state is not what the layer returns.
        """
        self._check_input(x)
        h, c = self._initial(x) if state is None else self._checked(x, state)
        weights = self._weights(x)
        parts = cast("Sequence[Tensor]", torch.split(x, _CUDNN_TOKENS, self.seq_dim)) if _runs_on_cudnn(x) else (x,)
        ys: list[Tensor] = []
        for part in parts:
            y, h, c = self._run(part, h, c, weights)
            ys.append(y)
        y = torch.cat(ys, self.seq_dim) if len(ys) > 1 else ys[0]
        new_state = (h.squeeze(0), c.squeeze(0)) if self.mode == "LSTM" else h.squeeze(0)
        if self.dropout:
            y = nn.functional.dropout(y, self.dropout, self.training)
        return y, new_state

    def _run(self, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """PyTorch's operator; ``c`` is passed through where there is none."""
        if self.mode == "LSTM":
            return torch.lstm(x, (h, c), weights, self.bias, 1, 0.0, self.training, False, self.batch_first)
        run = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[self.mode]
        return *run(x, h, weights, self.bias, 1, 0.0, self.training, False, self.batch_first), c

    def extra_repr(self) -> str:
        """Sizes and options that are not the default."""
        text = f"{self.mode}, {self.input_size}, {self.hidden_size}"
        for name in ("proj_size", "dropout", "batch_first"):
            value = getattr(self, name)
            text += f", {name}={value}" if value else ""
        return text if self.bias else text + ", bias=False"

    def _check_input(self, x: object) -> None:
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise InputError(
                "got a PackedSequence, whose tokens cannot be cut into segments: pass a padded tensor "
                "(torch.nn.utils.rnn.pad_packed_sequence)."
            )
        if not isinstance(x, Tensor):
            raise InputError(f"x must be a tensor, got {type(x).__name__}.")
        axes = "(batch, tokens, features)" if self.batch_first else "(tokens, batch, features)"
        if x.dim() == 2:
            raise InputError(f"x of shape {tuple(x.shape)} is not batched; add a batch axis to make it {axes}.")
        if x.dim() != 3 or x.shape[-1] != self.input_size or x.shape[self.seq_dim] == 0:
            raise InputError(f"x must be {axes} with {self.input_size} features and some token, got {tuple(x.shape)}.")

    def _sizes(self, x: Tensor) -> list[tuple[int, int]]:
        """Shapes of the state's tensors."""
        batch = x.shape[1 - self.seq_dim]
        shapes = [(batch, self.proj_size or self.hidden_size)]
        return [*shapes, (batch, self.hidden_size)] if self.mode == "LSTM" else shapes

    def _initial(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = [x.new_zeros(1, *shape) for shape in self._sizes(x)]
        return zeros[0], zeros[-1]

    def _checked(self, x: Tensor, state: RNNState) -> tuple[Tensor, Tensor]:
        """The state with a layer axis in front; h twice if there is no c."""
        tensors = state if isinstance(state, tuple) else (state,)
        shapes = self._sizes(x)
        if [tuple(tensor.shape) for tensor in tensors] != shapes:
            raise StateError(
                f"for x of shape {tuple(x.shape)} the state of this {self.mode} layer must have the shapes "
                f"{shapes}, got {[tuple(tensor.shape) for tensor in tensors]}. Convert PyTorch's stacked "
                "form with from_torch_state."
            )
        return tensors[0].unsqueeze(0).contiguous(), tensors[-1].unsqueeze(0).contiguous()

    def _weights(self, x: Tensor) -> list[Tensor]:
        """The weights as PyTorch's operators take them: ih, hh, the biases, hr."""
        weights = {name: cast(Tensor, getattr(self, name)) for name in self._names}
        if _runs_on_cudnn(x):
            weights = self._in_one_chunk(weights)
        return list(weights.values())

    def _in_one_chunk(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights in one chunk in cuDNN's order, as they are if they are so already."""
        order = sorted(weights, key=("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh").index)
        parts = [weights[name] for name in order]
        if self.bias and _is_chunk(parts):
            return weights
        # Without bias, cuDNN still reads two biases behind the matrices. Always give it zeros of ours: behind
        # the matrices of a module's first layer lie those of the second, and PyTorch does not notice.
        biases = 0 if self.bias else 2 * _GATES[self.mode] * self.hidden_size
        flat = [part.reshape(-1) for part in parts] + [parts[0].new_zeros(biases)]
        views = torch.split_with_sizes(torch.cat(flat), [part.numel() for part in flat])
        chunked = dict(zip(order, views, strict=False))
        return {name: chunked[name].view_as(weight) for name, weight in weights.items()}


def split_rnn(module: nn.Module) -> list[RNNLayer]:
    """One contract layer for each layer of ``module``, sharing its parameters; ready for ``nn.ModuleList``.

    Running the layers in turn over any segments gives what ``module`` gives for the whole sequence. The
    sequence axis of the stack is ``layers[0].seq_dim``: 1 if the module is ``batch_first``, else 0.

    Args:
        module: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``: any number of layers, bias or none, dropout,
            ``proj_size``, tanh or ReLU, batch or sequence first.

    Raises:
        LayerContractError: the module is bidirectional (not causal), or has hooks, computed parameters or a
            forward of its own, which the layers could not honour.
        InputError: it is no ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
    """
    if not isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        raise InputError(f"split_rnn takes an nn.LSTM, nn.GRU or nn.RNN, got {type(module).__name__}.")
    if module.bidirectional:
        raise LayerContractError(
            f"{module} is bidirectional: its outputs depend on later tokens, so it cannot run segment by "
            "segment. Use bidirectional=False, or a second module that runs on the flipped sequence."
        )
    base = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(module.mode, nn.RNN)
    if type(module).forward is not base.forward or "forward" in vars(module):
        raise LayerContractError(
            f"{type(module).__name__} has a forward of its own, which its layers would not run. "
            f"Pass a plain nn.{base.__name__}, or write the layer for the contract yourself."
        )
    if any(vars(module)[hooks] for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")):
        raise LayerContractError(
            f"{module} has hooks, which its layers would not run: register them on the layers that split_rnn returns."
        )
    return [RNNLayer(module, index) for index in range(module.num_layers)]


def to_torch_state(states: Sequence[RNNState]) -> Tensor | tuple[Tensor, Tensor]:
    """Per-layer states in PyTorch's form: ``h (num_layers, batch, hidden)``, or ``(h, c)`` for an LSTM."""
    hs = torch.stack([state[0] if isinstance(state, tuple) else state for state in states])
    cs = [state[1] for state in states if isinstance(state, tuple)]
    return (hs, torch.stack(cs)) if cs else hs


def from_torch_state(module: nn.RNNBase, state: Tensor | tuple[Tensor, Tensor] | None) -> list[RNNState] | list[None]:
    """PyTorch's initial state ``h0`` or ``(h0, c0)`` as one state for each layer; None stays None.

    Raises:
        StateError: the state is not a pair for an LSTM or one tensor for others, or has another number of
            layers.
    """
    layers = module.num_layers
    if state is None:
        return [None] * layers
    if isinstance(state, tuple) != (module.mode == "LSTM"):
        wanted = "a pair (h0, c0)" if module.mode == "LSTM" else "one tensor h0"
        raise StateError(f"the state of an {module.mode} is {wanted}, got {type(state).__name__}.")
    tensors = state if isinstance(state, tuple) else (state,)
    for tensor in tensors:
        if tensor.dim() != 3 or tensor.shape[0] != layers:
            raise StateError(f"each tensor of the state must be ({layers}, batch, hidden), got {tuple(tensor.shape)}.")
    # Clones, so that a layer's state does not keep the states of all layers alive.
    if isinstance(state, tuple):
        return [(state[0][i].clone(), state[1][i].clone()) for i in range(layers)]
    return [state[i].clone() for i in range(layers)]


def _runs_on_cudnn(x: Tensor) -> bool:
    return x.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()


def _is_chunk(tensors: list[Tensor]) -> bool:
    """Whether the tensors lie in a row from the start of one storage."""
    storage = tensors[0].untyped_storage().data_ptr()
    offset = 0
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != offset:
            return False
        if not tensor.is_contiguous():
            return False
        offset += tensor.numel()
    return True
