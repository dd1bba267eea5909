"""Reads labeled examples: tables (.csv, .tsv, .jsonl, .parquet) and, for tokens, files in two columns.

Errors name the file, the line or row, and the columns that exist.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from unmask.core.errors import TextError
from unmask.core.format import join_names
from unmask.data.readers.bytes import LONGEST_LINE, not_utf_8, packing, read_lines
from unmask.data.readers.tables import open_parquet
from unmask.training.finetuning.settings import FieldsConfig, Task

MAX_EXAMPLES: Final = 2_000_000
MAX_LABELS: Final = 1_000
_LARGEST_NUMBER: Final = 1e30  # float32 has no more than 3e38
_EXACT: Final = 2**53  # below, every whole number is a float
_BATCH_ROWS: Final = 1_024
_NAMES_SHOWN: Final = 20
# Names that are tried in this order if no column is named.
_TEXT: Final = ("text", "sentence", "sentence1", "text1", "text_a", "premise", "document", "review")
_SECOND: Final = ("second", "sentence2", "text2", "text_b", "hypothesis")
_LABEL: Final = ("label", "labels", "class", "score")
_TOKENS: Final = ("tokens", "words")
_TAGS: Final = ("tags", "labels", "ner_tags", "pos_tags")
_TABLES: Final = (".csv", ".tsv", ".jsonl", ".parquet")
_COLUMNS: Final = (2, 4)  # of a file of tokens: token and tag, in CoNLL-2003 with two others between them
_DOCUMENT: Final = "-DOCSTART-"  # begins a document in CoNLL-2003
_OPTIONS: Final = re.compile(r"[,;] (?:or )?(?:skip such|replace such|replace it)[^;,]*")  # which don't exist here


@dataclass(frozen=True)
class Example:
    """A text or a pair with one label, or the tokens of a sentence with a label each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    location: str  # file and line or row


def read_examples(path: Path, task: Task, fields: FieldsConfig) -> list[Example]:
    """Return the labeled examples of a file.

    Raises:
        TextError: the file can't be read, lacks a column, or has a row without text or label, too many rows or none.
    """
    kind = path.with_suffix("").suffix.lower() if packing(path) else path.suffix.lower()
    if task != "tokens" and kind not in _TABLES:
        raise TextError(
            f"a file of labeled texts ends in {', '.join(_TABLES)}",
            location=str(path),
            hint="write it as a table with the columns `label` and `text`",
        )
    try:
        if task == "tokens" and kind not in (".jsonl", ".parquet"):
            found = _columns_of_tokens(path)
        elif kind == ".parquet":
            found = _from_rows(_parquet_rows(path), path, task, fields)
        elif kind == ".jsonl":
            found = _from_rows(_json_rows(path), path, task, fields)
        else:
            delimiter = "," if kind == ".csv" else "\t"
            found = _from_rows(_separated_rows(path, delimiter, fields), path, task, fields)
        examples = list(itertools.islice(found, MAX_EXAMPLES + 1))
    except TextError as error:
        raise error.at(hint=_OPTIONS.sub("", error.hint)) from error
    if not examples:
        raise TextError("the file has no examples", location=str(path), hint="give a file with at least one row")
    if len(examples) > MAX_EXAMPLES:
        raise TextError(
            f"the file has more than {MAX_EXAMPLES:,} examples", location=str(path), hint="give a part of the file"
        )
    return examples


# Rows ---------------------------------------------------------------------------------------------------------------

_Row = tuple[str, Mapping[str, Any]]  # location and cells


def _lines(path: Path) -> Iterator[str]:
    byte = 0
    for line in read_lines(path):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise not_utf_8(path, byte + error.start, line[error.start], error.reason) from error
        byte += len(line)


