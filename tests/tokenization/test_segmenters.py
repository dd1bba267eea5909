"""Words of Chinese and Japanese by a dictionary, on real sentences, through marks, shards and masks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.types import WORD_START, Sample, pack
from unmask.data.prepare import prepare
from unmask.data.settings import DataConfig
from unmask.data.sources import MemorySource
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.tokenization.settings import ByteConfig, CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer
from unmask.tokenization.words import WordsRule, describe_words, version, word_lengths, word_starts

CHINESE = "小明硕士毕业于中国科学院计算所，后在日本京都大学深造。"
TRADITIONAL = "明天我們去學校看書，好嗎？"
JAPANESE = "明日は公園でTシャツを着て、国家公務員の本を読みました。"
MIXED = "2024年AI技術 hello, 한국어는 漢字를 쓴다! か\u3099くせい"


def cut(text: str, rule: WordsRule) -> list[str]:
    starts = np.flatnonzero(word_starts(text, rule)).tolist()
    assert not text[: starts[0]].strip()
    return [text[first:last].strip() for first, last in zip(starts, [*starts[1:], len(text)], strict=True)]


def test_chinese_words() -> None:
    words = "小明 硕士 毕业 于 中国科学院 计算所 ， 后 在 日本京都大学 深造 。"
    assert cut(CHINESE, "jieba") == words.split()
    assert cut(TRADITIONAL, "jieba")[:4] == ["明天", "我們", "去", "學校"]


def test_japanese_words() -> None:
    words = "明日 は 公園 で T シャツ を 着 て 、 国家 公務 員 の 本 を 読み まし た 。"
    assert cut(JAPANESE, "sudachi") == words.split()


@pytest.mark.parametrize("rule", ["jieba", "sudachi"])
def test_other_scripts_stay_as_spaces_have_them(rule: WordsRule) -> None:
    """A cut counts only beside Han or kana, and a combining mark starts nothing."""
    words = cut(MIXED, rule)
    assert words[0] == "2024" and {"hello", ",", "한국어는", "漢字", "를", "쓴다", "!"} <= set(words)
    english = "It's 3.14, isn't it? 그렇습니다."
    assert cut(english, rule) == cut(english, "spaces")


texts = st.lists(st.sampled_from([*CHINESE, *JAPANESE, *MIXED, " ", "\n", "\u3000", "\u0301", "\ud800"]), max_size=40)


@settings(max_examples=150, deadline=None)
@given(texts.map("".join), st.sampled_from(["jieba", "sudachi"]))
def test_between_spaces_and_characters(text: str, rule: WordsRule) -> None:
    """Every word of "spaces" starts one, and none starts where "characters" has none."""
    starts, spaces, characters = (word_starts(text, one) for one in (rule, "spaces", "characters"))
    assert (starts >= spaces).all() and (starts <= characters).all()


@settings(max_examples=60, deadline=None)
@given(texts.map("".join), texts.map("".join), st.sampled_from(["jieba", "sudachi"]))
def test_white_space_parts_what_is_cut(one: str, other: str, rule: WordsRule) -> None:
    """What stands behind a space doesn't change the words before it: so texts may be encoded in chunks."""
    other = other.lstrip("\u0301\u3099")
    both = word_starts(f"{one} {other}", rule)
    assert both.tolist() == [*word_starts(one, rule), False, *word_starts(other, rule)]


def test_long_runs_are_cut_in_parts() -> None:
    for rule in ("jieba", "sudachi"):
        lengths = word_lengths(rule, "東京都" * 7000)
        assert sum(lengths) == 21_000 and max(lengths) <= 21


@pytest.mark.parametrize(("text", "rule"), [(CHINESE, "jieba"), (JAPANESE, "sudachi")])
@pytest.mark.parametrize("kind", [WordPieceConfig(vocab_size=28, min_frequency=1), ByteConfig(), CharacterConfig()])
def test_whole_words_are_masked(text: str, rule: WordsRule, kind) -> None:
    tokenizer = train_tokenizer(iter([text] * 5), kind)
    encoded = tokenizer.encode(text * 4, rule)
    samples = [Sample(encoded.ids, encoded.marks, 0, number) for number in range(40)]
    masked = MaskedLMObjective(
        MaskedLMConfig(mask_rate=0.3, mask_unit="whole-word"), tokenizer.mask_id, tokenizer.regular_token_ids
    ).corrupt(pack(samples), 1)
    hit_BT = np.zeros(len(encoded.ids) * 40, dtype=bool)
    hit_BT[masked.positions_M] = True
    word_T = np.cumsum((encoded.marks & WORD_START) != 0)
    for hit_T in hit_BT.reshape(40, -1):
        selected, passed = set(word_T[hit_T].tolist()), set(word_T[~hit_T].tolist())
        unknown = set(word_T[encoded.ids == tokenizer.unknown_id].tolist())
        assert not (selected & passed) - unknown
    words = {text[a:b] for a, b in zip(*_edges(text, rule), strict=True)}
    assert any(len(word) > 2 for word in words), "the test would say nothing of single characters"


def _edges(text: str, rule: WordsRule) -> tuple[list[int], list[int]]:
    starts = np.flatnonzero(word_starts(text, rule)).tolist()
    return starts, [*starts[1:], len(text)]


def test_a_corpus_by_words(tmp_path: Path) -> None:
    """The shards hold the marks, the cache depends on the rule, and a note names it."""
    documents = [CHINESE * 3 + str(number) for number in range(120)]
    plain = DataConfig(tokenizer=CharacterConfig(min_frequency=1))
    source = MemorySource(documents, "NFC")
    by_words = replace(plain, words="jieba")
    corpora = [prepare(source, one, tmp_path, workers=1) for one in (plain, by_words)]
    assert corpora[0].folder != corpora[1].folder
    assert [corpus.words for corpus in corpora] == ["characters", "jieba"]
    assert [corpus.facts.get("segmenter") for corpus in corpora] == [None, version("jieba")]
    description = describe_words("jieba")
    assert f"words: {description} (data.words)" in corpora[1].notes and version("jieba") in description
    train = corpora[1].train
    assert corpora[1].tokenizer.decode(train.ids(0, 0, len(CHINESE))) == CHINESE
    marks = train.token_flags(0, 0, len(CHINESE))
    assert np.flatnonzero(marks & WORD_START).tolist() == _edges(CHINESE, "jieba")[0]


def test_the_error_without_the_package_names_what_to_install(tmp_path: Path) -> None:
    """Runs a process that sees all installed packages except these."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("rjieba", "sudachi")):
            os.symlink(entry, tmp_path / entry.name)
    program = """
import json
from unmask.core.errors import RecipeError
from unmask.tokenization.words import version
from unmask.tokenization.words import word_starts
errors = []
for rule in ("jieba", "sudachi"):
    for function in (lambda: version(rule), lambda: word_starts("今天", rule)):
        try:
            function()
        except RecipeError as error:
            errors.append([error.message, error.hint])
print(json.dumps(errors), len(word_starts("今天 hello", "spaces")))
"""
    source = str(Path(__file__).parents[2] / "src")
    seen = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), source])}
    done = subprocess.run([sys.executable, "-S", "-c", program], env=seen, capture_output=True, text=True, check=True)
    errors, _, characters = done.stdout.strip().rpartition(" ")
    needed = json.loads(errors)
    assert len(needed) == 4 and characters == "8"
    assert all('pip install "unmask[chinese]"' in next for _, next in needed[:2]) and "rjieba" in needed[0][0]
    assert all('pip install "unmask[japanese]"' in next for _, next in needed[2:]) and "sudachipy" in needed[3][0]
