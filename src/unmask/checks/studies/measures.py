"""What a study measures of a finished run: figures of its last validation, of its curve, of unseen text and of tasks.

The tasks are made from raw text, so that every language has them:

- bigram shift (Conneau et al., arXiv 1805.01070, section 3): whether two neighboring words of a text were swapped.
- next: whether the second of two texts follows the first, or is from anywhere (BERT, arXiv 1810.04805, section 3.1).
- order: whether two texts that follow each other are in their order (ALBERT, arXiv 1909.11942, section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from unmask.core import rng
from unmask.core.config import require
from unmask.core.distributed import DistributedContext
from unmask.core.errors import ModelError, TextError
from unmask.core.files import write_text
from unmask.core.types import MaskedBatch
from unmask.evaluation.masked_lm import EvalSet, evaluate
from unmask.evaluation.validation import read_eval_text
from unmask.models.fill_mask import MASK, fill
from unmask.models.model import Model, load, require_masked_lm
from unmask.training.finetuning.api import finetune

Task = Literal["shift", "next", "order"]
Point = Mapping[str, Any]  # of a curve: step, tokens, predicted, and figures of a validation

_WORDS: Final = 12  # of a text of a task
_FEWEST: Final = 20  # examples of a task
_BELOW_UNIGRAM: Final = 0.1  # nats; a loss that much below the unigram line has left the plateau
_LARGEST_TOP: Final = 1000
_MASKED: Final = 0.15  # of the words of a task that shows [MASK]


@dataclass(frozen=True)
class PromptConfig:
    """A text whose mask is filled at each validation; the probability of `answer` is measured."""

    text: str
    answer: str


@dataclass(frozen=True)
class ProbeConfig:
    """Size of the tasks that models are fine-tuned on."""

    train_examples: int = 2000
    test_examples: int = 1000
    epochs: float = 3.0

    def __post_init__(self) -> None:
        require(self, "train_examples", "test_examples", min=_FEWEST, max=1_000_000)
        require(self, "epochs", above=0, max=1000)


@dataclass(frozen=True)
class StudyText:
    """The documents of a study: those of the runs, and those that no run sees."""

    train: Sequence[str]
    test: Sequence[str]


@dataclass(frozen=True)
class FinishedRun:
    """A run that is measured: its last model, its curve, and the texts of the study."""

    folder: Path
    model: Model
    curve: Sequence[Point]
    text: StudyText
    test_file: Path  # the documents of `text.test`
    probe: ProbeConfig
    threads: int
    context: DistributedContext


@dataclass(frozen=True)
class Measure:
    """A figure of a run, which is None if its model has no such figure."""

    about: str
    compute: Callable[[FinishedRun], float | None]
    decimals: int = 4


# Curves ---------------------------------------------------------------------------------------------------------------

CURVES: Final[Mapping[str, str]] = {
    "loss": "validation loss, nats per token",
    "accuracy": "validation accuracy",
    "bits_per_character": "bits per character",
    "pair_accuracy": "accuracy on sentence pairs",
    "prompt": "probability of the answer to the prompt",
}
"""Figures of a validation, which a plot shows, with their meaning."""


def _last(name: str) -> Callable[[FinishedRun], float | None]:
    return lambda run: run.curve[-1].get(name)


def _gain(run: FinishedRun) -> float:
    return run.curve[-1]["unigram_loss"] - run.curve[-1]["loss"]


def tokens_until(curve: Sequence[Point], loss: float) -> float | None:
    """Return the millions of tokens after which a curve first reaches a loss, interpolated; None if it never does."""
    if curve[0]["loss"] <= loss:
        return curve[0]["tokens"] / 1e6
    for before, after in pairwise(curve):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return (before["tokens"] + share * (after["tokens"] - before["tokens"])) / 1e6
    return None


def _half_gain_tokens(run: FinishedRun) -> float | None:
    if _gain(run) <= 0:
        return None
    return tokens_until(run.curve, run.curve[-1]["unigram_loss"] - _gain(run) / 2)


def _plateau_tokens(run: FinishedRun) -> float | None:
    return tokens_until(run.curve, run.curve[-1]["unigram_loss"] - _BELOW_UNIGRAM)


# Unseen text ----------------------------------------------------------------------------------------------------------


def _with_ids(eval_set: EvalSet, ids_of: Callable[[MaskedBatch], Any]) -> EvalSet:
    """Return an evaluation set with other ids at its masked positions; labels and positions stay."""
    batches: list[MaskedBatch] = []
    for masked in eval_set.batches:
        ids_T = masked.batch.ids_T.clone()
        ids_T[masked.positions_M] = ids_of(masked)
        batches.append(replace(masked, batch=replace(masked.batch, ids_T=ids_T)))
    return replace(eval_set, batches=tuple(batches))


def _unseen(shown: Literal["mask", "kept"], figure: Literal["loss", "accuracy"]) -> Callable[[FinishedRun], Any]:
    """Return a measure on unseen text: its frozen masked positions all show [MASK], or all show their token."""

    def compute(run: FinishedRun) -> float | None:
        model, context = run.model, run.context
        try:
            require_masked_lm(model, "be evaluated on masked tokens")
        except ModelError:
            return None
        options: Any = {"length": None, "document": "file", "errors": "strict", "field": None, "max_size": None}
        text = read_eval_text(model, [run.test_file], **options)
        mask_id = model.tokenizer.mask_id
        changed = _with_ids(text.eval_set, lambda masked: mask_id if shown == "mask" else masked.labels_M)
        result = evaluate(model.encoder.to(context.device), model.head.to(context.device), changed, context)
        return getattr(result, figure)

    return compute


# Prompts --------------------------------------------------------------------------------------------------------------


def prompt_probability(model: Model, prompt: PromptConfig) -> float | None:
    """Return the probability of the answer at the first mask of a prompt; None if the model makes no masked prediction.

    Raises:
        ModelError: the prompt has no [MASK], or the vocabulary lacks the answer.
    """
    try:
        require_masked_lm(model, "fill a prompt")
    except ModelError:
        return None
    top = min(_LARGEST_TOP, model.tokenizer.size)
    for candidate in fill(model, prompt.text, top)[0].masks[0].candidates:
        if candidate.token_str == prompt.answer:
            return candidate.score
    if prompt.answer in model.tokenizer.vocabulary() or top < model.tokenizer.size:
        return 0.0
    raise ModelError(
        f"the vocabulary has no token {prompt.answer!r}, so its probability can't be measured",
        location="prompt.answer",
        hint="give more text, or another answer",
    )


def prompt_points(checkpoints: Mapping[int, Path], prompt: PromptConfig) -> dict[int, float | None]:
    """Return the probability of the answer in each checkpoint, by step."""
    return {step: prompt_probability(load(folder), prompt) for step, folder in checkpoints.items()}


# Tasks ----------------------------------------------------------------------------------------------------------------


def task_examples(task: Task, documents: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Return at most `count` labeled examples of a task, half of each label, as rows for fine-tuning.

    Texts are consecutive words of a document. An example depends on its number and the seed alone.

    Raises:
        TextError: the documents are too short for 20 examples.
    """
    spans = list(_spans(documents))
    usable = [number for number, (_, second) in enumerate(spans) if task == "shift" or second]
    step = max(1, len(usable) // count)
    rows: list[dict[str, str]] = []
    for number in usable[::step][:count]:
        first, second = spans[number]
        label = len(rows) % 2
        draw = rng.integer(seed, "study task", number)
        if task == "shift":
            places = [place for place, (one, next_one) in enumerate(pairwise(first)) if one != next_one]
            if not places:
                continue
            place = places[draw % len(places)]
            words = [*first[:place], first[place + 1], first[place], *first[place + 2 :]] if label else first
            rows.append({"text": " ".join(words), "label": ("kept", "shifted")[label]})
            continue
        if task == "order" and label:
            first, second = second, first
        elif task == "next" and label:
            second = spans[draw % len(spans)][0]
        rows.append({
            "text": " ".join(first), "text2": " ".join(second), "label": ("true", "false")[label]
        })  # fmt: skip
    if len(rows) < _FEWEST:
        raise TextError(
            f"the text gives {len(rows)} examples of the task `{task}`, expected at least {_FEWEST}",
            hint="give more text",
        )
    return rows


def _spans(documents: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield each text of a document and the text after it, which is empty at the end."""
    for document in documents:
        words = document.split()
        spans = [words[first : first + _WORDS] for first in range(0, len(words) - _WORDS + 1, _WORDS)]
        yield from zip(spans, [*spans[1:], []], strict=True)


def with_masks(rows: Sequence[Mapping[str, str]], seed: int) -> list[dict[str, str]]:
    """Return examples whose texts show [MASK] in place of 15 % of the words, so that fine-tuning sees it too."""
    changed: list[dict[str, str]] = []
    for number, row in enumerate(rows):
        words = row["text"].split(" ")
        draws = rng.uniform(seed, "study mask", number, np.arange(len(words))).tolist()
        shown = [MASK if draw < _MASKED else word for word, draw in zip(words, draws, strict=True)]
        changed.append({**row, "text": " ".join(shown)})
    return changed


def _fine_tuned(task: Task, *, is_masked: bool = False) -> Callable[[FinishedRun], float]:
    """Return the accuracy of the model on a task after fine-tuning, on examples of unseen text."""

    def compute(run: FinishedRun) -> float:
        files: dict[str, Path] = {}
        valid = max(_FEWEST, run.probe.train_examples // 4)
        train = task_examples(task, run.text.train, run.probe.train_examples + valid, seed=1)
        test = task_examples(task, run.text.test, run.probe.test_examples, seed=2)
        if is_masked:
            train, test = with_masks(train, seed=1), with_masks(test, seed=2)
        # Validation examples are every fifth: neighbors in the text are in both, but no example is.
        parts = {"train": [row for n, row in enumerate(train) if n % 5], "valid": train[::5], "test": test}
        for name, rows in parts.items():
            files[name] = run.folder.with_name(f"{run.folder.name}-{task}-{name}.jsonl")
            write_text(files[name], "".join(json.dumps(row) + "\n" for row in rows))
        report = finetune(
            run.folder,
            task="classify" if task == "shift" else "pair",
            train=files["train"],
            valid=files["valid"],
            test=files["test"],
            seeds=1,
            epochs=run.probe.epochs,
            threads=run.threads,
            display=None,
        )
        return report.rows[0].test["accuracy"].mean

    return compute


MEASURES: Final[Mapping[str, Measure]] = {
    "loss": Measure("loss of the last validation, nats per token; of a causal model, its own", _last("loss")),
    "accuracy": Measure("accuracy of the last validation", _last("accuracy")),
    "bits_per_character": Measure("bits per character of the last validation", _last("bits_per_character")),
    "gain": Measure("unigram loss − loss of the last validation, nats per token", _gain),
    "half_gain_tokens": Measure("million tokens until half of the run's gain", _half_gain_tokens, 3),
    "plateau_tokens": Measure(
        f"million tokens until the loss is {_BELOW_UNIGRAM} nats below the unigram line", _plateau_tokens, 3
    ),
    "pair_accuracy": Measure("accuracy of the pair head in the last validation", _last("pair_accuracy")),
    "prompt": Measure("probability of the answer to the prompt", _last("prompt")),
    "mask_loss": Measure("loss on unseen text; all masked positions show [MASK]", _unseen("mask", "loss")),
    "mask_accuracy": Measure("accuracy on unseen text; all masked positions show [MASK]", _unseen("mask", "accuracy")),
    "kept_accuracy": Measure("accuracy on unseen text; the predicted tokens are shown", _unseen("kept", "accuracy")),
    "shift_accuracy": Measure("accuracy on bigram shift after fine-tuning", _fine_tuned("shift")),
    "masked_shift_accuracy": Measure(
        "accuracy on bigram shift after fine-tuning; 15 % of the words show [MASK]",
        _fine_tuned("shift", is_masked=True),
    ),
    "next_accuracy": Measure("accuracy on next texts after fine-tuning", _fine_tuned("next")),
    "order_accuracy": Measure("accuracy on the order of texts after fine-tuning", _fine_tuned("order")),
}
"""What a study can measure, by name."""
