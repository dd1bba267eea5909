"""Words that are masked more often: reads the list, tokenizes the words and finds them in batches.

A word is found where whole words of the text (see `data.words`) have its token ids, with or without a space before or
after it. A list entry may have several words: "heart attack", or 医院 if each character is a word. It is found where
its words follow each other with the same spacing as in the entry. Each of its words is a unit of its own.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import RecipeError
from unmask.core.format import join_names
from unmask.core.types import SPECIAL, WORD_START
from unmask.objectives.masking import MAX_BOOSTED_WORDS, MaskingConfig, PackedSequences, word_units
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule

Settings = TypeVar("Settings")
Numbers = NDArray[np.int64]

_MAX_BYTES: Final = 1_000_000  # of a word list
_BASE: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE: Final = pow(_BASE, -1, 1 << 64)
_MAX_NAMES: Final = 5  # words listed in a message

_log = logging.getLogger("unmask")


@dataclass(frozen=True)
class TokenizedWords:
    """Token ids of words, the skipped words, and a message about both. A word that isn't tokenized whole is skipped."""

    ids: tuple[tuple[int, ...], ...]
    skipped: tuple[str, ...]
    message: str


def resolve_word_list(settings: Settings) -> Settings:
    """Return settings with the words of the file in place of its path. A run then doesn't depend on the file.

    Raises:
        RecipeError: the file can't be read or is not a word list.
    """
    if isinstance(settings, MaskingConfig) and isinstance(settings.boosted_words, Path):
        return replace(settings, boosted_words=read_word_list(settings.boosted_words))
    return settings


