"""Room card: cuts to batches.

Comes in: shards, a sampler, a cursor. Goes out: the next samples of the order until a step's tokens are met, the cursor
after them, how they are dealt to ranks and micro-batches, and the batches. Called by: the training loop, validation.

The cursor is one integer, samples since the first; nothing else is kept, so a run resumes at once.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np

from unmask.core.errors import RecipeError
from unmask.core.plugins import PluginSamplerConfig
from unmask.core.types import SPECIAL, Batch, Sample, SampleSpec, pack
from unmask.data.sampling import EPOCH_STRIDE, MixedText, Mixture, PluginSampler, WindowSampler, is_weighted
from unmask.data.sentence_pairs import PairKind, Pairs
from unmask.data.shards import Shards
from unmask.tokenization.tokenizer import Tokenizer

_CHUNK_SAMPLES: Final = 4096  # cut at a time: one call costs as much as some 100 samples
_CHUNKS_KEPT: Final = 4


class ChunkCutter(Protocol):
    """A sampler that gives a stretch of its order at once."""

    def count(self, epoch: int) -> int:
        """Samples in this epoch, the same in each."""
        ...

    def cuts(self, epoch: int, first: int, last: int) -> list[SampleSpec]:
        """The samples at places [first, last) of the epoch's order."""
        ...


def read(shards: Shards, cut: SampleSpec, tokenizer: Tokenizer) -> Sample:
    """Fetch the tokens of a cut and frame them, where the tokenizer has [CLS] and [SEP].

    One span becomes `[CLS] … [SEP]`, two become `[CLS] A [SEP] B [SEP]` with the segments of their spans, [CLS] in that
    of the first one and each [SEP] in that of the span before it.
    """
    first, *others = cut.spans
    ids, marks = tokenizer.add_special_tokens(shards.ids(*first[:3]), shards.marks(*first[:3]))
    if not others:
        return Sample(ids, marks, cut.epoch, cut.number, pair_label=cut.pair_label)
    assert tokenizer.cls_sep_ids is not None, "what parts two spans is [SEP]"
    end, edge = np.array([tokenizer.cls_sep_ids[1]]), np.array([SPECIAL], dtype=np.uint8)
    all_ids, all_marks, segments = [ids], [marks], [np.full(len(ids), first.segment)]
    for span in others:
        all_ids += [shards.ids(*span[:3]).astype(np.int64), end]
        all_marks += [shards.marks(*span[:3]), edge]
        segments.append(np.full(span.last - span.first + 1, span.segment))
    ids, marks = np.concatenate(all_ids), np.concatenate(all_marks)
    return Sample(ids, marks, cut.epoch, cut.number, np.concatenate(segments), cut.pair_label)


def frame_tokens(tokenizer: Tokenizer, spans: int = 1) -> int:
    """Special tokens around a text of so many spans."""
    return 0 if tokenizer.cls_sep_ids is None else 1 + spans


class _Chunk(NamedTuple):
    cuts: list[SampleSpec]
    ends: list[int]  # tokens of this and all cuts before it in the chunk, frames included


class SampleStream:
    """The samples of a sampler's order, epoch after epoch."""

    def __init__(self, shards: Shards, cutter: ChunkCutter, tokenizer: Tokenizer) -> None:
        assert tokenizer.fingerprint == shards.tokenizer_fingerprint, "these shards were made with another tokenizer"
        assert cutter.count(0) > 0, "there is nothing to read"
        self._shards, self._cutter, self._tokenizer = shards, cutter, tokenizer
        self._count = cutter.count(0)
        self._frames = [frame_tokens(tokenizer, spans) for spans in range(3)]
        self._kept: dict[tuple[int, int], _Chunk] = {}

    def take(self, cursor: int, tokens: int) -> tuple[list[SampleSpec], int]:
        """The next cuts from `cursor` until they hold `tokens` tokens, frames included, and the cursor after them."""
        taken: list[SampleSpec] = []
        while tokens > 0 or not taken:
            epoch, sample = divmod(cursor, self._count)
            number, first = divmod(sample, _CHUNK_SAMPLES)
            chunk = self._chunk(epoch, number)
            before = chunk.ends[first - 1] if first else 0
            last = min(bisect_left(chunk.ends, before + max(tokens, 1), first) + 1, len(chunk.cuts))
            taken += chunk.cuts[first:last]
            tokens -= chunk.ends[last - 1] - before
            cursor += last - first
        return taken, cursor

    def lengths(self, cuts: Sequence[SampleSpec]) -> list[int]:
        """Tokens of each cut, its frame included: what `deal` takes."""
        return [cut.tokens + self._frames[len(cut.spans)] for cut in cuts]

    def batch(
        self, cuts: Sequence[SampleSpec], *, slots: int | None = None, look: Literal["both", "left"] = "both"
    ) -> Batch:
        """The batch of these cuts, in the order given."""
        return pack([read(self._shards, cut, self._tokenizer) for cut in cuts], slots=slots, look=look)

    def _chunk(self, epoch: int, number: int) -> _Chunk:
        key = (epoch, number)
        if key not in self._kept:
            first = number * _CHUNK_SAMPLES
            cuts = self._cutter.cuts(epoch, first, min(first + _CHUNK_SAMPLES, self._count))
            while len(self._kept) >= _CHUNKS_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = _Chunk(cuts, np.cumsum(self.lengths(cuts)).tolist())
        return self._kept[key]


