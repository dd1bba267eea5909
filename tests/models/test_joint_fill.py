"""Joint filling: beam search against exhaustive enumeration, groups of masks, and whole words."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.core.errors import ModelError, TokenizerError
from unmask.models import build_model
from unmask.models.generate import segments
from unmask.models.joint_fill import JointFillResult
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    TokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import train_tokenizer
from unmask.tokenization.words import word_starts

TEXT = "the players play and the walkers walk ; playing and walking . 서울에 간다 . 서울은 크다 . " * 40


def build(text: str, kind: TokenizerConfig, seed: int = 1) -> Model:
    tokenizer = train_tokenizer([text], kind)
    torch.manual_seed(seed)
    shape = ModernBertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    encoder, head = build_model(shape, tokenizer.size)
    with torch.no_grad():  # so that the predictions depend on the other tokens
        for parameter in [*encoder.parameters(), *head.parameters()]:
            parameter.mul_(4)
    return Model(encoder, head, tokenizer, shape, {"context": 32, "words": "spaces"})


@cache
def tiny(seed: int) -> Model:
    """A model with a vocabulary of four characters."""
    return build("abc " * 40, CharacterConfig(), seed)


# Search --------------------------------------------------------------------------------------------------------------


def chain(model: Model, text: str, ids: tuple[int, ...], *, best_first: bool) -> float:
    """The joint log-probability of a filling by the chain rule, one forward pass for each mask."""
    tokenizer = model.tokenizer
    encoded = tokenizer.encode(text, specials_in_text=True)
    sequence = tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
    masks = [position for position, id_ in enumerate(sequence) if id_ == tokenizer.mask_id]
    wanted = dict(zip(masks, ids, strict=True))
    regular = torch.from_numpy(tokenizer.regular_token_ids)
    total = 0.0
    while masks:
        rows = model.log_probabilities([sequence], [masks])[0]
        row = int(rows[:, regular].max(dim=1).values.argmax()) if best_first else 0
        position = masks.pop(row)
        total += rows[row, wanted[position]].item()
        sequence[position] = wanted[position]
    return total


def enumerate_fillings(model: Model, text: str, *, best_first: bool) -> dict[tuple[int, ...], float]:
    regular = model.tokenizer.regular_token_ids.tolist()
    return {
        ids: chain(model, text, ids, best_first=best_first)
        for ids in itertools.product(regular, repeat=text.count("[MASK]"))
    }


PROMPTS = st.lists(st.sampled_from(["[MASK]", "a", "b", "c", " "]), min_size=2, max_size=7).map("".join)


@settings(deadline=None, max_examples=25)
@given(PROMPTS.filter(lambda text: 1 <= text.count("[MASK]") <= 3), st.integers(0, 3), st.booleans())
def test_a_wide_beam_equals_enumeration(text: str, seed: int, best_first: bool) -> None:
    """A beam of V for two masks, of V ** 2 for three."""
    model = tiny(seed)
    masks = text.count("[MASK]")
    expected = enumerate_fillings(model, text, best_first=best_first)
    (result,) = unmask.fill_jointly(
        model,
        text,
        top=64,
        method="best-first" if best_first else "beam",
        beam_size=4 ** max(1, masks - 1),
    )
    ranked = sorted(expected.values(), reverse=True)
    assert [one.log_probability for one in result.fillings] == pytest.approx(ranked, abs=1e-4)
    for one in result.fillings:
        assert one.log_probability == pytest.approx(expected[one.ids], abs=1e-4)
    assert len({one.ids for one in result.fillings}) == len(result.fillings) == len(expected)


@pytest.mark.parametrize("best_first", [False, True])
def test_both_orders_are_distributions(best_first: bool) -> None:
    """The probabilities of all fillings add up to the probability that no token is special."""
    model = tiny(0)
    total = sum(
        math.exp(value) for value in enumerate_fillings(model, "a[MASK][MASK] b", best_first=best_first).values()
    )
    assert 0.5 < total <= 1 + 1e-5


def test_the_orders_differ_and_a_narrow_beam_is_worse() -> None:
    found = {
        (method, size): [
            unmask.fill_jointly(tiny(seed), "[MASK]b[MASK] [MASK]", top=1, method=method, beam_size=size)[0].fillings[0]
            for seed in range(4)
        ]
        for method in ("beam", "best-first")
        for size in (1, 16)
    }
    scores = {key: np.array([one.log_probability for one in values]) for key, values in found.items()}
    assert not np.allclose(scores["beam", 16], scores["best-first", 16], atol=1e-3)
    for method in ("beam", "best-first"):
        assert (scores[method, 16] >= scores[method, 1] - 1e-5).all()


def test_one_mask_is_filled_as_by_fill() -> None:
    model = build(TEXT, WordPieceConfig(vocab_size=60))
    for text in ("the [MASK] walk", "play[MASK] and", "[MASK]에 간다"):
        (alone,) = unmask.fill(model, text, top=6)
        for method in ("beam", "best-first"):
            (joint,) = unmask.fill_jointly(model, text, top=6, method=method)
            assert [one.sequence for one in joint.fillings] == [one.sequence for one in alone.masks[0].candidates]
            assert [math.exp(one.log_probability) for one in joint.fillings] == pytest.approx(
                [one.score for one in alone.masks[0].candidates], rel=1e-4
            )


# Groups and text -----------------------------------------------------------------------------------------------------

KINDS = [
    WordPieceConfig(vocab_size=60),
    ByteBpeConfig(vocab_size=300),
    UnigramConfig(vocab_size=60),
    ByteConfig(),
    CharacterConfig(),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.kind)
def model(request: pytest.FixtureRequest) -> Model:
    return build(TEXT, request.param)


def fillings(results: list[JointFillResult]) -> list[list[tuple[tuple[int, ...], str]]]:
    return [[(one.ids, one.sequence) for one in result.fillings] for result in results]


def test_a_number_of_masks(model: Model) -> None:
    short, long, mixed = unmask.fill_jointly(
        model, ["the [MASK]*3 walk", "the [MASK][MASK][MASK] walk", "the [MASK]*2[MASK] walk"]
    )
    assert fillings([short]) == fillings([long]) == fillings([mixed])
    for one in short.fillings:
        assert len(one.tokens) == len(one.ids) == 3 and len(one.groups) == 1
        assert [model.tokenizer.token_to_id(token) for token in one.tokens] == list(one.ids)
    assert short.text == "the [MASK]*3 walk"
    scores = [one.log_probability for one in short.fillings]
    assert scores == sorted(scores, reverse=True) and len(scores) == 5


def test_the_text_around_the_masks_is_kept(model: Model) -> None:
    (result,) = unmask.fill_jointly(model, "The [MASK]*2 walk,  and [MASK].", top=20)
    for one in result.fillings:
        assert one.sequence.startswith("The") and " walk,  and" in one.sequence and one.sequence.endswith(".")
        assert "[MASK]" not in one.sequence and len(one.groups) == 2
        position = 0
        for group in one.groups:
            position = one.sequence.index(group.strip(), position)
    assert len({one.ids for one in result.fillings}) == 20


def test_bytes_of_one_character_are_joined() -> None:
    model = build("서울 " * 50, ByteConfig())
    ids = model.tokenizer.encode("서").ids.tolist()
    with torch.no_grad():  # a head that predicts only these bytes, in any order
        bias = model.head.decoder_parameters(model.encoder.token_embedding)[1]
        bias.fill_(-50)
        bias[ids] = 50
    (result,) = unmask.fill_jointly(model, "[MASK]*3울", top=27, beam_size=9)
    texts = {one.sequence for one in result.fillings}
    assert "서울" in texts and "\ufffd" not in "".join(texts)
    assert any("⟨" in text for text in texts), "other orders of these bytes are no character"


# Whole words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the [MASK] and", "[MASK] walk ;", "and ([MASK]) the", "play [MASK]"])
@pytest.mark.parametrize("method", ["beam", "best-first"])
def test_whole_words(model: Model, text: str, method: str) -> None:
    (result,) = unmask.fill_jointly(model, text, top=200, beam_size=40, method=method, words=3)
    expected = int(word_starts(text.replace("[MASK]", "x"), "spaces").sum())
    assert len(result.fillings) > 5
    for one in result.fillings:
        assert 1 <= len(one.ids) <= 3
        assert int(word_starts(one.sequence, "spaces").sum()) == expected, one.sequence
        assert one.sequence == text.replace("[MASK]", one.groups[0])
        assert "⟨" not in one.sequence
    assert {len(one.ids) for one in result.fillings} > {1}, "words of several tokens are found"
    scores = [one.log_probability for one in result.fillings]
    assert scores == sorted(scores, reverse=True)


def test_words_are_scored_as_groups(model: Model) -> None:
    """The log-probability of a word of two tokens is that of these tokens in a group of two masks, not divided."""
    (result,) = unmask.fill_jointly(model, "the [MASK] and", top=200, beam_size=300, words=2)
    (pairs,) = unmask.fill_jointly(model, "the [MASK]*2 and", top=1000, beam_size=300)
    of_pairs = {one.ids: one.log_probability for one in pairs.fillings}
    compared = [one for one in result.fillings if one.ids in of_pairs]
    assert compared
    for one in compared:
        assert one.log_probability == pytest.approx(of_pairs[one.ids], abs=1e-4)


def test_a_word_that_the_text_begins(model: Model) -> None:
    (result,) = unmask.fill_jointly(model, "서울[MASK] 간다", top=20, words=3)
    assert result.fillings
    for one in result.fillings:
        assert one.sequence.startswith("서울") and one.sequence.endswith(" 간다")
        assert int(word_starts(one.sequence, "spaces").sum()) == 2


def test_several_words(model: Model) -> None:
    (result,) = unmask.fill_jointly(model, "[MASK] and [MASK] .", top=12, words=2)
    assert {len(one.ids) for one in result.fillings} <= {2, 3, 4} and len(result.fillings) == 12
    for one in result.fillings:
        assert one.sequence == "{} and {} .".format(*one.groups)


def test_words_beside_han_need_no_space() -> None:
    """A mask after 们 begins a word, and neighboring tokens are joined."""
    text = "我们在北京大学学习，他们也在。 we love Beijing . 我们爱北京！ " * 40
    model = build(text, WordPieceConfig(vocab_size=47))
    model.card["words"] = "characters"
    (result,) = unmask.fill_jointly(model, "我们[MASK]北京", top=30, words=2)
    assert {"他", "爱", "，"} <= {one.groups[0] for one in result.fillings}
    (result,) = unmask.fill_jointly(model, "我们[MASK]*2北京", top=1000, beam_size=50)
    han = [one for one in result.fillings if all(len(token) == 1 and token > "z" for token in one.tokens)]
    assert han and all(one.sequence == f"我们{''.join(one.tokens)}北京" for one in han)
    for one in unmask.generate(model, "我们在", "北京。", length=6, num=5, temperature=3.0):
        assert not re.search("[一-龥，。！] | [一-龥，。！]", one.text), one.text
        assert [part.text for part in list(segments(model, one))[-1]][-1] == "北京。"
    for seed in range(5):  # a space that is given stays
        (result,) = unmask.generate(model, "我们 ", " 北京", length=1, temperature=3.0, seed=seed)
        assert result.text.endswith(" 北京") and (result.text.startswith("我们 ") or result.tokens[0].startswith("##"))
    (result,) = unmask.generate(model, "we love ", "Beijing", length=2, top_k=1)
    assert result.text.startswith("we love") and result.text.endswith("Beijing")


def test_progress_is_reported() -> None:
    seen: list[float] = []
    unmask.fill_jointly(
        tiny(0), ["[MASK]*2", "a[MASK] [MASK]"], on_progress=lambda task, fraction: seen.append(fraction)
    )
    assert seen == [0.25, 0.5, 0.75, 1.0]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("no mask", {}, r"there is no \[MASK\]"),
        ("", {}, r"there is no \[MASK\]"),
        ("a [MASK]*0 b", {}, r"\[MASK\]\*0 is 0 masks"),
        ("a [MASK]*500000 b", {}, r"is 500,000 masks, expected 1 to 100"),
        ("[MASK] " * 101, {}, "up to 101 masks"),
        ("[MASK]*40", {}, "the text has 42 tokens, and the context of the model is 32"),
        ("[MASK] [MASK] [MASK] [MASK]", {"words": 4}, "256 combinations, expected at most 100"),
        ("[MASK]", {"words": 60}, "the context of the model is 32"),
        ("[MASK]", {"words": 0}, "invalid words: got 0"),
        ("[MASK]", {"beam_size": 0}, "invalid beam_size: got 0"),
        ("[MASK]", {"beam_size": 10**6}, "invalid beam_size"),
        ("[MASK]", {"top": 0}, "invalid top: got 0, expected 1 to 1,000"),
    ],
)
def test_invalid_input_is_named(text: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        unmask.fill_jointly(tiny(0), text, **options)
    assert caught.value.hint


def test_half_of_a_surrogate_pair_is_an_error() -> None:
    for fill in (
        lambda: unmask.fill(tiny(1), "a \ud800 [MASK]"),
        lambda: unmask.fill_jointly(tiny(1), "\ud800[MASK]", words=1),
        lambda: unmask.generate(tiny(1), "\ud800"),
    ):
        with pytest.raises(TokenizerError, match="not UTF-8") as caught:
            fill()
        assert "\\ud800" in caught.value.location
