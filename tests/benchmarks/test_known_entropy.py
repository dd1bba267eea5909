"""The best possible loss is what summing over all texts gives."""

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
    seen, asked = np.array([0, 4, 2, 1, 4, 3]), np.array([False, True, False, True, True, False])
    guess = program.posterior(seen, asked, chances, rate)

    def shown(seen: int, there: int, asked: bool) -> float:
        of_asked = 0.8 if seen == 4 else 0.1 * (seen == there) + 0.1 / 4
        return of_asked if asked else (1 - rate) * (seen == there) + rate * of_asked

    for place in np.flatnonzero(asked):
        sums = np.zeros(4)
        for text in itertools.product(range(4), repeat=len(seen)):
            chance = first[text[:3]] * np.prod([chances[text[i : i + 4]] for i in range(len(seen) - 3)])
            chance *= np.prod([shown(seen[i], there, i == place) for i, there in enumerate(text)])
            sums[text[place]] += chance
        assert guess[place] == pytest.approx(sums / sums.sum(), rel=1e-9)
