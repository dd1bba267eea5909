"""Validation during training, and evaluation of a saved model on any text."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import ModelError, RecipeError, TextError
from unmask.core.quantities import Quantity
from unmask.core.types import MaskedBatch, Objective
from unmask.data.inputs import Texts, list_texts
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sentence_pairs import PairKind
from unmask.data.settings import DataConfig, DocumentRule, ErrorsRule
from unmask.data.sources import BaseSource, open_text, require_field_used
from unmask.evaluation.masked_lm import (
    EVAL_SEED,
    Document,
    EvalResult,
    EvalSet,
    PairEvalResult,
    PairEvalSet,
    build_eval_set,
    build_pair_eval_set,
    documents_from_shards,
    documents_from_source,
    evaluate,
    evaluate_pairs,
)
from unmask.models.model import Model, require_masked_lm

_log = logging.getLogger("unmask")


@dataclass(frozen=True)
class Validation(EvalResult):
    """Result of one validation. The inherited fields are those of held-out text at the length of the last stage."""

    # loss by sequence length of the current stage; empty in the last stage
    earlier: Mapping[int, float] = field(default_factory=dict[int, float])
    sets: Mapping[str, EvalResult] = field(default_factory=dict[str, EvalResult])  # texts of data.valid, by name
    pair: PairEvalResult | None = None  # None if the objective has no sentence pairs
    # metrics of the stage's objective on held-out text, if masked tokens alone don't judge it
    objective: Mapping[str, float] = field(default_factory=dict[str, float])


class Validator:
    """Builds the frozen evaluation sets of a run and evaluates a model on them.

    Held-out text and sentence pairs are evaluated at the length of the last stage and, in an earlier stage, also at the
    length of that stage. The texts of `data.valid` are evaluated at the length of the last stage.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        stage_lengths: Sequence[int],
        context: DistributedContext,
        objectives: Sequence[Objective],
        *,
        valid_sources: Mapping[str, BaseSource],
        max_size: Quantity,
        pair_kind: PairKind | None = None,
    ) -> None:
        """Build the evaluation sets that may be invalid, so that errors are raised before training.

        Args:
            corpus: Tokenized corpus of the run, with its held-out documents.
            stage_lengths: Sequence length of each training stage.
            context: Device and ranks.
            objectives: Objective of each stage.
            valid_sources: Sources of the texts of data.valid, by name.
            max_size: Number of characters to read from each of these texts.
            pair_kind: Kind of the sentence pairs; None if the objective has no pairs.

        Raises:
            TextError: too few held-out documents have two sentences, or a text of data.valid has no maskable token.
        """
        self._corpus, self._context, self._objectives = corpus, context, objectives
        self._pair_kind: PairKind | None = pair_kind
        self._stage_lengths = list(stage_lengths)
        self._eval_sets: dict[int, EvalSet] = {}
        self._pair_sets: dict[int, PairEvalSet] = {}
        if pair_kind is not None:
            self._pair_set(self._stage_lengths[-1])
        self._valid_sets = {
            name: self._build_valid_set(name, source, max_size) for name, source in valid_sources.items()
        }

    @cached_property
    def documents(self) -> list[Document]:
        """The held-out documents."""
        return documents_from_shards(self._corpus.held_out)

    def eval_set(self, length: int) -> EvalSet:
        """Return the held-out evaluation set at a sequence length. It is built once and cached."""
        if length not in self._eval_sets:
            self._eval_sets[length] = build_eval_set(
                self.documents, self._corpus.tokenizer, length, self._corpus.train.token_counts
            )
        return self._eval_sets[length]

    def validate(self, encoder: nn.Module, head: nn.Module, stage: int, parts: nn.Module) -> Validation:
        """Return the results of a model on all sets. `parts` are the modules of its objectives: a pair head, if any."""
        modules, context = ModelModules(encoder, head, parts), self._context
        current, final, longest = self._objectives[stage], self._objectives[-1], self._stage_lengths[-1]

        def result_on(eval_set: EvalSet) -> tuple[EvalResult, Mapping[str, float]]:
            if validates(final) != "own":
                return evaluate(encoder, head, eval_set, context), {}
            metrics = evaluate_objective(final, modules, eval_set, context)
            return own_result(eval_set, metrics), metrics

        lengths = {longest, self._stage_lengths[stage]}
        by_length = {length: result_on(self.eval_set(length)) for length in lengths}
        last, metrics = by_length.pop(longest)
        if validates(current) != "masked-lm" and not (metrics and current is final):
            metrics = evaluate_objective(current, modules, self.eval_set(longest), context)
        return Validation(
            **vars(last),
            objective={} if validates(current) == "masked-lm" else metrics,
            earlier={length: result.loss for length, (result, _) in by_length.items()},
            sets={name: result_on(eval_set)[0] for name, eval_set in self._valid_sets.items()},
            pair=None if self._pair_kind is None else self._validate_pairs(encoder, parts, lengths),
        )

    def _validate_pairs(self, encoder: nn.Module, pair_head: nn.Module, lengths: set[int]) -> PairEvalResult:
        by_length = {
            length: evaluate_pairs(encoder, pair_head, self._pair_set(length), self._context) for length in lengths
        }
        last = by_length.pop(self._stage_lengths[-1])
        return replace(last, earlier={length: result.accuracy for length, result in by_length.items()})

    def _pair_set(self, length: int) -> PairEvalSet:
        assert self._pair_kind is not None
        if length not in self._pair_sets:
            self._pair_sets[length] = build_pair_eval_set(
                self._corpus.held_out, self._corpus.tokenizer, length, self._pair_kind
            )
        return self._pair_sets[length]

    def _build_valid_set(self, name: str, source: BaseSource, max_size: Quantity) -> EvalSet:
        """Return the evaluation set for a text of data.valid, at the length of the last stage."""
        tokenizer = self._corpus.tokenizer
        text = documents_from_source(source, tokenizer, self._corpus.words, max_size.number)
        extent = "" if text.complete else f", the first {max_size} (data.held_out.max_size)"
        _log.info(f"validation set {name}: {text.characters:,} characters{extent}")
        try:
            return build_eval_set(text.documents, tokenizer, self._stage_lengths[-1], self._corpus.train.token_counts)
        except TextError as error:
            raise TextError(error.message, location=f"data.valid.{name}: {source.location}", hint=error.hint) from error


