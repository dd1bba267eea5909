"""Survey: columns that are worked on piece by piece give what they would give at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.core.quantities import Fraction, Quantity
from unmask.core.types import DocumentChunk
from unmask.data import split
from unmask.data.prepare import quiet
from unmask.data.settings import HeldOutConfig
from unmask.data.sources import MemorySource
from unmask.data.split import LEFT_OUT, Split, divide, stretches, survey


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 8), min_size=2, max_size=40),
    by=st.sampled_from(["hash", "tail"]),
    share=st.sampled_from([0.01, 0.3, 0.9]),
    most=st.sampled_from([3, 2_000_000]),
    drop=st.booleans(),
    chunk=st.integers(1, 7),
)
def test_a_division_does_not_depend_on_the_pieces_it_is_made_in(
    counts: list[int], by: str, share: float, most: int, drop: bool, chunk: int
) -> None:
    found = survey(MemorySource(["x" * count for count in counts]), quiet)
    chosen = HeldOutConfig(by, Fraction(share), Quantity(most, "characters"))  # type: ignore[arg-type]

    def divided() -> Split | str:
        try:
            return divide(found, chosen, drop_duplicates=drop)
        except TextError as error:
            return str(error)

    whole = divided()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "CHUNK", chunk)
        pieces = divided()
    if isinstance(whole, str) or isinstance(pieces, str):
        assert whole == pieces
        return
    assert whole.digest == pieces.digest and whole.duplicates == pieces.duplicates
    left_out = np.flatnonzero(whole.first_held_N == LEFT_OUT).tolist()
    copies = [number for number, count in enumerate(counts) if count and count in counts[:number]]
    assert left_out == (copies if drop else []) and whole.duplicates == len(left_out)


def test_a_division_may_lie_in_files(tmp_path: Path) -> None:
    found = survey(MemorySource([f"{number:09d}" for number in range(300)]), quiet)
    here, there = divide(found, HeldOutConfig()), divide(found, HeldOutConfig(), folder=tmp_path)
    assert here.digest == there.digest and (tmp_path / "first-held").stat().st_size == 8 * 300


def test_text_that_changes_between_two_readings_is_noticed() -> None:
    lengths_N, held_N = np.array([3, 3]), np.array([3, 0])

    def read(*texts: str) -> list[str]:
        passages = [(number, DocumentChunk(number, 0, text, len(text), last=True)) for number, text in enumerate(texts)]
        return [stretch.text for stretch in stretches(passages, lengths_N, held_N)]

    assert read("abc", "def") == ["abc", "def"]
    for texts in (("abc",), ("abc", "defg"), ("ab", "def"), ("abc", "def", "")):
        with pytest.raises(TextError, match="changed"):
            read(*texts)
