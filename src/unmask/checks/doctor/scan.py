"""One pass over a text, in bounded memory: near duplicates, repeated lines, scripts of documents, wrong decoding.

Near duplicates are found by MinHash (Broder 1997) with one permutation (Li, Owen and Zhang 2012), densified by
rotation (Shrivastava and Li 2014), 16 bits per value (Li and König 2010), in bands of four values. The hashes are
computed by numpy for a block of documents at once; datasketch needs scipy, and hashes one shingle per call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Int, UInt16
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.types import ProgressCallback
from unmask.data.advice import script_of
from unmask.data.sources import BaseSource
from unmask.tokenization.words import codes

MAX_DOCUMENTS: Final = 1_000_000  # examined; 160 bytes of memory each
SIMILAR: Final = 0.8  # fraction of common shingles from which documents are near duplicates
SHINGLE: Final = 16  # characters
MIN_CHARACTERS: Final = 200  # of a document that is compared; shorter ones have too few shingles
MIN_LINE: Final = 30  # characters of a line that counts as repeated; shorter ones are repeated in any code
MIN_REPEATS: Final = 10  # documents that contain a repeated line
SHORT: Final = 20  # characters of a document that gives almost no context
_MAX_CHARACTERS: Final = 1_000_000  # of a document
_BLOCK_CHARACTERS: Final = 1_000_000
_BLOCK_DOCUMENTS: Final = 8192
_MAX_LINES: Final = 200_000  # counted at a time
_MAX_LINE_CHARACTERS: Final = 50_000_000  # of these lines together
_SAMPLE_CHARACTERS: Final = 3_000_000  # for the tokenizer
_MIN_LETTERS: Final = 20  # of a document that has a script
_QUOTED: Final = 60  # characters of a text in a finding

# A UTF-8 sequence that was decoded as Windows-1252 or Latin-1: a first byte, and as many others as it announces.
_HIGH: Final = "\u0080-\u00bf" + "".join(bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xA0))
_MISREAD: Final = re.compile(f"[\u00c2-\u00df][{_HIGH}]|[\u00e0-\u00ef][{_HIGH}]{{2}}|[\u00f0-\u00f4][{_HIGH}]{{3}}")
_LATIN: Final = re.compile(f"[\u00c0-\u00ff{_HIGH}]")


@dataclass
class Misread:
    """UTF-8 sequences of one file that were decoded as Latin-1."""

    sequences: int = 0
    latin: int = 0  # characters that such a decoding gives, in all
    has_controls: bool = False  # U+0080 to U+009F, which Windows-1252 lacks
    example: str = ""


@dataclass
class TextScan:
    """What one pass over a text found."""

    documents: int = 0  # examined
    short: int = 0  # documents of less than SHORT characters
    compared: int = 0  # long enough, and no copy of an earlier one
    near: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # earlier and later document
    example: str = ""  # beginning of a near duplicate
    line_characters: int = 0  # of all lines
    repeated_characters: int = 0  # of repeated lines, without their first occurrence
    repeated_lines: int = 0
    most_repeated: tuple[str, int, str] = ("", 0, "")  # line, documents that contain it, path of the first
    scripts: Counter[str] = field(default_factory=Counter[str])  # documents by the script of most of their letters
    misread: dict[str, Misread] = field(default_factory=dict[str, Misread])  # by path
    sample: list[str] = field(default_factory=list[str])


def scan_text(source: BaseSource, progress: ProgressCallback) -> TextScan:
    """Read a text and return what is unusual in its documents.

    Raises:
        TextError: the text can't be read.
    """
    scan, lines, scripts, signatures = TextScan(), _Lines(), _Scripts(), _Signatures()
    total = max(1, sum(part.last_byte - part.first_byte for part in source.parts()))  # in bytes, about as many
    share, sampled, done = _SAMPLE_CHARACTERS / total, 0, 0
    seen, block, is_new, size = set[int](), list[str](), list[bool](), 0
    for path, text in _documents(source):
        number, digest = scan.documents, hash(text)
        is_new.append(digest not in seen)
        block.append(text)
        if is_new[-1]:
            seen.add(digest)
            lines.add(path, text)
            if not text.isascii():
                _count_misread(scan.misread.setdefault(path, Misread()), text)
        is_drawn = share >= 1 or number == 0 or rng.uniform(0, "doctor sample", number)[0] < share
        if is_drawn and sampled < 2 * _SAMPLE_CHARACTERS:
            scan.sample.append(text)
            sampled += len(text)
        scan.short += len(text) < SHORT
        scan.documents, size = number + 1, size + len(text)
        if size >= _BLOCK_CHARACTERS or len(block) == _BLOCK_DOCUMENTS:
            scripts.add(block)
            signatures.add(block, is_new)
            done += size
            progress("comparing documents", min(0.99, done / total))
            block, is_new, size = [], [], 0
    scripts.add(block)
    signatures.add(block, is_new)
    signatures.write_to(scan)
    lines.write_to(scan)
    scan.scripts = scripts.documents
    progress("comparing documents", 1.0)
    return scan


def _documents(source: BaseSource) -> Iterator[tuple[str, str]]:
    """Yield path and text of the first documents; of long ones, the beginning."""
    number = 0
    for part in source.parts():
        texts, size = list[str](), 0
        for chunk in source.documents(part):
            if size < _MAX_CHARACTERS:
                texts.append(chunk.text)
                size += len(chunk.text)
            if chunk.last:
                yield part.path, "".join(texts)[:_MAX_CHARACTERS]
                texts, size, number = [], 0, number + 1
                if number == MAX_DOCUMENTS:
                    return


def _count_misread(misread: Misread, text: str) -> None:
    misread.latin += len(_LATIN.findall(text))
    for match in _MISREAD.finditer(text):
        misread.sequences += 1
        misread.has_controls = misread.has_controls or any("\x80" <= letter <= "\x9f" for letter in match[0])
        misread.example = misread.example or text[max(0, match.start() - 20) : match.end() + 20]


# Near duplicates ------------------------------------------------------------------------------------------------------

_BINS: Final = 64  # the standard error of a similarity of 0.8 is 0.05
_BAND: Final = 4  # values of 16 bits in one band, compared as one number of 64 bits
_EMPTY: Final = np.uint32(0xFFFFFFFF)
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash of a shingle; any large odd number
_ROTATED: Final = np.uint32(0x9E3779B1)  # added for each bin that a value is copied over
_PAIRS: Final = 100_000  # compared at once


def minhash(texts: Sequence[str]) -> UInt16[np.ndarray, "N 64"]:
    """Return the MinHash signature of each text of at least SHINGLE characters."""
    code_points = codes("".join(texts)).astype(np.uint64)
    count = len(code_points) - SHINGLE + 1
    shingles = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        shingles = shingles * _BASE + code_points[offset : offset + count]
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    inside = owner[:count] == owner[SHINGLE - 1 :]
    hashed = rng.bits(0, "doctor shingles", shingles[inside])
    bins = owner[:count][inside] * _BINS + (hashed >> np.uint64(58)).astype(np.int64)
    smallest = np.full(len(texts) * _BINS, _EMPTY, dtype=np.uint32)
    np.minimum.at(smallest, bins, hashed.astype(np.uint32))
    values = smallest.reshape(-1, _BINS)
    is_empty = values == _EMPTY
    for at in range(2 * _BINS - 2, -1, -1):  # twice around, so that each bin finds the next full one
        column, following = at % _BINS, (at + 1) % _BINS
        rows = is_empty[:, column] & ~is_empty[:, following]
        values[rows, column] = values[rows, following] + _ROTATED
        is_empty[rows, column] = False
    return np.ascontiguousarray(values.astype(np.uint16))


def near_duplicates(signatures: UInt16[np.ndarray, "N 64"]) -> list[tuple[int, int]]:
    """Return (earlier, later) for each text that is similar to an earlier one, in the order of the later ones."""
    earlier = np.full(len(signatures), -1, dtype=np.int64)
    for band in signatures.view(np.uint64).T:
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], np.diff(band[order]) != 0)))
        leaders = np.repeat(order[starts], np.diff(starts, append=len(order)))
        open_ = np.flatnonzero((leaders != order) & (earlier[order] < 0))
        for begin in range(0, len(open_), _PAIRS):
            rows = open_[begin : begin + _PAIRS]
            agreement = (signatures[leaders[rows]] == signatures[order[rows]]).mean(1)
            similar = rows[agreement >= SIMILAR]
            earlier[order[similar]] = leaders[similar]
    found: Int[np.ndarray, "K"] = np.flatnonzero(earlier >= 0)
    return list(zip(earlier[found].tolist(), found.tolist(), strict=True))


class _Signatures:
    """The MinHash signatures of the documents that are compared, block by block."""

    def __init__(self) -> None:
        self._numbers: list[int] = []  # of the documents
        self._beginnings: list[str] = []
        self._blocks: list[UInt16[np.ndarray, "N 64"]] = []
        self._documents = 0

    def add(self, texts: Sequence[str], is_new: Sequence[bool]) -> None:
        """Add the documents of a block that are long enough and no copies; white space counts as one space."""
        long = [
            (self._documents + at, " ".join(text.split()))
            for at, (text, new) in enumerate(zip(texts, is_new, strict=True))
            if new and len(text) >= MIN_CHARACTERS
        ]
        long = [(number, text) for number, text in long if len(text) >= SHINGLE]
        self._documents += len(texts)
        if long:
            self._numbers += [number for number, _ in long]
            self._beginnings += [text[:_QUOTED] for _, text in long]
            self._blocks.append(minhash([text for _, text in long]))

    def write_to(self, scan: TextScan) -> None:
        """Compare all documents and write the near duplicates."""
        scan.compared = len(self._numbers)
        pairs = near_duplicates(np.concatenate(self._blocks)) if self._blocks else []
        scan.near = [(self._numbers[one], self._numbers[other]) for one, other in pairs]
        scan.example = self._beginnings[pairs[0][1]] if pairs else ""


# Lines and scripts ----------------------------------------------------------------------------------------------------


class _Lines:
    """Counts in how many documents a line occurs, for the most frequent lines (lossy counting, Manku and Motwani)."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, str]] = {}  # line -> documents that contain it, path of the first
        self._characters = self._dropped = self._held = 0

    def add(self, path: str, text: str) -> None:
        """Count the lines of a document, each once."""
        lines = {line for each in text.split("\n") if len(line := each.strip()) >= MIN_LINE}
        self._characters += len(text)
        for line in lines:
            count, first = self._counts.get(line, (0, path))
            self._counts[line] = count + 1, first
            self._held += 0 if count else len(line)
        while len(self._counts) > _MAX_LINES or self._held > _MAX_LINE_CHARACTERS:
            self._dropped += 1
            self._counts = {line: entry for line, entry in self._counts.items() if entry[0] > self._dropped}
            self._held = sum(map(len, self._counts))

    def write_to(self, scan: TextScan) -> None:
        """Write the counts of repeated lines."""
        repeated = {line: entry for line, entry in self._counts.items() if entry[0] >= MIN_REPEATS}
        scan.line_characters = self._characters
        scan.repeated_lines = len(repeated)
        scan.repeated_characters = sum((count - 1) * len(line) for line, (count, _) in repeated.items())
        if repeated:
            line = max(repeated, key=lambda line: (repeated[line][0] - 1) * len(line))
            scan.most_repeated = line, *repeated[line]


class _Scripts:
    """Counts documents by the script of most of their letters."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self._names = [""]  # of no letter
        self._script_of: NDArray[np.int16] = np.full(0x110000, -1, dtype=np.int16)

    def add(self, texts: Sequence[str]) -> None:
        """Count the documents of a block."""
        code_points = codes("".join(texts))
        if not len(code_points):
            return
        for code in np.flatnonzero(np.bincount(code_points)).tolist():
            if self._script_of[code] < 0:
                self._script_of[code] = self._number(script_of(chr(code)))
        owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        scripts = len(self._names)
        keys = owner * scripts + self._script_of[code_points]
        letters = np.bincount(keys, minlength=len(texts) * scripts).reshape(-1, scripts)[:, 1:]
        if scripts > 1:
            for number in letters.argmax(1)[letters.sum(1) >= _MIN_LETTERS].tolist():
                self.documents[self._names[number + 1]] += 1

    def _number(self, script: str) -> int:
        if script in ("HIRAGANA", "KATAKANA"):  # Japanese text has kana and Han characters
            script = "HAN"
        if script not in self._names:
            self._names.append(script)
        return self._names.index(script)
