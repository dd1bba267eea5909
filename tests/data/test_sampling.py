"""Windows: every token once in an epoch, as many windows in each."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.types import SampleSpec
from unmask.data.sampling import LONG, WindowSampler, frozen

LENGTHS = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 400)), min_size=1, max_size=12)


def covered(cuts: list[SampleSpec], lengths: list[int]) -> list[np.ndarray]:
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for cut in cuts:
        ((document, first, last, segment),) = cut.spans
        assert segment == 0 and first < last
        seen[document][first:last] += 1
    return seen


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 20), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**20))
def test_every_token_stands_in_exactly_one_window(lengths: list[int], length: int, seed: int, epoch: int) -> None:
    windows = WindowSampler(np.array(lengths), length, seed)
    count = windows.count(epoch)
    assert count == windows.count(0) == sum(-(-tokens // length) for tokens in lengths)
    cuts = windows.cuts(epoch, 0, count)
    assert all((seen == 1).all() for seen in covered(cuts, lengths))
    assert all(0 < cut.tokens <= length and cut.epoch == epoch for cut in cuts)
    assert sorted(cut.number for cut in cuts) == list(range(count))
    if count:
        place = seed % count
        assert windows.cut(epoch, place) == cuts[place]
        assert windows.cuts(epoch, place // 2, place) == cuts[place // 2 : place]


def test_many_documents_are_found_by_counting() -> None:
    lengths = np.random.default_rng(1).integers(0, 40, 1000)
    lengths[100:400] = 0
    windows = WindowSampler(lengths, 7, seed=1)
    cuts = sorted(windows.cuts(0, 0, windows.count(0)), key=lambda cut: cut.number)
    assert all((seen == 1).all() for seen in covered(cuts, lengths.tolist()))
    assert [cut.spans[0][:2] for cut in cuts] == sorted(cut.spans[0][:2] for cut in cuts)
    assert len(cuts) == int((-(-lengths // 7)).sum())


@given(lengths=LENGTHS, length=st.integers(1, 20))
def test_frozen_windows_cover_everything_in_order(lengths: list[int], length: int) -> None:
    cuts = frozen(np.array(lengths), length)
    assert all((seen == 1).all() for seen in covered(cuts, lengths))
    assert [cut.number for cut in cuts] == list(range(len(cuts)))
    spans = [cut.spans[0] for cut in cuts]
    assert spans == sorted(spans) and all(cut.tokens <= length for cut in cuts)


def test_short_documents_give_equal_pieces_and_long_ones_move() -> None:
    windows = WindowSampler(np.array([25, 10 * LONG - 4]), 10, seed=3)
    epochs = [sorted(windows.cuts(epoch, 0, windows.count(epoch)), key=lambda cut: cut.number) for epoch in range(30)]
    assert {tuple(cut.tokens for cut in epoch[:3]) for epoch in epochs} == {(8, 8, 9)}
    borders = {tuple(cut.spans[0].last for cut in epoch[3:]) for epoch in epochs}
    assert len(borders) == 5  # an offset from 0 to the 4 tokens that 16 windows hold more than the document
    for epoch in epochs:
        assert all(cut.tokens == 10 for cut in epoch[4:-1])


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    lengths_N = np.full(50, 7)
    orders = {
        tuple(cut.number for cut in WindowSampler(lengths_N, 10, seed).cuts(epoch, 0, 50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
