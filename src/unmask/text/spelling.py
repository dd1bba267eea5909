"""Room card: what a piece reads as.

Comes in: a tokenizer. Goes out: for each piece its letters, how it stands to the text before it, and how it is shown to
a person. Called by: fill, fertility, and what prints tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from unmask.text.bpe import BYTE_OF
from unmask.text.structure import continuing_prefix, is_byte_level, leading_space
from unmask.text.tokenizer import Tokenizer
from unmask.text.words import is_letter, stands_without_spaces

Stand = Literal["as-is", "joins", "after-space"]
_SPACE: Final = "␣"


@dataclass(frozen=True)
class Piece:
    """Letters of a piece; bytes that are no letters by themselves stand as ⟨E5 A4⟩."""

    letters: str  # without the space before them
    stand: Stand  # as-is: where it is put; joins: to the word before it; after-space: a space stands before it


class Reader:
    """Reads the pieces of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        whole = tokenizer.to_json()
        self._tokenizer = tokenizer
        self._space, self._is_bytes, self.prefix = leading_space(whole), is_byte_level(whole), continuing_prefix(whole)
        self._special = frozenset(tokenizer.special_ids)

    def read(self, id: int) -> Piece:
        """A piece as text.

        Raises:
            TokenizerError: no piece has this id.
        """
        token = self._tokenizer.id_to_token(id)
        if id in self._special:
            return Piece(token, "as-is")
        if self.prefix and token.startswith(self.prefix) and len(token) > len(self.prefix):
            return Piece(token.removeprefix(self.prefix), "joins")
        is_led = bool(self._space) and token.startswith(self._space)
        letters = token[1:] if is_led else token
        if self._is_bytes:
            letters = _from_bytes(letters)
        elif self._space:
            letters = letters.replace(self._space, " ")
        if is_led:
            return Piece(letters, "after-space")
        return Piece(letters, "joins" if self._space else "as-is")

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
        for id in self._tokenizer.ordinary_N.tolist():
            piece = self.read(id)
            begins_V[id] = piece.stand == "after-space" or (bool(self.prefix) and self.needs_space("a", piece))
        return begins_V

    def needs_space(self, before: str, piece: Piece) -> bool:
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
