"""Formats the numbers of a run: tables of the estimate and the results, validation lines, remaining time, a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.cells import cell_len

from unmask.core.format import count, duration, number, rate, size, visible
from unmask.evaluation.masked_lm import PairEvalResult
from unmask.evaluation.validation import Validation
from unmask.training.display import PreviewLine, Summary, TokenView
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

# More epochs over a text of any size mostly memorize it. With 60, dropout helped; with 10, it did harm (docs/diary.md).
MANY_EPOCHS = 40
MASK = "[MASK]"


# Before training ------------------------------------------------------------------------------------------------------


def probe_line(seconds: float) -> str:
    """Describes the probe, which takes at most `seconds`."""
    return f"probe: timing steps, validation and saving, at most {duration(seconds)}"


def estimate_rows(estimate: CostEstimate) -> list[tuple[str, str]]:
    """Returns size and cost of a run as (label, value)."""
    plan = estimate.plan
    threads = "thread" if estimate.threads == 1 else "threads"
    processes = f"{estimate.ranks} processes of " if estimate.ranks > 1 else ""
    tokens = f"{count(estimate.documents)} documents, {count(estimate.corpus_tokens)} tokens"
    return [
        ("recipe", estimate.recipe),
        ("model", f"{estimate.parameters:,} parameters, {count(estimate.flops_per_token)} FLOPs per token"),
        ("data", f"{tokens}, {epochs_text(sum(estimate.epochs))}"),
        ("optimizer", estimate.optimizer),
        ("budget", f"{plan.steps:,} steps, {count(plan.tokens)} tokens"),
        ("time", f"about {duration(plan.seconds)}" if plan.seconds else "not measured"),
        ("memory", f"about {size(estimate.memory_bytes)}"),
        ("disk", f"about {size(estimate.disk_bytes)}"),
        ("machine", f"{estimate.device}, {processes}{estimate.threads} {threads}, {estimate.precision}"),
        ("matmul rate", f"{rate(estimate.flops_per_second)} at this model's shapes"),
    ]


def epochs_text(epochs: float) -> str:
    """Returns a number of epochs with its unit."""
    text = f"{epochs:.2g}" if epochs < 9.95 else f"{epochs:,.0f}"
    return f"{text} epoch" if text == "1" else f"{text} epochs"


def estimate_notes(estimate: CostEstimate) -> list[str]:
    """Returns warnings about a plan: too many or too few epochs, and early stopping."""
    epochs, by_name = sum(estimate.epochs), estimate.texts_seen
    notes: list[str] = []
    if len(by_name) > 1:
        notes.append("epochs by text: " + ", ".join(f"{name} {epochs_text(value)}" for name, value in by_name.items()))
    most, fewest = max([epochs, *by_name.values()]), min([epochs, *by_name.values()])
    if most > MANY_EPOCHS:
        dropout = " ".join(f"--set {key}=0.1" for key in estimate.dropout_off)
        notes.append(
            f"{epochs_text(most)} over the same text mostly memorize it: watch the validation loss, add text or lower "
            f"the budget{f', or use dropout ({dropout})' if dropout else ''}; "
            "--set train.early_stopping_patience=3 stops a run that no longer improves"
        )
    if fewest < 1:
        notes.append("less than one epoch: part of the text is not used; increase the budget to use all of it")
    for index, (stage, passes) in enumerate(zip(estimate.plan.stages, estimate.epochs, strict=True)):
        text = stage.steps * stage.batch_tokens / passes
        if stage.batch_tokens > text:
            notes.append(
                f"a step of stage {index} has {count(stage.batch_tokens)} tokens, more than the text with "
                f"{count(text)}, so it repeats sequences: add text, or use smaller steps: "
                f'--set "stage.{index}.batch_size={max(1, int(text) // 4)} tokens"'
            )
    if estimate.patience:
        notes.append(
            f"the run stops after {estimate.patience} validations without improvement"
            + (f", possibly before the learning rate decays {estimate.decay}" if estimate.decay else "")
        )
    return notes


def stage_columns(estimate: CostEstimate) -> tuple[str, ...]:
    """Returns the names of the columns of `stage_rows`: with the objectives, if they differ."""
    return ("stage", "max length", "batch", "steps", "epochs", "time", *(["objective"] if estimate.objectives else []))


def stage_rows(estimate: CostEstimate) -> list[tuple[str, ...]]:
    """Returns one row per stage."""
    return [
        (
            str(number),
            f"{stage.max_seq_len:,}",
            f"{count(stage.batch_tokens)} tokens",
            f"{stage.steps:,}",
            epochs_text(epochs).partition(" ")[0],
            duration(stage.steps * stage.seconds_per_step) if stage.seconds_per_step else "not measured",
            *estimate.objectives[number - 1 : number],
        )
        for number, (stage, epochs) in enumerate(zip(estimate.plan.stages, estimate.epochs, strict=True), start=1)
    ]


def stage_line(row: Sequence[str]) -> str:
    """Returns a row of `stage_rows` as a line of text."""
    stage, length, batch, steps, epochs, seconds, *objective = row
    values = [f"max length {length}", f"{batch} per step", f"{steps} steps", f"epochs {epochs}", seconds]
    return f"{'stage ' + stage:<12} {', '.join([*values, *(f'objective {each}' for each in objective)])}"


# Validation -----------------------------------------------------------------------------------------------------------


def unigram_line(validation: Validation) -> str:
    """Compares the loss with the unigram baseline, which knows only how frequent each token is."""
    baseline = f"unigram baseline {validation.unigram_loss:.2f}: "
    below = validation.unigram_loss - validation.loss
    if below < 0.005:
        return baseline + "the loss is not below it, nothing is learned from context yet"
    return baseline + f"the loss is {below:.{2 if below < 0.1 else 1}f} nats below it"


def validation_line(validation: Validation) -> str:
    """Returns the results of one validation."""
    earlier = ", ".join(f"{loss:.3f} at length {length}" for length, loss in sorted(validation.earlier.items()))
    return (
        f"loss {validation.loss:.3f}{f' ({earlier})' if earlier else ''}  accuracy {validation.accuracy:.1%}  "
        f"{validation.bits_per_character:.3f} bits/character"
    )


def objective_line(validation: Validation) -> str:
    """Returns the results of the stage's objective; an empty string if masked tokens alone judge it."""
    values = {name: value for name, value in validation.objective.items() if name != "mask_rate"}
    shown = [
        f"{name} {value:.3f}" if name == "bound" or "loss" in name else f"{name} {value:.1%}"
        for name, value in values.items()
    ]
    return f"objective of this stage, with its own attention: {'  '.join(shown)}" if shown else ""


