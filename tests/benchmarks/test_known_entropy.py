"""The best possible loss equals the sum over all texts."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "known_entropy.py"


def test_the_posterior_is_the_sum_over_all_texts() -> None:
    specification = importlib.util.spec_from_file_location("known_entropy", PROGRAM)
    assert specification is not None and specification.loader is not None
    program = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(program)
    chances, rate = program.table(3), 0.15
    first = program.stationary(chances)
    seen, masked = np.array([0, 4, 2, 1, 4, 3]), np.array([False, True, False, True, True, False])
    posterior = program.posterior(seen, masked, chances, rate)

    def shown(seen: int, original: int, masked: bool) -> float:
        when_masked = 0.8 if seen == 4 else 0.1 * (seen == original) + 0.1 / 4
        return when_masked if masked else (1 - rate) * (seen == original) + rate * when_masked

    for position in np.flatnonzero(masked):
        sums = np.zeros(4)
        for text in itertools.product(range(4), repeat=len(seen)):
            chance = first[text[:3]] * np.prod([chances[text[i : i + 4]] for i in range(len(seen) - 3)])
            chance *= np.prod([shown(seen[i], letter, i == position) for i, letter in enumerate(text)])
            sums[text[position]] += chance
        assert posterior[position] == pytest.approx(sums / sums.sum(), rel=1e-9)
