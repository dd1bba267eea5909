"""Room card: columns of numbers as long as there are documents, kept in files.

Comes in: numbers, some at a time. Goes out: files of plain little-endian numbers, arrays mapped from them, tensors of a
safetensors file written and mapped without being held in memory. Called by: survey, units, shards.

What is mapped from a file is the page cache's and can be dropped; what is held in memory can't. A corpus of a billion
documents has 8 GB in each of these columns.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from numpy.typing import DTypeLike, NDArray

from unmask.core.errors import DamagedError
from unmask.core.files import DIGESTS, atomic_directory, read_json, verify_manifest, write_json, write_manifest
from unmask.core.types import SENTENCE_START

Kind = Literal["<i8", "<u8", "<u4", "<u2", "u1"]
_NAMES: Final[dict[str, Kind]] = {"I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_HELD: Final = 1 << 14  # numbers that wait to be written
_LENGTH_BYTES: Final = 8
_HEADER_STEP: Final = 256
_LARGEST_HEADER: Final = 1 << 16
CHUNK: Final = 1 << 18  # numbers that are worked on at a time: 2 MB


class NumberFile:
    """A file that numbers are appended to."""

    def __init__(self, path: Path, kind: Kind = "<i8") -> None:
        self.path, self._kind = path, kind
        self._file = path.open("wb")
        self._held: list[int] = []

    def add(self, number: int) -> None:
        """One more."""
        self._held.append(number)
        if len(self._held) >= _HELD:
            self._flush()

    def extend(self, numbers: NDArray[Any]) -> None:
        """Many more."""
        self._flush()
        self._file.write(numbers.astype(self._kind).tobytes())

    def _flush(self) -> None:
        if self._held:
            self._file.write(np.array(self._held, dtype=self._kind).tobytes())
            self._held.clear()

    def close(self) -> None:
        """Write what waits."""
        try:
            self._flush()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file of a column that will not be finished."""
        self._held.clear()
        self._file.close()


def mapped(path: Path, kind: Kind = "<i8", *, writable: bool = False) -> NDArray[Any]:
    """The numbers of a file."""
    count = path.stat().st_size // np.dtype(kind).itemsize
    return _map(path, kind, 0, count, "r+" if writable else "r")


def _map(path: Path, kind: DTypeLike, offset: int, count: int, mode: Literal["r", "r+"]) -> NDArray[Any]:
    if not count:  # nothing can't be mapped
        return np.zeros(0, dtype=kind)
    # A slice of a plain array is made several times sooner than one of a memmap.
    return np.memmap(path, dtype=kind, mode=mode, offset=offset, shape=(count,)).view(np.ndarray)


def empty(folder: Path | None, name: str, count: int) -> NDArray[np.int64]:
    """Room for so many numbers: in a file of this folder, or in memory where there is none."""
    if folder is None:
        return np.zeros(count, dtype=np.int64)
    path = folder / name
    zeros = bytes(1 << 20)
    with path.open("wb") as file:
        left = 8 * count
        while left:  # a file with a hole would find the disk full only when the map is written, which kills the process
            left -= file.write(zeros[: min(left, len(zeros))])
    return mapped(path, writable=True)


def append(target: Path, sources: Sequence[Path]) -> None:
    """Move the bytes of files, in order, to the end of another."""
    with target.open("ab") as file:
        for source in sources:
            with source.open("rb") as opened:
                shutil.copyfileobj(opened, file, 1 << 20)
            source.unlink()


class TensorSpec(NamedTuple):
    """Numbers that will stand in a safetensors file."""

    kind: Kind
    length: int
    data: Iterable[NDArray[Any]]


