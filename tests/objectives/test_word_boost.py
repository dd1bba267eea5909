"""Words that a person wants asked more often: found in ids of every kind of tokenizer, asked so many times as often."""

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
from unmask.objectives.word_boost import WordMatcher, preferred, read_words, resolve_word_list, spell
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
    """What of the text is preferred: neighbouring slots as one, without the space around them."""
    tokenizer = tokenizer_of(kind)
    encoded = tokenizer.encode(text, rule)
    preference = WordMatcher(spell(words, tokenizer, rule).ids)
    packed = PackedSequences(encoded.marks, np.array([0, len(encoded.ids)]), np.zeros((1, 2), np.int64))
    hit = preference.slots(encoded.ids, packed)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hit.view(np.int8), [0]]))).reshape(-1, 2)
    return [text[encoded.offsets[a, 0] : encoded.offsets[b - 1, 1]].strip() for a, b in edges.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_found_wherever_they_stand(kind: str) -> None:
    """At a beginning, behind a space, in brackets, before a full stop or a line's end; never in a part of a word."""
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


def test_what_it_cannot_spell_is_said() -> None:
    said: list[str] = []
    ids = preferred(
        MaskingConfig(boosted_words=("heart", "žižek", " heart ", "")), tokenizer_of("wordpiece"), "spaces", said.append
    )
    assert ids and said == [
        "boosted: 1 words (objective.boosted_words); this tokenizer can't spell 1 of the list as whole words, which are "
        "asked like any other: žižek"
    ]
    with pytest.raises(RecipeError, match="none of the words to boost as whole words: žižek"):
        spell(["žižek"], tokenizer_of("wordpiece"), "spaces")
    assert preferred(MaskingConfig(), tokenizer_of("bpe"), "spaces", said.append) == () and len(said) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read"),
        (b"", "no word in this list"),
        (b" \n\t\n", "no word in this list"),
        (b"heart\n\xff\n", r"not UTF-8 \(byte 6\)"),
        (b"a" * 1_000_001, "more than 1,000,000 bytes"),
        ("\n".join(map(str, range(10_001))).encode(), "10,001 words"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=says) as refused:
        read_words(path)
    assert str(path) in refused.value.location and refused.value.hint


def test_a_list_is_read_once_in_nfc(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffheart\r\n\r\ncafe\u0301\r\n heart \nheart   attack\n".encode())
    assert read_words(path) == ("heart", "café", "heart attack")
    assert resolve_word_list(MaskedLMConfig(boosted_words=path)) == MaskedLMConfig(
        boosted_words=("heart", "café", "heart attack")
    )


@pytest.mark.parametrize("how", ["token", "whole-word"])
@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_the_factor_is_realised_and_the_rate_stays(how: str, factor: float) -> None:
    """Of 4,000 texts: listed words are asked `factor` times as often as the others, within four standard errors."""
    rng = np.random.default_rng(1)
    ids = [np.where(rng.random(80) < 0.1, 7, rng.integers(20, 900, 80)) for _ in range(4000)]
    batch = pack([Sample(one, np.full(80, WORD_START, np.uint8), 0, i) for i, one in enumerate(ids)])
    rule = MaskedLMConfig(mask_rate=0.15, mask_unit=how, boosted_words=("listed",), boost_factor=factor)
    plain, masked = (MaskedLMObjective(rule, 4, np.arange(5, 900), ids).corrupt(batch, 3) for ids in ((), [(7,)]))
    assert len(masked.positions_M) == len(plain.positions_M) == masked.denominators["mlm"], (
        "text by text, the numbers are the same"
    )
    listed = batch.ids_T.numpy() == 7
    hit = np.zeros(len(listed), dtype=bool)
    hit[masked.positions_M] = True
    often, seldom = hit[listed].mean(), hit[~listed].mean()
    error = often / seldom * ((1 - often) / hit[listed].sum() + (1 - seldom) / hit[~listed].sum()) ** 0.5
    # Texts with many listed words ask less of each, which moves the ratio of the means by less than 2 %.
    assert abs(often / seldom - factor) < 4 * error + 0.02 * factor
    assert hit.mean() == pytest.approx(0.15, abs=4 * 0.29 / 4000**0.5 / 80)


def test_a_text_of_listed_words_alone_and_a_factor_beyond_all() -> None:
    marks = np.full(40, WORD_START, np.uint8)
    some = np.where(np.arange(40) < 4, 7, 8)
    batch = pack([Sample(np.full(40, 7), marks, 0, 0), Sample(some, marks, 0, 1), Sample(np.full(40, 8), marks, 0, 2)])
    rule = MaskedLMConfig(mask_rate=0.2, boosted_words=("listed",), boost_factor=1000.0)
    at = MaskedLMObjective(rule, 4, np.arange(9, 90), [(7,)]).corrupt(batch, 3).positions_M.numpy()
    assert np.bincount(at // 40).tolist() == [8, 8, 8]
    assert set(range(40, 44)) <= set(at.tolist()), "always asked, and others for the rest"
    without = MaskedLMObjective(rule, 4, np.arange(9, 90)).corrupt(batch, 3).positions_M.numpy()
    assert (without[without >= 80] == at[at >= 80]).all(), "a text without listed words is asked as ever"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_are_those_of_a_search(data: st.DataObject) -> None:
    """Against a loop: entries of one to four ids, texts of few different ids, specials between."""
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
    assert WordMatcher(entries).slots(ids, packed).tolist() == expected.tolist()


def test_a_run_goes_on_without_its_list(prose: Path, tmp_path: Path) -> None:
    listed = tmp_path / "words.txt"
    listed.write_text("the\nand\n", encoding="utf-8")
    small = [
        "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=1", "model.intermediate_size=24", "train.threads=1",
        "data.tokenizer.vocab_size=120", f"objective.boosted_words={json.dumps(str(listed))}", "train.every.validate=100%",
        "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "preview.num_samples=0", "objective.mask_unit=whole-word",
    ]  # fmt: skip
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=[*small, "train.budget=2 steps"])
    recipe, _ = read_recipe(run)
    assert recipe.objective.boosted_words == ("the", "and")
    listed.unlink()
    resume(run, budget="4 steps")
    with pytest.raises(RecipeError, match="can't be read"):
        launch([prose], recipe="tiny", out=tmp_path / "other", settings=[*small, "train.budget=2 steps"])


def test_choose_by_itself_prefers_slots() -> None:
    packed = PackedSequences(np.full(100, WORD_START, np.uint8), np.array([0, 100]), np.zeros((1, 2), np.int64))
    wanted = np.arange(100) < 10
    rule = MaskingConfig(mask_rate=0.1, boost_factor=1e6)
    assert set(select_positions(packed, rule, 1, preferred_T=wanted).tolist()) <= set(range(11))
