"""Room card: several texts in given proportions.

Comes in: the number of tokens of each document, which of them belong to which text and with which weight, the length
of a window, a seed. Goes out: one order of samples in which every text has its share of the tokens, as a pure function
of (seed, epoch, sample), like `cutter.Windows`; how often each text is seen. Called by: feed, report.

A text's weight is its share of the training tokens, special ones included. With t tokens in its mean window, its share
of the samples is in proportion to weight ÷ t. An epoch holds as many samples as all texts have windows, c of them from
this text; they lie as evenly between the others' as whole numbers allow, and go through the text's own windows in the
text's own order, epoch after epoch: each of its windows comes once before any comes again. So in every stretch of the
order, and not only in the mean, the shares are right to within a few windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask import rng
from unmask.contracts import Cut
from unmask.errors import TextError
from unmask.text.cutter import Windows

# Own epochs of a text are numbered from this on where an order begins anew. One window that is to be half of a billion
# is seen a billion times an epoch, so the stride leaves room for a thousand such epochs; 2**23 orders fit in 63 bits.
_OWN_STRIDE: Final = 1 << 40


class MixedText(Protocol):
    """One of the texts: some of all documents, and the share of the tokens that it shall have; 0 stands for none."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        ...

    @property
    def weight(self) -> float:
        """Weights need not add up to 1."""
        ...

    @property
    def first_document(self) -> int:
        """Its first document."""
        ...

    @property
    def last_document(self) -> int:
        """The document after its last."""
        ...


def is_weighted(groups: Sequence[MixedText]) -> bool:
    """Whether these texts are to be mixed by weight."""
    return any(group.weight > 0 for group in groups)


class Mixture:
    """A cutter over several texts. `number` of a cut is the window's among those of all texts, whatever its place."""

    def __init__(
        self,
        lengths_N: Int[np.ndarray, "N"],
        groups: Sequence[MixedText],
        length: int,
        seed: int,
        *,
        framing: int,
        stride: int,
    ) -> None:
        """Lay out the order.

        Args:
            lengths_N: tokens of each document.
            groups: texts with a weight each, which need not add up to 1.
            length: what a window holds of a document, special pieces not counted.
            seed: of the order within each text.
            framing: special pieces around a window.
            stride: epochs from one beginning of the order to the next, where a stage of training begins anew.

        Raises:
            TextError: a text without weight, or without anything to train on.
        """
        self.names = tuple(group.name for group in groups)
        self._stride = stride
        self._first_documents = [group.first_document for group in groups]
        self._windows: list[Windows] = []
        self._own: list[int] = []  # windows of each text
        self._tokens: list[int] = []  # of each text's own epoch, special ones included
        for index, group in enumerate(groups):
            own_N = np.asarray(lengths_N[group.first_document : group.last_document], dtype=np.int64)
            # The first text keeps the seed, so that a single one is what it would be without a weight.
            windows = Windows(own_N, length, rng.integer(seed, "text of a mixture", index) if index else seed)
            _require(group, windows.count(0))
            self._windows.append(windows)
            self._own.append(windows.count(0))
            self._tokens.append(int(own_N.sum()) + framing * windows.count(0))
        self._offsets = [sum(self._own[:index]) for index in range(len(groups))]
        self._count = sum(self._own)
        self._samples = _apportioned(
            [group.weight * own / tokens for group, own, tokens in zip(groups, self._own, self._tokens, strict=True)],
            self._count,
        )

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch in the mean, special ones included."""
        return round(math.fsum(self._tokens_of_each()))

    @property
    def shares(self) -> dict[str, float]:
        """The share of the tokens that each text has: its weight, as nearly as whole samples allow."""
        total = math.fsum(self._tokens_of_each())
        return {name: tokens / total for name, tokens in zip(self.names, self._tokens_of_each(), strict=True)}

    def seen(self, tokens: float) -> dict[str, float]:
        """How often each text is seen in so many tokens of the order."""
        epochs = tokens / math.fsum(self._tokens_of_each())
        return {
            name: epochs * samples / own
            for name, samples, own in zip(self.names, self._samples, self._own, strict=True)
        }

    def count(self, epoch: int) -> int:
        """Samples in an epoch; the same in each."""
        return self._count

    def cut(self, epoch: int, sample: int) -> Cut:
        """The sample at place `sample` of the epoch's order."""
        return self.cuts(epoch, sample, sample + 1)[0]

    def cuts(self, epoch: int, first: int, last: int) -> list[Cut]:
        """The samples at places [first, last) of the epoch's order; `epoch` of a cut is the text's own."""
        assert 0 <= first <= last <= self._count, "a place outside the epoch"
        beginning, since = divmod(epoch, self._stride)
        whole = np.empty(last - first, dtype=object)
        places, at, rest = np.arange(last - first), first, self._count
        for index, samples in enumerate(self._samples):
            before, taken = _even(at, len(places), samples, rest)
            running = since * samples + before
            whole[places[taken]] = self._own_cuts(index, beginning, running, int(taken.sum()))
            places, at, rest = places[~taken], at - before, rest - samples
        return whole.tolist()

    def _tokens_of_each(self) -> list[float]:
        """Tokens that an epoch takes from each text in the mean."""
        return [
            samples * tokens / own for samples, tokens, own in zip(self._samples, self._tokens, self._own, strict=True)
        ]

    def _own_cuts(self, index: int, beginning: int, running: int, number: int) -> list[Cut]:
        """So many cuts of one text's own order, epoch after epoch, from a running number on."""
        windows, own, offset = self._windows[index], self._own[index], self._offsets[index]
        first_document = self._first_documents[index]
        cuts: list[Cut] = []
        while len(cuts) < number:
            own_epoch, place = divmod(running + len(cuts), own)
            until = min(own, place + number - len(cuts))
            for cut in windows.cuts(beginning * _OWN_STRIDE + own_epoch, place, until):
                (span,) = cut.spans
                moved = span._replace(document=first_document + span.document)
                cuts.append(Cut(cut.epoch, offset + cut.number, (moved,)))
        return cuts


