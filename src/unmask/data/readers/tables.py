"""Room card: the text of each row of a table; here, of a .jsonl file.

Comes in: a file, the name of its field. Goes out: the text of each row, None for a row that was left out; or a
TextError that names the file, the line and the mend; and what all tables say alike. Called by: sources, separated,
arrow, datasets.
"""

from __future__ import annotations

import csv
import difflib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from unmask.core.errors import TextError
from unmask.core.files import default_cache, file_digest, wrap_os_errors
from unmask.data.readers.bytes import LONGEST_LINE, line_number, not_utf_8, packing, read_lines, unpacked
from unmask.data.settings import ErrorsRule

SKIP: Final = "or leave such rows out: --errors skip"
_NAMES_SHOWN: Final = 20

Rows = Iterator[str | None]
Where = Callable[[], str]


def json_rows(path: Path, field: str, errors: ErrorsRule, first: int = 0, last: int | None = None) -> Rows:
    """The field of each line of a .jsonl file's bytes [first, last), which are whole lines.

    Raises:
        TextError: a line is not JSON or lacks the field; by "skip", only what can't be read at all.
    """
    decode = json.JSONDecoder().decode
    for number, line in enumerate(read_lines(path, first, last)):
        try:
            value = decode(line.decode())
            text = value[field]
            if type(text) is str and b"\\u" not in line:  # what follows is for the rest: it costs a third of the time
                yield text
                continue
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.isspace():
                continue
        where = partial(_line_of, path, first, number)
        yield or_none(partial(_json_text, line, field, errors, path, where), errors)


def _line_of(path: Path, first: int, number: int) -> str:
    return f"{path}, line {line_number(path, first) + number:,}"


def or_none(read: Callable[[], str], errors: ErrorsRule) -> str | None:
    """What is read; by "skip", None in the place of a TextError."""
    if errors != "skip":
        return read()
    try:
        return read()
    except TextError:
        return None


def _json_text(line: bytes, field: str, errors: ErrorsRule, path: Path, where: Where) -> str:
    try:
        value = json.loads(line.decode("utf-8", "replace" if errors == "replace" else "strict"))
    except UnicodeDecodeError as error:
        what = f"not UTF-8: {error.reason} at byte {error.start:,} of this line (0x{line[error.start]:02x})"
        mend = "save it as UTF-8, as with iconv -f CP1252 -t UTF-8; or let such bytes become U+FFFD: --errors replace; "
        raise TextError(what, location=where(), hint=mend + SKIP) from error
    except (ValueError, RecursionError) as error:
        what = f"this line is not JSON: {str(error) or 'it is nested too deep'}"
        raise TextError(what, location=where(), hint="repair it, " + SKIP) from error
    if not isinstance(value, dict):
        what = f"this line holds {_kind(value)}, not an object with fields"
        raise TextError(what, location=where(), hint=f'give each line the form {{"{field}": "..."}}, ' + SKIP)
    found: Any = value
    for name in [field] if field in value else field.split("."):
        if not isinstance(found, dict) or name not in found:
            raise no_field(field, list(value), where(), "field", may_skip=True)
        found = found[name]
    return text_of(found, field, errors, where)


def _kind(value: object) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    named: tuple[tuple[type, str], ...] = ((str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in named if isinstance(value, kind)), f"a {type(value).__name__}")


def text_of(value: object, field: str, errors: ErrorsRule, where: Where) -> str:
    """What a row holds, where it is text.

    Raises:
        TextError: it is none: null, a number, bytes that are not UTF-8, half of a surrogate pair.
    """
    rule = "replace" if errors == "replace" else "strict"
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8", rule)
        if isinstance(value, str):
            if rule == "strict":
                value.encode()
                return value
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    except UnicodeError as error:
        raise TextError(
            f"`{field}` holds what is no character: {error}",
            location=where(),
            hint="repair it, let it become U+FFFD (--errors replace), " + SKIP,
        ) from error
    raise TextError(f"`{field}` holds {_kind(value)}, no text", location=where(), hint="repair it, " + SKIP)


def no_field(field: str, names: Sequence[str], where: str, what: str, *, may_skip: bool = False) -> TextError:
    """The refusal of a field or column that isn't there; those that are, are named."""
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.6)
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN]) or "none"
    further = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    hint = f": did you mean `{near[0]}`?" if near else ""
    return TextError(
        f"there is no {what} `{field}`{hint}",
        location=where,
        hint=f"choose one with --field (those that exist: {shown}{further})" + (f", {SKIP}" if may_skip else ""),
    )


FOLDER: Final = "unpacked"  # of the cache


