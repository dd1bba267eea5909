"""Random numbers without state: test vectors, independence of shape, bijections."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unmask.core import rng


def test_vectors() -> None:
    """A change of one bit changes every run."""
    assert rng.bits(17, "mask", 0, [0, 1, 2], 5).tolist() == [
        17517898784315722805, 1687403782769043525, 9162534925413891649
    ]  # fmt: skip
    assert rng.permute(np.arange(10), 10, 3, "order", 0).tolist() == [5, 3, 9, 0, 4, 2, 1, 6, 8, 7]


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.lists(st.integers(0, 2**31), min_size=1, max_size=20))
def test_single_draws_equal_batched_draws(seed: int, epoch: int, offsets: list[int]) -> None:
    together = rng.uniform(seed, "mask", epoch, 3, offsets)
    assert together.tolist() == [rng.uniform(seed, "mask", epoch, 3, offset)[0] for offset in offsets]
    assert ((together >= 0) & (together < 1)).all()


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 50))
def test_permute_is_a_bijection(count: int, seed: int, epoch: int) -> None:
    assert sorted(rng.permute(np.arange(count), count, seed, "order", epoch)) == list(range(count))


def test_streams_epochs_and_seeds_differ() -> None:
    base = rng.bits(1, "mask", 0, np.arange(1000))
    for other in (rng.bits(2, "mask", 0, np.arange(1000)), rng.bits(1, "action", 0, np.arange(1000)),
                  rng.bits(1, "mask", 1, np.arange(1000))):  # fmt: skip
        assert not (base == other).any()


def test_uniform_is_uniform_and_below_is_below() -> None:
    draws = rng.uniform(5, "mask", np.arange(200_000))
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    chi_squared = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_squared < 49 + 6 * (2 * 49) ** 0.5
    whole = rng.below(7, 5, "random", np.arange(70_000))
    assert set(whole.tolist()) == set(range(7)) and abs(np.bincount(whole) - 10_000).max() < 600


def test_orders_of_two_epochs_share_no_pattern() -> None:
    first, second = (rng.permute(np.arange(5000), 5000, 9, "order", epoch) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06 and (first == second).sum() < 12
