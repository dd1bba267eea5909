"""Room card: shards and the columns of their documents, written.

Comes in: encoded passages, some at a time. Goes out: files of one unit; a sealed folder of all of them (see shards).
Called by: units, building, shards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unmask.store import new_folder, seal, write_json
from unmask.text.arrays import CHUNK, Column, Kind, Tensor, append, header, map_tensors, mapped, write_tensors

SHARD_TOKENS: Final = 2**26
FORMAT: Final = "unmask-shards-2"
INDEX: Final = "index.json"
ARRAYS: Final = "arrays.safetensors"
_HEADER_BYTES: Final = 256  # fixed, so that ids can be written before their number is known
_COLUMNS: Final = ("lengths", "characters", "unknown")


class EncodedPassage(NamedTuple):
    """A passage of a document as tokens."""

    ids: NDArray[np.integer[Any]]
    marks: NDArray[np.uint8]
    characters: int
    characters_unknown: int
    last: bool  # whether the document ends here


class Written(NamedTuple):
    """Shards and columns that wait to become, with others, a folder of shards."""

    stem: str  # what their names begin with, folder included
    shards: list[int]  # tokens of each
    documents: int
    characters: int
    unknown: int

    @property
    def files(self) -> list[Path]:
        """The shards in their order."""
        return [Path(f"{self.stem}-{number:05d}.safetensors") for number in range(len(self.shards))]


def id_kind(vocabulary: int) -> Kind:
    """How ids are written."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


class ShardWriter:
    """Writes shards and the columns of their documents, with memory for one batch."""

    def __init__(self, stem: Path, vocabulary: int, shard_tokens: int = SHARD_TOKENS) -> None:
        assert shard_tokens > 0, "a shard holds at least one token"
        self._stem, self._vocabulary = stem, vocabulary
        self._tokens = _TokenWriter(stem, id_kind(vocabulary), shard_tokens)
        self._columns = [Column(stem.with_name(f"{stem.name}.{name}")) for name in _COLUMNS]
        self._counts_V = np.zeros(vocabulary, dtype=np.int64)
        self._open_3 = np.zeros(3, dtype=np.int64)  # of the document that is not finished
        self._is_open = False
        self._documents = 0
        self._sums_3 = np.zeros(3, dtype=np.int64)

    def write(
        self, ids: NDArray[np.integer[Any]], marks: NDArray[np.uint8], passages_B3: NDArray[np.int64], last_B: Any
    ) -> None:
        """Passages, their tokens end to end; of each: tokens, characters, unknown ones; whether it is the last."""
        self._counts_V += np.bincount(ids, minlength=self._vocabulary)
        self._tokens.write(ids, marks)
        self._sums_3 += passages_B3.sum(axis=0)
        ends = np.flatnonzero(last_B)
        before_B3 = np.cumsum(passages_B3, axis=0)
        documents_N3 = np.diff(before_B3[ends], axis=0, prepend=np.zeros((1, 3), dtype=np.int64))
        if len(ends):
            documents_N3[0] += self._open_3
            self._open_3 = before_B3[-1] - before_B3[ends[-1]]
            for column, numbers in zip(self._columns, documents_N3.T, strict=True):
                column.extend(numbers)
            self._documents += len(ends)
        elif len(before_B3):
            self._open_3 = self._open_3 + before_B3[-1]
        if len(passages_B3):
            self._is_open = not bool(last_B[-1])

    def finish(self) -> Written:
        """Close the files."""
        assert not self._is_open, "the last document was not finished"
        self._tokens.finish()
        for column in self._columns:
            column.close()
        np.asarray(self._counts_V, dtype="<i8").tofile(self._stem.with_name(f"{self._stem.name}.counts"))
        characters, unknown = self._sums_3[1:].tolist()
        return Written(str(self._stem), self._tokens.shards, self._documents, characters, unknown)

    @contextmanager
    def closing(self) -> Generator[None]:
        """Close all files at the end, whatever happens."""
        try:
            yield
        finally:
            self._tokens.abandon()
            for column in self._columns:
                column.abandon()


