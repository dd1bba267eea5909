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

from unmask.core.distributed import World
from unmask.core.errors import ModelError
from unmask.data.settings import DocumentRule, ErrorsRule, TextSettings
from unmask.data.sources import open_source
from unmask.evaluation.masked_lm import Heldout, documents_of_source, evaluate, freeze
from unmask.models.model import Model


@dataclass(frozen=True)
class SetValidation:
    """What was measured on one text of a person's own, at the last stage's length."""

    loss: float
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    asked: int
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
    sets: Mapping[str, SetValidation] = field(default_factory=dict[str, SetValidation])  # by name: text.valid
    pair: PairValidation | None = None  # where the objective asks about pairs


def evaluate_text(
    model: Model,
    paths: Sequence[Path],
    *,
    world: World,
    length: int | None = None,
    document: DocumentRule | None = None,
    errors: ErrorsRule = "strict",
    field: str = "text",
    at_most: float = float("inf"),
) -> Heldout:
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
        at_most: characters that are read; what is held in memory is some 30 bytes for each of their tokens.

    Raises:
        TextError: the text can't be read or holds nothing to ask about.
        ModelError: a length that the encoder doesn't hold.
    """
    slots = model.context if length is None else length
    if not 3 <= slots <= model.settings.longest:
        raise ModelError(f"length = {slots}", next=f"choose 3 to {model.settings.longest}")
    rule = document or cast("DocumentRule", model.card.get("document", "blank-line"))
    source = open_source(paths, TextSettings(document=rule, errors=errors, field=field))
    documents = documents_of_source(source, model.tokenizer, model.words, at_most).documents
    counts_V = np.zeros(model.tokenizer.size, np.int64)
    for one in documents:
        counts_V += np.bincount(one.ids, minlength=len(counts_V))
    held = freeze(documents, model.tokenizer, slots, counts_V)
    return evaluate(model.encoder.to(world.device), model.head.to(world.device), held, world)
