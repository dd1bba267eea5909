"""Evaluation of a model by its training objective, for objectives that are not judged by masked tokens alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from unmask.core.distributed import DistributedContext
from unmask.core.types import MaskedBatch, Objective
from unmask.evaluation.masked_lm import EVAL_SEED, EvalResult, EvalSet


class ModelModules(NamedTuple):
    """The modules of a run: encoder, vocabulary head, and those of its objectives."""

    encoder: nn.Module
    head: nn.Module
    parts: nn.Module


def validates(objective: Objective) -> str:
    """Return how an objective is validated: "masked-lm", which is the default, "own" or "both"."""
    return getattr(objective, "validates", "masked-lm")


def label_offset(objective: Objective) -> int:
    """Return how many tokens after its hidden state a predicted token is: 0, or 1 for the next token."""
    return getattr(objective, "label_offset", 0)


@torch.inference_mode()
def evaluate_objective(
    objective: Objective, modules: ModelModules, eval_set: EvalSet, context: DistributedContext
) -> Mapping[str, float]:
    """Return the mean of each metric of an objective on the text of an evaluation set, before it was masked.

    The objective corrupts the text with a fixed seed, as at the end of a run. The batches are distributed over the
    ranks.
    """
    encoder, head, parts = modules
    objective = copy.copy(objective)
    objective.modules = parts  # those of a moving average, if there is one
    for module in modules:
        module.eval()
    sums = dict.fromkeys(objective.metrics, 0.0)
    counts = dict.fromkeys(objective.metrics, 0)
    first = 0
    for number, masked in enumerate(eval_set.batches):
        original = _unmasked(masked, first)
        first += masked.batch.num_samples
        if number % context.ranks != context.rank:
            continue
        corrupted = objective.corrupt(original.batch, EVAL_SEED).to(context.device)
        with context.autocast():
            metrics = objective.loss(encoder, head, corrupted).metrics
        for name, (value, count) in metrics.items():
            sums[name] += float(value)
            counts[name] += count
    totals = context.sum([*sums.values(), *counts.values()])
    means = zip(sums, totals[: len(sums)], totals[len(sums) :], strict=True)
    return {name: total / count for name, total, count in means if count}


def _unmasked(masked: MaskedBatch, first: int) -> MaskedBatch:
    """Return a masked batch with its original ids and with the sample numbers `first`, `first` + 1, …"""
    ids_T = masked.batch.ids_T.clone()
    ids_T[masked.positions_M] = masked.labels_M
    number_B = torch.arange(first, first + masked.batch.num_samples)
    keys_B2 = torch.stack((torch.zeros_like(number_B), number_B), 1)
    return replace(masked, batch=replace(masked.batch, ids_T=ids_T, sample_keys_B2=keys_B2, progress=1.0))


def own_result(eval_set: EvalSet, metrics: Mapping[str, float]) -> EvalResult:
    """Return the result of a model without masked predictions: loss and accuracy are those of its objective.

    If it predicts all tokens, as a causal model does, its bits per character are those of the text, not of masks.
    """
    return EvalResult(
        loss=metrics["loss"],
        accuracy=metrics.get("accuracy", math.nan),
        bits_per_character=metrics["loss"] * eval_set.tokens / eval_set.characters / math.log(2),
        unigram_loss=eval_set.unigram_loss,
        masked_tokens=eval_set.masked_tokens,
        length=eval_set.length,
        unknown_share=eval_set.unknown_share,
        unknown_character_share=eval_set.unknown_character_share,
    )
