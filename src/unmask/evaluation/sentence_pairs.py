"""Frozen evaluation sets for sentence pairs: loss and accuracy.

Pairs are drawn once with a fixed seed and masked at 15 %. They are the same for all runs with the same tokenizer and
length, at any seed, mask rate and loss weight. Half of the pairs have label 0, so chance is an accuracy of 50 %. With
2,048 pairs, its standard error is 1.1 percentage points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import nn

from unmask.core.distributed import DistributedContext
from unmask.core.errors import TextError
from unmask.core.types import Batch, Sample, pack
from unmask.data.loader import read_sample
from unmask.data.sentence_pairs import PairKind, PairSampler
from unmask.data.shards import Shards
from unmask.evaluation.masked_lm import EVAL_MASKING, EVAL_SEED
from unmask.objectives.masking import PackedSequences, corrupt_tokens, select_positions
from unmask.objectives.sentence_pairs import pair_loss
from unmask.tokenization.tokenizer import Tokenizer

MAX_PAIRS: Final = 2048
_BATCH_TOKENS: Final = 16_384


@dataclass(frozen=True)
class PairEvalSet:
    """Frozen batches of sentence pairs with masked tokens."""

    batches: tuple[Batch, ...]
    length: int
    pairs: int


@dataclass(frozen=True)
class PairEvalResult:
    """A model's result on frozen pairs."""

    loss: float  # nats per pair
    accuracy: float
    pairs: int
    length: int
    # accuracy by sequence length of the current stage; empty in the last stage
    earlier: Mapping[int, float] = field(default_factory=dict[int, float])


def build_pair_eval_set(shards: Shards, tokenizer: Tokenizer, length: int, kind: PairKind) -> PairEvalSet:
    """Return masked pairs of at most `length` tokens, special tokens included, drawn from held-out documents.

    Raises:
        TextError: too few documents have two sentences.
    """
    try:
        pairs = PairSampler(shards, length - tokenizer.num_special_tokens(2), EVAL_SEED, kind)
    except TextError as error:
        raise TextError(
            f"not enough held-out text for sentence pairs: {error.message}",
            location="data.held_out",
            hint="hold out more: --set data.held_out.fraction=20%",
        ) from error
    samples = [read_sample(shards, spec, tokenizer) for spec in pairs.specs(0, 0, min(pairs.count(0), MAX_PAIRS))]
    samples.sort(key=lambda sample: (-len(sample.ids), sample.number))
    groups: list[list[Sample]] = []
    remaining = 0
    for sample in samples:
        if len(sample.ids) > remaining:
            groups.append([])
            remaining = _BATCH_TOKENS
        groups[-1].append(sample)
        remaining -= len(sample.ids)
    return PairEvalSet(tuple(_masked(group, tokenizer) for group in groups), length, len(samples))


def _masked(samples: Sequence[Sample], tokenizer: Tokenizer) -> Batch:
    batch = pack(samples)
    packed = PackedSequences.from_batch(batch)
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
    encoder: nn.Module, pair_head: nn.Module, eval_set: PairEvalSet, context: DistributedContext
) -> PairEvalResult:
    """Return mean loss and accuracy over all pairs. The batches are distributed over the ranks."""
    encoder.eval()
    pair_head.eval()
    nats = correct = 0.0
    for cpu_batch in eval_set.batches[context.rank :: context.ranks]:
        batch = cpu_batch.to(context.device)
        with context.autocast():
            batch_nats, batch_correct = pair_loss(pair_head, encoder(batch), batch)
        nats, correct = nats + float(batch_nats), correct + float(batch_correct)
    nats, correct = context.sum([nats, correct])
    return PairEvalResult(nats / eval_set.pairs, correct / eval_set.pairs, eval_set.pairs, eval_set.length)
