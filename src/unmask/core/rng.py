"""Counter-based random numbers: a draw is a hash of a seed, the name of a stream and integers.

The integers identify the draw: epoch, sample, offset, … The same arguments give the same number on every machine,
in any order and in any process. There is no state to create, save or advance.

The hash is the finalizer of SplitMix64 (Steele, Lea and Flood 2014), applied after each absorbed integer. The test
vectors are in tests/core/test_rng.py; a change of one bit in them changes every run.
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


def bits(seed: int, stream: str, *counters: ArrayLike) -> NDArray[np.uint64]:
    """Return 64 random bits for each combination of `counters`, broadcast together to at least one dimension."""
    name = stream.encode()
    words = [int.from_bytes(name[i : i + 8], "little") for i in range(0, len(name), 8)]
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    for word in (*words, len(name), *counters):
        # uint64 arithmetic wraps, as the hash needs; negative integers are taken modulo 2**64.
        value = np.atleast_1d(np.asarray(word)).astype(np.uint64)
        state = _mix((state + _GOLDEN) ^ _mix(value + _GOLDEN))
    return state


def uniform(seed: int, stream: str, *counters: ArrayLike) -> NDArray[np.float64]:
    """Return uniform draws in [0, 1), multiples of 2**-53, for each combination of `counters`."""
    return (bits(seed, stream, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(limit: ArrayLike, seed: int, stream: str, *counters: ArrayLike) -> NDArray[np.int64]:
    """Return integers in [0, limit), limit < 2**32, for each combination of `counters`. The bias is below 2**-32."""
    high = bits(seed, stream, *counters) >> np.uint64(32)  # multiply-shift
    return ((high * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def integer(seed: int, stream: str, *counters: int) -> int:
    """Return one draw as a Python integer in [0, 2**63), to seed a generator of another library."""
    return int(bits(seed, stream, *counters)[0] >> np.uint64(1))


def permute(index_N: ArrayLike, count: int, seed: int, stream: str, *counters: int) -> NDArray[np.int64]:
    """Return the position of each index in a random order of [0, count), without a table.

    A Feistel network over the next even power of two is applied until the result is below `count` (Black and Rogaway
    2002). The map is a bijection of [0, count) and takes at most four rounds on average.
    """
    half = max(1, ((max(count - 1, 1)).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = bits(seed, stream, *counters, np.arange(_FEISTEL_ROUNDS))
    value = np.atleast_1d(np.asarray(index_N)).astype(np.uint64)
    assert value.size == 0 or int(value.max()) < count, "index out of range"
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(count)
    return value.astype(np.int64)