def _separated_rows(path: Path, delimiter: str, fields: FieldsConfig) -> Iterator[_Row]:
    csv.field_size_limit(LONGEST_LINE)  # the default of 128 KiB is less than a long article
    rule = csv.QUOTE_MINIMAL if fields.quoting == "csv" else csv.QUOTE_NONE
    reader: Any = csv.reader(_lines(path), delimiter=delimiter, quoting=rule, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            location, line = f"{path}, line {line:,}", reader.line_num + 1
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    raise TextError("two columns have the same name", location=location, hint="rename one of them")
            elif cells and len(cells) != len(names):
                raise TextError(
                    f"this row has {len(cells)} columns, expected {len(names)} as in the first line",
                    location=location,
                    hint="correct it" + _quoting_hint(fields),
                )
            elif cells:
                yield location, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        message = f"malformed row: {error}"
        raise TextError(
            message, location=f"{path}, line {line:,}", hint="correct it" + _quoting_hint(fields)
        ) from error


def _quoting_hint(fields: FieldsConfig) -> str:
    return ", or read quotes as ordinary characters: --quoting none" if fields.quoting == "csv" else ""


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), 1):
        if line.isspace():
            continue
        location = f"{path}, line {number:,}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"this line is not JSON: {error}", location=location, hint="correct it") from error
        if not isinstance(value, dict):
            raise TextError("this line is not a JSON object", location=location, hint='write {"label": …, "text": …}')
        yield location, value


def _parquet_rows(path: Path) -> Iterator[_Row]:
    number = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            for cells in batch.to_pylist():
                number += 1
                yield f"{path}, row {number:,}", cells


def _from_rows(rows: Iterator[_Row], path: Path, task: Task, fields: FieldsConfig) -> Iterator[Example]:
    is_tokens = task == "tokens"
    text, second, label = "", "", ""
    for location, cells in rows:
        if not label:
            names = list(cells)
            text = _column(names, fields.text, _TOKENS if is_tokens else _TEXT, "--text-field", path)
            second = _column(names, fields.second, _SECOND, "--second-field", path) if task == "pair" else ""
            label = _column(names, fields.label, _TAGS if is_tokens else _LABEL, "--label-field", path)
        if is_tokens:
            yield _tagged(_list(cells, text, location), _list(cells, label, location), location)
        else:
            columns = (text, second) if second else (text,)
            texts = tuple(_cell(cells, column, location, is_text=True) for column in columns)
            yield Example(texts, (_cell(cells, label, location),), location)


def _column(names: Sequence[str], given: str, usual: Sequence[str], option: str, path: Path) -> str:
    """Return the name of a column: the given one, else the first usual one.

    Raises:
        TextError: it doesn't exist. The hint lists the columns.
    """
    found = next((name for name in ([given] if given else usual) if name in names), None)
    if found is None:
        wanted = f"`{given}`" if given else " or ".join(f"`{name}`" for name in usual[:3])
        raise TextError(
            f"there is no column {wanted}",
            location=str(path),
            hint=f"choose one with {option} (available: {join_names([f'`{name}`' for name in names], _NAMES_SHOWN)})",
        )
    return found


def _cell(cells: Mapping[str, Any], column: str, location: str, *, is_text: bool = False) -> str:
    """Return a text or a label; a label may also be a number or a Boolean.

    Raises:
        TextError: the row has no such cell, it is empty, or it has another type.
    """
    value = cells.get(column)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float):  # pandas writes a missing number as NaN, and integers beside it as floats
        value = None if math.isnan(value) else int(value) if value.is_integer() and abs(value) < _EXACT else value
    if not is_text and isinstance(value, bool | int | float):
        value = str(value).lower()
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        raise TextError(f"`{column}` is empty", location=location, hint="remove the row, or complete it")
    if not isinstance(value, str):
        raise TextError(
            f"`{column}` has the type {type(value).__name__}, expected text", location=location, hint="correct it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"`{column}` contains an invalid character: {error}", location=location, hint="correct it"
        ) from error
    return value if is_text else value.strip()


def _list(cells: Mapping[str, Any], column: str, location: str) -> list[str]:
    value = cells.get(column)
    if not isinstance(value, list) or not value:
        raise TextError(f"`{column}` is not a list with values", location=location, hint="write a list for each row")
    return [_cell({column: one}, column, location) for one in value]


def _tagged(words: Sequence[str], tags: Sequence[str], location: str) -> Example:
    if len(words) != len(tags):
        raise TextError(
            f"the row has {len(words):,} tokens, but {len(tags):,} tags",
            location=location,
            hint="give one tag per token",
        )
    return Example(tuple(words), tuple(tags), location)