def pair_text(metrics: Mapping[str, object]) -> str:
    """Returns the accuracy on sentence pairs of a log line; an empty string if the objective has no pairs."""
    accuracy = number(metrics, "pair_accuracy")
    return "" if math.isnan(accuracy) else f"pairs {accuracy:.1%}"


def pair_line(pair: PairEvalResult) -> str:
    """Returns the results on the held-out sentence pairs."""
    earlier = ", ".join(f"{accuracy:.1%} at length {length}" for length, accuracy in sorted(pair.earlier.items()))
    accuracy = f"{pair.accuracy:.1%}{f' ({earlier})' if earlier else ''}"
    return f"sentence pairs: accuracy {accuracy}, chance 50%; loss {pair.loss:.3f}, chance {math.log(2):.3f}"


def set_lines(validation: Validation) -> list[str]:
    """Returns the results on each text of data.valid, in columns."""
    width = max((cell_len(name) for name in validation.sets), default=0)
    return [
        f"{_padded(name, width)}  loss {result.loss:.3f}  accuracy {result.accuracy:.1%}  "
        f"{result.bits_per_character:.3f} bits/character  (unigram baseline {result.unigram_loss:.2f})"
        for name, result in validation.sets.items()
    ]


# Results --------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One row of the results: estimate and actual value."""

    label: str
    estimate: str
    actual: str


def comparison_rows(summary: Summary, plan: Plan | None) -> list[Comparison]:
    """Returns the results of a run, compared with its plan."""
    planned_training = plan.training_seconds(plan.steps) if plan else 0.0
    planned_speed = f"{plan.tokens / planned_training:,.0f}" if plan and planned_training else ""
    rows = [
        Comparison("steps", f"{plan.steps:,}" if plan else "", f"{summary.steps:,}"),
        Comparison("tokens", count(plan.tokens) if plan else "", count(summary.tokens)),
        Comparison("time", _planned(summary.planned_seconds), duration(summary.seconds)),
        Comparison("training time", _planned(planned_training), duration(summary.training_seconds)),
        Comparison("tokens/s", planned_speed, f"{summary.tokens_per_second:,.0f}"),
    ]
    if summary.before is not None:  # on the same masked tokens as the rows below
        before = summary.before
        results = f"{before['loss']:.3f}, {before['accuracy']:.1%}, {before['bits_per_character']:.3f}"
        rows.append(Comparison("before: loss, masked accuracy, bits per character", "", results))
        rows += [
            Comparison(f"before: loss on {name}", "", f"{result['loss']:.3f}")
            for name, result in before["sets"].items()
        ]
    last = summary.validation
    if last is not None:
        rows += [
            Comparison(f"validation loss (unigram baseline {last.unigram_loss:.3f})", "", f"{last.loss:.3f}"),
            Comparison("masked accuracy", "", f"{last.accuracy:.1%}"),
            Comparison("bits per character", "", f"{last.bits_per_character:.3f}"),
        ]
        rows += [
            Comparison(f"loss on {name} (unigram baseline {result.unigram_loss:.3f})", "", f"{result.loss:.3f}")
            for name, result in last.sets.items()
        ]
        if last.pair is not None:
            rows.append(Comparison("sentence-pair accuracy (chance 50%)", "", f"{last.pair.accuracy:.1%}"))
    if summary.best_loss is not None and summary.best_step != summary.steps:
        rows.append(Comparison("best validation loss", "", f"{summary.best_loss:.3f} at step {summary.best_step:,}"))
    if summary.skipped_steps:
        rows.append(Comparison("skipped steps (loss or gradient not finite)", "", f"{summary.skipped_steps:,}"))
    if summary.rollbacks:
        rows.append(Comparison("returns to an earlier checkpoint", "", f"{summary.rollbacks}"))
    if summary.early:
        rows.append(Comparison("stopped early", "", summary.early))
    return rows


