"""The language model: segmentation, names, parts, equality with transformers, generation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from magc.errors import InputError, StateError
from magc.nn import Mamba2Config, Mamba2LM
from magc.nn.generation import sample
from tests.integrations.grouped_norm import norm_in_groups
from tests.kernels.compare import assert_close, gradients, packed_ids, randn, relative_error, splits
from tests.nn.helpers import in_segments, perturbed, small_config, small_lm


def token_ids(seed: int, batch: int, length: int, vocabulary: int = 29) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_segmentation_equals_the_whole(seed: int, packed: bool, tied: bool) -> None:
    model = small_lm(tie_embeddings=tied)
    ids = token_ids(seed, 2, 15)
    seq_idx = packed_ids(seed, 2, 15) if packed else None
    logits, state = model(ids, seq_idx=seq_idx)
    outputs, last = in_segments(model, ids, splits(seed, 15, [1.01, 2.0, 5.0][seed]), None, seq_idx)
    whole = [logits, *(s.ssm for s in state), *(s.conv for s in state)]
    parts = [torch.cat(outputs, 1), *(s.ssm for s in last), *(s.conv for s in last)]
    for a, e in zip(parts, whole, strict=True):
        assert_close(a, e, 1e-12)
    parameters = dict(model.named_parameters())
    truth = gradients(whole, parameters)
    for name, gradient in gradients(parts, parameters).items():
        assert_close(gradient, truth[name], 1e-10, name)


def test_state_dict_has_the_names_of_mamba_ssm() -> None:
    model = Mamba2LM(small_config())
    layer = [
        "norm.weight",
        "mixer.dt_bias",
        "mixer.A_log",
        "mixer.D",
        "mixer.in_proj.weight",
        "mixer.conv1d.weight",
        "mixer.conv1d.bias",
        "mixer.norm.weight",
        "mixer.out_proj.weight",
    ]
    expected = ["backbone.embedding.weight"]
    expected += [f"backbone.layers.{i}.{name}" for i in range(2) for name in layer]
    expected += ["backbone.norm_f.weight", "lm_head.weight"]
    assert sorted(model.state_dict()) == sorted(expected)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model.lm_head.weight.shape == (32, 8)


def test_parts_give_the_same_as_the_model() -> None:
    """Stem, layers and head, as a grid uses them; and none of them adds a parameter."""
    model = small_lm()
    ids, targets = token_ids(0, 2, 9), token_ids(1, 2, 9)
    targets[0, 3:5] = -100
    targets[1, 0] = -100
    x = model.stem(ids)
    for layer in model.layers:
        x, _ = layer(x, None)
    total, count = model.head(x, targets)
    logits, _ = model(ids)
    kept = targets != -100
    expected = -torch.log_softmax(logits, -1)[kept].gather(-1, targets[kept][:, None]).sum()
    assert_close(total, expected, 1e-12)
    assert int(count) == int(kept.sum()) == 15
    own = {id(p) for p in model.parameters()}
    assert {id(p) for part in (model.stem, *model.layers, model.head) for p in part.parameters()} == own
    assert model.head is model.head


def test_head_gives_zero_without_targets_and_sums_in_float32() -> None:
    model = small_lm(dtype=torch.bfloat16)
    x = (randn(0, 1, 4, 8).bfloat16(), randn(1, 1, 4, 8).float())
    total, count = model.head(x, torch.full((1, 4), -100))
    assert total.detach() == 0.0
    assert count == 0
    total, _ = model.head(x, token_ids(0, 1, 4))
    assert total.dtype == torch.float32
    expected = functional.cross_entropy(model.head.logits(x).float()[0], token_ids(0, 1, 4)[0], reduction="sum")
    assert_close(total, expected, 1e-6)


def test_copies_share_nothing_and_keep_their_ties() -> None:
    model = small_lm()
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.backbone.embedding.weight
    assert twin.head.projection is twin.lm_head
    assert twin.head.norm is twin.backbone.norm_f
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_initialisation_follows_mamba_ssm() -> None:
    torch.manual_seed(0)
    model = Mamba2LM(small_config(d_model=64, headdim=16, n_layer=4, vocab_size=512, bias=True))
    assert abs(float(model.stem.weight.detach().std()) - 0.02) < 1e-3
    mixer = model.layers[0].mixer
    bound = 1 / (128**0.5 * 4**0.5)  # kaiming_uniform(a=sqrt(5)) gives 1/sqrt(fan_in), over sqrt(n_layer)
    assert 0.98 * bound < float(mixer.out_proj.weight.detach().abs().max()) <= bound
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()


def test_to_empty_then_reset_parameters_makes_a_usable_model() -> None:
    with torch.device("meta"):
        model = Mamba2LM(small_config())
    model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.reset_parameters()
    logits, _ = model(token_ids(0, 2, 5))
    assert torch.isfinite(logits).all()
    assert model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mamba2-130m", 129),
        ("mamba2-370m", 368),
        ("mamba2-780m", 780),
        ("mamba2-1.3b", 1344),
        ("mamba2-2.7b", 2703),
    ],
)
def test_published_sizes_on_the_meta_device(name: str, millions: int) -> None:
    config = Mamba2Config.named(name)
    with torch.device("meta"):
        model = Mamba2LM(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.stem.weight.shape == (50288, config.d_model)


def test_meta_forward() -> None:
    with torch.device("meta"):
        model = Mamba2LM(small_config())
        logits, state = model(torch.zeros(2, 9, dtype=torch.int64))
        logits, state = model(torch.zeros(2, 1, dtype=torch.int64), state)
        total, _ = model.head(model.stem(torch.zeros(2, 9, dtype=torch.int64)), torch.zeros(2, 9, dtype=torch.int64))
    assert logits.shape == (2, 1, 32)
    assert logits.device.type == total.device.type == "meta"
    assert len(state) == 2


def test_logits_and_gradients_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = small_config(d_model=16, d_state=8, headdim=8, ngroups=2, vocab_size=48, n_layer=3, tie_embeddings=False)
    torch.manual_seed(0)
    model = perturbed(Mamba2LM(config))
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            num_heads=4,
            head_dim=8,
            vocab_size=48,
            hidden_size=16,
            state_size=8,
            num_hidden_layers=3,
            n_groups=2,
            chunk_size=8,
            tie_word_embeddings=False,
        )
    )
    names = {name: name.replace("backbone.embedding.", "backbone.embeddings.") for name in model.state_dict()}
    norm_in_groups(theirs).load_state_dict({names[name]: tensor for name, tensor in model.state_dict().items()})

    ids = token_ids(0, 2, 21, 48)
    logits, _ = model(ids)
    expected = theirs(ids, use_cache=False).logits
    assert relative_error(logits, expected) < 1e-5
    cotangent = randn(3, *logits.shape).float()
    ((logits * cotangent).sum() + (expected * cotangent).sum()).backward()
    their_parameters = dict(theirs.named_parameters())
    assert {names[name] for name, _ in model.named_parameters()} == set(their_parameters)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, their_parameters[names[name]].grad) < 1e-5, name


def greedy_by_full_forward(model: Mamba2LM, ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        logits, _ = model(ids)
        ids = torch.cat([ids, logits[:, -1:, : model.config.vocab_size].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("prefill_segment", [1, 3, 64])
def test_generate_equals_greedy_choice_by_full_forward(prefill_segment: int) -> None:
    model = small_lm()
    ids = token_ids(0, 3, 7)
    actual = model.generate(ids, 12, prefill_segment=prefill_segment)
    assert torch.equal(actual, greedy_by_full_forward(model, ids, 12))
    assert not actual.requires_grad
    assert torch.equal(model.generate(ids, 0), ids)


def test_generate_stops_at_eos_row_by_row() -> None:
    model = small_lm()
    ids = token_ids(0, 3, 7)
    free = model.generate(ids, 12)[:, 7:]
    eos = int(free[0, 2])
    stopped = model.generate(ids, 12, eos=eos)[:, 7:]
    ends = []
    for row, truth in zip(stopped, free, strict=True):
        hits = (truth == eos).nonzero().flatten().tolist()
        end = hits[0] if hits else 11
        ends.append(end)
        assert torch.equal(row[: end + 1], truth[: end + 1])
        assert (row[end + 1 :] == eos).all()
    assert stopped.shape[1] == max(ends) + 1


def test_sampling_is_reproducible_and_produces_no_padding_ids() -> None:
    model = small_lm()
    ids = token_ids(0, 4, 3)
    draws = [
        model.generate(ids, 20, temperature=3.0, top_p=0.999, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert max(int(draw.max()) for draw in draws) < 29


def test_sample_honours_temperature_top_k_and_top_p() -> None:
    probabilities = torch.tensor([0.5, 0.05, 0.3, 0.15])
    logits = probabilities.log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options: float | int) -> torch.Tensor:
        tokens = sample(logits, generator=generator, **{"temperature": 1.0, **options})
        return torch.bincount(tokens, minlength=4) / 4000

    def close(actual: torch.Tensor, expected: list[float]) -> bool:
        wanted = torch.tensor(expected)
        return bool(((actual - wanted).abs() < 0.03).all() and (actual[wanted == 0] == 0).all())

    assert close(frequencies(), [0.5, 0.05, 0.3, 0.15])
    assert close(frequencies(top_k=2), [0.625, 0.0, 0.375, 0.0])
    assert close(frequencies(top_p=0.6), [0.625, 0.0, 0.375, 0.0])
    assert close(frequencies(top_p=0.01), [1.0, 0.0, 0.0, 0.0])
    sharp = probabilities.square() / probabilities.square().sum()
    assert close(frequencies(temperature=0.5), sharp.tolist())
    assert close(frequencies(temperature=0.0), [1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 3}, "no effect at temperature 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"eos": 29}, "eos must be a token id below 29"),
        ({"prefill_segment": 0}, "prefill_segment"),
    ],
)
def test_generate_refuses_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_lm().generate(token_ids(0, 1, 2), **{"max_new_tokens": 1, **options})


def test_wrong_inputs_are_refused() -> None:
    model = small_lm()
    with pytest.raises(InputError, match="input_ids must be integers"):
        model(torch.zeros(2, 3))
    with pytest.raises(InputError, match="num_last_tokens"):
        model(token_ids(0, 2, 3), num_last_tokens=0)
    _, state = model(token_ids(0, 2, 3))
    with pytest.raises(StateError, match="2 layers, the state 1"):
        model(token_ids(0, 2, 3), state[:1])
