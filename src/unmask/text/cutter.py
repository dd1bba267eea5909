"""Room card: documents to windows.

Comes in: the number of tokens of each document, the length of a window, a seed. Goes out: cuts: which tokens the
samples of an epoch hold and in which order they come, as pure functions of (seed, epoch, sample). Called by: loader,
pretrain, the objectives that read single texts.

Windows never cross a document. A document of n tokens gives c = ceil(n / length) windows in every epoch, so the number
of samples is known without looking: one window where it fits, c equal pieces below 16, and from 16 on windows of
exactly `length`, the first and last shorter, whose borders move from epoch to epoch by one draw.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask import rng
from unmask.contracts import Cut, Span

# From this many windows on, a document's borders move; in a shorter one the stubs at its ends would weigh too much.
LONG: Final = 16


class Windows:
    """Cuts of one document each. `length` is what a window holds of the document, special pieces not counted."""

    def __init__(self, lengths_N: Int[np.ndarray, "N"], length: int, seed: int) -> None:
        assert length > 0, "a window holds at least one token"
        self._lengths_N = np.asarray(lengths_N, dtype=np.int64)
        self._length, self._seed = length, seed
        self._windows_N = -(-self._lengths_N // length)
        self._first_N1 = np.concatenate([[0], np.cumsum(self._windows_N)])
        self._count = int(self._first_N1[-1])

    def count(self, epoch: int) -> int:
        """Samples in an epoch; the same in each."""
        return self._count

    def cut(self, epoch: int, sample: int) -> Cut:
        """The sample at place `sample` of the epoch's order; its `number` is the window's, whatever its place."""
        return self.cuts(epoch, sample, sample + 1)[0]

    def cuts(self, epoch: int, first: int, last: int) -> list[Cut]:
        """The samples at places [first, last) of the epoch's order."""
        assert 0 <= first <= last <= self._count, "a place outside the epoch"
        number_N = rng.permute(np.arange(first, last), self._count, self._seed, "order", epoch)
        document_N, begin_N, end_N = self._borders(number_N, epoch)
        columns = (number_N.tolist(), document_N.tolist(), begin_N.tolist(), end_N.tolist())
        return [
            Cut(epoch, number, (Span(document, begin, end),))
            for number, document, begin, end in zip(*columns, strict=True)
        ]

    def _borders(
        self, number_N: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Document, first and last token of windows, given by their numbers."""
        # The last document that begins at or before a number; those without windows begin where the next one does.
        document_N = np.searchsorted(self._first_N1, number_N, side="right") - 1
        windows_N, tokens_N = self._windows_N[document_N], self._lengths_N[document_N]
        place_N = number_N - self._first_N1[document_N]
        slack_N = windows_N * self._length - tokens_N
        shift_N = rng.below(slack_N + 1, self._seed, "window", epoch, document_N)
        long_N = windows_N >= LONG
        bounds = [
            np.where(
                long_N,
                np.clip(at_N * self._length - shift_N, 0, tokens_N),
                at_N * tokens_N // windows_N,
            )
            for at_N in (place_N, place_N + 1)
        ]
        return document_N, bounds[0], bounds[1]


def frozen(lengths_N: Int[np.ndarray, "N"], length: int) -> list[Cut]:
    """The windows that validation reads: equal pieces of every document, in their order, the same for every run."""
    cuts: list[Cut] = []
    for document, tokens in enumerate(np.asarray(lengths_N).tolist()):
        windows = -(-tokens // length)
        for place in range(windows):
            span = Span(document, place * tokens // windows, (place + 1) * tokens // windows)
            cuts.append(Cut(0, len(cuts), (span,)))
    return cuts
