"""The base class of displays, and what they show: predictions for fixed prompts, one masked sample, the results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from unmask.core.distributed import DistributedContext
from unmask.core.format import masked
from unmask.core.remote import shown_downloads
from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START, MaskedBatch, Sample, logits_at, pack
from unmask.evaluation.masked_lm import Document
from unmask.evaluation.validation import Validation
from unmask.objectives.masking import Integers, MaskingConfig, PackedSequences, select_positions
from unmask.tokenization.analysis import TokenFormatter
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan
from unmask.training.recipe import Recipe
from unmask.training.setup import RunComponents

_PREVIEW_SEED = 7  # a constant: the masked tokens don't depend on the run's seed
_PREVIEW_MASKING = MaskingConfig()


@dataclass(frozen=True)
class PreviewSpan:
    """A span of a prompt: unmasked text, or a correct or wrong prediction; `truth` is the original text."""

    text: str
    state: Literal["plain", "correct", "wrong"] = "plain"
    truth: str = ""


PreviewLine = tuple[PreviewSpan, ...]


@dataclass(frozen=True)
class TokenView:
    """One token of a sample: the original, the token that the model sees, and whether it is masked (has a label)."""

    original: str
    shown: str
    masked: bool


class Preview:
    """Prompts whose masked tokens never change.

    All of them are replaced by [MASK]: the mix of 80 % [MASK], 10 % random and 10 % kept tokens would reveal some.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, length: int) -> None:
        """Masks the prompts, cut to `length` tokens. A prompt without a maskable token is left out."""
        self._prompts: list[tuple[str, np.ndarray]] = []
        self._formatter, self._vocab_size = TokenFormatter(tokenizer), tokenizer.size
        samples: list[Sample] = []
        positions: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for number, prompt in enumerate(prompts):
            encoded = tokenizer.encode(prompt, words)
            limit = length - tokenizer.num_special_tokens()
            ids, flags = encoded.ids[:limit], encoded.marks[:limit]
            if not len(ids) or (flags & SPECIAL).all():
                continue
            packed = PackedSequences(flags, np.array([0, len(ids)]), np.array([[0, number]]))
            positions_M = select_positions(packed, _PREVIEW_MASKING, _PREVIEW_SEED)
            masked_ids = ids.copy()
            masked_ids[positions_M] = tokenizer.mask_id
            samples.append(Sample(*tokenizer.add_special_tokens(masked_ids, flags)))
            positions.append(positions_M + len(tokenizer.frame.before))
            labels.append(ids[positions_M])
            offsets = encoded.offsets[: len(ids)]
            self._prompts.append((prompt[: offsets[-1][1]], offsets[positions_M]))
        self._batch = pack(samples) if samples else None
        starts = self._batch.offsets if self._batch else (0,)
        shifted = [each + starts[number] for number, each in enumerate(positions)]
        self._positions_M = torch.from_numpy(np.concatenate(shifted)) if shifted else None
        self._labels_M = np.concatenate(labels) if labels else np.empty(0, np.int64)

    @torch.inference_mode()
    def predict(self, encoder: nn.Module, head: nn.Module, context: DistributedContext) -> list[PreviewLine]:
        """Returns the prompts with the model's predictions for the masked tokens."""
        if self._batch is None or self._positions_M is None:
            return []
        encoder.eval()
        head.eval()
        batch, positions_M = self._batch.to(context.device), self._positions_M.to(context.device)
        with context.autocast():
            logits_MV = logits_at(encoder, head, batch, positions_M)
        # The embedding may be larger than the vocabulary.
        predictions = logits_MV[:, : self._vocab_size].argmax(-1).tolist()
        lines: list[PreviewLine] = []
        first = 0
        for prompt, offsets in self._prompts:
            part = slice(first, first + len(offsets))
            lines.append(self._spans(prompt, offsets.tolist(), predictions[part], self._labels_M[part].tolist()))
            first += len(offsets)
        return lines

    def _spans(
        self, prompt: str, offsets: Sequence[Sequence[int]], predictions: Sequence[int], labels: Sequence[int]
    ) -> PreviewLine:
        """Splits a prompt into unmasked text and predictions."""
        spans: list[PreviewSpan] = []
        position = 0
        for (start, end), prediction, label in zip(offsets, predictions, labels, strict=True):
            correct, text = prediction == label, self._formatter.read(prediction).letters
            if end <= position and spans:  # another byte of the previous character
                previous = spans.pop()
                correct = correct and previous.state == "correct"
                spans.append(
                    replace(previous, text=previous.truth if correct else previous.text, state=_state(correct))
                )
                continue
            if start > position:
                spans.append(PreviewSpan(prompt[position:start]))
            truth = prompt[start:end]
            spans.append(PreviewSpan(truth if correct else text, _state(correct), truth))
            position = end
        if position < len(prompt):
            spans.append(PreviewSpan(prompt[position:]))
        return tuple(spans)


