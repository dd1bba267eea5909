"""Room card: tokenized text on disk, read in place.

Comes in: encoded passages, streamed. Goes out: a sealed folder of token shards, and a Shards that reads any stretch of
any document from it through memory maps. Called by: units, corpus, loader, pretrain.

    index.json            vocabulary, the tokenizer's fingerprint, tokens of each shard
    shard-00000.safetensors   ids (uint16 or uint32) and marks (uint8): all documents end to end, without special pieces
    arrays.safetensors    document_starts_N1, lengths_N, characters_N, unknown_characters_N, counts_V (all int64)

A document may lie across shards; where it starts is counted over all of them. Nothing is held in memory per document,
neither in writing nor in reading.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int, UInt8
from numpy.typing import NDArray

from unmask.contracts import SENTENCE_START
from unmask.errors import DamagedError
from unmask.store import DIGESTS, check_seal, read_json
from unmask.text.arrays import map_tensors, tensor_chunks
from unmask.text.writing import ARRAYS, FORMAT, INDEX, EncodedPassage, id_kind, write_shards

__all__ = ["EncodedPassage", "Shards", "open_shards", "write_shards"]

_MAPS_KEPT: Final = 128  # each takes a file handle, of which some systems give 256
_REMAKE: Final = "remove the folder it is in; it is made anew from the text"


class Shards:
    """Tokenized documents, read in place; made by `open_shards`."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX)
        if index["format"] != FORMAT:
            raise DamagedError(
                f"made by another version: {index['format']}, not {FORMAT}", where=str(folder / INDEX), next=_REMAKE
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
                f"id {largest} is beyond the vocabulary of {self.vocabulary:,}", where=str(file), next=_REMAKE
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
                where=str(self._file(number)),
                next=_REMAKE,
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
        raise DamagedError(f"not a shard that can be read: {error}", where=str(file), next=_REMAKE) from error


def open_shards(folder: Path) -> Shards:
    """Open a folder of shards after comparing every file with its seal.

    Raises:
        DamagedError: a file is missing, cut short or changed, or holds ids beyond the vocabulary; it is named.
    """
    if not (folder / DIGESTS).is_file():
        raise DamagedError("there are no finished shards here", where=str(folder / DIGESTS), next=_REMAKE)
    check_seal(folder)
    return Shards(folder)
