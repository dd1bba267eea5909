"""Room card: many texts to tokens, faster than one by one.

Comes in: a tokenizer, a rule for words, texts. Goes out: for all texts the ids, marks and unknown characters that
`Tokenizer.encode` gives, end to end. Called by: units, benchmarks.

Most of a text are words that were met before. Where a tokenizer's ids of a text are those of its chunks, cut before
single spaces and line feeds, each chunk is encoded once and looked up from then on: English Wikipedia has 9.7 million
chunks, 0.67 million of them different. A chunk knows all of its marks but one: whether it starts a sentence is up to
the chunk before it. Where a cut wouldn't be exact (at a run of spaces, after characters that leave no token), the
chunks beside it are joined again; where even that isn't, the text is encoded whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from unmask.contracts import SENTENCE_START, SPECIAL, WORD_START
from unmask.text.chunks import (
    HAN_AND_LINE_CUTS,
    HAN_CUTS,
    INVISIBLE,
    LEAD,
    OPEN,
    STARTS_WITH_HAN,
    STRAY,
    EncodedTexts,
    Rows,
    Table,
    flags_of,
    sets_han_apart,
)
from unmask.text.marks import token_marks
from unmask.text.plain import PlainWords, blocks, texts_of
from unmask.text.structure import leading_space, splits_at_lines
from unmask.text.tokenizer import Tokenizer
from unmask.text.words import WordsRule

__all__ = ["EncodedTexts", "Encoder"]

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


class Encoder:
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
        laid = [chunks[number] if number != _NOBODY else _SPACER for number in order]
        sizes = (
            [1] * len(closed)
            + blocks([len(chunks[number]) for number in joinable], _BLOCK_CHARACTERS)
            + [1] * (2 * len(opened))
        )
        rows = self._parted(laid, sizes, self._spelled(texts_of(laid, sizes)), is_whole)
        place = np.zeros(len(chunks) + 1, dtype=np.int64)  # _NOBODY is the last
        place[order] = np.arange(len(order))
        # Where characters that can be seen left no token, that showed only now; such chunks are few.
        tainted = [
            order[at + 1] for at in np.flatnonzero(rows.flags_C[:-1] & OPEN).tolist() if order[at + 1] != _NOBODY
        ]
        if tainted:
            laid, sizes = [chunks[number] for number in tainted], [1] * len(tainted)
            again = self._parted(laid, sizes, self._spelled_singly(laid), is_whole)
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
