"""Room card: columns of numbers as long as there are documents, kept in files.

Comes in: numbers, some at a time. Goes out: files of plain little-endian numbers, arrays mapped from them, tensors of a
safetensors file written and mapped without being held in memory. Called by: survey, units, shards.

What is mapped from a file is the page cache's and can be dropped; what is held in memory can't. A corpus of a billion
documents has 8 GB in each of these columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

Kind = Literal["<i8", "<u8", "<u4", "<u2", "u1"]
_NAMES: Final[dict[str, Kind]] = {"I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_HELD: Final = 1 << 14  # numbers that wait to be written
_LENGTH_BYTES: Final = 8
_HEADER_STEP: Final = 256
_LARGEST_HEADER: Final = 1 << 16
CHUNK: Final = 1 << 18  # numbers that are worked on at a time: 2 MB


class Column:
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


def runs(first_N: NDArray[np.int64], count_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers first, first + 1, ... of each of several runs, end to end."""
    before_N = np.cumsum(count_N) - count_N
    return np.arange(int(count_N.sum())) + np.repeat(first_N - before_N, count_N)


class Tensor(NamedTuple):
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
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
