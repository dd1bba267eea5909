"""Room card: where a large file may be cut, so that its parts give the same documents as the whole.

Comes in: a plain text or .jsonl file that is not packed, the rule of its documents. Goes out: the bytes at which its
parts begin. Called by: sources.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO, Final

from unmask.errors import TextError
from unmask.text.settings import DocumentRule, ErrorsRule

PART_BYTES: Final = 4_000_000  # seconds of tokenizing; small beside a file that is worth several workers
_LINE_BYTES: Final = 1 << 20  # no document is cut off before a longer line, which would have to be read to be judged


def part_starts(path: Path, document: DocumentRule, errors: ErrorsRule, *, is_table: bool) -> list[int]:
    """The bytes at which parts of about PART_BYTES begin, the first of them 0.

    Behind every multiple of PART_BYTES it looks for the first place where a document begins, and no further than the
    next multiple.

    Raises:
        TextError: the file can't be read.
    """
    starts = [0]
    try:
        size = path.stat().st_size
        if size < 2 * PART_BYTES or (document == "file" and not is_table):
            return starts
        with path.open("rb") as file:
            # What stands before the first document belongs to it: no part may hold blank lines alone.
            first = 0 if is_table else _next_document(file, 0, size, "line", errors)
            if first is None:
                return starts
            for at in range(PART_BYTES, size - PART_BYTES // 2, PART_BYTES):
                begin = max(at, first + 1)
                found = _next_document(file, begin, begin + PART_BYTES, "row" if is_table else document, errors)
                if found is not None and found > starts[-1]:
                    starts.append(found)
    except OSError as error:
        raise TextError(
            f"this file can't be read: {error.strerror or error}", where=str(path), next="check that you may read it"
        ) from error
    return starts


def _next_document(file: BinaryIO, begin: int, end: int, rule: str, errors: ErrorsRule) -> int | None:
    """Where the first document at or behind byte `begin` begins, if that is before `end`."""
    file.seek(max(0, begin - 1))
    # What is left of the line before; a part begins with a line.
    at = file.tell() + _skipped(file) if begin else 0
    is_parted = rule != "blank-line"
    while at < end:
        line = file.readline(_LINE_BYTES)
        if not line:
            return None
        length, is_whole = len(line), line.endswith(b"\n") or len(line) < _LINE_BYTES
        if not is_whole:
            length += _skipped(file)
            is_parted = rule != "blank-line"
        elif rule == "row":
            return at
        else:
            blank = _is_blank(line.removeprefix(codecs.BOM_UTF8) if not at else line, errors)
            if blank is False and is_parted:
                return at
            if blank is not None:
                is_parted = rule != "blank-line" or blank
        at += length
    return None


def _skipped(file: BinaryIO) -> int:
    """Read to the end of a line of any length; how many bytes that were."""
    size = 0
    while True:
        line = file.readline(_LINE_BYTES)
        size += len(line)
        if not line or line.endswith(b"\n"):
            return size


def _is_blank(line: bytes, errors: ErrorsRule) -> bool | None:
    """Whether a line is blank; None for one that is no line: it will be left out, or refused when it is read."""
    try:
        return not line.strip() or line.decode().isspace()
    except UnicodeDecodeError:
        return False if errors == "replace" else None