def _planned(seconds: float) -> str:
    return duration(seconds) if seconds else ""


# Speed ----------------------------------------------------------------------------------------------------------------


class Pace:
    """Estimates the remaining time and the efficiency of a run from its plan and its speed so far."""

    def __init__(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        self.plan = plan
        self._flops_per_token = flops_per_token
        self._flops_per_second = flops_per_second
        self._first_step, self._first_seconds = state.step, state.seconds

    def matmul_fraction(self, tokens_per_second: float) -> float:
        """Returns the training FLOP/s as a fraction of the measured matmul rate; NaN if that rate wasn't measured."""
        if not self._flops_per_second:
            return float("nan")
        return self._flops_per_token * tokens_per_second / self._flops_per_second

    def seconds_left(self, state: TrainState) -> float:
        """Returns the planned time of the remaining steps, scaled by the ratio of actual to planned time so far."""
        done = self._planned_seconds(state.step) - self._planned_seconds(self._first_step)
        remaining = self._planned_seconds(self.plan.steps) - self._planned_seconds(state.step)
        if done <= 0:
            return remaining if self.plan.seconds else float("nan")
        return remaining * (state.seconds - self._first_seconds) / done

    def _planned_seconds(self, step: int) -> float:
        """Returns the planned seconds until a step; the fraction of the planned tokens if no time was measured."""
        if not self.plan.seconds:
            return self.plan.progress(step)
        return self.plan.training_seconds(step) + self.plan.overhead_seconds * step / self.plan.steps


def matmul_text(fraction: float) -> str:
    """Returns the efficiency as text; an empty string if it wasn't measured."""
    return f"{fraction:.0%} of matmul rate" if math.isfinite(fraction) else ""


# Sample and preview ---------------------------------------------------------------------------------------------------

CellState = Literal["plain", "mask", "random", "kept"]


@dataclass(frozen=True)
class Cell:
    """One token of a sample on the screen: three strings of the same width."""

    original: str
    shown: str
    mark: str
    state: CellState


def cell_rows(tokens: Sequence[TokenView], width: int) -> list[list[Cell]]:
    """Lays out a sample in rows of at most `width` columns: original token, model input and "^" if masked.

    If tokens are single characters, [MASK] is shown as "_", so that the columns stay narrow.
    """
    gap = len(cell_gap(tokens))
    rows: list[list[Cell]] = [[]]
    used = 0
    for token in tokens:
        original = visible(token.original)
        shown = "_" if not gap and token.shown == MASK else visible(token.shown)
        columns = max(cell_len(original), cell_len(shown))
        if rows[-1] and used + columns > width:
            rows.append([])
            used = 0
        mark = ("^" if token.masked else " ") * columns
        rows[-1].append(Cell(_padded(original, columns), _padded(shown, columns), mark, _state(token)))
        used += columns + gap
    return rows


def _state(token: TokenView) -> CellState:
    if not token.masked:
        return "plain"
    if token.shown == MASK:
        return "mask"
    return "kept" if token.shown == token.original else "random"


def cell_gap(tokens: Sequence[TokenView]) -> str:
    """Returns the space between two tokens of a row: none if tokens are single characters."""
    single = all(len(token.original) == 1 for token in tokens if not token.original.startswith("["))
    return "" if single else " "


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def is_by_character(preview: Sequence[PreviewLine]) -> bool:
    """Returns whether the preview masks single characters. Then wrong predictions are shown without the truth."""
    return all(len(span.truth) <= 1 for line in preview for span in line)


def wrong_text(prediction: str, truth: str, preview: Sequence[PreviewLine]) -> str:
    """Returns a wrong prediction and, unless the preview masks single characters, the original text."""
    if is_by_character(preview):
        return visible(prediction)
    return f"{visible(prediction)}→{visible(truth)}"