def _state(correct: bool) -> Literal["correct", "wrong"]:
    return "correct" if correct else "wrong"


def token_views(
    masked: MaskedBatch, original_ids: Sequence[int], tokenizer: Tokenizer, limit: int = 48
) -> list[TokenView]:
    """Returns the first `limit` tokens of the first sequence of a masked batch."""
    end = min(masked.batch.offsets[1], limit)
    positions = set(masked.positions_M.tolist())
    shown_ids = masked.batch.ids_T[:end].tolist()
    return [
        TokenView(tokenizer.id_to_token(original), tokenizer.id_to_token(shown), position in positions)
        for position, (original, shown) in enumerate(zip(original_ids[:end], shown_ids, strict=True))
    ]


def build_preview(recipe: Recipe, components: RunComponents) -> Preview:
    """Returns the preview of the recipe's prompts or, if it has none, of the first held-out documents."""
    settings, tokenizer = recipe.preview, components.corpus.tokenizer
    length = recipe.stage[-1].max_seq_len
    prompts: Sequence[str] = settings.prompts
    if not prompts:
        documents = components.validator.documents[: settings.num_samples]
        starts = [_from_sentence_start(document)[:length] for document in documents]
        prompts = [tokenizer.decode(ids.tolist())[: settings.max_chars].strip() for ids in starts]
    return Preview(prompts, tokenizer, components.corpus.words, length)


def _from_sentence_start(document: Document) -> Integers:
    """Returns the ids from the first sentence start, else the first word start: held-out text may start inside one."""
    for flag in (SENTENCE_START, WORD_START):
        starts = np.flatnonzero(document.token_flags & flag)
        if len(starts):
            return document.ids[starts[0] :]
    return document.ids


def first_sample(recipe: Recipe, components: RunComponents) -> tuple[str, list[TokenView]]:
    """Returns the first training sample as text and as the masked tokens that the model sees."""
    batches, _ = components.loaders[0].step(0, 1, 0, 1)
    original_ids = batches[0].ids_T.tolist()
    masked = components.training.objectives[0].corrupt(batches[0], recipe.seed)
    tokenizer = components.corpus.tokenizer
    return tokenizer.decode(original_ids[: masked.batch.offsets[1]]), token_views(masked, original_ids, tokenizer)


@dataclass(frozen=True)
class Summary:
    """The results of a run, for a comparison with its estimate."""

    run: Path
    steps: int
    tokens: int
    seconds: float
    planned_seconds: float
    training_seconds: float
    tokens_per_second: float
    validation: Validation | None
    best_step: int | None = None  # of the lowest validation loss
    best_loss: float | None = None
    early: str = ""  # why the run ended before its plan, if it did
    skipped_steps: int = 0  # whose loss or gradient was not finite
    rollbacks: int = 0  # how often the run went back to an earlier checkpoint
    before: Mapping[str, Any] | None = None  # the validation before the first step of a run with --from


class Display:
    """Shows the progress of a run. This base class shows nothing: for scripts, tests and all ranks but the first."""

    def message(self, message: str) -> None:
        """Shows one log message."""

    def progress(self, what: str, fraction: float) -> None:
        """Shows the progress, from 0 to 1, of a task before training: reading, training the tokenizer, ..."""

    def probe(self, fraction: float, seconds: float) -> None:
        """Shows the progress, from 0 to 1, of the probe, which takes at most `seconds`."""

    def estimate(self, estimate: CostEstimate) -> None:
        """Shows size and estimated cost of the run, before its first step."""

    def sample(self, text: str, tokens: Sequence[TokenView]) -> None:
        """Shows one training sample as the model sees it."""

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Is called before the first step of a new or resumed run."""

    def step(self, state: TrainState) -> None:
        """Is called after every step, so it must be fast."""

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """Is called after a training line was written to the log."""

    def validated(self, step: int, validation: Validation, preview: Sequence[PreviewLine]) -> None:
        """Shows the results of a validation and the predictions for the prompts."""

    def saved(self, folder: Path) -> None:
        """Is called after a step folder was written."""

    def train_end(self, summary: Summary) -> None:
        """Shows the results of the run and compares them with the estimate."""

    def close(self) -> None:
        """Restores the terminal. Is called even after an error; may be called twice."""


class _DisplayHandler(logging.Handler):
    """Passes log messages on to a display."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.INFO)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one message, without credentials of addresses."""
        message = masked(record.getMessage())
        self._display.message(f"warning: {message}" if record.levelno >= logging.WARNING else message)


@contextlib.contextmanager
def show_log(display: Display) -> Generator[None]:
    """Shows downloads and messages of the logger "unmask", from level INFO, on a display; closes it at the end."""
    logger, handler = logging.getLogger("unmask"), _DisplayHandler(display)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        with shown_downloads(display.progress):
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        display.close()
