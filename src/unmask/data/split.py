"""Room card: how much text there is, and which of it is held out.

Comes in: a source, the settings of what is held out. Goes out: a Survey, a Division of every document into training and
held-out characters, and the text of either side. Called by: corpus, units, report.

By "hash", whole documents are held out: in the order of the hash of their text, each that fits into what may be held
out; copies of one text fall on one side. By "tail", the last part of every document is held out, for corpora of few
documents. Documents of one text are those of one 64-bit hash: among a billion documents, the chance that any two
others share one is 3 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core.errors import TextError
from unmask.core.quantities import Fraction
from unmask.core.types import DocumentChunk, Source, SourceShard, runs
from unmask.data.settings import HeldOutConfig
from unmask.data.shards import CHUNK, empty

FEW_DOCUMENTS: Final = 100  # below, one document more or less would decide what is measured
SAMPLE_CHARACTERS: Final = 1_000_000
REPORT_CHARACTERS: Final = 1_000_000
LEFT_OUT: Final = -1  # in a division: a document that is on neither side
_SHARES: Final = {"hash": Fraction(0.01), "tail": Fraction(0.10)}
_BLOCK: Final = 1 << 14  # documents whose numbers are looked up at once

SplitName = Literal["train", "held-out"]
Progress = Callable[[str, float], None]
Tell = Callable[[int], None]  # so many characters further


@dataclass(frozen=True)
class DocumentStats:
    """What one pass over a source found."""

    lengths_N: Int[np.ndarray, "N"]  # characters of each document's text
    hashes_N: NDArray[np.uint64]  # of each document's text
    characters: int  # of all documents, what parts them included
    sample: str  # how the text begins

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.lengths_N)


@dataclass(frozen=True)
class Split:
    """From which character on each document is held out: from the first, from its end (not at all), or in between."""

    by: Literal["hash", "tail"]
    share: Fraction
    first_held_N: Int[np.ndarray, "N"]  # LEFT_OUT: on neither side
    duplicates: int = 0  # documents that were left out

    @property
    def digest(self) -> str:
        """The same for two divisions that hold out the same characters of the same documents."""
        return hashlib.blake2b(np.ascontiguousarray(self.first_held_N, "<i8").data, digest_size=8).hexdigest()


class DocumentSlice(NamedTuple):
    """Part of a document that lies on one side."""

    side: SplitName
    document: int
    piece: int
    text: str
    characters: int
    last: bool  # whether the document's part on this side ends here


class Measured(NamedTuple):
    """A document as the survey met it."""

    length: int
    hash: int


def numbered(source: Source, parts: Iterable[SourceShard]) -> Iterator[tuple[int, DocumentChunk]]:
    """All passages of these parts, with the number of their document among them."""
    document = 0
    for part in parts:
        for passage in source.documents(part):
            yield document, passage
            document += passage.last


def measured(passages: Iterable[DocumentChunk], note: Callable[[DocumentChunk], None]) -> Iterator[Measured]:
    """The length and the hash of each document; `note` is called with each passage."""
    length = 0
    state = hashlib.blake2b(digest_size=8)
    for passage in passages:
        note(passage)
        state.update(passage.text.encode("utf-8", "surrogatepass"))
        length += len(passage.text)
        if passage.last:
            yield Measured(length, int.from_bytes(state.digest(), "little"))
            length, state = 0, hashlib.blake2b(digest_size=8)


class CharCounter:
    """What is counted of passages: their characters, how they begin, how far one is."""

    def __init__(self, tell: Tell, max_train_chars: int = SAMPLE_CHARACTERS) -> None:
        self.characters = self._told = self._sampled = 0
        self._tell, self._most = tell, max_train_chars
        self._sample: list[str] = []

    def __call__(self, passage: DocumentChunk) -> None:
        """Count one."""
        if self._sampled < self._most:
            self._sample.append(passage.text)
            self._sampled += len(passage.text) + 1
        self.characters += passage.characters
        if self.characters - self._told >= REPORT_CHARACTERS:
            self.tell()

    def tell(self) -> None:
        """Say how far one is."""
        self._tell(self.characters - self._told)
        self._told = self.characters

    @property
    def sample(self) -> str:
        """How the text begins."""
        return "\n".join(self._sample)[: self._most]


def survey(source: Source, progress: Progress) -> DocumentStats:
    """Read everything once, with 16 bytes of memory per document; `units` does it with none.

    Raises:
        TextError: something can't be read.
    """
    total_bytes = sum(part.last_byte - part.first_byte for part in source.parts())
    done = 0

    def tell(characters: int) -> None:
        nonlocal done
        done += characters
        # Bytes and characters are not the same, least of all in a packed file; the end is reported below.
        progress("reading the text", min(0.99, done / max(1, total_bytes)))

    noted = CharCounter(tell)
    passages = (passage for _, passage in numbered(source, source.parts()))
    kind = np.dtype([("length", np.int64), ("hash", np.uint64)])
    found_N = np.fromiter(measured(passages, noted), dtype=kind)
    progress("reading the text", 1.0)
    return DocumentStats(found_N["length"], found_N["hash"], noted.characters, noted.sample)


def divide(
    found: DocumentStats, settings: HeldOutConfig, *, drop_duplicates: bool = False, folder: Path | None = None
) -> Split:
    """Decide for every document what of it is held out; with memory for 12 bytes of each.

    Args:
        found: the documents.
        settings: how much, and by which rule.
        drop_duplicates: leave out documents whose text was there before.
        folder: where the answer is kept; in memory where there is none.

    Raises:
        TextError: by hash, nothing would be left to train on.
    """
    by = settings.method
    if by == "auto":
        by = "hash" if found.documents >= FEW_DOCUMENTS else "tail"
    share = settings.fraction if isinstance(settings.fraction, Fraction) else _SHARES[by]
    first_held_N = empty(folder, "first-held", found.documents)
    for first in range(0, found.documents, CHUNK):
        lengths_N = found.lengths_N[first : first + CHUNK]
        if by == "tail":
            # Rounded first: 100 × (1 - 0.07) is 92.99999999999999 in floating point.
            lengths_N = np.floor(np.round(lengths_N * (1 - share.fraction), 6)).astype(np.int64)
        first_held_N[first : first + CHUNK] = lengths_N
    if by == "tail" and not drop_duplicates:
        return Split(by, share, first_held_N)
    # By hash, and documents of the same text by number: the first of them is the first of its group.
    order_N = np.argsort(found.hashes_N, kind="stable")
    duplicates = _leave_copies_out(found, order_N, first_held_N) if drop_duplicates else 0
    if by == "hash":
        groups = _Groups(found, order_N, first_held_N, folder)
        if groups.count < 2:
            raise TextError(
                f"there is nothing to divide by hash: {found.documents:,} documents, {groups.count} of them different",
                hint="hold out the end of every document (--set data.held_out.method=tail), or make documents smaller "
                "(--set data.document=line)",
            )
        # What parts documents counts, but not that of copies that nobody will read.
        groups.hold_out(min(share.fraction * found.characters, settings.max_size.number))
    return Split(by, share, first_held_N, duplicates)


def _leave_copies_out(found: DocumentStats, order_N: NDArray[np.int64], first_held_N: NDArray[np.int64]) -> int:
    """Mark documents that follow one of the same hash; those without text are nobody's copy."""
    duplicates = 0
    for first in range(0, len(order_N), CHUNK):
        documents = order_N[max(0, first - 1) : first + CHUNK]
        hashes = found.hashes_N[documents]
        copies = documents[1:][hashes[1:] == hashes[:-1]]
        copies = copies[found.lengths_N[copies] > 0]
        first_held_N[copies] = LEFT_OUT
        duplicates += len(copies)
    return duplicates


