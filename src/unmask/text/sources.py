"""Room card: where documents come from.

Comes in: names of text files, folders, patterns and data sets, or texts in memory, and the rules of reading them. Goes
out: documents as passages of at most about a million characters, NFC unless another form was asked for, in a fixed
order, read with bounded memory; or a TextError that names the file, the line and the mend. Called by: opening, corpus,
origin.

A document's passages, joined, are its text. The characters of all passages of a plain file add up to the file's (see
passages). A row of a table is one document, whatever the rule of plain text says; a row of nothing but white space is
none, like a blank line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from unmask.contracts import Group, Part, Passage
from unmask.errors import TextError
from unmask.store import digest, file_digest
from unmask.text.arrow import parquet_groups, parquet_rows
from unmask.text.borders import PART_BYTES, part_starts
from unmask.text.datasets import column_digest, column_of, dataset_rows
from unmask.text.listing import Named, kind_of, listed
from unmask.text.passages import PASSAGE_CHARACTERS, assembled, broken, composed, normal
from unmask.text.rows import Rows, json_rows
from unmask.text.separated import separated_rows
from unmask.text.settings import DocumentRule, ErrorsRule, UnicodeForm
from unmask.text.streams import decoded, packing
from unmask.text.unpacking import seekable

__all__ = ["PASSAGE_CHARACTERS", "FileSource", "MemorySource"]

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
        self._left_out: dict[Part, int] = {}

    @property
    def said(self) -> str:
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
    def _named(self) -> list[Named]:
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
            raise TextError(what, where=entry, next="check that you may read it") from error

    @property
    def groups(self) -> Sequence[Group]:
        """The names that were given, each with its weight and the number of its parts."""
        return [
            Group(named.name, named.weight, sum(len(self._parts_of[entry]) for entry in named.entries))
            for named in self._named
        ]

    @property
    def left_out(self) -> Mapping[Part, int]:
        """Lines and rows that were left out, of each part that was read to its end."""
        return self._left_out

    def parts(self) -> Sequence[Part]:
        """Of each file, in the order given, one part or several of about PART_BYTES.

        Raises:
            TextError: a file can't be read.
        """
        return [part for entry in self._entries for part in self._parts_of[entry]]

    @cached_property
    def _parts_of(self) -> dict[str, list[Part]]:
        return {entry: self._cut(entry) for entry in self._entries}

    def _cut(self, entry: str) -> list[Part]:
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
        return [Part(entry, first, last) for first, last in zip(starts, [*starts[1:], size], strict=True)]

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

    def documents(self, part: Part) -> Iterator[Passage]:
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

    def _is_whole(self, part: Part) -> bool:
        is_dataset = kind_of(part.path) == "dataset"
        return is_dataset or part.last_byte >= _file_of(part.path).stat().st_size

    def _plain(self, part: Part) -> Iterator[Passage]:
        def leave_out() -> None:
            self._left_out[part] += 1

        pieces = decoded(Path(part.path), self._errors, leave_out, part.first_byte, part.last_byte)
        return assembled(composed(pieces, self._unicode), self._document, self._unicode)

    def _of_rows(self, part: Part) -> Iterator[Passage]:
        number = 0
        for row in self._rows(part):
            if row is None:
                self._left_out[part] += 1
            elif row and not row.isspace():
                text = normal(row, self._unicode)
                if len(text) <= PASSAGE_CHARACTERS:
                    yield Passage(number, 0, text, len(text), last=True)
                else:
                    yield from broken(number, text, self._unicode)
                number += 1

    def _rows(self, part: Part) -> Rows:
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

    said = "a document is one of the texts given"

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

    def parts(self) -> Sequence[Part]:
        """One part that holds all texts."""
        return [Part("memory", 0, len(self._texts))]

    def check(self) -> None:
        """Look at every text.

        Raises:
            TextError: there is nothing but white space, or a text that can't be written as UTF-8.
        """
        if all(not text or text.isspace() for text in self._texts):
            raise TextError("there is no text: nothing but white space", where="the texts given", next="give some text")
        for number, text in enumerate(self._texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TextError(
                    f"half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no character",
                    where=f"text {number}, character {error.start}",
                    next='repair the text, as with text.encode("utf-8", "replace").decode()',
                ) from error

    def documents(self, part: Part) -> Iterator[Passage]:
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
        return TextError(what, where=entry, next="see what is wrong with them: --errors strict")
    if kind_of(entry) == "text":
        what = "this file is empty: it has no characters but white space"
    else:
        what = "this table is empty: it has no row with text"
    return TextError(what, where=entry, next="leave it out, or fill it")
