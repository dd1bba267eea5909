"""Room card: what a piece reads as.

Comes in: a tokenizer. Goes out: for each piece its letters, how it stands to the text before it, and how it is shown to
a person. Called by: fill, fertility, and what prints tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START, Source
from unmask.tokenization.normalization import continuing_prefix, is_byte_level, leading_space
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.trainers import BYTE_OF
from unmask.tokenization.words import WordsRule, is_letter, stands_without_spaces, word_starts

SpacingRule = Literal["as-is", "joins", "after-space"]
_SPACE: Final = "␣"


@dataclass(frozen=True)
class TokenText:
    """Letters of a piece; bytes that are no letters by themselves stand as ⟨E5 A4⟩."""

    letters: str  # without the space before them
    stand: SpacingRule  # as-is: where it is put; joins: to the word before it; after-space: a space stands before it


class TokenFormatter:
    """Reads the pieces of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        whole = tokenizer.to_json()
        self._tokenizer = tokenizer
        self._space, self._is_bytes, self.prefix = leading_space(whole), is_byte_level(whole), continuing_prefix(whole)
        self._special = frozenset(tokenizer.special_ids)

    def read(self, id: int) -> TokenText:
        """A piece as text.

        Raises:
            TokenizerError: no piece has this id.
        """
        token = self._tokenizer.id_to_token(id)
        if id in self._special:
            return TokenText(token, "as-is")
        if self.prefix and token.startswith(self.prefix) and len(token) > len(self.prefix):
            return TokenText(token.removeprefix(self.prefix), "joins")
        is_led = bool(self._space) and token.startswith(self._space)
        letters = token[1:] if is_led else token
        if self._is_bytes:
            letters = _from_bytes(letters)
        elif self._space:
            letters = letters.replace(self._space, " ")
        if is_led:
            return TokenText(letters, "after-space")
        return TokenText(letters, "joins" if self._space else "as-is")

    def shown(self, id: int) -> str:
        """A piece for a person: ␣ for a space, ## before a piece that goes on where others begin without a sign."""
        piece = self.read(id)
        letters = _SPACE if piece.letters == " " else piece.letters
        if piece.stand == "after-space":
            return _SPACE + letters
        return self.prefix + letters if piece.stand == "joins" else letters

    @cached_property
    def begins_word_V(self) -> NDArray[np.bool_]:
        """Whether a piece can't stand directly behind a letter: it brings a space, or would need one."""
        begins_V = np.zeros(self._tokenizer.size, dtype=bool)
        for id in self._tokenizer.regular_token_ids.tolist():
            piece = self.read(id)
            begins_V[id] = piece.stand == "after-space" or (bool(self.prefix) and self.needs_space("a", piece))
        return begins_V

    def needs_space(self, before: str, piece: TokenText) -> bool:
        """Whether a word that begins with this piece would run into the word before it."""
        if not before or not piece.letters or piece.stand == "joins":
            return False
        return all(is_letter(side) and not stands_without_spaces(side) for side in (before[-1], piece.letters[0]))


def _from_bytes(letters: str) -> str:
    """Byte-level letters as the text that they spell."""
    if not all(letter in BYTE_OF for letter in letters):
        return letters
    data = bytes(BYTE_OF[letter] for letter in letters)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"


@dataclass(frozen=True)
class Measured:
    """A text by a tokenizer."""

    characters: int
    words: int
    tokens: int
    tokens_per_word: float
    characters_per_token: float
    unknown_share: float  # of the characters
    tokens_per_second: float  # ids, marks and offsets
    vocabulary: int


@dataclass(frozen=True)
class Cut:
    """One token of a text."""

    id: int
    piece: str  # as the vocabulary has it
    shown: str  # for a person
    first: int  # characters of the text [first, last)
    last: int
    starts_word: bool
    starts_sentence: bool
    is_special: bool


def some_text(source: Source, most_characters: int) -> Iterator[str]:
    """The first passages of a source, so many characters at most."""
    left = most_characters
    for part in source.parts():
        for passage in source.documents(part):
            yield passage.text[:left]
            left -= len(passage.text)
            if left <= 0:
                return


def measure(tokenizer: Tokenizer, texts: Iterable[str], rule: WordsRule) -> Measured:
    """Counts over all texts; the clock runs while they are encoded, on the threads that the library takes."""
    held = [text for text in texts if text]
    if held:
        tokenizer.encode(held[0][:1000], rule)  # the first call pays for tables
    began = time.perf_counter()
    encoded = tokenizer.encode_batch(held, rule)
    seconds = time.perf_counter() - began
    characters, tokens = sum(map(len, held)), sum(len(one.ids) for one in encoded)
    words = sum(int(word_starts(text, rule).sum()) for text in held)
    return Measured(
        characters=characters,
        words=words,
        tokens=tokens,
        tokens_per_word=tokens / max(1, words),
        characters_per_token=characters / max(1, tokens),
        unknown_share=sum(one.characters_unknown for one in encoded) / max(1, characters),
        tokens_per_second=tokens / max(seconds, 1e-9),
        vocabulary=tokenizer.size,
    )


def cuts(tokenizer: Tokenizer, text: str, rule: WordsRule, *, is_prompt: bool) -> list[Cut]:
    """The tokens of a text; special pieces in it are that in a prompt, letters in a text to learn from."""
    encoded, reader = tokenizer.encode(text, rule, specials_in_text=is_prompt), TokenFormatter(tokenizer)
    return [
        Cut(
            id,
            tokenizer.id_to_token(id),
            reader.shown(id),
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
