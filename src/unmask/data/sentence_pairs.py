"""Room card: documents to pairs of segments, for BERT's next sentence prediction and ALBERT's sentence order.

Comes in: documents with their marks, the tokens that a pair may hold, a seed. Goes out: cuts of two spans and a label,
as pure functions of (seed, epoch, sample), drawn afresh in each epoch. Called by: feed, eval/pairs.

A document of n tokens and s sentences is cut into min(ceil(n / room), floor(s / 2)) pieces of whole sentences, so that
the number of samples is known, the same in each epoch, and each piece has two sentences at least. A piece is parted
between two of its sentences into A and B. By next sentence prediction (arXiv 1810.04805, section 3.1) B is that
(label 0), or for every other sample in the mean, by a coin of its own, sentences of another document (label 1); by
sentence order (arXiv 1909.11942, section 3.1) the two are swapped for every other sample (label 1).

All pieces of an epoch stand on a ring in a random order, and where a piece is parted follows from its place there. The
B that a sample takes from elsewhere begins where the next piece on the ring is parted that lost its own B and is of
another document. So the second parts only change hands: every sentence comes about once an epoch. What is taken is as
long as what was lost, and never a document's beginning, or length and place would betray the label.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import TextError
from unmask.core.types import SENTENCE_START, SampleSpec, TokenSpan
from unmask.data.sampling import LOOKED_AT

PairKind = Literal["next-sentence", "sentence-order"]
FOLLOWS: Final = 0  # the labels of transformers' BertForPreTraining and AlbertForPreTraining
OTHER: Final = 1  # another document's, or swapped

_LONG: Final = 16  # from so many pieces on, all borders of a document move together, as those of windows do
_BLOCK: Final = 64  # documents
_NEIGHBOURS: Final = 12  # on the ring that are asked for their B; each is fit in one of two cases or so
_SENTENCES_KEPT: Final = 1 << 22  # 32 MB, and at most half of that for borders
_NO_EPOCH: Final = -1

Numbers = NDArray[np.int64]


class MarkedDocuments(Protocol):
    """Tokenized documents, as Shards hold them."""

    @property
    def lengths_N(self) -> Int[np.ndarray, "N"]:
        """Tokens of each document."""
        ...

    @property
    def sentences_N(self) -> Int[np.ndarray, "N"]:
        """Sentences of each; the first token starts one, whatever its mark."""
        ...

    def marks(self, document: int, first: int, last: int) -> NDArray[np.uint8]:
        """The marks of tokens [first, last) of a document."""
        ...


class _Piece(NamedTuple):
    """Where the sentences of a piece begin, its end included; `parted` is the first sentence of its second part."""

    starts: list[int]
    parted: int
    sentence: int  # of the document, with which the second part begins


class _Document(NamedTuple):
    """Where the sentences of a document begin, its end included, and between which of them an epoch cuts it."""

    starts_S1: Numbers
    epoch: int
    borders_C1: Numbers


class Pairs:
    """Cuts of two spans. `room` is what both hold together, special pieces not counted."""

    def __init__(
        self, documents: MarkedDocuments, room: int, seed: int, kind: PairKind, *, short_share: float = 0.1
    ) -> None:
        """`short_share` of the samples are cut to a length drawn from 2 to `room`.

        Raises:
            TextError: the documents give no pairs.
        """
        assert room >= 2, "a pair holds at least a token on either side"
        self._documents, self._room, self._seed, self._kind = documents, room, seed, kind
        self._short_share = short_share
        self._lengths_N = documents.lengths_N  # often mapped from a file, and then left there
        pieces_N = np.minimum(-(-np.asarray(documents.lengths_N) // room), documents.sentences_N // 2)
        self._pieces_N = pieces_N.astype(np.int32)
        edges = np.arange(0, max(1, len(pieces_N)), _BLOCK)
        sums_K = np.add.reduceat(pieces_N, edges) if len(pieces_N) else np.zeros(1, dtype=np.int64)
        self._before_K1 = np.append(0, np.cumsum(sums_K, dtype=np.int64))
        self._count = int(self._before_K1[-1])
        self._kept: OrderedDict[int, _Document] = OrderedDict()
        self._kept_sentences = 0
        require_pairs(documents, kind)

    def count(self, epoch: int) -> int:
        """Samples in an epoch; the same in each."""
        return self._count

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample in the mean, special pieces not counted; of many samples, the first are looked at."""
        return float(np.mean([cut.tokens for cut in self.cuts(0, 0, min(self._count, LOOKED_AT))]))

    def cut(self, epoch: int, sample: int) -> SampleSpec:
        """The sample at place `sample` of the epoch's order; its `number` is the piece's, whatever its place."""
        return self.cuts(epoch, sample, sample + 1)[0]

    def cuts(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """The samples at places [first, last) of the epoch's order."""
        assert 0 <= first <= last <= self._count, "a place outside the epoch"
        ring_N = rng.permute(np.arange(first, last), self._count, self._seed, "order", epoch)
        number_N = self._on_ring(ring_N, epoch)
        document_N, place_N = self._found(number_N)
        label_N = self._labels(number_N, epoch)
        pieces = self._pieces(epoch, document_N, place_N, self._shares(ring_N, epoch))
        seconds = [piece.starts[piece.parted :] for piece in pieces]
        second_document_N = document_N.copy()
        if self._kind == "next-sentence":
            lost = np.flatnonzero(label_N == OTHER)
            from_ring, second_document_N[lost] = self._partners(ring_N[lost], number_N[lost], document_N[lost], epoch)
            partners = self._pieces(epoch, second_document_N[lost], *from_ring)
            for number, partner in zip(lost.tolist(), partners, strict=True):
                wanted = seconds[number][-1] - seconds[number][0]
                seconds[number] = self._sentences_from(int(second_document_N[number]), partner.sentence, wanted)
        which = (self._seed, "short", epoch, number_N)
        drawn_N = 2 + rng.below(self._room - 1, self._seed, "target", epoch, number_N)
        target_N = np.where(rng.uniform(*which) < self._short_share, drawn_N, self._room)
        fronts_N2 = [rng.uniform(self._seed, name, epoch, number_N).tolist() for name in ("front a", "front b")]
        columns = (number_N.tolist(), document_N.tolist(), second_document_N.tolist(), label_N.tolist())
        cuts: list[SampleSpec] = []
        for number, document, other, label, piece, second, target, front_a, front_b in zip(
            *columns, pieces, seconds, target_N.tolist(), *fronts_N2, strict=True
        ):
            a, b = _fitted(piece.starts[: piece.parted + 1], second, target, (front_a, front_b))
            if self._kind == "sentence-order" and label == OTHER:
                a, b = b, a
            cuts.append(SampleSpec(epoch, number, (TokenSpan(document, *a, 0), TokenSpan(other, *b, 1)), label))
        return cuts

    # Which pieces -----------------------------------------------------------------------------------------------------

    def _on_ring(self, ring_N: Numbers, epoch: int) -> Numbers:
        """The numbers of the pieces at these places of the epoch's ring."""
        return rng.permute(ring_N, self._count, self._seed, "ring", epoch)

    def _shares(self, ring_N: Numbers, epoch: int) -> NDArray[np.float64]:
        """Where the pieces at these places are parted, as a share: even over the epoch, alike among neighbours."""
        return (ring_N + rng.uniform(self._seed, "part", epoch)) / self._count

    def _labels(self, number_N: Numbers, epoch: int) -> Numbers:
        return np.where(rng.uniform(self._seed, "label", epoch, number_N) < 0.5, OTHER, FOLLOWS)

    def _found(self, number_N: Numbers) -> tuple[Numbers, Numbers]:
        """The document of each piece, and which of its pieces it is."""
        block_N = np.searchsorted(self._before_K1, number_N, side="right") - 1
        each_NB = block_N[:, None] * _BLOCK + np.arange(_BLOCK)
        within_NB = each_NB < len(self._pieces_N)
        sizes_NB = np.where(within_NB, self._pieces_N[np.minimum(each_NB, len(self._pieces_N) - 1)], 0)
        until_NB = np.cumsum(sizes_NB, axis=1, dtype=np.int64)
        inside_N = number_N - self._before_K1[block_N]
        offset_N = (until_NB <= inside_N[:, None]).sum(axis=1)
        row_N = np.arange(len(number_N))
        return block_N * _BLOCK + offset_N, inside_N - until_NB[row_N, offset_N] + sizes_NB[row_N, offset_N]

    def _partners(
        self, ring_N: Numbers, number_N: Numbers, document_N: Numbers, epoch: int
    ) -> tuple[tuple[Numbers, NDArray[np.float64]], Numbers]:
        """For samples that lost their B, a piece of another document: its place there and its share; the document."""
        other_N, place_N, share_N = document_N.copy(), np.zeros_like(document_N), self._shares(ring_N, epoch)
        pending = np.arange(len(ring_N))
        for step in range(1, _NEIGHBOURS + 1):
            if not len(pending):
                break
            next_N = (ring_N[pending] + step) % self._count
            theirs_N = self._on_ring(next_N, epoch)
            there_N, which_N = self._found(theirs_N)
            fits_N = (self._labels(theirs_N, epoch) == OTHER) & (there_N != document_N[pending])
            taken = pending[fits_N]
            other_N[taken], place_N[taken] = there_N[fits_N], which_N[fits_N]
            share_N[taken] = self._shares(next_N[fits_N], epoch)
            pending = pending[~fits_N]
        if len(pending):  # where nearly all text is one document: any piece of another
            mine_N = document_N[pending]
            first_N = number_N[pending] - self._found(number_N[pending])[1]
            own_N = self._pieces_N[mine_N].astype(np.int64)
            any_N = rng.below(self._count - own_N, self._seed, "elsewhere", epoch, number_N[pending])
            other_N[pending], place_N[pending] = self._found(any_N + np.where(any_N >= first_N, own_N, 0))
        return (place_N, share_N), other_N

    # Where they lie ---------------------------------------------------------------------------------------------------

    def _pieces(self, epoch: int, document_N: Numbers, place_N: Numbers, share_N: NDArray[np.float64]) -> list[_Piece]:
        """Pieces, document by document, so that each is looked through once."""
        found: dict[int, _Piece] = {}
        order = np.argsort(document_N, kind="stable")
        luck_N = rng.uniform(self._seed, "piece", epoch, document_N[order])
        columns = (document_N[order].tolist(), place_N[order].tolist(), share_N[order].tolist(), luck_N.tolist())
        for number, document, place, share, luck in zip(order.tolist(), *columns, strict=True):
            known = self._document(document)
            if known.epoch != epoch:
                borders_C1 = self._borders(int(self._pieces_N[document]), known.starts_S1, luck)
                known = self._kept[document] = _Document(known.starts_S1, epoch, borders_C1)
            first, last = known.borders_C1[place : place + 2].tolist()
            parted = 1 + int(share * (last - first - 1))
            found[number] = _Piece(known.starts_S1[first : last + 1].tolist(), parted, first + parted)
        return [found[number] for number in range(len(order))]

    def _document(self, document: int) -> _Document:
        """A document's sentences; of the documents asked for last, they are kept."""
        if document in self._kept:
            self._kept.move_to_end(document)
            return self._kept[document]
        tokens = int(self._lengths_N[document])
        starts = np.flatnonzero(self._documents.marks(document, 0, tokens) & SENTENCE_START)
        head = [] if len(starts) and starts[0] == 0 else [0]
        starts_S1 = np.concatenate([np.array(head, dtype=np.int64), starts, [tokens]])
        known = self._kept[document] = _Document(starts_S1, _NO_EPOCH, starts_S1[:0])
        self._kept_sentences += len(starts_S1)
        while self._kept_sentences > _SENTENCES_KEPT and len(self._kept) > 1:
            self._kept_sentences -= len(self._kept.popitem(last=False)[1].starts_S1)
        return known

    def _borders(self, pieces: int, starts_S1: Numbers, luck: float) -> Numbers:
        """The sentences between which a document is cut: nearest to even pieces that move a little in each epoch."""
        tokens, sentences = int(starts_S1[-1]), len(starts_S1) - 1
        if pieces == 1:
            return np.array([0, sentences])
        slack = max(0, pieces * self._room - tokens)
        inner_C = np.arange(1, pieces)
        if pieces >= _LONG and slack:
            wanted_C = inner_C * self._room - luck * slack
        else:
            wanted_C = inner_C * (tokens / pieces) + (2 * luck - 1) * slack / pieces
        after_C = np.maximum(np.searchsorted(starts_S1, wanted_C), 1)
        border_C = after_C - (wanted_C - starts_S1[after_C - 1] < starts_S1[after_C] - wanted_C)
        # Two sentences for each piece: before a border, and after it.
        border_C = np.maximum.accumulate(np.maximum(border_C - 2 * inner_C, 0)) + 2 * inner_C
        border_C = np.minimum(border_C, sentences - 2 * (pieces - inner_C))
        return np.concatenate([[0], border_C, [sentences]])

    def _sentences_from(self, document: int, sentence: int, wanted: int) -> list[int]:
        """Where the sentences begin that hold about so many tokens from this one on, and their end.

        Where the document ends before, they begin earlier, but not with its first one.
        """
        starts_S1 = self._document(document).starts_S1
        last = _nearest(starts_S1, int(starts_S1[sentence]) + wanted)
        if starts_S1[sentence] + wanted > starts_S1[-1]:
            sentence = max(1, min(sentence, _nearest(starts_S1, int(starts_S1[-1]) - wanted)))
        return starts_S1[sentence : max(last, sentence + 1) + 1].tolist()


def _nearest(starts_S1: Numbers, token: int) -> int:
    """The sentence that begins nearest to a token."""
    after = min(max(int(np.searchsorted(starts_S1, token)), 1), len(starts_S1) - 1)
    return after - int(token - starts_S1[after - 1] < starts_S1[after] - token)


def _fitted(
    a: list[int], b: list[int], target: int, fronts: tuple[float, float]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The tokens of A and B, given where their sentences begin, so that both together hold at most `target`.

    Whole sentences go first, from the longer side and the ends that don't meet; what is still too much goes as tokens,
    from the longer side, so many from its front and the rest from its back by a draw. (BERT throws a coin for each
    token, which would leave the middle of a long sentence every time.) Of the sentences that meet, something stays.
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


def require_pairs(documents: MarkedDocuments, kind: PairKind) -> None:
    """Refuse documents that give no pairs.

    Raises:
        TextError: none has two sentences; or, for next sentence prediction, only one has.
    """
    having = int((np.asarray(documents.sentences_N) > 1).sum())
    if having == 0:
        raise TextError(
            "no document has two sentences, so none is followed by another",
            hint="let a document be more than a line (data.document=blank-line or file), give other text, or train on "
            "masks alone: --set objective.kind=mlm",
        )
    if having == 1 and kind == "next-sentence":
        raise TextError(
            "only one document has two sentences, so nothing can be taken from another one",
            hint="give more documents, say where they end (data.document=blank-line, line or file), or ask for the "
            "order of sentences: --set objective.pair_task=sentence-order",
        )
