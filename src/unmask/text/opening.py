"""Room card: the source that a person's words mean.

Comes in: what was named as text, TextSettings. Goes out: a FileSource; a SourceRecipe, from which another process makes
the same; what came by standard input, kept in the cache. Called by: corpus, origin, eval.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from unmask.errors import TextError
from unmask.store import saying_where
from unmask.text.cache import default_cache
from unmask.text.listing import SPOOL, STANDARD_INPUT, weighted
from unmask.text.settings import TextSettings
from unmask.text.sources import FileSource

_CHUNK_BYTES: Final = 1 << 20
_PACKED: Final = ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst"))


@dataclass(frozen=True)
class SourceRecipe:
    """All that it takes to open a source again, in this process or another."""

    paths: tuple[str, ...]  # FileSource.paths
    settings: TextSettings

    def open(self) -> FileSource:
        """The source."""
        return open_source(self.paths, self.settings)


def open_source(paths: Sequence[str | Path], settings: TextSettings) -> FileSource:
    """The source of these files, folders, patterns and data sets; of standard input where one of them is "-".

    Standard input is read to its end here, into a file of the cache that is called after its content.

    Raises:
        TextError: standard input is empty, asked for twice, or meant for several processes.
        StoreError: the cache can't be written.
    """
    texts = [path.as_posix() if isinstance(path, Path) else path for path in paths]
    piped = [text for text in texts if weighted(text)[0] == STANDARD_INPUT]
    if len(piped) > 1:
        raise TextError("standard input can be read once only", where=" ".join(piped), next="name - once")
    if piped:
        kept = str(_keep_standard_input())
        texts = [kept + text.removeprefix(STANDARD_INPUT) if text in piped else text for text in texts]
    return FileSource(texts, settings.rule, settings.errors, settings.field, settings.unicode)


def _keep_standard_input() -> Path:
    """Copy standard input to the cache; the same content is kept once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TextError(
            "several processes can't share standard input", where=STANDARD_INPUT, next="save the text as a file"
        )
    if sys.stdin is None:
        raise TextError("there is no standard input", where=STANDARD_INPUT, next="name a text file")
    folder = default_cache() / SPOOL
    with saying_where(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{os.getpid()}"
        try:
            with aside.open("wb") as file:
                name = _copied(sys.stdin.buffer, file)
            os.replace(aside, folder / name)
        finally:
            aside.unlink(missing_ok=True)
    return folder / name


def _copied(stream: BinaryIO, aside: BinaryIO) -> str:
    """Copy all of a stream; the name of what it holds."""
    state, first = hashlib.blake2b(digest_size=16), b""
    while chunk := stream.read(_CHUNK_BYTES):
        first = first or chunk[:4]
        state.update(chunk)
        aside.write(chunk)
    if not first:
        raise TextError("standard input is empty", where=STANDARD_INPUT, next="pipe text into it: cat notes.txt | ...")
    packed = next((ending for magic, ending in _PACKED if first.startswith(magic)), "")
    return f"{state.hexdigest()}.txt{packed}"
