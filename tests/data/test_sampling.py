"""Windows: every token once in an epoch, as many windows in each."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.types import SampleSpec
from unmask.data.sampling import LONG_DOCUMENT_WINDOWS, WindowSampler, eval_windows

LENGTHS = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 400)), min_size=1, max_size=12)


def covered(specs: list[SampleSpec], lengths: list[int]) -> list[np.ndarray]:
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for spec in specs:
        ((document, first, last, segment),) = spec.spans
        assert segment == 0 and first < last
        seen[document][first:last] += 1
    return seen


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 20), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**20))
def test_every_token_stands_in_exactly_one_window(lengths: list[int], length: int, seed: int, epoch: int) -> None:
    windows = WindowSampler(np.array(lengths), length, seed)
    count = windows.count(epoch)
    assert count == windows.count(0) == sum(-(-tokens // length) for tokens in lengths)
    specs = windows.specs(epoch, 0, count)
    assert all((seen == 1).all() for seen in covered(specs, lengths))
    assert all(0 < spec.tokens <= length and spec.epoch == epoch for spec in specs)
    assert sorted(spec.number for spec in specs) == list(range(count))
    if count:
        place = seed % count
        assert windows.specs(epoch, place, place + 1) == [specs[place]]
        assert windows.specs(epoch, place // 2, place) == specs[place // 2 : place]


def test_many_documents_are_found_by_counting() -> None:
    lengths = np.random.default_rng(1).integers(0, 40, 1000)
    lengths[100:400] = 0
    windows = WindowSampler(lengths, 7, seed=1)
    specs = sorted(windows.specs(0, 0, windows.count(0)), key=lambda spec: spec.number)
    assert all((seen == 1).all() for seen in covered(specs, lengths.tolist()))
    assert [spec.spans[0][:2] for spec in specs] == sorted(spec.spans[0][:2] for spec in specs)
    assert len(specs) == int((-(-lengths // 7)).sum())


@given(lengths=LENGTHS, length=st.integers(1, 20))
def test_frozen_windows_cover_everything_in_order(lengths: list[int], length: int) -> None:
    specs = eval_windows(np.array(lengths), length)
    assert all((seen == 1).all() for seen in covered(specs, lengths))
    assert [spec.number for spec in specs] == list(range(len(specs)))
    spans = [spec.spans[0] for spec in specs]
    assert spans == sorted(spans) and all(spec.tokens <= length for spec in specs)


def test_short_documents_give_equal_pieces_and_long_ones_move() -> None:
    windows = WindowSampler(np.array([25, 10 * LONG_DOCUMENT_WINDOWS - 4]), 10, seed=3)
    epochs = [
        sorted(windows.specs(epoch, 0, windows.count(epoch)), key=lambda spec: spec.number) for epoch in range(30)
    ]
    assert {tuple(spec.tokens for spec in epoch[:3]) for epoch in epochs} == {(8, 8, 9)}
    borders = {tuple(spec.spans[0].last for spec in epoch[3:]) for epoch in epochs}
    assert len(borders) == 5  # an offset from 0 to the 4 tokens that 16 windows hold more than the document
    for epoch in epochs:
        assert all(spec.tokens == 10 for spec in epoch[4:-1])


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    lengths = np.full(50, 7)
    orders = {
        tuple(spec.number for spec in WindowSampler(lengths, 10, seed).specs(epoch, 0, 50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