def read_word_list(path: Path) -> tuple[str, ...]:
    """Return the words of a UTF-8 file with one word per line, without duplicates.

    Raises:
        RecipeError: the file is missing, too large, not UTF-8, or has no words.
    """

    def invalid(message: str, hint: str) -> RecipeError:
        return RecipeError(message, location=f"objective.boosted_words: {path}", hint=hint)

    one_per_line = "give a text file with one word per line"
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise invalid(f"the word list can't be read: {error.strerror or error}", one_per_line) from error
    if len(content) > _MAX_BYTES:
        raise invalid(f"the word list has more than {_MAX_BYTES:,} bytes", "shorten it")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise invalid(f"the word list is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    words = _normalize(lines)
    if not words:
        raise invalid("the word list is empty", one_per_line)
    if len(words) > MAX_BOOSTED_WORDS:
        raise invalid(f"the word list has {len(words):,} words", f"shorten it to at most {MAX_BOOSTED_WORDS:,} words")
    return words


def _normalize(lines: Iterable[str]) -> tuple[str, ...]:
    """Return the words without duplicates, in NFC like the text, with single spaces."""
    words = (" ".join(unicodedata.normalize("NFC", line).split()) for line in lines)
    return tuple(dict.fromkeys(word for word in words if word))


def tokenize_words(words: Sequence[str], tokenizer: Tokenizer, rule: WordsRule) -> TokenizedWords:
    """Return the token ids of words after a space, at the beginning of a line and in brackets.

    Raises:
        RecipeError: none of the words can be tokenized as a whole word.
    """
    words = _normalize(words)
    lines, places = list[str](), list[tuple[int, int]]()  # a place is (character where a word begins, its number)
    start = 0
    for number, word in enumerate(words):
        line = f"a {word} a\n{word}\n({word})\n"
        firsts = (2, 5 + len(word), 7 + 2 * len(word))
        places += [(start + first, number) for first in firsts]
        lines.append(line)
        start += len(line)
    text = "".join(lines)
    encoded = tokenizer.encode(text, rule)
    tokenized = _whole_words(text, encoded.ids, encoded.marks, encoded.offsets, words, places)
    numbers = {number for _, number in tokenized}
    skipped = tuple(word for number, word in enumerate(words) if number not in numbers)
    if len(skipped) == len(words):
        raise RecipeError(
            f"the tokenizer can't encode any of the boosted words as a whole word: {join_names(skipped, _MAX_NAMES)}",
            location="objective.boosted_words",
            hint="list words as they are written in the text, without characters that the tokenizer maps to [UNK]",
        )
    message = f"boosted words: {len(words) - len(skipped):,} (objective.boosted_words)"
    if skipped:
        message += (
            f"; {len(skipped):,} can't be encoded as whole words and are masked like any other: "
            f"{join_names(skipped, _MAX_NAMES)}"
        )
    return TokenizedWords(tuple(dict.fromkeys(ids for ids, _ in tokenized)), skipped, message)


def tokenize_boosted_words(
    settings: MaskingConfig, tokenizer: Tokenizer, rule: WordsRule
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of the settings' boosted words and log which of them are skipped.

    Raises:
        RecipeError: none of the words can be tokenized as a whole word.
        TypeError: the settings have a path instead of words; `resolve_word_list` replaces it.
    """
    words = settings.boosted_words
    if isinstance(words, Path):  # reading it here would leave the words out of the run's recipe.toml
        raise TypeError("boosted_words is a path: call resolve_word_list() first")
    if not words:
        return ()
    tokenized = tokenize_words(words, tokenizer, rule)
    _log.info(tokenized.message)
    return tokenized.ids


def _whole_words(
    text: str,
    ids: Int[np.ndarray, "N"],
    token_flags: NDArray[np.uint8],
    offsets: Int[np.ndarray, "N 2"],
    words: Sequence[str],
    places: Sequence[tuple[int, int]],
) -> list[tuple[tuple[int, ...], int]]:
    """Return token ids and number of each word that is tokenized as whole words at its place in the text."""
    if not len(ids):
        return []
    starts = np.append(np.flatnonzero(token_flags & (WORD_START | SPECIAL)), len(ids))
    last_N = np.maximum.accumulate(offsets[:, 1])
    first_P = np.array([first for first, _ in places])
    after_P = first_P + np.array([len(words[number]) for _, number in places])
    token_P = np.searchsorted(last_N, first_P, side="right")  # the first token that ends after the word begins
    begin_P = starts[np.maximum(np.searchsorted(starts, token_P, side="right") - 1, 0)]
    end_P = starts[np.searchsorted(starts, np.searchsorted(last_N, after_P, side="right"))]
    tokenized: list[tuple[tuple[int, ...], int]] = []
    for begin, end, (_, number) in zip(begin_P.tolist(), end_P.tolist(), places, strict=True):
        if begin >= end or (token_flags[begin:end] & SPECIAL).any():
            continue
        if text[offsets[begin, 0] : last_N[end - 1]].strip() == words[number]:
            tokenized.append((tuple(ids[begin:end].tolist()), number))
    return tokenized


class WordMatcher:
    """Finds words in token ids by a rolling hash; each match is verified."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        assert words and all(len(ids) for ids in words), "each word has at least one token"
        top = max(max(ids) for ids in words)
        self._hash_V = rng.bits(0, "preference", np.arange(top + 2))  # the last entry stands for all larger ids
        self._is_first_V = np.zeros(top + 2, dtype=bool)
        self._is_first_V[[ids[0] for ids in words]] = True
        self._by_length: dict[int, tuple[NDArray[np.uint64], Numbers]] = {}
        for length in sorted({len(ids) for ids in words}):
            ids_NL = np.array([ids for ids in words if len(ids) == length], dtype=np.int64)
            keys_N = (self._hash_V[ids_NL] * _powers(_BASE, length)).sum(axis=1, dtype=np.uint64)
            order = np.argsort(keys_N)
            self._by_length[length] = keys_N[order], ids_NL[order]

    def find(self, ids_T: NDArray[np.integer[Any]], packed: PackedSequences) -> Bool[np.ndarray, "T"]:
        """Return a mask of the tokens that belong to one of the words."""
        first_U, size_U = word_units(packed, (packed.token_flags_T & SPECIAL) == 0)
        is_end_T1 = np.zeros(len(ids_T) + 1, dtype=bool)
        is_end_T1[first_U + size_U] = True
        clipped_T = np.minimum(ids_T, len(self._hash_V) - 1).astype(np.int64)
        prefix_T1 = np.zeros(len(ids_T) + 1, dtype=np.uint64)
        np.cumsum(self._hash_V[clipped_T] * _powers(_BASE, len(ids_T)), out=prefix_T1[1:])
        inverse_T = _powers(_INVERSE, len(ids_T))
        first_C = first_U[self._is_first_V[clipped_T[first_U]]]
        sequence_end_C = packed.cu_seqlens[np.searchsorted(packed.cu_seqlens, first_C, side="right")]
        change_T1 = np.zeros(len(ids_T) + 1, dtype=np.int64)
        for length, (keys_N, ids_NL) in self._by_length.items():
            start = first_C[first_C + length <= sequence_end_C]
            start = start[is_end_T1[start + length]]
            key = (prefix_T1[start + length] - prefix_T1[start]) * inverse_T[start]
            place = np.minimum(np.searchsorted(keys_N, key), len(keys_N) - 1)
            start, place = start[keys_N[place] == key], place[keys_N[place] == key]
            is_match = (ids_T[start[:, None] + np.arange(length)] == ids_NL[place]).all(axis=1)
            np.add.at(change_T1, start[is_match], 1)
            np.add.at(change_T1, start[is_match] + length, -1)
        return np.cumsum(change_T1[:-1]) > 0


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """Return 1, base, base**2 … modulo 2**64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)
