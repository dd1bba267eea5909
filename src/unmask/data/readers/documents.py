"""Plain text: splits large files into parts, normalizes Unicode, and splits text into documents.

The parts of a file contain the same documents as the whole file.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from unmask.core.errors import TextError
from unmask.core.types import DocumentChunk
from unmask.data.settings import DocumentRule, ErrorsRule, UnicodeForm

PART_BYTES: Final = 4_000_000  # takes seconds to tokenize; small compared with a file that needs several workers
_LINE_BYTES: Final = 1 << 20  # no part begins at a longer line: all of it must be read to see if it is blank


def part_starts(path: Path, document: DocumentRule, errors: ErrorsRule, *, is_table: bool) -> list[int]:
    """Return the byte offsets at which parts of about PART_BYTES begin; the first is 0.

    A part begins with the first document after a multiple of PART_BYTES, if it begins before the next multiple.

    Raises:
        TextError: the file can't be read.
    """
    starts = [0]
    try:
        size = path.stat().st_size
        if size < 2 * PART_BYTES or (document == "file" and not is_table):
            return starts
        with path.open("rb") as file:
            # Blank lines before the first document belong to it: no part may consist of blank lines only.
            first = 0 if is_table else _next_document(file, 0, size, "line", errors)
            if first is None:
                return starts
            for at in range(PART_BYTES, size - PART_BYTES // 2, PART_BYTES):
                begin = max(at, first + 1)
                start = _next_document(file, begin, begin + PART_BYTES, "row" if is_table else document, errors)
                if start is not None and start > starts[-1]:
                    starts.append(start)
    except OSError as error:
        raise TextError(
            f"can't read this file: {error.strerror or error}",
            location=str(path),
            hint="check that the file exists and is readable",
        ) from error
    return starts


def _next_document(file: BinaryIO, begin: int, end: int, rule: str, errors: ErrorsRule) -> int | None:
    """Return the start of the first document at or after byte `begin`, if it is before `end`."""
    file.seek(max(0, begin - 1))
    # A part begins with a line, so the rest of the line before is skipped.
    at = file.tell() + _skip_line(file) if begin else 0
    is_separated = rule != "blank-line"
    while at < end:
        line = file.readline(_LINE_BYTES)
        if not line:
            return None
        length, is_whole = len(line), line.endswith(b"\n") or len(line) < _LINE_BYTES
        if not is_whole:
            length += _skip_line(file)
            is_separated = rule != "blank-line"
        elif rule == "row":
            return at
        else:
            blank = _is_blank(line.removeprefix(codecs.BOM_UTF8) if not at else line, errors)
            if blank is False and is_separated:
                return at
            if blank is not None:
                is_separated = rule != "blank-line" or blank
        at += length
    return None


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of a line of any length and return the number of bytes."""
    size = 0
    while True:
        line = file.readline(_LINE_BYTES)
        size += len(line)
        if not line or line.endswith(b"\n"):
            return size


def _is_blank(line: bytes, errors: ErrorsRule) -> bool | None:
    """Return whether a line is blank; None if it is not UTF-8, and so will be skipped or raise an error later."""
    try:
        return not line.strip() or line.decode().isspace()
    except UnicodeDecodeError:
        return False if errors == "replace" else None


CHUNK_CHARACTERS: Final = 1_000_000
_SHORT: Final = 4_096  # characters; a shorter text is normalized in one call
_MAX_TRIES: Final = 4_096  # positions tested for a break; a text may consist of combining marks only
_LINES: Final = re.compile(r"[^\n]*\n|[^\n]+")
_BLANK_LINES: Final = re.compile(r"(?:[^\S\n]*+\n)++")
_SEPARATOR: Final = re.compile(r"\n((?:[^\S\n]*+\n)++)")  # starts with a literal: searched at the speed of memchr


def normalize_text(text: str, form: UnicodeForm) -> str:
    """Return the text in a Unicode form, with line feeds as line ends."""
    text = text.replace("\r\n", "\n")
    if form == "none" or text.isascii():
        return text
    if len(text) < _SHORT:
        return unicodedata.normalize(form, text)
    # Characters don't combine across a line feed. Three of four English lines are ASCII and need no normalization.
    lines = text.split("\n")
    return "\n".join([line if line.isascii() else unicodedata.normalize(form, line) for line in lines])


def normalize_chunks(chunks: Iterator[str], form: UnicodeForm) -> Iterator[str]:
    """Yield the normalized text in chunks that end with a line, or are about CHUNK_CHARACTERS long."""
    carry = ""
    for chunk in chunks:
        carry += chunk
        end = carry.rfind("\n") + 1
        while end or len(carry) > CHUNK_CHARACTERS:
            end = end or _break(carry, form)
            yield normalize_text(carry[:end], form)
            carry, end = carry[end:], 0
    if carry:
        yield normalize_text(carry, form)


