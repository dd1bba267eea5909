"""Displays tokens as text and measures a tokenizer on a text (`unmask tokenizer show` and `compare`)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START, Source
from unmask.tokenization.normalization import (
    continuing_prefix,
    falls_back_to_bytes,
    is_byte_level,
    leading_space,
    word_end,
)
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.trainers import BYTE_OF
from unmask.tokenization.words import WordsRule, is_letter, is_spaced_letter, without_false_spaces, word_starts

SpacingRule = Literal["as-is", "joins", "after-space"]
_SPACE: Final = "␣"
_BYTE_TOKEN: Final = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class TokenText:
    """The text of a token; bytes that don't form a character are written as ⟨E5 A4⟩."""

    letters: str  # without the space before them
    spacing: SpacingRule  # as-is; joins: continues the word before it; after-space: a space precedes it


class TokenFormatter:
    """Converts the tokens of one tokenizer into text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer_json = tokenizer.to_json()
        self._tokenizer, self.size = tokenizer, tokenizer.size
        self._space, self._is_bytes = leading_space(tokenizer_json), is_byte_level(tokenizer_json)
        self.prefix, self._word_end = continuing_prefix(tokenizer_json), word_end(tokenizer_json)
        self._special = frozenset(tokenizer.special_ids)
        # The ids of a vocabulary may have holes, and a model can predict one.
        self._holes = frozenset(range(tokenizer.size)) - {*self._special, *tokenizer.regular_token_ids.tolist()}
        self._has_byte_tokens = falls_back_to_bytes(tokenizer_json)
        self._read: dict[int, TokenText] = {}  # tokens that were read before

    @staticmethod
    @lru_cache(maxsize=8)
    def of(tokenizer: Tokenizer) -> TokenFormatter:
        """Return the formatter of a tokenizer. It is made once: reading tokenizer.json takes milliseconds."""
        return TokenFormatter(tokenizer)

    def read(self, id: int) -> TokenText:
        """Return a token as text, or ⟨no token 57⟩ for an id of the vocabulary without a token.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        if id not in self._read:
            self._read[id] = self._read_token(id)
        return self._read[id]

    def _read_token(self, id: int) -> TokenText:
        if id in self._holes:
            return TokenText(f"⟨no token {id}⟩", "as-is")
        token = self._tokenizer.id_to_token(id)
        if id in self._special:
            return TokenText(token, "as-is")
        if self._word_end and len(token) > len(self._word_end):
            token = token.removesuffix(self._word_end)
        if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            return TokenText(_decode_utf8(bytes([int(token[3:5], 16)])), "joins" if self._space else "as-is")
        if self.prefix and token.startswith(self.prefix) and len(token) > len(self.prefix):
            return TokenText(token.removeprefix(self.prefix), "joins")
        has_space = bool(self._space) and token.startswith(self._space)
        letters = token[1:] if has_space else token
        if self._is_bytes:
            letters = _decode_bytes(letters)
        elif self._space:
            letters = letters.replace(self._space, " ")
        if has_space:
            return TokenText(letters, "after-space")
        return TokenText(letters, "joins" if self._space else "as-is")

    def display(self, id: int) -> str:
        """Return a token for display: ␣ for a space, and "##" before a WordPiece token that continues a word."""
        token = self.read(id)
        letters = _SPACE if token.letters == " " else token.letters
        if token.spacing == "after-space":
            return _SPACE + letters
        return self.prefix + letters if token.spacing == "joins" else letters

    @cached_property
    def begins_word_V(self) -> NDArray[np.bool_]:
        """For each id, whether the token can't follow a letter directly: it includes a space or needs one."""
        begins_V = np.zeros(self._tokenizer.size, dtype=bool)
        for id in self._tokenizer.regular_token_ids.tolist():
            token = self.read(id)
            begins_V[id] = token.spacing == "after-space" or (bool(self.prefix) and self.needs_space("a", token))
        return begins_V

    @cached_property
    def unpredicted_ids(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids that are no predictions for a mask, and for a mask directly after a letter, unless all would be."""
        is_regular_V = np.zeros(self._tokenizer.size, dtype=bool)
        is_regular_V[self._tokenizer.regular_token_ids] = True
        continues_V = is_regular_V & ~self.begins_word_V
        return np.flatnonzero(~is_regular_V), np.flatnonzero(~(continues_V if continues_V.any() else is_regular_V))

    def needs_space(self, before: str, token: TokenText) -> bool:
        """Return whether a word that begins with this token would merge with the word before it."""
        if not before or not token.letters or token.spacing == "joins":
            return False
        first = token.letters[0]
        return is_spaced_letter(before[-1]) and is_letter(first) and is_spaced_letter(first)

    def decode(self, ids: Sequence[int], *, skip_specials: bool = True) -> str:
        """Decode ids to text, without the spaces beside Han and kana that a WordPiece decoder writes."""
        text = self._tokenizer.decode(ids, skip_specials=skip_specials)
        return without_false_spaces(text) if self.prefix else text


def _decode_bytes(letters: str) -> str:
    """Decode byte-level letters to text."""
    if not all(letter in BYTE_OF for letter in letters):
        return letters
    return _decode_utf8(bytes(BYTE_OF[letter] for letter in letters))


def _decode_utf8(data: bytes) -> str:
    """Decode bytes to text, or write them as ⟨E5 A4⟩."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"


@dataclass(frozen=True)
class TokenizerStats:
    """Statistics of a tokenizer on a text."""

    characters: int
    words: int
    tokens: int
    tokens_per_word: float
    characters_per_token: float
    unknown_share: float  # fraction of the characters
    tokens_per_second: float  # speed of encoding, word starts and offsets included
    vocabulary: int


@dataclass(frozen=True)
class TokenInfo:
    """One token of a text."""

    id: int
    token: str  # as in the vocabulary
    display: str
    first: int  # characters of the text [first, last)
    last: int
    starts_word: bool
    starts_sentence: bool
    is_special: bool


def first_texts(source: Source, max_characters: int) -> Iterator[str]:
    """Yield the first texts of a source, up to `max_characters` characters in total."""
    left = max_characters
    for part in source.parts():
        for chunk in source.documents(part):
            yield chunk.text[:left]
            left -= len(chunk.text)
            if left <= 0:
                return


def measure_tokenizer(tokenizer: Tokenizer, texts: Iterable[str], rule: WordsRule) -> TokenizerStats:
    """Return statistics over all texts; the speed is that of encoding on all threads of the library."""
    nonempty = [text for text in texts if text]
    if nonempty:
        tokenizer.encode(nonempty[0][:1000], rule)  # the first call fills lookup tables
    start = time.perf_counter()
    encodings = tokenizer.encode_batch(nonempty, rule)
    seconds = time.perf_counter() - start
    characters, tokens = sum(map(len, nonempty)), sum(len(encoding.ids) for encoding in encodings)
    words = sum(int(word_starts(text, rule).sum()) for text in nonempty)
    return TokenizerStats(
        characters=characters,
        words=words,
        tokens=tokens,
        tokens_per_word=tokens / max(1, words),
        characters_per_token=characters / max(1, tokens),
        unknown_share=sum(encoding.characters_unknown for encoding in encodings) / max(1, characters),
        tokens_per_second=tokens / max(seconds, 1e-9),
        vocabulary=tokenizer.size,
    )


def list_tokens(tokenizer: Tokenizer, text: str, rule: WordsRule, *, is_prompt: bool) -> list[TokenInfo]:
    """Return the tokens of a text; with `is_prompt`, "[MASK]" is the special token instead of plain text."""
    encoded, formatter = tokenizer.encode(text, rule, specials_in_text=is_prompt), TokenFormatter.of(tokenizer)
    return [
        TokenInfo(
            id,
            tokenizer.id_to_token(id),
            formatter.display(id),
            first,
            last,
            bool(mark & WORD_START),
            bool(mark & SENTENCE_START),
            bool(mark & SPECIAL),
        )
        for id, (first, last), mark in zip(
            encoded.ids.tolist(), encoded.offsets.tolist(), np.asarray(encoded.marks).tolist(), strict=True
        )
    ]
