"""Readers of .jsonl, .csv, .tsv and .parquet: the text of each row, or None for a row that is skipped.

Errors name the file, the line or row, and a hint.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from unmask.core.errors import TextError
from unmask.core.format import join_names
from unmask.data.readers.bytes import (
    LONGEST_LINE,
    convert,
    decoded,
    line_number,
    not_utf_8,
    packing,
    read_chunks,
    read_lines,
)
from unmask.data.settings import ErrorsRule, QuotingRule

SKIP: Final = "or skip such rows: --errors skip"
_NAMES_SHOWN: Final = 20

Rows = Iterator[str | None]
Where = Callable[[], str]


def json_rows(path: Path, field: str, errors: ErrorsRule, first: int = 0, last: int | None = None) -> Rows:
    """Yield the field of each line in the bytes [first, last) of a .jsonl file, which are whole lines.

    Raises:
        TextError: a line is not JSON or has no such field; under "skip", only if the file can't be read.
    """
    decode, key = json.JSONDecoder().decode, json.dumps(field, ensure_ascii=False).encode()
    for number, line in enumerate(read_lines(path, first, last, errors)):
        try:
            value = decode(line.decode())
            text = value[field]
            # The fast path; the slow one takes 1.5 times as long.
            if type(text) is str and b"\\u" not in line and line.count(key) == 1:
                yield text
                continue
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.isspace():
                continue
        where = partial(_line_location, path, first, number)
        yield or_none(partial(_json_text, line, field, errors, path, where, first, number), errors)


def json_values(path: Path, field: str, errors: ErrorsRule) -> Rows:
    """Yield the field of each object of a .json file: an array of objects, one object, or an object on each line.

    Raises:
        TextError: the file is not JSON, or a value has no such field.
    """
    if _has_lines(path, errors):
        yield from json_rows(path, field, errors)
        return
    for number, value in enumerate(_values(path, errors), 1):
        where = partial(_value_location, path, number)
        yield or_none(partial(_field_of, value, field, errors, where), errors)


_LONGEST_FIRST_LINE: Final = 1 << 24  # bytes
_SPACE: Final = re.compile(r"[ \t\n\r]*")


def _has_lines(path: Path, errors: ErrorsRule) -> bool:
    """Return whether the first of several lines is an object."""
    head = b""
    for chunk in read_chunks(path, errors="replace" if errors == "strict" else errors):
        head = (head + chunk).removeprefix(codecs.BOM_UTF8).lstrip()
        line, _, rest = head.partition(b"\n")
        if (head and not head.startswith(b"{")) or rest.strip() or len(head) > _LONGEST_FIRST_LINE:
            break
    else:
        return False
    try:
        return isinstance(json.loads(line), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _value_location(path: Path, number: int) -> str:
    return f"{path}, value {number:,}"


class _Buffer:
    """The decoded text of a file that was not parsed yet."""

    def __init__(self, path: Path, errors: ErrorsRule) -> None:
        # Lines of JSON in several lines can't be skipped one by one.
        self._chunks = decoded(path, "replace" if errors == "replace" else "strict", lambda: None)
        self.text, self.at, self.is_whole = "", 0, False

    def grow(self) -> None:
        """Read as much text again as is left, so that a long value is parsed a few times only."""
        texts, wanted = [self.text[self.at :]], max(1, len(self.text) - self.at)
        for chunk in self._chunks:
            texts.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        else:
            self.is_whole = True
        self.text, self.at = "".join(texts), 0

    def next(self) -> str:
        """Return the next character that is no white space; an empty text at the end."""
        while True:
            self.at = match.end() if (match := _SPACE.match(self.text, self.at)) else self.at
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.grow()


def _values(path: Path, errors: ErrorsRule) -> Iterator[Any]:
    """Yield the elements of an array, or each value of a file."""
    buffer, number = _Buffer(path, errors), 0
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    is_array = buffer.next() == "["
    buffer.at += is_array
    hint = "correct the file, or write one object on each line"
    while (character := buffer.next()) and not (is_array and character == "]"):
        if number and is_array:
            if character != ",":
                message = f"invalid JSON: expected a comma after value {number:,}"
                raise TextError(message, location=str(path), hint=hint)
            buffer.at += 1
            buffer.next()
        number += 1
        while True:
            try:
                value, end = decoder.raw_decode(buffer.text, buffer.at)
                break
            except (ValueError, RecursionError) as error:
                if not buffer.is_whole and len(buffer.text) - buffer.at <= LONGEST_LINE:
                    buffer.grow()
                    continue
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                message = f"this value is not JSON: {reason}"
                raise TextError(message, location=_value_location(path, number), hint=hint) from error
        buffer.at = end
        yield value
    if is_array:
        if not character:
            raise TextError("this array does not end: the file is cut short", location=str(path), hint=hint)
        buffer.at += 1
        if buffer.next():
            raise TextError("the file goes on after the array", location=str(path), hint=hint)


class _Repeated(dict[str, Any]):
    """An object with a key that occurs twice."""

    keys_twice: frozenset[str]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; a _Repeated if a key occurs twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    counts = Counter(key for key, _ in pairs)
    repeated = _Repeated(value)
    repeated.keys_twice = frozenset(key for key, number in counts.items() if number > 1)
    return repeated


def _line_location(path: Path, first: int, number: int) -> str:
    return f"{path}, line {line_number(path, first) + number:,}"


def or_none(read: Callable[[], str], errors: ErrorsRule) -> str | None:
    """Return what `read` returns; under "skip", None instead of a TextError."""
    if errors != "skip":
        return read()
    try:
        return read()
    except TextError:
        return None


def _json_text(line: bytes, field: str, errors: ErrorsRule, path: Path, where: Where, first: int, number: int) -> str:
    try:
        text = line.decode("utf-8", "replace" if errors == "replace" else "strict")
        value = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        message = f"not UTF-8: {error.reason} at byte {error.start:,} of this line (0x{line[error.start]:02x})"
        # Under "skip" the error is not shown.
        byte = first + sum(len(before) for before in itertools.islice(read_lines(path, first), number))
        advice = convert(path, byte + error.start) if errors == "strict" else "save the file as UTF-8"
        hint = f"{advice}, or replace such bytes by U+FFFD: --errors replace; {SKIP}"
        raise TextError(message, location=where(), hint=hint) from error
    except (ValueError, RecursionError) as error:
        message = f"this line is not JSON: {str(error) or 'it is nested too deeply'}"
        raise TextError(message, location=where(), hint="correct it, " + SKIP) from error
    return _field_of(value, field, errors, where, "line")


def _field_of(value: Any, field: str, errors: ErrorsRule, where: Where, what: str = "value") -> str:
    """Return the field of a JSON object. In a .json file, a string is a text itself.

    Raises:
        TextError: the value is no object, or has no such field, or has it twice.
    """
    if isinstance(value, str) and what == "value":
        return value
    if not isinstance(value, dict):
        message = f"this {what} is {_kind(value)}, expected an object"
        raise TextError(message, location=where(), hint=f'write each {what} as {{"{field}": "..."}}, ' + SKIP)
    node: Any = value
    for name in [field] if field in value else field.split("."):
        if isinstance(node, _Repeated) and name in node.keys_twice:
            raise TextError(f"the field `{name}` occurs twice", location=where(), hint=f"rename one of them, {SKIP}")
        if what == "value" and isinstance(node, dict) and any(isinstance(one, list) for one in node.values()):
            lists = [f"`{key}`" for key, one in node.items() if isinstance(one, list)]
            if name not in node:
                message = f"there is no field `{field}`; the rows may be in the list {join_names(lists)}"
                hint = f"write one object on each line: jq -c '.{lists[0].strip('`')}[]' FILE > NEW.jsonl"
                raise TextError(message, location=where(), hint=hint)
        if not isinstance(node, dict) or name not in node:
            raise no_field(field, list(value), where(), "field", may_skip=True)
        node = node[name]
    return text_of(node, field, errors, where)


def _kind(value: object) -> str:
    """Return the name of a JSON value for messages."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    named: tuple[tuple[type, str], ...] = ((str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in named if isinstance(value, kind)), f"a {type(value).__name__}")


