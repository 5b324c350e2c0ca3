"""The shipped base and its recipe: what it is, what it knows, and that the recipe repeats."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from video_ma2mba.data.chat import BpeTokenizer
from video_ma2mba.model.folder import load_pretrained
from video_ma2mba.small.base import EXAMINED_SECONDS
from video_ma2mba.small.language import LanguageRecipe, Probes, examine, train_language
from video_ma2mba.small.lessons import probed
from video_ma2mba.small.questions import KINDS
from video_ma2mba.small.settings import BASE
from video_ma2mba.small.sight import SightRecipe, train_sight
from video_ma2mba.small.standins import PLAIN, Disguise, StandIns, describe
from video_ma2mba.small.texts import SCHEMA, train_tokenizer
from video_ma2mba.small.world import COLOURS, SHAPES, THINGS, Event, Story

TINY = LanguageRecipe(d_model=32, n_layer=2, d_state=16, headdim=16, steps=3, tokens=200, longest=16, open=0.5)
STORY = Story(8, (Event(THINGS[0], "left", 1, 3, 0.5), Event(THINGS[-1], "up", 5, 2, 0.5)), 0)


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return train_tokenizer()


def test_the_base_is_small() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4 << 20


def test_the_bases_tokenizer_is_the_recipes(tokenizer: BpeTokenizer) -> None:
    shipped = BpeTokenizer.from_folder(BASE)
    text = "What colour was the circle? <|user|> 12 Wörter"
    assert shipped.size == tokenizer.size
    assert shipped.encode(text) == tokenizer.encode(text)


def test_the_base_reads_one_token_a_frame_in_the_small_runs_schema() -> None:
    config = load_pretrained(BASE).config
    assert config.vision.tokens_per_frame == 1
    assert config.chat == SCHEMA


def test_the_recipe_beside_the_base_says_how_it_was_made() -> None:
    recipe = json.loads((BASE / "recipe.json").read_text())
    assert recipe["language"].keys() == asdict(LanguageRecipe()).keys()
    assert recipe["sight"] == asdict(SightRecipe())
    assert set(recipe["language knows"]) == {f"{seconds} s" for seconds in EXAMINED_SECONDS}


@pytest.mark.parametrize("seconds", [16, 64, 128])
def test_the_bases_language_model_knows_what_its_recipe_says(seconds: int) -> None:
    model = load_pretrained(BASE).language
    found = examine(model, BpeTokenizer.from_folder(BASE), seconds, 40)
    told = json.loads((BASE / "recipe.json").read_text())["language knows"][f"{seconds} s"]
    # 40 questions of a kind instead of 128: three standard errors are 0.24 at most.
    assert found == {kind: pytest.approx(told[kind], abs=0.24) for kind in KINDS}
    assert found["first"] > 0.8


def test_a_languages_training_repeats(tokenizer: BpeTokenizer) -> None:
    first, second = (train_language(TINY, tokenizer, "cpu", lambda count, news: None) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_languages_training_goes_on(tokenizer: BpeTokenizer) -> None:
    start = train_language(TINY, tokenizer, "cpu", lambda count, news: None)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    further = train_language(replace(TINY, lr=1e-3), tokenizer, "cpu", lambda count, news: None, start=start)
    for name, value in further.state_dict().items():
        assert not torch.equal(value, before[name]), name
        torch.testing.assert_close(value, before[name], rtol=0.0, atol=1e-4)


def test_a_towers_training_repeats() -> None:
    recipe = SightRecipe(stories=2, steps=3, batch=8)
    (first, seen), (second, again) = (train_sight(recipe, lambda count, news: None) for _ in range(2))
    assert seen == again
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_levels_grow_to_the_longest_and_bring_options() -> None:
    recipe = LanguageRecipe(steps=100, longest=160, grow=0.5, open=0.3)
    assert [recipe.level(step).longest for step in (0, 50, 99)] == [8, 160, 160]
    assert [recipe.level(step).options for step in (29, 30)] == [False, True]


def test_a_disguise_begins_after_a_while_but_for_its_noise() -> None:
    whole = Disguise(noise=0.3, offset=1.0, empty=0.5, gain=0.2)
    recipe = LanguageRecipe(steps=100, disguise=whole, disguised=(0.5, 0.9))
    assert [recipe.disguise_at(step) for step in (0, 50)] == [Disguise(0.3, 0.0, 0.0, 0.0)] * 2
    assert recipe.disguise_at(70) == Disguise(0.3, pytest.approx(0.5), pytest.approx(0.25), pytest.approx(0.1))
    assert [recipe.disguise_at(step) for step in (90, 99)] == [whole] * 2
    assert replace(recipe, disguised=(0.0, 0.0)).disguise_at(0) == whole


def test_stand_ins_are_sums_of_words(tokenizer: BpeTokenizer) -> None:
    weight = torch.randn(tokenizer.size, 8, generator=torch.Generator().manual_seed(0))
    frames = StandIns(tokenizer).embed(weight, *describe([STORY]), disguise=PLAIN, generator=torch.Generator())
    word = {name: weight[tokenizer.encode(name)[0]] for name in (*COLOURS, *SHAPES, "right", "left", "nothing")}
    assert torch.equal(frames[0, 0], word["nothing"])
    x, y = STORY.events[0].centre(1)
    thing = STORY.events[0].thing
    expected = word[thing.colour] + word[thing.shape] + 1.5 * (2 * x - 1) * word["right"]
    assert y == 0.5
    torch.testing.assert_close(frames[0, 1], expected)


def test_disguised_stand_ins_share_an_offset_and_keep_their_words_apart(tokenizer: BpeTokenizer) -> None:
    weight = torch.randn(tokenizer.size, 8, generator=torch.Generator().manual_seed(0))
    standins, described = StandIns(tokenizer), describe([STORY] * 500)
    plain = standins.embed(weight, *described, disguise=PLAIN, generator=torch.Generator())
    disguise = Disguise(noise=0.0, offset=1.5, empty=0.0, gain=0.0)
    offset = standins.embed(weight, *described, disguise=disguise, generator=torch.Generator().manual_seed(1)) - plain
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset))
    # The length is uniform up to the most: its mean square is a third of the largest.
    assert offset.square().mean().sqrt() == pytest.approx(float(weight.std()) * 1.5 / 3**0.5, rel=0.1)
    disguise = Disguise(noise=0.0, offset=0.0, empty=0.0, gain=0.3)
    louder = standins.embed(weight, *described, disguise=disguise, generator=torch.Generator().manual_seed(1))
    empty = torch.tensor([STORY.shown(second) is None for second in range(STORY.seconds)])
    torch.testing.assert_close(louder[:, empty], plain[:, empty])
    factors = (louder / plain)[:, ~empty].flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert factors[:, 0].log().std() == pytest.approx(0.3, rel=0.1)


def test_probes_ask_for_number_thing_before_and_direction() -> None:
    number, colour, shape, direction = probed([STORY])[:, 0].tolist()
    assert number == [0, 1, 1, 1, 1, 2, 2, 2]
    assert colour == [0, 0, 0, 0, 0, 1, 1, 1]
    assert shape == [0, 0, 0, 0, 0, 1, 1, 1]
    assert direction == [0, 0, 1, 1, 1, 0, 3, 3]


def test_probes_are_content_with_what_they_ask_for() -> None:
    torch.manual_seed(0)
    probes = Probes(16)
    hidden = torch.randn(1, STORY.seconds, 16, requires_grad=True)
    optimizer = torch.optim.Adam([*probes.parameters(), hidden], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = probes(hidden, probed([STORY]))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
