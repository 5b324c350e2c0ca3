"""Mamba-2 language model with the state-dict names of mamba-ssm's `MambaLMHeadModel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from magc.errors import InputError, StateError
from magc.nn.block import Mamba2Block, Stream
from magc.nn.config import Mamba2Config
from magc.nn.fused import is_plain
from magc.nn.generation import generate
from magc.nn.linear import Linear
from magc.nn.mamba2_values import Mamba2State
from magc.nn.norm import AddRMSNorm
from magc.nn.operators import Impl
from magc.nn.pretrained import load_config, load_weights, save_model
from magc_kernels.cross_entropy.autograd import linear_cross_entropy
from magc_kernels.mamba2.values import Keep

LMState = tuple[Mamba2State, ...]
"""One state per layer, first layer first."""


class LMHead(nn.Module):
    """Last residual addition, norm and projection to the vocabulary, and the loss over it.

    Args:
        norm: takes (hidden, residual).
        projection: d_model to the padded vocabulary.
    """

    def __init__(self, norm: AddRMSNorm, projection: nn.Linear) -> None:
        super().__init__()
        self.norm = norm
        self.projection = projection

    def logits(self, x: Stream) -> Tensor:
        """Logits `(batch, length, padded vocabulary)` of what the last block returns."""
        return self.projection(self._normed(x))

    def forward(self, x: Stream, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of a segment, without logits in float32 (`magc_kernels.cross_entropy`).

        Args:
            x: what the last block returns.
            targets: the token to predict at each position, `(batch, length)` int64; -100 where there is none.

        Returns:
            The sum in float32 (float64 for float64 logits) and the number of targets counted, int64; both
            scalars.
        """
        if not is_plain(self.projection):
            logits = self.logits(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            return total, (targets != -100).sum()
        projection = self.projection
        return linear_cross_entropy(self._normed(x), projection.weight, targets, projection.bias)

    def _normed(self, x: Stream) -> Tensor:
        hidden, residual = (x, None) if isinstance(x, Tensor) else x
        return self.norm(hidden, residual)[0]


class _Backbone(nn.Module):
    """Holds the parameters of everything but the projection, under mamba-ssm's names."""

    def __init__(
        self,
        config: Mamba2Config,
        keep: Keep,
        impl: Impl,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            Mamba2Block(
                config.d_model,
                norm_epsilon=config.norm_epsilon,
                residual_in_fp32=config.residual_in_fp32,
                impl=impl,
                device=device,
                dtype=dtype,
                **config.mixer_options(keep),
            )
            for _ in range(config.n_layer)
        )
        self.norm_f = AddRMSNorm(
            config.d_model,
            eps=config.norm_epsilon,
            residual_in_fp32=config.residual_in_fp32,
            impl=impl,
            device=device,
            dtype=dtype,
        )


class Mamba2LM(nn.Module):
    """Mamba-2 language model.

    `stem`, `layers` and `head` are its parts in the form a grid takes them; they share the model's
    parameters.

    Args:
        config: sizes and options.
        keep: see `Mamba2`.
        impl: see `magc.nn.operators.Impl`.
        device, dtype: of all parameters.

    Raises:
        InputError: sizes that do not fit, or an unknown `impl`.
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        keep: Keep = "states",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = _Backbone(config, keep, impl, device, dtype)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        # In a tuple, so that nn.Module does not register it: its parameters belong to backbone and lm_head.
        self._head = (LMHead(self.backbone.norm_f, self.lm_head),)
        self._reset_model_parameters()
        self.tie_weights()

    @property
    def stem(self) -> nn.Embedding:
        """Token ids `(batch, length)` to the first block's input."""
        return self.backbone.embedding

    @property
    def layers(self) -> Sequence[Mamba2Block]:
        """The blocks, each following ``y, new_state = layer(x, state, seq_idx=...)``."""
        return cast("Sequence[Mamba2Block]", self.backbone.layers)

    @property
    def head(self) -> LMHead:
        """The last block's output and targets to (summed cross entropy, count)."""
        return self._head[0]

    def tie_weights(self) -> None:
        """Let the projection share the embedding's weight if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def reset_parameters(self) -> None:
        """Initialise all parameters, as after `to_empty`."""
        for layer in self.layers:
            layer.reset_parameters()
        self.backbone.norm_f.reset_parameters()
        self.lm_head.reset_parameters()
        self._reset_model_parameters()
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        state: LMState | None = None,
        *,
        seq_idx: Tensor | None = None,
        num_last_tokens: int | None = None,
    ) -> tuple[Tensor, LMState]:
        """Run a segment.

        Args:
            input_ids: `(batch, length)` integers.
            state: one `Mamba2State` per layer; None at the start of the sequence.
            seq_idx: document of each token in packed sequences, `(batch, length)` integers.
            num_last_tokens: return logits of that many last tokens only; None: of all.

        Returns:
            Logits `(batch, length or num_last_tokens, padded vocabulary)` and the state after the last token.

        Raises:
            InputError: `input_ids` has a wrong shape or type. StateError: the states do not fit the layers.
        """
        if input_ids.ndim != 2 or input_ids.dtype.is_floating_point or 0 in input_ids.shape:
            raise InputError(
                "input_ids must be integers of shape (batch, length >= 1), "
                f"got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        if num_last_tokens is not None and num_last_tokens < 1:
            raise InputError(f"num_last_tokens must be at least 1 or None, got {num_last_tokens}")
        layers = self.layers
        if state is not None and len(state) != len(layers):
            raise StateError(f"the model has {len(layers)} layers, the state {len(state)}; give one state per layer")
        x: Stream = self.stem(input_ids)
        new_states: list[Mamba2State] = []
        for index, layer in enumerate(layers):
            x, new_state = layer(x, None if state is None else state[index], seq_idx=seq_idx)
            new_states.append(new_state)
        if num_last_tokens is not None:
            hidden, residual = x
            x = hidden[:, -num_last_tokens:], residual[:, -num_last_tokens:]
        return self.head.logits(x), tuple(new_states)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
        prefill_segment: int = 2048,
    ) -> Tensor:
        """Continue a batch of prompts of equal length: parallel over the prompt, then one recurrent step per
        token.

        Args:
            input_ids: `(batch, length)` integers.
            max_new_tokens: most tokens to add.
            temperature: 0 takes the likeliest token, otherwise logits are divided by it and a token is drawn.
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the fewest likeliest tokens whose probability reaches p.
            eos: a row that has produced this token gets only this token from then on; all such rows end the
                loop.
            generator: source of randomness on the model's device.
            prefill_segment: tokens of the prompt run at once; bounds memory, changes nothing else.

        Returns:
            `(batch, length + n)`, n at most `max_new_tokens`: the prompt and its continuation.

        Raises:
            InputError: an argument is out of range.
        """
        return generate(
            self.forward,
            input_ids,
            max_new_tokens,
            vocab_size=self.config.vocab_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos=eos,
            generator=generator,
            prefill_segment=prefill_segment,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        keep: Keep = "states",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a folder laid out as `state-spaces/mamba2-*`: `config.json` and the weights.

        Args:
            folder: holds `config.json` and `model.safetensors` or `pytorch_model.bin`.
            keep: see `Mamba2`.
            impl: see `magc.nn.operators.Impl`.
            device: of the parameters; None: torch's default.
            dtype: of the parameters; None: torch's default.

        Raises:
            InputError: a file is missing or unreadable, the configuration is not of a pure Mamba-2 model, or
                names or shapes of the weights do not match it. MissingExtraError: safetensors is needed.
        """
        config = load_config(folder)
        device = torch.get_default_device() if device is None else device
        dtype = torch.get_default_dtype() if dtype is None else dtype
        with torch.device("meta"):
            model = cls(config, keep=keep, impl=impl, dtype=dtype)
        expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
        tied = {"lm_head.weight": "backbone.embedding.weight"} if config.tie_embeddings else {}
        weights = load_weights(folder, expected, tied)
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        for layer in model.layers:
            layer.mixer.mark_no_weight_decay()
        return model

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `config.json` and `pytorch_model.bin`, which mamba-ssm and `from_pretrained` read.

        Args:
            folder: created if it does not exist.

        Raises:
            InputError: the folder holds a `model.safetensors`, which readers would prefer.
        """
        save_model(folder, self.config, self.state_dict())

    @torch.no_grad()
    def _reset_model_parameters(self) -> None:
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for layer in self.layers:
            mixer = layer.mixer
            if self.config.bias:
                nn.init.zeros_(mixer.in_proj.bias)
                nn.init.zeros_(mixer.out_proj.bias)
            # GPT-2's scheme: one residual addition per layer, each scaled down by the root of their number.
            nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
            mixer.out_proj.weight.div_(math.sqrt(self.config.n_layer))