def _columns_of_tokens(path: Path) -> Iterator[Example]:
    """Yield the sentences of a file with one token and its tag per line, and blank lines between sentences."""
    words, tags, first = list[str](), list[str](), 1
    for number, line in enumerate(itertools.chain(_lines(path), [""]), 1):
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        if not any(cells) or cells[0] == _DOCUMENT:
            if words:
                yield _tagged(words, tags, f"{path}, line {first:,}")
            words, tags, first = [], [], number + 1
            continue
        if not _COLUMNS[0] <= len(cells) <= _COLUMNS[1] or not cells[0] or not cells[-1]:
            raise TextError(
                f"this line has {len(cells)} columns, expected a token and its tag",
                location=f"{path}, line {number:,}",
                hint="write token, tab, tag on each line, and a blank line after each sentence",
            )
        words.append(cells[0])
        tags.append(cells[-1])


# Labels -------------------------------------------------------------------------------------------------------------


def labels_of(train: Sequence[Example], others: Mapping[str, Sequence[Example]]) -> tuple[str, ...]:
    """Return the labels of the training examples, sorted; whole numbers by value.

    Raises:
        TextError: there is only one label, there are too many, or another file has a label that training lacks.
    """
    found = {label for example in train for label in example.labels}
    if len(found) == 1:
        raise TextError(
            f"all training examples have the same label: {next(iter(found))!r}",
            location=train[0].location,
            hint="give examples of at least two labels, or another column with --label-field",
        )
    if len(found) > MAX_LABELS:
        raise TextError(
            f"the training examples have {len(found):,} labels, more than {MAX_LABELS:,}",
            location=train[0].location,
            hint="name the right column with --label-field, or predict numbers with --task regress",
        )
    for name, examples in others.items():
        for example in examples:
            if unseen := [label for label in example.labels if label not in found]:
                shown = join_names([repr(label) for label in sorted(found)], 10)
                raise TextError(
                    f"the label {unseen[0]!r} of --{name} does not occur in training",
                    location=example.location,
                    hint=f"use one of {shown}, or add examples of it to --train",
                )
    is_numeric = all(re.fullmatch(r"-?\d{1,9}", label) for label in found)
    return tuple(sorted(found, key=lambda label: (int(label), label)) if is_numeric else sorted(found))


def require_span(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Check that the examples that choose the best epoch have a span, if the labels are BIO tags.

    Raises:
        TextError: they have none.
    """
    if is_bio(labels) and not any(label.startswith(("B-", "I-")) for example in examples for label in example.labels):
        raise TextError(
            "no word of --valid has a tag that begins a span, so every F1 is 0, and no epoch is the best",
            location=examples[0].location,
            hint="give examples with spans",
        )


def is_bio(labels: Sequence[str]) -> bool:
    """Return whether all labels are BIO tags, and at least one begins a span."""
    return all(label == "O" or label.startswith(("B-", "I-")) for label in labels) and any(
        label.startswith("B-") for label in labels
    )


def numbers_of(examples: Sequence[Example], *, must_differ: bool) -> list[float]:
    """Return the labels as numbers.

    Args:
        examples: Training, validation or test data.
        must_differ: Whether it is an error if all are equal: nothing can be learned then, or no correlation exists.

    Raises:
        TextError: a label is not a finite number, or all are equal and must differ.
    """
    numbers: list[float] = []
    for example in examples:
        try:
            number = float(example.labels[0])
        except ValueError:
            number = math.nan
        if not abs(number) <= _LARGEST_NUMBER:  # also NaN
            raise TextError(
                f"the label {example.labels[0]!r} is not a number from {-_LARGEST_NUMBER:g} to {_LARGEST_NUMBER:g}",
                location=example.location,
                hint="correct it, name the column with --label-field, or use --task classify",
            )
        numbers.append(number)
    if must_differ and len(set(np.array(numbers, np.float32).tolist())) == 1:
        raise TextError(
            f"all examples of this file have the same label: {numbers[0]:g}",
            location=examples[0].location,
            hint="give examples with several numbers, which differ in float32",
        )
    return numbers


def overlap_notes(train: Sequence[Example], others: Mapping[str, Sequence[Example]]) -> list[str]:
    """Return a note for each file with texts that also occur in training."""
    seen = {example.texts for example in train}
    notes: list[str] = []
    for name, examples in others.items():
        if count := sum(example.texts in seen for example in examples):
            notes.append(f"{count:,} of {len(examples):,} examples of {name} have a text that also occurs in train")
    return notes