def _break(text: str, form: UnicodeForm) -> int:
    """Return where to break a long text: after a line end, else after a space, else between characters."""
    half = CHUNK_CHARACTERS // 2
    for separator in ("\n", " "):
        end = text.rfind(separator, half, CHUNK_CHARACTERS) + 1
        if end:
            return end
    # Between characters that NFC doesn't combine or reorder. A break within a Hangul syllable, a cluster of marks or
    # "\r\n" would duplicate or lose characters.
    for end in range(CHUNK_CHARACTERS, max(half, CHUNK_CHARACTERS - _MAX_TRIES), -1):
        before, after = text[max(0, end - 32) : end], text[end : end + 32]
        joined = normalize_text(before + after, form) == normalize_text(before, form) + normalize_text(after, form)
        if joined and not unicodedata.combining(after[0]) and before[-1] != "\r":
            return end
    return CHUNK_CHARACTERS


def split_document(number: int, text: str, form: UnicodeForm) -> Iterator[DocumentChunk]:
    """Yield the chunks of a document in memory."""
    index = 0
    while len(text) > CHUNK_CHARACTERS:
        end = _break(text, form)
        yield DocumentChunk(number, index, text[:end], end, last=False)
        text, index = text[end:], index + 1
    yield DocumentChunk(number, index, text, len(text), last=True)


class _Open(NamedTuple):
    """The position of a document that is being read."""

    document: int
    number: int  # index of the chunk within the document
    lead: int  # characters of the blank lines before its text, which are counted with it


def split_documents(chunks: Iterator[str], rule: DocumentRule, form: UnicodeForm) -> Iterator[DocumentChunk]:
    """Split normalized text into documents, and documents into chunks."""
    current, open_runs, size = _Open(0, 0, 0), list[str](), 0
    blank_characters = 0  # characters of blank lines since the last nonblank line
    inside_line = False
    for run, is_blank in _runs(chunks, rule):
        if is_blank:
            blank_characters += len(run)
            continue
        is_open = bool(open_runs)
        if is_open and (blank_characters or (rule == "line" and not inside_line)):
            yield _last(current, open_runs, size + blank_characters, rule)
            current, open_runs, size = _Open(current.document + 1, 0, 0), [], 0
        elif not is_open:
            current = current._replace(lead=current.lead + blank_characters)
        blank_characters = 0
        open_runs.append(run)
        size += len(run)
        inside_line = not run.endswith("\n")
        while size > CHUNK_CHARACTERS:
            text = "".join(open_runs)
            end = _break(text, form)
            yield DocumentChunk(current.document, current.number, text[:end], end + current.lead, last=False)
            current, open_runs, size = _Open(current.document, current.number + 1, 0), [text[end:]], size - end
    if open_runs:
        yield _last(current, open_runs, size + blank_characters, rule)


def _last(current: _Open, open_runs: list[str], size: int, rule: DocumentRule) -> DocumentChunk:
    text = open_runs[0] if len(open_runs) == 1 else "".join(open_runs)
    return DocumentChunk(
        current.document,
        current.number,
        text if rule == "file" else text.removesuffix("\n"),
        size + current.lead,
        last=True,
    )


def _runs(chunks: Iterator[str], rule: DocumentRule) -> Iterator[tuple[str, bool]]:
    """Yield runs of text for `split_documents`, and whether each consists of blank lines.

    Under "line" a run is a line. Under "blank-line" it is all lines up to a blank one: English has a line every 80
    bytes or so, and a loop over lines reads only 60 MB/s. Under "file" chunks stay as they are.
    """
    inside_line = False
    for chunk in chunks:
        if rule == "file":
            yield chunk, False
            continue
        runs = _by_line(chunk, inside_line) if rule == "line" else _by_paragraph(chunk, inside_line)
        for run, is_blank in runs:
            inside_line = not is_blank and not run.endswith("\n")
            yield run, is_blank


def _by_line(chunk: str, inside_line: bool) -> Iterator[tuple[str, bool]]:
    for match in _LINES.finditer(chunk):
        line = match[0]
        yield line, not inside_line and line.isspace()
        inside_line = False


def _by_paragraph(chunk: str, inside_line: bool) -> Iterator[tuple[str, bool]]:
    start = 0
    first = None if inside_line else _BLANK_LINES.match(chunk)
    if first:
        yield first[0], True
        start = first.end()
    for match in _SEPARATOR.finditer(chunk, start):
        yield chunk[start : match.start(1)], False
        yield match[1], True
        start = match.end()
    end = chunk.rfind("\n", start) + 1  # a last line without an end may be blank
    if not end:
        end = start if start or not inside_line else len(chunk)
    is_blank = end < len(chunk) and chunk[end:].isspace()
    for run, blank in ((chunk[start:end], False), (chunk[end:], True)) if is_blank else ((chunk[start:], False),):
        if run:
            yield run, blank
