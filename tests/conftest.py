"""What every test stands on: a cache of its own and quiet threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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
