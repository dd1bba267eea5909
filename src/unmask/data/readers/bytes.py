"""Room card: the bytes of a file, unpacked, as characters or as lines.

Comes in: a path, which of its bytes. Goes out: chunks, pieces of text or lines, read with bounded memory; or a
TextError that names the file, the byte, the line and the mend. Called by: sources, listing, rows,
separated, unpacking.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

import zstandard

from unmask.core.errors import TextError
from unmask.data.settings import ErrorsRule

CHUNK_BYTES: Final = 1 << 18
LONGEST_LINE: Final = 1 << 28  # of a table: its rows are taken one by one, whole
LONGEST_LEFT_OUT: Final = 1 << 22  # a line of plain text that holds no UTF-8 must be held to be left out as a whole
_LINES: Final = re.compile(rb"[^\n]*\n|[^\n]+")
_PACKED_BYTES: Final = 1 << 8  # of .zst at a time: a block of 4 bytes may unpack to 128 KiB, so this to 8 MiB
_MAGIC: Final = (  # what a file begins with, what it then is, and the mend
    (b"%PDF-", "a PDF", "save its text as .txt"),
    (b"PK\x03\x04", "a zip archive or an office document", "unpack it, or save its text as .txt"),
    (b"\x1f\x8b", "packed with gzip, though its name does not end in .gz", "give it a name that ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstandard, though its name does not end in .zst", "let its name end in .zst"),
    (b"BZh", "packed with bzip2", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\x00", "packed with xz", "unpack it, or pack it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"PAR1", "a Parquet table, though its name does not end in .parquet", "give it a name that ends in .parquet"),
    (b"SQLite format 3\x00", "an SQLite data base", "save its text as .txt"),
    (b"\x89PNG", "a PNG picture", "give a text file"),
    (b"\xff\xd8\xff", "a JPEG picture", "give a text file"),
    (b"\x7fELF", "a program", "give a text file"),
    (b"\xff\xfe", "UTF-16 text (its byte order mark says so)", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text (its byte order mark says so)", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)


def packing(path: Path) -> str:
    """How a file is packed, by its name: ".gz", ".zst" or ""."""
    ending = path.suffix.lower()
    return ending if ending in (".gz", ".zst") else ""


def read_chunks(path: Path, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """The bytes [first, last) of a file of text, unpacked; a range is only for a file that is not packed.

    Raises:
        TextError: it can't be read, is damaged, or looks like something else than text.
    """
    base = first
    for chunk in unpacked(path, first, last):
        _refuse_binary(chunk, path, base)
        base += len(chunk)
        yield chunk


def unpacked(path: Path, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """The bytes [first, last) of any file, unpacked.

    Raises:
        TextError: it can't be read or is damaged.
    """
    packed = packing(path)
    base = first
    try:
        with path.open("rb") as file:
            if first:
                file.seek(first)
            stream = _unpacked(file, packed)
            while True:
                wanted = CHUNK_BYTES if last is None or packed else min(CHUNK_BYTES, last - base)
                chunk = stream.read(wanted) if wanted > 0 else b""
                if not chunk:
                    break
                base += len(chunk)
                yield chunk
            if packed == ".zst":
                _require_whole(stream, path)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise TextError(
            f"this file can't be read: {error.strerror or error}", location=str(path), hint="check that you may read it"
        ) from error


def _unpacked(file: BinaryIO, packed: str) -> BinaryIO:
    if packed == ".gz":
        return cast("BinaryIO", gzip.GzipFile(fileobj=file))
    return cast("BinaryIO", _Zstandard(file)) if packed else file


class _Zstandard:
    """The unpacked bytes of a .zst file of one or more frames, which knows whether the last frame was whole.

    zstandard's own stream_reader ends without a word where a file was cut short.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._waiting = b""  # packed bytes behind the end of a frame
        self._held, self._given = b"", 0
        self.is_whole = True

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while self._given == len(self._held):
            packed = self._waiting or self._file.read(_PACKED_BYTES)
            if not packed:
                return b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._held, self._given = self._frame.decompress(packed), 0
            self.is_whole = self._frame.eof
            self._waiting = self._frame.unused_data if self._frame.eof else b""
        first, self._given = self._given, min(len(self._held), self._given + size)
        return self._held[first : self._given]


def _require_whole(stream: object, path: Path) -> None:
    if isinstance(stream, _Zstandard) and not stream.is_whole:
        raise _damaged(path, "it ends in the middle of a frame")


def _damaged(path: Path, why: str) -> TextError:
    what = f"this {packing(path) or path.suffix} file is damaged or cut short ({why})"
    return TextError(what, location=str(path), hint="fetch or pack it anew")


