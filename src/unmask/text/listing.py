"""Room card: what a person named as text, as files and data sets.

Comes in: names: a file, a folder, a pattern, `dataset:NAME`, each perhaps with a weight (`TEXT:0.7`). Goes out: the
files and data sets that are meant, in a fixed order, with the weight of each name; or a TextError. Called by: sources,
opening, origin.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from unmask.errors import TextError
from unmask.text.datasets import PREFIX, is_saved, parse
from unmask.text.streams import packing

Kind = Literal["text", "jsonl", "csv", "tsv", "parquet", "dataset"]

STANDARD_INPUT: Final = "-"
SPOOL: Final = "standard-input"  # the folder of the cache that keeps what came by standard input
_KINDS: Final[dict[str, Kind]] = {
    ".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"
}  # fmt: skip
_WEIGHT: Final = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_PATTERN: Final = re.compile(r"[*?\[]")


class Named(NamedTuple):
    """One of the names: what is meant by it."""

    name: str
    weight: float  # 0.0: none was given
    entries: tuple[str, ...]  # paths of files, and dataset:NAME


def listed(texts: Sequence[str]) -> list[Named]:
    """What all names mean; weights are made to add up to 1.

    Raises:
        TextError: something isn't there, or the weights make no sense.
    """
    if not texts:
        raise TextError("no text was given", next="name a text file, or a folder with *.txt files")
    parted = [weighted(text) for text in texts]
    weights = [weight for _, weight in parted if weight is not None]
    for (name, weight), text in zip(parted, texts, strict=True):
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise TextError(f"a weight of {weight:g}", where=text, next="choose a weight above 0, as in TEXT:0.7")
        if weight is None and weights:
            mend = f"give each text one ({name}:1), or none"
            raise TextError("a text without a weight, where others have one", where=text, next=mend)
    total = sum(weights)
    return [Named(_called(name), (weight or 0.0) / (total or 1.0), _entries(name)) for name, weight in parted]


def weighted(text: str) -> tuple[str, float | None]:
    """A name and its weight, if it has one; what exists under the whole name has none."""
    found = None if os.path.lexists(text) else _WEIGHT.fullmatch(text)
    if not found or found[1] == PREFIX[:-1] or (os.name == "nt" and len(found[1]) == 1):  # dataset:7; C:7
        return text, None
    return found[1], float(found[2])


def absolute(text: str) -> str:
    """The same name, valid in any working folder."""
    name, weight = weighted(text)
    suffix = "" if weight is None else text[len(name) :]
    if name.startswith(PREFIX):
        folder, _, split = name.removeprefix(PREFIX).partition("@")
        if not os.path.isdir(folder):
            return text
        return PREFIX + os.path.abspath(folder) + (f"@{split}" if split else "") + suffix
    return text if name == STANDARD_INPUT else os.path.abspath(name) + suffix


def is_name(text: str) -> bool:
    """Whether this can only be meant as a name: standard input, a data set, a known ending."""
    name, _ = weighted(text)
    ending = Path(name.removesuffix(packing(Path(name)))).suffix.lower()
    return name == STANDARD_INPUT or name.startswith(PREFIX) or ending in _KINDS or bool(packing(Path(name)))


def kind_of(entry: str) -> Kind:
    """What a file is, by its name; one of an unknown ending is plain text."""
    if entry.startswith(PREFIX):
        return "dataset"
    path = Path(entry)
    return _KINDS.get(Path(path.stem if packing(path) else path.name).suffix.lower(), "text")


def _called(name: str) -> str:
    return "standard input" if _is_spooled(name) else name


def _is_spooled(name: str) -> bool:
    return Path(name).parent.name == SPOOL


def _entries(name: str) -> tuple[str, ...]:
    """The file itself, the text files below a folder, what a pattern matches, or a data set."""
    if name.startswith(PREFIX):
        parse(name)
        return (name,)
    if os.path.isfile(name):  # Path.is_file raises where a name is too long to be one
        return (name,)
    if not os.path.exists(name):
        return _absent(name)
    folder = Path(name)
    if not folder.is_dir():
        raise TextError("neither a file nor a folder", where=name, next="give a text file")
    if is_saved(folder):
        return (PREFIX + name,)
    found = [str(file) for file in folder.rglob("*") if file.is_file() and is_name(file.name)]
    if not found:
        mend = f"name its files, or give them names that end in {', '.join(_KINDS)} (or these with .gz or .zst)"
        raise TextError("this folder holds no text", where=name, next=mend)
    return tuple(sorted(found, key=lambda file: Path(file).as_posix()))


def _absent(name: str) -> tuple[str, ...]:
    if _PATTERN.search(name):
        found = [file for file in glob.glob(name, recursive=True) if os.path.isfile(file)]
        if found:
            return tuple(sorted(found, key=lambda file: Path(file).as_posix()))
        raise TextError("no file matches this pattern", where=name, next="check it; ** stands for folders of any depth")
    if _is_spooled(name):
        what = "what came by standard input is no longer in the cache"
        raise TextError(what, where=name, next="bring this file back, or start anew from the text")
    raise TextError("there is no such file or folder", where=name, next="check the path")
