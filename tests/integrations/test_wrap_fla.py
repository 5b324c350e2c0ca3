"""Models of flash-linear-attention on the grid.

On a CPU its own modules run with its kernels replaced by plain PyTorch (`tests.integrations.fla_models`): what is tested is
that states travel from segment to segment with their gradients. On a GPU everything is its own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import Plan, grid_checkpoint
from magc.data import PackingCollator
from magc.errors import InputError, LayerContractError
from magc.integrations.fla import FLALayer, FLAState
from magc.integrations.fla.layer import SegmentCache
from magc.integrations.wrap import wrap, wrapped
from magc.plan import PlanOrRule
from tests.autotuning import take_smallest_candidates
from tests.integrations.fla_models import PREFIXES, fla, make, tiny, use_plain_kernels
from tests.integrations.models import PLANS, TOKENS, InDouble, assert_same, assert_same_gradients, batch, labels_of


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention with plain PyTorch in place of its kernels."""
    use_plain_kernels(monkeypatch)


def on_cpu(test: Any) -> Any:
    """For every family; RWKV-7 warns of itself."""
    return pytest.mark.filterwarnings("ignore:According to Bo")(pytest.mark.parametrize("family", PREFIXES)(test))


@pytest.mark.usefixtures("plain")
@on_cpu
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_loss_and_gradients(family: str, plan: PlanOrRule) -> None:
    model = tiny(family)
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
    model = tiny(family)
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
    twin.criterion = nn.CrossEntropyLoss()
    with pytest.raises(InputError, match="a criterion of its own"):
        twin(**batch(), labels=batch()["input_ids"])
    assert "flash-linear-attention's own modules" in wrapped(twin).explain()


# ---------------------------------------------------------------------- use_l2warp, RWKV-7's default
def assert_same_with_l2warp(model: Any, twin: Any, *calls: dict[str, Any]) -> None:
    """In float64, whose tolerance sees the warp: gradients of the losses of all calls, in another order than they were made."""
    with InDouble():
        expected, actual = ([each(**call).loss for call in calls] for each in (model, twin))
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs, 1e-12)
        for losses in (expected, actual):
            for index, loss in enumerate(losses):
                (loss * (3.0 + index)).backward()
    assert_same_gradients(twin, model, 1e-12)


@pytest.mark.usefixtures("plain")
@on_cpu
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_l2warp(family: str, plan: PlanOrRule) -> None:
    model = tiny(family, use_l2warp=True).double()
    call = {**batch(), "labels": labels_of(batch())}
    assert_same_with_l2warp(model, wrap(copy.deepcopy(model), plan=plan), call)
    warped = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model.config.use_l2warp = False
    with InDouble():
        (model(**call).loss * 3.0).backward()
    assert float((model.lm_head.weight.grad - warped).abs().max()) > 1e-6


def ignored(**more: Any) -> dict[str, Any]:
    """A call in which the first row has no target."""
    labels = labels_of(batch())
    labels[0] = -100
    return {**batch(), "labels": labels, **more}


L2WARP_CALLS: dict[str, list[dict[str, Any]]] = {
    "a row without targets": [ignored()],
    "items": [ignored(num_items_in_batch=7)],
    "no target, items": [{**ignored(num_items_in_batch=torch.tensor(7)), "labels": torch.full((2, TOKENS), -100)}],
    "shifted": [{**batch(), "labels": batch()["input_ids"], "shift_labels": labels_of(batch())}],
    "accumulated": [ignored(), {"input_ids": torch.full((1, 5), 4), "labels": torch.full((1, 5), 4)}],
    "accumulated items": [ignored(num_items_in_batch=9), {**batch(), "labels": labels_of(batch())}],
}


@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:According to Bo")
@pytest.mark.parametrize("calls", L2WARP_CALLS.values(), ids=L2WARP_CALLS)
def test_l2warp_is_scaled_with_the_loss(calls: list[dict[str, Any]]) -> None:
    model = tiny("rwkv7").double()
    assert model.config.use_l2warp
    assert_same_with_l2warp(model, wrap(copy.deepcopy(model), plan=Plan(layers=2, tokens=2)), *calls)


@pytest.mark.usefixtures("plain")
def test_l2warp_with_a_head_that_is_called() -> None:
    """A head with hooks is not plain, and makes logits of a segment."""
    model = tiny("gla", use_l2warp=True).double()
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"])
    twin.lm_head.register_forward_hook(lambda _module, _args, out: None)
    assert_same_with_l2warp(model, twin, ignored())


@pytest.mark.usefixtures("plain")
def test_l2warp_follows_the_configuration() -> None:
    model = tiny("gla").double()
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"])
    model.config.use_l2warp = twin.config.use_l2warp = True
    assert_same_with_l2warp(model, twin, ignored())


