"""Shards: what was written is what is read, and damage is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from unmask.core.errors import DamagedError
from unmask.core.files import write_manifest
from unmask.core.types import SENTENCE_START
from unmask.data.shards import Shards, open_shards

VOCABULARY = 70_000
Chunk = tuple[np.ndarray, np.ndarray, int, int, bool]


def encoded(lengths: list[int], vocabulary: int, pieces: int = 1, seed: int = 0) -> list[Chunk]:
    """Documents of these lengths, each in so many chunks."""
    generator = np.random.default_rng(seed)
    chunks: list[Chunk] = []
    for length in lengths:
        ids, flags = generator.integers(0, vocabulary, length), generator.integers(0, 8, length).astype(np.uint8)
        for piece in range(pieces):
            first, last = piece * length // pieces, (piece + 1) * length // pieces
            chunks.append((ids[first:last], flags[first:last], last - first + 1, first % 2, piece == pieces - 1))
    return chunks


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    shard_tokens=st.sampled_from([1, 7, 16, 1000]),
    pieces=st.integers(1, 3),
    batch=st.sampled_from([1, 2, 5, 100]),
    vocabulary=st.sampled_from([2, 65_536, VOCABULARY]),
)
def test_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    write_shards: Any,
    lengths: list[int],
    shard_tokens: int,
    pieces: int,
    batch: int,
    vocabulary: int,
) -> None:
    folder = tmp_path_factory.mktemp("round") / "shards"
    chunks = encoded(lengths, vocabulary, pieces)
    write_shards(folder, chunks, vocabulary, "print", shard_tokens, batch)
    shards = open_shards(folder, verify=True)
    assert shards.documents == len(lengths) and shards.lengths.tolist() == lengths and shards.tokens == sum(lengths)
    assert shards.vocabulary == vocabulary and shards.tokenizer_fingerprint == "print"
    assert shards.characters == sum(chunk[2] for chunk in chunks)
    assert shards.unknown_characters == sum(chunk[3] for chunk in chunks)
    everything = [id for chunk in chunks for id in chunk[0].tolist()]
    assert shards.token_counts.tolist() == np.bincount(np.array(everything, dtype=int), minlength=vocabulary).tolist()
    for document, length in enumerate(lengths):
        own = chunks[document * pieces : (document + 1) * pieces]
        ids, flags = (np.concatenate([chunk[column] for chunk in own]) for column in (0, 1))
        for first, last in ((0, length), (length // 3, length), (length // 2, length // 2)):
            assert shards.ids(document, first, last).tolist() == ids[first:last].tolist()
            assert shards.token_flags(document, first, last).tolist() == flags[first:last].tolist()
        assert shards.ids(document, 0, length).dtype == (np.uint16 if vocabulary <= 65_536 else np.uint32)
        sentences = int(((flags[1:] & SENTENCE_START) != 0).sum()) + bool(length)
        assert shards.sentences[document] == sentences, "the first token starts a sentence, whatever its flag"


def test_shards_are_plain_safetensors(tmp_path: Path, write_shards: Any) -> None:
    chunks = encoded([10, 20], 100)
    write_shards(tmp_path / "shards", chunks, 100, "print", 16)
    read = [load_file(file) for file in sorted((tmp_path / "shards").glob("shard-*.safetensors"))]
    ids = np.concatenate([tensors["ids"] for tensors in read])
    assert ids.tolist() == [id for chunk in chunks for id in chunk[0].tolist()] and len(read) == 2


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "arrays.safetensors", "index.json", "digests.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_named(tmp_path: Path, write_shards: Any, name: str, harm: str, verify: bool) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([30], 100), 100, "print")
    data = bytearray((folder / name).read_bytes())
    if harm == "remove":
        (folder / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data if harm == "flip" else data[: len(data) // 2])
    with pytest.raises(DamagedError) as caught:
        open_shards(folder, verify=verify)
    # A flipped bit in a digest shows in the file that it no longer fits.
    assert str(folder) in caught.value.location and (name in caught.value.location or name == "digests.json")


def test_large_files_are_compared_by_size_unless_all_is_verified(tmp_path: Path, write_shards: Any) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([600_000], 100), 100, "print")
    shard = folder / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    assert open_shards(folder).tokens == 600_000
    with pytest.raises(DamagedError) as caught:
        open_shards(folder, verify=True)
    assert caught.value.location == str(shard)
    shard.write_bytes(data[:-1])
    with pytest.raises(DamagedError) as caught:
        open_shards(folder)
    assert caught.value.location == str(shard)


def test_ids_beyond_the_vocabulary_are_damage(tmp_path: Path, write_shards: Any) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([30], 100, seed=1), 100, "print")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"vocabulary": 100', '"vocabulary": 50'))
    write_manifest(folder)
    with pytest.raises(DamagedError, match="invalid column `token_counts`"):
        open_shards(folder)
    shutil.rmtree(folder)
    write_shards(folder, encoded([30], 100, seed=1), 100, "print")
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:256] + (100).to_bytes(2, "little") + shard.read_bytes()[258:])
    write_manifest(folder)
    with pytest.raises(DamagedError, match="less than the vocabulary size") as caught:
        open_shards(folder, verify=True)
    assert "shard-00000" in caught.value.location


def test_another_format_is_refused(tmp_path: Path, write_shards: Any) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([30], 100), 100, "print")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"unmask-shards-3"', '"unmask-shards-2"'))
    write_manifest(folder)
    with pytest.raises(DamagedError, match="another version: got unmask-shards-2") as caught:
        open_shards(folder)
    assert "remove" in caught.value.hint


def test_a_truncated_shard_with_a_new_manifest_is_damage(tmp_path: Path, write_shards: Any) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([3000], 100), 100, "print")
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    write_manifest(folder)
    with pytest.raises(DamagedError, match="can't read this shard"):
        open_shards(folder).ids(0, 0, 1)
    with pytest.raises(DamagedError, match="can't read this shard"):
        Shards(folder).check_ids()
