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
from unmask.contracts import Cut, Cutter, CutterTools, Span
from unmask.errors import RecipeError
from unmask.outside import OutsideCutter, make

# From this many windows on, a document's borders move; in a shorter one the stubs at its ends would weigh too much.
LONG: Final = 16
_BLOCK: Final = 64  # documents
_COUNTED_AT_ONCE: Final = _BLOCK << 12
LOOKED_AT: Final = 4096  # samples by which the size of an epoch is estimated where a cutter is not ours


class Windows:
    """Cuts of one document each. `length` is what a window holds of the document, special pieces not counted."""

    def __init__(self, lengths_N: Int[np.ndarray, "N"], length: int, seed: int) -> None:
        assert length > 0, "a window holds at least one token"
        self._lengths_N = np.asarray(lengths_N, dtype=np.int64)  # often mapped from a file, and then left there
        self._length, self._seed = length, seed
        # How many windows lie before every 64th document; the rest is counted when it is asked for. With a number per
        # document, a billion of them would take 8 GB in every stage.
        sums = [np.zeros(1, dtype=np.int64)]
        for first in range(0, len(self._lengths_N), _COUNTED_AT_ONCE):
            windows_N = -(-self._lengths_N[first : first + _COUNTED_AT_ONCE] // length)
            sums.append(np.add.reduceat(windows_N, np.arange(0, len(windows_N), _BLOCK)))
        self._before_K1 = np.cumsum(np.concatenate(sums))
        self._count = int(self._before_K1[-1])

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
        # The first document with more windows before its end than the number; those without windows have none more.
        block_N = np.searchsorted(self._before_K1, number_N, side="right") - 1
        inside_N = number_N - self._before_K1[block_N]
        each_NB = block_N[:, None] * _BLOCK + np.arange(_BLOCK)
        length_NB = self._lengths_N[np.minimum(each_NB, len(self._lengths_N) - 1)]
        until_NB = np.cumsum(-(-length_NB // self._length), axis=1)
        offset_N = (until_NB <= inside_N[:, None]).sum(axis=1)
        document_N = block_N * _BLOCK + offset_N
        tokens_N = self._lengths_N[document_N]
        windows_N = -(-tokens_N // self._length)
        row_N = np.arange(len(number_N))
        place_N = inside_N - until_NB[row_N, offset_N] + windows_N
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


class FromOutside:
    """A cutter of a person's own, whose cuts are looked at before anything is read by them."""

    def __init__(self, settings: OutsideCutter, lengths_N: Int[np.ndarray, "N"], length: int, seed: int) -> None:
        self._kind, self._lengths_N, self._length = settings.kind, np.asarray(lengths_N, dtype=np.int64), length
        self._cutter: Cutter = make(settings, CutterTools(self._lengths_N, length, seed))
        self._count = self._cutter.count(0)
        if self._count < 1:
            raise self._refused(f"it finds no sample in {len(self._lengths_N):,} documents")

    def count(self, epoch: int) -> int:
        """Samples in an epoch; the same in each."""
        return self._count

    def cuts(self, epoch: int, first: int, last: int) -> list[Cut]:
        """The samples at places [first, last) of the epoch's order."""
        return [self._looked_at(self._cutter.cut(epoch, sample), epoch, sample) for sample in range(first, last)]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample in the mean, special pieces not counted; of many samples, some are looked at."""
        places = np.unique(np.linspace(0, self._count - 1, min(self._count, LOOKED_AT), dtype=np.int64)).tolist()
        return float(np.mean([self.cuts(0, place, place + 1)[0].tokens for place in places]))

    def _looked_at(self, cut: Cut, epoch: int, sample: int) -> Cut:
        spans = cut.spans
        wrong = f"it gave {len(spans)} spans where a sample has one" if len(spans) != 1 else ""
        if not wrong:
            document, first, last, _ = spans[0]
            if not 0 <= document < len(self._lengths_N):
                wrong = f"it names document {document} of {len(self._lengths_N)}"
            elif not 0 <= first < last <= self._lengths_N[document]:
                wrong = f"it cuts tokens {first} to {last} of a document that has {self._lengths_N[document]}"
            elif last - first > self._length:
                wrong = f"it gave {last - first} tokens where {self._length} fit"
        if wrong:
            raise self._refused(f"{wrong} (epoch {epoch}, sample {sample})")
        return cut

    def _refused(self, why: str) -> RecipeError:
        return RecipeError(
            f"the cutter `{self._kind}` breaks its promise: {why}",
            where="text.cutter",
            next=f"`unmask check {self._kind}` shows which promises it keeps",
        )


def frozen(lengths_N: Int[np.ndarray, "N"], length: int) -> list[Cut]:
    """The windows that validation reads: equal pieces of every document, in their order, the same for every run."""
    cuts: list[Cut] = []
    for document, tokens in enumerate(np.asarray(lengths_N).tolist()):
        windows = -(-tokens // length)
        for place in range(windows):
            span = Span(document, place * tokens // windows, (place + 1) * tokens // windows)
            cuts.append(Cut(0, len(cuts), (span,)))
    return cuts
