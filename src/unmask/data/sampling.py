"""Samplers: choose the tokens and the order of the samples of an epoch.

A sample is a pure function of (seed, epoch, position); samplers have no state. Every epoch has the same number of
samples, which is known without drawing any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final, Protocol

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from unmask.core import rng
from unmask.core.errors import RecipeError, TextError
from unmask.core.plugins import PluginSamplerConfig, make
from unmask.core.types import Sampler, SamplerContext, SampleSpec, TokenSpan

EPOCH_STRIDE = 1 << 20  # epochs of stage k are numbered from k times this, so no two stages share a random draw

# The window borders of a document move from this number of windows on. In a shorter document, the short windows at both
# ends would be too frequent.
LONG_DOCUMENT_WINDOWS: Final = 16
_BLOCK: Final = 64  # documents
_COUNTED_AT_ONCE: Final = _BLOCK << 12
ESTIMATE_SAMPLES: Final = 4096  # samples for an estimate of the mean length where it has no formula


class EpochSampler(Protocol):
    """A sampler that returns a range of an epoch at once."""

    spans: ClassVar[int]  # per sample

    def count(self, epoch: int) -> int:
        """Return the number of samples in an epoch, the same in each."""
        ...

    def specs(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """Return the samples at positions [first, last) of the epoch."""
        ...

    def epoch_tokens(self, num_special_tokens: int) -> int:
        """Return the tokens of an epoch, with special tokens in each sample; exact or an estimate."""
        ...


class WindowSampler:
    """Sampler of windows of `length` tokens of one document, special tokens not counted.

    A document of n tokens has c = ceil(n / length) windows in every epoch: one if it fits, c windows of equal length
    if c < 16. From 16 windows on, all but the first and last have exactly `length` tokens, and their borders move from
    epoch to epoch by one draw.
    """

    spans: ClassVar[int] = 1  # per sample

    def __init__(self, lengths: Int[np.ndarray, "N"], length: int, seed: int) -> None:
        """Count the windows of all documents; `lengths` are their numbers of tokens."""
        assert length > 0, "a window holds at least one token"
        self._lengths = np.asarray(lengths, dtype=np.int64)  # often memory-mapped, and not copied then
        self._length, self._seed = length, seed
        # The number of windows before every 64th document; windows within a block are counted when needed. One number
        # for each of a billion documents would take 8 GB in every stage.
        sums = [np.zeros(1, dtype=np.int64)]
        for first in range(0, len(self._lengths), _COUNTED_AT_ONCE):
            windows = -(-self._lengths[first : first + _COUNTED_AT_ONCE] // length)
            sums.append(np.add.reduceat(windows, np.arange(0, len(windows), _BLOCK)))
        self._before = np.cumsum(np.concatenate(sums))
        self._count = int(self._before[-1])

    def count(self, epoch: int) -> int:
        """Return the number of samples in an epoch, the same in each."""
        return self._count

    def specs(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """Return the samples at positions [first, last) of the epoch; their `number` is that of the window."""
        assert 0 <= first <= last <= self._count, "positions outside the epoch"
        numbers = rng.permute(np.arange(first, last), self._count, self._seed, "order", epoch)
        documents, begins, ends = self._borders(numbers, epoch)
        columns = (numbers.tolist(), documents.tolist(), begins.tolist(), ends.tolist())
        return [
            SampleSpec(epoch, number, (TokenSpan(document, begin, end),))
            for number, document, begin, end in zip(*columns, strict=True)
        ]

    def epoch_tokens(self, num_special_tokens: int) -> int:
        """Return the tokens of an epoch, with special tokens in each sample."""
        return int(self._lengths.sum()) + num_special_tokens * self._count

    def _borders(
        self, numbers: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the document, first token and end of each window."""
        # The first document with more windows up to its end than the number; empty documents add none.
        blocks = np.searchsorted(self._before, numbers, side="right") - 1
        in_block = numbers - self._before[blocks]
        candidates = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
        candidate_lengths = self._lengths[np.minimum(candidates, len(self._lengths) - 1)]
        until = np.cumsum(-(-candidate_lengths // self._length), axis=1)
        offsets = (until <= in_block[:, None]).sum(axis=1)
        documents = blocks * _BLOCK + offsets
        tokens = self._lengths[documents]
        windows = -(-tokens // self._length)
        positions = in_block - until[np.arange(len(numbers)), offsets] + windows
        slack = windows * self._length - tokens
        shift = rng.below(slack + 1, self._seed, "window", epoch, documents)
        is_long = windows >= LONG_DOCUMENT_WINDOWS
        begins, ends = (
            np.where(
                is_long,
                np.clip(at * self._length - shift, 0, tokens),
                at * tokens // windows,
            )
            for at in (positions, positions + 1)
        )
        return documents, begins, ends


class PluginSampler:
    """Wraps the sampler of a plugin, and checks its samples before they are read."""

    spans: ClassVar[int] = 1  # per sample

    def __init__(self, settings: PluginSamplerConfig, lengths: Int[np.ndarray, "N"], length: int, seed: int) -> None:
        self._kind, self._lengths, self._length = settings.kind, np.asarray(lengths, dtype=np.int64), length
        self._sampler: Sampler = make(settings, SamplerContext(self._lengths, length, seed))
        self._count = self._sampler.count(0)
        if self._count < 1:
            raise self._error(f"it has no samples for {len(self._lengths):,} documents")

    def count(self, epoch: int) -> int:
        """Return the number of samples in an epoch, the same in each."""
        return self._count

    def specs(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """Return the samples at positions [first, last) of the epoch.

        Raises:
            RecipeError: a sample of the plugin is not one span inside a document, or is too long.
        """
        return [self._check(self._sampler.spec(epoch, sample), epoch, sample) for sample in range(first, last)]

    def epoch_tokens(self, num_special_tokens: int) -> int:
        """Return an estimate of the tokens of an epoch: the sampler may skip tokens, or read some twice."""
        return round(self._count * (self.mean_tokens + num_special_tokens))

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens of up to 4,096 evenly spread samples, special tokens not counted."""
        some = np.linspace(0, self._count - 1, min(self._count, ESTIMATE_SAMPLES), dtype=np.int64)
        return float(np.mean([self.specs(0, sample, sample + 1)[0].tokens for sample in np.unique(some).tolist()]))

    def _check(self, spec: SampleSpec, epoch: int, sample: int) -> SampleSpec:
        spans = spec.spans
        problem = f"it gave {len(spans)} spans, expected 1" if len(spans) != 1 else ""
        if not problem:
            document, first, last, _ = spans[0]
            if not 0 <= document < len(self._lengths):
                problem = f"it gave document {document} of {len(self._lengths)}"
            elif not 0 <= first < last <= self._lengths[document]:
                problem = f"it gave tokens {first} to {last} of a document of {self._lengths[document]} tokens"
            elif last - first > self._length:
                problem = f"it gave {last - first} tokens, expected at most {self._length}"
        if problem:
            raise self._error(f"{problem} (epoch {epoch}, sample {sample})")
        return spec

    def _error(self, problem: str) -> RecipeError:
        return RecipeError(
            f"the sampler `{self._kind}` violates the Sampler protocol: {problem}",
            location="data.sampler",
            hint=f"run `unmask check-plugin {self._kind}` to test it",
        )


def eval_windows(lengths: Int[np.ndarray, "N"], length: int) -> list[SampleSpec]:
    """Return the windows of all documents for validation, in order, of equal length within a document."""
    specs: list[SampleSpec] = []
    for document, tokens in enumerate(np.asarray(lengths).tolist()):
        windows = -(-tokens // length)
        for window in range(windows):
            span = TokenSpan(document, window * tokens // windows, (window + 1) * tokens // windows)
            specs.append(SampleSpec(0, len(specs), (span,)))
    return specs


# The epochs of each text are numbered from multiples of this, one multiple for each start of the order. If a billionth
# of the tokens has half of the weight, an epoch of the mixture contains a billion epochs of that text. The stride
# allows for a thousand such epochs, and 2**23 starts fit into 63 bits.
_OWN_STRIDE: Final = 1 << 40


class MixedText(Protocol):
    """One of the texts of a mixture: a range of documents with a weight."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def weight(self) -> float:
        """Fraction of the training tokens, before normalization; 0 without a weight."""
        ...

    @property
    def first_document(self) -> int:
        """Index of the first document."""
        ...

    @property
    def last_document(self) -> int:
        """Index after the last document."""
        ...


def is_weighted(groups: Sequence[MixedText]) -> bool:
    """Return whether these texts are mixed by weight."""
    return any(group.weight > 0 for group in groups)


class MixtureSampler:
    """A sampler over several texts with weights; each text is read in its own order, epoch after epoch.

    The `number` of a sample is that of its window among those of all texts. Its `epoch` is the epoch of its text.
    """

    spans: ClassVar[int] = 1  # per sample

    def __init__(
        self,
        lengths: Int[np.ndarray, "N"],
        groups: Sequence[MixedText],
        length: int,
        seed: int,
        *,
        num_special_tokens: int,
        stride: int,
    ) -> None:
        """Divide the samples of an epoch among the texts.

        Args:
            lengths: number of tokens of each document.
            groups: the texts, with weights that need not add up to 1.
            length: maximum number of tokens of a window, special tokens not counted.
            seed: random seed of the order within each text.
            num_special_tokens: number of special tokens in each window.
            stride: number of epochs after which the order starts again, for the next training stage.

        Raises:
            TextError: a text has no weight, or no training text.
        """
        self.names = tuple(group.name for group in groups)
        self._stride = stride
        self._first_documents = [group.first_document for group in groups]
        self._windows: list[WindowSampler] = []
        self._own: list[int] = []  # windows of each text
        self._tokens: list[int] = []  # tokens of an epoch of each text, special tokens included
        for index, group in enumerate(groups):
            own_lengths = np.asarray(lengths[group.first_document : group.last_document], dtype=np.int64)
            # The first text keeps the seed, so that a single text is read as it would be without a weight.
            own_seed = rng.integer(seed, "text of a mixture", index) if index else seed
            windows = WindowSampler(own_lengths, length, own_seed)
            _require(group, windows.count(0))
            self._windows.append(windows)
            self._own.append(windows.count(0))
            self._tokens.append(windows.epoch_tokens(num_special_tokens))
        self._offsets = [sum(self._own[:index]) for index in range(len(groups))]
        self._count = sum(self._own)
        self._samples = _apportion(
            [group.weight * own / tokens for group, own, tokens in zip(groups, self._own, self._tokens, strict=True)],
            self._count,
        )

    def epoch_tokens(self, num_special_tokens: int) -> int:
        """Return the mean number of tokens of an epoch, with the special tokens passed to the constructor."""
        return round(math.fsum(self._tokens_by_text()))

    def epochs_by_text(self, tokens: float) -> dict[str, float]:
        """Return how many epochs of each text `tokens` tokens of the mixture contain."""
        epochs = tokens / math.fsum(self._tokens_by_text())
        return {
            name: epochs * samples / own
            for name, samples, own in zip(self.names, self._samples, self._own, strict=True)
        }

    def count(self, epoch: int) -> int:
        """Return the number of samples in an epoch, the same in each."""
        return self._count

    def specs(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """Return the samples at positions [first, last) of the epoch."""
        assert 0 <= first <= last <= self._count, "positions outside the epoch"
        start, since = divmod(epoch, self._stride)
        specs = np.empty(last - first, dtype=object)
        free, at, rest = np.arange(last - first), first, self._count
        for index, samples in enumerate(self._samples):
            before, is_own = _spread(at, len(free), samples, rest)
            specs[free[is_own]] = self._own_specs(index, start, since * samples + before, int(is_own.sum()))
            free, at, rest = free[~is_own], at - before, rest - samples
        return specs.tolist()

    def _tokens_by_text(self) -> list[float]:
        """Return the mean number of tokens from each text in an epoch."""
        return [
            samples * tokens / own for samples, tokens, own in zip(self._samples, self._tokens, self._own, strict=True)
        ]

    def _own_specs(self, index: int, start: int, first: int, number: int) -> list[SampleSpec]:
        """Return samples [first, first + number) of one text in its order, counted from a start of the order."""
        windows, own, offset = self._windows[index], self._own[index], self._offsets[index]
        first_document = self._first_documents[index]
        specs: list[SampleSpec] = []
        while len(specs) < number:
            own_epoch, position = divmod(first + len(specs), own)
            until = min(own, position + number - len(specs))
            for spec in windows.specs(start * _OWN_STRIDE + own_epoch, position, until):
                (span,) = spec.spans
                moved = span._replace(document=first_document + span.document)
                specs.append(SampleSpec(spec.epoch, offset + spec.number, (moved,)))
        return specs


def _require(group: MixedText, windows: int) -> None:
    if not group.weight > 0:
        raise TextError(
            "a text has no weight, but others have one",
            location=group.name,
            hint=f"give each text a weight, as in {group.name}:0.5",
        )
    if not windows:
        raise TextError(
            "a text of the mixture has nothing to train on",
            location=group.name,
            hint="add more of this text, remove it, or hold out less: --set data.held_out.fraction=1%",
        )


def _apportion(shares: Sequence[float], count: int) -> list[int]:
    """Return integers proportional to shares that add up to `count`, by largest remainder; each at least 1."""
    assert count >= len(shares), "each text has a window"
    total = math.fsum(shares)
    wanted = [count * share / total for share in shares]
    numbers = [max(1, math.floor(number)) for number in wanted]
    missing = count - sum(numbers)
    step = 1 if missing > 0 else -1  # negative where several shares are less than one sample each
    for _ in range(abs(missing)):
        able = [index for index, number in enumerate(numbers) if number + step >= 1]
        index = max(able, key=lambda index: step * (wanted[index] - numbers[index]))
        numbers[index] += step
    return numbers


def _spread(first: int, number: int, samples: int, count: int) -> tuple[int, NDArray[np.bool_]]:
    """Spread `samples` evenly over `count` positions.

    The first p positions contain ⌊p · samples ÷ count + ½⌋ of them. Numbers that may exceed 64 bits are exact integers.

    Returns:
        The number of chosen positions before `first`, and which of [first, first + number) are chosen.
    """
    before, remainder = divmod(2 * first * samples + count, 2 * count)
    until = (remainder + 2 * samples * np.arange(number + 1)) // (2 * count)
    return before, np.diff(until).astype(np.bool_)
