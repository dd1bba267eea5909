"""Room card: the text of each row of a .csv or .tsv file.

Comes in: a file whose first row names the columns, the name of one. Goes out: the text of each row, None for a row that
was left out; or a TextError that names the file, the line and the mend. Called by: sources.

In a .csv file, quotes enclose a cell that has commas, line ends or quotes in it. A .tsv file is read so only where some
cell needs it; else each line is a row of its own, quotes around a whole cell are taken off, and any other quote is a
letter: so most programs write .tsv.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from unmask.errors import TextError
from unmask.text.rows import SKIP, Rows, no_field
from unmask.text.settings import ErrorsRule
from unmask.text.streams import LONGEST_LINE, lines, not_utf_8

_BROKEN: Final = ["a row that is broken"]  # told by its identity
_SHOWN: Final = {",": "a comma", "\t": "a tab"}


class _Lines:
    """The lines of a file as characters; remembers the last one that is not UTF-8, counted from 1."""

    def __init__(self, path: Path, errors: ErrorsRule) -> None:
        self._path, self._errors = path, errors
        self.unreadable = 0

    def __iter__(self) -> Iterator[str]:
        byte = 0
        for number, line in enumerate(lines(self._path), 1):
            try:
                text = line.decode("utf-8", "replace" if self._errors == "replace" else "strict")
            except UnicodeDecodeError as error:
                if self._errors != "skip" or number == 1:
                    raise not_utf_8(self._path, byte + error.start, line[error.start], error.reason) from error
                self.unreadable = number
                text = line.decode("utf-8", "replace")
            yield text
            byte += len(line)


def separated_rows(path: Path, delimiter: str, field: str, errors: ErrorsRule) -> Rows:
    """The column of each row.

    Raises:
        TextError: there is no such column, or a row is broken; by "skip", only what can't be read at all.
    """
    told = _Lines(path, errors)
    rows = _quoted_rows(told, path, delimiter, errors)
    if delimiter == "\t" and not _has_quoted_breaks(path, path.stat().st_mtime_ns):
        rows = _plain_rows(told)
    _, names = next(rows, (0, None))
    if names is None:
        return
    if field not in names:
        raise no_field(field, names, f"{path}, line 1, which names the columns", "column")
    column = names.index(field)
    for line, row in rows:
        if not row:  # a blank line
            continue
        if row is not _BROKEN and told.unreadable < line and len(row) == len(names):
            yield row[column]
        elif errors == "skip":
            yield None
        else:
            raise TextError(
                f"this row has {len(row)} columns where the first line names {len(names)}",
                where=f"{path}, line {line:,}",
                next=f"repair it (a cell with {_SHOWN[delimiter]} or a line end in it stands in quotes), {SKIP}",
            )


@functools.lru_cache(maxsize=64)
def _has_quoted_breaks(path: Path, changed_ns: int) -> bool:  # pyright: ignore[reportUnusedParameter]
    """Whether cells have tabs or line ends in them: then a line with a quote has fewer or more tabs than the first."""
    wanted: int | None = None
    for line in lines(path):
        tabs = line.count(b"\t")
        wanted = tabs if wanted is None else wanted
        if tabs != wanted and b'"' in line:
            return True
    return False


def _plain_rows(told: _Lines) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line."""
    for number, line in enumerate(told, 1):
        bare = line.rstrip("\r\n")
        cells = bare.split("\t") if bare else []
        yield number, [_unquoted(cell) for cell in cells] if '"' in bare else cells


def _unquoted(cell: str) -> str:
    """The cell without the quotes around it, where all quotes within are written twice."""
    inner = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def _quoted_rows(told: _Lines, path: Path, delimiter: str, errors: ErrorsRule) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row, and the number of its first line; by "skip", _BROKEN for a row that is."""
    csv.field_size_limit(LONGEST_LINE)  # of the whole process; its default is 128 KiB, less than an article
    reader: Any = csv.reader(iter(told), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            never_closed, too_long = "unexpected end" in str(error), "field larger" in str(error)
            if errors == "skip" and line > 1 and not never_closed and not too_long:
                yield line, _BROKEN
                continue
            what = f"this row is broken: {error}"
            if never_closed:
                what = "a quote that is opened in this row is never closed, so that the rest of the file is one cell"
            if too_long:
                what = f"a cell longer than {LONGEST_LINE:,} characters: perhaps a quote that is never closed"
            mend = "repair it: a quote inside a cell is written twice, and the cell stands in quotes"
            mend = mend if never_closed or too_long else f"{mend}; {SKIP}"
            raise TextError(what, where=f"{path}, line {line:,}", next=mend) from error
