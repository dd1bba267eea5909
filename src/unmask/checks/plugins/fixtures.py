"""Room card: what objectives and samplers are tried on.

Comes in: nothing. Goes out: a tokenizer learnt from a page of text, texts of many lengths made with it, lengths of
documents, what an objective is made with. Called by: check, elsewhere, tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from unmask.checks.plugins.runner import require
from unmask.core.types import (
    SPECIAL,
    Batch,
    LossSums,
    MaskedBatch,
    Objective,
    ObjectiveContext,
    Sample,
    SamplerContext,
    pack,
)
from unmask.models import EncoderConfig, build_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

PAGE = """\
The harbour lies in the west of the town, between the old wall and the mill. In the morning, when the boats come home,
the women wait on the stones with their baskets; by noon, everything is sold, and the gulls have what is left. "Why do
you stay?" a stranger asked once. Nobody knew what to say, because nobody had thought of leaving. There were 12 boats
then, and 30 men; today there are 4 boats, and the mill is a school. Is that a loss? The children, who learn to read
where the flour was ground, would not say so. They know the names of the boats, though: Anna, Good Hope, North Star.
When the wind turns, the bell rings, and whoever is near runs down to the water. It has always been so: one rings, all
come. First the ropes, then the sails, then the fish. In winter, after the storms, the wall is mended stone by stone.
"""
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 60)  # tokens of the texts, special pieces not counted
SEED = 11
WIDTH = 32  # of the encoder that objectives are tried with
DOCUMENTS: tuple[tuple[tuple[int, ...], int], ...] = (  # tokens of the documents, tokens that a sample may hold
    ((40, 0, 5, 1, 300, 17, 16, 0, 33), 16),
    ((7,), 30),
    ((1000,), 8),
    (tuple(range(60)), 510),
)


@cache
def sample_tokenizer() -> Tokenizer:
    """WordPiece with 120 pieces, learnt from the page."""
    return train_tokenizer([PAGE], WordPieceConfig(vocab_size=120))


def sample_texts() -> list[Sample]:
    """Windows of the page of many lengths, between [CLS] and [SEP], each with an epoch and a number of its own."""
    encoded = sample_tokenizer().encode(PAGE)
    made: list[Sample] = []
    first = 0
    for number, length in enumerate(LENGTHS):
        ids, marks = encoded.ids[first : first + length], encoded.marks[first : first + length]
        made.append(Sample(*sample_tokenizer().add_special_tokens(ids, marks), epoch=number % 3, number=7 * number))
        first += length
    return made


def nothing_askable() -> Sample:
    """A text of special pieces alone."""
    ids, _ = sample_tokenizer().add_special_tokens(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))
    return Sample(ids, np.full(len(ids), SPECIAL, dtype=np.uint8), epoch=1, number=5)


def cutter_cases() -> list[SamplerContext]:
    """Documents of many lengths: empty, short, of exactly a sample, long."""
    return [SamplerContext(np.array(lengths, dtype=np.int64), length, seed=3) for lengths, length in DOCUMENTS]


def objective_tools() -> ObjectiveContext:
    """What an objective is made with when it is judged."""
    return ObjectiveContext(sample_tokenizer(), WIDTH)


@dataclass(frozen=True)
class ObjectiveFixture:
    """An objective and what it is tried on: texts with something askable, and one with nothing but special pieces."""

    objective: Objective
    encoder: nn.Module
    head: nn.Module
    texts: Sequence[Sample]
    nothing: Sample
    seed: int
    vocabulary: int

    def batch(self, *, slots: int = 0) -> Batch:
        """All texts in their order; with `slots`, a filler text of so many ends it."""
        return pack(self.texts, slots=sum(len(text.ids) for text in self.texts) + slots if slots else None)

    def puzzle(self) -> MaskedBatch:
        """All texts, corrupted."""
        return self.objective.corrupt(self.batch(), self.seed)

    def loss(self, masked: MaskedBatch) -> LossSums:
        """The loss without dropout."""
        self.encoder.eval()
        self.head.eval()
        self.objective.modules.eval()
        return self.objective.loss(self.encoder, self.head, masked)

    def backward(self, masked: MaskedBatch) -> list[Tensor]:
        """The gradients of every parameter, after all sums went back through the model in training."""
        modules = (self.encoder, self.head, self.objective.modules)
        for module in modules:
            module.train()
            module.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.encoder, self.head, masked)
        total = sum(loss.sums.values(), torch.zeros(()))
        require(
            bool(total.requires_grad) or not len(masked.positions_M),
            "the sums have no gradient: was something detached?",
        )
        if total.requires_grad:
            total.backward()
        found = [parameter.grad for module in modules for parameter in module.parameters()]
        return [gradient for gradient in found if gradient is not None]


ENCODER = ModernBertConfig(
    num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=24, local_attention=16
)


def objective_subject(
    objective: Objective,
    shape: EncoderConfig = ENCODER,
    tried_on: Sequence[Sample] | None = None,
    vocabulary: int | None = None,
    seed: int = SEED,
) -> ObjectiveFixture:
    """An objective with a small model and texts to be tried on."""
    size = sample_tokenizer().size if vocabulary is None else vocabulary
    torch.manual_seed(1)
    encoder, head = build_model(shape, size)
    return ObjectiveFixture(objective, encoder, head, tried_on or sample_texts(), nothing_askable(), seed, size)