@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:According to Bo")
@pytest.mark.parametrize("side", ["left", "right"])
def test_l2warp_of_padded_rows_is_refused(side: str) -> None:
    twin = wrap(tiny("rwkv7"), plan=Plan())
    call = {**batch(side), "labels": labels_of(batch(side))}
    with pytest.raises(InputError, match=r"PackingCollator.*use_l2warp = False"):
        twin(**call)
    twin.config.use_l2warp = False
    twin(**call).loss.backward()
    twin.config.use_l2warp = True
    twin(**{**call, "attention_mask": torch.ones_like(call["attention_mask"])}).loss.backward()


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
        cache: Any = past_key_values
        index: Any = self.layer_idx
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
DOCUMENTS = (300, 1, 40, 131, 64, 2)


def for_kernels(family: str, **changes: Any) -> Any:
    """A model of sizes that its kernels take."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 256, "intermediate_size": 256}
    heads: dict[str, Any] = {"head_dim": 64} if family in ("rwkv7", "gated_deltanet", "kda") else {"num_heads": 2}
    return make(family, **sizes, **{"fuse_norm": True, "fuse_swiglu": True, **heads, **changes}).cuda()


def whole(model: Any, ids: Tensor) -> Tensor:
    """The loss of rows of one document."""
    return model(input_ids=ids, labels=ids).loss


def each_alone(model: Any, ids: Tensor) -> Tensor:
    """The loss of documents in a row of one, each in a call of its own."""
    parts = [part for part in ids[:1].split(DOCUMENTS, 1) if part.shape[1] > 1]
    items = sum(part.shape[1] - 1 for part in parts)
    return torch.stack([model(input_ids=part, labels=part, num_items_in_batch=items).loss for part in parts]).sum()


def packed(model: Any, ids: Tensor) -> Tensor:
    """The same in one call."""
    documents = [{"input_ids": part[0]} for part in ids[:1].cpu().split(DOCUMENTS, 1)]
    return model(**{name: each.cuda() for name, each in PackingCollator()(documents).items()}).loss


CALLS = {"whole rows": (whole, whole), "packed rows": (each_alone, packed)}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_with_its_own_kernels(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, call: str) -> None:
    """Gradients are off from a float32 model's by no more than those of the model in one piece."""
    take_smallest_candidates(monkeypatch)
    # Of documents in calls of their own l2_warp divides by the tokens of each.
    warps: dict[str, Any] = {"use_l2warp": False} if call == "packed rows" else {}
    model = for_kernels(family, **warps)
    # Its chunked delta rule takes no float32; the recurrent one does.
    truth = for_kernels(family, **warps, **({"attn_mode": "fused_recurrent"} if family == "delta_net" else {}))
    tokens = 300 if call == "whole rows" else sum(DOCUMENTS)
    ids = torch.randint(3, 256, (2, tokens), generator=torch.Generator().manual_seed(1)).cuda()
    plainly, wrappedly = CALLS[call]

    def gradients(model: Any, loss: Any) -> list[Tensor]:
        loss(model, ids).backward()
        return [parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None]

    def error(found: list[Tensor], expected: list[Tensor]) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5

    plain, ours = copy.deepcopy(model).to(dtype), wrap(copy.deepcopy(model).to(dtype), plan=Plan(layers=2, tokens=128))
    try:
        theirs = gradients(plain, plainly)
    except (AssertionError, RuntimeError) as refusal:
        pytest.skip(f"flash-linear-attention itself cannot train it here: {refusal}")
    expected = gradients(truth, plainly)
    size = sum(float(grad.square().sum()) for grad in expected) ** 0.5
    assert error(gradients(ours, wrappedly), expected) <= max(1.5 * error(theirs, expected), 2e-3 * size)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_cut_segments_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would hold the cuts of one batch: with the CUDA-graph runner, batches cut in other ways get the same numbers."""
    take_smallest_candidates(monkeypatch)
    model = for_kernels("gla")
    ids = torch.randint(3, 256, (1, sum(DOCUMENTS)), generator=torch.Generator().manual_seed(1)).cuda()
    ours = wrap(copy.deepcopy(model), plan=Plan(layers=1, tokens=64), runner="cuda-graph")
    for row in (ids, ids.flip(1), ids):
        ours.zero_grad()
        packed(ours, row).backward()
        whole(ours, row).backward()
    each_alone(model, ids).backward()
    whole(model, ids).backward()
    for (name, parameter), twin in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert parameter.grad is not None
        assert twin.grad is not None
        assert_same(twin.grad, parameter.grad, 2e-3, name)
