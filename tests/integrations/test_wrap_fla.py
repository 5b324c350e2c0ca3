"""Models of flash-linear-attention on the grid.

On a CPU its own modules run with its kernels replaced by plain PyTorch, its naive recurrences among them: what is tested is
that states travel from segment to segment with their gradients. On a GPU everything is its own.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from magc import Plan, grid_checkpoint
from magc.errors import InputError, LayerContractError
from magc.integrations.fla import FLALayer, FLAState
from magc.integrations.fla.layer import SegmentCache
from magc.integrations.wrap import wrap, wrapped
from magc.plan import PlanOrRule
from tests.integrations.models import PLANS, TOKENS, VOCABULARY, assert_same, assert_same_gradients, batch, labels_of

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "intermediate_size": 24}
PLAIN: dict[str, Any] = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "pad_token_id": 0}
MORE: dict[str, dict[str, Any]] = {
    "gla": {"num_heads": 2, "expand_k": 0.5, "use_short_conv": True},
    "gated_deltanet": {"num_heads": 2, "head_dim": 4, "expand_v": 2},
}
PREFIXES = {
    "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet",
    "gla": "GLA",
    "gsa": "GSA",
    "kda": "KDA",
    "linear_attn": "LinearAttention",
    "retnet": "RetNet",
    "rwkv7": "RWKV7",
}


def fla(name: str) -> Any:
    pytest.importorskip("fla", exc_type=ImportError)
    return importlib.import_module(name)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention with plain PyTorch in place of its kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms, conv, mlp = fla("fla.modules.layernorm"), fla("fla.modules.causal_conv1d.ops"), fla("fla.modules.mlp")
        gla, delta = fla("fla.layers.gla"), fla("fla.layers.gated_deltanet")
        fla("fla.models")

    def rms_norm(norm: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight

    def convolve(
        module: Any, x: Tensor, cache: Tensor | None = None, output_final_state: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        width = module.kernel_size[0]
        before = x.new_zeros(x.shape[0], x.shape[2], width) if cache is None else cache
        row = torch.cat([before, x.transpose(1, 2)], -1)
        y = functional.conv1d(row[..., 1:], module.weight, module.bias, groups=module.groups)
        return functional.silu(y).transpose(1, 2), row[..., -width:] if output_final_state else None

    def gated(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, output_final_state: bool, **more: Any) -> Any:
        decay = more["gk"] if "gk" in more else more["g"]
        naive = fla("fla.ops.gla.naive").naive_recurrent_gla
        return naive(q, k, v, decay, None if initial_state is None else initial_state, output_final_state)

    def delta_rule(q: Tensor, k: Tensor, v: Tensor, *, initial_state: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Its gated delta rule, token by token; `magc.integrations.delta_rule` has tests of its own."""
        from magc.integrations.delta_rule import gated_delta_rule, l2_normalised

        beta, g = more["beta"], more["g"]
        beta = beta.sigmoid() if more.get("use_beta_sigmoid_in_kernel") else beta
        if more.get("use_gate_in_kernel"):
            g = -more["A_log"].exp() * functional.softplus(g + more["dt_bias"])
        q, k = l2_normalised(q), l2_normalised(k)
        return gated_delta_rule(q, k, v, g, beta, scale=q.shape[-1] ** -0.5, initial_state=initial_state)

    monkeypatch.setattr(norms.RMSNorm, "forward", rms_norm)
    monkeypatch.setattr(conv.ShortConvolution, "forward", convolve)
    monkeypatch.setattr(mlp, "swiglu", lambda gate, y: functional.silu(gate) * y)
    for name in ("fused_recurrent_gla", "chunk_gla"):
        monkeypatch.setattr(gla, name, gated)
    monkeypatch.setattr(delta, "chunk_gated_delta_rule", delta_rule)
    monkeypatch.setitem(gla.ACT2FN, "swish", functional.silu)
    monkeypatch.setattr(delta.GatedDeltaNet, "_use_fused_qkv_conv", lambda *_, **__: False)
    monkeypatch.setattr(delta.FusedRMSNormGated, "forward", lambda norm, x, g: rms_norm(norm, x) * functional.silu(g))