class _Groups:
    """Documents of the same text, by their hash: how many characters each group has, and where it ends in the order."""

    def __init__(
        self, found: DocumentStats, order_N: NDArray[np.int64], first_held_N: NDArray[np.int64], folder: Path | None
    ) -> None:
        self._order_N, self._first_held_N, self._lengths_N = order_N, first_held_N, found.lengths_N
        self._sizes = empty(folder, "group-sizes", found.documents)
        self._ends = empty(folder, "group-ends", found.documents)
        self.count = 0
        size = 0
        for first in range(0, len(order_N), CHUNK):
            documents = order_N[first : first + CHUNK + 1]  # and the first of the next
            hashes = found.hashes_N[documents]
            here = documents[:CHUNK]
            sums = np.cumsum(np.where(first_held_N[here] == LEFT_OUT, 0, found.lengths_N[here]))
            ends = np.flatnonzero(hashes[1:] != hashes[:-1])
            if first + CHUNK >= len(order_N):
                ends = np.append(ends, len(here) - 1)
            if not len(ends):
                size += int(sums[-1])
                continue
            sizes = np.diff(sums[ends], prepend=0)
            sizes[0] += size
            size = int(sums[-1] - sums[ends[-1]])
            full = sizes > 0
            new = slice(self.count, self.count + int(full.sum()))
            self._sizes[new], self._ends[new] = sizes[full], first + ends[full] + 1
            self.count = new.stop

    def hold_out(self, most: float) -> None:
        """Hold out groups in their order, each that fits into what is left of `most`; at least one, never all.

        Where none fits, it is the smallest: something must be measured, and the least text is lost to training.
        """
        held, left, smallest, smallest_size = 0, most, 0, -1
        for first in range(0, self.count, CHUNK):
            sizes_K = self._sizes[first : min(first + CHUNK, self.count)]
            if smallest_size < 0 or int(sizes_K.min()) < smallest_size:
                smallest, smallest_size = first + int(sizes_K.argmin()), int(sizes_K.min())
            waiting = np.flatnonzero(sizes_K <= left)
            while len(waiting):
                # All up to the first that doesn't fit, at once; that one is passed over, and so is all that can't fit
                # any more.
                sums = np.cumsum(sizes_K[waiting])
                fitting = int(np.searchsorted(sums, left, side="right"))
                self._set(first + waiting[:fitting], is_held=True)
                held += fitting
                left -= int(sums[fitting - 1])
                waiting = waiting[fitting + 1 :]
                waiting = waiting[sizes_K[waiting] <= left]
        if not held:
            self._set(np.array([smallest]), is_held=True)
        if held == self.count:
            self._set(np.array([self.count - 1]), is_held=False)

    def _set(self, groups: NDArray[np.int64], *, is_held: bool) -> None:
        begins, ends = np.where(groups > 0, self._ends[groups - 1], 0), self._ends[groups]
        documents = self._order_N[runs(begins, ends - begins)]
        documents = documents[(self._lengths_N[documents] > 0) & (self._first_held_N[documents] != LEFT_OUT)]
        self._first_held_N[documents] = 0 if is_held else self._lengths_N[documents]


