"""Memory-mapped shards of tokenized documents, written, merged and read with memory for one batch.

Columns with one number per document are files too: for a billion documents, each has 8 GB. The system can drop pages
that are mapped from a file, but not allocated memory.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Int, UInt8
from numpy.typing import DTypeLike, NDArray

from unmask.core.errors import DamagedError
from unmask.core.files import RunLayout, read_json, verify_manifest, write_json, write_manifest
from unmask.core.types import SENTENCE_START

Kind = Literal["<i8", "<u8", "<u4", "<u2", "u1"]
_NAMES: Final[dict[str, Kind]] = {"I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_BUFFER_NUMBERS: Final = 1 << 14
_LENGTH_BYTES: Final = 8
_HEADER_STEP: Final = 256
_MAX_HEADER_BYTES: Final = 1 << 16
CHUNK: Final = 1 << 18  # numbers processed at a time: 2 MB


class NumberFile:
    """A file that numbers are appended to."""

    def __init__(self, path: Path, kind: Kind = "<i8") -> None:
        self.path, self._kind = path, kind
        self._file = path.open("wb")
        self._buffer: list[int] = []

    def add(self, number: int) -> None:
        """Append one number."""
        self._buffer.append(number)
        if len(self._buffer) >= _BUFFER_NUMBERS:
            self._flush()

    def extend(self, numbers: NDArray[Any]) -> None:
        """Append an array."""
        self._flush()
        self._file.write(numbers.astype(self._kind).tobytes())

    def _flush(self) -> None:
        if self._buffer:
            self._file.write(np.array(self._buffer, dtype=self._kind).tobytes())
            self._buffer.clear()

    def close(self) -> None:
        """Write the buffer and close the file."""
        try:
            self._flush()
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close the file without writing the buffer."""
        self._buffer.clear()
        self._file.close()


def map_numbers(path: Path, kind: Kind = "<i8", *, writable: bool = False) -> NDArray[Any]:
    """Map a file of plain numbers."""
    count = path.stat().st_size // np.dtype(kind).itemsize
    return _map(path, kind, 0, count, "r+" if writable else "r")


def _map(path: Path, kind: DTypeLike, offset: int, count: int, mode: Literal["r", "r+"]) -> NDArray[Any]:
    if not count:  # an empty file can't be mapped
        return np.zeros(0, dtype=kind)
    # Slicing a plain array is several times faster than slicing a memmap.
    return np.memmap(path, dtype=kind, mode=mode, offset=offset, shape=(count,)).view(np.ndarray)


def allocate_column(folder: Path | None, name: str, count: int) -> NDArray[np.int64]:
    """Return a column of zeros, in a file of this folder, or in memory if `folder` is None."""
    if folder is None:
        return np.zeros(count, dtype=np.int64)
    path = folder / name
    zeros = bytes(1 << 20)
    with path.open("wb") as file:
        left = 8 * count
        while left:  # with a sparse file, a full disk would show as a SIGBUS when the map is written
            left -= file.write(zeros[: min(left, len(zeros))])
    return map_numbers(path, writable=True)


def append_files(target: Path, sources: Sequence[Path]) -> None:
    """Move the bytes of files, in this order, to the end of another file."""
    with target.open("ab") as file:
        for source in sources:
            with source.open("rb") as opened:
                shutil.copyfileobj(opened, file, 1 << 20)
            source.unlink()


class TensorSpec(NamedTuple):
    """A one-dimensional tensor to write to a safetensors file."""

    kind: Kind
    length: int
    data: Iterable[NDArray[Any]]


