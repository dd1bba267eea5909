"""Room card: where documents come from.

Comes in: paths of text files and folders, or texts in memory, and the rule that says what a document is. Goes out:
documents as passages of at most about a million characters, NFC, in a fixed order, read with bounded memory; or a
TextError that names the file, the byte and the mend. Called by: corpus.

A document's passages, joined, are its text. The characters of all passages of a file add up to the file's: line ends
and blank lines that part two documents count to the first of them, blank lines before all documents to the first.
"""

from __future__ import annotations

import codecs
import gzip
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from unmask.contracts import Part, Passage
from unmask.errors import TextError
from unmask.store import digest, file_digest
from unmask.text.settings import DocumentRule, ErrorsRule

PASSAGE_CHARACTERS: Final = 1_000_000
_CHUNK_BYTES: Final = 1 << 20
_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_SAID: Final = {
    "blank-line": "a document is what stands between blank lines",
    "line": "a document is a line that is not blank",
    "file": "a document is a whole file",
}
_MAGIC: Final = (  # what a file begins with, what it then is, and the mend
    (b"%PDF-", "a PDF", "save its text as .txt"),
    (b"PK\x03\x04", "a zip archive or an office document", "unpack it, or save its text as .txt"),
    (b"\x1f\x8b", "packed with gzip, though its name does not end in .gz", "give it a name that ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstandard", "unpack it, or pack it with gzip"),
    (b"BZh", "packed with bzip2", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\x00", "packed with xz", "unpack it, or pack it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"PAR1", "a Parquet table", "save its text column as .txt"),
    (b"SQLite format 3\x00", "an SQLite data base", "save its text as .txt"),
    (b"\x89PNG", "a PNG picture", "give a text file"),
    (b"\xff\xd8\xff", "a JPEG picture", "give a text file"),
    (b"\x7fELF", "a program", "give a text file"),
    (b"\xff\xfe", "UTF-16 text (its byte order mark says so)", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text (its byte order mark says so)", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)


class FileSource:
    """UTF-8 text files, plain or packed with gzip (.gz); of a folder, all *.txt and *.txt.gz below it, sorted.

    `Passage.document` counts the documents of one part; a consumer that reads several parts adds them up. Line ends of
    both kinds become a line feed; a byte order mark of UTF-8 is left out.
    """

    def __init__(self, paths: Sequence[Path], document: DocumentRule, errors: ErrorsRule) -> None:
        self._paths = [Path(path) for path in paths]
        self._document: DocumentRule = document
        self._errors: ErrorsRule = errors

    @property
    def said(self) -> str:
        """What a document is, in words."""
        return _SAID[self._document]

    @cached_property
    def _files(self) -> list[Path]:
        if not self._paths:
            raise TextError("no text was given", next="name a text file, or a folder with *.txt files")
        return [file for path in self._paths for file in _files_of(path)]

    @property
    def fingerprint(self) -> str:
        """A digest of every file's bytes and of the rules; where the files lie and what they are called is left out."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        told = [f"{_is_packed(file)}:{file_digest(file)}" for file in self._files]
        return digest("files", self._document, self._errors, *told)

    def parts(self) -> Sequence[Part]:
        """One part per file, in the order given."""
        return [Part(str(file), 0, file.stat().st_size) for file in self._files]

    def check(self) -> None:
        """Open every file and look at its first bytes.

        Raises:
            TextError: one is missing, unreadable, empty, binary, or not UTF-8 in its first MiB.
        """
        for file in self._files:
            for piece in _decoded(file, self._errors):
                if piece.strip():
                    break
            else:
                raise _empty(file)

    def documents(self, part: Part) -> Iterator[Passage]:
        """The passages of one file.

        Raises:
            TextError: it can't be read, is empty, binary or not UTF-8 (the byte is named).
        """
        path, seen = Path(part.path), False
        for passage in _assembled(_composed(_decoded(path, self._errors)), self._document):
            seen = seen or bool(passage.text.strip())
            yield passage
        if not seen:
            raise _empty(path)


class MemorySource:
    """Texts in memory, each one document."""

    said = "a document is one of the texts given"

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    @property
    def fingerprint(self) -> str:
        """A digest of every text."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        self.check()
        return digest("memory", *self._texts)

    def parts(self) -> Sequence[Part]:
        """One part that holds all texts."""
        return [Part("memory", 0, len(self._texts))]

    def check(self) -> None:
        """Look at every text.

        Raises:
            TextError: there is nothing but white space, or a text that can't be written as UTF-8.
        """
        if all(not text or text.isspace() for text in self._texts):
            raise TextError("there is no text: nothing but white space", where="the texts given", next="give some text")
        for number, text in enumerate(self._texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TextError(
                    f"half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no character",
                    where=f"text {number}, character {error.start}",
                    next='repair the text, as with text.encode("utf-8", "replace").decode()',
                ) from error

    def documents(self, part: Part) -> Iterator[Passage]:
        """The passages of the texts [first_byte, last_byte) of a part, which count texts here."""
        for number in range(part.first_byte, part.last_byte):
            text = _normal(self._texts[number].replace("\r\n", "\n"))
            piece = 0
            while len(text) > PASSAGE_CHARACTERS:
                end = _break(text)
                yield Passage(number, piece, text[:end], end, last=False)
                text, piece = text[end:], piece + 1
            yield Passage(number, piece, text, len(text), last=True)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _is_packed(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def _empty(file: Path) -> TextError:
    return TextError(
        "this file is empty: it has no characters but white space", where=str(file), next="leave it out, or fill it"
    )


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the text files below a folder."""
    if os.path.isfile(path):  # Path.is_file raises where a name is too long to be one
        return [path]
    if not os.path.exists(path):
        raise TextError("there is no such file or folder", where=str(path), next="check the path")
    if not path.is_dir():
        raise TextError("neither a file nor a folder", where=str(path), next="give a text file")
    found = [file for file in path.rglob("*") if file.is_file() and file.name.endswith((".txt", ".txt.gz"))]
    if not found:
        raise TextError(
            "this folder holds no text", where=str(path), next="name its files, or give them names that end in .txt"
        )
    return sorted(found, key=lambda file: file.as_posix())


def _chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file."""
    try:
        with gzip.open(path, "rb") if _is_packed(path) else path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(
            f"this .gz file is damaged or cut short ({error})", where=str(path), next="fetch or pack it anew"
        ) from error
    except OSError as error:
        raise TextError(
            f"this file can't be read: {error.strerror or error}", where=str(path), next="check that you may read it"
        ) from error


def _refuse_binary(chunk: bytes, path: Path, base: int) -> None:
    """Look at the bytes of a file from byte `base` on."""
    for magic, what, mend in _MAGIC:
        if base == 0 and chunk.startswith(magic):
            raise TextError(f"this file is not UTF-8 text; it looks like {what}", where=str(path), next=mend)
    if b"\0" in chunk:
        raise TextError(
            f"this file is binary: byte {base + chunk.index(0):,}{_unpacked(path)} is zero, which no text has",
            where=str(path),
            next="give a text file, saved as UTF-8",
        )


def _unpacked(path: Path) -> str:
    return " of the unpacked text" if _is_packed(path) else ""


def _decoded(path: Path, errors: ErrorsRule) -> Iterator[str]:
    """The characters of a file, chunk by chunk, without a byte order mark."""
    pending, base = b"", 0
    chunks = _chunks(path)
    chunk = next(chunks, b"")
    _refuse_binary(chunk, path, 0)
    if chunk.startswith(codecs.BOM_UTF8):
        chunk, base = chunk[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    while True:
        data, final = pending + chunk, not chunk
        try:
            text, used = codecs.utf_8_decode(data, errors, final)
        except UnicodeDecodeError as error:
            byte = f"byte {base + error.start:,}{_unpacked(path)}"
            raise TextError(
                f"not UTF-8: {error.reason} at {byte} (0x{data[error.start]:02x})",
                where=f"{path}, byte {base + error.start}",
                next="save it as UTF-8, or let such bytes become U+FFFD: --errors replace",
            ) from error
        if text:
            yield text
        if final:
            return
        pending, base = data[used:], base + used
        chunk = next(chunks, b"")
        _refuse_binary(chunk, path, base + len(pending))


def _composed(pieces: Iterator[str]) -> Iterator[str]:
    """The same text, NFC, its line ends line feeds: pieces that end with a line, or are about a passage long."""
    carry = ""
    for piece in pieces:
        carry += piece
        end = carry.rfind("\n") + 1
        while end or len(carry) > PASSAGE_CHARACTERS:
            end = end or _break(carry)
            yield _normal(carry[:end].replace("\r\n", "\n"))
            carry, end = carry[end:], 0
    if carry:
        yield _normal(carry.replace("\r\n", "\n"))


def _break(text: str) -> int:
    """Where to break a text that is longer than a passage: after a line end, else a space, else between characters."""
    half = PASSAGE_CHARACTERS // 2
    for parting in ("\n", " "):
        found = text.rfind(parting, half, PASSAGE_CHARACTERS) + 1
        if found:
            return found
    # Between characters that NFC does not join or reorder: what follows a break in a Hangul syllable, a cluster of
    # marks or a "\r\n" would be counted twice or lost.
    for end in range(PASSAGE_CHARACTERS, half, -1):
        before, after = text[max(0, end - 32) : end], text[end : end + 32]
        joined = _normal(before + after) == _normal(before) + _normal(after)
        if joined and not unicodedata.combining(after[0]) and before[-1] != "\r":
            return end
    return PASSAGE_CHARACTERS


class _Open(NamedTuple):
    """A document that is being read."""

    document: int
    piece: int
    lead: int  # characters before its text that it stands for


def _assembled(pieces: Iterator[str], rule: DocumentRule) -> Iterator[Passage]:
    """Cut composed text into documents, and documents into passages."""
    now, held, size = _Open(0, 0, 0), list[str](), 0
    apart = 0  # characters of blank lines since the last line that was not
    inside_line = False
    for line in _lines(pieces, rule):
        if rule != "file" and not inside_line and not line.strip():
            apart += len(line)
            continue
        is_open = bool(held)
        if is_open and (apart or (rule == "line" and not inside_line)):
            yield _last(now, held, size + apart, rule)
            now, held, size = _Open(now.document + 1, 0, 0), [], 0
        elif not is_open:
            now = now._replace(lead=now.lead + apart)
        apart = 0
        held.append(line)
        size += len(line)
        inside_line = not line.endswith("\n")
        while size > PASSAGE_CHARACTERS:
            whole = "".join(held)
            end = _break(whole)
            yield Passage(now.document, now.piece, whole[:end], end + now.lead, last=False)
            now, held, size = _Open(now.document, now.piece + 1, 0), [whole[end:]], size - end
    if held:
        yield _last(now, held, size + apart, rule)


def _lines(pieces: Iterator[str], rule: DocumentRule) -> Iterator[str]:
    """Lines with their ends, or, where a file is one document, the pieces as they come."""
    for piece in pieces:
        if rule == "file":
            yield piece
        else:
            yield from (match[0] for match in _LINES.finditer(piece))


def _last(now: _Open, held: list[str], size: int, rule: DocumentRule) -> Passage:
    text = "".join(held)
    return Passage(
        now.document, now.piece, text if rule == "file" else text.removesuffix("\n"), size + now.lead, last=True
    )
