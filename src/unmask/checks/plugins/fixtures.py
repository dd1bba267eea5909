"""Runs checks, small functions that raise `CheckFailed` if a requirement is not met; and the inputs of the checks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.plugins import user_frame
from unmask.core.types import (
    SPECIAL,
    Batch,
    LoggerContext,
    LossSums,
    MaskedBatch,
    MetricLogger,
    Objective,
    ObjectiveContext,
    Sample,
    Sampler,
    SamplerContext,
    SampleSpec,
    Source,
    pack,
)
from unmask.data.sampling import EPOCH_STRIDE
from unmask.models import EncoderConfig, build_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

Fixture = TypeVar("Fixture")


class CheckFailed(Exception):
    """A requirement is not met; the message says what was observed."""


@dataclass(frozen=True)
class Check(Generic[Fixture]):
    """A requirement: its name, a sentence that states it, and the function that raises `CheckFailed`."""

    name: str
    sentence: str
    run: Callable[[Fixture], None]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; `detail` says what was observed if it failed."""

    check: str
    sentence: str
    passed: bool
    detail: str = ""


def check(suite: list[Check[Fixture]]) -> Callable[[Callable[[Fixture], None]], Callable[[Fixture], None]]:
    """Add a function to a suite: the check's name is the function's name, its sentence is the docstring."""

    def add(function: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        suite.append(Check(function.__name__.replace("_", " "), (function.__doc__ or "").strip(), function))
        return function

    return add


def run_checks(checks: Sequence[Check[Fixture]], fixture: Fixture) -> list[CheckResult]:
    """Run checks; an exception of the checked code fails the check in which it was raised."""
    return [_run(one, fixture) for one in checks]


def _run(check: Check[Fixture], fixture: Fixture) -> CheckResult:
    try:
        check.run(fixture)
    except CheckFailed as failure:
        return CheckResult(check.name, check.sentence, passed=False, detail=str(failure))
    except UnmaskError as error:
        return CheckResult(check.name, check.sentence, passed=False, detail=error.message)
    except Exception as error:
        place = user_frame(error)
        reason = f"{type(error).__name__}: {error}" + (f" (at {place})" if place else "")
        return CheckResult(check.name, check.sentence, passed=False, detail=reason)
    return CheckResult(check.name, check.sentence, passed=True)


def require(condition: bool, failure: str) -> None:
    """Raise `CheckFailed` with the message `failure` unless the condition holds."""
    if not condition:
        raise CheckFailed(failure)


def is_a(value: object, kind: type) -> bool:
    """Return whether a value has the type that its annotation only promises."""
    return isinstance(value, kind)


def generator_states() -> dict[str, str]:
    """Return the states of the global random generators."""
    numpy_state = np.random.get_state()
    return {
        "torch": str(torch.get_rng_state().numpy().tobytes()),
        "numpy": str([part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]),
        "random": str(random.getstate()),
    }


def require_no_draw(before: dict[str, str], advice: str) -> None:
    """Raise `CheckFailed` if a global random generator is not in the state that it had before."""
    after = generator_states()
    moved = [name for name in before if before[name] != after[name]]
    require(not moved, f"it drew from a random generator ({', '.join(moved)}): {advice}")


# Objectives ---------------------------------------------------------------------------------------------------------

PAGE: Final = """\
The harbour lies in the west of the town, between the old wall and the mill. In the morning, when the boats come home,
the women wait on the stones with their baskets; by noon, everything is sold, and the gulls have what is left. "Why do
you stay?" a stranger asked once. Nobody knew what to say, because nobody had thought of leaving. There were 12 boats
then, and 30 men; today there are 4 boats, and the mill is a school. Is that a loss? The children, who learn to read
where the flour was ground, would not say so. They know the names of the boats, though: Anna, Good Hope, North Star.
When the wind turns, the bell rings, and whoever is near runs down to the water. It has always been so: one rings, all
come. First the ropes, then the sails, then the fish. In winter, after the storms, the wall is mended stone by stone.
"""
LENGTHS: Final = (1, 2, 3, 5, 8, 13, 21, 34, 55, 60)  # tokens of the samples, without special tokens
SEED: Final = 11
HIDDEN_SIZE: Final = 32
ENCODER: Final = ModernBertConfig(
    num_hidden_layers=2, hidden_size=HIDDEN_SIZE, num_attention_heads=2, intermediate_size=24, local_attention=16
)


@cache
def sample_tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer with 120 tokens, trained on the page."""
    return train_tokenizer([PAGE], WordPieceConfig(vocab_size=120))


def text_samples() -> list[Sample]:
    """Return windows of the page of many lengths, each with [CLS], [SEP] and its own key."""
    encoded = sample_tokenizer().encode(PAGE)
    samples: list[Sample] = []
    first = 0
    for number, length in enumerate(LENGTHS):
        ids, flags = encoded.ids[first : first + length], encoded.marks[first : first + length]
        samples.append(Sample(*sample_tokenizer().add_special_tokens(ids, flags), epoch=number % 3, number=7 * number))
        first += length
    return samples


def special_tokens_only() -> Sample:
    """Return a sample that has nothing to mask."""
    ids, _ = sample_tokenizer().add_special_tokens(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))
    return Sample(ids, np.full(len(ids), SPECIAL, dtype=np.uint8), epoch=1, number=5)


def objective_context() -> ObjectiveContext:
    """Return the context with which objectives are created for the checks."""
    return ObjectiveContext(sample_tokenizer(), HIDDEN_SIZE)


@dataclass(frozen=True)
class ObjectiveFixture:
    """An objective, a small model, samples to mask, and a sample with nothing to mask."""

    objective: Objective
    encoder: nn.Module
    head: nn.Module
    samples: Sequence[Sample]
    unmaskable: Sample
    seed: int
    vocab_size: int

    def batch(self) -> Batch:
        """Return all samples, in their order."""
        return pack(self.samples)

    def masked(self) -> MaskedBatch:
        """Return all samples, corrupted."""
        return self.objective.corrupt(self.batch(), self.seed)

    def loss(self, masked: MaskedBatch) -> LossSums:
        """Return the loss without dropout."""
        self.encoder.eval()
        self.head.eval()
        self.objective.modules.eval()
        return self.objective.loss(self.encoder, self.head, masked)

    def backward(self, masked: MaskedBatch) -> list[Tensor]:
        """Backpropagate the sum of all loss terms in training mode, and return the gradients."""
        modules = (self.encoder, self.head, self.objective.modules)
        for module in modules:
            module.train()
            module.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.encoder, self.head, masked)
        total = sum(loss.sums.values(), torch.zeros(()))
        require(
            bool(total.requires_grad) or not len(masked.positions_M),
            "the sums have no gradient: was a tensor detached?",
        )
        if total.requires_grad:
            total.backward()
        gradients = [parameter.grad for module in modules for parameter in module.parameters()]
        return [gradient for gradient in gradients if gradient is not None]


def objective_fixture(
    objective: Objective,
    model: EncoderConfig = ENCODER,
    samples: Sequence[Sample] | None = None,
    vocab_size: int | None = None,
    seed: int = SEED,
) -> ObjectiveFixture:
    """Return the fixture of an objective, by default with samples of the page."""
    size = sample_tokenizer().size if vocab_size is None else vocab_size
    torch.manual_seed(1)
    encoder, head = build_model(model, size)
    return ObjectiveFixture(objective, encoder, head, samples or text_samples(), special_tokens_only(), seed, size)


# Samplers -----------------------------------------------------------------------------------------------------------

DOCUMENTS: Final[tuple[tuple[tuple[int, ...], int], ...]] = (  # tokens of the documents, maximum tokens of a sample
    ((40, 0, 5, 1, 300, 17, 16, 0, 33), 16),
    ((7,), 30),
    ((1000,), 8),
    (tuple(range(60)), 510),
)
EPOCHS: Final = (0, 1, EPOCH_STRIDE)  # the last one is the first epoch of a run's second stage
MAX_SAMPLES: Final = 5000  # checked per epoch


def sampler_contexts() -> list[SamplerContext]:
    """Return contexts with empty, short and long documents, and with documents of exactly one sample."""
    return [SamplerContext(np.array(lengths, dtype=np.int64), length, seed=3) for lengths, length in DOCUMENTS]


@dataclass(frozen=True)
class SamplerFixture:
    """A function that creates a sampler, and the contexts to create it with."""

    create: Callable[[SamplerContext], Sampler]
    contexts: Sequence[SamplerContext]
    spans: int = 1  # per sample

    def cases(self) -> Iterator[tuple[SamplerContext, Sampler, str]]:
        """Yield each context with its sampler and a description."""
        for context in self.contexts:
            lengths = context.lengths.tolist()
            shown = f"{lengths[:6]}{' …' if len(lengths) > 6 else ''}"
            yield context, self.create(context), f"documents of {shown} tokens, length {context.length}"

    def specs(self) -> Iterator[tuple[SamplerContext, SampleSpec, str]]:
        """Yield each sample of each case and epoch, with a description."""
        for context, sampler, case in self.cases():
            for epoch in EPOCHS:
                for sample in range(min(sampler.count(epoch), MAX_SAMPLES)):
                    yield context, sampler.spec(epoch, sample), f"{case}: epoch {epoch}, sample {sample}"


# Sources and loggers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceFixture:
    """A function that creates a source, and others that create it with another setting or text."""

    create: Callable[[], Source]
    variants: Sequence[tuple[str, Callable[[], Source]]] = ()  # what is different, and the function


LOG_LINES: Final[tuple[Mapping[str, Any], ...]] = (
    {"step": 1, "loss": 4.5, "accuracy": 0.01, "learning_rate": 1e-4, "seconds": 0.5, "note": "Straße 가"},
    {"step": 2, "tokens": 2048, "seconds": 1.0, "validation": {"loss": 4.25, "accuracy": None, "set": {"loss": 4.0}}},
    {"step": 3, "loss": None, "grad_norm": 1e30, "ended_early": False},
)


@dataclass(frozen=True)
class LoggerFixture:
    """A function that creates a logger, and the directory of a run for it."""

    create: Callable[[LoggerContext], MetricLogger]
    run: Path
    recipe: str = 'name = "check"\n'

    def context(self, lines: int = 0) -> LoggerContext:
        """Return the context of a run whose log has the first lines."""
        return LoggerContext(self.run, [dict(line) for line in LOG_LINES[:lines]], self.recipe)
