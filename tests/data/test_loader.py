"""Loader: one integer finds the place again, and dealing loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.core.types import SPECIAL, SampleSpec, TokenSpan
from unmask.data.loader import SampleStream, StageLoader, assign_microbatches, read_sample
from unmask.data.sampling import WindowSampler
from unmask.data.shards import Shards, open_shards
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["first text.", "second, which is longer than the first text.", "", "x", "third " * 60]


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Tokenizer, write_shards: Any) -> Shards:
    encoded = tokenizer.encode_batch(TEXTS, "spaces")
    passages = [(one.ids, one.marks, len(text), 0, True) for one, text in zip(encoded, TEXTS, strict=True)]
    write_shards(tmp_path / "shards", passages, tokenizer.size, tokenizer.fingerprint, shard_tokens=64)
    return open_shards(tmp_path / "shards")


@pytest.fixture(params=[True, False], ids=["special", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if request.param else ("[UNK]", "[MASK]")
    return train_tokenizer(TEXTS, CharacterConfig(special_tokens=specials))


def test_a_sample_is_read_between_special_tokens(shards: Shards, tokenizer: Tokenizer) -> None:
    text = read_sample(shards, SampleSpec(3, 5, (TokenSpan(1, 8, 20),)), tokenizer)
    assert (text.epoch, text.number) == (3, 5)
    assert tokenizer.decode(text.ids) == TEXTS[1][8:20]
    if tokenizer.cls_sep_ids:
        assert (text.ids[0], text.ids[-1]) == tokenizer.cls_sep_ids and text.token_flags[0] == text.token_flags[
            -1
        ] == SPECIAL
    assert len(text.ids) == len(text.token_flags) == 12 + (2 if tokenizer.cls_sep_ids else 0)


def test_a_cursor_is_all_that_is_kept(shards: Shards, tokenizer: Tokenizer) -> None:
    sampler = WindowSampler(shards.lengths, 10, seed=1)
    count = sampler.count(0)
    order = [spec for epoch in range(4) for spec in sampler.specs(epoch, 0, count)]
    stream, cursor, taken = SampleStream(shards, sampler, tokenizer), 0, list[SampleSpec]()
    for tokens in [1, 30, 100, 7, 3000, 12]:
        specs, after = SampleStream(shards, sampler, tokenizer).take(cursor, tokens)
        assert (specs, after) == stream.take(cursor, tokens)
        lengths = stream.lengths(specs)
        assert sum(lengths) >= tokens > sum(lengths[:-1])
        taken, cursor = taken + specs, after
    assert cursor == len(taken) and len(taken) > count
    assert (
        taken == [spec for epoch in range(len(taken) // count + 1) for spec in sampler.specs(epoch, 0, count)][:cursor]
    )
    assert taken[: len(order)] == order[: len(taken)]


def test_a_batch_holds_the_samples_in_order(shards: Shards, tokenizer: Tokenizer) -> None:
    stream = SampleStream(shards, WindowSampler(shards.lengths, 10, seed=1), tokenizer)
    specs, _ = stream.take(0, 50)
    batch = stream.batch(specs)
    assert batch.num_samples == len(specs) and len(batch.ids_T) == sum(stream.lengths(specs))
    assert batch.sample_keys_B2.tolist() == [[spec.epoch, spec.number] for spec in specs]


@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.just(16)), max_size=60),
    ranks=st.integers(1, 5),
    micro_tokens=st.integers(1, 100),
)
def test_every_sample_is_in_one_micro_batch(lengths: list[int], ranks: int, micro_tokens: int) -> None:
    assigned = assign_microbatches(lengths, ranks, micro_tokens)
    assert len(assigned) == ranks and len({len(micros) for micros in assigned}) == 1
    everyone = [micro for micros in assigned for micro in micros]
    assert sorted(index for micro in everyone for index in micro) == list(range(len(lengths)))
    for micro in everyone:
        assert len(micro) == 1 or sum(lengths[index] for index in micro) <= micro_tokens
        assert [(-lengths[index], index) for index in micro] == sorted((-lengths[index], index) for index in micro)
    if any(not micro for micro in everyone):
        assert all(len(micro) <= 1 for micro in everyone)
    assert assigned == assign_microbatches(lengths, ranks, micro_tokens)


def test_micro_batches_are_even_and_few() -> None:
    lengths = np.random.default_rng(0).integers(5, 130, 1000).tolist()
    assigned = assign_microbatches(lengths, 4, 4096)
    loads = [[sum(lengths[index] for index in micro) for micro in micros] for micros in assigned]
    assert len(assigned[0]) == -(-sum(lengths) // (4 * 4096))
    assert max(map(max, loads)) - min(map(min, loads)) < 130
    assert [len(micros) for micros in assign_microbatches([60] * 100, 1, 100)] == [100]


def test_a_thousand_ranks_share_an_epoch(tmp_path: Path, write_shards: Any) -> None:
    """Each sample goes to one rank, whatever their number, and all ranks get about as many tokens."""
    tokenizer = train_tokenizer(TEXTS, CharacterConfig())
    lengths = np.random.default_rng(0).integers(1, 1000, 2500).tolist()
    ids = np.full(1000, tokenizer.regular_token_ids[0])
    chunks = [(ids[:length], np.zeros(length, dtype=np.uint8), length, 0, True) for length in lengths]
    write_shards(tmp_path / "shards", chunks, tokenizer.size, tokenizer.fingerprint, batch=1000)
    shards = open_shards(tmp_path / "shards")
    sampler = WindowSampler(shards.lengths, 126, seed=1)
    stream, ranks, longest = SampleStream(shards, sampler, tokenizer), 1024, 128
    loader = StageLoader(shards, tokenizer, sampler, micro_tokens=512)
    cursor, seen = 0, list[int]()
    while cursor < sampler.count(0):
        specs, after = stream.take(cursor, ranks * 512)
        assigned = assign_microbatches(stream.lengths(specs), ranks, 512)
        numbers = [[specs[index].number for micro in micros for index in micro] for micros in assigned]
        loads = [sum(stream.lengths([specs[index] for micro in micros for index in micro])) for micros in assigned]
        assert max(loads) - min(loads) <= longest and max(loads) < 1.2 * sum(loads) / ranks
        for rank in (0, 511, 1023):
            batches, rank_after = loader.step(cursor, ranks * 512, rank, ranks)
            assert [number for batch in batches for _, number in batch.sample_keys_B2.tolist()] == numbers[rank]
            assert rank_after == after
        taken = [specs[index] for micros in assigned for micro in micros for index in micro]
        seen += [spec.number for spec in taken if spec.epoch == 0]
        cursor = after
    assert sorted(seen) == list(range(sampler.count(0)))
