"""Room card: a packed table as it was before it was packed.

Comes in: a .parquet file, perhaps packed as .gz or .zst. Goes out: a file that can be read from its end, where a
Parquet table says what it holds: itself, or what it unpacks to, kept in the cache. Called by: arrow, sources.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

from unmask.store import file_digest, saying_where
from unmask.text.cache import default_cache
from unmask.text.streams import packing, unpacked

FOLDER: Final = "unpacked"  # of the cache


def seekable(path: Path) -> Path:
    """The file itself where it is not packed; else a file of the cache that is called after its packed content.

    Raises:
        TextError: it is damaged, cut short or can't be read.
        StoreError: the cache can't be written.
    """
    if not packing(path):
        return path
    state = path.stat()
    kept = default_cache() / FOLDER / f"{_digest(path, state.st_mtime_ns, state.st_size)}.parquet"
    if not kept.is_file():
        with saying_where(kept.parent):
            kept.parent.mkdir(parents=True, exist_ok=True)
            aside = kept.with_name(f".{os.getpid()}-{kept.name}")
            try:
                with aside.open("wb") as file:
                    file.writelines(unpacked(path))
                os.replace(aside, kept)
            finally:
                aside.unlink(missing_ok=True)
    return kept


@functools.lru_cache(maxsize=64)
def _digest(path: Path, changed_ns: int, size: int) -> str:  # pyright: ignore[reportUnusedParameter]
    """Reckoned once for a file that stays as it is: each part asks for it."""
    return file_digest(path)
