"""Room card: documents to windows.

Comes in: the number of tokens of each document, the length of a window, a seed. Goes out: cuts: which tokens the
samples of an epoch hold and in which order they come, as pure functions of (seed, epoch, sample). Called by: loader,
pretrain, the objectives that read single texts.

Windows never cross a document. A document of n tokens gives c = ceil(n / length) windows in every epoch, so the number
of samples is known without looking: one window where it fits, c equal pieces below 16, and from 16 on windows of
exactly `length`, the first and last shorter, whose borders move from epoch to epoch by one draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import RecipeError, TextError
from unmask.core.plugins import PluginSamplerConfig, make
from unmask.core.types import Sampler, SamplerContext, SampleSpec, TokenSpan

EPOCH_STRIDE = 1 << 20  # epochs of stage k are numbered from k times this, so that no two stages share a draw

# From this many windows on, a document's borders move; in a shorter one the stubs at its ends would weigh too much.
LONG: Final = 16
_BLOCK: Final = 64  # documents
_COUNTED_AT_ONCE: Final = _BLOCK << 12
LOOKED_AT: Final = 4096  # samples by which the size of an epoch is estimated where a sampler is not ours


class WindowSampler:
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

    def cut(self, epoch: int, sample: int) -> SampleSpec:
        """The sample at place `sample` of the epoch's order; its `number` is the window's, whatever its place."""
        return self.cuts(epoch, sample, sample + 1)[0]

    def cuts(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """The samples at places [first, last) of the epoch's order."""
        assert 0 <= first <= last <= self._count, "a place outside the epoch"
        number_N = rng.permute(np.arange(first, last), self._count, self._seed, "order", epoch)
        document_N, begin_N, end_N = self._borders(number_N, epoch)
        columns = (number_N.tolist(), document_N.tolist(), begin_N.tolist(), end_N.tolist())
        return [
            SampleSpec(epoch, number, (TokenSpan(document, begin, end),))
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


class PluginSampler:
    """A sampler of a person's own, whose cuts are looked at before anything is read by them."""

    def __init__(self, settings: PluginSamplerConfig, lengths_N: Int[np.ndarray, "N"], length: int, seed: int) -> None:
        self._kind, self._lengths_N, self._length = settings.kind, np.asarray(lengths_N, dtype=np.int64), length
        self._cutter: Sampler = make(settings, SamplerContext(self._lengths_N, length, seed))
        self._count = self._cutter.count(0)
        if self._count < 1:
            raise self._refused(f"it finds no sample in {len(self._lengths_N):,} documents")

    def count(self, epoch: int) -> int:
        """Samples in an epoch; the same in each."""
        return self._count

    def cuts(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """The samples at places [first, last) of the epoch's order."""
        return [self._looked_at(self._cutter.cut(epoch, sample), epoch, sample) for sample in range(first, last)]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample in the mean, special pieces not counted; of many samples, some are looked at."""
        places = np.unique(np.linspace(0, self._count - 1, min(self._count, LOOKED_AT), dtype=np.int64)).tolist()
        return float(np.mean([self.cuts(0, place, place + 1)[0].tokens for place in places]))

    def _looked_at(self, cut: SampleSpec, epoch: int, sample: int) -> SampleSpec:
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
            f"the sampler `{self._kind}` breaks its promise: {why}",
            location="data.sampler",
            hint=f"`unmask check-plugin {self._kind}` shows which promises it keeps",
        )


def frozen(lengths_N: Int[np.ndarray, "N"], length: int) -> list[SampleSpec]:
    """The windows that validation reads: equal pieces of every document, in their order, the same for every run."""
    cuts: list[SampleSpec] = []
    for document, tokens in enumerate(np.asarray(lengths_N).tolist()):
        windows = -(-tokens // length)
        for place in range(windows):
            span = TokenSpan(document, place * tokens // windows, (place + 1) * tokens // windows)
            cuts.append(SampleSpec(0, len(cuts), (span,)))
    return cuts


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
    """A sampler over several texts. `number` of a cut is the window's among those of all texts, whatever its place."""

    def __init__(
        self,
        lengths_N: Int[np.ndarray, "N"],
        groups: Sequence[MixedText],
        length: int,
        seed: int,
        *,
        num_special_tokens: int,
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
        self._windows: list[WindowSampler] = []
        self._own: list[int] = []  # windows of each text
        self._tokens: list[int] = []  # of each text's own epoch, special ones included
        for index, group in enumerate(groups):
            own_N = np.asarray(lengths_N[group.first_document : group.last_document], dtype=np.int64)
            # The first text keeps the seed, so that a single one is what it would be without a weight.
            windows = WindowSampler(own_N, length, rng.integer(seed, "text of a mixture", index) if index else seed)
            _require(group, windows.count(0))
            self._windows.append(windows)
            self._own.append(windows.count(0))
            self._tokens.append(int(own_N.sum()) + num_special_tokens * windows.count(0))
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

    def cut(self, epoch: int, sample: int) -> SampleSpec:
        """The sample at place `sample` of the epoch's order."""
        return self.cuts(epoch, sample, sample + 1)[0]

    def cuts(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
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

    def _own_cuts(self, index: int, beginning: int, running: int, number: int) -> list[SampleSpec]:
        """So many cuts of one text's own order, epoch after epoch, from a running number on."""
        windows, own, offset = self._windows[index], self._own[index], self._offsets[index]
        first_document = self._first_documents[index]
        cuts: list[SampleSpec] = []
        while len(cuts) < number:
            own_epoch, place = divmod(running + len(cuts), own)
            until = min(own, place + number - len(cuts))
            for cut in windows.cuts(beginning * _OWN_STRIDE + own_epoch, place, until):
                (span,) = cut.spans
                moved = span._replace(document=first_document + span.document)
                cuts.append(SampleSpec(cut.epoch, offset + cut.number, (moved,)))
        return cuts


def _require(group: MixedText, windows: int) -> None:
    if not group.weight > 0:
        raise TextError(
            "a text without a weight beside others that have one",
            location=group.name,
            hint=f"give each text its share, as in {group.name}:0.5",
        )
    if not windows:
        raise TextError(
            "there is nothing to train on in one of the texts of the mixture",
            location=group.name,
            hint="bring more of this text, leave it out, or hold out less: --set data.held_out.fraction=1%",
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
