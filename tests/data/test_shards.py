"""Shards: what was written is what is read, and damage is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from unmask.core.errors import DamagedError
from unmask.core.files import write_manifest
from unmask.data.shards import EncodedPassage, Shards, open_shards, write_shards

VOCABULARY = 70_000


def encoded(lengths: list[int], vocabulary: int, pieces: int = 1, seed: int = 0) -> list[EncodedPassage]:
    """Documents of these lengths, each in so many passages."""
    generator = np.random.default_rng(seed)
    passages: list[EncodedPassage] = []
    for length in lengths:
        ids, marks = generator.integers(0, vocabulary, length), generator.integers(0, 8, length).astype(np.uint8)
        for piece in range(pieces):
            first, last = piece * length // pieces, (piece + 1) * length // pieces
            passages.append(
                EncodedPassage(ids[first:last], marks[first:last], last - first + 1, first % 2, piece == pieces - 1)
            )
    return passages


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    shard_tokens=st.sampled_from([1, 7, 16, 1000]),
    pieces=st.integers(1, 3),
    vocabulary=st.sampled_from([2, 65_536, VOCABULARY]),
)
def test_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, pieces: int, vocabulary: int
) -> None:
    folder = tmp_path_factory.mktemp("round") / "shards"
    passages = encoded(lengths, vocabulary, pieces)
    write_shards(folder, passages, vocabulary, "print", shard_tokens)
    shards = open_shards(folder)
    assert shards.documents == len(lengths) and shards.lengths_N.tolist() == lengths and shards.tokens == sum(lengths)
    assert shards.vocabulary == vocabulary and shards.tokenizer_fingerprint == "print"
    assert shards.characters == sum(passage.characters for passage in passages)
    assert shards.unknown_characters == sum(passage.characters_unknown for passage in passages)
    everything = [id for passage in passages for id in passage.ids.tolist()]
    assert shards.counts_V.tolist() == np.bincount(np.array(everything, dtype=int), minlength=vocabulary).tolist()
    for document, length in enumerate(lengths):
        mine = passages[document * pieces : (document + 1) * pieces]
        ids, marks = (np.concatenate([getattr(passage, name) for passage in mine]) for name in ("ids", "marks"))
        for first, last in ((0, length), (length // 3, length), (length // 2, length // 2)):
            assert shards.ids(document, first, last).tolist() == ids[first:last].tolist()
            assert shards.marks(document, first, last).tolist() == marks[first:last].tolist()
        assert shards.ids(document, 0, length).dtype == (np.uint16 if vocabulary <= 65_536 else np.uint32)


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    passages = encoded([10, 20], 100)
    write_shards(tmp_path / "shards", passages, 100, "print", 16)
    read = [load_file(file) for file in sorted((tmp_path / "shards").glob("shard-*.safetensors"))]
    ids = np.concatenate([tensors["ids"] for tensors in read])
    assert ids.tolist() == [id for passage in passages for id in passage.ids.tolist()] and len(read) == 2


def test_nothing_appears_where_writing_fails(tmp_path: Path) -> None:
    def failing() -> Iterator[EncodedPassage]:
        yield from encoded([10], 100)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shards(tmp_path / "shards", failing(), 100, "print")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "arrays.safetensors", "index.json", "digests.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_named(tmp_path: Path, name: str, harm: str) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([30], 100), 100, "print")
    data = bytearray((folder / name).read_bytes())
    if harm == "remove":
        (folder / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data if harm == "flip" else data[: len(data) // 2])
    with pytest.raises(DamagedError) as caught:
        open_shards(folder)
    # A flipped bit in a digest shows in the file that it no longer fits.
    assert str(folder) in caught.value.location and (name in caught.value.location or name == "digests.json")


def test_ids_beyond_the_vocabulary_are_damage(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([30], 100, seed=1), 100, "print")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"vocabulary": 100', '"vocabulary": 50'))
    write_manifest(folder)
    with pytest.raises(DamagedError, match="beyond the vocabulary") as caught:
        open_shards(folder)
    assert "shard-00000" in caught.value.location


def test_a_shard_cut_short_and_sealed_again_is_damage(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_shards(folder, encoded([3000], 100), 100, "print")
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DamagedError, match="not a shard that can be read"):
        Shards(folder)