def header(tensors: Mapping[str, tuple[Kind, int]], min_bytes: int = 0) -> bytes:
    """Return the header of a safetensors file, padded to at least `min_bytes`; equal columns give equal bytes."""
    names = {kind: name for name, kind in _NAMES.items()}
    entries: dict[str, Any] = {}
    end = 0
    for name, (kind, count) in tensors.items():
        begin, end = end, end + count * np.dtype(kind).itemsize
        entries[name] = {"dtype": names[kind], "shape": [count], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = max(min_bytes, -(-(_LENGTH_BYTES + len(text)) // _HEADER_STEP) * _HEADER_STEP)
    assert len(text) <= size - _LENGTH_BYTES, "the header is larger than its reserved space"
    return (size - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text.ljust(size - _LENGTH_BYTES)


def write_tensors(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Write a safetensors file, chunk by chunk."""
    with path.open("wb") as file:
        file.write(header({name: (tensor.kind, tensor.length) for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            written = sum(file.write(numbers.astype(tensor.kind).tobytes()) for numbers in tensor.data)
            assert written == tensor.length * np.dtype(tensor.kind).itemsize, (
                "the data differ from the header in length"
            )


def _read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Return the offset of the data of a safetensors file, and the entries of its header."""
    size = int.from_bytes(_read_exactly(file, _LENGTH_BYTES), "little")
    if size > _MAX_HEADER_BYTES:
        raise ValueError(f"invalid header size: got {size:,} bytes, expected at most {_MAX_HEADER_BYTES:,}")
    entries: Any = json.loads(_read_exactly(file, size))
    if not isinstance(entries, dict) or not all(map(_is_column, cast("dict[str, Any]", entries).values())):
        raise ValueError("invalid entries in the header")
    return _LENGTH_BYTES + size, entries


def _is_column(entry: Any) -> bool:
    """Return whether an entry of a header has a known type, one dimension, and offsets."""
    if not isinstance(entry, dict):
        return False
    facts = cast("dict[str, Any]", entry)
    numbers = [facts.get("shape"), facts.get("data_offsets")]
    if facts.get("dtype") not in [*_NAMES] or not all(isinstance(each, list) for each in numbers):
        return False
    flat = [number for each in cast("list[list[Any]]", numbers) for number in each]
    return [len(each) for each in cast("list[list[Any]]", numbers)] == [1, 2] and all(
        type(number) is int and 0 <= number < 1 << 62 for number in flat
    )


def tensor_chunks(path: Path, name: str) -> Iterator[NDArray[Any]]:
    """Yield one column of a safetensors file in chunks, without mapping it.

    Raises:
        ValueError, KeyError, OSError: the file is not safetensors, or truncated.
    """
    with path.open("rb") as file:
        begin, entries = _read_header(file)
        kind = np.dtype(_NAMES[entries[name]["dtype"]])
        first, last = entries[name]["data_offsets"]
        file.seek(begin + first)
        for at in range(first, last, CHUNK * kind.itemsize):
            yield np.frombuffer(_read_exactly(file, min(CHUNK * kind.itemsize, last - at)), dtype=kind)


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Map the columns of a safetensors file.

    Raises:
        ValueError, KeyError, OSError: the file is not safetensors, or truncated.
    """
    with path.open("rb") as file:
        begin, entries = _read_header(file)
    data = _map(path, "u1", 0, path.stat().st_size, "r")
    columns: dict[str, NDArray[Any]] = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        column = data[begin + first : begin + last].view(_NAMES[entry["dtype"]])
        if column.shape != tuple(entry["shape"]):
            raise ValueError(f"{name} is truncated")
        columns[name] = column
    return columns


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError("the file is truncated")
    return data


SHARD_TOKENS: Final = 2**26
FORMAT: Final = "unmask-shards-3"
INDEX: Final = "index.json"
ARRAYS: Final = "arrays.safetensors"
_HEADER_BYTES: Final = 256  # fixed, so that ids can be written before their number is known
_COLUMNS: Final = ("lengths", "characters", "unknown", "sentences")


class ShardFiles(NamedTuple):
    """Shards and columns of some documents, not yet moved to a folder of shards."""

    stem: str  # folder and common prefix of the file names
    shards: list[int]  # number of tokens of each shard
    documents: int
    characters: int
    unknown: int

    @property
    def files(self) -> list[Path]:
        """The shards, in order."""
        return [Path(f"{self.stem}-{number:05d}.safetensors") for number in range(len(self.shards))]


def id_kind(vocabulary: int) -> Kind:
    """Return the integer type of ids on disk."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


class ShardWriter:
    """Writes shards and the columns of their documents."""

    def __init__(self, stem: Path, vocabulary: int, shard_tokens: int = SHARD_TOKENS) -> None:
        assert shard_tokens > 0, "a shard holds at least one token"
        self._stem, self._vocabulary = stem, vocabulary
        self._tokens = _TokenWriter(stem, id_kind(vocabulary), shard_tokens)
        self._columns = [NumberFile(stem.with_name(f"{stem.name}.{name}")) for name in _COLUMNS]
        self._counts = np.zeros(vocabulary, dtype=np.int64)
        self._open = np.zeros(len(_COLUMNS), dtype=np.int64)  # sums of the unfinished document
        self._is_open = False
        self._documents = 0
        self._sums = np.zeros(len(_COLUMNS), dtype=np.int64)

    def write(
        self,
        ids: NDArray[np.integer[Any]],
        token_flags: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        characters: NDArray[np.int64],
        unknown_characters: NDArray[np.int64],
        is_last: NDArray[np.bool_],
    ) -> None:
        """Write document chunks.

        Args:
            ids: the tokens of all chunks, end to end.
            token_flags: flags of all tokens.
            lengths: number of tokens of each chunk.
            characters: number of characters of each chunk, line ends included.
            unknown_characters: number of characters of each chunk that became [UNK].
            is_last: whether the document ends with the chunk.
        """
        self._counts += np.bincount(ids, minlength=self._vocabulary)
        self._tokens.write(ids, token_flags)
        if not len(lengths):
            return
        is_first = np.append(not self._is_open, is_last[:-1])
        sentences = _sentence_counts(token_flags, lengths, is_first, int(self._open[0]))
        chunks = np.stack([lengths, characters, unknown_characters, sentences], axis=1)
        self._sums += chunks.sum(axis=0)
        ends = np.flatnonzero(is_last)
        until = np.cumsum(chunks, axis=0)
        documents = np.diff(until[ends], axis=0, prepend=np.zeros((1, len(_COLUMNS)), dtype=np.int64))
        if len(ends):
            documents[0] += self._open
            self._open = until[-1] - until[ends[-1]]
            for column, numbers in zip(self._columns, documents.T, strict=True):
                column.extend(numbers)
            self._documents += len(ends)
        else:
            self._open = self._open + until[-1]
        self._is_open = not bool(is_last[-1])

    def finish(self) -> ShardFiles:
        """Close the files and return their names and counts."""
        assert not self._is_open, "the last document is not finished"
        self._tokens.finish()
        for column in self._columns:
            column.close()
        np.asarray(self._counts, dtype="<i8").tofile(self._stem.with_name(f"{self._stem.name}.counts"))
        _, characters, unknown, _ = self._sums.tolist()
        return ShardFiles(str(self._stem), self._tokens.shards, self._documents, characters, unknown)

    @contextmanager
    def closing(self) -> Generator[None]:
        """Context manager that closes all files, also after an error."""
        try:
            yield
        finally:
            self._tokens.abandon()
            for column in self._columns:
                column.abandon()


def _sentence_counts(
    token_flags: NDArray[np.uint8], lengths: NDArray[np.int64], is_first: NDArray[np.bool_], open_tokens: int
) -> NDArray[np.int64]:
    """Return the number of sentences that begin in each chunk; the first token of a document always starts one."""
    starts = (token_flags & SENTENCE_START) != 0
    ends = np.cumsum(lengths)
    begins = ends - lengths
    # A document may begin with chunks without tokens: its first token is that of its first chunk that has some.
    document = np.cumsum(is_first)
    full = np.flatnonzero(lengths > 0)
    leads = full[np.diff(document[full], prepend=-1) != 0]
    if open_tokens:  # the first token of the unfinished document was in an earlier chunk
        leads = leads[document[leads] != 0]
    starts[begins[leads]] = True
    counted = np.concatenate([[0], np.cumsum(starts)])
    return counted[ends] - counted[begins]


def merge(stem: Path, several: Sequence[ShardFiles], vocabulary: int, shard_tokens: int = SHARD_TOKENS) -> ShardFiles:
    """Merge small shards into a few large ones, and remove the small ones."""
    tokens = _TokenWriter(stem, id_kind(vocabulary), shard_tokens)
    try:
        for part in several:
            for file in part.files:
                shard = map_tensors(file)
                for first in range(0, len(shard["ids"]), CHUNK):
                    tokens.write(shard["ids"][first : first + CHUNK], shard["token_flags"][first : first + CHUNK])
                del shard
                file.unlink()
        tokens.finish()
    finally:
        tokens.abandon()
    for name in _COLUMNS:
        append_files(_column(str(stem), name), [_column(part.stem, name) for part in several])
    _sum_counts(several, vocabulary).tofile(_column(str(stem), "counts"))
    sums = [sum(getattr(part, name) for part in several) for name in ("documents", "characters", "unknown")]
    return ShardFiles(str(stem), tokens.shards, *sums)


def _column(stem: str, name: str) -> Path:
    return Path(f"{stem}.{name}")


def _sum_counts(several: Sequence[ShardFiles], vocabulary: int) -> NDArray[np.int64]:
    counts = np.zeros(vocabulary, dtype="<i8")
    for part in several:
        file = _column(part.stem, "counts")
        counts += np.fromfile(file, dtype="<i8")
        file.unlink()
    return counts


def finish_folder(folder: Path, several: Sequence[ShardFiles], vocabulary: int, tokenizer_fingerprint: str) -> None:
    """Move shards to a folder, in this order, and write its arrays, index and manifest."""
    shards: list[int] = []
    for part in several:
        for file, tokens in zip(part.files, part.shards, strict=True):
            os.rename(file, folder / f"shard-{len(shards):05d}.safetensors")
            shards.append(tokens)
    whole = {name: folder / f"all.{name}" for name in _COLUMNS}
    for name, path in whole.items():
        append_files(path, [_column(part.stem, name) for part in several])
    counts = _sum_counts(several, vocabulary)
    columns = {name: map_numbers(path) for name, path in whole.items()}
    documents = len(columns["lengths"])
    arrays = {
        "document_starts": TensorSpec("<i8", documents + 1, _starts(columns["lengths"])),
        "lengths": TensorSpec("<i8", documents, _by_chunks(columns["lengths"])),
        "characters": TensorSpec("<i8", documents, _by_chunks(columns["characters"])),
        "unknown_characters": TensorSpec("<i8", documents, _by_chunks(columns["unknown"])),
        "token_counts": TensorSpec("<i8", vocabulary, [counts]),
        "sentences": TensorSpec("<u4", documents, _by_chunks(columns["sentences"])),
    }
    write_tensors(folder / ARRAYS, arrays)
    del arrays, columns  # Windows can't remove a file that is mapped
    for path in whole.values():
        path.unlink()
    index = {"format": FORMAT, "vocabulary": vocabulary, "tokenizer": tokenizer_fingerprint, "tokens": shards}
    write_json(folder / INDEX, index)
    write_manifest(folder)


def _by_chunks(column: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(column), CHUNK):
        yield column[first : first + CHUNK]


def _starts(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    start = np.zeros(1, dtype=np.int64)
    yield start
    for chunk in _by_chunks(lengths):
        starts = start + np.cumsum(chunk)
        yield starts
        start = starts[-1:]


class _TokenWriter:
    """Splits a stream of tokens into shards; flags are in a separate file until the number of ids is known."""

    def __init__(self, stem: Path, kind: Kind, shard_tokens: int) -> None:
        self.shards: list[int] = []
        self._stem, self._limit = stem, shard_tokens
        self._kind: Kind = kind
        self._ids: BinaryIO | None = None
        self._flags: BinaryIO | None = None

    @property
    def _flags_file(self) -> Path:
        return self._stem.with_name(f"{self._stem.name}.flags")

    def write(self, ids: NDArray[np.integer[Any]], token_flags: NDArray[np.uint8]) -> None:
        assert len(ids) == len(token_flags), "one flag byte for each id"
        first = 0
        while first < len(ids):
            if self._ids is None or self._flags is None:
                name = f"{self._stem.name}-{len(self.shards):05d}.safetensors"
                self._ids = self._stem.with_name(name).open("w+b")
                self._ids.write(b" " * _HEADER_BYTES)
                self._flags = self._flags_file.open("w+b")
                self.shards.append(0)
            last = min(len(ids), first + self._limit - self.shards[-1])
            self._ids.write(ids[first:last].astype(self._kind).tobytes())
            self._flags.write(token_flags[first:last].tobytes())
            self.shards[-1] += last - first
            first = last
            if self.shards[-1] == self._limit:
                self.finish()

    def finish(self) -> None:
        """Append the flags to the ids and write the header before them."""
        if self._ids is None or self._flags is None:
            return
        tokens = self.shards[-1]
        self._flags.seek(0)
        shutil.copyfileobj(self._flags, self._ids, 1 << 20)
        shape: dict[str, tuple[Kind, int]] = {"ids": (self._kind, tokens), "token_flags": ("u1", tokens)}
        self._ids.seek(0)
        self._ids.write(header(shape, _HEADER_BYTES))
        self._ids.close()
        self._flags.close()
        self._flags_file.unlink()
        self._ids = self._flags = None

    def abandon(self) -> None:
        """Close the open files."""
        for file in (self._ids, self._flags):
            if file is not None:
                file.close()


_MAX_MAPS: Final = 128  # each needs a file handle; some systems allow 256
_DIGESTED_BYTES: Final = 1 << 20  # files up to this size are digested whenever a folder is opened
_REBUILD: Final = "remove its folder, and it will be built again from the text"


class Shards:
    """Tokenized documents in memory-mapped files; see `open_shards`."""

    def __init__(self, folder: Path) -> None:
        index = _read_index(folder / INDEX)
        self._folder = folder
        self.vocabulary: int = index["vocabulary"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        arrays = _map_columns(folder / ARRAYS)
        _check_columns(folder / ARRAYS, arrays, self.vocabulary, sum(index["tokens"]))
        self.token_counts: Int[np.ndarray, "V"] = arrays["token_counts"]
        self.lengths: Int[np.ndarray, "N"] = arrays["lengths"]
        self.document_characters: Int[np.ndarray, "N"] = arrays["characters"]
        self.document_unknown_characters: Int[np.ndarray, "N"] = arrays["unknown_characters"]
        # Number of sentences of each document; its first token always starts one.
        self.sentences: Int[np.ndarray, "N"] = arrays["sentences"].view(np.int32)
        self._starts: NDArray[np.int64] = arrays["document_starts"]
        self._tokens: list[int] = index["tokens"]
        self._first = [0, *accumulate(self._tokens)]
        self._maps: dict[int, dict[str, NDArray[Any]]] = {}
        self._kind = np.dtype(id_kind(self.vocabulary))

    def check_ids(self) -> None:
        """Check that every id is below the vocabulary size, and that the documents lie end to end.

        Raises:
            DamagedError: a shard contains an invalid id, or can't be read, or two documents overlap.
        """
        for first in range(0, self.documents, CHUNK):
            starts = self._starts[first : first + CHUNK + 1]
            if not np.array_equal(np.diff(starts), self.lengths[first : first + CHUNK]):
                message = "the documents don't lie end to end"
                raise DamagedError(message, location=str(self._folder / ARRAYS), hint=_REBUILD)
        for number in range(len(self._tokens)):
            file = self._file(number)
            with _name_file(file):  # read, not mapped: a shard may be larger than the free address space
                largest = max((int(ids.max()) for ids in tensor_chunks(file, "ids")), default=0)
            if largest >= self.vocabulary:
                raise DamagedError(
                    f"invalid token id: got {largest}, expected less than the vocabulary size {self.vocabulary:,}",
                    location=str(file),
                    hint=_REBUILD,
                )

    @property
    def documents(self) -> int:
        """Number of documents; some may have no tokens."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return self._first[-1]

    @property
    def characters(self) -> int:
        """Number of characters of the text, line ends included."""
        return int(self.document_characters.sum())

    @property
    def unknown_characters(self) -> int:
        """Number of characters that became [UNK]."""
        return int(self.document_unknown_characters.sum())

    def ids(self, document: int, first: int, last: int) -> NDArray[np.integer[Any]]:
        """Return the ids of tokens [first, last) of a document, uint16 or uint32; a view if they are in one shard."""
        return self._slice("ids", document, first, last)

    def token_flags(self, document: int, first: int, last: int) -> UInt8[np.ndarray, "N"]:
        """Return the flags of tokens [first, last) of a document."""
        return self._slice("token_flags", document, first, last)

    def _slice(self, name: str, document: int, first: int, last: int) -> NDArray[Any]:
        assert 0 <= first <= last <= self.lengths[document], "tokens outside the document"
        if first == last:
            return np.zeros(0, dtype=self._kind if name == "ids" else np.uint8)
        begin = int(self._starts[document]) + first
        end = begin + last - first
        shard = bisect_right(self._first, begin) - 1
        slices: list[NDArray[Any]] = []
        while begin < end:
            start = self._first[shard]
            slices.append(self._map(shard)[name][begin - start : end - start])
            begin += len(slices[-1])
            shard += 1
        return slices[0] if len(slices) == 1 else np.concatenate(slices)

    def _map(self, number: int) -> dict[str, NDArray[Any]]:
        """Return a mapped shard; the most recently mapped shards stay mapped."""
        if number not in self._maps:
            while len(self._maps) >= _MAX_MAPS:
                del self._maps[next(iter(self._maps))]
            columns = _map_columns(self._file(number))
            if any(len(columns.get(name, ())) != self._tokens[number] for name in ("ids", "token_flags")):
                raise DamagedError(
                    f"invalid shard size: expected {self._tokens[number]:,} tokens",
                    location=str(self._file(number)),
                    hint=_REBUILD,
                )
            self._maps[number] = columns
        return self._maps[number]

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"


def _read_index(file: Path) -> dict[str, Any]:
    """Read index.json.

    Raises:
        DamagedError: it has the format of another version, or a value of another type.
    """
    content: Any = read_json(file)
    index = cast("dict[str, Any]", content if isinstance(content, dict) else {})
    if index.get("format") != FORMAT:
        raise DamagedError(
            f"the shards have the format of another version: got {index.get('format')}, expected {FORMAT}",
            location=str(file),
            hint=_REBUILD,
        )
    vocabulary, tokens = index.get("vocabulary"), index.get("tokens")
    is_valid = (
        type(vocabulary) is int
        and 0 < vocabulary <= 1 << 32
        and isinstance(index.get("tokenizer"), str)
        and isinstance(tokens, list)
        and all(type(number) is int and 0 < number < 1 << 48 for number in cast("list[Any]", tokens))
    )
    if not is_valid:
        raise DamagedError("invalid index of shards", location=str(file), hint=_REBUILD)
    return index


def _check_columns(file: Path, columns: Mapping[str, NDArray[Any]], vocabulary: int, tokens: int) -> None:
    """Check the lengths and types of the columns of documents, and the number of tokens.

    Raises:
        DamagedError: one is missing or doesn't fit the others; it is named.
    """
    documents = len(columns.get("lengths", ()))
    expected = {
        **dict.fromkeys(("lengths", "characters", "unknown_characters"), ("<i8", documents)),
        "document_starts": ("<i8", documents + 1),
        "token_counts": ("<i8", vocabulary),
        "sentences": ("<u4", documents),
    }
    for name, (kind, length) in expected.items():
        column = columns.get(name)
        if column is None or column.dtype != np.dtype(kind) or len(column) != length:
            raise DamagedError(f"invalid column `{name}`", location=str(file), hint=_REBUILD)
    starts, lengths = columns["document_starts"], columns["lengths"]
    if starts[0] != 0 or starts[-1] != tokens or (documents and int(lengths.min()) < 0):
        raise DamagedError("the documents don't fit the tokens of the shards", location=str(file), hint=_REBUILD)


def _map_columns(file: Path) -> dict[str, NDArray[Any]]:
    with _name_file(file):
        return map_tensors(file)


@contextmanager
def _name_file(file: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"can't read this shard: {error}", location=str(file), hint=_REBUILD) from error


def open_shards(folder: Path, *, verify: bool = False) -> Shards:
    """Open a folder of shards after comparing its files with the manifest.

    Args:
        folder: directory of the shards.
        verify: whether to read every byte; otherwise, small files are digested and large ones compared by size.

    Raises:
        DamagedError: a file is missing, truncated or changed, or has the format of another version.
    """
    if not (folder / RunLayout.DIGESTS).is_file():
        raise DamagedError("there are no complete shards here", location=str(folder / RunLayout.DIGESTS), hint=_REBUILD)
    verify_manifest(folder, digest_up_to=None if verify else _DIGESTED_BYTES)
    shards = Shards(folder)
    if verify:
        shards.check_ids()
    return shards