def seekable(path: Path) -> Path:
    """The file itself where it is not packed; else a file of the cache that is called after its packed content.

    Raises:
        TextError: it is damaged, cut short or can't be read.
        StoreError: the cache can't be written.
    """
    if not packing(path):
        return path
    state = path.stat()
    kept = default_cache() / FOLDER / f"{_digest(path, state.st_mtime_ns, state.st_size)}.parquet"
    if not kept.is_file():
        with wrap_os_errors(kept.parent):
            kept.parent.mkdir(parents=True, exist_ok=True)
            aside = kept.with_name(f".{os.getpid()}-{kept.name}")
            try:
                with aside.open("wb") as file:
                    file.writelines(unpacked(path))
                os.replace(aside, kept)
            finally:
                aside.unlink(missing_ok=True)
    return kept


@functools.lru_cache(maxsize=64)
def _digest(path: Path, changed_ns: int, size: int) -> str:  # pyright: ignore[reportUnusedParameter]
    """Reckoned once for a file that stays as it is: each part asks for it."""
    return file_digest(path)


_BATCH_ROWS: Final = 256  # in memory at a time


def parquet_rows(path: Path, field: str, errors: ErrorsRule, first: int = 0, last: int | None = None) -> Rows:
    """The column of each row of those row groups of a .parquet file that begin in its bytes [first, last).

    Raises:
        TextError: it is no Parquet file, has no such column, or a row holds no text.
    """
    import pyarrow as pa

    groups = parquet_groups(path, field)
    chosen = [number for number, byte in enumerate(groups) if first <= byte and (last is None or byte < last)]
    try:
        with open_parquet(path) as file:
            row = sum(file.metadata.row_group(number).num_rows for number in range(chosen[0] if chosen else 0))
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=chosen, columns=[field], use_threads=False)
            for batch in batches:
                yield from texts_of(batch.column(0), row, str(path), field, errors)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error


def open_parquet(path: Path) -> Any:
    """A ParquetFile that is read through a small buffer, because a row group may be larger than memory.

    Raises:
        TextError: it is no Parquet file, or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(seekable(path), buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> TextError:
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    what = f"this is no Parquet file, or one that is damaged or cut short ({told})"
    return TextError(what, location=str(path), hint="fetch or write it anew")


def parquet_groups(path: Path, field: str) -> list[int]:
    """The byte at which each row group of a .parquet file begins.

    Raises:
        TextError: it is no Parquet file, or its column is missing or can hold no text.
    """
    with open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if field not in schema.names:
            raise no_field(field, schema.names, str(path), "column")
        require_text_type(field, schema.field(field).type, schema, str(path))
        starts: list[int] = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(index) for index in range(group.num_columns)]
            pages = [page for at in columns for page in (at.dictionary_page_offset, at.data_page_offset) if page]
            starts.append(min(pages, default=0))
        return starts


def require_text_type(field: str, type_: Any, schema: Any, where: str) -> None:
    """Refuse a column whose type holds no text; those that do are named."""
    if is_text_type(type_):
        return
    others = [f"`{one.name}`" for one in schema if is_text_type(one.type)]
    raise TextError(
        f"the column `{field}` holds {type_}, no text",
        location=where,
        hint=f"choose one that does with --field: {', '.join(others) or 'there is none'}",
    )


def is_text_type(type_: Any) -> bool:
    """Whether a column of this Arrow type holds text, or bytes that may be text."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(type_):
        type_ = type_.value_type
    tests = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary, kinds.is_large_binary)
    return any(test(type_) for test in tests)


def texts_of(column: Any, row: int, where: str, field: str, errors: ErrorsRule) -> Rows:
    """The texts of an Arrow array whose first row has this number, counted from 0."""
    import pyarrow as pa

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    for number, value in enumerate(values, row):
        if type(value) is str:
            yield value
        else:
            yield or_none(partial(text_of, value, field, errors, partial(_row, where, number)), errors)


def _row(where: str, number: int) -> str:
    return f"{where}, row {number + 1:,}"


_BROKEN: Final = ["a row that is broken"]  # told by its identity
_SHOWN: Final = {",": "a comma", "\t": "a tab"}


class _Lines:
    """The lines of a file as characters; remembers the last one that is not UTF-8, counted from 1."""

    def __init__(self, path: Path, errors: ErrorsRule) -> None:
        self._path, self._errors = path, errors
        self.unreadable = 0

    def __iter__(self) -> Iterator[str]:
        byte = 0
        for number, line in enumerate(read_lines(self._path), 1):
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
                location=f"{path}, line {line:,}",
                hint=f"repair it (a cell with {_SHOWN[delimiter]} or a line end in it stands in quotes), {SKIP}",
            )


@functools.lru_cache(maxsize=64)
def _has_quoted_breaks(path: Path, changed_ns: int) -> bool:  # pyright: ignore[reportUnusedParameter]
    """Whether cells have tabs or line ends in them: then a line with a quote has fewer or more tabs than the first."""
    wanted: int | None = None
    for line in read_lines(path):
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
            raise TextError(what, location=f"{path}, line {line:,}", hint=mend) from error
