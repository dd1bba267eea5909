"""Samples of two segments, for BERT's next sentence prediction and ALBERT's sentence order prediction.

A document of n tokens and s sentences is split into min(ceil(n / length), floor(s / 2)) chunks of whole sentences, so
that the number of samples is known and each chunk has at least two sentences. A chunk is divided between two of its
sentences into A and B. For next sentence prediction (arXiv 1810.04805, section 3.1), B is kept (label 0) or, for half
of the samples, replaced by sentences of another document (label 1). For sentence order prediction (arXiv 1909.11942,
section 3.1), A and B are swapped for half of the samples (label 1).

All chunks of an epoch form a ring in random order. The position on the ring determines where a chunk is divided. A
replacement for B comes from the next chunk on the ring whose B is replaced and that is of another document. So second
segments only change places, and every sentence is read about once per epoch. A replacement is about as long as the
replaced segment and never begins a document; otherwise length or position would reveal the label.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar, Final, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import TextError
from unmask.core.types import SENTENCE_START, SampleSpec, TokenSpan
from unmask.data.sampling import ESTIMATE_SAMPLES

PairKind = Literal["next-sentence", "sentence-order"]
CONSECUTIVE: Final = 0  # the labels of transformers' BertForPreTraining and AlbertForPreTraining
NOT_CONSECUTIVE: Final = 1  # B is of another document, or A and B are swapped

_LONG: Final = 16  # chunks from which on all borders of a document move together, as those of windows do
_BLOCK: Final = 64  # documents
_NEIGHBORS: Final = 12  # next chunks on the ring that are tried for a B; about every second one fits
_SENTENCES_KEPT: Final = 1 << 22  # 32 MB, and at most half as much for borders
_NO_EPOCH: Final = -1

Numbers = NDArray[np.int64]


class SentenceDocuments(Protocol):
    """Tokenized documents, such as `Shards`."""

    @property
    def lengths(self) -> Int[np.ndarray, "N"]:
        """Number of tokens of each document."""
        ...

    @property
    def sentences(self) -> Int[np.ndarray, "N"]:
        """Number of sentences of each document; its first token always starts one."""
        ...

    def token_flags(self, document: int, first: int, last: int) -> NDArray[np.uint8]:
        """Return the flags of tokens [first, last) of a document."""
        ...


class _Chunk(NamedTuple):
    starts: list[int]  # the first token of each sentence, and the end
    divided: int  # index in the chunk of the first sentence of the second segment
    sentence: int  # index of that sentence in the document


class _Document(NamedTuple):
    starts: Numbers  # the first token of each sentence, and the end
    epoch: int
    borders: Numbers  # the first sentence of each chunk of this epoch, and the end


class PairSampler:
    """Sampler of two spans with a label, together at most `length` tokens, special tokens not counted."""

    spans: ClassVar[int] = 2  # per sample

    def __init__(
        self,
        documents: SentenceDocuments,
        length: int,
        seed: int,
        kind: PairKind,
        *,
        short_probability: float = 0.1,
    ) -> None:
        """Count the chunks of all documents.

        Args:
            documents: tokenized documents.
            length: maximum number of tokens of a pair.
            seed: random seed.
            kind: next sentence or sentence order prediction.
            short_probability: probability that a pair is shortened to a random length from 2 to `length`.

        Raises:
            TextError: the documents yield no pairs.
        """
        assert length >= 2, "a pair holds at least two tokens"
        self._documents, self._length, self._seed, self._kind = documents, length, seed, kind
        self._short_probability = short_probability
        self._lengths = documents.lengths  # often memory-mapped, and not copied then
        chunks = np.minimum(-(-np.asarray(documents.lengths) // length), documents.sentences // 2)
        self._chunk_counts = chunks.astype(np.int32)
        edges = np.arange(0, max(1, len(chunks)), _BLOCK)
        sums = np.add.reduceat(chunks, edges) if len(chunks) else np.zeros(1, dtype=np.int64)
        self._before = np.append(0, np.cumsum(sums, dtype=np.int64))
        self._count = int(self._before[-1])
        self._kept: OrderedDict[int, _Document] = OrderedDict()
        self._kept_sentences = 0
        require_pairs(documents, kind)

    def count(self, epoch: int) -> int:
        """Return the number of samples in an epoch, the same in each."""
        return self._count

    def epoch_tokens(self, num_special_tokens: int) -> int:
        """Return an estimate of the tokens of an epoch, from its first 4,096 samples."""
        mean = float(np.mean([spec.tokens for spec in self.specs(0, 0, min(self._count, ESTIMATE_SAMPLES))]))
        return round(self._count * (mean + num_special_tokens))

    def specs(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """Return the samples at positions [first, last) of the epoch; their `number` is that of the chunk."""
        assert 0 <= first <= last <= self._count, "positions outside the epoch"
        ring = rng.permute(np.arange(first, last), self._count, self._seed, "order", epoch)
        numbers = self._at_ring(ring, epoch)
        documents, places = self._locate(numbers)
        labels = self._labels(numbers, epoch)
        chunks = self._chunks(epoch, documents, places, self._division(ring, epoch))
        seconds = [chunk.starts[chunk.divided :] for chunk in chunks]
        second_documents = documents.copy()
        if self._kind == "next-sentence":
            lost = np.flatnonzero(labels == NOT_CONSECUTIVE)
            positions, second_documents[lost] = self._partners(ring[lost], numbers[lost], documents[lost], epoch)
            partners = self._chunks(epoch, second_documents[lost], *positions)
            for index, partner in zip(lost.tolist(), partners, strict=True):
                wanted = seconds[index][-1] - seconds[index][0]
                seconds[index] = self._sentences_from(int(second_documents[index]), partner.sentence, wanted)
        is_short = rng.uniform(self._seed, "short", epoch, numbers) < self._short_probability
        short_lengths = 2 + rng.below(self._length - 1, self._seed, "target", epoch, numbers)
        targets = np.where(is_short, short_lengths, self._length)
        fronts = [rng.uniform(self._seed, name, epoch, numbers).tolist() for name in ("front a", "front b")]
        columns = (numbers.tolist(), documents.tolist(), second_documents.tolist(), labels.tolist())
        specs: list[SampleSpec] = []
        for number, document, second_document, label, chunk, second, target, front_a, front_b in zip(
            *columns, chunks, seconds, targets.tolist(), *fronts, strict=True
        ):
            a, b = _truncate(chunk.starts[: chunk.divided + 1], second, target, (front_a, front_b))
            if self._kind == "sentence-order" and label == NOT_CONSECUTIVE:
                a, b = b, a
            spans = (TokenSpan(document, *a, 0), TokenSpan(second_document, *b, 1))
            specs.append(SampleSpec(epoch, number, spans, label))
        return specs

    # Choice of chunks -------------------------------------------------------------------------------------------------

    def _at_ring(self, ring: Numbers, epoch: int) -> Numbers:
        """Return the numbers of the chunks at these positions of the epoch's ring."""
        return rng.permute(ring, self._count, self._seed, "ring", epoch)

    def _division(self, ring: Numbers, epoch: int) -> NDArray[np.float64]:
        """Return where chunks are divided, from 0 to 1: uniform over the ring, about equal for neighbors."""
        return (ring + rng.uniform(self._seed, "part", epoch)) / self._count

    def _labels(self, numbers: Numbers, epoch: int) -> Numbers:
        return np.where(rng.uniform(self._seed, "label", epoch, numbers) < 0.5, NOT_CONSECUTIVE, CONSECUTIVE)

    def _locate(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Return the document of each chunk, and the index of the chunk in it."""
        blocks = np.searchsorted(self._before, numbers, side="right") - 1
        candidates = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
        exists = candidates < len(self._chunk_counts)
        counts = np.where(exists, self._chunk_counts[np.minimum(candidates, len(self._chunk_counts) - 1)], 0)
        until = np.cumsum(counts, axis=1, dtype=np.int64)
        in_block = numbers - self._before[blocks]
        offsets = (until <= in_block[:, None]).sum(axis=1)
        each = np.arange(len(numbers))
        return blocks * _BLOCK + offsets, in_block - until[each, offsets] + counts[each, offsets]

    def _partners(
        self, ring: Numbers, numbers: Numbers, documents: Numbers, epoch: int
    ) -> tuple[tuple[Numbers, NDArray[np.float64]], Numbers]:
        """Return, for each replaced B, a chunk of another document, where it is divided, and the document."""
        second_documents, places, divisions = documents.copy(), np.zeros_like(documents), self._division(ring, epoch)
        pending = np.arange(len(ring))
        for step in range(1, _NEIGHBORS + 1):
            if not len(pending):
                break
            next_ring = (ring[pending] + step) % self._count
            next_numbers = self._at_ring(next_ring, epoch)
            next_documents, next_places = self._locate(next_numbers)
            fits = (self._labels(next_numbers, epoch) == NOT_CONSECUTIVE) & (next_documents != documents[pending])
            taken = pending[fits]
            second_documents[taken], places[taken] = next_documents[fits], next_places[fits]
            divisions[taken] = self._division(next_ring[fits], epoch)
            pending = pending[~fits]
        if len(pending):  # if nearly all text is one document: any chunk of another document
            own_documents = documents[pending]
            own_first = numbers[pending] - self._locate(numbers[pending])[1]
            own_chunks = self._chunk_counts[own_documents].astype(np.int64)
            drawn = rng.below(self._count - own_chunks, self._seed, "elsewhere", epoch, numbers[pending])
            second_documents[pending], places[pending] = self._locate(
                drawn + np.where(drawn >= own_first, own_chunks, 0)
            )
        return (places, divisions), second_documents

    # Positions of chunks ----------------------------------------------------------------------------------------------

    def _chunks(self, epoch: int, documents: Numbers, places: Numbers, divisions: NDArray[np.float64]) -> list[_Chunk]:
        """Return the sentences of chunks; documents are processed in order, so their flags are read once."""
        chunks: dict[int, _Chunk] = {}
        order = np.argsort(documents, kind="stable")
        draws = rng.uniform(self._seed, "piece", epoch, documents[order])
        columns = (documents[order].tolist(), places[order].tolist(), divisions[order].tolist(), draws.tolist())
        for index, document, place, division, draw in zip(order.tolist(), *columns, strict=True):
            known = self._document(document)
            if known.epoch != epoch:
                borders = self._borders(int(self._chunk_counts[document]), known.starts, draw)
                known = self._kept[document] = _Document(known.starts, epoch, borders)
            first, last = known.borders[place : place + 2].tolist()
            divided = 1 + int(division * (last - first - 1))
            chunks[index] = _Chunk(known.starts[first : last + 1].tolist(), divided, first + divided)
        return [chunks[index] for index in range(len(order))]

    def _document(self, document: int) -> _Document:
        """Return the sentences of a document; those of recently used documents are cached."""
        if document in self._kept:
            self._kept.move_to_end(document)
            return self._kept[document]
        tokens = int(self._lengths[document])
        marked = np.flatnonzero(self._documents.token_flags(document, 0, tokens) & SENTENCE_START)
        head = [] if len(marked) and marked[0] == 0 else [0]
        starts = np.concatenate([np.array(head, dtype=np.int64), marked, [tokens]])
        known = self._kept[document] = _Document(starts, _NO_EPOCH, starts[:0])
        self._kept_sentences += len(starts)
        while self._kept_sentences > _SENTENCES_KEPT and len(self._kept) > 1:
            self._kept_sentences -= len(self._kept.popitem(last=False)[1].starts)
        return known

    def _borders(self, chunks: int, starts: Numbers, draw: float) -> Numbers:
        """Return the sentence borders of chunks: nearest to equal lengths, and shifted by `draw` in each epoch."""
        tokens, sentences = int(starts[-1]), len(starts) - 1
        if chunks == 1:
            return np.array([0, sentences])
        slack = max(0, chunks * self._length - tokens)
        inner = np.arange(1, chunks)
        if chunks >= _LONG and slack:
            wanted = inner * self._length - draw * slack
        else:
            wanted = inner * (tokens / chunks) + (2 * draw - 1) * slack / chunks
        after = np.maximum(np.searchsorted(starts, wanted), 1)
        borders = after - (wanted - starts[after - 1] < starts[after] - wanted)
        # Two sentences for each chunk: before a border, and after it.
        borders = np.maximum.accumulate(np.maximum(borders - 2 * inner, 0)) + 2 * inner
        borders = np.minimum(borders, sentences - 2 * (chunks - inner))
        return np.concatenate([[0], borders, [sentences]])

    def _sentences_from(self, document: int, sentence: int, wanted: int) -> list[int]:
        """Return the starts of sentences from this one on with about `wanted` tokens, and their end.

        If the document ends too soon, they begin earlier, but not with its first sentence.
        """
        starts = self._document(document).starts
        last = _nearest(starts, int(starts[sentence]) + wanted)
        if starts[sentence] + wanted > starts[-1]:
            sentence = max(1, min(sentence, _nearest(starts, int(starts[-1]) - wanted)))
        return starts[sentence : max(last, sentence + 1) + 1].tolist()


def _nearest(starts: Numbers, token: int) -> int:
    """Return the sentence whose start is nearest to a token."""
    after = min(max(int(np.searchsorted(starts, token)), 1), len(starts) - 1)
    return after - int(token - starts[after - 1] < starts[after] - token)


def _truncate(
    a: list[int], b: list[int], target: int, fronts: tuple[float, float]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Truncate segments A and B, given as sentence starts, to at most `target` tokens together.

    Whole sentences are removed first: from the longer segment, at the outer ends of the pair. Then tokens are removed
    from the longer segment, a random number from its front and the rest from its back. (BERT draws for each token,
    which would keep the middle of a long sentence every time.) At least one token of each of the two inner sentences
    remains.
    """
    first, last = 0, len(b) - 1
    size_a, size_b = a[-1] - a[0], b[-1] - b[0]
    while (excess := size_a + size_b - target) > 0:
        if size_a > size_b:
            sentence = a[first + 1] - a[first]
            if first == len(a) - 2 or sentence > excess:
                break
            first, size_a = first + 1, size_a - sentence
        else:
            sentence = b[last] - b[last - 1]
            if last == 1 or sentence > excess:
                break
            last, size_b = last - 1, size_b - sentence
    excess = max(0, excess)
    from_a = min(excess, max(0, size_a - size_b))
    from_b = min(excess, max(0, size_b - size_a))
    rest = excess - from_a - from_b
    from_a, from_b = from_a + rest // 2, from_b + rest - rest // 2
    back_of_a = min(int(fronts[0] * (from_a + 1)), a[-1] - a[-2] - 1)
    front_of_b = min(int(fronts[1] * (from_b + 1)), b[1] - b[0] - 1)
    whole_a = (a[first] + from_a - back_of_a, a[-1] - back_of_a)
    return whole_a, (b[0] + front_of_b, b[last] - from_b + front_of_b)


def require_pairs(documents: SentenceDocuments, kind: PairKind) -> None:
    """Check that documents yield pairs.

    Raises:
        TextError: no document has two sentences, or only one has, for next sentence prediction.
    """
    usable = int((np.asarray(documents.sentences) > 1).sum())
    if usable == 0:
        raise TextError(
            "no document has two sentences",
            hint="use longer documents (data.document=blank-line or file), use other text, or train without pairs: "
            "--set objective.kind=mlm",
        )
    if usable == 1 and kind == "next-sentence":
        raise TextError(
            "only one document has two sentences, so there is no other document to draw from",
            hint="add documents, split the text differently (data.document=blank-line, line or file), or predict the "
            "order of sentences: --set objective.pair_task=sentence-order",
        )
