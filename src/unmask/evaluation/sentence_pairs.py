"""Room card: a model's answers on frozen pairs of segments.

Comes in: held-out token shards, a tokenizer, what is asked of a pair. Goes out: a FrozenPairs, and what a model makes
of it: loss and accuracy. Called by: workshop (validation).

Pairs are drawn once with a constant of the house for a seed and hidden as held-out documents are, always at 15 %: the
same for every run of one tokenizer and length, whatever its seed, rate and weight. Half of them follow one another, so
that an accuracy of 50 % is chance; of 2,048 pairs it is known to 1.1 points (a standard error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
import torch
from torch import nn

from unmask.core.distributed import World
from unmask.core.errors import TextError
from unmask.core.types import Batch, Text, pack
from unmask.data.loader import frame_tokens, read
from unmask.data.prepare import Corpus
from unmask.data.sentence_pairs import PairKind, Pairs
from unmask.data.shards import Shards
from unmask.evaluation.masked_lm import HOUSE_RULE, HOUSE_SEED
from unmask.evaluation.validation import PairValidation
from unmask.objectives.masking import Laid, choose, hide
from unmask.objectives.sentence_pairs import pair_loss
from unmask.tokenization.tokenizer import Tokenizer

PAIRS_AT_MOST: Final = 2048
_BATCH_TOKENS: Final = 16_384


@dataclass(frozen=True)
class FrozenPairs:
    """Batches of pairs that never change, some tokens hidden."""

    batches: tuple[Batch, ...]
    length: int
    pairs: int


@dataclass(frozen=True)
class PairHeldout:
    """What a model made of frozen pairs."""

    loss: float  # nats per pair
    accuracy: float
    pairs: int
    length: int


def freeze_pairs(shards: Shards, tokenizer: Tokenizer, length: int, kind: PairKind) -> FrozenPairs:
    """Draw pairs of up to `length` slots (special tokens included) from held-out documents, and hide 15 %.

    Raises:
        TextError: too few of the documents have two sentences.
    """
    try:
        cutter = Pairs(shards, length - frame_tokens(tokenizer, 2), HOUSE_SEED, kind)
    except TextError as error:
        raise TextError(
            f"of the held-out text, {error.what}",
            where="text.held_out",
            next="hold out more: --set text.held_out.share=20%",
        ) from error
    texts = [read(shards, cut, tokenizer) for cut in cutter.cuts(0, 0, min(cutter.count(0), PAIRS_AT_MOST))]
    texts.sort(key=lambda text: (-len(text.ids), text.number))
    groups: list[list[Text]] = []
    room = 0
    for text in texts:
        if len(text.ids) > room:
            groups.append([])
            room = _BATCH_TOKENS
        groups[-1].append(text)
        room -= len(text.ids)
    return FrozenPairs(tuple(_hidden(group, tokenizer) for group in groups), length, len(texts))


def _hidden(texts: Sequence[Text], tokenizer: Tokenizer) -> Batch:
    batch = pack(texts)
    laid = Laid(batch.marks_T.numpy(), np.asarray(batch.starts), batch.sample_B2.numpy())
    at_M = choose(laid, HOUSE_RULE, HOUSE_SEED)
    ids_T = hide(
        batch.ids_T.numpy(),
        at_M,
        laid,
        HOUSE_RULE,
        HOUSE_SEED,
        mask_id=tokenizer.mask_id,
        ordinary_N=tokenizer.ordinary_N,
    )
    return replace(batch, ids_T=torch.from_numpy(ids_T))


@torch.inference_mode()
def evaluate_pairs(encoder: nn.Module, pair_head: nn.Module, held: FrozenPairs, world: World) -> PairHeldout:
    """Mean loss and accuracy over all pairs; ranks share the batches."""
    encoder.eval()
    pair_head.eval()
    nats = right = 0.0
    for one in held.batches[world.rank :: world.ranks]:
        batch = one.to(world.device)
        with world.autocast():
            found = pair_loss(pair_head, encoder(batch), batch)
        nats, right = nats + float(found[0]), right + float(found[1])
    nats, right = world.sum([nats, right])
    return PairHeldout(nats / held.pairs, right / held.pairs, held.pairs, held.length)


class PairJudge:
    """Asks a learner about frozen pairs of the held-out text."""

    def __init__(self, kind: str, corpus: Corpus, lengths: Sequence[int], world: World) -> None:
        """`lengths` are those of the stages.

        Raises:
            TextError: too few held-out documents have two sentences.
        """
        self._kind: PairKind = cast("PairKind", kind)
        self._corpus, self._lengths, self._world = corpus, lengths, world
        self._frozen: dict[int, FrozenPairs] = {}
        self.frozen(lengths[-1])  # now, and not when hours have gone into training

    def frozen(self, length: int) -> FrozenPairs:
        """Pairs of at most this length; made once."""
        if length not in self._frozen:
            self._frozen[length] = freeze_pairs(self._corpus.held_out, self._corpus.tokenizer, length, self._kind)
        return self._frozen[length]

    def validation(self, encoder: nn.Module, pair_head: nn.Module, stage: int) -> PairValidation:
        """The pairs at the last stage's length and, in an earlier stage, also at that stage's."""
        here = {
            length: evaluate_pairs(encoder, pair_head, self.frozen(length), self._world)
            for length in {self._lengths[-1], self._lengths[stage]}
        }
        last = here.pop(self._lengths[-1])
        return PairValidation(last.loss, last.accuracy, last.pairs, {n: found.accuracy for n, found in here.items()})
