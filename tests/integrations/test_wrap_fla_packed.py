"""Packed and padded rows of flash-linear-attention's models: what each document gives alone, by the models' own code."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from magc import Plan, Segmented, grid_checkpoint
from magc.data import PackingCollator
from magc.errors import InputError
from magc.integrations.fla import FLALayer
from magc.integrations.fla.documents import Positions
from magc.integrations.fla.pieces import Group, Piece, cut, rows_joined, rows_of
from magc.integrations.wrap import wrap, wrapped
from magc.plan import PlanOrRule
from tests.integrations.fla_models import PREFIXES, fla, tiny, use_plain_kernels
from tests.integrations.models import (
    PLANS,
    TOKENS,
    VOCABULARY,
    InDouble,
    assert_same,
    assert_same_gradients,
    batch,
    labels_of,
)

transformers: Any = pytest.importorskip("transformers")

LENGTHS = (4, 6, 1, 3, 5, 2)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention with plain PyTorch in place of its kernels."""
    use_plain_kernels(monkeypatch)


def on_cpu(*families: str) -> Any:
    """Marks a test of these families on a CPU, all if none is named; RWKV-7 warns of itself."""
    of_families = pytest.mark.parametrize("family", families or PREFIXES)
    quiet = pytest.mark.filterwarnings("ignore:According to Bo")
    return lambda test: pytest.mark.usefixtures("plain")(quiet(of_families(test)))


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def alone(model: Any, items: int, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The loss of each document in a row of its own, by the model's own code, divided by the number of targets."""
    losses = []
    for document in documents(lengths):
        ids = torch.tensor([document["input_ids"]])
        if ids.shape[1] > 1:  # one token predicts nothing
            losses.append(model(input_ids=ids, labels=ids, num_items_in_batch=items).loss)
    return torch.stack(losses).sum()


def items_of(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != -100).sum())


# ---------------------------------------------------------------------- packed rows
@on_cpu()
def test_packed_rows_equal_separate_ones(family: str) -> None:
    model = tiny(family, use_l2warp=False).double()  # in separate calls it would divide by the tokens of each
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"])
    packed = PackingCollator(tokens=11)(documents())
    assert packed["input_ids"].shape == (2, 11)
    items = items_of(packed)
    with InDouble():
        expected, actual = alone(model, items), twin(**packed, num_items_in_batch=items)
        assert actual.logits is None
        assert_same(actual.loss, expected, 1e-12)
        expected.backward()
        actual.loss.backward()
    assert_same_gradients(twin, model, 1e-12)


@on_cpu("gla", "rwkv7")
def test_l2warp_counts_the_tokens_of_all_documents(family: str) -> None:
    model = tiny(family, use_l2warp=True).double()
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"])
    packed = PackingCollator()(documents())
    with InDouble():
        parts = [model(input_ids=torch.tensor([document["input_ids"]])).logits for document in documents()]
        logits = torch.cat(parts, 1)
        wanted = nn.functional.pad(packed["labels"], (0, 1), value=-100)[0, 1:]
        expected = fla("fla.modules.l2warp").l2_warp(nn.functional.cross_entropy(logits[0], wanted), logits)
        actual = twin(**packed).loss
        assert_same(actual, expected, 1e-12)
        expected.backward()
        actual.backward()
    assert_same_gradients(twin, model, 1e-12)


@on_cpu("gla", "retnet")
@pytest.mark.parametrize("seed", [1, 2])
def test_random_boundaries(family: str, seed: int) -> None:
    """Documents that end with a segment, span several, or have one token; rows cut alike and each in its own way."""
    draw = random.Random(seed)
    lengths = tuple(draw.choice((1, 1, 2, 3, 5, 8, 12)) for _ in range(8))
    packed = PackingCollator(tokens=draw.choice((12, 17, None)))(documents(lengths))
    tokens = packed["input_ids"].shape[1]
    borders: Any = draw.choice(("device", "rebuild"))
    plan = Plan(layers=draw.choice((1, 2)), tokens=draw.choice((2, 3, 5, 6, tokens)), borders=borders)
    model = tiny(family, num_hidden_layers=2).double()
    twin = wrap(copy.deepcopy(model), plan=plan)
    items = items_of(packed)
    with InDouble():
        expected, actual = alone(model, items, lengths), twin(**packed, num_items_in_batch=items).loss
        assert_same(actual, expected, 1e-12)
        expected.backward()
        actual.backward()
    assert_same_gradients(twin, model, 1e-12)


