"""Room card: words that a person wants asked more often.

Comes in: words, or a file with one in each line; a tokenizer and the rule for words; later ids of texts laid end to
end. Goes out: the words themselves, how the tokenizer spells them, and the slots where they stand. Called by: mlm,
workshop, pretrain (which puts a file's words into the run's recipe).

A word stands where whole units of the text (text.words) have the ids that spell it, with a space before or behind it or
without. An entry of several words ("heart attack", or 医院 where each character is a word) stands where its words
follow each other with one space between them, or none, as it was written; each of them is then drawn for itself.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START
from unmask.objectives.masking import LONGEST_LIST, MaskingConfig, PackedSequences, words_of
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

Settings = TypeVar("Settings")
Numbers = NDArray[np.int64]

_MOST_BYTES: Final = 1_000_000
_STEP: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_BACK: Final = pow(_STEP, -1, 1 << 64)
_SHOWN: Final = 5  # words that a message names


@dataclass(frozen=True)
class TokenizedWords:
    """How a tokenizer spells words, which of them it can't, and what a person is told of that."""

    ids: tuple[tuple[int, ...], ...]
    unspelled: tuple[str, ...]
    notes: str


def resolve_word_list(settings: Settings) -> Settings:
    """Settings with the words of a file in its place, so that a run goes on when the file has changed or is gone.

    Raises:
        RecipeError: there is no such file, or no list of words in it.
    """
    if isinstance(settings, MaskingConfig) and isinstance(settings.boosted_words, Path):
        return replace(settings, boosted_words=read_words(settings.boosted_words))
    return settings


