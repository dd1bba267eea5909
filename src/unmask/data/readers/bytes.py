"""Reads files as decompressed bytes, decoded text or lines, with bounded memory.

Errors name the file, the byte, the line and a hint.
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
LONGEST_LINE: Final = 1 << 28  # bytes; rows of a table are buffered in memory one at a time
LONGEST_SKIPPED: Final = 1 << 22  # bytes; an invalid line of plain text must be in memory to be skipped
_LINES: Final = re.compile(rb"[^\n]*\n|[^\n]+")
_PACKED_BYTES: Final = 1 << 8  # read from .zst at a time: 4 bytes may decompress to 128 KiB, so 256 to 8 MiB
_MAGIC: Final = (  # first bytes, file type, and the hint
    (b"%PDF-", "a PDF", "save its text as .txt"),
    (b"PK\x03\x04", "a zip archive or an office document", "extract it, or save its text as .txt"),
    (b"\x1f\x8b", "gzip data without the extension .gz", "rename it so that it ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstandard data without the extension .zst", "rename it so that it ends in .zst"),
    (b"BZh", "bzip2 data", "decompress it, or compress it with gzip"),
    (b"\xfd7zXZ\x00", "xz data", "decompress it, or compress it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "extract it"),
    (b"PAR1", "a Parquet table without the extension .parquet", "rename it so that it ends in .parquet"),
    (b"SQLite format 3\x00", "an SQLite database", "save its text as .txt"),
    (b"\x89PNG", "a PNG image", "name a text file"),
    (b"\xff\xd8\xff", "a JPEG image", "name a text file"),
    (b"\x7fELF", "a program", "name a text file"),
    (b"\xff\xfe", "UTF-16 text (its byte order mark says so)", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text (its byte order mark says so)", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)


def packing(path: Path) -> str:
    """Return how a file is compressed, by its name: ".gz", ".zst" or ""."""
    ending = path.suffix.lower()
    return ending if ending in (".gz", ".zst") else ""


def read_chunks(path: Path, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """Yield the bytes [first, last) of a text file, decompressed; only uncompressed files may have a range.

    Raises:
        TextError: the file can't be read, is damaged, or is not text.
    """
    base = first
    for chunk in _decompress(path, first, last):
        _require_text(chunk, path, base)
        base += len(chunk)
        yield chunk


def _decompress(path: Path, first: int, last: int | None) -> Iterator[bytes]:
    """Yield the bytes [first, last) of any file, decompressed.

    Raises:
        TextError: the file can't be read or is damaged.
    """
    packed = packing(path)
    base = first
    try:
        with path.open("rb") as file:
            if first:
                file.seek(first)
            stream = _decompressor(file, packed)
            while True:
                wanted = CHUNK_BYTES if last is None or packed else min(CHUNK_BYTES, last - base)
                chunk = stream.read(wanted) if wanted > 0 else b""
                if not chunk:
                    break
                base += len(chunk)
                yield chunk
            if packed == ".zst":
                _require_complete(stream, path)
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise TextError(
            f"can't read this file: {error.strerror or error}",
            location=str(path),
            hint="check that the file exists and is readable",
        ) from error


def _decompressor(file: BinaryIO, packed: str) -> BinaryIO:
    if packed == ".gz":
        return cast("BinaryIO", gzip.GzipFile(fileobj=file))
    return cast("BinaryIO", _Zstandard(file)) if packed else file


class _Zstandard:
    """Reader of a .zst file with one or more frames, which detects a truncated last frame.

    zstandard's own stream_reader ends without an error if a file is truncated.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._waiting = b""  # compressed bytes after the end of a frame
        self._buffer, self._position = b"", 0
        self.is_complete = True

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes; none at the end."""
        while self._position == len(self._buffer):
            packed = self._waiting or self._file.read(_PACKED_BYTES)
            if not packed:
                return b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._buffer, self._position = self._frame.decompress(packed), 0
            self.is_complete = self._frame.eof
            self._waiting = self._frame.unused_data if self._frame.eof else b""
        first, self._position = self._position, min(len(self._buffer), self._position + size)
        return self._buffer[first : self._position]


def _require_complete(stream: object, path: Path) -> None:
    if isinstance(stream, _Zstandard) and not stream.is_complete:
        raise _damaged(path, "it ends within a frame")


def _damaged(path: Path, why: str) -> TextError:
    message = f"this {packing(path) or path.suffix} file is damaged or truncated ({why})"
    return TextError(message, location=str(path), hint="download or compress the file again")


def _require_text(chunk: bytes, path: Path, base: int) -> None:
    """Check that bytes of a file, from byte `base` on, are not binary."""
    for magic, description, hint in _MAGIC if base == 0 else ():
        if chunk.startswith(magic):
            raise TextError(f"not UTF-8 text: the file looks like {description}", location=str(path), hint=hint)
    if b"\0" in chunk:
        raise TextError(
            f"this file is binary: byte {base + chunk.index(0):,}{_of_content(path)} is zero",
            location=str(path),
            hint="name a text file in UTF-8",
        )


def _of_content(path: Path) -> str:
    return " of the decompressed text" if packing(path) else ""


def line_number(path: Path, byte: int) -> int:
    """Return the number of the line, from 1, with this byte of the decompressed file; reads the file up to there."""
    number, base = 1, 0
    for chunk in read_chunks(path):
        if base + len(chunk) > byte:
            return number + chunk.count(b"\n", 0, byte - base)
        number, base = number + chunk.count(b"\n"), base + len(chunk)
    return number


def decoded(
    path: Path, errors: ErrorsRule, on_skip: Callable[[], None], first: int = 0, last: int | None = None
) -> Iterator[str]:
    """Yield the decoded text of a file in chunks, without a byte order mark.

    Args:
        path: the file.
        errors: handling of bytes that are not UTF-8. "skip" drops their lines.
        on_skip: called for each skipped line.
        first: first byte; the start of a character and, under "skip", of a line.
        last: end of the range, exclusive.

    Raises:
        TextError: the file can't be read or is not UTF-8 (with line and byte).
    """
    source = read_chunks(path, first, last)
    pending, base, chunk = b"", first, next(source, b"")
    if not first and chunk.startswith(codecs.BOM_UTF8):
        chunk, base = chunk[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    inside_line = False  # whether the text so far ends within a line that is too long for memory
    while True:
        data, is_end = pending + chunk, not chunk
        if errors == "skip":
            text, used = _decode_lines(data, path, base, on_skip, inside_line=inside_line, is_end=is_end)
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


def _decode_lines(
    data: bytes, path: Path, base: int, on_skip: Callable[[], None], *, inside_line: bool, is_end: bool
) -> tuple[str, int]:
    """Return the text of the lines that are UTF-8, and the number of bytes consumed."""
    end = len(data) if is_end else data.rfind(b"\n") + 1
    is_long = not end and (inside_line or len(data) > LONGEST_SKIPPED)
    try:
        if is_long:
            return codecs.utf_8_decode(data, "strict", False)
        return data[:end].decode(), end
    except UnicodeDecodeError as error:
        if is_long or (inside_line and b"\n" not in data[: error.start]):
            raise TextError(
                f"can't skip a line that is not UTF-8 and longer than {LONGEST_SKIPPED:,} bytes",
                location=f"{path}, byte {base + error.start} (line {line_number(path, base + error.start):,})",
                hint="replace such bytes by U+FFFD (--errors replace), or shorten the lines",
            ) from error
    texts: list[str] = []
    for line in _LINES.findall(data[:end]):
        try:
            texts.append(line.decode())
        except UnicodeDecodeError:
            on_skip()
    return "".join(texts), end


def not_utf_8(path: Path, byte: int, value: int, reason: str) -> TextError:
    """Return the error for an invalid byte of the decompressed file."""
    return TextError(
        f"not UTF-8: {reason} at byte {byte:,}{_of_content(path)} (0x{value:02x})",
        location=f"{path}, byte {byte} (line {line_number(path, byte):,})",
        hint="convert the file with iconv -f CP1252 -t UTF-8, or replace such bytes by U+FFFD: --errors replace, "
        "or skip such lines: --errors skip",
    )


def read_lines(path: Path, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file as bytes, each with its line feed, without a byte order mark.

    Raises:
        TextError: the file can't be read, or a line is longer than LONGEST_LINE.
    """
    buffered: list[bytes] = []
    size, number = 0, 0
    for chunk in read_chunks(path, first, last):
        data = chunk
        if not first and not number and not buffered and data.startswith(codecs.BOM_UTF8):
            data = data[len(codecs.BOM_UTF8) :]
        size += len(data)
        if b"\n" not in data:
            if size > LONGEST_LINE:
                raise TextError(
                    f"a line longer than {LONGEST_LINE:,} bytes",
                    location=f"{path}, line {number + line_number(path, first):,}",
                    hint="write each row on a separate line",
                )
            buffered.append(data)
            continue
        lines = b"".join([*buffered, data]).split(b"\n")
        rest = lines.pop()
        number += len(lines)
        for line in lines:
            yield line + b"\n"
        buffered, size = [rest], len(rest)
    if size:
        yield b"".join(buffered)