def make(family: str, **changes: Any) -> Any:
    modeling = fla(f"fla.models.{family}")
    prefix = PREFIXES[family]
    config = getattr(modeling, f"{prefix}Config")(**{**SIZES, **PLAIN, **MORE.get(family, {}), **changes})
    torch.manual_seed(0)
    model = getattr(modeling, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


on_cpu = pytest.mark.parametrize("family", MORE)


@pytest.mark.usefixtures("plain")
@on_cpu
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_loss_and_gradients(family: str, plan: PlanOrRule) -> None:
    model = make(family)
    twin = wrap(copy.deepcopy(model), plan=plan)
    inputs = batch()
    call = {**inputs, "labels": labels_of(inputs)}
    expected, actual = model(**call).loss, twin(**call)
    assert actual.logits is None
    assert_same(actual.loss, expected, 1e-5)
    expected.backward()
    actual.loss.backward()
    assert_same_gradients(twin, model, 1e-5)


@pytest.mark.usefixtures("plain")
@on_cpu
def test_logits_and_gradients(family: str) -> None:
    model = make(family)
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"])
    expected, actual = model(**batch()).logits, twin(**batch()).logits
    assert_same(actual, expected, 1e-5)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert_same_gradients(twin, model, 1e-4)


@pytest.mark.usefixtures("plain")
def test_a_layer_alone() -> None:
    layers = [
        fla("fla.layers").GatedLinearAttention(hidden_size=16, num_heads=2, fuse_norm=False, layer_idx=i)
        for i in (0, 3)
    ]
    x = torch.randn(2, TOKENS, 16)
    expected = layers[1](layers[0](x)[0])[0]
    actual, states = grid_checkpoint([FLALayer(layer) for layer in layers], x, plan=Plan(layers=1, tokens=3))
    assert_same(actual, expected, 1e-5)
    assert isinstance(states[0], FLAState)
    actual.sum().backward()
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())


@pytest.mark.usefixtures("plain")
def test_refused_with_a_remedy() -> None:
    twin = wrap(make("gla"), plan=Plan())
    inputs = batch("left")
    with pytest.raises(InputError, match="Pad on the right and leave out the attention_mask"):
        twin(**inputs, labels=labels_of(inputs))
    with pytest.raises(InputError, match="packed rows are not served"):
        twin(**batch(), labels=batch()["input_ids"], seq_idx=torch.tensor([[0] * 4 + [1] * 7] * 2))
    twin.criterion = nn.CrossEntropyLoss()
    with pytest.raises(InputError, match="a criterion of its own"):
        twin(**batch(), labels=batch()["input_ids"])
    assert "flash-linear-attention's own modules" in wrapped(twin).explain()


@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore")
def test_the_other_checkpointing_would_lose_the_state() -> None:
    model = make("gla")
    model.gradient_checkpointing_enable()
    wrap(model, plan=Plan(tokens=4))
    ids = batch()["input_ids"]
    with pytest.raises(LayerContractError, match="gradient_checkpointing_disable"):
        model(ids, labels=ids)
    model.gradient_checkpointing_disable()
    model(ids, labels=ids).loss.backward()


# ---------------------------------------------------------------------- the cache, without flash-linear-attention
class Shift(nn.Module):
    """A layer that speaks to its cache as flash-linear-attention's do: a decayed sum, a shift by a token, an offset."""

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False) -> tuple[Any, ...]:
        cache, index = past_key_values, self.layer_idx
        last = cache[index] if cache is not None and len(cache) > index else None
        start = 0 if cache is None else cache.get_seq_length(index)
        before = hidden_states.new_zeros(hidden_states.shape[0], 4) if last is None else last["conv_state"]
        shifted = torch.cat([before[:, None], hidden_states[:, :-1]], 1)
        h = torch.zeros_like(before) if last is None else last["recurrent_state"]
        ys = []
        for t, step in enumerate((hidden_states + shifted).unbind(1)):
            h = 0.9 * h + torch.tanh(step @ self.weight) * (start + t + 1)
            ys.append(h)
        if cache is not None:
            cache.update(recurrent_state=h, conv_state=hidden_states[:, -1], layer_idx=index, offset=len(ys))
            entry = cache[index]["ffn_state"]
            cache.update(ffn_state=hidden_states[:, -1] if entry is None else entry + 0.0, layer_idx=index, offset=0)
        return torch.stack(ys, 1), None, cache