def header(tensors: Mapping[str, tuple[Kind, int]], room: int = 0) -> bytes:
    """The beginning of a safetensors file of columns, at least `room` bytes long, always the same for the same."""
    names = {kind: name for name, kind in _NAMES.items()}
    told: dict[str, Any] = {}
    end = 0
    for name, (kind, count) in tensors.items():
        begin, end = end, end + count * np.dtype(kind).itemsize
        told[name] = {"dtype": names[kind], "shape": [count], "data_offsets": [begin, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    size = max(room, -(-(_LENGTH_BYTES + len(text)) // _HEADER_STEP) * _HEADER_STEP)
    assert len(text) <= size - _LENGTH_BYTES, "the header outgrew its place"
    return (size - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text.ljust(size - _LENGTH_BYTES)


def write_tensors(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """A safetensors file, written as its numbers come."""
    with path.open("wb") as file:
        file.write(header({name: (tensor.kind, tensor.length) for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            written = sum(file.write(numbers.astype(tensor.kind).tobytes()) for numbers in tensor.data)
            assert written == tensor.length * np.dtype(tensor.kind).itemsize, "as many numbers as were announced"


def _announced(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the numbers of a safetensors file begin, and what its header says of them."""
    size = int.from_bytes(_exactly(file, _LENGTH_BYTES), "little")
    if size > _LARGEST_HEADER:
        raise ValueError("its header is not one of ours")
    return _LENGTH_BYTES + size, json.loads(_exactly(file, size))


def tensor_chunks(path: Path, name: str) -> Iterator[NDArray[Any]]:
    """The numbers of one column of a safetensors file, some at a time, without a map.

    Raises:
        ValueError, KeyError, OSError: it is no such file, or cut short.
    """
    with path.open("rb") as file:
        begin, told = _announced(file)
        kind = np.dtype(_NAMES[told[name]["dtype"]])
        first, last = told[name]["data_offsets"]
        file.seek(begin + first)
        for at in range(first, last, CHUNK * kind.itemsize):
            yield np.frombuffer(_exactly(file, min(CHUNK * kind.itemsize, last - at)), dtype=kind)


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The columns of a safetensors file, in one map.

    Raises:
        ValueError, KeyError, OSError: it is no such file, or cut short.
    """
    with path.open("rb") as file:
        begin, told = _announced(file)
    every = _map(path, "u1", 0, path.stat().st_size, "r")
    found: dict[str, NDArray[Any]] = {}
    for name, one in told.items():
        first, last = one["data_offsets"]
        column = every[begin + first : begin + last].view(_NAMES[one["dtype"]])
        if column.shape != tuple(one["shape"]):
            raise ValueError(f"{name} is cut short")
        found[name] = column
    return found


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError("it is cut short")
    return data


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
        self._columns = [NumberFile(stem.with_name(f"{stem.name}.{name}")) for name in _COLUMNS]
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
    with atomic_directory(folder) as aside:
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
        "document_starts_N1": TensorSpec("<i8", documents + 1, _starts(columns["lengths"])),
        "lengths_N": TensorSpec("<i8", documents, _by_chunks(columns["lengths"])),
        "characters_N": TensorSpec("<i8", documents, _by_chunks(columns["characters"])),
        "unknown_characters_N": TensorSpec("<i8", documents, _by_chunks(columns["unknown"])),
        "counts_V": TensorSpec("<i8", vocabulary, [counts_V]),
    }
    write_tensors(folder / ARRAYS, arrays)
    del arrays, columns  # a file that is mapped can't be removed everywhere
    for path in whole.values():
        path.unlink()
    index = {"format": FORMAT, "vocabulary": vocabulary, "tokenizer": tokenizer_fingerprint, "tokens": shards}
    write_json(folder / INDEX, index)
    write_manifest(folder)


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


_MAPS_KEPT: Final = 128  # each takes a file handle, of which some systems give 256
_REMAKE: Final = "remove the folder it is in; it is made anew from the text"


class Shards:
    """Tokenized documents, read in place; made by `open_shards`."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX)
        if index["format"] != FORMAT:
            raise DamagedError(
                f"made by another version: {index['format']}, not {FORMAT}", location=str(folder / INDEX), hint=_REMAKE
            )
        self._folder = folder
        self.vocabulary: int = index["vocabulary"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        arrays = _columns_of(folder / ARRAYS)
        self.counts_V: Int[np.ndarray, "V"] = arrays["counts_V"]
        self.lengths_N: Int[np.ndarray, "N"] = arrays["lengths_N"]
        self.characters_N: Int[np.ndarray, "N"] = arrays["characters_N"]
        self.unknown_characters_N: Int[np.ndarray, "N"] = arrays["unknown_characters_N"]
        self._starts_N1: NDArray[np.int64] = arrays["document_starts_N1"]
        self._tokens: list[int] = index["tokens"]
        self._first = [0, *accumulate(self._tokens)]
        self._maps: dict[int, dict[str, NDArray[Any]]] = {}
        self._kind = np.dtype(id_kind(self.vocabulary))
        for number in range(len(self._tokens)):
            self._check(number)

    def _check(self, number: int) -> None:
        """Look at every id of a shard; read, not mapped: 200 MB may be more address space than there is left."""
        file = self._file(number)
        with _naming(file):
            largest = max((int(ids.max()) for ids in tensor_chunks(file, "ids")), default=0)
        if largest >= self.vocabulary:
            raise DamagedError(
                f"id {largest} is beyond the vocabulary of {self.vocabulary:,}", location=str(file), hint=_REMAKE
            )

    @property
    def documents(self) -> int:
        """How many documents there are; some may have no tokens."""
        return len(self.lengths_N)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self._first[-1]

    @property
    def sentences_N(self) -> Int[np.ndarray, "N"]:
        """Sentences of each document, by one reading of all marks; a first token starts one, whatever its mark."""
        return self._sentences_N

    @cached_property
    def _sentences_N(self) -> NDArray[np.int32]:
        counts_N = np.zeros(self.documents, dtype=np.int32)
        begin = 0
        for number in range(len(self._tokens)):
            file = self._file(number)
            with _naming(file):
                for marks in tensor_chunks(file, "marks"):
                    starts_T = (marks & SENTENCE_START) != 0
                    first, last = np.searchsorted(self._starts_N1[:-1], [begin, begin + len(marks)]).tolist()
                    starts_T[self._starts_N1[first:last] - begin] = True
                    at = np.flatnonzero(starts_T) + begin
                    if len(at):  # an empty document begins where the next one does, and stands before it
                        document = np.searchsorted(self._starts_N1[:-1], at, side="right") - 1
                        least = int(document[0])
                        found = np.bincount(document - least)
                        counts_N[least : least + len(found)] += found.astype(np.int32)
                    begin += len(marks)
        return counts_N

    @property
    def characters(self) -> int:
        """Characters of the text, line ends counted."""
        return int(self.characters_N.sum())

    @property
    def unknown_characters(self) -> int:
        """Characters that became [UNK]."""
        return int(self.unknown_characters_N.sum())

    def ids(self, document: int, first: int, last: int) -> NDArray[np.integer[Any]]:
        """The ids of tokens [first, last) of a document, uint16 or uint32; a view where they lie in one shard."""
        return self._stretch("ids", document, first, last)

    def marks(self, document: int, first: int, last: int) -> UInt8[np.ndarray, "N"]:
        """The marks of tokens [first, last) of a document."""
        return self._stretch("marks", document, first, last)

    def _stretch(self, name: str, document: int, first: int, last: int) -> NDArray[Any]:
        assert 0 <= first <= last <= self.lengths_N[document], "a stretch outside its document"
        if first == last:
            return np.zeros(0, dtype=self._kind if name == "ids" else np.uint8)
        begin = int(self._starts_N1[document]) + first
        end = begin + last - first
        shard = bisect_right(self._first, begin) - 1
        stretches: list[NDArray[Any]] = []
        while begin < end:
            start = self._first[shard]
            stretches.append(self._mapped(shard)[name][begin - start : end - start])
            begin += len(stretches[-1])
            shard += 1
        return stretches[0] if len(stretches) == 1 else np.concatenate(stretches)

    def _mapped(self, number: int) -> dict[str, NDArray[Any]]:
        """A shard, mapped when it is first asked for; of many, those that were mapped last stay so."""
        if number not in self._maps:
            while len(self._maps) >= _MAPS_KEPT:
                del self._maps[next(iter(self._maps))]
            self._maps[number] = self._read(number)
        return self._maps[number]

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _read(self, number: int) -> dict[str, NDArray[Any]]:
        columns = _columns_of(self._file(number))
        if any(len(columns.get(name, ())) != self._tokens[number] for name in ("ids", "marks")):
            raise DamagedError(
                f"not the {self._tokens[number]:,} tokens that were written",
                location=str(self._file(number)),
                hint=_REMAKE,
            )
        return columns


def _columns_of(file: Path) -> dict[str, NDArray[Any]]:
    with _naming(file):
        return map_tensors(file)


@contextmanager
def _naming(file: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"not a shard that can be read: {error}", location=str(file), hint=_REMAKE) from error


def open_shards(folder: Path) -> Shards:
    """Open a folder of shards after comparing every file with its seal.

    Raises:
        DamagedError: a file is missing, cut short or changed, or holds ids beyond the vocabulary; it is named.
    """
    if not (folder / DIGESTS).is_file():
        raise DamagedError("there are no finished shards here", location=str(folder / DIGESTS), hint=_REMAKE)
    verify_manifest(folder)
    return Shards(folder)
