"""Room card: chunks of text, the numbers that stand for them, and what is known of each.

Comes in: chunks and what they are encoded to. Goes out: where ideographs may be parted, what a chunk's flags are, a
table that turns the numbers of chunks into tokens. Called by: encoder.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple, cast

import numpy as np
from jaxtyping import Int, UInt8
from numpy.typing import NDArray

from unmask.contracts import SENTENCE_START
from unmask.text.arrays import runs
from unmask.text.words import CLOSERS, FULL_STOPS, STOPS, stop_at

LEAD: Final = 128  # a mark in the table: of the token that starts a sentence where its chunk does
# What a chunk's flags say:
ENDS_AT_SPACE: Final = 1  # a sentence starts after it if white space follows
ENDS_ANYWHERE: Final = 2  # a sentence starts after it
LED_BY_SPACE: Final = 4  # it begins with a space, or a line feed
OPEN: Final = 8  # it can't be parted from what follows: nothing can be seen of its end, or no token stands for it
STRAY: Final = 16  # it can't be parted from what precedes: behind its space there is nothing to see
LED_BY_LINE: Final = 32  # it begins with a line feed, so that a sentence starts with it
UNLESS_NUMBER: Final = 64  # no sentence starts after it if a number follows
NUMBER: Final = 128  # behind its space, or line feed, it begins with a digit
_HAN: Final = "\u3400-\u4dbf\u4e00-\u9fff"  # what BERT's normaliser sets apart, as far as NFC leaves it alone
HAN_CUTS: Final = re.compile(rf"(?<=\S)(?= \S|[{_HAN}])")
HAN_AND_LINE_CUTS: Final = re.compile(rf"(?<=\S)(?=[ \n]\S|[{_HAN}])")
STARTS_WITH_HAN: Final = re.compile(f"[{_HAN}]")
_FIRST_ROWS: Final = 1 << 10
_CONTROLS: Final = (*range(0x20), *range(0x7F, 0xA0))
_SPACES: Final = (0x20, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
INVISIBLE: Final = frozenset(["", *map(chr, _CONTROLS), *map(chr, _SPACES)])  # white space, control characters, nothing
_AT_BEGINNING: Final = {" ": LED_BY_SPACE, "\n": LED_BY_SPACE | LED_BY_LINE}
_AT_END: Final = {
    **dict.fromkeys(INVISIBLE, OPEN),
    **dict.fromkeys(FULL_STOPS, ENDS_ANYWHERE),
    **dict.fromkeys(STOPS, ENDS_AT_SPACE),
}
_OF_STOP: Final = {"end": ENDS_AT_SPACE, "no end": 0, "end unless a number follows": ENDS_AT_SPACE | UNLESS_NUMBER}


class EncodedTexts(NamedTuple):
    """Texts as their tokens, end to end."""

    ids: Int[np.ndarray, "T"]
    marks: UInt8[np.ndarray, "T"]
    tokens_B: Int[np.ndarray, "B"]
    unknown_B: Int[np.ndarray, "B"]  # characters of each text that became [UNK]


class Rows(NamedTuple):
    """What is known of chunks, and their tokens end to end."""

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    tokens_C: NDArray[np.int64]
    unknown_C: NDArray[np.int64]
    flags_C: NDArray[np.uint8]

    def followed_by(self, other: Rows) -> Rows:
        """These chunks, then the others."""
        return Rows(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.marks, other.marks]),
            np.concatenate([self.tokens_C, other.tokens_C]),
            np.concatenate([self.unknown_C, other.unknown_C]),
            np.concatenate([self.flags_C, other.flags_C]),
        )

    def taken(self, chunks: NDArray[np.int64]) -> Rows:
        """These chunks, in this order."""
        tokens_C = self.tokens_C[chunks]
        first_C = (np.cumsum(self.tokens_C) - self.tokens_C)[chunks]
        place_T = runs(first_C, tokens_C)
        return Rows(self.ids[place_T], self.marks[place_T], tokens_C, self.unknown_C[chunks], self.flags_C[chunks])


class Table:
    """Rows by number."""

    def __init__(self) -> None:
        self.count = self.tokens = 0
        self._first_C, self._tokens_C, self._unknown_C, self.uses_C = (
            np.zeros(_FIRST_ROWS, dtype=np.int64) for _ in range(4)
        )
        self.flags_C: NDArray[np.uint8] = np.zeros(_FIRST_ROWS, dtype=np.uint8)
        self._ids, self._marks = np.zeros(_FIRST_ROWS, dtype=np.int32), np.zeros(_FIRST_ROWS, dtype=np.uint8)

    def add(self, rows: Rows) -> int:
        """The number of the first of the rows; the others follow it."""
        number, used = self.count, self.tokens
        self.count, self.tokens = number + len(rows.tokens_C), used + len(rows.ids)
        for name in ("_first_C", "_tokens_C", "_unknown_C", "uses_C", "flags_C"):
            setattr(self, name, _with_room(getattr(self, name), self.count))
        self._ids, self._marks = _with_room(self._ids, self.tokens), _with_room(self._marks, self.tokens)
        self._ids[used : self.tokens], self._marks[used : self.tokens] = rows.ids, rows.marks
        here = slice(number, self.count)
        self._first_C[here] = used + np.cumsum(rows.tokens_C) - rows.tokens_C
        self._tokens_C[here], self._unknown_C[here], self.flags_C[here] = rows.tokens_C, rows.unknown_C, rows.flags_C
        self.uses_C[here] = 0
        return number

    def rows(self) -> Rows:
        """All that is in the table."""
        chunks, tokens = slice(0, self.count), slice(0, self.tokens)
        known = (self._tokens_C[chunks], self._unknown_C[chunks], self.flags_C[chunks])
        return Rows(self._ids[tokens], self._marks[tokens], *known)

    def shrink(self, count: int, tokens: int) -> None:
        """Forget what was added since there were so many."""
        self.count, self.tokens = count, tokens

    def laid(self, numbers_K: NDArray[np.int64], first_B: NDArray[np.int64]) -> EncodedTexts:
        """The tokens of texts, given the numbers of their chunks and where each text's first stands."""
        tokens_K, flags_K = self._tokens_C[numbers_K], self.flags_C[numbers_K]
        led_K = (flags_K & LED_BY_SPACE) // LED_BY_SPACE  # as the bit ENDS_AT_SPACE
        counted_K = (flags_K[:-1] & UNLESS_NUMBER) // UNLESS_NUMBER & flags_K[1:] // NUMBER  # as in "No. 5"
        starts_K = np.ones(len(numbers_K), dtype=np.bool_)
        starts_K[1:] = (flags_K[:-1] & (ENDS_ANYWHERE | led_K[1:] & ~counted_K)) | (flags_K[1:] & LED_BY_LINE) != 0
        starts_K[first_B] = True
        place_T = runs(self._first_C[numbers_K], tokens_K)
        marks = self._marks[place_T]
        leads_T = (marks >= LEAD) & np.repeat(starts_K, tokens_K)
        marks &= np.uint8(LEAD - 1)
        marks |= leads_T.view(np.uint8) * np.uint8(SENTENCE_START)
        self.uses_C[: self.count] += np.bincount(numbers_K, minlength=self.count)
        unknown_B = np.add.reduceat(self._unknown_C[numbers_K], first_B)
        return EncodedTexts(self._ids[place_T], marks, np.add.reduceat(tokens_K, first_B), unknown_B)


