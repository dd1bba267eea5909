"""What every test stands on: a cache of its own and quiet threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from unmask.core.files import atomic_directory
from unmask.data.shards import SHARD_TOKENS, ShardWriter, finish_folder

# Checkpoints are synced to the disk: 150 times in the smallest run, which costs nothing in memory.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

if "PYTEST_XDIST_WORKER" in os.environ:  # `make test`: one process a core; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token shards go to a folder of this session, shared by its tests, never to the person's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


SENTENCES = (
    "the cat sat on the mat and looked at the moon",
    "a dog ran over the hill to meet the old man",
    "she gave him a book about the birds of the north",
    "the ship came home with salt and silver and wine",
    "we walked along the river until the light was gone",
)


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: 160 documents of 1 to 9 sentences between blank lines."""
    documents = [
        " ".join(f"{SENTENCES[(i * 7 + j * 3) % 5]} {i % 13} times ." for j in range(1 + i % 9)) for i in range(160)
    ]
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


EncodedChunk = tuple[Any, Any, int, int, bool]  # ids, token flags, characters, unknown characters, is last


class WriteShards(Protocol):
    """Writes encoded chunks of documents as a folder of shards."""

    def __call__(
        self,
        folder: Path,
        chunks: Iterable[EncodedChunk],
        vocabulary: int,
        tokenizer_fingerprint: str,
        shard_tokens: int = SHARD_TOKENS,
        batch: int = 1,
    ) -> None: ...


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    """Writes a folder of shards, `batch` chunks at a time."""

    def write(
        folder: Path,
        chunks: Iterable[EncodedChunk],
        vocabulary: int,
        tokenizer_fingerprint: str,
        shard_tokens: int = SHARD_TOKENS,
        batch: int = 1,
    ) -> None:
        given = list(chunks)
        with atomic_directory(folder) as aside:
            writer = ShardWriter(aside / "made", vocabulary, shard_tokens)
            with writer.closing():
                for first in range(0, len(given), batch):
                    ids, flags, characters, unknown, is_last = zip(*given[first : first + batch], strict=True)
                    writer.write(
                        np.concatenate(ids).astype(np.int64),
                        np.concatenate(flags),
                        np.array([len(one) for one in ids]),
                        np.array(characters),
                        np.array(unknown),
                        np.array(is_last),
                    )
                files = writer.finish()
            finish_folder(aside, [files], vocabulary, tokenizer_fingerprint)

    return write
