"""Room card: a model's answers on frozen pairs of segments.

Comes in: held-out token shards, a tokenizer, what is asked of a pair. Goes out: a PairEvalSet, and what a model makes
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

from unmask.core.distributed import DistributedContext
from unmask.core.errors import TextError
from unmask.core.types import Batch, Sample, pack
from unmask.data.loader import frame_tokens, read
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sentence_pairs import PairKind, Pairs
from unmask.data.shards import Shards
from unmask.evaluation.masked_lm import EVAL_MASKING, EVAL_SEED
from unmask.evaluation.validation import PairValidation
from unmask.objectives.masking import PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.sentence_pairs import pair_loss
from unmask.tokenization.tokenizer import Tokenizer

PAIRS_AT_MOST: Final = 2048
_BATCH_TOKENS: Final = 16_384


@dataclass(frozen=True)
class PairEvalSet:
    """Batches of pairs that never change, some tokens hidden."""

    batches: tuple[Batch, ...]
    length: int
    pairs: int


@dataclass(frozen=True)
class PairEvalResult:
    """What a model made of frozen pairs."""

    loss: float  # nats per pair
    accuracy: float
    pairs: int
    length: int


def build_pair_eval_set(shards: Shards, tokenizer: Tokenizer, length: int, kind: PairKind) -> PairEvalSet:
    """Draw pairs of up to `length` slots (special tokens included) from held-out documents, and hide 15 %.

    Raises:
        TextError: too few of the documents have two sentences.
    """
    try:
        cutter = Pairs(shards, length - frame_tokens(tokenizer, 2), EVAL_SEED, kind)
    except TextError as error:
        raise TextError(
            f"of the held-out text, {error.message}",
            location="data.held_out",
            hint="hold out more: --set data.held_out.fraction=20%",
        ) from error
    texts = [read(shards, cut, tokenizer) for cut in cutter.cuts(0, 0, min(cutter.count(0), PAIRS_AT_MOST))]
    texts.sort(key=lambda text: (-len(text.ids), text.number))
    groups: list[list[Sample]] = []
    room = 0
    for text in texts:
        if len(text.ids) > room:
            groups.append([])
            room = _BATCH_TOKENS
        groups[-1].append(text)
        room -= len(text.ids)
    return PairEvalSet(tuple(_hidden(group, tokenizer) for group in groups), length, len(texts))


def _hidden(texts: Sequence[Sample], tokenizer: Tokenizer) -> Batch:
    batch = pack(texts)
    packed = PackedSequences(batch.token_flags_T.numpy(), np.asarray(batch.offsets), batch.sample_keys_B2.numpy())
    positions_M = select_positions(packed, EVAL_MASKING, EVAL_SEED)
    ids_T = corrupt_tokens(
        batch.ids_T.numpy(),
        positions_M,
        packed,
        EVAL_MASKING,
        EVAL_SEED,
        mask_id=tokenizer.mask_id,
        regular_token_ids=tokenizer.regular_token_ids,
    )
    return replace(batch, ids_T=torch.from_numpy(ids_T))


@torch.inference_mode()
def evaluate_pairs(
    encoder: nn.Module, pair_head: nn.Module, held: PairEvalSet, world: DistributedContext
) -> PairEvalResult:
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
    return PairEvalResult(nats / held.pairs, right / held.pairs, held.pairs, held.length)


class PairJudge:
    """Asks a learner about frozen pairs of the held-out text."""

    def __init__(self, kind: str, corpus: TokenizedCorpus, lengths: Sequence[int], world: DistributedContext) -> None:
        """`lengths` are those of the stages.

        Raises:
            TextError: too few held-out documents have two sentences.
        """
        self._kind: PairKind = cast("PairKind", kind)
        self._corpus, self._lengths, self._world = corpus, lengths, world
        self._frozen: dict[int, PairEvalSet] = {}
        self.frozen(lengths[-1])  # now, and not when hours have gone into training

    def frozen(self, length: int) -> PairEvalSet:
        """Pairs of at most this length; made once."""
        if length not in self._frozen:
            self._frozen[length] = build_pair_eval_set(
                self._corpus.held_out, self._corpus.tokenizer, length, self._kind
            )
        return self._frozen[length]

    def validation(self, encoder: nn.Module, pair_head: nn.Module, stage: int) -> PairValidation:
        """The pairs at the last stage's length and, in an earlier stage, also at that stage's."""
        here = {
            length: evaluate_pairs(encoder, pair_head, self.frozen(length), self._world)
            for length in {self._lengths[-1], self._lengths[stage]}
        }
        last = here.pop(self._lengths[-1])
        return PairValidation(last.loss, last.accuracy, last.pairs, {n: found.accuracy for n, found in here.items()})
