"""Words belong to the text: what lies between two marked tokens is exactly a word, whatever the tokenizer."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.types import SENTENCE_START, WORD_START
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    TokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.tokenization.words import WordsRule, white_space, word_starts

ENGLISH = "The cat sat on the mat, and the dog's log... A naïve café! They said so. "
KOREAN = "나는 학교에 갔다. 너는 학교에 가고, 우리는 집에 있다. "
CHINESE = "天氣很好，我們去公園。他說：「好！」 "  # noqa: RUF001
JAPANESE = "私は学校へ行きました。ガラスのコップが好きです。"
DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("abcdefgstan가나다天氣がス", k=DRAW.randint(2, 7))) for _ in range(300)]
SAMPLE = [
    " ".join(DRAW.choices(WORDS, k=3000)),
    (ENGLISH + KOREAN + CHINESE + JAPANESE) * 20 + "\n🙂👍🏽 done 👩‍👩‍👧 ab\tcd\n",
]
EVERY = [
    WordPieceConfig(vocab_size=200),
    WordPieceConfig(vocab_size=200, lowercase=True, strip_accents=True),
    ByteBpeConfig(vocab_size=420),
    ByteBpeConfig(vocab_size=420, lowercase=True, strip_accents=True, clean_text=True),
    UnigramConfig(vocab_size=250),
    UnigramConfig(vocab_size=250, lowercase=True, strip_accents=True, clean_text=False),
    ByteConfig(),
    CharacterConfig(),
]
ALPHABETS = [
    "The cat's log, sat...",
    "나는 학교에 갔다. 뷁",
    "天氣很好，去公園。",
    "ガラスのコップが、",
    [
        "a",
        " ",
        "  ",
        "é",
        "e\u0301",
        "か\u3099",
        "\u1112\u1161\u11ab",
        "👩‍👩‍👧",
        "👍🏽",
        "❤\ufe0f",
        "\n",
        "\t",
        "\u3000",
    ],
    ["a", "천", "氣", " ", "\u0301", "\u200d", "\u200b", "\u00a0", "\x00", "\ufffd", "\u0378", "İ", "ß", "!", "'", "▁"],
]
TEXTS = st.one_of([st.lists(st.sampled_from(list(alphabet)), max_size=24).map("".join) for alphabet in ALPHABETS])


@pytest.fixture(scope="module", params=EVERY, ids=lambda value: value.kind)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    chosen: TokenizerConfig = request.param
    return train_tokenizer(SAMPLE, chosen)


def check(tokenizer: Tokenizer, text: str, rule: WordsRule) -> None:
    """The law of text/marks.py; characters that the normaliser takes away are nobody's."""
    encoded = tokenizer.encode(text, rule)
    word_N, white_N = np.cumsum(word_starts(text, rule)), white_space(text)
    unit_N = np.cumsum((encoded.marks & WORD_START) > 0)
    words_of_unit: dict[int, set[int]] = {}
    units_of_word: dict[int, set[int]] = {}
    holds_several: set[int] = set()
    for unit, (first, last) in zip(unit_N.tolist(), encoded.offsets.tolist(), strict=True):
        words = {int(word_N[at]) for at in range(first, last) if not white_N[at]}
        if len(words) > 1:
            holds_several.add(unit)
        for word in words:
            words_of_unit.setdefault(unit, set()).add(word)
            units_of_word.setdefault(word, set()).add(unit)
    assert all(len(units) == 1 for units in units_of_word.values()), "a word lies in one unit"
    assert 0 not in words_of_unit, "no word before the first start"
    for unit, words in words_of_unit.items():
        assert len(words) == 1 or unit in holds_several, "a unit is one word, where no token holds several"
        seen = [word for word in sorted(units_of_word) if min(words) <= word <= max(words)]
        assert sorted(words) == seen, "and otherwise neighbouring ones"
    sentence = (encoded.marks & SENTENCE_START) > 0
    assert not (sentence & ((encoded.marks & WORD_START) == 0)).any()
    assert sentence.any() == bool(words_of_unit)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_tokens_between_two_starts_are_a_word(tokenizer: Tokenizer, text: str) -> None:
    for rule in ("spaces", "characters"):
        check(tokenizer, text, rule)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_text_may_be_cut_at_single_spaces(tokenizer: Tokenizer, text: str) -> None:
    white_N = white_space(text)
    inner = range(1, len(text) - 1)
    at = [0, *(n for n in inner if text[n] == " " and not white_N[n - 1] and not white_N[n + 1]), len(text)]
    parts = [text[first:last] for first, last in itertools.pairwise(at)]
    joined = [id for part in parts for id in tokenizer.encode(part).ids.tolist()]
    assert tokenizer.splits_at_spaces and joined == tokenizer.encode(text).ids.tolist()


def tokens_of(tokenizer: Tokenizer, text: str, rule: WordsRule = "spaces") -> list[tuple[str, bool]]:
    encoded = tokenizer.encode(text, rule)
    return [(text[first:last], bool(mark & WORD_START)) for (first, last), mark in
            zip(encoded.offsets.tolist(), encoded.marks.tolist(), strict=True)]  # fmt: skip


def test_the_bytes_of_a_character_start_one_word() -> None:
    tokenizer = train_tokenizer([], ByteConfig())
    starts = [start for _, start in tokens_of(tokenizer, "뷁氣 a", "characters")]
    assert starts == [True, False, False, True, False, False, False, True]


def test_a_space_that_stands_alone_goes_with_its_word() -> None:
    for chosen in (ByteBpeConfig(vocab_size=420), UnigramConfig(vocab_size=250)):
        tokens = tokens_of(train_tokenizer(SAMPLE, chosen), "cat 뷁")
        assert (" ", True) in tokens and tokens[-1] == ("뷁", False)


def test_tokens_cross_no_word() -> None:
    for chosen in (ByteBpeConfig(vocab_size=420), UnigramConfig(vocab_size=250)):
        tokenizer = train_tokenizer(["don't stop... he said (well), 한국어'는 !!! "] * 60 + SAMPLE, chosen)
        for id in tokenizer.regular_token_ids.tolist():
            text = tokenizer.decode([id])
            if "\ufffd" not in text:
                assert int(word_starts(text, "spaces").sum()) <= 1, text
