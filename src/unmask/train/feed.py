"""Room card: from the order of samples to a step's batches.

Comes in: token shards, a cutter, one integer cursor. Goes out: the micro-batches of one rank for one step. The step's
samples are taken from the order first, the same for every rank, and only then dealt. Called by: pretrain hands one feed
per stage to the loop.
"""

from __future__ import annotations

from unmask.contracts import Batch
from unmask.text.cutter import Windows
from unmask.text.loader import Stream, deal
from unmask.text.shards import Shards
from unmask.text.tokenizer import Tokenizer
from unmask.train.plan import EPOCH_STRIDE


class StageFeed:
    """A stage's samples: windows of `length` slots (special tokens included) in a seeded order, epoch after epoch."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer, length: int, micro_tokens: int, seed: int) -> None:
        self._shards = shards
        self._tokenizer = tokenizer
        self._framing = 2 if tokenizer.frame else 0
        self._cutter = Windows(shards.lengths_N, length - self._framing, seed)
        self._stream = Stream(shards, self._cutter, tokenizer)
        self._micro_tokens = micro_tokens

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        return self._cutter.count(0)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch, special tokens included."""
        return self._shards.tokens + self._framing * self.samples

    def first_cursor(self, stage: int) -> int:
        """Where the order of a stage begins: at an epoch that no other stage has."""
        return stage * EPOCH_STRIDE * self.samples

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of the next `tokens` tokens of the order, and the cursor after them."""
        cuts, after = self._stream.take(cursor, tokens)
        dealt = deal(self._stream.lengths(cuts), ranks, self._micro_tokens)
        return [self._stream.batch([cuts[index] for index in micro]) for micro in dealt[rank] if micro], after
