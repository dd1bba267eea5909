"""Room card: a model's loss on a text that a person names.

Comes in: a Model and text files. Goes out: a Heldout (loss, accuracy, bits per character). Called by: `unmask
evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from unmask.core.distributed import DistributedContext
from unmask.core.errors import ModelError
from unmask.data.settings import DataConfig, DocumentRule, ErrorsRule
from unmask.data.sources import open_source
from unmask.evaluation.masked_lm import EvalResult, build_eval_set, documents_of_source, evaluate
from unmask.models.model import Model


@dataclass(frozen=True)
class SetValidation:
    """What was measured on one text of a person's own, at the last stage's length."""

    loss: float
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    masked_tokens: int
    unknown_share: float


@dataclass(frozen=True)
class PairValidation:
    """What was measured on frozen pairs of segments, at the last stage's length."""

    loss: float
    accuracy: float
    pairs: int
    earlier: Mapping[int, float]  # length -> accuracy, of the stage that runs where it isn't the last


@dataclass(frozen=True)
class Validation:
    """One validation: measurements by text length, the last stage's first."""

    loss: float
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    length: int
    earlier: Mapping[int, float]  # length -> loss, of the stage that runs where it isn't the last
    sets: Mapping[str, SetValidation] = field(default_factory=dict[str, SetValidation])  # by name: data.valid
    pair: PairValidation | None = None  # where the objective asks about pairs


def evaluate_text(
    model: Model,
    paths: Sequence[Path],
    *,
    world: DistributedContext,
    length: int | None = None,
    document: DocumentRule | None = None,
    errors: ErrorsRule = "strict",
    field: str = "text",
    max_size: float = float("inf"),
) -> EvalResult:
    """Hide 15 % of the text with the house's frozen masks and ask the model; float32.

    Bits per character are mean nats per asked token × tokens ÷ Unicode characters of the NFC text (line ends counted) ÷
    ln 2, so that models of one tokenizer compare; [UNK] is left out of both sides and its share is given.

    Args:
        model: what `unmask.load` gave.
        paths: text files or folders.
        world: where to compute.
        length: slots of a text; the model's context where it isn't given.
        document: what a document is; where it isn't given, what it was in the model's training text, if a card says so,
            else what stands between blank lines.
        errors: "replace" puts U+FFFD in the place of bytes that are not UTF-8.
        field: of a table, where the text stands.
        max_size: characters that are read; what is held in memory is some 30 bytes for each of their tokens.

    Raises:
        TextError: the text can't be read or holds nothing to ask about.
        ModelError: a length that the encoder doesn't hold.
    """
    slots = model.context if length is None else length
    if not 3 <= slots <= model.settings.max_position_embeddings:
        raise ModelError(f"length = {slots}", hint=f"choose 3 to {model.settings.max_position_embeddings}")
    rule = document or cast("DocumentRule", model.card.get("document", "blank-line"))
    source = open_source(paths, DataConfig(document=rule, errors=errors, field=field))
    documents = documents_of_source(source, model.tokenizer, model.words, max_size).documents
    counts_V = np.zeros(model.tokenizer.size, np.int64)
    for one in documents:
        counts_V += np.bincount(one.ids, minlength=len(counts_V))
    held = build_eval_set(documents, model.tokenizer, slots, counts_V)
    return evaluate(model.encoder.to(world.device), model.head.to(world.device), held, world)