def assign_microbatches(lengths: Sequence[int], ranks: int, micro_tokens: int) -> list[list[list[int]]]:
    """Deal a step's samples: for each rank its micro-batches, each a list of indices into `lengths`.

    Every rank gets the same number of micro-batches, as few as hold at most `micro_tokens` tokens each (or one text
    that is longer). Texts go, longest first, to the micro-batch that holds fewest tokens, so all are about equally
    full. Within one, longer texts stand first and equal lengths together, which attention turns into views without
    copies. A micro-batch is an empty list only where there are fewer texts than micro-batches: fewer than ranks, or
    texts so long that each stands alone and their number doesn't come out even.
    """
    assert ranks > 0 and micro_tokens > 0, "no ranks, or no room"
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fewest = _fewest([lengths[index] for index in order], micro_tokens, ranks)
    while True:
        bins = _fill(lengths, order, fewest * ranks)
        loads = [sum(lengths[index] for index in held) for held in bins]
        if all(load <= micro_tokens or len(held) == 1 for load, held in zip(loads, bins, strict=True)):
            break
        fewest += 1
    # Ranks wait for each other at every micro-batch, so what they do at the same time should be about equally much;
    # every other row is dealt backwards, so that no rank gets the fuller one each time.
    fullest = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for row in range(fewest):
        numbers = fullest[row * ranks : (row + 1) * ranks]
        for rank, number in enumerate(numbers if row % 2 == 0 else reversed(numbers)):
            dealt[rank].append(bins[number])
    return dealt


def _fewest(descending: Sequence[int], micro_tokens: int, ranks: int) -> int:
    """A bound from below on a rank's micro-batches: by tokens, and by texts of which only so many fit in one."""
    bins = -(-sum(descending) // micro_tokens)
    for beside in range(1, 8):  # at most `beside` of the texts longer than this share a micro-batch
        longer = bisect_left(descending, -(micro_tokens // (beside + 1)), key=lambda length: -length)
        bins = max(bins, -(-longer // beside))
    return max(1, -(-bins // ranks))


def _fill(lengths: Sequence[int], order: Sequence[int], bins: int) -> list[list[int]]:
    """Each text, in order, into the bin that holds fewest tokens."""
    held: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, number) for number in range(bins)]
    for index in order:
        load, number = loads[0]
        held[number].append(index)
        heapq.heapreplace(loads, (load + lengths[index], number))
    return held


@dataclass(frozen=True)
class PairSampling:
    """How samples of two segments are drawn."""

    kind: PairKind
    short: float = 0.1  # share of the samples that are cut to a random length


class StageLoader:
    """A stage's samples: texts of up to `length` slots (special tokens included) in a seeded order, epoch after epoch.

    They are windows, or pairs where the objective reads such. Where the texts have weights, windows are mixed; else
    every document comes once an epoch.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        length: int,
        micro_tokens: int,
        seed: int,
        groups: Sequence[MixedText] = (),
        other: PluginSamplerConfig | PairSampling | None = None,
    ) -> None:
        """`other` is what is read in the place of windows: by a sampler of a person's own, or pairs.

        Raises:
            RecipeError: texts with weights, where windows are not what is cut.
            TextError: the documents give no pairs.
        """
        self._shards = shards
        self._names = [group.name for group in groups]
        self._num_special_tokens = frame_tokens(tokenizer, 2 if isinstance(other, PairSampling) else 1)
        inside = length - self._num_special_tokens
        self._cutter: WindowSampler | Mixture | PluginSampler | Pairs
        if isinstance(other, PairSampling):
            _refuse_weights(groups, f"pairs ({other.kind})", "objective", "pairs are drawn from all documents alike")
            self._cutter = Pairs(shards, inside, seed, other.kind, short_share=other.short)
        elif other:
            self._cutter = _from_plugin(other, shards, groups, inside, seed)
        elif is_weighted(groups):
            self._cutter = Mixture(
                shards.lengths_N, groups, inside, seed, num_special_tokens=self._num_special_tokens, stride=EPOCH_STRIDE
            )
        else:
            self._cutter = WindowSampler(shards.lengths_N, inside, seed)
        self._stream = SampleStream(shards, self._cutter, tokenizer)
        self._micro_tokens = micro_tokens

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        return self._cutter.count(0)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch, special tokens included; of a mixture, in the mean."""
        if isinstance(self._cutter, Mixture):
            return self._cutter.epoch_tokens
        if isinstance(self._cutter, PluginSampler | Pairs):  # which may leave tokens out, or read some twice: about
            return round(self.samples * (self._cutter.mean_tokens + self._num_special_tokens))
        return self._shards.tokens + self._num_special_tokens * self.samples

    def seen(self, tokens: float) -> dict[str, float]:
        """How often each text, by its name, is seen in so many tokens."""
        if isinstance(self._cutter, Mixture):
            return self._cutter.seen(tokens)
        return dict.fromkeys(self._names, tokens / self.epoch_tokens)

    def first_cursor(self, stage: int) -> int:
        """Where the order of a stage begins: at an epoch that no other stage has."""
        return stage * EPOCH_STRIDE * self.samples

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of the next `tokens` tokens of the order, and the cursor after them."""
        cuts, after = self._stream.take(cursor, tokens)
        dealt = assign_microbatches(self._stream.lengths(cuts), ranks, self._micro_tokens)
        return [self._stream.batch([cuts[index] for index in micro]) for micro in dealt[rank] if micro], after


def _from_plugin(
    outside: PluginSamplerConfig, shards: Shards, groups: Sequence[MixedText], length: int, seed: int
) -> PluginSampler:
    """A sampler of a person's own; it decides the order alone, so texts can't have weights beside it."""
    why = "a sampler of one's own decides what comes how often"
    _refuse_weights(groups, f"the sampler `{outside.kind}`", "data.sampler", why)
    return PluginSampler(outside, shards.lengths_N, length, seed)


def _refuse_weights(groups: Sequence[MixedText], beside: str, where: str, why: str) -> None:
    if is_weighted(groups):
        raise RecipeError(f"texts with weights and {beside}", location=where, hint=f"leave the weights out: {why}")
