"""The data loader: assigns samples to ranks and micro-batches, reads and packs them.

The state of a loader is one integer, the cursor: the number of the next sample.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from unmask.core.errors import RecipeError
from unmask.core.plugins import PluginSamplerConfig
from unmask.core.types import SPECIAL, Batch, Sample, SampleSpec, pack
from unmask.data.sampling import (
    EPOCH_STRIDE,
    EpochSampler,
    MixedText,
    MixtureSampler,
    PluginSampler,
    WindowSampler,
    is_weighted,
)
from unmask.data.sentence_pairs import PairKind, PairSampler
from unmask.data.shards import Shards
from unmask.tokenization.tokenizer import Tokenizer

_CHUNK_SAMPLES: Final = 4096  # drawn at a time: the fixed cost of a call equals that of about 100 samples
_CHUNKS_KEPT: Final = 4


def read_sample(shards: Shards, spec: SampleSpec, tokenizer: Tokenizer) -> Sample:
    """Read the tokens of a sample and add the special tokens of the tokenizer's frame.

    One span usually becomes `[CLS] … [SEP]`, two spans become `[CLS] A [SEP] B [SEP]`. The token type of [CLS] is that
    of the first span, and the type of each [SEP] that of the span before it.
    """
    first, *others = spec.spans
    if not others:
        ids, flags = tokenizer.add_special_tokens(shards.ids(*first[:3]), shards.token_flags(*first[:3]))
        return Sample(ids, flags, spec.epoch, spec.number, pair_label=spec.pair_label)
    (second,) = others
    assert tokenizer.frame.pair is not None, "two spans are separated by special tokens"
    before, between, after = tokenizer.frame.pair
    special = [np.full(len(side), SPECIAL, dtype=np.uint8) for side in (before, between, after)]
    ids = np.concatenate([before, shards.ids(*first[:3]), between, shards.ids(*second[:3]), after]).astype(np.int64)
    flags = np.concatenate(
        [special[0], shards.token_flags(*first[:3]), special[1], shards.token_flags(*second[:3]), special[2]]
    )
    until_second = len(before) + first.last - first.first + len(between)
    token_types = np.full(len(ids), first.segment)
    token_types[until_second:] = second.segment
    return Sample(ids, flags, spec.epoch, spec.number, token_types, spec.pair_label)


class _Chunk(NamedTuple):
    specs: list[SampleSpec]
    ends: list[int]  # tokens of the chunk up to and including each sample, special tokens included


class SampleStream:
    """The samples of a sampler, epoch after epoch."""

    def __init__(self, shards: Shards, sampler: EpochSampler, tokenizer: Tokenizer) -> None:
        assert tokenizer.fingerprint == shards.tokenizer_fingerprint, "the shards were written with another tokenizer"
        assert sampler.count(0) > 0, "the sampler has no samples"
        self._shards, self._sampler, self._tokenizer = shards, sampler, tokenizer
        self._count = sampler.count(0)
        self._special_tokens = [tokenizer.num_special_tokens(spans) for spans in range(3)]
        self._kept: dict[tuple[int, int], _Chunk] = {}

    def take(self, cursor: int, tokens: int) -> tuple[list[SampleSpec], int]:
        """Return the next samples with at least `tokens` tokens, special tokens included, and the next cursor."""
        taken: list[SampleSpec] = []
        while tokens > 0 or not taken:
            epoch, sample = divmod(cursor, self._count)
            number, first = divmod(sample, _CHUNK_SAMPLES)
            chunk = self._chunk(epoch, number)
            before = chunk.ends[first - 1] if first else 0
            last = min(bisect_left(chunk.ends, before + max(tokens, 1), first) + 1, len(chunk.specs))
            taken += chunk.specs[first:last]
            tokens -= chunk.ends[last - 1] - before
            cursor += last - first
        return taken, cursor

    def lengths(self, specs: Sequence[SampleSpec]) -> list[int]:
        """Return the number of tokens of each sample, special tokens included."""
        return [spec.tokens + self._special_tokens[len(spec.spans)] for spec in specs]

    def batch(self, specs: Sequence[SampleSpec]) -> Batch:
        """Read and pack samples, in the order given."""
        return pack([read_sample(self._shards, spec, self._tokenizer) for spec in specs])

    def _chunk(self, epoch: int, number: int) -> _Chunk:
        key = (epoch, number)
        if key not in self._kept:
            first = number * _CHUNK_SAMPLES
            specs = self._sampler.specs(epoch, first, min(first + _CHUNK_SAMPLES, self._count))
            while len(self._kept) >= _CHUNKS_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = _Chunk(specs, np.cumsum(self.lengths(specs)).tolist())
        return self._kept[key]


def assign_microbatches(lengths: Sequence[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """Assign the samples of a step to ranks and micro-batches.

    Every rank gets the same, smallest number of micro-batches of at most `micro_tokens` tokens, or of one longer
    sample. Samples are added, longest first, to the micro-batch with the fewest tokens, so all are about equally full.
    Within a micro-batch, longer samples come first and equal lengths are neighbors, so attention can use views without
    copies.

    Returns:
        For each rank its micro-batches, each a list of indices into `lengths`. A micro-batch is empty only if there are
        fewer samples than micro-batches.
    """
    assert ranks > 0 and micro_tokens > 0, "no ranks, or no tokens"
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fewest = _fewest([lengths[index] for index in order], micro_tokens, ranks)
    while True:
        bins = _fill(lengths, order, fewest * ranks)
        loads = [sum(lengths[index] for index in members) for members in bins]
        if all(load <= micro_tokens or len(members) == 1 for load, members in zip(loads, bins, strict=True)):
            break
        fewest += 1
    # Ranks wait for each other at every micro-batch, so micro-batches of one round should be about equally full. Every
    # other round is reversed, so that no rank gets the fullest one each time.
    fullest = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn in range(fewest):
        numbers = fullest[turn * ranks : (turn + 1) * ranks]
        for rank, number in enumerate(numbers if turn % 2 == 0 else reversed(numbers)):
            assigned[rank].append(bins[number])
    return assigned


def _fewest(descending: Sequence[int], micro_tokens: int, ranks: int) -> int:
    """Return a lower bound on the micro-batches of a rank, by tokens and by long samples of which few fit in one."""
    bins = -(-sum(descending) // micro_tokens)
    for beside in range(1, 8):  # at most `beside` of the samples longer than this fit in one micro-batch
        longer = bisect_left(descending, -(micro_tokens // (beside + 1)), key=lambda length: -length)
        bins = max(bins, -(-longer // beside))
    return max(1, -(-bins // ranks))


def _fill(lengths: Sequence[int], order: Sequence[int], bins: int) -> list[list[int]]:
    """Put each sample, in order, into the bin with the fewest tokens."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, number) for number in range(bins)]
    for index in order:
        load, number = loads[0]
        filled[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return filled


@dataclass(frozen=True)
class PairSampling:
    """How sentence pairs are sampled."""

    kind: PairKind
    short: float = 0.1  # probability that a pair is shortened to a random length


def build_sampler(
    shards: Shards,
    tokenizer: Tokenizer,
    length: int,
    seed: int,
    *,
    groups: Sequence[MixedText] = (),
    other: PluginSamplerConfig | PairSampling | None = None,
) -> EpochSampler:
    """Return the sampler of a stage.

    Args:
        shards: the training documents.
        tokenizer: tokenizer of the shards.
        length: maximum number of tokens of a sample, special tokens included.
        seed: random seed of the sample order.
        groups: texts of the documents; windows are mixed by their weights, if there are weights.
        other: sampler of a plugin, or sentence pairs, instead of windows.

    Raises:
        RecipeError: the texts have weights, but the samples are not windows.
        TextError: the documents yield no sentence pairs, or a text of a mixture has no training text.
    """
    if isinstance(other, PairSampling):
        _refuse_weights(groups, f"sentence pairs ({other.kind})", "objective", "pairs are drawn from all documents")
        inner = length - tokenizer.num_special_tokens(2)
        return PairSampler(shards, inner, seed, other.kind, short_probability=other.short)
    special = tokenizer.num_special_tokens()
    inner = length - special
    if other:
        _refuse_weights(groups, f"the sampler `{other.kind}`", "data.sampler", "a plugin sampler decides the order")
        return PluginSampler(other, shards.lengths, inner, seed)
    if is_weighted(groups):
        return MixtureSampler(shards.lengths, groups, inner, seed, num_special_tokens=special, stride=EPOCH_STRIDE)
    return WindowSampler(shards.lengths, inner, seed)


def _refuse_weights(groups: Sequence[MixedText], samples: str, location: str, reason: str) -> None:
    if is_weighted(groups):
        raise RecipeError(
            f"texts with weights can't be combined with {samples}",
            location=location,
            hint=f"remove the weights: {reason}",
        )


class StageLoader:
    """The micro-batches of a training stage."""

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        sampler: EpochSampler,
        micro_tokens: int,
        names: Sequence[str] = (),
    ) -> None:
        """Create a loader.

        Args:
            shards: the training documents.
            tokenizer: tokenizer of the shards.
            sampler: sampler of these documents.
            micro_tokens: maximum number of tokens of a micro-batch, unless one sample is longer.
            names: names of the texts of the documents.
        """
        self._sampler, self._names = sampler, names
        self._stream = SampleStream(shards, sampler, tokenizer)
        self._micro_tokens = micro_tokens
        self._num_special_tokens = tokenizer.num_special_tokens(sampler.spans)

    @property
    def samples(self) -> int:
        """Number of samples of an epoch."""
        return self._sampler.count(0)

    @property
    def epoch_tokens(self) -> int:
        """Number of tokens of an epoch, special tokens included: exact for windows, else the mean or an estimate."""
        return self._sampler.epoch_tokens(self._num_special_tokens)

    def epochs_by_text(self, tokens: float) -> dict[str, float]:
        """Return how many epochs of each named text `tokens` tokens contain."""
        if isinstance(self._sampler, MixtureSampler):
            return self._sampler.epochs_by_text(tokens)
        return dict.fromkeys(self._names, tokens / self.epoch_tokens)

    def first_cursor(self, stage: int) -> int:
        """Return the cursor of the first sample of a stage: it begins an epoch that no other stage reaches."""
        return stage * EPOCH_STRIDE * self.samples

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """Return the micro-batches of one rank for the next `tokens` tokens, and the next cursor."""
        specs, after = self._stream.take(cursor, tokens)
        assigned = assign_microbatches(self._stream.lengths(specs), ranks, self._micro_tokens)
        return [self._stream.batch([specs[index] for index in micro]) for micro in assigned[rank] if micro], after
