"""Room card: from the order of samples to a step's batches.

Comes in: token shards, the texts that they are of and their weights, one integer cursor. Goes out: the micro-batches of
one rank for one step. The step's samples are taken from the order first, the same for every rank, and only then dealt.
Called by: workshop makes one feed per stage and hands them to the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from unmask.contracts import Batch
from unmask.errors import RecipeError
from unmask.outside import OutsideCutter
from unmask.text.cutter import FromOutside, Windows
from unmask.text.loader import Stream, deal
from unmask.text.mixture import MixedText, Mixture, is_weighted
from unmask.text.shards import Shards
from unmask.text.tokenizer import Tokenizer
from unmask.train.plan import EPOCH_STRIDE


class StageFeed:
    """A stage's samples: windows of `length` slots (special tokens included) in a seeded order, epoch after epoch.

    Where the texts have weights, they are mixed; else every document comes once an epoch.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        length: int,
        micro_tokens: int,
        seed: int,
        groups: Sequence[MixedText] = (),
        outside: OutsideCutter | None = None,
    ) -> None:
        self._shards = shards
        self._names = [group.name for group in groups]
        self._framing = 2 if tokenizer.frame else 0
        inside = length - self._framing
        self._cutter: Windows | Mixture | FromOutside
        if outside:
            self._cutter = _from_outside(outside, shards, groups, inside, seed)
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
        if isinstance(self._cutter, FromOutside):  # which may leave tokens out, or read some twice: about
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
    if is_weighted(groups):
        raise RecipeError(
            f"texts with weights and the cutter `{outside.kind}`",
            where="text.cutter",
            next="leave the weights out: a cutter of one's own decides what comes how often",
        )
    return FromOutside(outside, shards.lengths_N, length, seed)
