"""Room card: chunks of text, the numbers that stand for them, and what is known of each.

Comes in: chunks and what they are encoded to. Goes out: where ideographs may be parted, what a chunk's flags are, a
table that turns the numbers of chunks into tokens. Called by: encoder.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

import numpy as np
import tokenizers
from jaxtyping import Int, UInt8
from numpy.typing import NDArray

from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START, runs
from unmask.tokenization.normalization import leading_space, lines_are_spaces, splits_at_lines
from unmask.tokenization.tokenizer import Tokenizer, token_marks
from unmask.tokenization.words import (
    CLOSERS,
    FULL_STOPS,
    KOREAN_ENDINGS,
    STOPS,
    KindsOfCharacters,
    WordsRule,
    codes,
    stop_at,
)

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


_PLAIN_BLOCK_CHARACTERS: Final = 1 << 12  # of chunks that are encoded as one text
_LETTER, _PUNCTUATION, _SPACE, _PLAIN_LINE, _OTHER = 1, 2, 3, 4, 5  # kinds of characters; 0: not looked up yet
_ENDS: Final = np.array([ord(character) for character in STOPS.replace(".", "")], dtype=np.uint32)
_LOOKED_AT: Final = np.array([ord(character) for character in CLOSERS + "."], dtype=np.uint32)  # may end nothing
_KOREAN: Final = np.array([ord(character) for character in KOREAN_ENDINGS], dtype=np.uint32)
_PLAIN_HAN: Final = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))


def _kind(code: int) -> int:
    character = chr(code)
    if character in " \n":
        return _SPACE if character == " " else _PLAIN_LINE
    if character.isalnum():  # WordPiece also parts ideographs, which the rule "spaces" doesn't
        return _OTHER if any(first <= code <= last for first, last in _PLAIN_HAN) else _LETTER
    if "!" <= character <= "~":
        return _PUNCTUATION
    # WordPiece parts what Unicode calls punctuation; of it, these end sentences within a chunk.
    return _PUNCTUATION if unicodedata.category(character)[0] == "P" and character not in FULL_STOPS else _OTHER


_kinds = KindsOfCharacters(_kind)


def blocks(lengths: Sequence[int], characters: int) -> list[int]:
    """How many neighbouring chunks to join to each text, so that it has about so many characters."""
    sizes, size, room = list[int](), 0, characters
    for length in lengths:
        size, room = size + 1, room - length
        if room <= 0:
            sizes.append(size)
            size, room = 0, characters
    return [*sizes, size] if size else sizes


def texts_of(chunks: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Neighbouring chunks joined, so many to each text."""
    bounds = itertools.accumulate(sizes, initial=0)
    return ["".join(chunks[first:last]) for first, last in itertools.pairwise(bounds)]