def _with_room(array: NDArray[Any], needed: int) -> NDArray[Any]:
    if needed <= len(array):
        return array
    return np.concatenate([array, np.zeros(max(needed, 2 * len(array)) - len(array), dtype=array.dtype)])


def flags_of(chunk: str) -> int:
    """The flags that a chunk's own text gives it."""
    flags = _AT_BEGINNING.get(chunk[:1], 0)
    is_led = flags != 0
    begins = chunk[is_led : is_led + 1]
    if begins in INVISIBLE:
        flags |= STRAY
    elif is_led and begins.isdecimal():
        flags |= NUMBER
    last = len(chunk)
    if chunk[-1:] in CLOSERS:
        last = len(chunk.rstrip(CLOSERS))
        if chunk[last - 1 : last] in INVISIBLE:
            return flags
    if chunk[last - 1 : last] == ".":
        return flags | _OF_STOP[stop_at(chunk, last - 1)]
    return flags | _AT_END.get(chunk[last - 1 : last], 0)


def sets_han_apart(tokenizer_json: str) -> bool:
    """Whether every ideograph is a token by itself, so that a text may be cut before it."""
    whole = cast("dict[str, Any]", json.loads(tokenizer_json))
    normalizer, pre_tokenizer = whole["normalizer"] or {}, whole["pre_tokenizer"] or {}
    if pre_tokenizer.get("type") == "BertPreTokenizer":
        return any(step.get("handle_chinese_chars", False) for step in normalizer.get("normalizers", [normalizer]))
    return pre_tokenizer.get("type") == "Split" and pre_tokenizer.get("pattern") == {"Regex": r"[\s\S]"}