def _require(group: MixedText, windows: int) -> None:
    if not group.weight > 0:
        raise TextError(
            "a text without a weight beside others that have one",
            where=group.name,
            next=f"give each text its share, as in {group.name}:0.5",
        )
    if not windows:
        raise TextError(
            "there is nothing to train on in one of the texts of the mixture",
            where=group.name,
            next="bring more of this text, leave it out, or hold out less: --set text.held_out.share=1%",
        )


def _apportioned(shares: Sequence[float], count: int) -> list[int]:
    """Whole numbers in proportion to shares that add up to `count`, by largest remainder; each at least 1."""
    assert count >= len(shares), "each text has a window"
    total = math.fsum(shares)
    wanted = [count * share / total for share in shares]
    got = [max(1, math.floor(number)) for number in wanted]
    missing = count - sum(got)
    step = 1 if missing > 0 else -1  # too many where several shares are worth less than one sample each
    for _ in range(abs(missing)):
        able = [index for index, number in enumerate(got) if number + step >= 1]
        index = max(able, key=lambda index: step * (wanted[index] - got[index]))
        got[index] += step
    return got


def _even(first: int, number: int, samples: int, count: int) -> tuple[int, NDArray[np.bool_]]:
    """Which of the places [first, first + number) of `count` fall to a text of `samples`, and how many before them.

    Of the first p places ⌊p · samples ÷ count + ½⌋ do. The part that may exceed 64 bits is reckoned exactly.
    """
    before, remainder = divmod(2 * first * samples + count, 2 * count)
    upto_N = (remainder + 2 * samples * np.arange(number + 1)) // (2 * count)
    return before, np.diff(upto_N).astype(np.bool_)
