"""Several texts in one order: shares of tokens, each window once before any comes again, no state."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.data.prepare import CorpusGroup
from unmask.data.sampling import MixtureSampler, WindowSampler, is_weighted

STRIDE, FRAMING = 1 << 20, 2


def mixture(texts: list[tuple[float, list[int]]], length: int, seed: int = 3) -> MixtureSampler:
    ends = list(accumulate(len(tokens) for _, tokens in texts))
    groups = [
        CorpusGroup(f"text-{number}", weight, end - len(tokens), end)
        for number, ((weight, tokens), end) in enumerate(zip(texts, ends, strict=True))
    ]
    lengths = np.array([size for _, tokens in texts for size in tokens])
    return MixtureSampler(lengths, groups, length, seed, num_special_tokens=FRAMING, stride=STRIDE)


def shares(mixed: MixtureSampler, texts: list[tuple[float, list[int]]], length: int) -> dict[str, float]:
    """The fraction of the tokens that each of these texts has."""
    epochs = mixed.epochs_by_text(1.0)
    windows = [sum(-(-size // length) for size in tokens) for _, tokens in texts]
    return {
        f"text-{number}": epochs[f"text-{number}"] * (sum(tokens) + FRAMING * windows[number])
        for number, (_, tokens) in enumerate(texts)
    }


TEXTS = st.lists(
    st.tuples(
        st.floats(0.01, 10), st.lists(st.integers(0, 90), min_size=1, max_size=30).filter(lambda tokens: sum(tokens))
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(1, 12), st.integers(0, 3), st.integers(0, 2))
def test_any_stretch_is_what_the_whole_order_has_there(
    texts: list[tuple[float, list[int]]], length: int, epoch: int, start: int
) -> None:
    mixed = mixture(texts, length)
    at = start * STRIDE + epoch
    whole = mixed.specs(at, 0, mixed.count(at))
    again = mixture(texts, length)
    for first in range(0, len(whole), max(1, len(whole) // 7)):
        assert again.specs(at, first, min(len(whole), first + 9)) == whole[first : first + 9]
        assert again.specs(at, first, first + 1) == [whole[first]]


@settings(max_examples=20, deadline=None)
@given(TEXTS, st.integers(1, 12), st.integers(1, 3))
def test_each_window_comes_once_before_any_comes_again(
    texts: list[tuple[float, list[int]]], length: int, epochs: int
) -> None:
    mixed = mixture(texts, length)
    ends = list(accumulate(len(tokens) for _, tokens in texts))
    own = [int(sum(-(-size // length) for size in tokens)) for _, tokens in texts]
    shown: dict[int, list[int]] = defaultdict(list)
    keys: set[tuple[int, int]] = set()
    for start in (0, 1):
        for epoch in range(epochs):
            for spec in mixed.specs(start * STRIDE + epoch, 0, mixed.count(epoch)):
                (span,) = spec.spans
                text = int(np.searchsorted(ends, span.document, side="right"))
                assert 0 < span.last - span.first <= length
                assert sum(own[:text]) <= spec.number < sum(own[: text + 1])
                assert (spec.epoch, spec.number) not in keys, "two draws would be one"
                keys.add((spec.epoch, spec.number))
                if not start:
                    shown[text].append(spec.number)
    for text, numbers in shown.items():
        for first in range(0, len(numbers), own[text]):
            lap = numbers[first : first + own[text]]
            assert len(set(lap)) == len(lap), "a window came again before all had come"


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(2, 12))
def test_the_parts_of_an_epoch_are_as_even_as_whole_numbers_allow(
    texts: list[tuple[float, list[int]]], length: int
) -> None:
    """Of any two stretches of one length, a text has in one at most so many more windows as there are texts."""
    mixed = mixture(texts, length)
    ends = list(accumulate(len(tokens) for _, tokens in texts))
    order = [
        int(np.searchsorted(ends, spec.spans[0].document, side="right")) for spec in mixed.specs(0, 0, mixed.count(0))
    ]
    size = max(1, len(order) // 3)
    stretches = [Counter(order[first : first + size]) for first in range(0, len(order) - size + 1, size)]
    for text in range(len(texts)):
        here = [stretch[text] for stretch in stretches]
        assert max(here) - min(here) <= len(texts)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.05, 1), st.integers(20, 80), st.integers(5, 300)), min_size=2, max_size=4),
    st.integers(16, 64),
)
def test_a_text_has_its_share_of_the_tokens(shapes: list[tuple[float, int, int]], length: int) -> None:
    """To within 2 % of all tokens, and exactly what `epochs_by_text` says over whole epochs of the text's own."""
    texts = [(weight, [size] * documents) for weight, documents, size in shapes]
    mixed = mixture(texts, length)
    ends = list(accumulate(len(tokens) for _, tokens in texts))
    epochs = 5
    tokens = [0] * len(texts)
    for epoch in range(epochs):
        for spec in mixed.specs(epoch, 0, mixed.count(epoch)):
            tokens[int(np.searchsorted(ends, spec.spans[0].document, side="right"))] += spec.tokens + FRAMING
    total = math.fsum(weight for weight, _ in texts)
    for text, (weight, _) in enumerate(texts):
        assert tokens[text] / sum(tokens) == pytest.approx(weight / total, abs=0.02)
        assert tokens[text] / sum(tokens) == pytest.approx(shares(mixed, texts, length)[f"text-{text}"], abs=0.01)
    assert sum(tokens) == pytest.approx(epochs * mixed.epoch_tokens(FRAMING), rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20).filter(sum), st.integers(1, 16), st.integers(0, 4))
