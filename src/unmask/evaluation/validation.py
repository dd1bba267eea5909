"""Validation during training, and evaluation of a saved model on any text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import ModelError, TextError
from unmask.core.quantities import Quantity
from unmask.core.types import Objective
from unmask.data.inputs import Texts, list_texts
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sentence_pairs import PairKind
from unmask.data.settings import DataConfig, DocumentRule, ErrorsRule
from unmask.data.sources import BaseSource, open_text, require_field_used
from unmask.evaluation.masked_lm import (
    Document,
    EvalResult,
    EvalSet,
    build_eval_set,
    documents_from_shards,
    documents_from_source,
    evaluate,
)
from unmask.evaluation.objectives import ModelModules, evaluate_objective, own_result, validates
from unmask.evaluation.sentence_pairs import PairEvalResult, PairEvalSet, build_pair_eval_set, evaluate_pairs
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
        max_size: Amount of text to read, such as "2M characters"; default: all. Each token takes about
            30 bytes of memory.

    Raises:
        TextError: the text can't be read, or none of its tokens can be masked.
        ModelError: `length` is below 3 or above the encoder's maximum, or the model doesn't predict masked tokens.
    """
    context = context or init_distributed("float32")
    text = read_eval_text(model, texts, length=length, document=document, errors=errors, field=field, max_size=max_size)
    return evaluate(model.encoder.to(context.device), model.head.to(context.device), text.eval_set, context)


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
    size = Quantity.parse(max_size).require("characters").number if isinstance(max_size, str) else max_size
    limit = float("inf") if size is None else size
    named = list_texts(texts, field or "text")
    data = DataConfig(document=rule, errors=errors, field=field or "text")
    source = open_text(named, data)
    require_field_used(data.field, [source], given=field is not None)
    documents = documents_from_source(source, model.tokenizer, model.words, limit).documents
    counts_V = np.zeros(model.tokenizer.size, np.int64)
    for eval_document in documents:
        counts_V += np.bincount(eval_document.ids, minlength=len(counts_V))
    return EvalText(build_eval_set(documents, model.tokenizer, length, counts_V), counts_V)