def text_of(value: object, field: str, errors: ErrorsRule, where: Where) -> str:
    """Return the value of a row as text.

    Raises:
        TextError: the value is not text: null, a number, bytes that are not UTF-8, a lone surrogate.
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
            f"`{field}` contains an invalid character: {error}",
            location=where(),
            hint="correct it, replace it by U+FFFD (--errors replace), " + SKIP,
        ) from error
    raise TextError(f"`{field}` is {_kind(value)}, expected text", location=where(), hint="correct it, " + SKIP)


def no_field(field: str, names: Sequence[str], where: str, what: str, *, may_skip: bool = False) -> TextError:
    """Return the error for a missing field or column, with the names that exist."""
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.6)
    existing = join_names([f"`{name}`" for name in names], _NAMES_SHOWN) or "none"
    suggestion = f": did you mean `{near[0]}`?" if near else ""
    return TextError(
        f"there is no {what} `{field}`{suggestion}",
        location=where,
        hint=f"choose one with --field (available: {existing})" + (f", {SKIP}" if may_skip else ""),
    )


_BATCH_ROWS: Final = 256  # rows in memory at a time


def parquet_rows(path: Path, field: str, errors: ErrorsRule, first: int = 0, last: int | None = None) -> Rows:
    """Yield the column of each row, from the row groups that begin in the bytes [first, last) of a .parquet file.

    Raises:
        TextError: the file is not Parquet, has no such column, or a row has no text.
    """
    groups = parquet_groups(path, field)
    chosen = [number for number, byte in enumerate(groups) if first <= byte and (last is None or byte < last)]
    with open_parquet(path) as file:
        row = sum(file.metadata.row_group(number).num_rows for number in range(chosen[0] if chosen else 0))
        batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=chosen, columns=[field], use_threads=False)
        end = row + sum(file.metadata.row_group(number).num_rows for number in chosen)
        for batch in batches:
            yield from texts_of(batch.column(0), row, str(path), field, errors)
            row += batch.num_rows
        if row != end:
            raise _damaged(path, f"up to row {row:,}, expected {end:,}")


@contextlib.contextmanager
def open_parquet(path: Path) -> Generator[Any]:
    """Yield a ParquetFile with a small buffer, because a row group may be larger than memory.

    Raises:
        TextError: the file is not Parquet, is compressed as a whole, or the block found it damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if packing(path):
        raise TextError(
            f"can't read a Parquet file that is compressed as a whole ({packing(path)})",
            location=str(path),
            hint="decompress it with gunzip or unzstd; Parquet compresses its columns itself",
        )
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> TextError:
    message = f"not a Parquet file, or damaged or truncated ({reason})"
    return TextError(message, location=str(path), hint="download or write the file again")


