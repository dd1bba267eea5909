"""Names of texts: the files and datasets that paths, directories and patterns stand for."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from unmask.core.errors import TextError
from unmask.core.format import join_names, masked
from unmask.core.remote import fetch, is_remote
from unmask.data.readers.bytes import packing
from unmask.data.readers.hf_datasets import PREFIX, is_saved, parse

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "dataset"]
Texts = str | Path | Iterable[str | Path | Mapping[str, Any]]  # paths, or the texts themselves

STANDARD_INPUT: Final = "-"
SPOOL: Final = "standard-input"  # directory of the cache with copies of standard input
_KINDS: Final[dict[str, Kind]] = {
    ".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".rst": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_WEIGHT: Final = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_PATTERN: Final = re.compile(r"[*?\[]")


_MAX_BLANK: Final = 4096  # bytes of a file that is read when a directory is listed, to see whether it is blank


_ENDINGS: Final = (
    ".bash .bat .c .cc .clj .cljs .cmake .cpp .cs .css .cu .cuh .cxx .dart .el .erl .ex .exs .f .f90 .fs "
    ".glsl .go .groovy .h .hh .hpp .hs .java .jl .js .jsx .kt .kts .less .lisp .lua .m .mjs .ml .mli .mm .nim "
    ".pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .s .scala .scm .scss .sh .sol .sql .sv "
    ".swift .tcl .tf .toml .ts .tsx .v .vb .vhdl .vue .yaml .yml .zig .zsh"
)
_CODE_ENDINGS: Final = frozenset(_ENDINGS.split())


class TextInput(NamedTuple):
    """A named text and its files and datasets."""

    name: str
    weight: float  # 0.0: without a weight
    entries: tuple[str, ...]  # paths of files, and dataset:NAME
    warnings: tuple[str, ...] = ()  # what was left out, for display


def list_texts(texts: Texts, field: str = "text") -> list[str | Path]:
    """Return one or several paths or texts as a list; of rows (as of a dataset) the field with the text is taken.

    Raises:
        TextError: an element is neither a string nor a path, or a row lacks the field.
    """
    if isinstance(texts, str | Path):
        return [texts]
    listed: list[str | Path] = []
    for number, text in enumerate(texts):
        value: Any = text.get(field) if isinstance(text, Mapping) else text
        if not isinstance(value, str | Path):
            row = f" in the field `{field}`" if isinstance(text, Mapping) else ""
            raise TextError(
                f"invalid text{row}: got {value!r:.60} ({type(value).__name__}), expected a string or a path",
                location=f"texts, element {number}",
                hint="give strings or paths; of rows, name the field with the text: field=NAME" if row else
                "give strings or paths",
            )  # fmt: skip
        listed.append(value)
    return listed


def resolve_inputs(texts: Sequence[str]) -> list[TextInput]:
    """Return the inputs of all names; their weights add up to 1. Each file is used once.

    Raises:
        TextError: a text doesn't exist, or the weights are invalid.
    """
    if not texts:
        raise TextError("no text was given", hint="name a text file, or a directory with *.txt files")
    named = [weighted(text) for text in texts]
    weights = [weight for _, weight in named if weight is not None]
    for (name, weight), text in zip(named, texts, strict=True):
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise TextError(
                f"invalid weight: got {weight:g}, expected a number above 0",
                location=text,
                hint="write TEXT:0.7",
            )
        if weight is None and weights:
            hint = f"give every text a weight ({name}:1), or none"
            raise TextError("this text has no weight, but others have one", location=text, hint=hint)
    total, seen, inputs = sum(weights), set[object](), list[TextInput]()
    unused = list[str]()
    for name, weight in named:
        found = _Found()
        entries = tuple(_entries(name, found))
        used = tuple(entry for entry in entries if not found.is_repeated(entry, seen))
        if entries and not used:
            if weight is not None:
                message = "every file of this text belongs to a text before it"
                raise TextError(message, location=name, hint="name it once, with one weight")
            unused += found.warnings(masked(name))
            continue
        inputs.append(
            TextInput(_display_name(name), (weight or 0.0) / (total or 1.0), used, found.warnings(masked(name)))
        )
    inputs[-1] = inputs[-1]._replace(warnings=(*inputs[-1].warnings, *unused))
    return inputs


def weighted(text: str) -> tuple[str, float | None]:
    """Split NAME:WEIGHT; the weight is None if there is none, or if a file with the full name exists."""
    match = None if os.path.lexists(text) else _WEIGHT.fullmatch(text)
    if not match or match[1] == PREFIX[:-1] or (os.name == "nt" and len(match[1]) == 1):  # dataset:7; C:7
        return text, None
    return match[1], float(match[2])


def absolute(text: str) -> str:
    """Return the name with an absolute path; of an address, without credentials."""
    name, weight = weighted(text)
    suffix = "" if weight is None else text[len(name) :]
    if is_remote(name):
        return masked(name) + suffix
    if name.startswith(PREFIX):
        folder, _, split = name.removeprefix(PREFIX).partition("@")
        if not os.path.isdir(folder):
            return text
        return PREFIX + os.path.abspath(folder) + (f"@{split}" if split else "") + suffix
    return text if name == STANDARD_INPUT else os.path.abspath(name) + suffix


def is_name(text: str) -> bool:
    """Return whether a text is surely a name: standard input, a dataset, an address, or a known file extension."""
    name, _ = weighted(text)
    if name == STANDARD_INPUT or name.startswith(PREFIX) or is_remote(name):
        return True
    return _has_known_ending(name) or bool(packing(Path(name)))


def sends_requests(text: object) -> bool:
    """Return whether reading a text may send requests: an address, or a dataset in no folder of `save_to_disk`."""
    if not isinstance(text, str):
        return False
    name, _ = weighted(text)
    if not name.startswith(PREFIX):
        if is_remote(name) or not (os.path.isdir(name) and is_saved(Path(name))):
            return is_remote(name)
        name = PREFIX + name  # a "#" or "@" in it begins a configuration or a split
    folder = name.removeprefix(PREFIX).partition("@")[0].partition("#")[0]
    return not (os.path.isdir(folder) and is_saved(Path(folder)))


def _has_known_ending(name: str) -> bool:
    return _ending(name) in _KINDS


def _ending(name: str) -> str:
    """Return the extension of a file before .gz and .zst, in lower case."""
    path = Path(name)
    return Path(path.stem if packing(path) else path.name).suffix.lower()


def _is_text_name(name: str) -> bool:
    return _has_known_ending(name) or bool(packing(Path(name)))


def has_code_ending(name: str) -> bool:
    """Return whether the extension of a file is that of a programming or configuration language."""
    return _ending(name) in _CODE_ENDINGS


def kind_of(entry: str) -> Kind:
    """Return the kind of a file by its extension; unknown ones are plain text."""
    return "dataset" if entry.startswith(PREFIX) else _KINDS.get(_ending(entry), "text")


def is_spooled(name: str) -> bool:
    """Return whether this is the copy of standard input."""
    return Path(name).parent.name == SPOOL


def _display_name(name: str) -> str:
    return "standard input" if is_spooled(name) else masked(name)


def _entries(name: str, found: _Found) -> list[str]:
    """Return the file itself, the text files in a directory, the matches of a pattern, or the dataset."""
    if name.startswith(PREFIX):
        parse(name)
        return [name]
    if is_remote(name):
        return list(map(str, fetch(name, _is_text_name)))
    if os.path.isfile(name):  # Path.is_file raises where a name is too long to be one
        return [_named_in_utf_8(name)]
    if not os.path.exists(name):
        return [_named_in_utf_8(file) for file in _match_pattern(name, found)]
    if not os.path.isdir(name):
        raise TextError("neither a file nor a directory", location=name, hint="name a text file")
    if is_saved(Path(name)):
        return [PREFIX + name]
    files = [_named_in_utf_8(file) for file in found.walk(name)]
    if not files and found.has_code:  # beside text, files of code are scripts rather than text to train on
        found.reads_code = True
        files = [_named_in_utf_8(file) for file in found.walk(name)]
    if not files:
        left_out = "".join(f"; {warning}" for warning in found.warnings(""))
        raise TextError(
            f"no text files in this directory{left_out}",
            location=name,
            hint=f"name its files by a pattern, such as '{Path(glob.escape(name)) / '*.*'}', or rename them to end in "
            f"{', '.join(_KINDS)}, possibly followed by .gz or .zst",
        )
    return _by_path(files)


def _by_path(files: Sequence[str]) -> list[str]:
    return sorted(files, key=lambda file: Path(file).as_posix())


def _named_in_utf_8(file: str) -> str:
    """Return the path.

    Raises:
        TextError: the path is not UTF-8; records of a run are UTF-8 and can't name the file.
    """
    try:
        file.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(file).decode("utf-8", "backslashreplace")
        raise TextError("the name of this file is not UTF-8", location=shown, hint="rename the file") from None
    return file


class _Found:
    """Finds the files of one text, each once, and counts what is left out."""

    def __init__(self) -> None:
        self._left_out: Counter[str] = Counter()
        self._dead: list[str] = []
        self._repeated: list[str] = []
        self._directories: set[tuple[int, int]] = set()
        self.has_code = False  # a file of code was left out
        self.reads_code = False

    def is_repeated(self, entry: str, seen: set[object]) -> bool:
        """Return whether this file was seen before, perhaps by another path; a link and its target are one file."""
        if entry.startswith(PREFIX):
            key: object = absolute(entry)
        else:
            status = os.stat(entry)
            key = (status.st_dev, status.st_ino)
        if key in seen:
            self._repeated.append(entry)
            return True
        seen.add(key)
        return False

    def add_dead(self, path: str) -> None:
        """Note a link without a target."""
        self._dead.append(path)

    def directories(self, folder: str) -> Iterator[str]:
        """Yield a directory and all directories below it that are not hidden; each real one once."""
        for below, _ in self._listed(folder):
            yield below

    def walk(self, folder: str) -> Iterator[str]:
        """Yield the text files below a directory; with `reads_code`, also the files of code."""
        self._left_out.clear()
        self._dead.clear()
        self._directories.clear()
        for _, entries in self._listed(folder):
            for entry in entries:
                if _is_hidden(entry.name):
                    self._left_out["hidden or backup"] += 1
                elif not _is_file(entry):
                    if entry.is_symlink() and not os.path.exists(entry.path):
                        self.add_dead(entry.path)
                    else:
                        self._left_out["sockets, pipes or devices"] += 1
                elif not self._is_read(entry.name):
                    self.has_code = self.has_code or has_code_ending(entry.name)
                    self._left_out[Path(entry.name).suffix.lower() or "without an extension"] += 1
                elif _is_blank(entry):
                    self._left_out["empty or blank"] += 1
                else:
                    yield str(Path(entry.path))

    def _is_read(self, name: str) -> bool:
        return _is_text_name(name) or (self.reads_code and has_code_ending(name))

    def _listed(self, folder: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """Yield each directory with its entries that are no directories; linked directories come last."""
        waiting, linked = [folder], list[str]()
        while waiting or linked:
            at = waiting.pop() if waiting else linked.pop(0)
            try:
                status = os.stat(at)
                if (status.st_dev, status.st_ino) in self._directories:
                    continue
                self._directories.add((status.st_dev, status.st_ino))
                with os.scandir(at) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                message = f"can't read this directory: {error.strerror or error}"
                hint = "make it readable, or name the other files by a pattern"
                raise TextError(message, location=at, hint=hint) from error
            for entry in filter(_is_directory, entries):
                if _is_hidden(entry.name):
                    self._left_out["hidden directories"] += 1
                else:
                    (linked if entry.is_symlink() else waiting).append(entry.path)
            yield at, [entry for entry in entries if not _is_directory(entry)]

    def warnings(self, name: str) -> tuple[str, ...]:
        """Return what was left out, in words."""
        where = f" of {name}" if name else ""
        warnings: list[str] = []
        if self._left_out:
            counts = ", ".join(f"{number:,} {what}" for what, number in self._left_out.most_common())
            warnings.append(f"left out{where}: {counts}")
        if self._dead:
            warnings.append(f"left out{where}, links without a target: {join_names(self._dead)}")
        if self._repeated:
            warnings.append(f"left out{where}, named or linked twice: {join_names(self._repeated)}")
        return tuple(warnings)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_blank(entry: os.DirEntry[str]) -> bool:
    """Return whether a file has no bytes, or is a small one of white space."""
    if entry.stat().st_size > _MAX_BLANK:
        return False
    try:
        return not Path(entry.path).read_bytes().strip()
    except OSError:  # reading the text reports it
        return False


def _is_hidden(name: str) -> bool:
    """Return whether a name is hidden, a backup, or the resource folder of a macOS archive."""
    return name.startswith(".") or name.endswith("~") or name == "__MACOSX"


def _match_pattern(name: str, found: _Found) -> list[str]:
    """Return the files that a pattern matches.

    Raises:
        TextError: it matches none, or the name is no pattern.
    """
    if os.path.islink(name):
        message = f"this link has no target: {os.readlink(name)}"
        raise TextError(message, location=name, hint="name the file itself, or restore the target of the link")
    if _PATTERN.search(name):
        matches = list(dict.fromkeys(_glob(name, found)))
        files = [file for file in matches if os.path.isfile(file)]
        for file in matches:
            if os.path.islink(file) and not os.path.exists(file):
                found.add_dead(file)
        if files:
            return _by_path(files)
        hint = "check the pattern; ** matches any depth"
        if "[" in name:
            hint += f"; where [ is part of a name, quote the pattern and write [[]: '{name.replace('[', '[[]')}'"
        raise TextError("no file matches this pattern", location=name, hint=hint)
    if is_spooled(name):
        message = "the copy of standard input is no longer in the cache"
        raise TextError(message, location=name, hint="restore this file, or start a new run")
    raise TextError("no such file or directory", location=name, hint="check the path")


def _glob(pattern: str, found: _Found) -> Iterator[str]:
    """Yield the matches of a pattern. `glob` alone follows a link to its own directory up to 40 times."""
    steps = Path(pattern).parts
    if "**" not in steps:
        yield from glob.iglob(pattern)
        return
    at = steps.index("**")
    before, after = steps[:at], steps[at + 1 :] or ("*",)
    for base in glob.iglob(str(Path(*before))) if before else (".",):
        if not os.path.isdir(base):
            continue
        for folder in _Found().directories(base):
            yield from _glob(str(Path(glob.escape(folder), *after)), found)