@on_cpu("gated_deltanet", "rwkv7")
def test_logits_of_packed_rows(family: str) -> None:
    model = tiny(family)
    packed = PackingCollator()(documents())
    del packed["labels"]
    logits = wrap(copy.deepcopy(model), plan=PLANS["layers x segments"])(**packed).logits
    for document, part in zip(documents(), logits[0].split(LENGTHS), strict=True):
        assert_same(part[None], model(input_ids=torch.tensor([document["input_ids"]])).logits, 2e-6)


@on_cpu("gla", "retnet", "rwkv7")
def test_nothing_leaks_across_documents(family: str) -> None:
    model = wrap(tiny(family), plan=PLANS["layers x segments"])
    packed = PackingCollator()(documents())
    embeddings = model.get_input_embeddings()(packed.pop("input_ids")).detach().requires_grad_()
    del packed["labels"]
    logits = model(inputs_embeds=embeddings, **packed).logits
    logits[0, 4:10].square().sum().backward()  # the second document
    assert embeddings.grad is not None
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached[4:10].all()
    assert not reached[:4].any()
    assert not reached[10:].any()


ARGUMENTS: dict[str, dict[str, Any]] = {
    "positions": {},
    "seq_idx alone": {"return_seq_idx": True, "return_position_ids": False},
    "cumulative lengths alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("case", "logits"),
    [*((case, False) for case in ARGUMENTS), ("its own cu_seqlens", False), ("its own cu_seqlens", True)],
)
def test_arguments_that_tell_of_documents(case: str, logits: bool) -> None:
    flattened = transformers.DataCollatorWithFlattening(**ARGUMENTS.get(case, {}))(documents())
    if case == "its own cu_seqlens":
        del flattened["position_ids"]
        flattened["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0)
    model = tiny("gla")
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"], logits=logits)
    items = items_of(flattened)
    expected, actual = alone(model, items), twin(**flattened, num_items_in_batch=items)
    assert (actual.logits is not None) == logits
    assert_same(actual.loss, expected, 1e-6)
    expected.backward()
    actual.loss.backward()
    assert_same_gradients(twin, model, 5e-6)


def test_trainer_packs(plain: None, tmp_path: Any) -> None:
    """A step over packed rows, as over one row per document."""

    def train(model: Any, collator: Any, rows: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=6 // rows,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=documents(), data_collator=collator).train()
        return model.state_dict()

    def one(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = torch.tensor([features[0]["input_ids"]])
        return {"input_ids": ids, "labels": ids.clone()}

    expected = train(tiny("gla"), one, rows=1)
    actual = train(wrap(tiny("gla"), plan=Plan(layers=1, tokens=4)), PackingCollator(tokens=12), rows=6)
    for name, value in expected.items():
        assert_same(actual[name], value, 1e-3, name)


# ---------------------------------------------------------------------- padding
@on_cpu()
def test_rows_padded_on_the_left_equal_bare_ones(family: str) -> None:
    check_padding(family, "left")


@on_cpu("gla")
def test_rows_padded_on_the_right_equal_bare_ones(family: str) -> None:
    check_padding(family, "right")


def check_padding(family: str, side: str) -> None:
    model = tiny(family, use_l2warp=False).double()  # which is refused in padded rows
    twin = wrap(copy.deepcopy(model), plan=PLANS["ragged"])
    inputs = batch(side)
    mask, labels = inputs["attention_mask"], labels_of(inputs)
    labels[mask.cumsum(1) == 1] = -100  # or padding on the left would have to predict a row's first token
    items = int((labels != -100).sum())
    with InDouble():
        logits, loss = twin(**inputs).logits, twin(**inputs, labels=labels, num_items_in_batch=items).loss
        losses: list[Tensor] = []
        for row in range(2):
            kept = mask[row] == 1
            bare = {"input_ids": inputs["input_ids"][row, kept][None], "labels": labels[row, kept][None]}
            own = model(**bare, num_items_in_batch=items)
            assert_same(logits[row, kept][None], own.logits, 1e-12)
            losses.append(own.loss)
        assert_same(loss, torch.stack(losses).sum(), 1e-12)
        torch.stack(losses).sum().backward()
        loss.backward()
    assert_same_gradients(twin, model, 1e-12)


@on_cpu("linear_attn", "rwkv7")
def test_what_padding_holds_does_not_matter(family: str) -> None:
    twin = wrap(tiny(family), plan=Plan(layers=1, tokens=4))
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :3] = mask[0, 9:] = mask[1, :1] = 0
    ids = batch()["input_ids"]
    logits = [twin(input_ids=torch.where(mask == 1, ids, fill), attention_mask=mask).logits for fill in (0, 7)]
    assert torch.equal(logits[0][mask == 1], logits[1][mask == 1])


def test_positions_beside_padding(plain: None) -> None:
    twin = wrap(tiny("gla"), plan=PLANS["ragged"])
    inputs = batch("left")
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert torch.equal(twin(**inputs, position_ids=positions).logits, twin(**inputs).logits)


# ---------------------------------------------------------------------- what stays as it was
@on_cpu("gla", "retnet")
def test_rows_of_one_document_take_the_path_of_bare_ones(family: str) -> None:
    model = wrap(tiny(family), plan=PLANS["ragged"])
    ids = batch()["input_ids"]
    more = {"position_ids": torch.arange(TOKENS)[None] + 2, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model(input_ids=ids, **more).logits, model(input_ids=ids).logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "padding between tokens": (
        {"attention_mask": torch.tensor([[1] * 4 + [0] * 2 + [1] * 5])},
        "between tokens of a row.*PackingCollator",
    ),
    "documents in a mask": (
        {"attention_mask": torch.tensor([[1] * 4 + [2] * 7])},
        "other values than 0 and 1.*position_ids or seq_idx",
    ),
    "packed and padded": (
        {"attention_mask": torch.tensor([[1] * 9 + [0] * 2]), "seq_idx": torch.tensor([[0] * 4 + [1] * 7])},
        "cannot be both.*PackingCollator",
    ),
    "two cumulative lengths": (
        {"cu_seqlens": torch.tensor([0, 4, 11]), "cu_seq_lens_q": torch.tensor([0, 5, 11])},
        "given cu_seqlens.*Leave it out",
    ),
}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_remedy(case: str) -> None:
    more, message = REFUSED[case]
    ids = torch.full((1, 11), 5)
    with pytest.raises(InputError, match=message):
        wrap(tiny("gla"), plan=PLANS["ragged"])(input_ids=ids, labels=ids, **more)


def test_layers_of_attention_are_refused(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla("fla.layers.attn"), "flash_attn_func", len)  # or a layer cannot be made
    model = tiny("gla", attn={"layers": [1], "num_heads": 2})
    with pytest.raises(InputError, match=r"layers.1 of this GLAForCausalLM is attention.*config.attn=None"):
        wrap(model, plan=Plan())


def test_the_report_says_what_it_costs(plain: None) -> None:
    report = " ".join(wrapped(wrap(tiny("gla"), plan=Plan())).explain().split())
    assert "one call for each, and is not captured as a CUDA graph" in report


# ---------------------------------------------------------------------- cuts, without flash-linear-attention
def test_a_segment_is_cut_where_documents_begin() -> None:
    positions = torch.tensor([[3, 4, 0, 1], [0, 1, 0, 1], [7, 8, 0, 1]])
    ends = (Piece(2, 4, False, 0),)
    ours = Group((0, 2), (Piece(0, 2, True, None), *ends))
    begins = Group((1,), (Piece(0, 2, False, 0), *ends))
    assert cut(positions, apart=False) == [ours, begins]
    first, last = (Group((row,), (Piece(0, 2, True, seen), *ends)) for row, seen in ((0, 3), (2, 7)))
    assert cut(positions, apart=True) == [first, begins, last]
    rows = torch.arange(6).view(3, 2)
    parts = [rows_of(rows, group.rows, 3) for group in (ours, begins)]
    assert torch.equal(rows_joined(parts, [ours, begins]), rows)


def test_positions_are_given_where_documents_begin() -> None:
    positions = Positions(torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]]), everywhere=False)
    assert isinstance(positions, Segmented)
    assert len(positions) == 6
    assert positions.segment(0, 4) is None
    assert positions.segment(5, 6) is None
    part = positions.segment(4, 5)
    assert part is not None
    assert part.tolist() == [[0], [4]]
    assert Positions(torch.tensor([[0, 1, 2]]), everywhere=True).segment(1, 3) is not None


