# ruff: noqa: RUF001
"""Whole words and spans for every kind of tokenizer in four languages, and the table of docs/tokenizers.md.

`python tests/text/test_tokenizer_conformance.py` prints the table.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from unmask.core.types import SPECIAL, WORD_START
from unmask.objectives.masking import MaskingConfig, MaskUnit, PackedSequences, select_positions
from unmask.tokenization.analysis import TokenFormatter
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import Encoded, Tokenizer, train_tokenizer
from unmask.tokenization.words import WordsRule, detect_words, white_space, word_starts

PAGE = Path(__file__).parents[2] / "docs" / "tokenizers.md"
LEARNT = {
    "English": """The reader believes the story, and the writer is believed by the readers. It is unbelievable how able
        the unhappy walker was: he walked, talked and played with the players. "Walking is able-bodied playing," she
        said; he didn't reply. The happiest readers were reading the most readable stories.""",
    "Korean": """나는 오늘 학교에 갔다. 학교에서 친구를 만나고 친구와 책을 읽었다. 선생님은 "책을 읽는 사람이 좋다"고
        말했다. 우리는 집에 가서 밥을 먹고, 밤에는 하늘을 보았다. 학교는 멀지만 나는 학교가 좋다.
        친구들은 집에서 잔다.""",
    "Chinese": """今天天氣很好，我們去公園看書。老師說：「看書的人很多。」學生在學校學習，晚上回家吃飯。
        公園很大，人也很多，天氣好的時候我們都去。他說明天天氣不好，我們在家看書。""",
    "Japanese": """今日は天気がいいので、私たちは公園へ行きました。先生は「本を読む人が多い」と言いました。
        学校で本を読み、家に帰ってご飯を食べました。公園は大きくて、人が多いです。明日は学校へ行きます。""",
}
SENTENCES = {
    "English": "unbelievable walkers, the readers didn't talk.",
    "Korean": "학교에서 친구들을 보았다, 밥이 좋다.",
    "Chinese": "明天我們去學校看書，好嗎？",
    "Japanese": "明日は公園で本を読みました。",
}
KINDS = ("wordpiece", "bpe", "unigram", "bytes", "characters")
SIZES = {  # about as much as so little text gives
    "English": (140, 360, 160),
    "Korean": (115, 370, 125),
    "Chinese": (46, 365, 95),
    "Japanese": (92, 370, 120),
}


@cache
def tokenizer_of(kind: str, language: str) -> Tokenizer:
    wordpiece, bpe, unigram = SIZES[language]
    settings = {
        "wordpiece": WordPieceConfig(vocab_size=wordpiece),
        "bpe": ByteBpeConfig(vocab_size=bpe),
        "unigram": UnigramConfig(vocab_size=unigram),
        "bytes": ByteConfig(),
        "characters": CharacterConfig(),
    }
    return train_tokenizer([" ".join(LEARNT[language].split()) + "\n"] * 40, settings[kind])


def words_of_tokens(text: str, encoded: Encoded, rule: WordsRule) -> list[set[int]]:
    """The words that each token has characters of."""
    number_N, white_N = np.cumsum(word_starts(text, rule)), white_space(text)
    return [
        {int(number_N[at]) for at in range(first, last) if not white_N[at]} for first, last in encoded.offsets.tolist()
    ]


def is_whole(text: str, encoded: Encoded, rule: WordsRule, masked: NDArray[np.int64]) -> bool:
    """Whether each word is masked as a whole or not at all, apart from words with an unknown token."""
    held, is_masked = words_of_tokens(text, encoded, rule), np.isin(np.arange(len(encoded.ids)), masked)
    unknown = {word for words, mark in zip(held, encoded.marks, strict=True) if mark & SPECIAL for word in words}
    answers: dict[int, set[bool]] = {}
    for slot, words in enumerate(held):
        for word in words - unknown:
            answers.setdefault(word, set()).add(bool(is_masked[slot]))
    return all(len(one) == 1 for one in answers.values())


def law_holds(kind: str, language: str, how: MaskUnit) -> bool:
    tokenizer, sentence = tokenizer_of(kind, language), SENTENCES[language]
    text, rule = f"{sentence} {LEARNT[language][:60]}", detect_words(sentence)
    encoded = tokenizer.encode(text, rule)
    edges = np.array([0, len(encoded.ids)])
    for seed in range(60):
        packed = PackedSequences(encoded.marks, edges, np.array([[0, seed]]))
        masked = select_positions(packed, MaskingConfig(mask_rate=0.3, mask_unit=how), seed)
        if not len(masked) or not is_whole(text, encoded, rule, masked):
            return False
    return True


@pytest.mark.parametrize("how", ["whole-word", "span"])
@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_words_are_masked_as_a_whole(kind: str, language: str, how: MaskUnit) -> None:
    assert law_holds(kind, language, how)


def test_the_check_finds_words_that_are_masked_in_part() -> None:
    text = SENTENCES["English"]
    encoded = tokenizer_of("bpe", "English").encode(text)
    partial = np.flatnonzero(encoded.marks & WORD_START == 0)[:1]
    assert not is_whole(text, encoded, "spaces", partial)


def cut(kind: str, language: str) -> str:
    """The sentence with | between tokens and a middle dot between words."""
    tokenizer, sentence = tokenizer_of(kind, language), SENTENCES[language]
    encoded, reader = tokenizer.encode(sentence, detect_words(sentence)), TokenFormatter(tokenizer)
    shown = ""
    for number, (id, mark) in enumerate(zip(encoded.ids.tolist(), encoded.marks.tolist(), strict=True)):
        shown += (" · " if mark & WORD_START else "|") * bool(number) + reader.display(id)
    return shown


def table() -> str:
    lines = [
        "| language | kind | tokens | whole words | unknown | tokens per word |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for language, sentence in SENTENCES.items():
        for kind in KINDS:
            rule = detect_words(sentence)
            encoded = tokenizer_of(kind, language).encode(sentence, rule)
            several = sum(len(words) > 1 for words in words_of_tokens(sentence, encoded, rule))
            law = "yes" if law_holds(kind, language, "whole-word") and law_holds(kind, language, "span") else "no"
            law += f" ({several} span several)" if several else ""
            unknown = encoded.characters_unknown / len(sentence)
            fertility = len(encoded.ids) / int(word_starts(sentence, rule).sum())
            shown = cut(kind, language).replace("|", "\\|").replace("`", "")
            if kind == "bytes":
                shown = shown[: shown.find(" · ", 60)] + " · …"
            lines.append(f"| {language} | {kind} | `{shown}` | {law} | {unknown:.0%} | {fertility:.2f} |")
    return "\n".join(lines)


def test_the_page_shows_this_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), f"the table is now:\n\n{table()}"


if __name__ == "__main__":
    print(table())
