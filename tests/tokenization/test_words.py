"""Where words and sentences start."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.tokenization.words import (
    WordsRule,
    detect_words,
    is_spaced_letter,
    sentence_starts,
    without_false_spaces,
    word_starts,
)


def words(text: str, rule: WordsRule = "spaces") -> list[str]:
    """The text cut where words start, without the white space."""
    cuts = [*np.flatnonzero(word_starts(text, rule)).tolist(), len(text)]
    return [text[first:last].strip() for first, last in pairwise(cuts)]


def sentences(text: str) -> list[str]:
    cuts = [*np.flatnonzero(sentence_starts(text)).tolist(), len(text)]
    return [text[first:last].strip() for first, last in pairwise(cuts)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's  mat, 1984.\n", ["The", "cat", "'", "s", "mat", ",", "1984", "."]),
        ("나는 학교에 간다.", ["나는", "학교에", "간다", "."]),
        ("na\u0308iv 👍🏽! ❤\ufe0fx", ["na\u0308iv", "👍", "🏽", "!", "❤\ufe0f", "x"]),
        (" \u0301\u0301a", ["\u0301\u0301a"]),
        ("", []),
        ("   ", []),
    ],
)
def test_words_between_spaces(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_words_of_one_character() -> None:
    assert words("天氣 好。a\u0301b", "characters") == ["天", "氣", "好", "。", "a\u0301", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  One. Two!  Three?\nFour", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Go." Then 3.14 was… enough', ['He said "Go."', "Then 3.14 was…", "enough"]),
        ("一。二！三", ["一。", "二！", "三"]),
        ("title\n\ntext", ["title", "text"]),
        ("「行。」他走", ["「行。」", "他走"]),
        ("", []),
        # Abbreviations, initials, numbers: a full stop that ends nothing.
        ("Dr. Who met J. R. Smith of the U.S. Army. So did I. Who?", ["Dr. Who met J. R. Smith of the U.S. Army.",
            "So did I.", "Who?"]),
        ("Fruit, e.g. figs, etc. grows (cf. Fig. 3). In 1984. At 3.14 p.m. today.",
            ["Fruit, e.g. figs, etc. grows (cf. Fig. 3).", "In 1984.", "At 3.14 p.m. today."]),
        ('See No. 5 and p. 7. "No." He left. No. She?', ["See No. 5 and p. 7.", '"No."', "He left.", "No.", "She?"]),
        ("1. First. Second.\n12. Third. It cost 12. Then",
            ["1. First.", "Second.", "12. Third.", "It cost 12.", "Then"]),
        ("by Dr.\nWho", ["by Dr.", "Who"]),
        ("Wait... Mr . X", ["Wait...", "Mr .", "X"]),
        # Korean: endings that no space follows, quotes that the sentence goes on after.
        ("그는 갔다.그녀도 왔다. 정말이요?네!", ["그는 갔다.", "그녀도 왔다.", "정말이요?", "네!"]),
        ('"정말 갔습니까?" 그가 물었다. "갔다."라고 했다.', ['"정말 갔습니까?"', "그가 물었다.", '"갔다."라고 했다.']),
        ("가.나.다.라 순서", ["가.나.다.라 순서"]),
        ("他說「行。」走了……好！？真的｡對", ["他說「行。」", "走了……好！？", "真的｡", "對"]),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


VISIBLE = st.text(st.characters(exclude_categories=("Cs",)))


@given(text=VISIBLE, rule=st.sampled_from(["spaces", "characters"]))
def test_every_visible_character_lies_in_a_word(text: str, rule: WordsRule) -> None:
    starts_N = word_starts(text, rule)
    assert len(starts_N) == len(sentence_starts(text)) == len(text)
    inside = False
    for character, start in zip(text, starts_N.tolist(), strict=True):
        assert not (start and character.isspace())
        inside = start or (inside and not character.isspace())
        if character.isalnum() or character in ".,!?":
            assert inside


@given(text=VISIBLE)
def test_characters_start_at_least_as_many_words(text: str) -> None:
    assert not (word_starts(text, "spaces") & ~word_starts(text, "characters")).any()


def test_the_rule_that_a_script_needs() -> None:
    assert detect_words("An English sentence with 漢字 in it.") == "spaces"
    assert detect_words("나는 漢字를 읽는다") == "spaces"
    assert detect_words("天氣很好 says he") == "characters"
    assert detect_words("カタカナと ひらがな") == "characters"
    assert detect_words("") == "spaces"


def test_marks_end_words_of_scripts_with_spaces() -> None:
    """Devanagari vowel signs and Arabic diacritics belong to the word before a mask; Han and kana need no space."""
    spaced = {character: is_spaced_letter(character) for character in "a7한िीً"}
    assert all(spaced.values()), spaced
    assert not any(map(is_spaced_letter, "北あカ，. "))
    assert without_false_spaces("hello 世 界 ， 你 好 。 the end") == "hello世界，你好。the end"
    assert without_false_spaces("한국어 는 the end .") == "한국어 는 the end ."
