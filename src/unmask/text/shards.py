"""Room card: tokenized text on disk, read in place.

Comes in: encoded passages, streamed. Goes out: a sealed folder of token shards, and a Shards that reads any stretch of
any document from it through memory maps. Called by: corpus, loader, pretrain.

    index.json            vocabulary, the tokenizer's fingerprint, tokens of each shard
    shard-00000.safetensors   ids (uint16 or uint32) and marks (uint8): all documents end to end, without special pieces
    arrays.safetensors    document_starts_N1, characters_N, unknown_characters_N, counts_V (all int64)

A document may lie across two shards; where it starts is counted over all of them.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import numpy as np
from jaxtyping import Int, UInt8
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import load_file, save_file

from unmask.errors import DamagedError
from unmask.store import DIGESTS, check_seal, new_folder, read_json, seal, write_json

SHARD_TOKENS: Final = 2**26
_FORMAT: Final = "unmask-shards-1"
_INDEX: Final = "index.json"
_ARRAYS: Final = "arrays.safetensors"
_HEADER_BYTES: Final = 256  # fixed, so that ids can be written before their number is known
_LENGTH_BYTES: Final = 8
_REMAKE: Final = "remove the folder it is in; it is made anew from the text"


class EncodedPassage(NamedTuple):
    """A passage of a document as tokens."""

    ids: NDArray[np.integer[Any]]
    marks: NDArray[np.uint8]
    characters: int
    characters_unknown: int
    last: bool  # whether the document ends here


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shards(
    folder: Path,
    passages: Iterable[EncodedPassage],
    vocabulary: int,
    tokenizer_fingerprint: str,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write a folder of shards, whole or not at all, with memory for one passage and three numbers per document.

    Raises:
        StoreError: the place can't be written.
    """
    assert shard_tokens > 0, "a shard holds at least one token"
    starts, characters, unknown = array("q", [0]), array("q", [0]), array("q", [0])
    counts_V = np.zeros(vocabulary, dtype=np.int64)
    with new_folder(folder) as aside:
        writer = _Writer(aside, np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4"), shard_tokens)
        with writer.closing():
            for passage in passages:
                counts_V += np.bincount(passage.ids.astype(np.int64), minlength=vocabulary)
                writer.write(passage.ids, passage.marks)
                characters[-1] += passage.characters
                unknown[-1] += passage.characters_unknown
                if passage.last:
                    starts.append(writer.tokens)
                    characters.append(0)
                    unknown.append(0)
        assert starts[-1] == writer.tokens and not characters[-1], "the last document was not finished"
        arrays = {
            "document_starts_N1": np.array(starts, dtype=np.int64),
            "characters_N": np.array(characters[:-1], dtype=np.int64),
            "unknown_characters_N": np.array(unknown[:-1], dtype=np.int64),
            "counts_V": counts_V,
        }
        save_file(arrays, aside / _ARRAYS)
        index = {
            "format": _FORMAT,
            "vocabulary": vocabulary,
            "tokenizer": tokenizer_fingerprint,
            "shard_tokens": shard_tokens,
            "tokens": writer.shards,
        }
        write_json(aside / _INDEX, index)
        seal(aside)


class _Writer:
    """Cuts a stream of tokens into shards; marks wait in a file of their own until their place is known."""

    def __init__(self, folder: Path, kind: np.dtype[Any], shard_tokens: int) -> None:
        self.tokens = 0
        self.shards: list[int] = []
        self._folder, self._kind, self._limit = folder, kind, shard_tokens
        self._ids: BinaryIO | None = None
        self._marks: BinaryIO | None = None

    @contextmanager
    def closing(self) -> Generator[None]:
        try:
            yield
            self._finish()
        finally:
            for file in (self._ids, self._marks):
                if file is not None:
                    file.close()

    def write(self, ids: NDArray[np.integer[Any]], marks: NDArray[np.uint8]) -> None:
        assert len(ids) == len(marks), "a mark for every id"
        first = 0
        while first < len(ids):
            if self._ids is None or self._marks is None:
                self._ids = (self._folder / _shard_name(len(self.shards))).open("w+b")
                self._ids.write(b" " * _HEADER_BYTES)
                self._marks = (self._folder / "marks").open("w+b")
                self.shards.append(0)
            last = min(len(ids), first + self._limit - self.shards[-1])
            self._ids.write(ids[first:last].astype(self._kind).tobytes())
            self._marks.write(marks[first:last].tobytes())
            self.shards[-1] += last - first
            self.tokens += last - first
            first = last
            if self.shards[-1] == self._limit:
                self._finish()

    def _finish(self) -> None:
        """Lay the marks behind the ids and write the header before them."""
        if self._ids is None or self._marks is None:
            return
        tokens = self.shards[-1]
        middle, end = tokens * self._kind.itemsize, tokens * (self._kind.itemsize + 1)
        header = {
            "ids": {"dtype": f"U{8 * self._kind.itemsize}", "shape": [tokens], "data_offsets": [0, middle]},
            "marks": {"dtype": "U8", "shape": [tokens], "data_offsets": [middle, end]},
        }
        told = json.dumps(header, separators=(",", ":")).encode()
        assert len(told) <= _HEADER_BYTES - _LENGTH_BYTES, "the header outgrew its place"
        self._marks.seek(0)
        shutil.copyfileobj(self._marks, self._ids)
        self._ids.seek(0)
        self._ids.write((_HEADER_BYTES - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + told)
        self._ids.close()
        self._marks.close()
        (self._folder / "marks").unlink()
        self._ids = self._marks = None


class Shards:
    """Tokenized documents, read in place; made by `open_shards`."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / _INDEX)
        if index["format"] != _FORMAT:
            raise DamagedError(
                f"made by another version: {index['format']}, not {_FORMAT}", where=str(folder / _INDEX), next=_REMAKE
            )
        self.vocabulary: int = index["vocabulary"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        arrays = cast("dict[str, NDArray[np.int64]]", load_file(folder / _ARRAYS))
        self.counts_V: Int[np.ndarray, "V"] = arrays["counts_V"]
        self.characters_N: Int[np.ndarray, "N"] = arrays["characters_N"]
        self.unknown_characters_N: Int[np.ndarray, "N"] = arrays["unknown_characters_N"]
        self._starts_N1 = arrays["document_starts_N1"]
        self.lengths_N: Int[np.ndarray, "N"] = np.diff(self._starts_N1)
        self._shard_tokens: int = index["shard_tokens"]
        maps = [_map(folder / _shard_name(number), tokens) for number, tokens in enumerate(index["tokens"])]
        self._ids: list[NDArray[np.integer[Any]]] = [ids for ids, _ in maps]
        self._marks: list[NDArray[np.uint8]] = [marks for _, marks in maps]
        for number, ids in enumerate(self._ids):
            if len(ids) and int(ids.max()) >= self.vocabulary:
                raise DamagedError(
                    f"id {int(ids.max())} is beyond the vocabulary of {self.vocabulary:,}",
                    where=str(folder / _shard_name(number)),
                    next=_REMAKE,
                )

    @property
    def documents(self) -> int:
        """How many documents there are; some may have no tokens."""
        return len(self.lengths_N)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._starts_N1[-1])

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
        return self._stretch(self._ids, document, first, last)

    def marks(self, document: int, first: int, last: int) -> UInt8[np.ndarray, "N"]:
        """The marks of tokens [first, last) of a document."""
        return self._stretch(self._marks, document, first, last)

    def _stretch(self, maps: list[NDArray[Any]], document: int, first: int, last: int) -> NDArray[Any]:
        assert 0 <= first <= last <= self.lengths_N[document], "a stretch outside its document"
        if first == last:
            return np.zeros(0, dtype=maps[0].dtype if maps else np.uint16)
        start = int(self._starts_N1[document])
        begin, end = start + first, start + last
        shards = range(begin // self._shard_tokens, (end - 1) // self._shard_tokens + 1)
        stretches = [
            maps[shard][max(begin - shard * self._shard_tokens, 0) : end - shard * self._shard_tokens]
            for shard in shards
        ]
        return stretches[0] if len(stretches) == 1 else np.concatenate(stretches)


def _map(file: Path, tokens: int) -> tuple[NDArray[np.integer[Any]], NDArray[np.uint8]]:
    """The ids and marks of a shard, mapped into memory by what its header says."""
    kinds: dict[str, DTypeLike] = {"U8": "u1", "U16": "<u2", "U32": "<u4"}
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            header = json.loads(opened.read(min(size, _HEADER_BYTES)))
        found = [
            np.memmap(
                file,
                dtype=kinds[header[name]["dtype"]],
                mode="r",
                offset=_LENGTH_BYTES + size + header[name]["data_offsets"][0],
                shape=(tokens,),
            ).view(np.ndarray)  # a slice of a plain array is made several times sooner
            for name in ("ids", "marks")
        ]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(f"not a shard that can be read: {error}", where=str(file), next=_REMAKE) from error
    return found[0], found[1]


def open_shards(folder: Path) -> Shards:
    """Open a folder of shards after comparing every file with its seal.

    Raises:
        DamagedError: a file is missing, cut short or changed, or holds ids beyond the vocabulary; it is named.
    """
    if not (folder / DIGESTS).is_file():
        raise DamagedError("there are no finished shards here", where=str(folder / DIGESTS), next=_REMAKE)
    check_seal(folder)
    return Shards(folder)
