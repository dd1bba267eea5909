"""Room card: from the order of samples to a step's batches.

Comes in: token shards, the texts that they are of and their weights, one integer cursor. Goes out: the micro-batches of
one rank for one step. The step's samples are taken from the order first, the same for every rank, and only then dealt.
Called by: workshop makes one feed per stage and hands them to the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unmask.contracts import Batch
from unmask.errors import RecipeError
from unmask.outside import OutsideCutter
from unmask.text.cutter import FromOutside, Windows
from unmask.text.loader import Stream, deal, frame_tokens
from unmask.text.mixture import MixedText, Mixture, is_weighted
from unmask.text.pairs import PairKind, Pairs
from unmask.text.shards import Shards
from unmask.text.tokenizer import Tokenizer
from unmask.train.plan import EPOCH_STRIDE


@dataclass(frozen=True)
class PairSampling:
    """How samples of two segments are drawn."""

    kind: PairKind
    short: float = 0.1  # share of the samples that are cut to a random length


class StageFeed:
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
        other: OutsideCutter | PairSampling | None = None,
    ) -> None:
        """`other` is what is read in the place of windows: by a cutter of a person's own, or pairs.

        Raises:
            RecipeError: texts with weights, where windows are not what is cut.
            TextError: the documents give no pairs.
        """
        self._shards = shards
        self._names = [group.name for group in groups]
        self._framing = frame_tokens(tokenizer, 2 if isinstance(other, PairSampling) else 1)
        inside = length - self._framing
        self._cutter: Windows | Mixture | FromOutside | Pairs
        if isinstance(other, PairSampling):
            _refuse_weights(groups, f"pairs ({other.kind})", "objective", "pairs are drawn from all documents alike")
            self._cutter = Pairs(shards, inside, seed, other.kind, short_share=other.short)
        elif other:
            self._cutter = _from_outside(other, shards, groups, inside, seed)
        elif is_weighted(groups):
            self._cutter = Mixture(shards.lengths_N, groups, inside, seed, framing=self._framing, stride=EPOCH_STRIDE)
        else:
            self._cutter = Windows(shards.lengths_N, inside, seed)
        self._stream = Stream(shards, self._cutter, tokenizer)
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
        if isinstance(self._cutter, FromOutside | Pairs):  # which may leave tokens out, or read some twice: about
            return round(self.samples * (self._cutter.mean_tokens + self._framing))
        return self._shards.tokens + self._framing * self.samples

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
        dealt = deal(self._stream.lengths(cuts), ranks, self._micro_tokens)
        return [self._stream.batch([cuts[index] for index in micro]) for micro in dealt[rank] if micro], after


def _from_outside(
    outside: OutsideCutter, shards: Shards, groups: Sequence[MixedText], length: int, seed: int
) -> FromOutside:
    """A cutter of a person's own; it decides the order alone, so texts can't have weights beside it."""
    why = "a cutter of one's own decides what comes how often"
    _refuse_weights(groups, f"the cutter `{outside.kind}`", "text.cutter", why)
    return FromOutside(outside, shards.lengths_N, length, seed)


def _refuse_weights(groups: Sequence[MixedText], beside: str, where: str, why: str) -> None:
    if is_weighted(groups):
        raise RecipeError(f"texts with weights and {beside}", where=where, next=f"leave the weights out: {why}")