@pytest.mark.parametrize("tokens", [11, 4, 1])
def test_states_travel_through_the_cache(tokens: int) -> None:
    layers = [Shift(i) for i in range(2)]
    x = torch.randn(2, TOKENS, 4, requires_grad=True)
    expected = layers[1](layers[0](x)[0])[0]
    theirs = torch.autograd.grad(expected.square().sum(), [x, layers[0].weight, layers[1].weight])
    places = torch.stack([torch.arange(TOKENS), torch.full((TOKENS,), TOKENS)])
    actual, _ = grid_checkpoint(
        [FLALayer(each) for each in layers], x, plan=Plan(layers=1, tokens=tokens), places=places
    )
    assert_same(actual, expected, 1e-6)
    for ours, their in zip(
        torch.autograd.grad(actual.square().sum(), [x, layers[0].weight, layers[1].weight]), theirs, strict=True
    ):
        assert_same(ours, their, 1e-5)


class Valued(Shift):
    """One that mixes in the first layer's values, as RWKV-7's blocks do."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False, v_first: Any = None
    ) -> tuple[Any, ...]:
        y, _, cache = super().forward(hidden_states, past_key_values, use_cache)
        v_first = torch.tanh(hidden_states @ self.weight) if self.layer_idx == 0 else v_first
        return y + 0.5 * v_first, None, cache, v_first


def test_values_of_the_first_layer_travel_beside() -> None:
    layers, norm = [Valued(i) for i in range(3)], nn.LayerNorm(4)
    x = torch.randn(2, TOKENS, 4)
    hidden, first = x, torch.zeros_like(x)
    for layer in layers:
        hidden, _, _, first = layer(hidden, v_first=first)
    expected = norm(hidden)
    weights = [layer.weight for layer in layers]
    theirs = torch.autograd.grad(expected.square().sum(), weights, retain_graph=True)
    cells = [
        FLALayer(layer, norm if i == 2 else None, takes_first=True, is_first=i == 0) for i, layer in enumerate(layers)
    ]
    places = torch.stack([torch.arange(TOKENS), torch.full((TOKENS,), TOKENS)])
    actual, _ = grid_checkpoint(cells, x, plan=Plan(layers=1, tokens=3), places=places)
    assert_same(actual, expected, 1e-5)
    for ours, their in zip(torch.autograd.grad(actual.square().sum(), weights), theirs, strict=True):
        assert_same(ours, their, 1e-4)


def test_the_cache_leaves_the_state_before_alone() -> None:
    before = FLAState(torch.ones(1), (torch.ones(2),), None)
    cache = SegmentCache(2, before, None)
    assert len(cache) == 3
    cache.update(recurrent_state=torch.zeros(1), layer_idx=2)
    assert cache.state.recurrent.item() == 0
    assert cache.state.conv is before.conv
    assert before.recurrent.item() == 1


def test_what_a_layer_alone_cannot_do() -> None:
    with pytest.raises(InputError, match="made without layer_idx"):
        FLALayer(Shift(None))
    with pytest.raises(InputError, match="give the grid places"):
        SegmentCache(0, FLAState(None, None, None), None).get_seq_length()
    with pytest.raises(InputError, match="keeps keys and values"):
        SegmentCache(0, None, None).update(attn_state=(torch.ones(1),))


# ---------------------------------------------------------------------- on a GPU, with its own kernels
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_its_own_kernels(family: str, dtype: torch.dtype) -> None:
    """Gradients are off from a float32 model's by no more than those of the model in one piece."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 256, "intermediate_size": 256}
    heads = {"head_dim": 64} if family in ("rwkv7", "gated_deltanet", "kda") else {"num_heads": 2}
    sizes |= {"fuse_norm": True, "fuse_swiglu": True, **heads}
    model = make(family, **sizes).cuda()
    # Its chunked delta rule takes no float32; the recurrent one does.
    truth = make(family, **sizes, **({"attn_mode": "fused_recurrent"} if family == "delta_net" else {})).cuda()
    ids = torch.randint(3, 256, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()

    def gradients(model: Any) -> list[Tensor]:
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]

    def error(found: list[Tensor], expected: list[Tensor]) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5

    plain, ours = copy.deepcopy(model).to(dtype), wrap(copy.deepcopy(model).to(dtype), plan=Plan(layers=2, tokens=128))
    try:
        theirs = gradients(plain)
    except (AssertionError, RuntimeError) as refusal:
        pytest.skip(f"flash-linear-attention itself cannot train it here: {refusal}")
    expected = gradients(truth)
    size = sum(float(grad.square().sum()) for grad in expected) ** 0.5
    assert error(gradients(ours), expected) <= max(1.5 * error(theirs, expected), 2e-3 * size)
