"""Room card: where a large file may be cut, so that its parts give the same documents as the whole.

Comes in: a plain text or .jsonl file that is not packed, the rule of its documents. Goes out: the bytes at which its
parts begin. Called by: sources.
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
            f"this file can't be read: {error.strerror or error}", location=str(path), hint="check that you may read it"
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


PASSAGE_CHARACTERS: Final = 1_000_000
_SHORT: Final = 4_096  # characters that are normalised at once
_TRIED: Final = 4_096  # places between characters that are tried for a break; a text may be nothing but marks
_LINES: Final = re.compile(r"[^\n]*\n|[^\n]+")
_BLANK_LINES: Final = re.compile(r"(?:[^\S\n]*+\n)++")
_PARTING: Final = re.compile(r"\n((?:[^\S\n]*+\n)++)")  # begins with one character: found at the speed of memchr


def normal(text: str, form: UnicodeForm) -> str:
    """The text in this form, its line ends line feeds."""
    text = text.replace("\r\n", "\n")
    if form == "none" or text.isascii():
        return text
    if len(text) < _SHORT:
        return unicodedata.normalize(form, text)
    # Nothing joins across a line feed. Of English, three lines in four are ASCII, and need no look at each character.
    parted = text.split("\n")
    return "\n".join([line if line.isascii() else unicodedata.normalize(form, line) for line in parted])


def composed(pieces: Iterator[str], form: UnicodeForm) -> Iterator[str]:
    """The same text in its normal form: pieces that end with a line, or are about a passage long."""
    carry = ""
    for piece in pieces:
        carry += piece
        end = carry.rfind("\n") + 1
        while end or len(carry) > PASSAGE_CHARACTERS:
            end = end or _break(carry, form)
            yield normal(carry[:end], form)
            carry, end = carry[end:], 0
    if carry:
        yield normal(carry, form)


def _break(text: str, form: UnicodeForm) -> int:
    """Where to break a text that is longer than a passage: after a line end, else a space, else between characters."""
    half = PASSAGE_CHARACTERS // 2
    for parting in ("\n", " "):
        found = text.rfind(parting, half, PASSAGE_CHARACTERS) + 1
        if found:
            return found
    # Between characters that NFC does not join or reorder: what follows a break in a Hangul syllable, a cluster of
    # marks or a "\r\n" would be counted twice or lost.
    for end in range(PASSAGE_CHARACTERS, max(half, PASSAGE_CHARACTERS - _TRIED), -1):
        before, after = text[max(0, end - 32) : end], text[end : end + 32]
        joined = normal(before + after, form) == normal(before, form) + normal(after, form)
        if joined and not unicodedata.combining(after[0]) and before[-1] != "\r":
            return end
    return PASSAGE_CHARACTERS


def broken(number: int, text: str, form: UnicodeForm) -> Iterator[DocumentChunk]:
    """The passages of a document that is in memory as a whole."""
    piece = 0
    while len(text) > PASSAGE_CHARACTERS:
        end = _break(text, form)
        yield DocumentChunk(number, piece, text[:end], end, last=False)
        text, piece = text[end:], piece + 1
    yield DocumentChunk(number, piece, text, len(text), last=True)


class _Open(NamedTuple):
    """A document that is being read."""

    document: int
    piece: int
    lead: int  # characters before its text that it stands for


def assembled(pieces: Iterator[str], rule: DocumentRule, form: UnicodeForm) -> Iterator[DocumentChunk]:
    """Cut composed text into documents, and documents into passages."""
    now, held, size = _Open(0, 0, 0), list[str](), 0
    apart = 0  # characters of blank lines since the last line that was not
    inside_line = False
    for run, is_blank in _runs(pieces, rule):
        if is_blank:
            apart += len(run)
            continue
        is_open = bool(held)
        if is_open and (apart or (rule == "line" and not inside_line)):
            yield _last(now, held, size + apart, rule)
            now, held, size = _Open(now.document + 1, 0, 0), [], 0
        elif not is_open:
            now = now._replace(lead=now.lead + apart)
        apart = 0
        held.append(run)
        size += len(run)
        inside_line = not run.endswith("\n")
        while size > PASSAGE_CHARACTERS:
            whole = "".join(held)
            end = _break(whole, form)
            yield DocumentChunk(now.document, now.piece, whole[:end], end + now.lead, last=False)
            now, held, size = _Open(now.document, now.piece + 1, 0), [whole[end:]], size - end
    if held:
        yield _last(now, held, size + apart, rule)


def _last(now: _Open, held: list[str], size: int, rule: DocumentRule) -> DocumentChunk:
    text = held[0] if len(held) == 1 else "".join(held)
    return DocumentChunk(
        now.document, now.piece, text if rule == "file" else text.removesuffix("\n"), size + now.lead, last=True
    )


def _runs(pieces: Iterator[str], rule: DocumentRule) -> Iterator[tuple[str, bool]]:
    """What an assembler takes at a time, and whether it is blank lines.

    By line, single lines; between blank lines, as many lines at once as there are, because English has a line every 80
    bytes or so and a loop over lines reads 60 MB/s; where a file is one document, the pieces as they come.
    """
    inside_line = False
    for piece in pieces:
        if rule == "file":
            yield piece, False
            continue
        runs = _by_line(piece, inside_line) if rule == "line" else _between_blank_lines(piece, inside_line)
        for run, is_blank in runs:
            inside_line = not is_blank and not run.endswith("\n")
            yield run, is_blank


def _by_line(piece: str, inside_line: bool) -> Iterator[tuple[str, bool]]:
    for found in _LINES.finditer(piece):
        line = found[0]
        yield line, not inside_line and line.isspace()
        inside_line = False


def _between_blank_lines(piece: str, inside_line: bool) -> Iterator[tuple[str, bool]]:
    start = 0
    first = None if inside_line else _BLANK_LINES.match(piece)
    if first:
        yield first[0], True
        start = first.end()
    for found in _PARTING.finditer(piece, start):
        yield piece[start : found.start(1)], False
        yield found[1], True
        start = found.end()
    end = piece.rfind("\n", start) + 1  # a last line without an end may be blank
    if not end:
        end = start if start or not inside_line else len(piece)
    is_blank = end < len(piece) and piece[end:].isspace()
    for run, blank in ((piece[start:end], False), (piece[end:], True)) if is_blank else ((piece[start:], False),):
        if run:
            yield run, blank