class Shift(nn.Module):
    """A layer whose every state must start afresh: a decayed sum, a shift by a token, one behind it, places in a row."""

    layer_idx = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2)

    def forward(self, x: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Any, ...]:
        cache = past_key_values
        start = 0 if cache is None else cache.get_seq_length(0)
        before: dict[str, Any] = dict.fromkeys(("recurrent_state", "conv_state", "ffn_state"))
        if cache is not None and len(cache) > 0:
            before = cache[0]
        h, last, behind = (x.new_zeros(len(x), 4) if each is None else each for each in list(before.values())[:3])
        ys: list[Tensor] = []
        for t, step in enumerate(x.unbind(1)):
            h = 0.9 * h + torch.tanh((step + last) @ self.weight) * (start + t + 1)
            ys.append(h + behind)
            last, behind = step, h
        if cache is not None:
            cache.update(recurrent_state=h, conv_state=last, ffn_state=behind, layer_idx=0)
        return torch.stack(ys, 1), None, cache


@pytest.mark.parametrize("plan", [Plan(), Plan(tokens=1), Plan(tokens=4), Plan(tokens=(1, 2, 5, 3)), Plan(tokens=7)])
def test_every_state_starts_afresh(plan: PlanOrRule) -> None:
    """By hand, in float64: position_ids as they come from the collator, rows of a batch cut in different ways."""
    module, lengths = Shift(), ((4, 1, 6), (11,), (1, 1, 2, 7))
    layer = FLALayer(module)
    layer.rotates = True
    x = torch.randn(3, 11, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    expected = torch.stack(
        [
            torch.cat([module(part[None])[0][0] for part in row.split(sizes)])
            for row, sizes in zip(x, lengths, strict=True)
        ]
    )
    actual, states = grid_checkpoint([layer], x, plan=plan, positions=positions)
    assert_same(actual, expected, 1e-14)
    for state in (states[0].recurrent, states[0].feed_forward):
        assert state.shape == (3, 4)
    assert_same(states[0].conv, x[:, -1], 0.0)
    theirs = torch.autograd.grad(expected.square().sum(), [x, module.weight])
    for ours, their in zip(torch.autograd.grad(actual.square().sum(), [x, module.weight]), theirs, strict=True):
        assert_same(ours, their, 1e-13)


def test_positions_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"positions must be \(2 or 1, 5\).*got \(3, 5\)"):
        FLALayer(Shift())(torch.zeros(2, 5, 4), positions=torch.zeros(3, 5, dtype=torch.int64))


def test_a_layer_that_asks_where_it_is_must_say_so() -> None:
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    layer = FLALayer(Shift())
    _, state = layer(x)
    with pytest.raises(InputError, match="set the FLALayer's attribute rotates"):
        layer(x, state, positions=torch.tensor([[2, 3], [5, 6]]))