def evaluate_text(
    model: Model,
    texts: Texts,
    *,
    context: DistributedContext | None = None,
    length: int | None = None,
    document: DocumentRule | None = None,
    errors: ErrorsRule = "strict",
    field: str | None = None,
    max_size: str | float | None = None,
) -> EvalResult:
    """Return a model's result on text, with 15 % of the tokens masked and in float32.

    Bits per character are mean nats per masked token x tokens / characters / ln 2. Characters are code points of the
    NFC text, line ends included. [UNK] is excluded from tokens and characters; its share is in the result. Models with
    different tokenizers are not comparable in bits per character.

    Args:
        model: Model to evaluate, as returned by `unmask.load`.
        texts: Paths of text files or directories, or the texts themselves, as for `unmask.pretrain`.
        context: Device to compute on; default: as chosen for training.
        length: Maximum sequence length in tokens; default: that of the model's training.
        document: Rule that splits the text into documents; default: that of the training text, or "blank-line".
        errors: What to do with undecodable bytes or malformed rows.
        field: Name of the field or column with the text, for tables; default: "text".
        max_size: Amount of text to read, such as "2M characters"; default: all, up to MAX_CHARACTERS. Each token takes
            about 30 bytes of memory.

    Raises:
        TextError: the text can't be read, none of its tokens can be masked, or it has more than MAX_CHARACTERS and
            there is no `max_size`.
        ModelError: `length` is below 3 or above the encoder's maximum, or the model doesn't predict masked tokens.
    """
    context = context or init_distributed("float32")
    text = read_eval_text(model, texts, length=length, document=document, errors=errors, field=field, max_size=max_size)
    return evaluate(model.encoder.to(context.device), model.head.to(context.device), text.eval_set, context)


MAX_CHARACTERS: Final = 1 << 28
"""Characters of a text that are read without `max_size`: some GB of memory."""


@dataclass(frozen=True)
class EvalText:
    """The evaluation set of a text, and the count of each token id in the text."""

    eval_set: EvalSet
    counts_V: NDArray[np.int64]


def read_eval_text(
    model: Model,
    texts: Texts,
    *,
    length: int | None,
    document: DocumentRule | None,
    errors: ErrorsRule,
    field: str | None,
    max_size: str | float | None,
) -> EvalText:
    """Read, tokenize and mask a text. Arguments and errors are those of `evaluate_text`."""
    require_masked_lm(model, "be evaluated on masked tokens")
    max_length = model.settings.max_position_embeddings
    length = model.context if length is None else length
    if not 3 <= length <= max_length:
        raise ModelError(f"invalid length: got {length}, expected 3 to {max_length}", hint="choose another length")
    rule = document or cast("DocumentRule", model.card.get("document", "blank-line"))
    limit = _character_limit(max_size)
    named = list_texts(texts, field or "text")
    data = DataConfig(document=rule, errors=errors, field=field or "text")
    source = open_text(named, data)
    require_field_used(data.field, [source], given=field is not None)
    read = documents_from_source(source, model.tokenizer, model.words, limit)
    if max_size is None and not read.complete:
        raise TextError(
            f"the text has more than {MAX_CHARACTERS:,} characters",
            location=source.location,
            hint='evaluate its first part (--max-size "20M characters"), or give a size that fits into memory',
        )
    documents = read.documents
    counts_V = np.zeros(model.tokenizer.size, np.int64)
    for eval_document in documents:
        counts_V += np.bincount(eval_document.ids, minlength=len(counts_V))
    return EvalText(build_eval_set(documents, model.tokenizer, length, counts_V), counts_V)


def _character_limit(max_size: str | float | None) -> float:
    """Return a number of characters; MAX_CHARACTERS for None.

    Raises:
        RecipeError: it is not a number of characters, or below 1.
    """
    if max_size is None:
        return MAX_CHARACTERS
    location = f"--max-size {max_size}"
    try:
        limit = Quantity.parse(max_size).require("characters").number if isinstance(max_size, str) else max_size
    except RecipeError as error:
        raise error.at(location=location) from error
    if not limit >= 1:
        raise RecipeError(
            f"invalid amount of text: got {max_size}, expected at least 1 character",
            location=location,
            hint='write for example "2M characters"',
        )
    return limit


# Own objectives -------------------------------------------------------------------------------------------------------


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