def read_words(path: Path) -> tuple[str, ...]:
    """The words of a file, each once: UTF-8, one in each line.

    Raises:
        RecipeError: the file is missing, too large, no UTF-8, or holds no word.
    """

    def refused(what: str, next: str) -> RecipeError:
        return RecipeError(what, location=f"objective.boosted_words: {path}", hint=next)

    a_list = "give a text file with one word in each line"
    try:
        with path.open("rb") as file:
            held = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise refused(f"this list of words can't be read: {error.strerror or error}", a_list) from error
    if len(held) > _MOST_BYTES:
        raise refused(f"a list of words of more than {_MOST_BYTES:,} bytes", "keep the words that matter most")
    try:
        lines = held.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise refused(f"this list of words is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    words = _cleaned(lines)
    if not words:
        raise refused("there is no word in this list", a_list)
    if len(words) > LONGEST_LIST:
        raise refused(f"{len(words):,} words in this list", f"keep the {LONGEST_LIST:,} that matter most")
    return words


def _cleaned(lines: Iterable[str]) -> tuple[str, ...]:
    """Each word once, in NFC as text is, spaces inside it single."""
    words = (" ".join(unicodedata.normalize("NFC", line).split()) for line in lines)
    return tuple(dict.fromkeys(word for word in words if word))


def spell(words: Sequence[str], tokenizer: Tokenizer, rule: WordsRule) -> TokenizedWords:
    """How the tokenizer spells each word: behind a space, at a line's beginning, between brackets.

    Raises:
        RecipeError: it can spell none of them.
    """
    words = _cleaned(words)
    lines, places = list[str](), list[tuple[int, int]]()  # the character where a word begins, and its number
    at = 0
    for number, word in enumerate(words):
        line = f"a {word} a\n{word}\n({word})\n"
        firsts = (2, 5 + len(word), 7 + 2 * len(word))
        places += [(at + first, number) for first in firsts]
        lines.append(line)
        at += len(line)
    text = "".join(lines)
    encoded = tokenizer.encode(text, rule)
    found = _spellings(text, encoded.ids, encoded.marks, encoded.offsets, words, places)
    unspelled = tuple(word for number, word in enumerate(words) if number not in {held for _, held in found})
    if len(unspelled) == len(words):
        raise RecipeError(
            f"this tokenizer spells none of the words to boost as whole words: {_listed(unspelled)}",
            location="objective.boosted_words",
            hint="name words as they stand in the text, that the tokenizer knows without [UNK]",
        )
    said = f"boosted: {len(words) - len(unspelled):,} words (objective.boosted_words)"
    if unspelled:
        said += (
            f"; this tokenizer can't spell {len(unspelled):,} of the list as whole words, which are asked like any "
            f"other: {_listed(unspelled)}"
        )
    return TokenizedWords(tuple(dict.fromkeys(ids for ids, _ in found)), unspelled, said)


def preferred(
    settings: MaskingConfig, tokenizer: Tokenizer, rule: WordsRule, say: Callable[[str], object]
) -> tuple[tuple[int, ...], ...]:
    """The ids of the words that settings prefer; what can't be spelled is said.

    Raises:
        RecipeError: the file of words can't be read, or the tokenizer can spell none of them.
    """
    words = resolve_word_list(settings).boosted_words
    if not words:
        return ()
    spelled = spell(cast("tuple[str, ...]", words), tokenizer, rule)
    say(spelled.notes)
    return spelled.ids


def _spellings(
    text: str,
    ids: Int[np.ndarray, "N"],
    marks: NDArray[np.uint8],
    offsets: Int[np.ndarray, "N 2"],
    words: Sequence[str],
    places: Sequence[tuple[int, int]],
) -> list[tuple[tuple[int, ...], int]]:
    """Ids and number of each word that is whole units of the text at a place."""
    if not len(ids):
        return []
    begins = np.append(np.flatnonzero(marks & (WORD_START | SPECIAL)), len(ids))
    last_N = np.maximum.accumulate(offsets[:, 1])
    first_P = np.array([first for first, _ in places])
    after_P = first_P + np.array([len(words[number]) for _, number in places])
    slot_P = np.searchsorted(last_N, first_P, side="right")  # the first token that reaches beyond the beginning
    begin_P = begins[np.maximum(np.searchsorted(begins, slot_P, side="right") - 1, 0)]
    end_P = begins[np.searchsorted(begins, np.searchsorted(last_N, after_P, side="right"))]
    found: list[tuple[tuple[int, ...], int]] = []
    for begin, end, (_, number) in zip(begin_P.tolist(), end_P.tolist(), places, strict=True):
        if begin >= end or (marks[begin:end] & SPECIAL).any():
            continue
        if text[offsets[begin, 0] : last_N[end - 1]].strip() == words[number]:
            found.append((tuple(ids[begin:end].tolist()), number))
    return found


def _listed(words: Sequence[str]) -> str:
    further = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {further:,} more" if further > 0 else "")


class WordMatcher:
    """Finds words in ids by a hash of each stretch of ids; what it finds is compared."""

    def __init__(self, spellings: Sequence[Sequence[int]]) -> None:
        assert spellings and all(len(ids) for ids in spellings), "spellings of words"
        top = max(max(ids) for ids in spellings)
        self._hash_V = rng.bits(0, "preference", np.arange(top + 2))  # the last is that of any id beyond
        self._begins_V = np.zeros(top + 2, dtype=bool)
        self._begins_V[[ids[0] for ids in spellings]] = True
        self._by_length: dict[int, tuple[NDArray[np.uint64], Numbers]] = {}
        for length in sorted({len(ids) for ids in spellings}):
            ids_NL = np.array([ids for ids in spellings if len(ids) == length], dtype=np.int64)
            keys_N = (self._hash_V[ids_NL] * _powers(_STEP, length)).sum(axis=1, dtype=np.uint64)
            order = np.argsort(keys_N)
            self._by_length[length] = keys_N[order], ids_NL[order]

    def slots(self, ids_T: NDArray[np.integer[Any]], packed: PackedSequences) -> Bool[np.ndarray, "T"]:
        """Whether each slot belongs to one of the words."""
        first_U, size_U = words_of(packed, (packed.token_flags_T & SPECIAL) == 0)
        ends_T1 = np.zeros(len(ids_T) + 1, dtype=bool)
        ends_T1[first_U + size_U] = True
        known_T = np.minimum(ids_T, len(self._hash_V) - 1).astype(np.int64)
        total_T1 = np.zeros(len(ids_T) + 1, dtype=np.uint64)
        np.cumsum(self._hash_V[known_T] * _powers(_STEP, len(ids_T)), out=total_T1[1:])
        back_T = _powers(_BACK, len(ids_T))
        first_C = first_U[self._begins_V[known_T[first_U]]]
        text_end_C = packed.cu_seqlens[np.searchsorted(packed.cu_seqlens, first_C, side="right")]
        change_T1 = np.zeros(len(ids_T) + 1, dtype=np.int64)
        for length, (keys_N, ids_NL) in self._by_length.items():
            fits = first_C[(first_C + length <= text_end_C)]
            at = fits[ends_T1[fits + length]]
            key = (total_T1[at + length] - total_T1[at]) * back_T[at]
            place = np.minimum(np.searchsorted(keys_N, key), len(keys_N) - 1)
            at, place = at[keys_N[place] == key], place[keys_N[place] == key]
            is_it = (ids_T[at[:, None] + np.arange(length)] == ids_NL[place]).all(axis=1)
            np.add.at(change_T1, at[is_it], 1)
            np.add.at(change_T1, at[is_it] + length, -1)
        return np.cumsum(change_T1[:-1]) > 0


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """1, base, base² … modulo 2**64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)
