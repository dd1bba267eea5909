"""Room card: which characters a text has.

Comes in: text, passage by passage. Goes out: how often each character occurs, the text's size in UTF-8, its scripts,
and the characters that stand outside the main one. Called by: report.

What a letter is called in Unicode begins with its script ("HANGUL SYLLABLE GA"), which is all that is needed here.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.text.words import codes

_BLOCK_CHARACTERS: Final = 1 << 20  # counted at a time: a count costs as much as so many characters
_REPLACEMENT: Final = 0xFFFD
_ORDINARY_CONTROLS: Final = (0x09, 0x0A, 0x0D)


@dataclass(frozen=True)
class Foreign:
    """A character outside the main script."""

    character: str
    name: str
    count: int


class Letters:
    """Counts of characters: 8 bytes for each that Unicode can have, whatever the size of the text."""

    def __init__(self) -> None:
        self._counts_C: NDArray[np.int64] = np.zeros(0x110000, dtype=np.int64)
        self._held: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        """Count the characters of a text."""
        self._held.append(text)
        self._size += len(text)
        if self._size >= _BLOCK_CHARACTERS:
            self._count()

    def _count(self) -> None:
        self._counts_C += np.bincount(codes("".join(self._held)), minlength=len(self._counts_C))
        self._held, self._size = [], 0

    @property
    def counts_C(self) -> Int[np.ndarray, "C"]:
        """How often each code point occurs."""
        if self._held:
            self._count()
        return self._counts_C

    @property
    def distinct(self) -> int:
        """How many different characters there are."""
        return int(np.count_nonzero(self.counts_C))

    @property
    def utf8_bytes(self) -> int:
        """Bytes of the text as UTF-8."""
        counts_C = self.counts_C
        return sum(int(counts_C[first:].sum()) for first in (0, 0x80, 0x800, 0x10000))

    @property
    def replaced(self) -> int:
        """How often U+FFFD stands where something couldn't be decoded."""
        return int(self.counts_C[_REPLACEMENT])

    @property
    def controls(self) -> int:
        """Control characters other than tabs and line ends."""
        below = int(self.counts_C[:0x20].sum()) + int(self.counts_C[0x7F:0xA0].sum())
        return below - sum(int(self.counts_C[code]) for code in _ORDINARY_CONTROLS)

    def scripts(self) -> dict[str, float]:
        """The share of each script among all letters, the largest first."""
        found: Counter[str] = Counter()
        for code in np.flatnonzero(self.counts_C).tolist():
            if script := _script(chr(code)):
                found[script] += int(self.counts_C[code])
        total = max(1, found.total())
        return {script: count / total for script, count in found.most_common()}

    def foreign(self, most: int) -> tuple[Foreign, ...]:
        """The most frequent characters beyond ASCII that are no letters of the main script."""
        main = next(iter(self.scripts()), "")
        present = [code for code in np.flatnonzero(self.counts_C).tolist() if code >= 0x80]
        outside = [code for code in present if _script(chr(code)) != main and chr(code).isprintable()]
        outside.sort(key=lambda code: (-int(self.counts_C[code]), code))
        return tuple(
            Foreign(chr(code), unicodedata.name(chr(code), f"U+{code:04X}"), int(self.counts_C[code]))
            for code in outside[:most]
        )


def _script(character: str) -> str:
    """The script of a letter; an empty string for what is none."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    script = name.partition(" ")[0].partition("-")[0]
    return "HAN" if script in ("CJK", "IDEOGRAPHIC") else script
