"""Sources of text: files, directories, patterns, datasets, standard input, texts in memory and plugins.

A text is named by a path, a pattern, `dataset:NAME` or "-". Each may have a weight (`TEXT:0.7`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Final

from unmask.core.errors import RecipeError, TextError
from unmask.core.files import DigestCache, default_cache, digest, file_digest, wrap_os_errors
from unmask.core.format import join_names
from unmask.core.plugins import PluginSourceConfig, make
from unmask.core.types import DocumentChunk, InputGroup, Source, SourceContext, SourceShard
from unmask.data.inputs import (
    SPOOL,
    STANDARD_INPUT,
    TextInput,
    absolute,
    is_name,
    kind_of,
    resolve_inputs,
    weighted,
)
from unmask.data.readers.bytes import decoded, packing
from unmask.data.readers.documents import (
    CHUNK_CHARACTERS,
    PART_BYTES,
    normalize_chunks,
    normalize_text,
    part_starts,
    split_document,
    split_documents,
)
from unmask.data.readers.hf_datasets import column_digest, column_of, dataset_files, dataset_rows
from unmask.data.readers.tables import Rows, json_rows, json_values, parquet_groups, parquet_rows, separated_rows
from unmask.data.settings import DataConfig, DocumentRule, ErrorsRule, QuotingRule, UnicodeForm

_DOCUMENT_RULES = {
    "blank-line": "a paragraph (text between blank lines)",
    "line": "a nonblank line",
    "file": "a whole file",
}


class BaseSource(ABC):
    """A source of documents, with defaults for everything that `core.types.Source` does not require."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of the text and of the settings that split it into documents."""

    @abstractmethod
    def parts(self) -> Sequence[SourceShard]:
        """Return the parts, in a fixed order."""

    @abstractmethod
    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """Yield the chunks of the documents of one part, in order."""

    @property
    def notes(self) -> str:
        """Description of a document, for display."""
        return "documents are as the source yields them"

    @property
    def warnings(self) -> Sequence[str]:
        """Files that were left out, in words."""
        return ()

    @property
    def paths(self) -> Sequence[str]:
        """Names that open the source again in any working directory; none for texts in memory."""
        return ()

    @property
    def groups(self) -> Sequence[InputGroup]:
        """The inputs, each with an optional weight; they cover the parts in order."""
        return [InputGroup(self.location, 0.0, len(self.parts()))]

    @property
    def left_out(self) -> Mapping[SourceShard, int]:
        """Number of skipped lines and rows of each part that was read to its end."""
        return {}

    @property
    def location(self) -> str:
        """The first files of the source and the number of the others, for an error message."""
        return join_names(list(dict.fromkeys(part.path for part in self.parts())))

    def check(self) -> None:  # noqa: B027 (optional)
        """Check that the beginning of the source can be read.

        Raises:
            TextError: it can't be read.
        """

    def verify(self) -> None:  # noqa: B027 (optional)
        """Recompute `fingerprint` from all bytes of the text, without cached digests."""