def _refuse_binary(chunk: bytes, path: Path, base: int) -> None:
    """Look at the bytes of a file from byte `base` on."""
    for magic, what, mend in _MAGIC if base == 0 else ():
        if chunk.startswith(magic):
            raise TextError(f"this file is not UTF-8 text; it looks like {what}", location=str(path), hint=mend)
    if b"\0" in chunk:
        raise TextError(
            f"this file is binary: byte {base + chunk.index(0):,}{_of_what(path)} is zero, which no text has",
            location=str(path),
            hint="give a text file, saved as UTF-8",
        )


def _of_what(path: Path) -> str:
    return " of the unpacked text" if packing(path) else ""


def line_number(path: Path, byte: int) -> int:
    """The number of the line, counted from 1, that holds this byte of the unpacked file; reads up to there."""
    number, base = 1, 0
    for chunk in read_chunks(path):
        if base + len(chunk) > byte:
            return number + chunk.count(b"\n", 0, byte - base)
        number, base = number + chunk.count(b"\n"), base + len(chunk)
    return number


def decoded(
    path: Path, errors: ErrorsRule, leave_out: Callable[[], None], first: int = 0, last: int | None = None
) -> Iterator[str]:
    """The characters of a file's bytes, piece by piece, without a byte order mark.

    Args:
        path: the file.
        errors: what is done about bytes that are not UTF-8; by "skip", their line is left out.
        leave_out: called for each line that is left out.
        first: where to begin, at the start of a character and, by "skip", of a line.
        last: where to end.

    Raises:
        TextError: it can't be read or is not UTF-8 (line and byte are named).
    """
    source = read_chunks(path, first, last)
    pending, base, chunk = b"", first, next(source, b"")
    if not first and chunk.startswith(codecs.BOM_UTF8):
        chunk, base = chunk[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    inside_line = False  # of a line that was too long to be held
    while True:
        data, is_end = pending + chunk, not chunk
        if errors == "skip":
            text, used = _readable(data, path, base, leave_out, inside_line=inside_line, is_end=is_end)
            inside_line = not text.endswith("\n") if text else inside_line and not used
        else:
            try:
                text, used = codecs.utf_8_decode(data, errors, is_end)
            except UnicodeDecodeError as error:
                raise not_utf_8(path, base + error.start, data[error.start], error.reason) from error
        if text:
            yield text
        if is_end:
            return
        pending, base, chunk = data[used:], base + used, next(source, b"")


def _readable(
    data: bytes, path: Path, base: int, leave_out: Callable[[], None], *, inside_line: bool, is_end: bool
) -> tuple[str, int]:
    """The text of the lines that are UTF-8, and how many bytes of the data are dealt with."""
    end = len(data) if is_end else data.rfind(b"\n") + 1
    is_long = not end and (inside_line or len(data) > LONGEST_LEFT_OUT)
    try:
        if is_long:
            return codecs.utf_8_decode(data, "strict", False)
        return data[:end].decode(), end
    except UnicodeDecodeError as error:
        if is_long or (inside_line and b"\n" not in data[: error.start]):
            raise TextError(
                f"bytes that are not UTF-8 in a line longer than {LONGEST_LEFT_OUT:,} bytes, which is too long to be "
                "left out as a whole",
                location=f"{path}, byte {base + error.start} (line {line_number(path, base + error.start):,})",
                hint="let such bytes become U+FFFD: --errors replace; or give the text shorter lines",
            ) from error
    texts: list[str] = []
    for line in _LINES.findall(data[:end]):
        try:
            texts.append(line.decode())
        except UnicodeDecodeError:
            leave_out()
    return "".join(texts), end


def not_utf_8(path: Path, byte: int, value: int, reason: str) -> TextError:
    """The refusal of a byte of the unpacked file."""
    return TextError(
        f"not UTF-8: {reason} at byte {byte:,}{_of_what(path)} (0x{value:02x})",
        location=f"{path}, byte {byte} (line {line_number(path, byte):,})",
        hint="save it as UTF-8, as with iconv -f CP1252 -t UTF-8; or let such bytes become U+FFFD: --errors replace; "
        "or leave such lines out: --errors skip",
    )


def read_lines(path: Path, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """The lines of a file's bytes, each with its line feed, without a byte order mark.

    Raises:
        TextError: it can't be read, or a line is longer than LONGEST_LINE.
    """
    held: list[bytes] = []
    size, number = 0, 0
    for chunk in read_chunks(path, first, last):
        data = chunk
        if not first and not number and not held and data.startswith(codecs.BOM_UTF8):
            data = data[len(codecs.BOM_UTF8) :]
        size += len(data)
        if b"\n" not in data:
            if size > LONGEST_LINE:
                raise TextError(
                    f"a line longer than {LONGEST_LINE:,} bytes",
                    location=f"{path}, line {number + line_number(path, first):,}",
                    hint="give each row a line of its own",
                )
            held.append(data)
            continue
        whole = b"".join([*held, data]).split(b"\n")
        rest = whole.pop()
        number += len(whole)
        for line in whole:
            yield line + b"\n"
        held, size = [rest], len(rest)
    if size:
        yield b"".join(held)
