"""Room card: what a person named as text, as files and data sets.

Comes in: names: a file, a folder, a pattern, `dataset:NAME`, each perhaps with a weight (`TEXT:0.7`). Goes out: the
files and data sets that are meant, in a fixed order, with the weight of each name; or a TextError. Called by: sources,
opening, origin.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

from unmask.core.errors import RecipeError, TextError
from unmask.core.files import default_cache, digest, file_digest, wrap_os_errors
from unmask.core.plugins import PluginSourceConfig, make
from unmask.core.types import DocumentChunk, InputGroup, Source, SourceContext, SourceShard
from unmask.data.readers.bytes import decoded, packing
from unmask.data.readers.documents import (
    PART_BYTES,
    PASSAGE_CHARACTERS,
    assembled,
    broken,
    composed,
    normal,
    part_starts,
)
from unmask.data.readers.hf_datasets import PREFIX, column_digest, column_of, dataset_rows, is_saved, parse
from unmask.data.readers.tables import Rows, json_rows, parquet_groups, parquet_rows, seekable, separated_rows
from unmask.data.settings import DataConfig, DocumentRule, ErrorsRule, UnicodeForm

Kind = Literal["text", "jsonl", "csv", "tsv", "parquet", "dataset"]

STANDARD_INPUT: Final = "-"
SPOOL: Final = "standard-input"  # the folder of the cache that keeps what came by standard input
_KINDS: Final[dict[str, Kind]] = {
    ".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"
}  # fmt: skip
_WEIGHT: Final = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_PATTERN: Final = re.compile(r"[*?\[]")


class TextInput(NamedTuple):
    """One of the names: what is meant by it."""

    name: str
    weight: float  # 0.0: none was given
    entries: tuple[str, ...]  # paths of files, and dataset:NAME


def listed(texts: Sequence[str]) -> list[TextInput]:
    """What all names mean; weights are made to add up to 1.

    Raises:
        TextError: something isn't there, or the weights make no sense.
    """
    if not texts:
        raise TextError("no text was given", hint="name a text file, or a folder with *.txt files")
    parted = [weighted(text) for text in texts]
    weights = [weight for _, weight in parted if weight is not None]
    for (name, weight), text in zip(parted, texts, strict=True):
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise TextError(f"a weight of {weight:g}", location=text, hint="choose a weight above 0, as in TEXT:0.7")
        if weight is None and weights:
            mend = f"give each text one ({name}:1), or none"
            raise TextError("a text without a weight, where others have one", location=text, hint=mend)
    total = sum(weights)
    return [TextInput(_called(name), (weight or 0.0) / (total or 1.0), _entries(name)) for name, weight in parted]


def weighted(text: str) -> tuple[str, float | None]:
    """A name and its weight, if it has one; what exists under the whole name has none."""
    found = None if os.path.lexists(text) else _WEIGHT.fullmatch(text)
    if not found or found[1] == PREFIX[:-1] or (os.name == "nt" and len(found[1]) == 1):  # dataset:7; C:7
        return text, None
    return found[1], float(found[2])


def absolute(text: str) -> str:
    """The same name, valid in any working folder."""
    name, weight = weighted(text)
    suffix = "" if weight is None else text[len(name) :]
    if name.startswith(PREFIX):
        folder, _, split = name.removeprefix(PREFIX).partition("@")
        if not os.path.isdir(folder):
            return text
        return PREFIX + os.path.abspath(folder) + (f"@{split}" if split else "") + suffix
    return text if name == STANDARD_INPUT else os.path.abspath(name) + suffix


def is_name(text: str) -> bool:
    """Whether this can only be meant as a name: standard input, a data set, a known ending."""
    name, _ = weighted(text)
    ending = Path(name.removesuffix(packing(Path(name)))).suffix.lower()
    return name == STANDARD_INPUT or name.startswith(PREFIX) or ending in _KINDS or bool(packing(Path(name)))


def kind_of(entry: str) -> Kind:
    """What a file is, by its name; one of an unknown ending is plain text."""
    if entry.startswith(PREFIX):
        return "dataset"
    path = Path(entry)
    return _KINDS.get(Path(path.stem if packing(path) else path.name).suffix.lower(), "text")


def _called(name: str) -> str:
    return "standard input" if _is_spooled(name) else name


def _is_spooled(name: str) -> bool:
    return Path(name).parent.name == SPOOL


def _entries(name: str) -> tuple[str, ...]:
    """The file itself, the text files below a folder, what a pattern matches, or a data set."""
    if name.startswith(PREFIX):
        parse(name)
        return (name,)
    if os.path.isfile(name):  # Path.is_file raises where a name is too long to be one
        return (name,)
    if not os.path.exists(name):
        return _absent(name)
    folder = Path(name)
    if not folder.is_dir():
        raise TextError("neither a file nor a folder", location=name, hint="give a text file")
    if is_saved(folder):
        return (PREFIX + name,)
    found = [str(file) for file in folder.rglob("*") if file.is_file() and is_name(file.name)]
    if not found:
        mend = f"name its files, or give them names that end in {', '.join(_KINDS)} (or these with .gz or .zst)"
        raise TextError("this folder holds no text", location=name, hint=mend)
    return tuple(sorted(found, key=lambda file: Path(file).as_posix()))


def _absent(name: str) -> tuple[str, ...]:
    if _PATTERN.search(name):
        found = [file for file in glob.glob(name, recursive=True) if os.path.isfile(file)]
        if found:
            return tuple(sorted(found, key=lambda file: Path(file).as_posix()))
        raise TextError(
            "no file matches this pattern", location=name, hint="check it; ** stands for folders of any depth"
        )
    if _is_spooled(name):
        what = "what came by standard input is no longer in the cache"
        raise TextError(what, location=name, hint="bring this file back, or start anew from the text")
    raise TextError("there is no such file or folder", location=name, hint="check the path")


_SAID = {
    "blank-line": "what stands between blank lines",
    "line": "a line that is not blank",
    "file": "a whole file",
}


class FileSource:
    """UTF-8 text in files and data sets, plain, packed or in tables; of a folder, all that has a known ending, sorted.

    `Passage.document` counts the documents of one part; a consumer that reads several parts adds them up. A part is a
    range of a file's bytes that begins and ends with a document; of a data set, a range of its rows. Line ends of both
    kinds become a line feed; a byte order mark of UTF-8 is left out.

    Args:
        paths: files, folders, patterns (`notes/*.txt`), `dataset:NAME#CONFIG@SPLIT`; all of them with a weight
            (`notes.txt:0.7`), or none.
        document: what a document of plain text is.
        errors: what becomes of bytes that are not UTF-8 and of broken rows.
        field: of a .jsonl line, which may be dotted; the column of other tables.
        unicode: the form that the text is brought to.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        document: DocumentRule,
        errors: ErrorsRule,
        field: str = "text",
        unicode: UnicodeForm = "NFC",
    ) -> None:
        # What an equal source is made from. With slashes, so that Windows leaves the id of a data set as it is.
        self.paths = tuple(path.as_posix() if isinstance(path, Path) else path for path in paths)
        self._document: DocumentRule = document
        self._errors: ErrorsRule = errors
        self._field = field
        self._unicode: UnicodeForm = unicode
        self._left_out: dict[SourceShard, int] = {}

    @property
    def notes(self) -> str:
        """What a document is, in words, and what else a person should know of how the text is read."""
        kinds = {kind_of(entry) for entry in self._entries}
        row = f"a row's `{self._field}`"
        plain = _SAID[self._document]
        told = [f"a document is {plain if kinds == {'text'} else row}"]
        if len(kinds) > 1 and "text" in kinds:
            told = [f"a document is {plain}; of a table, {row}"]
        if any(named.weight for named in self._named):
            told.append("weights: " + ", ".join(f"{named.name} {named.weight:.3g}" for named in self._named))
        told += [f"standard input is kept as {entry}" for entry in self._spooled]
        for entry in self._entries:
            if kind_of(entry) == "parquet" and packing(Path(entry)):
                told.append(f"{entry} is unpacked in the cache: {seekable(Path(entry))}")
        return "; ".join(told)

    @property
    def _spooled(self) -> list[str]:
        return [named.entries[0] for named in self._named if named.name == "standard input"]

    @cached_property
    def _named(self) -> list[TextInput]:
        return listed(self.paths)

    @property
    def _entries(self) -> list[str]:
        return [entry for named in self._named for entry in named.entries]

    @property
    def fingerprint(self) -> str:
        """A digest of the content and of the rules; where the files lie and what they are called is left out.

        Weights, where there are any, belong to it: who keeps the parts of a corpus apart must not meet old ones.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        rules = [self._document, self._errors, self._field, self._unicode]
        if any(named.weight for named in self._named):
            rules += [f"{named.weight:.6g} {len(named.entries)}" for named in self._named]
        return digest("texts", *rules, *(self._told(entry) for entry in self._entries))

    def _told(self, entry: str) -> str:
        kind = kind_of(entry)
        if kind == "dataset":
            return f"{kind}:{column_digest(entry, self._field)}"
        try:
            return f"{kind}{packing(Path(entry))}:{file_digest(Path(entry))}"
        except OSError as error:
            what = f"this file can't be read: {error.strerror or error}"
            raise TextError(what, location=entry, hint="check that you may read it") from error

    @property
    def groups(self) -> Sequence[InputGroup]:
        """The names that were given, each with its weight and the number of its parts."""
        return [
            InputGroup(named.name, named.weight, sum(len(self._parts_of[entry]) for entry in named.entries))
            for named in self._named
        ]

    @property
    def left_out(self) -> Mapping[SourceShard, int]:
        """Lines and rows that were left out, of each part that was read to its end."""
        return self._left_out

    def parts(self) -> Sequence[SourceShard]:
        """Of each file, in the order given, one part or several of about PART_BYTES.

        Raises:
            TextError: a file can't be read.
        """
        return [part for entry in self._entries for part in self._parts_of[entry]]

    @cached_property
    def _parts_of(self) -> dict[str, list[SourceShard]]:
        return {entry: self._cut(entry) for entry in self._entries}

    def _cut(self, entry: str) -> list[SourceShard]:
        kind, path = kind_of(entry), Path(entry)
        if kind == "dataset":
            column = column_of(entry, self._field)
            rows = max(1, round(len(column) * PART_BYTES / max(PART_BYTES, column.data.nbytes)))
            starts, size = list(range(0, len(column), rows)) or [0], len(column)
        else:
            starts, size = [0], _file_of(entry).stat().st_size
            if kind == "parquet":
                for byte in parquet_groups(path, self._field):
                    if byte - starts[-1] >= PART_BYTES:
                        starts.append(byte)
            elif kind in ("text", "jsonl") and not packing(path):
                starts = part_starts(path, self._document, self._errors, is_table=kind == "jsonl")
        return [SourceShard(entry, first, last) for first, last in zip(starts, [*starts[1:], size], strict=True)]

    def check(self) -> None:
        """Open every file and data set and look at its first document.

        Raises:
            TextError: one is missing, unreadable, empty, binary, lacks the field, or can't be read at its beginning.
        """
        for entry in self._entries:
            for part in self._parts_of[entry]:
                if kind_of(entry) == "text":
                    pieces = decoded(Path(entry), self._errors, _nothing, part.first_byte, part.last_byte)
                    seen = any(piece.strip() for piece in pieces)
                else:
                    seen = any(row is not None and row.strip() for row in self._rows(part))
                if seen:
                    break
            else:
                raise _empty(entry, 0)

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """The passages of one part.

        Raises:
            TextError: it can't be read, is empty, binary, not UTF-8 or has broken rows.
        """
        self._left_out[part] = 0
        seen = False
        passages = self._plain(part) if kind_of(part.path) == "text" else self._of_rows(part)
        for passage in passages:
            seen = seen or bool(passage.text.strip())
            yield passage
        if not seen and part.first_byte == 0 and self._is_whole(part):
            raise _empty(part.path, self._left_out[part])

    def _is_whole(self, part: SourceShard) -> bool:
        is_dataset = kind_of(part.path) == "dataset"
        return is_dataset or part.last_byte >= _file_of(part.path).stat().st_size

    def _plain(self, part: SourceShard) -> Iterator[DocumentChunk]:
        def leave_out() -> None:
            self._left_out[part] += 1

        pieces = decoded(Path(part.path), self._errors, leave_out, part.first_byte, part.last_byte)
        return assembled(composed(pieces, self._unicode), self._document, self._unicode)

    def _of_rows(self, part: SourceShard) -> Iterator[DocumentChunk]:
        number = 0
        for row in self._rows(part):
            if row is None:
                self._left_out[part] += 1
            elif row and not row.isspace():
                text = normal(row, self._unicode)
                if len(text) <= PASSAGE_CHARACTERS:
                    yield DocumentChunk(number, 0, text, len(text), last=True)
                else:
                    yield from broken(number, text, self._unicode)
                number += 1

    def _rows(self, part: SourceShard) -> Rows:
        kind, path = kind_of(part.path), Path(part.path)
        if kind == "dataset":
            return dataset_rows(part.path, self._field, self._errors, part.first_byte, part.last_byte)
        if kind == "parquet":
            return parquet_rows(path, self._field, self._errors, part.first_byte, part.last_byte)
        if kind == "jsonl":
            return json_rows(path, self._field, self._errors, part.first_byte, part.last_byte)
        return separated_rows(path, "\t" if kind == "tsv" else ",", self._field, self._errors)


class MemorySource:
    """Texts in memory, each one document."""

    notes = "a document is one of the texts given"

    def __init__(self, texts: Sequence[str], unicode: UnicodeForm = "NFC") -> None:
        self._texts = texts
        self._unicode: UnicodeForm = unicode

    @property
    def fingerprint(self) -> str:
        """A digest of every text."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        self.check()
        return digest("memory", self._unicode, *self._texts)

    def parts(self) -> Sequence[SourceShard]:
        """One part that holds all texts."""
        return [SourceShard("memory", 0, len(self._texts))]

    def check(self) -> None:
        """Look at every text.

        Raises:
            TextError: there is nothing but white space, or a text that can't be written as UTF-8.
        """
        if all(not text or text.isspace() for text in self._texts):
            raise TextError(
                "there is no text: nothing but white space", location="the texts given", hint="give some text"
            )
        for number, text in enumerate(self._texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TextError(
                    f"half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no character",
                    location=f"text {number}, character {error.start}",
                    hint='repair the text, as with text.encode("utf-8", "replace").decode()',
                ) from error

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """The passages of the texts [first_byte, last_byte) of a part, which count texts here."""
        for number in range(part.first_byte, part.last_byte):
            yield from broken(number, normal(self._texts[number], self._unicode), self._unicode)


def _file_of(entry: str) -> Path:
    """The file whose bytes a part counts."""
    return seekable(Path(entry)) if kind_of(entry) == "parquet" else Path(entry)


def _nothing() -> None:
    """Nobody counts what is left out while only the beginning is looked at."""


def _empty(entry: str, left_out: int) -> TextError:
    if left_out:
        what = f"nothing of this file can be read: {left_out:,} lines or rows were left out, and no text is left"
        return TextError(what, location=entry, hint="see what is wrong with them: --errors strict")
    if kind_of(entry) == "text":
        what = "this file is empty: it has no characters but white space"
    else:
        what = "this table is empty: it has no row with text"
    return TextError(what, location=entry, hint="leave it out, or fill it")


_CHUNK_BYTES: Final = 1 << 20
_PACKED: Final = ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst"))


@dataclass(frozen=True)
class SourceRecipe:
    """All that it takes to open a source again, in this process or another."""

    paths: tuple[str, ...]  # FileSource.paths
    settings: DataConfig

    def open(self) -> FileSource:
        """The source."""
        return open_source(self.paths, self.settings)


def open_source(paths: Sequence[str | Path], settings: DataConfig) -> FileSource:
    """The source of these files, folders, patterns and data sets; of standard input where one of them is "-".

    Standard input is read to its end here, into a file of the cache that is called after its content.

    Raises:
        TextError: standard input is empty, asked for twice, or meant for several processes.
        StoreError: the cache can't be written.
    """
    texts = [path.as_posix() if isinstance(path, Path) else path for path in paths]
    piped = [text for text in texts if weighted(text)[0] == STANDARD_INPUT]
    if len(piped) > 1:
        raise TextError("standard input can be read once only", location=" ".join(piped), hint="name - once")
    if piped:
        kept = str(_keep_standard_input())
        texts = [kept + text.removeprefix(STANDARD_INPUT) if text in piped else text for text in texts]
    return FileSource(texts, settings.rule, settings.errors, settings.field, settings.unicode)


def _keep_standard_input() -> Path:
    """Copy standard input to the cache; the same content is kept once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TextError(
            "several processes can't share standard input", location=STANDARD_INPUT, hint="save the text as a file"
        )
    if sys.stdin is None:
        raise TextError("there is no standard input", location=STANDARD_INPUT, hint="name a text file")
    folder = default_cache() / SPOOL
    with wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{os.getpid()}"
        try:
            with aside.open("wb") as file:
                name = _copied(sys.stdin.buffer, file)
            os.replace(aside, folder / name)
        finally:
            aside.unlink(missing_ok=True)
    return folder / name


def _copied(stream: BinaryIO, aside: BinaryIO) -> str:
    """Copy all of a stream; the name of what it holds."""
    state, first = hashlib.blake2b(digest_size=16), b""
    while chunk := stream.read(_CHUNK_BYTES):
        first = first or chunk[:4]
        state.update(chunk)
        aside.write(chunk)
    if not first:
        raise TextError(
            "standard input is empty", location=STANDARD_INPUT, hint="pipe text into it: cat notes.txt | ..."
        )
    packed = next((ending for magic, ending in _PACKED if first.startswith(magic)), "")
    return f"{state.hexdigest()}.txt{packed}"


_LONGEST_NAME = 255  # bytes that a file's name may have almost everywhere


def open_text(texts: Sequence[str | Path], settings: DataConfig) -> Source:
    """Files, folders, patterns, data sets, "-" for standard input, each perhaps with a weight (`TEXT:0.7`).

    Or the texts themselves, one document each, where one of them can't be meant as the name of something.

    Raises:
        RecipeError: nothing was given.
        TextError: paths among texts; or, now or on reading, text that can't be read.
    """
    if isinstance(settings.source, PluginSourceConfig):
        return open_outside(settings.source, texts)
    if not texts:
        raise RecipeError("no text was given", hint="name text files or folders: unmask pretrain notes.txt")
    if not any(_is_prose(text) for text in texts):
        return open_source(texts, settings)
    for text in texts:
        if isinstance(text, Path) or (len(text) <= _LONGEST_NAME and os.path.isfile(text)):
            raise TextError(
                "a file among texts that are given as they are",
                location=str(text),
                hint="give paths alone, or texts alone",
            )
    return MemorySource([str(text) for text in texts], settings.unicode)


def open_outside(settings: PluginSourceConfig, texts: Sequence[str | Path]) -> Source:
    """A source of a person's own, which is told what was named on the command line."""
    return make(settings, SourceContext(tuple(Path(text).absolute() for text in texts)))


def _is_prose(text: str | Path) -> bool:
    """Whether this names nothing: it is blank, has lines, or has spaces where nothing of that name exists."""
    if isinstance(text, Path):
        return False
    if not text.strip() or "\n" in text or len(text) > 16 * _LONGEST_NAME:
        return True
    # Not Path.exists, which raises where a name is too long to be one.
    return len(text.split()) > 1 and not is_name(text) and not os.path.exists(weighted(text)[0])
