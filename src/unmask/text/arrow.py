"""Room card: the text of each row of a Parquet table or another Arrow column.

Comes in: a .parquet file, the name of its column; or an Arrow array. Goes out: the text of each row, None for a row
that was left out; or a TextError that names the row and the columns that exist. Called by: sources, datasets.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

from unmask.errors import TextError
from unmask.text.rows import Rows, no_field, or_none, text_of
from unmask.text.settings import ErrorsRule
from unmask.text.unpacking import seekable

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
    return TextError(what, where=str(path), next="fetch or write it anew")


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
        where=where,
        next=f"choose one that does with --field: {', '.join(others) or 'there is none'}",
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
