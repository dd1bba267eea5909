"""`CachedEncoder` gives the results of `Tokenizer.encode` for every text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unmask.tokenization.fast_encode import CachedEncoder
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    TokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.tokenization.words import WordsRule

SAMPLE = [
    'The cat sat on the mat. "It is warm." she said, and the dog didn\'t mind! What now?\n',
    "Numbers 12, 1,000 and 3.14; a [MASK] and a [UNK]. 今天天氣很好。我們去公園。「好！」他說明天？ 食べる\n",
    "한국어 문장은 띄어 씁니다. cafe\u0301 naïve क\u093f हिन्दी की किताब\u200d \u200bend\u00ad x\ty  z\u3000w\n",
] * 4
KINDS: dict[str, TokenizerConfig] = {
    "wordpiece": WordPieceConfig(vocab_size=180, min_frequency=1),
    "bert": WordPieceConfig(vocab_size=150, min_frequency=1, lowercase=True, strip_accents=True),
    "characters": CharacterConfig(min_frequency=2),
    "bpe": ByteBpeConfig(vocab_size=300, min_frequency=1),
    "unigram": UnigramConfig(vocab_size=150),
    "bytes": ByteConfig(),
}
PARTS = (
    *(
        "the",
        "The",
        "cat",
        "sat",
        "x",
        "12",
        "dog's",
        "qqq",
        "ŽŽ",
        "[MASK]",
        "[UNK]",
        "한국어",
        "문장은",
        "食べ",
        "今",
        "天",
    ),
    *(
        " ",
        " ",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x1c",
        "\x01",
        "\x00",
        "\x85",
    ),
    *(".", "!", "?", "…", "。", "！", "？", '"', "'", "”", "»", ")", "」", "』", ",", "、", "-", "..", "$"),
    *("Dr.", "e.g.", "U.S.", "J.", "No.", "p.", "1.", "12.", "갔다.", "요?", "나.", "I.", "etc", "｡"),
    *("\u0301", "\u200d", "\u200b", "\u00ad", "\u0942", "\u093f", "\ufe0f", "😀", "\U000e0041", "\u1100\u1161", "▁"),
)
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.characters(exclude_categories=["Cs"])), max_size=14).map("".join)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return train_tokenizer(SAMPLE, KINDS[kind])


@cache
def encoder_of(kind: str, words: WordsRule) -> CachedEncoder:
    return CachedEncoder(tokenizer_of(kind), words)


def equal(encoder: CachedEncoder, tokenizer: Tokenizer, texts: Sequence[str], words: WordsRule) -> None:
    encoded, first = encoder.encode(texts), 0
    for text, tokens, unknown in zip(texts, encoded.num_tokens.tolist(), encoded.num_unknown.tolist(), strict=True):
        single = tokenizer.encode(text, words)
        here = slice(first, first + tokens)
        assert encoded.ids[here].tolist() == single.ids.tolist(), repr(text)
        assert encoded.marks[here].tolist() == single.marks.tolist(), repr(text)
        assert unknown == single.characters_unknown, repr(text)
        first += tokens
    assert first == len(encoded.ids) == len(encoded.marks)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5), words=st.sampled_from(["spaces", "characters", "jieba", "sudachi"]))
@example(texts=['end." x', "end.\n x", ' ". x', "a.) b", "。」x", "!。 x", "...! x"], words="spaces")
@example(texts=["", " ", "a ", " a", "a  b", "\n", "a\n b", "a \nb"], words="spaces")
@example(texts=["a\nb", "a.\n\nb", "\na", "a\n", "a\n\u0301b", "é\n.\n“x”…\ny", "1\n 2\n\t3 \n4"], words="spaces")
@example(texts=["가나다.\n《라》 마…” 바\n漢字(漢字)는\n사!」 아"], words="spaces")
@example(texts=["Dr. Who", 'No. 5 "No." 5 no.\n5', "1. A\n2. B\n 3. C 4. D", "J. R. U.S.) a.m. x"], words="spaces")
@example(texts=['갔다.그는 왔다."요?나 가.나 갔다..그', "갔다.", "그", "a요!나", "나다.A"], words="spaces")
@example(texts=["他Dr. 他", "Dr.他", "1.他 1. 他", "他1. x", "p.  7", "No. 7", "x no.”  7"], words="characters")
@example(texts=["今天。他", "好。\n他", "好. 他", "a他 b", "他\u0301他", "「好。」他"], words="characters")
@example(texts=["x\u200b a. \u00ad b \u200b c", "की किताब", "\x01 a", "a. \x01 b", "a. \u0301b"], words="spaces")
def test_the_results_equal_those_of_the_tokenizer(kind: str, texts: list[str], words: WordsRule) -> None:
    equal(encoder_of(kind, words), tokenizer_of(kind), texts, words)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_results_equal_the_first(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    encoder = CachedEncoder(tokenizer, "spaces")
    long = "word" * 30
    texts = [*SAMPLE, f"{long} {long}. {long}", "".join(SAMPLE), f"a  {long}\u200b {long}"]
    for _ in range(2):
        equal(encoder, tokenizer, texts, "spaces")
    assert encoder.agrees(texts)
    assert np.array_equal(encoder.encode([]).ids, np.zeros(0))