def stretches(
    passages: Iterable[tuple[int, DocumentChunk]], lengths_N: NDArray[np.int64], first_held_N: NDArray[np.int64]
) -> Iterator[DocumentSlice]:
    """The text of both sides, in its order; a document with nothing on a side is left out there.

    Both sides together have all characters of the source but those of documents that were left out; what parts two
    documents goes with the end of the first.

    Raises:
        TextError: the text is no longer what the survey found.
    """
    position, block = 0, -_BLOCK
    lengths, borders = list[int](), list[int]()
    document = -1
    for document, passage in passages:
        if document >= block + _BLOCK:
            block = document
            lengths, borders = (column[block : block + _BLOCK].tolist() for column in (lengths_N, first_held_N))
        end = position + len(passage.text)
        if document - block >= len(lengths) or end > lengths[document - block]:
            raise _changed()
        if passage.last and end < lengths[document - block]:
            raise _changed()
        whole, held_from = lengths[document - block], borders[document - block]
        if held_from == LEFT_OUT:
            position = 0 if passage.last else end
            continue
        cut = min(max(held_from - position, 0), len(passage.text))
        is_split = held_from < whole
        if whole and (position < held_from or not is_split):
            characters = passage.characters if not is_split or end <= held_from else cut
            is_last = end >= held_from if is_split else passage.last
            yield DocumentSlice("train", document, passage.piece, passage.text[:cut], characters, is_last)
        if is_split and (end > held_from or passage.last):
            characters = passage.characters - (cut if position < held_from else 0)
            yield DocumentSlice("held-out", document, passage.piece, passage.text[cut:], characters, passage.last)
        position = 0 if passage.last else end
    if document + 1 != len(lengths_N) or position:
        raise _changed()


def _changed() -> TextError:
    return TextError("the text has changed while it was read", hint="start again")


def side(source: Source, found: DocumentStats, division: Split, which: SplitName) -> Iterator[DocumentSlice]:
    """The text of one side, document by document."""
    passages = numbered(source, source.parts())
    return (stretch for stretch in stretches(passages, found.lengths_N, division.first_held_N) if stretch.side == which)


def sizes_of(first_held_N: NDArray[np.int64], bounds: Sequence[int]) -> list[int]:
    """Characters to train on of the documents between each of these bounds and the next."""
    sizes: list[int] = []
    for begin, end in pairwise(bounds):
        total = 0
        for first in range(begin, end, CHUNK):
            total += int(np.maximum(first_held_N[first : min(first + CHUNK, end)], 0).sum())
        sizes.append(total)
    return sizes
