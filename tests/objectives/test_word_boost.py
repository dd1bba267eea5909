"""Boosted words: found with every kind of tokenizer, and masked as often as the factor says."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START, Sample, pack
from unmask.objectives.masking import MaskingConfig, PackedSequences, select_positions
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.objectives.word_boost import (
    WordMatcher,
    read_word_list,
    resolve_word_list,
    tokenize_boosted_words,
    tokenize_words,
)
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
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import read_recipe

SAMPLE = [
    "The patient had a heart attack. A second attack (heart) followed; the hearty patient walked.\n",
    "환자는 병원에서 퇴원했다. 병원 (병원) 환자\n明天我們去醫院。醫院在哪裡？\n",
] * 6
KINDS: dict[str, TokenizerConfig] = {
    "wordpiece": WordPieceConfig(vocab_size=110, min_frequency=1),
    "bpe": ByteBpeConfig(vocab_size=320, min_frequency=1),
    "unigram": UnigramConfig(vocab_size=120),
    "bytes": ByteConfig(),
    "characters": CharacterConfig(min_frequency=1),
}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return train_tokenizer(iter(SAMPLE), KINDS[kind])


def found_in(text: str, words: list[str], kind: str, rule: WordsRule = "spaces") -> list[str]:
    """Parts of the text that are boosted: adjacent tokens joined, without the space around them."""
    tokenizer = tokenizer_of(kind)
    encoded = tokenizer.encode(text, rule)
    matcher = WordMatcher(tokenize_words(words, tokenizer, rule).ids)
    packed = PackedSequences(encoded.marks, np.array([0, len(encoded.ids)]), np.zeros((1, 2), np.int64))
    is_masked = matcher.find(encoded.ids, packed)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_masked.view(np.int8), [0]]))).reshape(-1, 2)
    return [text[encoded.offsets[a, 0] : encoded.offsets[b - 1, 1]].strip() for a, b in edges.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_found_at_every_place(kind: str) -> None:
    """At the beginning, after a space, in brackets, before a full stop or a line end; never inside a word."""
    text = "attack the heart (heart) hearty.\nheart, a heart attack.\nheart\n"
    assert found_in(text, ["heart"], kind) == ["heart"] * 5
    assert found_in(text, ["heart attack", "the"], kind) == ["the", "heart attack"]
    assert found_in(text, ["attack"], kind) == ["attack", "attack"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_korean_word_is_its_eojeol(kind: str) -> None:
    assert found_in("병원 환자는 병원에서 (병원) 병원.", ["병원"], kind) == ["병원"] * 3


@pytest.mark.parametrize("kind", ["wordpiece", "characters", "bytes"])
@pytest.mark.parametrize("rule", ["characters", "jieba"])
def test_a_chinese_word_may_be_several_units(kind: str, rule: WordsRule) -> None:
    assert found_in("我們去醫院。明天在醫院", ["醫院"], kind, rule) == ["醫院"] * 2


def test_words_that_cannot_be_tokenized_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "unmask")
    rule = MaskingConfig(boosted_words=("heart", "žižek", " heart ", ""))
    ids = tokenize_boosted_words(rule, tokenizer_of("wordpiece"), "spaces")
    assert ids and [record.getMessage() for record in caplog.records] == [
        "boosted words: 1 (objective.boosted_words); 1 can't be encoded as whole words and are masked like any other: "
        "žižek"
    ]
    with pytest.raises(RecipeError, match="any of the boosted words as a whole word: žižek"):
        tokenize_words(["žižek"], tokenizer_of("wordpiece"), "spaces")
    caplog.clear()
    assert tokenize_boosted_words(MaskingConfig(), tokenizer_of("bpe"), "spaces") == () and not caplog.records


def test_a_word_list_must_be_read_before_training(tmp_path: Path) -> None:
    rule = MaskingConfig(boosted_words=tmp_path / "words.txt")
    with pytest.raises(TypeError, match="resolve_word_list"):
        tokenize_boosted_words(rule, tokenizer_of("bpe"), "spaces")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"heart\n\xff\n", r"not UTF-8 \(byte 6\)"),
        (b"a" * 1_000_001, "more than 1,000,000 bytes"),
        ("\n".join(map(str, range(10_001))).encode(), "10,001 words"),
    ],
)
def test_an_invalid_word_list_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=says) as refused:
        read_word_list(path)
    assert str(path) in refused.value.location and refused.value.hint


def test_a_word_list_is_read_in_nfc_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffheart\r\n\r\ncafe\u0301\r\n heart \nheart   attack\n".encode())
    assert read_word_list(path) == ("heart", "café", "heart attack")
    assert resolve_word_list(MaskedLMConfig(boosted_words=path)) == MaskedLMConfig(
        boosted_words=("heart", "café", "heart attack")
    )


@pytest.mark.parametrize("how", ["token", "whole-word"])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_the_factor_is_reached_and_the_rate_is_kept(how: str, factor: float) -> None:
    """In 4,000 samples, boosted words are masked `factor` times as often as others, within four standard errors."""
    rng = np.random.default_rng(1)
    ids = [np.where(rng.random(80) < 0.1, 7, rng.integers(20, 900, 80)) for _ in range(4000)]
    batch = pack([Sample(one, np.full(80, WORD_START, np.uint8), 0, i) for i, one in enumerate(ids)])
    rule = MaskedLMConfig(mask_rate=0.15, mask_unit=how, boosted_words=("listed",), boost_factor=factor)
    plain, masked = (MaskedLMObjective(rule, 4, np.arange(5, 900), ids).corrupt(batch, 3) for ids in ((), [(7,)]))
    assert len(masked.positions_M) == len(plain.positions_M) == masked.denominators["mlm"], "the counts are the same"
    listed = batch.ids_T.numpy() == 7
    is_masked = np.zeros(len(listed), dtype=bool)
    is_masked[masked.positions_M] = True
    boosted_rate, other_rate = is_masked[listed].mean(), is_masked[~listed].mean()
    variance = (1 - boosted_rate) / is_masked[listed].sum() + (1 - other_rate) / is_masked[~listed].sum()
    error = boosted_rate / other_rate * variance**0.5
    # Samples with many boosted words mask each less often, which changes the ratio of the means by less than 2 %.
    assert abs(boosted_rate / other_rate - factor) < 4 * error + 0.02 * factor
    assert is_masked.mean() == pytest.approx(0.15, abs=4 * 0.29 / 4000**0.5 / 80)


def test_a_sequence_of_boosted_words_and_a_large_factor() -> None:
    marks = np.full(40, WORD_START, np.uint8)
    some = np.where(np.arange(40) < 4, 7, 8)
    batch = pack([Sample(np.full(40, 7), marks, 0, 0), Sample(some, marks, 0, 1), Sample(np.full(40, 8), marks, 0, 2)])
    rule = MaskedLMConfig(mask_rate=0.2, boosted_words=("listed",), boost_factor=1000.0)
    at = MaskedLMObjective(rule, 4, np.arange(9, 90), [(7,)]).corrupt(batch, 3).positions_M.numpy()
    assert np.bincount(at // 40).tolist() == [8, 8, 8]
    assert set(range(40, 44)) <= set(at.tolist()), "boosted tokens are always masked, others fill the count"
    without = MaskedLMObjective(rule, 4, np.arange(9, 90)).corrupt(batch, 3).positions_M.numpy()
    assert (without[without >= 80] == at[at >= 80]).all(), "a sample without boosted words has the same mask"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_matcher_equals_a_plain_search(data: st.DataObject) -> None:
    """Compared with a loop: entries of one to four ids, few different ids, special tokens in between."""
    ids = np.array(data.draw(st.lists(st.integers(3, 6), min_size=1, max_size=40)))
    marks = np.array(
        data.draw(st.lists(st.sampled_from([0, WORD_START, SPECIAL]), min_size=len(ids), max_size=len(ids)))
    )
    ids[marks == SPECIAL] = 1
    entries = data.draw(
        st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5)
    )
    middle = data.draw(st.integers(0, len(ids)))
    borders = sorted({0, middle, len(ids)})
    packed = PackedSequences(marks.astype(np.uint8), np.array(borders), np.zeros((len(borders) - 1, 2), np.int64))
    expected = np.zeros(len(ids), dtype=bool)
    for first, last in pairwise(borders):
        edges = [i for i in range(first, last) if i == first or marks[i] or marks[i - 1] == SPECIAL] + [last]
        for begin in edges:
            for entry in entries:
                end = begin + len(entry)
                if end in edges and tuple(ids[begin:end].tolist()) == entry:
                    expected[begin:end] = True
    assert WordMatcher(entries).find(ids, packed).tolist() == expected.tolist()


def test_a_run_resumes_without_its_word_list(prose: Path, tmp_path: Path) -> None:
    listed = tmp_path / "words.txt"
    listed.write_text("the\nand\n", encoding="utf-8")
    small = [
        "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=1",
        "model.intermediate_size=24", "train.threads=1", "data.tokenizer.vocab_size=120",
        f"objective.boosted_words={json.dumps(str(listed))}", "train.every.validate=100%",
        "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "preview.num_samples=0",
        "objective.mask_unit=whole-word",
    ]  # fmt: skip
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=[*small, "train.budget=2 steps"])
    recipe, _ = read_recipe(run)
    assert recipe.objective.boosted_words == ("the", "and")
    listed.unlink()
    resume(run, budget="4 steps")
    with pytest.raises(RecipeError, match="can't be read"):
        launch([prose], recipe="tiny", out=tmp_path / "other", settings=[*small, "train.budget=2 steps"])


def test_select_positions_with_boosted_tokens() -> None:
    packed = PackedSequences(np.full(100, WORD_START, np.uint8), np.array([0, 100]), np.zeros((1, 2), np.int64))
    boosted = np.arange(100) < 10
    rule = MaskingConfig(mask_rate=0.1, boost_factor=1e6)
    assert set(select_positions(packed, rule, 1, boosted_T=boosted).tolist()) <= set(range(11))