class PluginSource(BaseSource):
    """Wraps the source of a plugin; its `groups` and `left_out` are used if it has them."""

    def __init__(self, source: Source, paths: Sequence[str]) -> None:
        self._source, self._paths = source, tuple(paths)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the plugin."""
        return self._source.fingerprint

    def parts(self) -> Sequence[SourceShard]:
        """Return the parts of the plugin."""
        return self._source.parts()

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """Return the documents of the plugin."""
        return self._source.documents(part)

    @property
    def paths(self) -> Sequence[str]:
        """The paths that the plugin was created with."""
        return self._paths

    @property
    def groups(self) -> Sequence[InputGroup]:
        """The groups of the plugin, or one group of all parts."""
        return getattr(self._source, "groups", ()) or super().groups

    @property
    def left_out(self) -> Mapping[SourceShard, int]:
        """Skipped lines and rows, if the plugin counts them."""
        return getattr(self._source, "left_out", {})


class FileSource(BaseSource):
    """UTF-8 text in files and datasets, plain or compressed, as text or tables.

    A directory stands for its files with a known extension, sorted; hidden files are left out. Links are followed, and
    each file is read once. `DocumentChunk.document` counts the documents of
    one part only. A part is a range of a file's bytes that begins and ends with a document, or a
    range of rows of a dataset. Line ends become line feeds, and a UTF-8 byte order mark is removed.

    Args:
        paths: files, directories, patterns (`notes/*.txt`), `dataset:NAME#CONFIG@SPLIT`; all with a weight
            (`notes.txt:0.7`), or none.
        document: unit of plain text that is one document.
        errors: handling of bytes that are not UTF-8 and of malformed rows.
        field: field of a .jsonl or .json object, may be dotted; column of other tables.
        unicode: Unicode normalization form.
        quoting: "csv": quotes enclose cells of .csv and .tsv; "none": quotes are ordinary characters.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        document: DocumentRule,
        errors: ErrorsRule,
        field: str = "text",
        unicode: UnicodeForm = "NFC",
        quoting: QuotingRule = "csv",
    ) -> None:
        # Names from which an equal source can be opened. Slashes keep the id of a dataset valid on Windows.
        self.names = tuple(path.as_posix() if isinstance(path, Path) else path for path in paths)
        self._document: DocumentRule = document
        self._errors: ErrorsRule = errors
        self._field = field
        self._unicode: UnicodeForm = unicode
        self._quoting: QuotingRule = quoting
        self._left_out: dict[SourceShard, int] = {}
        self._digests: dict[str, str] | None = None  # digest of each entry
        self._fresh_digests: dict[str, str] = {}  # digests computed by this object

    @property
    def notes(self) -> str:
        """Description of a document, of weights and of the copy of standard input, for display."""
        kinds = {kind_of(entry) for entry in self._entries}
        row = f"a row's `{self._field}`"
        plain = _DOCUMENT_RULES[self._document]
        notes = [f"a document is {plain if kinds == {'text'} else row}"]
        if len(kinds) > 1 and "text" in kinds:
            notes = [f"a document is {plain}; in tables, {row}"]
        if any(named.weight for named in self._named):
            notes.append("weights: " + ", ".join(f"{named.name} {named.weight:.3g}" for named in self._named))
        notes += [f"standard input is stored as {entry}" for entry in self._spooled]
        return "; ".join(notes)

    @property
    def warnings(self) -> Sequence[str]:
        """Files that were left out, in words."""
        return [warning for named in self._named for warning in named.warnings]

    @property
    def _spooled(self) -> list[str]:
        return [named.entries[0] for named in self._named if named.name == "standard input"]

    @cached_property
    def _named(self) -> list[TextInput]:
        return resolve_inputs(self.names)

    @property
    def paths(self) -> Sequence[str]:
        """The names with absolute paths; standard input is named by its copy in the cache."""
        return [absolute(name) for name in self.names]

    @property
    def _entries(self) -> list[str]:
        return [entry for named in self._named for entry in named.entries]

    @property
    def fingerprint(self) -> str:
        """Digest of the content, the settings and the weights; names and directories of files have no effect."""
        rules = [self._document, self._errors, self._field, self._unicode]
        if self._quoting != "csv":
            rules.append(f"quoting {self._quoting}")
        if any(named.weight for named in self._named):
            rules += [f"{named.weight:.6g} {len(named.entries)}" for named in self._named]
        return digest("texts", *rules, *self.digests.values())

    @property
    def digests(self) -> Mapping[str, str]:
        """Kind and digest of each file and dataset, in order."""
        if self._digests is None:
            self._digests = self._read_digests()
        return self._digests

    def verify(self) -> None:
        """Recompute the digests that came from the cache.

        Raises:
            TextError: a file can't be read.
        """
        self._digests = self._read_digests(self._fresh_digests)
        self._fresh_digests = dict(self._digests)

    def _read_digests(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the digest of each entry from `known`, by default from the cache; compute missing ones."""
        entries = self._entries
        cache = DigestCache(
            default_cache() / "digests" / f"{digest(self._field, *(absolute(entry) for entry in entries))}.json"
        )
        digests: dict[str, str] = {}
        for entry in entries:
            try:
                files = dataset_files(entry) if kind_of(entry) == "dataset" else [Path(entry)]
                cached = cache.get(entry, files) if known is None else known.get(entry)
                if cached is None:
                    since_ns = time.time_ns()
                    cached = self._fresh_digests[entry] = self._entry_digest(entry)
                    cache.set(entry, files, cached, since_ns=since_ns)
            except OSError as error:
                message = f"can't read this file: {error.strerror or error}"
                raise TextError(message, location=entry, hint="check that the file exists and is readable") from error
            digests[entry] = cached
        cache.save()
        return digests

    def _entry_digest(self, entry: str) -> str:
        kind = kind_of(entry)
        if kind == "dataset":
            return f"{kind}:{column_digest(entry, self._field)}"
        return f"{kind}{packing(Path(entry))}:{file_digest(Path(entry))}"

    @property
    def groups(self) -> Sequence[InputGroup]:
        """The named texts, each with its weight and the number of its parts."""
        return [
            InputGroup(named.name, named.weight, sum(len(self._parts_of[entry]) for entry in named.entries))
            for named in self._named
        ]

    @property
    def left_out(self) -> Mapping[SourceShard, int]:
        """Skipped lines and rows of each part that was read to its end."""
        return self._left_out

    def parts(self) -> Sequence[SourceShard]:
        """Return the parts of all files in order; a large file has several parts of about PART_BYTES.

        Raises:
            TextError: a file can't be read.
        """
        return [part for entry in self._entries for part in self._parts_of[entry]]

    @cached_property
    def _parts_of(self) -> dict[str, list[SourceShard]]:
        return {entry: self._split(entry) for entry in self._entries}

    def _split(self, entry: str) -> list[SourceShard]:
        """Return the parts of a file or dataset."""
        kind, path = kind_of(entry), Path(entry)
        if kind == "dataset":
            column = column_of(entry, self._field)
            rows = max(1, round(len(column) * PART_BYTES / max(PART_BYTES, column.data.nbytes)))
            starts, size = list(range(0, len(column), rows)) or [0], len(column)
        else:
            starts, size = [0], path.stat().st_size
            if kind == "parquet":
                for byte in parquet_groups(path, self._field):
                    if byte - starts[-1] >= PART_BYTES:
                        starts.append(byte)
            elif kind in ("text", "jsonl") and not packing(path):
                starts = part_starts(path, self._document, self._errors, is_table=kind == "jsonl")
        return [SourceShard(entry, first, last) for first, last in zip(starts, [*starts[1:], size], strict=True)]

    def check(self) -> None:
        """Read every file and dataset up to its first nonblank text.

        Raises:
            TextError: a file is missing, unreadable, empty or binary, or has no such field.
        """
        for entry in self._entries:
            for part in self._parts_of[entry]:
                if kind_of(entry) == "text":
                    texts = decoded(Path(entry), self._errors, _ignore, part.first_byte, part.last_byte)
                    has_text = any(text.strip() for text in texts)
                else:
                    has_text = any(row is not None and row.strip() for row in self._rows(part))
                if has_text:
                    break
            else:
                raise _empty(entry, 0)

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """Yield the chunks of the documents of one part.

        Raises:
            TextError: the part can't be read, is empty, binary or not UTF-8, or has malformed rows.
        """
        self._left_out[part] = 0
        has_text = False
        chunks = self._read_text(part) if kind_of(part.path) == "text" else self._read_table(part)
        for chunk in chunks:
            has_text = has_text or bool(chunk.text.strip())
            yield chunk
        if not has_text and part.first_byte == 0 and self._is_whole(part):
            raise _empty(part.path, self._left_out[part])

    def _is_whole(self, part: SourceShard) -> bool:
        is_dataset = kind_of(part.path) == "dataset"
        return is_dataset or part.last_byte >= Path(part.path).stat().st_size

    def _read_text(self, part: SourceShard) -> Iterator[DocumentChunk]:
        def count_skipped() -> None:
            self._left_out[part] += 1

        texts = decoded(Path(part.path), self._errors, count_skipped, part.first_byte, part.last_byte)
        return split_documents(normalize_chunks(texts, self._unicode), self._document, self._unicode)

    def _read_table(self, part: SourceShard) -> Iterator[DocumentChunk]:
        number = 0
        for row in self._rows(part):
            if row is None:
                self._left_out[part] += 1
            elif row and not row.isspace():
                text = normalize_text(row, self._unicode)
                if len(text) <= CHUNK_CHARACTERS:
                    yield DocumentChunk(number, 0, text, len(text), last=True)
                else:
                    yield from split_document(number, text, self._unicode)
                number += 1

    def _rows(self, part: SourceShard) -> Rows:
        kind, path = kind_of(part.path), Path(part.path)
        if kind == "dataset":
            return dataset_rows(part.path, self._field, self._errors, part.first_byte, part.last_byte)
        if kind == "parquet":
            return parquet_rows(path, self._field, self._errors, part.first_byte, part.last_byte)
        if kind == "jsonl":
            return json_rows(path, self._field, self._errors, part.first_byte, part.last_byte)
        if kind == "json":
            return json_values(path, self._field, self._errors)
        return separated_rows(path, "\t" if kind == "tsv" else ",", self._field, self._errors, self._quoting)


class MemorySource(BaseSource):
    """Texts in memory, each one document."""

    def __init__(self, texts: Sequence[str], unicode: UnicodeForm = "NFC") -> None:
        self.texts = tuple(texts)
        self._unicode: UnicodeForm = unicode

    @property
    def notes(self) -> str:
        """Description of a document, for display."""
        return "each given text is a document"

    @property
    def fingerprint(self) -> str:
        """Digest of all texts."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        self.check()
        return digest("memory", self._unicode, *self.texts)

    def parts(self) -> Sequence[SourceShard]:
        """Return one part with all texts."""
        return [SourceShard("memory", 0, len(self.texts))]

    def check(self) -> None:
        """Check every text.

        Raises:
            TextError: all texts are blank, or a text can't be encoded as UTF-8.
        """
        if all(not text or text.isspace() for text in self.texts):
            raise TextError(
                "the texts are empty or blank",
                location="the given texts",
                hint="pass text with characters other than white space",
            )
        for number, text in enumerate(self.texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TextError(
                    f"invalid character: lone surrogate U+{ord(text[error.start]):04X}",
                    location=f"text {number}, character {error.start}",
                    hint='replace it, for example with text.encode("utf-8", "replace").decode()',
                ) from error

    def documents(self, part: SourceShard) -> Iterator[DocumentChunk]:
        """Yield the chunks of the texts of a part; its byte range is a range of text indices."""
        for number in range(part.first_byte, part.last_byte):
            yield from split_document(number, normalize_text(self.texts[number], self._unicode), self._unicode)


def _ignore() -> None:
    """Ignore a skipped line."""


def _empty(entry: str, left_out: int) -> TextError:
    """Return the error for a file or dataset without text."""
    if left_out:
        message = f"no text is left: {left_out:,} lines or rows were skipped"
        return TextError(message, location=entry, hint="use --errors strict to see why")
    message = "this file is empty or blank" if kind_of(entry) == "text" else "this table is empty: no row has text"
    return TextError(message, location=entry, hint="remove it from the command, or add text")


_CHUNK_BYTES: Final = 1 << 20
_PACKED: Final = ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst"))


@dataclass(frozen=True)
class SourceRecipe:
    """Paths and settings from which another process opens the same source."""

    paths: tuple[str, ...]  # FileSource.names
    settings: DataConfig

    def open(self) -> FileSource:
        """Open the source."""
        return open_source(self.paths, self.settings)


def open_source(paths: Sequence[str | Path], settings: DataConfig) -> FileSource:
    """Open files, directories, patterns, datasets, and standard input ("-").

    Raises:
        TextError: standard input is empty, is named twice, or would be shared by several processes.
        StoreError: the cache can't be written.
    """
    texts = store_standard_input(paths)
    return FileSource(texts, settings.rule, settings.errors, settings.field, settings.unicode, settings.quoting)


def store_standard_input(paths: Sequence[str | Path]) -> list[str]:
    """Return names of texts; standard input is copied to a file of the cache, named by a digest of its content.

    Raises:
        TextError: standard input is empty, is named twice, or would be shared by several processes.
        StoreError: the cache can't be written.
    """
    texts = [path.as_posix() if isinstance(path, Path) else path for path in paths]
    piped = [text for text in texts if weighted(text)[0] == STANDARD_INPUT]
    if len(piped) > 1:
        raise TextError("standard input can only be read once", location=" ".join(piped), hint="name - once")
    if piped:
        stored = str(_store_standard_input())
        texts = [stored + text.removeprefix(STANDARD_INPUT) if text in piped else text for text in texts]
    return texts


def _store_standard_input() -> Path:
    """Copy standard input to the cache; equal content is stored once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TextError(
            "several processes can't share standard input", location=STANDARD_INPUT, hint="write the text to a file"
        )
    if sys.stdin is None:
        raise TextError("there is no standard input", location=STANDARD_INPUT, hint="name a text file")
    folder = default_cache() / SPOOL
    with wrap_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                name = _copy(sys.stdin.buffer, file)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return folder / name


def _copy(stream: BinaryIO, target: BinaryIO) -> str:
    """Copy a stream and return a file name for its content."""
    state, first = hashlib.blake2b(digest_size=16), b""
    while chunk := stream.read(_CHUNK_BYTES):
        first = first or chunk[:4]
        state.update(chunk)
        target.write(chunk)
    if not first:
        raise TextError(
            "standard input is empty", location=STANDARD_INPUT, hint="pipe text into the command: cat notes.txt | ..."
        )
    packed = next((ending for magic, ending in _PACKED if first.startswith(magic)), "")
    return f"{state.hexdigest()}.txt{packed}"


_LONGEST_NAME = 255  # bytes of a file name on most file systems


def open_text(texts: Sequence[str | Path], settings: DataConfig) -> BaseSource:
    """Open the source of a plugin, of named texts, or of texts in memory.

    If one of the texts can't be a name, all are texts in memory, one document each.

    Raises:
        RecipeError: there are no texts.
        TextError: names and texts are mixed, or a text can't be read.
    """
    if isinstance(settings.source, PluginSourceConfig):
        return open_plugin(settings.source, texts)
    if not texts:
        raise RecipeError("no text was given", hint="name text files or directories: unmask pretrain notes.txt")
    if not any(_is_prose(text) for text in texts):
        return open_source(texts, settings)
    for text in texts:
        if isinstance(text, Path) or (len(text) <= _LONGEST_NAME and os.path.isfile(text)):
            raise TextError(
                "file names and texts are mixed",
                location=str(text),
                hint="pass only file names, or only texts",
            )
    return MemorySource([str(text) for text in texts], settings.unicode)


def open_plugin(settings: PluginSourceConfig, texts: Sequence[str | Path]) -> PluginSource:
    """Open the source of a plugin with the paths of the command line."""
    paths = tuple(Path(text).absolute() for text in texts)
    return PluginSource(make(settings, SourceContext(paths)), [str(path) for path in paths])


def open_valid(settings: DataConfig) -> dict[str, FileSource]:
    """Open and check the named validation texts.

    Raises:
        TextError: a text is missing, or its beginning can't be read.
    """
    opened: dict[str, FileSource] = {}
    for name, path in settings.valid.items():
        source = opened[name] = open_source([path], settings)
        try:
            source.check()
        except TextError as error:
            raise error.at(location=f"data.valid.{name}: {error.location or path}") from None
    return opened


def require_field_used(field: str, sources: Iterable[BaseSource], *, given: bool) -> None:
    """Check that a field that was given, or is not the default, is the field of a table.

    Raises:
        TextError: all texts are plain text.
    """
    opened = list(sources)
    if not (given or field != DataConfig().field) or not all(isinstance(source, FileSource) for source in opened):
        return
    parts = [part.path for source in opened for part in source.parts()]
    if all(kind_of(path) == "text" for path in parts):
        raise TextError(
            f"field `{field}` is not used: plain text has no fields",
            location=join_names(parts),
            hint="remove --field (data.field), or rename a table to its extension, such as .jsonl or .csv",
        )


def _is_prose(text: str | Path) -> bool:
    """Return whether a text can't be a name: it is blank, has lines, or has spaces and no such file exists."""
    if isinstance(text, Path):
        return False
    if not text.strip() or "\n" in text or len(text) > 16 * _LONGEST_NAME:
        return True
    # os.path.exists: Path.exists raises an error if a name is too long.
    return len(text.split()) > 1 and not is_name(text) and not os.path.exists(weighted(text)[0])
