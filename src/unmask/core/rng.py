"""Room card: one seed, draws without state.

Comes in: a seed, the name of a stream and any integers that say which draw is meant (epoch, sample, offset, ...).
Goes out: that draw. The same question has the same answer on every machine, in any order, in any process, whatever was
drawn before: nothing is made, saved or advanced. Called by: masking, sampler, loader, weight initialisation, dropout.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014) applied after each absorbed integer; test vectors
stand in tests/test_rng.py, and changing one bit of them changes every run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 4


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def bits(seed: int, stream: str, *which: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each combination of `which`, broadcast together; shape is theirs (at least 1-D)."""
    name = stream.encode()
    words = [int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8)]
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    for word in (*words, len(name), *which):
        # uint64 arithmetic wraps, which is what a hash wants; negative integers are taken modulo 2**64.
        value = np.atleast_1d(np.asarray(word)).astype(np.uint64)
        state = _mix((state + _GOLDEN) ^ _mix(value + _GOLDEN))
    return state


def uniform(seed: int, stream: str, *which: ArrayLike) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), multiples of 2**-53, for each combination of `which`."""
    return (bits(seed, stream, *which) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(limit: ArrayLike, seed: int, stream: str, *which: ArrayLike) -> NDArray[np.int64]:
    """Whole numbers in [0, limit), limit < 2**32, for each combination of `which` (multiply-shift, bias < 2**-32)."""
    high = bits(seed, stream, *which) >> np.uint64(32)
    return ((high * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def integer(seed: int, stream: str, *which: int) -> int:
    """One draw as a Python integer in [0, 2**63): a seed for a generator that is not ours."""
    return int(bits(seed, stream, *which)[0] >> np.uint64(1))


def permute(index_N: ArrayLike, count: int, seed: int, stream: str, *which: int) -> NDArray[np.int64]:
    """Where each index of [0, count) stands in a random order of [0, count), without a table.

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway 2002), so the map
    is a bijection of [0, count) and costs at most four tries on average.
    """
    half = max(1, ((max(count - 1, 1)).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = bits(seed, stream, *which, np.arange(_FEISTEL_ROUNDS))
    value = np.atleast_1d(np.asarray(index_N)).astype(np.uint64)
    assert value.size == 0 or int(value.max()) < count, "an index outside the order"
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(count)
    return value.astype(np.int64)