def test_one_text_is_what_it_is_without_a_weight(tokens: list[int], length: int, epoch: int) -> None:
    mixed, alone = mixture([(1.0, tokens)], length), WindowSampler(np.array(tokens), length, 3)
    assert mixed.count(epoch) == alone.count(epoch)
    assert mixed.specs(epoch, 0, mixed.count(epoch)) == alone.specs(epoch, 0, alone.count(epoch))
    assert mixed.epoch_tokens(FRAMING) == sum(tokens) + FRAMING * alone.count(0)


def test_how_often_each_text_is_seen() -> None:
    """A tenth of the text that is to be half of the tokens comes nine times as often as the rest."""
    mixed = mixture([(0.5, [100] * 10), (0.5, [100] * 90)], 100)
    seen = mixed.epochs_by_text(mixed.epoch_tokens(FRAMING))
    assert seen == pytest.approx({"text-0": 5.0, "text-1": 50 / 90})
    assert mixed.epochs_by_text(2 * mixed.epoch_tokens(FRAMING))["text-0"] == pytest.approx(10.0)


def test_a_window_that_is_half_of_many() -> None:
    """Its own epochs outnumber an order's stride, and still no two draws share a key."""
    mixed = mixture([(1.0, [8]), (1.0, [8] * 1500)], 8)
    late = mixed.specs(STRIDE - 1, 0, mixed.count(0))
    early = mixed.specs(STRIDE, 0, mixed.count(0))
    assert len({(spec.epoch, spec.number) for spec in [*late, *early]}) == 2 * mixed.count(0)
    assert sum(spec.spans[0].document == 0 for spec in early) == pytest.approx(mixed.count(0) / 2, abs=1)


def test_numbers_beyond_64_bits_are_exact() -> None:
    """Places of an order of 2^31 windows, which a program can't list but needs."""
    documents = 1 << 31
    mixed = mixture([(0.7, [4 * (documents - 3)]), (0.3, [4, 4, 4])], 4)
    tail = mixed.specs(7, documents - 5, documents)
    again = [mixed.specs(7, place, place + 1)[0] for place in range(documents - 5, documents)]
    assert tail == again
    assert 0.6 < shares(mixed, [(0.7, [4 * (documents - 3)])], 4)["text-0"] < 0.8


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(TextError, match="has no weight"):
        mixture([(1.0, [5]), (0.0, [5])], 4)
    with pytest.raises(TextError, match="nothing to train on"):
        mixture([(1.0, [5]), (1.0, [0])], 4)
    assert not is_weighted([CorpusGroup("a", 0.0, 0, 4)]) and not is_weighted([])
    assert is_weighted([CorpusGroup("a", 1.0, 0, 4)])
