"""Room card: the same few texts, hidden the same way each time, so that a person sees the same letters become right.

Comes in: texts and a tokenizer; later an encoder and a head. Goes out: cells that a display paints (plain, right,
wrong), and one training text as the model sees it. Called by: pretrain; painted by train/show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from unmask.core.distributed import DistributedContext
from unmask.core.types import SPECIAL, MaskedBatch, Sample, logits_at, pack
from unmask.evaluation.validation import Validation
from unmask.objectives.masking import MaskingConfig, PackedSequences, select_positions
from unmask.tokenization.analysis import TokenFormatter
from unmask.tokenization.tokenizer import Tokenizer
from unmask.tokenization.words import WordsRule
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

_PANEL_SEED = 7  # of the house: which letters are hidden never changes, whatever the run's seed
_PANEL_RULE = MaskingConfig()


@dataclass(frozen=True)
class PreviewSpan:
    """A stretch of text: as given, or a prediction that is right or wrong (`truth` is what stood there)."""

    text: str
    state: Literal["plain", "right", "wrong"] = "plain"
    truth: str = ""


Line = tuple[PreviewSpan, ...]


@dataclass(frozen=True)
class TokenView:
    """One slot of a text as the model sees it: the piece, what stands in its place, whether it is asked about."""

    piece: str
    shown: str
    asked: bool


class Preview:
    """Prompts with fixed masks. All asked tokens are shown to the model as [MASK], so that nothing is given away."""

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer, words: WordsRule, length: int) -> None:
        self._prompts: list[tuple[str, np.ndarray]] = []
        self._reader, self._pieces = TokenFormatter(tokenizer), tokenizer.size
        texts: list[Sample] = []
        at: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        num_special_tokens = 1 if tokenizer.cls_sep_ids else 0
        for number, prompt in enumerate(prompts):
            encoded = tokenizer.encode(prompt, words)
            ids, marks = (
                encoded.ids[: length - 2 * num_special_tokens],
                encoded.marks[: length - 2 * num_special_tokens],
            )
            if not len(ids) or (marks & SPECIAL).all():
                continue
            packed = PackedSequences(marks, np.array([0, len(ids)]), np.array([[0, number]]))
            positions_M = select_positions(packed, _PANEL_RULE, _PANEL_SEED)
            hidden = ids.copy()
            hidden[positions_M] = tokenizer.mask_id
            texts.append(Sample(*tokenizer.add_special_tokens(hidden, marks)))
            at.append(positions_M + num_special_tokens)
            answers.append(ids[positions_M])
            offsets = encoded.offsets[: len(ids)]
            self._prompts.append((prompt[: offsets[-1][1]], offsets[positions_M]))
        self._batch = pack(texts) if texts else None
        starts = self._batch.offsets if self._batch else (0,)
        self._at_M = torch.from_numpy(np.concatenate([a + starts[b] for b, a in enumerate(at)])) if texts else None
        self._answer_M = np.concatenate(answers) if answers else np.empty(0, np.int64)

    @torch.inference_mode()
    def ask(self, encoder: nn.Module, head: nn.Module, world: DistributedContext) -> list[Line]:
        """What the model puts in each hidden place now."""
        if self._batch is None or self._at_M is None:
            return []
        encoder.eval()
        head.eval()
        with world.autocast():
            logits_MV = logits_at(encoder, head, self._batch.to(world.device), self._at_M.to(world.device))
        guesses = logits_MV[:, : self._pieces].argmax(-1).tolist()  # a model may have rows without a piece
        lines: list[Line] = []
        taken = 0
        for prompt, offsets in self._prompts:
            here = slice(taken, taken + len(offsets))
            lines.append(self._painted(prompt, offsets.tolist(), guesses[here], self._answer_M[here].tolist()))
            taken += len(offsets)
        return lines

    def _painted(
        self, prompt: str, offsets: Sequence[Sequence[int]], guesses: Sequence[int], answers: Sequence[int]
    ) -> Line:
        """A prompt with the guesses in their places."""
        cells: list[PreviewSpan] = []
        position = 0
        for (first, last), guess, answer in zip(offsets, guesses, answers, strict=True):
            right, piece = guess == answer, self._reader.read(guess).letters
            if last <= position and cells:  # a further byte of a letter that stands already
                before = cells.pop()
                right = right and before.state == "right"
                cells.append(replace(before, text=before.truth if right else before.text, state=_state(right)))
                continue
            if first > position:
                cells.append(PreviewSpan(prompt[position:first]))
            truth = prompt[first:last]
            cells.append(PreviewSpan(truth if right else piece, _state(right), truth))
            position = last
        if position < len(prompt):
            cells.append(PreviewSpan(prompt[position:]))
        return tuple(cells)


def _state(right: bool) -> Literal["right", "wrong"]:
    return "right" if right else "wrong"


def token_views(
    masked: MaskedBatch, original_ids: Sequence[int], tokenizer: Tokenizer, most: int = 48
) -> list[TokenView]:
    """The first text of a puzzle, slot by slot, at most `most` of them."""
    last = min(masked.batch.offsets[1], most)
    asked = set(masked.positions_M.tolist())
    shown = masked.batch.ids_T[:last].tolist()
    return [
        TokenView(tokenizer.id_to_token(original), tokenizer.id_to_token(now), slot in asked)
        for slot, (original, now) in enumerate(zip(original_ids[:last], shown, strict=True))
    ]


@dataclass(frozen=True)
class Summary:
    """Forecast against fact."""

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
    early: str = ""  # why the run ended before its plan, where it did
    before: Mapping[str, Any] | None = None  # the validation of the model that the run went on from


class Display(Protocol):
    """What a run tells while it works."""

    def message(self, message: str) -> None:
        """One sentence for the person."""
        ...

    def progress(self, what: str, share: float) -> None:
        """How far a preparation (reading, training the tokenizer, writing shards) is, 0 to 1."""
        ...

    def forecast(self, forecast: CostEstimate) -> None:
        """Before the first step."""
        ...

    def text(self, text: str, slots: Sequence[TokenView]) -> None:
        """One text as the model will see it."""
        ...

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Training starts or goes on."""
        ...

    def step(self, state: TrainState) -> None:
        """After each step; cheap."""
        ...

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """A training line was written to the log."""
        ...

    def validated(self, step: int, validation: Validation, panel: Sequence[Line]) -> None:
        """After each validation."""
        ...

    def saved(self, folder: Path) -> None:
        """A step folder was written."""
        ...

    def train_end(self, summary: Summary) -> None:
        """The plan is finished, or the run was stopped."""
        ...

    def close(self) -> None:
        """Give the terminal back; called whatever happened."""
        ...