def parquet_groups(path: Path, field: str) -> list[int]:
    """Return the byte at which each row group of a .parquet file begins, if all rows have equally many bytes.

    The file says where they begin, but with the statistics of each column: pyarrow 26 aborts the process if a damaged
    file has invalid ones.

    Raises:
        TextError: the file is not Parquet, or its column is missing or has no text type.
    """
    with open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if field not in schema.names:
            raise no_field(field, schema.names, str(path), "column")
        require_one(field, schema.names, str(path))
        require_text_type(field, schema.field(field).type, schema, str(path))
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
            raise _damaged(path, "the numbers of rows don't add up")
    size = path.stat().st_size
    return [size * before // max(sum(rows), 1) for before in itertools.accumulate(rows[:-1], initial=0)] if rows else []


def require_one(field: str, names: Sequence[str], where: str) -> None:
    """Check that only one column has this name.

    Raises:
        TextError: several columns have it.
    """
    if (number := list(names).count(field)) > 1:
        raise TextError(f"{number} columns are named `{field}`", location=where, hint="rename all but one of them")


def require_text_type(field: str, type_: Any, schema: Any, where: str) -> None:
    """Check that a column has a text type.

    Raises:
        TextError: it has another type. The hint lists the text columns.
    """
    if is_text_type(type_):
        return
    others = [f"`{one.name}`" for one in schema if is_text_type(one.type)]
    raise TextError(
        f"column `{field}` has type {type_}, expected text",
        location=where,
        hint=f"choose a text column with --field: {', '.join(others) or 'there is none'}",
    )


def is_text_type(type_: Any) -> bool:
    """Return whether an Arrow type is text, or bytes that may be text."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(type_):
        type_ = type_.value_type
    tests = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary, kinds.is_large_binary)
    return any(test(type_) for test in tests)


def texts_of(column: Any, row: int, where: str, field: str, errors: ErrorsRule) -> Rows:
    """Yield the texts of an Arrow array; `row` is the number of its first row, from 0."""
    import pyarrow as pa

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    for number, value in enumerate(values, row):
        if type(value) is str:
            yield value
        else:
            yield or_none(partial(text_of, value, field, errors, partial(_row_location, where, number)), errors)


def _row_location(where: str, number: int) -> str:
    return f"{where}, row {number + 1:,}"


_MALFORMED: Final = ["a malformed row"]  # compared by identity
_DELIMITER_NAMES: Final = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


class _Lines:
    """The decoded lines of a file; keeps the number of the last one that is not UTF-8, from 1."""

    def __init__(self, path: Path, errors: ErrorsRule) -> None:
        self._path = path
        self._errors: ErrorsRule = errors
        self.undecodable = 0

    def __iter__(self) -> Iterator[str]:
        byte = 0
        for number, line in enumerate(read_lines(self._path, errors=self._errors), 1):
            try:
                text = line.decode("utf-8", "replace" if self._errors == "replace" else "strict")
            except UnicodeDecodeError as error:
                if self._errors != "skip" or number == 1:
                    raise not_utf_8(self._path, byte + error.start, line[error.start], error.reason) from error
                self.undecodable = number
                text = line.decode("utf-8", "replace")
            yield text
            byte += len(line)


def separated_rows(path: Path, delimiter: str, field: str, errors: ErrorsRule, quoting: QuotingRule = "csv") -> Rows:
    """Yield the column of each row of a .csv or .tsv file.

    Args:
        path: the file.
        delimiter: "," or a tab.
        field: name of the column, in the first line.
        errors: handling of malformed rows.
        quoting: "csv": quoted cells may contain delimiters, line ends and doubled quotes. "none": quotes are ordinary
            characters and each line is a row.

    Raises:
        TextError: there is no such column, or a row is malformed; under "skip", only if the file can't be read.
    """
    delimiter, skipped = _delimiter(path, delimiter, field, quoting)
    lines = _Lines(path, errors)
    rows = _parse(lines, path, delimiter, errors, quoting)
    if skipped:
        next(rows)
    _, names = next(rows, (0, None))
    if names is None:
        return
    header = f"{path}, line {1 + skipped}, which names the columns"
    if field not in names:
        raise no_field(field, names, header, "column")
    require_one(field, names, header)
    column = names.index(field)
    for line, row in rows:
        if not row:  # a blank line
            continue
        if row is not _MALFORMED and lines.undecodable < line and len(row) == len(names):
            yield row[column]
        elif errors == "skip":
            yield None
        else:
            cells = (
                f"quote cells with {_DELIMITER_NAMES.get(delimiter, delimiter)} or line ends"
                if quoting == "csv"
                else "correct it"
            )
            raise TextError(
                f"this row has {len(row)} columns, expected {len(names)} as in the first line",
                location=f"{path}, line {line:,}",
                hint=f"{cells}, {SKIP}",
            )


def _delimiter(path: Path, delimiter: str, field: str, quoting: QuotingRule) -> tuple[str, bool]:
    """Return what separates the cells, and whether the first line only says so (`sep=;`, as spreadsheets write it).

    If the header has no such column, another delimiter that gives it this column is used.
    """
    first = next(read_lines(path, errors="replace"), b"").decode("utf-8", "replace").rstrip("\r\n")
    named = re.fullmatch(r'"?sep=(.)"?', first, re.IGNORECASE)
    if named:
        return named[1], True
    quotes = csv.QUOTE_MINIMAL if quoting == "csv" else csv.QUOTE_NONE
    for candidate in dict.fromkeys([delimiter, *_DELIMITER_NAMES]):
        with contextlib.suppress(csv.Error):  # a carriage return within the line; the reader of the rows says so
            if field in next(csv.reader([first], delimiter=candidate, quoting=quotes), []):
                return candidate, False
    others = [candidate for candidate in _DELIMITER_NAMES if candidate in first and candidate != delimiter]
    return (others[0] if others and delimiter not in first else delimiter), False


def _parse(
    lines: _Lines, path: Path, delimiter: str, errors: ErrorsRule, quoting: QuotingRule
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line of each row, and its cells; under "skip", _MALFORMED for a malformed row."""
    csv.field_size_limit(LONGEST_LINE)  # applies to the process; the default of 128 KiB is less than a long article
    rule = csv.QUOTE_MINIMAL if quoting == "csv" else csv.QUOTE_NONE
    reader: Any = csv.reader(iter(lines), delimiter=delimiter, quoting=rule, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            yield line, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            never_closed, too_long = "unexpected end" in str(error), "field larger" in str(error)
            if errors == "skip" and line > 1 and not never_closed and not too_long:
                yield line, _MALFORMED
                continue
            message = f"malformed row: {error}"
            if never_closed:
                message = "a quote in this row is never closed, so the rest of the file is one cell"
            if too_long:
                message = f"a cell is longer than {LONGEST_LINE:,} characters; a quote may be unclosed"
            hint = "quote the cell and double the quotes in it, or read quotes literally: --set data.quoting=none"
            hint = hint if never_closed or too_long else f"{hint}; {SKIP}"
            raise TextError(message, location=f"{path}, line {line:,}", hint=hint) from error