def write_shards(
    folder: Path,
    passages: Iterable[EncodedPassage],
    vocabulary: int,
    tokenizer_fingerprint: str,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write a folder of shards, whole or not at all, with memory for one passage.

    Raises:
        StoreError: the place can't be written.
    """
    with new_folder(folder) as aside:
        writer = ShardWriter(aside / "made", vocabulary, shard_tokens)
        with writer.closing():
            for ids, marks, characters, unknown, last in passages:
                numbers = np.array([[len(ids), characters, unknown]], dtype=np.int64)
                writer.write(ids.astype(np.int64), marks, numbers, [last])
            written = writer.finish()
        gather(aside, [written], vocabulary, tokenizer_fingerprint)


def merge(stem: Path, several: Sequence[Written], vocabulary: int, shard_tokens: int = SHARD_TOKENS) -> Written:
    """Copy small shards into few; the old ones go."""
    tokens = _TokenWriter(stem, id_kind(vocabulary), shard_tokens)
    try:
        for written in several:
            for file in written.files:
                shard = map_tensors(file)
                for first in range(0, len(shard["ids"]), CHUNK):
                    tokens.write(shard["ids"][first : first + CHUNK], shard["marks"][first : first + CHUNK])
                del shard
                file.unlink()
        tokens.finish()
    finally:
        tokens.abandon()
    for name in _COLUMNS:
        append(_column(str(stem), name), [_column(written.stem, name) for written in several])
    _sum_counts(several, vocabulary).tofile(_column(str(stem), "counts"))
    sums = [sum(getattr(written, name) for written in several) for name in ("documents", "characters", "unknown")]
    return Written(str(stem), tokens.shards, *sums)


def _column(stem: str, name: str) -> Path:
    return Path(f"{stem}.{name}")


def _sum_counts(several: Sequence[Written], vocabulary: int) -> NDArray[np.int64]:
    counts_V = np.zeros(vocabulary, dtype="<i8")
    for written in several:
        file = _column(written.stem, "counts")
        counts_V += np.fromfile(file, dtype="<i8")
        file.unlink()
    return counts_V


def gather(folder: Path, several: Sequence[Written], vocabulary: int, tokenizer_fingerprint: str) -> None:
    """Make a sealed folder of shards of what was written, in this order."""
    shards: list[int] = []
    for written in several:
        for file, tokens in zip(written.files, written.shards, strict=True):
            os.rename(file, folder / f"shard-{len(shards):05d}.safetensors")
            shards.append(tokens)
    whole = {name: folder / f"all.{name}" for name in _COLUMNS}
    for name, path in whole.items():
        append(path, [_column(written.stem, name) for written in several])
    counts_V = _sum_counts(several, vocabulary)
    columns = {name: mapped(path) for name, path in whole.items()}
    documents = len(columns["lengths"])
    arrays = {
        "document_starts_N1": Tensor("<i8", documents + 1, _starts(columns["lengths"])),
        "lengths_N": Tensor("<i8", documents, _by_chunks(columns["lengths"])),
        "characters_N": Tensor("<i8", documents, _by_chunks(columns["characters"])),
        "unknown_characters_N": Tensor("<i8", documents, _by_chunks(columns["unknown"])),
        "counts_V": Tensor("<i8", vocabulary, [counts_V]),
    }
    write_tensors(folder / ARRAYS, arrays)
    del arrays, columns  # a file that is mapped can't be removed everywhere
    for path in whole.values():
        path.unlink()
    index = {"format": FORMAT, "vocabulary": vocabulary, "tokenizer": tokenizer_fingerprint, "tokens": shards}
    write_json(folder / INDEX, index)
    seal(folder)


def _by_chunks(column: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(column), CHUNK):
        yield column[first : first + CHUNK]


def _starts(lengths_N: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    start = np.zeros(1, dtype=np.int64)
    yield start
    for lengths in _by_chunks(lengths_N):
        starts = start + np.cumsum(lengths)
        yield starts
        start = starts[-1:]


class _TokenWriter:
    """Cuts a stream of tokens into shards; marks wait in a file of their own until their place is known."""

    def __init__(self, stem: Path, kind: Kind, shard_tokens: int) -> None:
        self.shards: list[int] = []
        self._stem, self._limit = stem, shard_tokens
        self._kind: Kind = kind
        self._ids: BinaryIO | None = None
        self._marks: BinaryIO | None = None

    @property
    def _waiting_marks(self) -> Path:
        return self._stem.with_name(f"{self._stem.name}.marks")

    def write(self, ids: NDArray[np.integer[Any]], marks: NDArray[np.uint8]) -> None:
        assert len(ids) == len(marks), "a mark for every id"
        first = 0
        while first < len(ids):
            if self._ids is None or self._marks is None:
                name = f"{self._stem.name}-{len(self.shards):05d}.safetensors"
                self._ids = self._stem.with_name(name).open("w+b")
                self._ids.write(b" " * _HEADER_BYTES)
                self._marks = self._waiting_marks.open("w+b")
                self.shards.append(0)
            last = min(len(ids), first + self._limit - self.shards[-1])
            self._ids.write(ids[first:last].astype(self._kind).tobytes())
            self._marks.write(marks[first:last].tobytes())
            self.shards[-1] += last - first
            first = last
            if self.shards[-1] == self._limit:
                self.finish()

    def finish(self) -> None:
        """Lay the marks behind the ids and write the header before them."""
        if self._ids is None or self._marks is None:
            return
        tokens = self.shards[-1]
        self._marks.seek(0)
        shutil.copyfileobj(self._marks, self._ids, 1 << 20)
        shape: dict[str, tuple[Kind, int]] = {"ids": (self._kind, tokens), "marks": ("u1", tokens)}
        self._ids.seek(0)
        self._ids.write(header(shape, _HEADER_BYTES))
        self._ids.close()
        self._marks.close()
        self._waiting_marks.unlink()
        self._ids = self._marks = None

    def abandon(self) -> None:
        """Close what is open."""
        for file in (self._ids, self._marks):
            if file is not None:
                file.close()
