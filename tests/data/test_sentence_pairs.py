"""Pairs of segments: each is found again in its documents, whatever these are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unmask.core.errors import TextError
from unmask.core.types import SENTENCE_START, SPECIAL, SampleSpec, TokenSpan
from unmask.data.loader import SampleStream, read_sample
from unmask.data.sentence_pairs import CONSECUTIVE, NOT_CONSECUTIVE, PairKind, PairSampler
from unmask.data.shards import Shards, open_shards
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

KINDS: tuple[PairKind, ...] = ("next-sentence", "sentence-order")


class Marked:
    """Documents of sentences of given lengths; a document without any is empty."""

    def __init__(self, documents: Sequence[Sequence[int]], *, heads: bool = True) -> None:
        self.starts = [np.cumsum([0, *sizes]) for sizes in documents]
        self.lengths = np.array([starts[-1] for starts in self.starts])
        self.sentences = np.array([len(sizes) for sizes in documents])
        self._heads = heads

    def token_flags(self, document: int, first: int, last: int) -> NDArray[np.uint8]:
        marks = np.zeros(self.lengths[document], dtype=np.uint8)
        marks[self.starts[document][0 if self._heads else 1 : -1]] = SENTENCE_START
        return marks[first:last]

    def sentence(self, document: int, token: int) -> int:
        return int(np.searchsorted(self.starts[document], token, side="right")) - 1

    def is_border(self, document: int, token: int) -> bool:
        return token in self.starts[document]


def random_documents(number: int, seed: int = 0, sentence: int = 12) -> Marked:
    draw = np.random.default_rng(seed)
    return Marked([draw.integers(1, 2 * sentence, draw.integers(2, 60)).tolist() for _ in range(number)])


def follows(documents: Marked, first: TokenSpan, second: TokenSpan) -> bool:
    """Whether the second span begins in the sentence after the one in which the first span ends."""
    if first.document != second.document or first.last > second.first:
        return False
    ends = documents.sentence(first.document, first.last - 1)
    return documents.sentence(second.document, second.first) == ends + 1


DOCUMENTS = st.lists(st.lists(st.integers(1, 40), max_size=25), min_size=2, max_size=12).filter(
    lambda documents: sum(len(sizes) > 1 for sizes in documents) > 1
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(sizes=DOCUMENTS, length=st.integers(2, 90), seed=st.integers(0, 2**63), short=st.sampled_from([0.0, 0.1, 1.0]))
def test_each_pair_is_found_again(kind: PairKind, sizes: list[list[int]], length: int, seed: int, short: float) -> None:
    documents = Marked(sizes)
    sampler = PairSampler(documents, length, seed, kind, short_probability=short)
    count = sampler.count(0)
    expected = [min(-(-sum(one) // length), len(one) // 2) for one in sizes]
    assert count == sum(expected)
    for epoch in (0, 5):
        specs = sampler.specs(epoch, 0, count)
        assert sorted(spec.number for spec in specs) == list(range(count))
        for spec in specs:
            a, b = spec.spans
            assert (a.segment, b.segment) == (0, 1) and spec.epoch == epoch and spec.tokens <= length
            assert all(0 <= span.first < span.last <= documents.lengths[span.document] for span in (a, b))
            if spec.pair_label == CONSECUTIVE:
                assert follows(documents, a, b)
            elif kind == "sentence-order":
                assert follows(documents, b, a)
            else:
                assert spec.pair_label == NOT_CONSECUTIVE and a.document != b.document
                assert documents.sentence(b.document, b.first) > 0, "a beginning would reveal the label"
            ends = [(span.document, token) for span in (a, b) for token in (span.first, span.last)]
            if short == 0.0 and spec.tokens < length:
                assert all(documents.is_border(*end) for end in ends), "whole sentences, where there is length"


@settings(max_examples=30, deadline=None)
@given(sizes=DOCUMENTS, seed=st.integers(0, 2**63), heads=st.booleans(), data=st.data())
def test_a_pair_depends_on_seed_epoch_and_sample_only(
    sizes: list[list[int]], seed: int, heads: bool, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    sampler = PairSampler(Marked(sizes, heads=heads), 30, seed, kind)
    count, epoch = sampler.count(0), data.draw(st.integers(0, 1 << 22))
    assert sampler.count(epoch) == count
    whole = sampler.specs(epoch, 0, count)
    sampler.specs(epoch + 1, 0, count)  # other calls in between change nothing
    other = PairSampler(Marked(sizes), 30, seed, kind)
    bounds = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=3))})
    assert whole == [spec for first, last in pairwise(bounds) for spec in other.specs(epoch, first, last)]
    assert whole[-1] == other.specs(epoch, count - 1, count)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_pairs_follow(kind: PairKind) -> None:
    documents = random_documents(400)
    for seed in (1, 2):
        sampler = PairSampler(documents, 60, seed, kind)
        specs = sampler.specs(3, 0, sampler.count(3))
        error = np.sqrt(0.25 / len(specs))
        assert abs(np.mean([spec.pair_label == CONSECUTIVE for spec in specs]) - 0.5) < 4 * error
        assert len(specs) > 2000


def test_a_tenth_is_short() -> None:
    documents = random_documents(400)
    long, some = (PairSampler(documents, 60, 1, "next-sentence", short_probability=share) for share in (0.0, 0.1))
    count = long.count(0)
    pairs = zip(long.specs(0, 0, count), some.specs(0, 0, count), strict=True)
    # A length drawn from 2 to 60 specs those pairs that have more.
    expected, shorter = 0.0, 0
    for whole, spec in pairs:
        expected += 0.1 * (whole.tokens - 2) / 59
        shorter += spec.tokens < whole.tokens
        assert spec.tokens <= whole.tokens
    assert abs(shorter - expected) < 4 * np.sqrt(expected)
    all_short = PairSampler(documents, 60, 1, "next-sentence", short_probability=1.0).specs(0, 0, count)
    assert 20 < np.mean([spec.tokens for spec in all_short]) < 35 and min(spec.tokens for spec in all_short) >= 2


def test_a_sentence_comes_about_once_an_epoch() -> None:
    documents = random_documents(300)
    sampler = PairSampler(documents, 80, 7, "next-sentence")
    seen = [np.zeros(tokens) for tokens in documents.lengths]
    for epoch in range(3):
        for spec in sampler.specs(epoch, 0, sampler.count(0)):
            for span in spec.spans:
                seen[span.document][span.first : span.last] += 1
    times = np.concatenate(seen) / 3
    assert 0.85 < times.mean() < 1.05 and (times == 0).mean() < 0.02
    assert (times <= 4 / 3).mean() > 0.98, "none is preferred"


def test_length_hardly_reveals_the_label() -> None:
    """Short documents among long ones: what stands in for a second part is as long as it was, if there is so much."""
    draw = np.random.default_rng(3)
    sizes = [draw.integers(3, 20, 2 if i % 2 else 40).tolist() for i in range(600)]
    sampler = PairSampler(Marked(sizes), 100, 1, "next-sentence")
    tokens: dict[int | None, list[int]] = {CONSECUTIVE: [], NOT_CONSECUTIVE: []}
    for epoch in range(3):
        for spec in sampler.specs(epoch, 0, sampler.count(0)):
            tokens[spec.pair_label].append(spec.tokens)
    for q in (10, 50, 90):
        assert abs(np.percentile(tokens[CONSECUTIVE], q) - np.percentile(tokens[NOT_CONSECUTIVE], q)) <= 6
    assert abs(np.mean(tokens[CONSECUTIVE]) - np.mean(tokens[NOT_CONSECUTIVE])) < 0.1 * np.mean(tokens[CONSECUTIVE])


def test_one_document_beside_nearly_all_of_the_text() -> None:
    sampler = PairSampler(Marked([[5] * 4000, [4, 4], [6]]), 20, 1, "next-sentence")
    documents = Counter(
        spec.spans[1].document for spec in sampler.specs(0, 0, sampler.count(0)) if spec.pair_label == NOT_CONSECUTIVE
    )
    assert set(documents) <= {0, 1} and documents[1] > 400, "the other one lends its only second half to all"


def test_text_without_pairs_is_refused() -> None:
    for sizes in ([[5], [9], []], []):
        with pytest.raises(TextError, match="no document has two sentences"):
            PairSampler(Marked(sizes), 20, 1, "sentence-order")
    with pytest.raises(TextError, match="only one document has two sentences"):
        PairSampler(Marked([[5, 3], [9]]), 20, 1, "next-sentence")
    assert PairSampler(Marked([[5, 3], [9]]), 20, 1, "sentence-order").count(0) == 1


# On disk -------------------------------------------------------------------------------------------------------------

TEXTS = ["One here. Two is there! Three?", "", "only one", "A. B? No. Yes. It was so. It is.", "x. y. " * 40]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, CharacterConfig())


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, write_shards: Any) -> Shards:
    passages = [
        (one.ids, one.marks, len(text), 0, True) for text, one in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True)
    ]
    folder = tmp_path_factory.mktemp("pairs") / "shards"
    write_shards(folder, passages, tokenizer.size, tokenizer.fingerprint, shard_tokens=32)
    return open_shards(folder)


def test_sentences_are_counted_over_shards(shards: Shards) -> None:
    marks = [shards.token_flags(document, 0, int(tokens)) for document, tokens in enumerate(shards.lengths)]
    starts = [int(((one & SENTENCE_START) != 0).sum()) for one in marks]
    assert shards.sentences.tolist() == starts == [3, 0, 1, 5, 80]


def test_a_pair_is_read_between_special_tokens(shards: Shards, tokenizer: Tokenizer) -> None:
    spec = SampleSpec(3, 5, (TokenSpan(0, 0, 9, 0), TokenSpan(3, 6, 10, 1)), NOT_CONSECUTIVE)
    text = read_sample(shards, spec, tokenizer)
    assert tokenizer.cls_sep_ids is not None
    cls, sep = tokenizer.cls_sep_ids
    edges = np.flatnonzero(text.token_flags & SPECIAL)
    assert text.ids[edges].tolist() == [cls, sep, sep] and edges.tolist() == [0, 10, 15]
    assert text.token_type_ids is not None and text.token_type_ids.tolist() == [0] * 11 + [1] * 5
    assert tokenizer.decode(text.ids[1:10]) == TEXTS[0][:9] and tokenizer.decode(text.ids[11:15]) == TEXTS[3][6:10]
    assert (text.epoch, text.number, text.pair_label) == (3, 5, NOT_CONSECUTIVE) and len(text.token_flags) == len(
        text.ids
    ) == 16


def test_a_batch_of_pairs(shards: Shards, tokenizer: Tokenizer) -> None:
    stream = SampleStream(shards, PairSampler(shards, 40, 1, "next-sentence"), tokenizer)
    specs, after = stream.take(0, 100)
    lengths = stream.lengths(specs)
    assert lengths == [spec.tokens + 3 for spec in specs] and sum(lengths) >= 100 and after == len(specs)
    assert tokenizer.num_special_tokens(2) == 3
    batch = stream.batch(specs)
    assert batch.pair_labels_B is not None and batch.pair_labels_B.tolist() == [spec.pair_label for spec in specs]
    assert batch.token_type_ids_T is not None and batch.token_type_ids_T.shape == batch.ids_T.shape
