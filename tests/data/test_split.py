"""Splits: columns that are processed in blocks give the same result as in one go."""

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
from unmask.data.prepare import no_progress
from unmask.data.report import survey
from unmask.data.settings import HeldOutConfig
from unmask.data.sources import MemorySource
from unmask.data.split import LEFT_OUT, Split, divide, slice_documents


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 8), min_size=2, max_size=40),
    by=st.sampled_from(["hash", "tail"]),
    share=st.sampled_from([0.01, 0.3, 0.9]),
    most=st.sampled_from([3, 2_000_000]),
    drop=st.booleans(),
    chunk=st.integers(1, 7),
)
def test_a_split_does_not_depend_on_the_block_size(
    counts: list[int], by: str, share: float, most: int, drop: bool, chunk: int
) -> None:
    stats = survey(MemorySource(["x" * count for count in counts]), no_progress)
    chosen = HeldOutConfig(by, Fraction(share), Quantity(most, "characters"))  # type: ignore[arg-type]

    def result() -> Split | str:
        try:
            return divide(stats, chosen, drop_duplicates=drop)
        except TextError as error:
            return str(error)

    whole = result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "CHUNK", chunk)
        in_blocks = result()
    if isinstance(whole, str) or isinstance(in_blocks, str):
        assert whole == in_blocks
        return
    assert whole.digest == in_blocks.digest and whole.duplicates == in_blocks.duplicates
    left_out = np.flatnonzero(whole.first_held == LEFT_OUT).tolist()
    copies = [number for number, count in enumerate(counts) if count and count in counts[:number]]
    assert left_out == (copies if drop else []) and whole.duplicates == len(left_out)


def test_a_split_may_be_stored_in_files(tmp_path: Path) -> None:
    stats = survey(MemorySource([f"{number:09d}" for number in range(300)]), no_progress)
    in_memory, in_files = divide(stats, HeldOutConfig()), divide(stats, HeldOutConfig(), folder=tmp_path)
    assert in_memory.digest == in_files.digest and (tmp_path / "first-held").stat().st_size == 8 * 300


def test_text_that_changes_between_two_passes_is_an_error() -> None:
    lengths, first_held = np.array([3, 3]), np.array([3, 0])

    def read(*texts: str) -> list[str]:
        passages = [(number, DocumentChunk(number, 0, text, len(text), last=True)) for number, text in enumerate(texts)]
        return [part.text for part in slice_documents(passages, lengths, first_held)]

    assert read("abc", "def") == ["abc", "def"]
    for texts in (("abc",), ("abc", "defg"), ("ab", "def"), ("abc", "def", "")):
        with pytest.raises(TextError, match="changed"):
            read(*texts)