class PlainWords:
    """Encodes plain words with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._starts_V = _starting(tokenizer)
        self._unknown_id = -1 if tokenizer.unknown_id is None else tokenizer.unknown_id
        # WordPiece parts punctuation from letters as the rule for words does, and an unknown word is one token.
        self._is_wordpiece = not leading_space(tokenizer.to_json())
        self._lines_are_spaces = lines_are_spaces(tokenizer.to_json())

    @property
    def can(self) -> bool:
        """Whether its pieces say where words start."""
        return self._starts_V is not None

    def sorted_out(self, chunks: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of chunks that can be encoded here, and how many words each of them is."""
        sizes_C = np.fromiter(map(len, chunks), dtype=np.int64, count=len(chunks))
        text = "".join(chunks)
        if not text:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        codes_N = codes(text)
        kinds_N = _kinds(codes_N)
        if self._is_wordpiece:  # a sentence may end within 갔다.그는
            ends = np.flatnonzero((kinds_N[1:-1] == _PUNCTUATION) & (kinds_N[2:] != _SPACE)) + 1
            kinds_N[ends[np.isin(codes_N[ends - 1], _KOREAN)]] = _OTHER
        within_N1 = np.append(0, np.cumsum((kinds_N == _LETTER) | (self._is_wordpiece & (kinds_N == _PUNCTUATION))))
        starts_N = kinds_N == _PUNCTUATION
        starts_N[1:] |= (kinds_N[1:] == _LETTER) & (kinds_N[:-1] != _LETTER)
        words_N1 = np.append(0, np.cumsum(starts_N))
        ends_C = np.cumsum(sizes_C)
        first_C = ends_C - sizes_C
        begins_C = kinds_N[np.minimum(first_C, len(kinds_N) - 1)]
        is_led_C = (begins_C == _SPACE) | (self._lines_are_spaces & (begins_C == _PLAIN_LINE))
        plain = np.flatnonzero(is_led_C & (sizes_C > 1) & (within_N1[ends_C] - within_N1[first_C] == sizes_C - 1))
        return plain, (words_N1[ends_C] - words_N1[first_C])[plain]

    def rows(self, chunks: Sequence[str], words_C: NDArray[np.int64]) -> tuple[Rows, NDArray[np.bool_]]:
        """Rows of chunks of so many words, and whether each row is right; what isn't must be encoded otherwise."""
        assert self._starts_V is not None, "pieces that say where words start"
        sizes = blocks([len(chunk) for chunk in chunks], _PLAIN_BLOCK_CHARACTERS)
        texts = texts_of(chunks, sizes)
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        good_C = np.ones(len(chunks), dtype=np.bool_)
        parts: list[NDArray[np.int32]] = []
        counts: list[NDArray[np.int64]] = []
        first = 0
        for encoding, size in zip(encodings, sizes, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            starts = np.flatnonzero(self._starts_V[ids])
            unknown = np.flatnonzero(ids == self._unknown_id)
            until_C = np.cumsum(words_C[first : first + size])
            is_clear = len(starts) == until_C[-1] and starts[0] == 0 and (self._is_wordpiece or not len(unknown))
            if is_clear:
                parts.append(ids)
                begins = starts[np.append(0, until_C[:-1])]
                counts.append(np.diff(begins, append=len(ids)))
                good_C[first + np.searchsorted(begins, unknown, side="right") - 1] = False
            else:  # a word that is several to this tokenizer
                counts.append(np.zeros(size, dtype=np.int64))
                good_C[first : first + size] = False
            first += size
        ids = np.concatenate([np.zeros(0, dtype=np.int32), *parts])
        tokens_C = np.concatenate([np.zeros(0, dtype=np.int64), *counts])
        marks = self._starts_V[ids].view(np.uint8) * np.uint8(WORD_START)
        marks[(np.cumsum(tokens_C) - tokens_C)[tokens_C > 0]] |= np.uint8(LEAD)
        first_C, last_C = (codes("".join([chunk[end] for chunk in chunks])) for end in (0, -1))
        flags_C = np.full(len(chunks), LED_BY_SPACE, dtype=np.uint8)
        flags_C[first_C == ord("\n")] |= LED_BY_LINE
        flags_C[np.isin(last_C, _ENDS)] |= ENDS_AT_SPACE
        flags_C[[chunk[1].isdecimal() for chunk in chunks]] |= NUMBER
        for number in np.flatnonzero(np.isin(last_C, _LOOKED_AT)).tolist():
            flags_C[number] = flags_of(chunks[number])
        return Rows(ids, marks, tokens_C, np.zeros(len(chunks), dtype=np.int64), flags_C), good_C


def _starting(tokenizer: Tokenizer) -> NDArray[np.bool_] | None:
    """Which pieces start a word that stands alone behind a space; None where pieces don't say."""
    told = tokenizer.to_json()
    space = leading_space(told)
    model = cast("dict[str, Any]", json.loads(told))["model"]
    if not space and model["type"] != "WordPiece":
        return None
    starts_V = np.zeros(tokenizer.size, dtype=np.bool_)
    for piece, number in tokenizers.Tokenizer.from_str(told).get_vocab(with_added_tokens=True).items():
        starts_V[number] = (
            piece.startswith(space) if space else not piece.startswith(model["continuing_subword_prefix"])
        )
    return starts_V


_CHUNKS_KEPT: Final = 1 << 19  # about 120 MB
_TOKENS_KEPT: Final = 1 << 22  # 20 MB
_LONGEST_KEPT: Final = 48  # characters; a longer chunk hardly comes again
_BLOCK_CHARACTERS: Final = 1 << 13  # of new chunks that are encoded as one text
_COMPARED_CHARACTERS: Final = 100_000
_SPACER: Final = "a"
_LINE: Final = " \n"  # a line feed where texts are split at spaces: the piece behind one keeps it, and takes no space
_NOBODY: Final = -1
_MISSING: Final = -1
_WAITING: Final = -2  # rows that are not kept are numbered from here down

Numbers = NDArray[np.int64]


class _Spelled(NamedTuple):
    """Tokens of texts; their offsets count from the first text on, with one place between each and the next."""

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    offsets: Numbers


class _Cut(NamedTuple):
    """Texts as chunks."""

    numbers_K: Numbers
    first_B: Numbers  # where each text's first chunk stands


class CachedEncoder:
    """Encodes texts as `Tokenizer.encode` does, remembering chunks."""

    def __init__(self, tokenizer: Tokenizer, words: WordsRule, *, by_chunks: bool = True) -> None:
        """`by_chunks` allows the short cut, where the tokenizer does."""
        self._tokenizer = tokenizer
        self._words: WordsRule = words
        self._inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        self._inner.encode_special_tokens = True  # a text may hold the letters "[MASK]"
        self._plain = PlainWords(tokenizer, self._inner)
        self._special_V = np.zeros(tokenizer.size, dtype=np.uint8)
        self._special_V[list(tokenizer.special_ids)] = SPECIAL
        space = leading_space(tokenizer.to_json())
        self._space_id = tokenizer.token_to_id(space) if space else None
        self.by_chunks = by_chunks and tokenizer.splits_at_spaces
        self._parts_han = words == "characters" and sets_han_apart(tokenizer.to_json())
        self._parts_lines = self.by_chunks and splits_at_lines(tokenizer.to_json())
        self._table = Table()
        self._after_space: dict[str, int] = {}  # chunks of a space and this text, or of this text with its line feed
        self._literal: dict[str, int] = {}  # chunks of this text
        self._waiting: list[Rows] = []  # of the texts at hand

    def agrees(self, texts: Iterable[str]) -> bool:
        """Whether this gives what the tokenizer gives, by the first hundred thousand characters of texts."""
        pieces, room = list[str](), _COMPARED_CHARACTERS
        for text in texts:
            pieces.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        mine, its = self.encode(pieces), self._tokenizer.encode_batch(pieces, self._words)
        ids, marks = ([getattr(one, name) for one in its] for name in ("ids", "marks"))
        return mine.tokens_B.tolist() == list(map(len, ids)) and (
            not pieces
            or (np.array_equal(mine.ids, np.concatenate(ids)) and np.array_equal(mine.marks, np.concatenate(marks)))
        )

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """The tokens of texts, each for itself."""
        if not self.by_chunks or not texts:
            rows = self._rows(texts, is_whole=True)
            return EncodedTexts(rows.ids, rows.marks, rows.tokens_C, rows.unknown_C)
        self._make_room()
        numbers_K, first_B = self._numbered(texts)
        kept = self._table.count, self._table.tokens
        for rows in self._waiting:
            self._table.add(rows)
        self._waiting.clear()
        waits_K = numbers_K <= _WAITING
        numbers_K[waits_K] = kept[0] + (_WAITING - numbers_K[waits_K])
        encoded = self._table.laid(numbers_K, first_B)
        self._table.shrink(*kept)
        return encoded

    def _make_room(self) -> None:
        """Where the table is full, forget what was met only once, and of the rest the rarer half."""
        table = self._table
        if table.count <= _CHUNKS_KEPT and table.tokens <= _TOKENS_KEPT:
            return
        uses_C = table.uses_C[: table.count]
        chosen = np.argsort(-uses_C, kind="stable")[: table.count // 2]
        chosen = np.sort(chosen[uses_C[chosen] > 1])
        numbers_C = np.full(table.count, _MISSING)
        numbers_C[chosen] = np.arange(len(chosen))
        self._table = Table()
        self._table.add(table.rows().taken(chosen))
        for known in (self._after_space, self._literal):
            kept = [(chunk, number) for chunk, old in known.items() if (number := int(numbers_C[old])) != _MISSING]
            known.clear()
            known.update(kept)

    def _numbered(self, texts: Sequence[str]) -> _Cut:
        """The texts as chunks, each as exact as it must be."""
        if self._parts_han:
            cuts = HAN_AND_LINE_CUTS if self._parts_lines else HAN_CUTS
            pieces = [cuts.split(text) for text in texts]
            cut = self._looked_up(pieces, "")
            cut = self._mended(cut, pieces, "")
        else:
            marked = [text.replace("\n", _LINE) for text in texts] if self._parts_lines else texts
            pieces = [text.split(" ") for text in marked]
            cut = self._looked_up(pieces, " ")
            cut = self._mended(cut, pieces, " ")
        poor_B = np.logical_or.reduceat(self._bad_cuts(cut), cut.first_B)
        if not poor_B.any():
            return cut
        chosen = np.flatnonzero(poor_B).tolist()
        first = self._wait(
            self._rows([texts[number] for number in chosen], is_whole=True)._replace(
                flags_C=np.zeros(len(chosen), dtype=np.uint8)
            )
        )
        parts = np.split(cut.numbers_K, cut.first_B[1:])
        for place, number in enumerate(chosen):
            parts[number] = np.array([first - place])
        sizes_B = np.array([len(part) for part in parts])
        return _Cut(np.concatenate(parts), np.cumsum(sizes_B) - sizes_B)

    def _looked_up(self, pieces: Sequence[Sequence[str]], space: str) -> _Cut:
        """The number of each piece, with this space before all of a text but the first."""
        every = list(itertools.chain.from_iterable(pieces))
        sizes_B = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        first_B = np.cumsum(sizes_B) - sizes_B
        if not space:
            return _Cut(self._learnt(self._literal, every, ""), first_B)
        firsts = [parts[0] for parts in pieces]
        heads_B = self._learnt(self._literal, firsts, "")
        for first in first_B.tolist():
            every[first] = "a"  # known by then, and replaced below
        numbers_K = self._learnt(self._after_space, every, space)
        numbers_K[first_B] = heads_B
        return _Cut(numbers_K, first_B)

    def _bad_cuts(self, cut: _Cut) -> NDArray[np.bool_]:
        """Whether each chunk can't be parted from the one before it in its text."""
        flags_K = self._table.flags_C[np.maximum(cut.numbers_K, 0)]
        waits_K = cut.numbers_K <= _WAITING
        if waits_K.any():
            flags_W = np.concatenate([rows.flags_C for rows in self._waiting])
            flags_K[waits_K] = flags_W[_WAITING - cut.numbers_K[waits_K]]
        bad_K = (flags_K & STRAY) != 0
        bad_K[1:] |= (flags_K[:-1] & OPEN) != 0
        bad_K[cut.first_B] = False
        return bad_K

    def _mended(self, cut: _Cut, pieces: Sequence[Sequence[str]], space: str) -> _Cut:
        """The same with chunks joined that can't be parted."""
        bad_K = self._bad_cuts(cut)
        if not bad_K.any():
            return cut
        every = list(itertools.chain.from_iterable(pieces))
        is_first_K = np.zeros(len(bad_K), dtype=np.bool_)
        is_first_K[cut.first_B] = True
        edges = np.flatnonzero(np.diff(np.concatenate([[False], bad_K, [False]]).astype(np.int8))).reshape(-1, 2)
        runs = [(begin - 1, end) for begin, end in edges.tolist()]
        joined = ["".join(_led(every[begin:end], space, is_first=is_first_K[begin])) for begin, end in runs]
        numbers_K = cut.numbers_K.copy()
        numbers_K[[begin for begin, _ in runs]] = self._learnt(self._literal, joined, "")
        before_K1 = np.append(0, np.cumsum(~bad_K))
        return _Cut(numbers_K[~bad_K], before_K1[cut.first_B])

    def _wait(self, rows: Rows) -> int:
        """The number of the first of rows that are kept for the texts at hand only; the others follow it downwards."""
        number = _WAITING - sum(len(waiting.tokens_C) for waiting in self._waiting)
        self._waiting.append(rows)
        return number

    def _learnt(self, known: dict[str, int], chunks: Sequence[str], space: str) -> Numbers:
        """The number of each chunk; new ones, with this space before them, are encoded."""
        found = map(known.get, chunks, itertools.repeat(_MISSING))
        numbers_K = np.fromiter(found, dtype=np.int64, count=len(chunks))
        missing = np.flatnonzero(numbers_K == _MISSING).tolist()
        if not missing:
            return numbers_K
        asked = [chunks[place] for place in missing]
        new = dict.fromkeys(asked)
        long = [chunk for chunk in new if len(chunk) > _LONGEST_KEPT]
        for chunk in long:
            del new[chunk]
        if new:
            first = self._table.add(self._rows(_led(list(new), space)))
            known.update(zip(new, range(first, first + len(new)), strict=True))
        if long:  # known for as long as it takes to number them
            first = self._wait(self._rows(_led(long, space)))
            known.update(zip(long, range(first, first - len(long), -1), strict=True))
        numbers_K[missing] = list(map(known.__getitem__, asked))
        for chunk in long:
            del known[chunk]
        return numbers_K

    def _rows(self, chunks: Sequence[str], *, is_whole: bool = False) -> Rows:
        """What the table says of chunks; of whole texts, with all marks as they are."""
        if is_whole or self._words != "spaces" or not self._plain.can:
            return self._looked_at(chunks, is_whole)
        plain, words_C = self._plain.sorted_out(chunks)
        chosen: list[int] = plain.tolist()
        rows, good_C = self._plain.rows([chunks[number] for number in chosen], words_C)
        is_other_C = np.ones(len(chunks), dtype=np.bool_)
        is_other_C[plain[good_C]] = False
        others = np.flatnonzero(is_other_C)
        place = np.zeros(len(chunks), dtype=np.int64)
        place[plain] = np.arange(len(plain))
        place[others] = len(plain) + np.arange(len(others))
        closely = self._looked_at([chunks[number] for number in others.tolist()], is_whole)
        return rows.followed_by(closely).taken(place)

    def _looked_at(self, chunks: Sequence[str], is_whole: bool) -> Rows:
        """The same, by what each token stands for."""
        if is_whole:
            joinable, alone = list[int](), list(range(len(chunks)))
        else:
            joinable, alone = self._joinable(chunks)
        # In one go, what follows an open chunk has other marks than by itself. A spacer after it takes them.
        closed = [number for number in alone if chunks[number][-1:] not in INVISIBLE]
        opened = [number for number in alone if chunks[number][-1:] in INVISIBLE]
        order = [*closed, *joinable, *itertools.chain.from_iterable((number, _NOBODY) for number in opened)]
        packed = [chunks[number] if number != _NOBODY else _SPACER for number in order]
        sizes = (
            [1] * len(closed)
            + blocks([len(chunks[number]) for number in joinable], _BLOCK_CHARACTERS)
            + [1] * (2 * len(opened))
        )
        rows = self._parted(packed, sizes, self._spelled(texts_of(packed, sizes)), is_whole)
        place = np.zeros(len(chunks) + 1, dtype=np.int64)  # _NOBODY is the last
        place[order] = np.arange(len(order))
        # Where characters that can be seen left no token, that showed only now; such chunks are few.
        tainted = [
            order[at + 1] for at in np.flatnonzero(rows.flags_C[:-1] & OPEN).tolist() if order[at + 1] != _NOBODY
        ]
        if tainted:
            packed, sizes = [chunks[number] for number in tainted], [1] * len(tainted)
            again = self._parted(packed, sizes, self._spelled_singly(packed), is_whole)
            rows = rows.followed_by(again)
            place[tainted] = len(order) + np.arange(len(tainted))
        return rows.taken(place[:-1])

    def _joinable(self, chunks: Sequence[str]) -> tuple[list[int], list[int]]:
        """The numbers of chunks that may stand in one text, each what it is by itself; and of the others."""
        joinable, alone = list[int](), list[int]()
        starts_with_han = STARTS_WITH_HAN.match
        for number, chunk in enumerate(chunks):
            is_led = chunk[:1] == " " or (chunk[:1] == "\n" and self._parts_lines)
            begins = chunk[1:2] not in INVISIBLE if is_led else self._parts_han and starts_with_han(chunk)
            (joinable if begins and chunk[-1] not in INVISIBLE else alone).append(number)
        return joinable, alone

    def _spelled(self, texts: Sequence[str]) -> _Spelled:
        """Texts encoded, their marks found in one go: each looks like a line of one text."""
        encodings = self._inner.encode_batch(texts, add_special_tokens=False)
        tokens_B = np.fromiter(map(len, encodings), dtype=np.int64, count=len(texts))
        every, count = itertools.chain.from_iterable, int(tokens_B.sum())
        ids = np.fromiter(every(encoding.ids for encoding in encodings), dtype=np.int32, count=count)
        flat = np.fromiter(every(every(encoding.offsets for encoding in encodings)), dtype=np.int64, count=2 * count)
        offsets = flat.reshape(-1, 2) + np.repeat(_beginnings(texts), tokens_B)[:, None]
        space_T = ids == (-1 if self._space_id is None else self._space_id)
        space_T[np.cumsum(tokens_B)[tokens_B > 0] - 1] = False  # at its text's end a space leads to nothing
        marks = token_marks("\n".join(texts), offsets, self._words, space_T)
        return _Spelled(ids, marks | self._special_V[ids], offsets)

    def _spelled_singly(self, texts: Sequence[str]) -> _Spelled:
        """The same, by the tokenizer itself, at 0.2 ms for each text."""
        encoded = self._tokenizer.encode_batch(texts, self._words)
        offsets = [one.offsets + begin for one, begin in zip(encoded, _beginnings(texts).tolist(), strict=True)]
        ids = np.concatenate([one.ids for one in encoded]).astype(np.int32)
        return _Spelled(ids, np.concatenate([one.marks for one in encoded]), np.concatenate(offsets))

    def _parted(self, chunks: Sequence[str], sizes: Sequence[int], spelled: _Spelled, is_whole: bool) -> Rows:
        """Texts of so many chunks each, parted into them."""
        ids, marks, offsets = spelled
        gaps_C = np.zeros(len(chunks), dtype=np.int64)
        gaps_C[np.cumsum(np.array(sizes, dtype=np.int64))[:-1]] = 1  # the line feed before the next text
        ends_C = np.cumsum(gaps_C + np.fromiter(map(len, chunks), dtype=np.int64, count=len(chunks)))
        last_T = np.maximum.accumulate(offsets[:, 1])
        tokens_C = np.bincount(np.searchsorted(ends_C, last_T), minlength=len(chunks))
        until_C = np.cumsum(tokens_C)
        first_C = until_C - tokens_C
        flags_C = np.fromiter(map(flags_of, chunks), dtype=np.uint8, count=len(chunks))
        flags_C[(tokens_C == 0) | (np.append(0, last_T)[until_C] < ends_C)] |= OPEN
        unknown_T1 = np.zeros(len(ids) + 1, dtype=np.int64)
        if self._tokenizer.unknown_id is not None:
            lengths_T = offsets[:, 1] - offsets[:, 0]
            unknown_T1[1:] = np.cumsum(np.where(ids == self._tokenizer.unknown_id, lengths_T, 0))
        if not is_whole:
            # The first token that starts a word would start a sentence, too: only white space comes before it.
            starting = np.append(np.flatnonzero(marks & WORD_START), len(ids))
            lead_C = starting[np.searchsorted(starting[:-1], first_C)]
            lead = lead_C[((flags_C & STRAY) == 0) & (lead_C < until_C)]
            marks[lead] = (marks[lead] & np.uint8(255 - SENTENCE_START)) | np.uint8(LEAD)
        return Rows(ids, marks, tokens_C, unknown_T1[until_C] - unknown_T1[first_C], flags_C)


def _led(pieces: Sequence[str], space: str, *, is_first: bool = False) -> list[str]:
    """Pieces with what they stood behind: a space, or the line feed that they hold; the first of a text behind nothing.

    Where they were not split at spaces, `space` is empty and each is what it was.
    """
    led = [piece if piece[:1] == "\n" else space + piece for piece in pieces]
    return [pieces[0], *led[1:]] if is_first else led


def _beginnings(texts: Sequence[str]) -> Numbers:
    """Where each text begins where all are lines of one."""
    sizes_B = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + 1
    return np.cumsum(sizes_B) - sizes_B
