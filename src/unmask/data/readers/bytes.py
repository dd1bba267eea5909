"""Reads files as decompressed bytes, decoded text or lines, with bounded memory.

Errors name the file, the byte, the line and a hint.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import re
import shlex
import tarfile
import unicodedata
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
_HEAD_BYTES: Final = 1 << 16  # decide whether carriage returns end the lines of a file
_LONGEST_WINDOW: Final = 1 << 31  # bytes that zstd --long=31 keeps in memory
_MAX_ZERO_SHARE: Final = 0.1  # a larger share of zero bytes in the first chunk is binary data, not damaged text
_MAX_ZEROS: Final = 16
_MAGIC: Final = (  # first bytes, file type, and the hint
    (b"%PDF-", "a PDF", "save its text as .txt"),
    (b"PK\x03\x04", "a zip archive or an office document", "extract it, or save its text as .txt"),
    (b"PK\x05\x06", "an empty zip archive", "name a text file"),
    (b"\x1f\x8b", "gzip data without the extension .gz", "rename it so that it ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstandard data without the extension .zst", "rename it so that it ends in .zst"),
    (b"BZh", "bzip2 data", "decompress it, or compress it with gzip"),
    (b"\xfd7zXZ\x00", "xz data", "decompress it, or compress it with gzip"),
    (b"\x04\x22\x4d\x18", "lz4 data", "decompress it, or compress it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "extract it"),
    (b"Rar!\x1a\x07", "a RAR archive", "extract it"),
    (b"PAR1", "a Parquet table without the extension .parquet", "rename it so that it ends in .parquet"),
    (b"ARROW1\x00", "an Arrow table", "write it as .parquet"),
    (b"SQLite format 3\x00", "an SQLite database", "save its text as .txt"),
    (b"\x89HDF\r\n", "an HDF5 file", "save its text as .txt"),
    (b"\x93NUMPY", "a NumPy array", "save its text as .txt"),
    (b"\xd0\xcf\x11\xe0", "an older office document", "save its text as .txt"),
    (b"{\\rtf", "an RTF document", "save its text as .txt"),
    (b"\x89PNG", "a PNG image", "name a text file"),
    (b"\xff\xd8\xff", "a JPEG image", "name a text file"),
    (b"GIF8", "a GIF image", "name a text file"),
    (b"\x7fELF", "a program", "name a text file"),
)
_PICKLES: Final = tuple(bytes([0x80, version]) for version in (2, 3, 4, 5))
# The byte order mark of UTF-32 begins with that of UTF-16. iconv reads the mark of "UTF-16" and "UTF-32".
_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_ICONV_NAMES: Final = {"latin_1": "ISO-8859-1", "johab": "JOHAB", "shift_jis": "SHIFT_JIS", "euc_jp": "EUC-JP"}
_OLD: Final = re.compile(r"mac_|cp(037|1006|1026|11\d\d|273|4\d\d|5\d\d|7\d\d|8\d\d)$")
_ABOUT_EQUAL: Final = 0.02  # of the measure of disorder of charset-normalizer
_RETURN: Final = re.compile(rb"\r(?!\n)")
_WIDE: Final = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
_SAMPLE_BYTES: Final = 1 << 12
_MIN_TEXT_SHARE: Final = 0.98  # of letters, digits, marks, punctuation and spaces in text


def packing(path: Path) -> str:
    """Return how a file is compressed, by its name: ".gz", ".zst" or ""."""
    ending = path.suffix.lower()
    return ending if ending in (".gz", ".zst") else ""


def read_chunks(path: Path, first: int = 0, last: int | None = None, errors: ErrorsRule = "strict") -> Iterator[bytes]:
    """Yield the bytes [first, last) of a text file, decompressed; only uncompressed files may have a range.

    If carriage returns end the lines of the file, they become line feeds. Under "replace" and "skip" a zero byte
    becomes 0xff, which is not UTF-8 either. So the number of bytes stays.

    Raises:
        TextError: the file can't be read, is damaged, or is not text.
    """
    chunks = _decompress(path, first, last)
    begin = list[bytes]()
    while sum(map(len, begin)) < _HEAD_BYTES and (chunk := next(chunks, b"")):
        begin.append(chunk)
    if first:
        has_returns = _has_return_ends(_head(path))
    else:
        head = b"".join(begin)
        _require_text(head, path)
        has_returns = _has_return_ends(head)
    base, pending = first, b""
    for chunk in itertools.chain(begin, chunks):
        data = chunk
        if has_returns:
            data = pending + data
            pending = data[-1:] if data.endswith(b"\r") else b""  # the next chunk may begin with its line feed
            data = _RETURN.sub(b"\n", data[: len(data) - len(pending)])
        if b"\0" in data:
            if errors == "strict":
                raise _zero_byte(path, base + data.index(0))
            data = data.replace(b"\0", b"\xff")
        base += len(data)
        if data:
            yield data
    if pending:
        yield b"\n"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _has_return_ends(head: bytes) -> bool:
    """Return whether the beginning of a file has carriage returns and no line feed, as on old Mac computers."""
    head = head[:_HEAD_BYTES]
    return b"\n" not in head and b"\r" in head.removesuffix(b"\r")


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
        self._frame = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()
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
                self._frame = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()
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


def _require_text(head: bytes, path: Path) -> None:
    """Check that a file with these first bytes is not binary and not in UTF-16 or UTF-32."""
    for magic, description, hint in _MAGIC:
        if head.startswith(magic):
            raise TextError(f"not UTF-8 text: the file looks like {description}", location=str(path), hint=hint)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            raise _other_encoding(path, encoding, "its byte order mark says so")
    zeros = head.count(0)
    if not zeros:
        return
    if _is_tar(head):
        raise TextError("not UTF-8 text: the file looks like a tar archive", location=str(path), hint="extract it")
    if head.startswith(_PICKLES):
        hint = "save its text as .txt"
        raise TextError("not UTF-8 text: the file looks like a Python pickle", location=str(path), hint=hint)
    if encoding := _wide_encoding(head[:_SAMPLE_BYTES]):
        raise _other_encoding(path, encoding, "without a byte order mark")
    if zeros >= _MAX_ZEROS and zeros > _MAX_ZERO_SHARE * len(head):
        raise TextError(
            f"this file is binary: {zeros:,} of its first {len(head):,} bytes are zero",
            location=str(path),
            hint="name a text file in UTF-8",
        )


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _wide_encoding(head: bytes) -> str:
    """Return UTF-16 or UTF-32 with a byte order, if a sample with zero bytes is such text; else an empty text."""
    try:  # UTF-8 with a few zero bytes also decodes as UTF-16, as arbitrary Chinese characters
        if codecs.utf_8_decode(head, "strict", False) and head.count(0) * 8 < len(head):
            return ""
    except UnicodeDecodeError:
        pass
    for encoding in _WIDE:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        readable = sum(letter in "\n\r\t" or unicodedata.category(letter)[0] in "LMNPSZ" for letter in text)
        if text and readable >= _MIN_TEXT_SHARE * len(text):
            return encoding
    return ""


def _other_encoding(path: Path, encoding: str, why: str) -> TextError:
    return TextError(
        f"not UTF-8: the file looks like {encoding} text ({why})",
        location=str(path),
        hint=f"save it as UTF-8: {_iconv(path, encoding)}",
    )


def _iconv(path: Path, encoding: str) -> str:
    """Return a command that writes the file in UTF-8, under a new name."""
    unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(packing(path), "")
    name = Path(path.stem) if unpack else path
    target = shlex.quote(f"{name.stem}-utf8{name.suffix}")
    source = shlex.quote(str(path))
    command = f"iconv -f {encoding} -t UTF-8"
    return f"{unpack} {source} | {command} > {target}" if unpack else f"{command} {source} > {target}"


def _zero_byte(path: Path, byte: int) -> TextError:
    return TextError(
        f"not text: byte {byte:,}{_of_content(path)} is zero",
        location=f"{path}, byte {byte} (line {line_number(path, byte):,})",
        hint="remove it, or replace such bytes by U+FFFD: --errors replace, or skip such lines: --errors skip",
    )


def _of_content(path: Path) -> str:
    return " of the decompressed text" if packing(path) else ""


def line_number(path: Path, byte: int) -> int:
    """Return the number of the line, from 1, with this byte of the decompressed file; reads the file up to there."""
    number, base = 1, 0
    for chunk in read_chunks(path, errors="replace"):
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
    source = read_chunks(path, first, last, errors)
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
        hint=f"{convert(path, byte)}, or replace such bytes by U+FFFD: --errors replace, or skip such lines: "
        "--errors skip",
    )


def convert(path: Path, byte: int) -> str:
    """Return the advice to convert a file to UTF-8, with the likely encodings of the text around a byte."""
    found = _encodings(path, byte)
    if not found:
        return "save every line as UTF-8"
    others = f" (or {', '.join(found[1:])})" if found[1:] else ""
    return f"convert the file, which looks like {found[0]}{others}, and check its letters: {_iconv(path, found[0])}"


def _is_utf_8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _encodings(path: Path, byte: int) -> list[str]:
    """Return the names of the encodings that the text around a byte may have, the likeliest first."""
    # Imported here: it is needed for an error message only.
    from charset_normalizer import from_bytes

    sample, base = b"", 0
    for chunk in _decompress(path, 0, None):
        sample, base = (sample + chunk)[-2 * _HEAD_BYTES :], base + len(chunk)
        if base > byte + _HEAD_BYTES // 2:
            break
    # Whole lines, so that no character of several bytes is cut; ASCII says nothing about an encoding.
    at = sample.rfind(b"\n", 0, max(0, len(sample) - (base - byte))) + 1
    lines = [line for line in sample[at : at + _HEAD_BYTES // 2].splitlines(keepends=True) if not line.isascii()]
    before = sample[:at].splitlines()
    if any(not line.isascii() and _is_utf_8(line) for line in (*before, *lines[:-1])):  # only some lines are not UTF-8
        return []
    sample = b"".join(lines[:-1] or lines)
    # Several encodings may fit about equally well. Those of DOS and old Macs are rare. Of the others, those of Western
    # and of Central European Windows are the most frequent.
    matches = sorted(from_bytes(sample, enable_fallback=False), key=lambda match: bool(_OLD.match(match.encoding)))
    names = [match.encoding for match in matches]
    likely = [match for match in matches if match.chaos < matches[0].chaos + _ABOUT_EQUAL]
    for frequent in ("cp1250", "cp1252"):
        if any(frequent in match.could_be_from_charset for match in likely):
            names = [frequent, *(name for name in names if name != frequent)]
    return [_ICONV_NAMES.get(name, name.replace("_", "-").upper()) for name in names if not name.startswith("utf")][:3]


def read_lines(path: Path, first: int = 0, last: int | None = None, errors: ErrorsRule = "strict") -> Iterator[bytes]:
    """Yield the lines of a file as bytes, each with its line feed, without a byte order mark.

    Raises:
        TextError: the file can't be read, or a line is longer than LONGEST_LINE.
    """
    buffered: list[bytes] = []
    size, number = 0, 0
    for chunk in read_chunks(path, first, last, errors):
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
