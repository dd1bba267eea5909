"""Statistics of all documents, and their split into training and held-out text.

Under "hash", whole documents are held out, in the order of the hash of their text, up to a size. Copies of a text are
in the same split. Under "tail", the last part of every document is held out, for corpora of few documents.
Documents with equal 64-bit hashes count as copies: among a billion documents, the chance that any two different texts
share a hash is 3 %.
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
from unmask.data.shards import CHUNK, allocate_column

FEW_DOCUMENTS: Final = 100  # with fewer, a single document would dominate the validation loss
SAMPLE_CHARACTERS: Final = 1_000_000
REPORT_CHARACTERS: Final = 1_000_000
LEFT_OUT: Final = -1  # in `Split.first_held`: a document in neither split
_SHARES: Final = {"hash": Fraction(0.01), "tail": Fraction(0.10)}
_BLOCK: Final = 1 << 14  # documents whose columns are read at once

SplitName = Literal["train", "held-out"]
CountCallback = Callable[[int], None]  # called with the number of further characters


@dataclass(frozen=True)
class DocumentStats:
    """Statistics of the documents of a source."""

    lengths: Int[np.ndarray, "N"]  # characters of each document
    hashes: NDArray[np.uint64]  # hash of the text of each document
    characters: int  # total of all documents and the separators between them
    sample: str  # beginning of the text

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)


@dataclass(frozen=True)
class Split:
    """The first held-out character of each document: 0 (all), its length (none), or in between."""

    by: Literal["hash", "tail"]
    share: Fraction
    first_held: Int[np.ndarray, "N"]  # LEFT_OUT: in neither split
    duplicates: int = 0  # number of copies in neither split

    @property
    def digest(self) -> str:
        """Digest of which characters are held out."""
        return hashlib.blake2b(np.ascontiguousarray(self.first_held, "<i8").data, digest_size=8).hexdigest()


class DocumentSlice(NamedTuple):
    """A part of a chunk that is in one split."""

    side: SplitName
    document: int
    number: int  # index of the chunk within the document
    text: str
    characters: int
    last: bool  # whether the part of the document in this split ends here


class DocumentInfo(NamedTuple):
    """Length and hash of a document."""

    length: int
    hash: int


def number_documents(source: Source, parts: Iterable[SourceShard]) -> Iterator[tuple[int, DocumentChunk]]:
    """Yield all chunks of the parts, with the number of their document among them."""
    document = 0
    for part in parts:
        for chunk in source.documents(part):
            yield document, chunk
            document += chunk.last


def measure_documents(
    chunks: Iterable[DocumentChunk], on_chunk: Callable[[DocumentChunk], None]
) -> Iterator[DocumentInfo]:
    """Yield length and hash of each document; `on_chunk` is called with each chunk."""
    length = 0
    state = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        on_chunk(chunk)
        state.update(chunk.text.encode("utf-8", "surrogatepass"))
        length += len(chunk.text)
        if chunk.last:
            yield DocumentInfo(length, int.from_bytes(state.digest(), "little"))
            length, state = 0, hashlib.blake2b(digest_size=8)


class CharCounter:
    """Counts the characters of chunks, keeps a sample of the beginning, and reports progress."""

    def __init__(self, report: CountCallback, max_characters: int = SAMPLE_CHARACTERS) -> None:
        self.characters = self._reported = self._sampled = 0
        self._report, self._max_characters = report, max_characters
        self._sample: list[str] = []

    def __call__(self, chunk: DocumentChunk) -> None:
        """Count a chunk."""
        if self._sampled < self._max_characters:
            self._sample.append(chunk.text)
            self._sampled += len(chunk.text) + 1
        self.characters += chunk.characters
        if self.characters - self._reported >= REPORT_CHARACTERS:
            self.report()

    def report(self) -> None:
        """Report the characters since the last report."""
        self._report(self.characters - self._reported)
        self._reported = self.characters

    @property
    def sample(self) -> str:
        """Beginning of the text."""
        return "\n".join(self._sample)[: self._max_characters]


def divide(
    stats: DocumentStats, settings: HeldOutConfig, *, drop_duplicates: bool = False, folder: Path | None = None
) -> Split:
    """Return which characters of each document are held out, with 12 bytes of memory per document.

    Args:
        stats: statistics of the documents.
        settings: held-out fraction and method.
        drop_duplicates: exclude copies of earlier documents from both splits.
        folder: directory for the columns; None keeps them in memory.

    Raises:
        TextError: under "hash", no training text would remain.
    """
    by = settings.method
    if by == "auto":
        by = "hash" if stats.documents >= FEW_DOCUMENTS else "tail"
    share = settings.fraction if isinstance(settings.fraction, Fraction) else _SHARES[by]
    first_held = allocate_column(folder, "first-held", stats.documents)
    for first in range(0, stats.documents, CHUNK):
        lengths = stats.lengths[first : first + CHUNK]
        if by == "tail":
            # Rounded before truncation: 100 × (1 - 0.07) is 92.99999999999999 in floating point.
            lengths = np.floor(np.round(lengths * (1 - share.fraction), 6)).astype(np.int64)
        first_held[first : first + CHUNK] = lengths
    if by == "tail" and not drop_duplicates:
        return Split(by, share, first_held)
    # Sorted by hash, copies by document number, so the first document of a text is the first of its group.
    order = np.argsort(stats.hashes, kind="stable")
    duplicates = _drop_copies(stats, order, first_held) if drop_duplicates else 0
    if by == "hash":
        groups = _Groups(stats, order, first_held, folder)
        if groups.count < 2:
            raise TextError(
                f"can't hold out documents: {stats.documents:,} documents have {groups.count} distinct texts",
                hint="hold out the end of every document (--set data.held_out.method=tail), or use shorter documents "
                "(--set data.document=line)",
            )
        # The total includes separators, except those after dropped copies.
        groups.hold_out(min(share.fraction * stats.characters, settings.max_size.number))
    return Split(by, share, first_held, duplicates)


def _drop_copies(stats: DocumentStats, order: NDArray[np.int64], first_held: NDArray[np.int64]) -> int:
    """Exclude documents after one with an equal hash and return their number; empty documents are no copies."""
    duplicates = 0
    for first in range(0, len(order), CHUNK):
        documents = order[max(0, first - 1) : first + CHUNK]
        hashes = stats.hashes[documents]
        copies = documents[1:][hashes[1:] == hashes[:-1]]
        copies = copies[stats.lengths[copies] > 0]
        first_held[copies] = LEFT_OUT
        duplicates += len(copies)
    return duplicates


class _Groups:
    """Groups of documents with the same text: the characters of each group, and its end in the order."""

    def __init__(
        self, stats: DocumentStats, order: NDArray[np.int64], first_held: NDArray[np.int64], folder: Path | None
    ) -> None:
        self._order, self._first_held, self._lengths = order, first_held, stats.lengths
        self._sizes = allocate_column(folder, "group-sizes", stats.documents)
        self._ends = allocate_column(folder, "group-ends", stats.documents)
        self.count = 0
        size = 0
        for first in range(0, len(order), CHUNK):
            documents = order[first : first + CHUNK + 1]  # and the first of the next block
            hashes = stats.hashes[documents]
            block = documents[:CHUNK]
            sums = np.cumsum(np.where(first_held[block] == LEFT_OUT, 0, stats.lengths[block]))
            ends = np.flatnonzero(hashes[1:] != hashes[:-1])
            if first + CHUNK >= len(order):
                ends = np.append(ends, len(block) - 1)
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

    def hold_out(self, limit: float) -> None:
        """Hold out every group that fits into what is left of `limit`, in order; at least one and never all.

        If none fits, the smallest group is held out, because validation needs text.
        """
        held, left, smallest, smallest_size = 0, limit, 0, -1
        for first in range(0, self.count, CHUNK):
            sizes = self._sizes[first : min(first + CHUNK, self.count)]
            if smallest_size < 0 or int(sizes.min()) < smallest_size:
                smallest, smallest_size = first + int(sizes.argmin()), int(sizes.min())
            candidates = np.flatnonzero(sizes <= left)
            while len(candidates):
                # Take all groups up to the first that doesn't fit at once. Skip that one, and all that no longer fit.
                sums = np.cumsum(sizes[candidates])
                fitting = int(np.searchsorted(sums, left, side="right"))
                self._set(first + candidates[:fitting], is_held=True)
                held += fitting
                left -= int(sums[fitting - 1])
                candidates = candidates[fitting + 1 :]
                candidates = candidates[sizes[candidates] <= left]
        if not held:
            self._set(np.array([smallest]), is_held=True)
        if held == self.count:
            self._set(np.array([self.count - 1]), is_held=False)

    def _set(self, groups: NDArray[np.int64], *, is_held: bool) -> None:
        begins, ends = np.where(groups > 0, self._ends[groups - 1], 0), self._ends[groups]
        documents = self._order[runs(begins, ends - begins)]
        documents = documents[(self._lengths[documents] > 0) & (self._first_held[documents] != LEFT_OUT)]
        self._first_held[documents] = 0 if is_held else self._lengths[documents]


def slice_documents(
    chunks: Iterable[tuple[int, DocumentChunk]], all_lengths: NDArray[np.int64], first_held: NDArray[np.int64]
) -> Iterator[DocumentSlice]:
    """Yield the text of both splits in order; a document without text in a split is absent there.

    Together, the splits have all characters of the source except those of dropped documents. The separator of two
    documents counts with the end of the first.

    Raises:
        TextError: the text has changed since its statistics were collected.
    """
    position, block = 0, -_BLOCK
    lengths, borders = list[int](), list[int]()
    document = -1
    for document, chunk in chunks:
        if document >= block + _BLOCK:
            block = document
            lengths, borders = (column[block : block + _BLOCK].tolist() for column in (all_lengths, first_held))
        end = position + len(chunk.text)
        if document - block >= len(lengths) or end > lengths[document - block]:
            raise _changed()
        if chunk.last and end < lengths[document - block]:
            raise _changed()
        length, held_from = lengths[document - block], borders[document - block]
        if held_from == LEFT_OUT:
            position = 0 if chunk.last else end
            continue
        cut = min(max(held_from - position, 0), len(chunk.text))
        is_split = held_from < length
        if length and (position < held_from or not is_split):
            characters = chunk.characters if not is_split or end <= held_from else cut
            is_last = end >= held_from if is_split else chunk.last
            yield DocumentSlice("train", document, chunk.number, chunk.text[:cut], characters, is_last)
        if is_split and (end > held_from or chunk.last):
            characters = chunk.characters - (cut if position < held_from else 0)
            yield DocumentSlice("held-out", document, chunk.number, chunk.text[cut:], characters, chunk.last)
        position = 0 if chunk.last else end
    if document + 1 != len(all_lengths) or position:
        raise _changed()


def _changed() -> TextError:
    return TextError("the text changed while it was read", hint="run the command again")


def train_sizes(first_held: NDArray[np.int64], bounds: Sequence[int]) -> list[int]:
    """Return the training characters of the documents between each bound and the next."""
    sizes: list[int] = []
    for begin, end in pairwise(bounds):
        total = 0
        for first in range(begin, end, CHUNK):
            total += int(np.maximum(first_held[first : min(first + CHUNK, end)], 0).sum())
        sizes.append(total)
    return sizes
