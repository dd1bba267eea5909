"""Room card: a run's numbers as people read them.

Comes in: a forecast, a plan, where a run stands, what was measured. Goes out: words ("1.2M tokens", "9 min 12 s"), rows
of tables, the pace and the time that is left, a text laid out slot by slot; no colour. Called by: the displays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.cells import cell_len

from unmask.core.format import count, duration, number, rate, size, visible
from unmask.evaluation.validation import PairValidation, Validation
from unmask.training.display import Line, Summary, TokenView
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

MANY_EPOCHS = 40  # beyond this a text of any size is seen so often that its letters are learnt rather than its language
MASK = "[MASK]"


def share_of_matmul(share: float) -> str:
    """The part of this machine's matrix-product rate that became training; nothing where it wasn't measured."""
    return f"{share:.0%} of matmul rate" if math.isfinite(share) else ""


def forecast_rows(forecast: CostEstimate) -> list[tuple[str, str]]:
    """What a run will be and cost, as (label, words)."""
    plan = forecast.plan
    cores = "thread" if forecast.threads == 1 else "threads"
    tokens = f"{count(forecast.documents)} documents, {count(forecast.corpus_tokens)} tokens"
    return [
        ("recipe", forecast.recipe),
        ("model", f"{forecast.parameters:,} parameters, {count(forecast.flops_per_token)} FLOPs per token"),
        ("text", f"{tokens}, which will be seen {times(sum(forecast.epochs))}"),
        ("optimizer", forecast.optimizer),
        ("budget", f"{plan.steps:,} steps, {count(plan.tokens)} tokens"),
        ("time", f"about {duration(plan.seconds)}" if plan.seconds else "not measured"),
        ("memory", f"about {size(forecast.memory_bytes)}"),
        ("disk", f"about {size(forecast.disk_bytes)}"),
        ("machine", f"{forecast.device}, {forecast.threads} {cores}, {forecast.precision}"),
        ("matmul rate", f"{rate(forecast.flops_per_second)} at this model's shapes"),
    ]


def times(epochs: float) -> str:
    """How often a text is seen, in words."""
    return f"{epochs:.2g} times" if epochs < 9.95 else f"{epochs:,.0f} times"


def forecast_notes(forecast: CostEstimate) -> list[str]:
    """What a person should know of this plan before it begins: how often the text is seen, when the run may end."""
    epochs, by_name = sum(forecast.epochs), forecast.texts_seen
    told = [f"of the texts, {_each(by_name)}"] if len(by_name) > 1 else []
    most, least = max([epochs, *by_name.values()]), min([epochs, *by_name.values()])
    if most > MANY_EPOCHS:
        told.append(
            f"a text seen {times(most)} is learnt by heart: watch the validation loss, bring more text or give a "
            "smaller budget; --set train.early_stopping_patience=3 ends a run that wins no more"
        )
    if least < 1:
        told.append("some of the text will be left unread: a larger budget would use it")
    if forecast.patience:
        told.append(
            f"the run ends after {forecast.patience} validations without gain"
            + (f": maybe before the rates come down {forecast.decay}" if forecast.decay else "")
        )
    return told


def _each(by_name: Mapping[str, float]) -> str:
    return ", ".join(f"{name} will be seen {times(value)}" for name, value in by_name.items())


STAGE_COLUMNS = ("stage", "text length", "batch", "steps", "text seen", "time")


def stage_rows(forecast: CostEstimate) -> list[tuple[str, ...]]:
    """One row of STAGE_COLUMNS per stage."""
    return [
        (
            str(number),
            f"{stage.max_seq_len:,}",
            f"{count(stage.batch_tokens)} tokens",
            f"{stage.steps:,}",
            times(epochs),
            duration(stage.steps * stage.seconds_per_step) if stage.seconds_per_step else "not measured",
        )
        for number, (stage, epochs) in enumerate(zip(forecast.plan.stages, forecast.epochs, strict=True), start=1)
    ]


def unigram_line(validation: Validation) -> str:
    """Where the loss stands to a guess that knows only how frequent each piece is."""
    under = validation.unigram_loss - validation.loss
    plateau = f"unigram {validation.unigram_loss:.2f}: the plateau; "
    if under < 0.005:
        return plateau + "still above it: nothing learnt about context yet"
    return plateau + f"{under:.{2 if under < 0.1 else 1}f} nats under it"


def validation_line(validation: Validation) -> str:
    """The measurements of one validation."""
    earlier = ", ".join(f"{loss:.3f} at length {length}" for length, loss in sorted(validation.earlier.items()))
    return (
        f"loss {validation.loss:.3f}{f' ({earlier})' if earlier else ''}  accuracy {validation.accuracy:.1%}  "
        f"{validation.bits_per_character:.3f} bits/character"
    )


def pair_words(metrics: Mapping[str, object]) -> str:
    """The share of pairs that a log line says were answered right; nothing where none were asked."""
    share = number(metrics, "pair_accuracy")
    return "" if math.isnan(share) else f"pairs {share:.1%}"


def pair_line(pair: PairValidation) -> str:
    """What was measured on the frozen pairs."""
    earlier = ", ".join(f"{share:.1%} at length {length}" for length, share in sorted(pair.earlier.items()))
    accuracy = f"{pair.accuracy:.1%}{f' ({earlier})' if earlier else ''}"
    return f"pairs: accuracy {accuracy}, chance 50%; loss {pair.loss:.3f}, chance {math.log(2):.3f}"


def set_lines(validation: Validation) -> list[str]:
    """What was measured on each text of data.valid, in columns."""
    wide = max((cell_len(name) for name in validation.sets), default=0)
    return [
        f"{_padded(name, wide)}  loss {one.loss:.3f}  accuracy {one.accuracy:.1%}  "
        f"{one.bits_per_character:.3f} bits/character  (unigram {one.unigram_loss:.2f})"
        for name, one in validation.sets.items()
    ]


class Comparison(NamedTuple):
    """One row of forecast against fact."""

    label: str
    forecast: str
    fact: str


def comparison_rows(summary: Summary, plan: Plan | None) -> list[Comparison]:
    """Forecast against fact."""
    planned_training = sum(stage.steps * stage.seconds_per_step for stage in plan.stages) if plan else 0.0
    planned_rate = f"{plan.tokens / planned_training:,.0f}" if plan and planned_training else ""
    rows = [
        Comparison("steps", f"{plan.steps:,}" if plan else "", f"{summary.steps:,}"),
        Comparison("tokens", count(plan.tokens) if plan else "", count(summary.tokens)),
        Comparison("time", _planned(summary.planned_seconds), duration(summary.seconds)),
        Comparison("of it training", _planned(planned_training), duration(summary.training_seconds)),
        Comparison("tokens/s", planned_rate, f"{summary.tokens_per_second:,.0f}"),
    ]
    held = summary.validation
    if summary.before is not None:  # of the very puzzles that the rows below are about
        before = summary.before
        told = f"{before['loss']:.3f}, {before['accuracy']:.1%}, {before['bits_per_character']:.3f}"
        rows.append(Comparison("before: loss, accuracy, bits per character", "", told))
        rows += [
            Comparison(f"before: loss on {name}", "", f"{one['loss']:.3f}") for name, one in before["sets"].items()
        ]
    if held is not None:
        rows += [
            Comparison(f"validation loss (unigram {held.unigram_loss:.3f})", "", f"{held.loss:.3f}"),
            Comparison("accuracy", "", f"{held.accuracy:.1%}"),
            Comparison("bits per character", "", f"{held.bits_per_character:.3f}"),
        ]
        rows += [
            Comparison(f"loss on {name} (unigram {one.unigram_loss:.3f})", "", f"{one.loss:.3f}")
            for name, one in held.sets.items()
        ]
        if held.pair is not None:
            rows.append(Comparison("accuracy on pairs (chance 50%)", "", f"{held.pair.accuracy:.1%}"))
    if summary.best_loss is not None and summary.best_step != summary.steps:
        rows.append(Comparison("best validation loss", "", f"{summary.best_loss:.3f} at step {summary.best_step:,}"))
    if summary.early:
        rows.append(Comparison("ended early", "", summary.early))
    return rows


def _planned(seconds: float) -> str:
    return duration(seconds) if seconds else ""


class Pace:
    """How fast a run goes, and what is left of it, from where it began."""

    def __init__(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        self.plan = plan
        self._flops_per_token = flops_per_token
        self._flops_per_second = flops_per_second
        self._begin_step, self._begin_seconds = state.step, state.seconds

    def share_of_matmul(self, tokens_per_second: float) -> float:
        """The part of this machine's matrix-product rate that became training; NaN where that wasn't measured."""
        if not self._flops_per_second:
            return float("nan")
        return self._flops_per_token * tokens_per_second / self._flops_per_second

    def seconds_left(self, state: TrainState) -> float:
        """The plan's time for what remains, times how much slower the run was than the plan up to here."""
        done = self._effort(state.step) - self._effort(self._begin_step)
        left = self._effort(self.plan.steps) - self._effort(state.step)
        if done <= 0:
            return left if self.plan.seconds else float("nan")
        return left * (state.seconds - self._begin_seconds) / done

    def _effort(self, step: int) -> float:
        """Planned seconds up to this step; where nothing was measured, the share of the planned tokens."""
        if not self.plan.seconds:
            return self.plan.progress(step)
        within = sum(
            min(max(step - stage.first_step, 0), stage.steps) * stage.seconds_per_step for stage in self.plan.stages
        )
        return within + self.plan.overhead_seconds * step / self.plan.steps


SlotState = Literal["plain", "hidden", "random", "kept"]


@dataclass(frozen=True)
class Slot:
    """One slot of a text laid out for the screen: three cells of one width."""

    piece: str
    shown: str
    mark: str
    state: SlotState


def slot_rows(slots: Sequence[TokenView], width: int) -> list[list[Slot]]:
    """A text as the model sees it, in rows of at most `width` cells: pieces, what stands in their place, what is asked.

    Where pieces are single characters, a hidden one is shown as "_", so that the columns stay narrow.
    """
    gap = len(slot_gap(slots))
    rows: list[list[Slot]] = [[]]
    used = 0
    for seen in slots:
        piece = visible(seen.piece)
        shown = "_" if not gap and seen.shown == MASK else visible(seen.shown)
        wide = max(cell_len(piece), cell_len(shown))
        if rows[-1] and used + wide > width:
            rows.append([])
            used = 0
        mark = ("^" if seen.asked else " ") * wide
        rows[-1].append(Slot(_padded(piece, wide), _padded(shown, wide), mark, _state(seen)))
        used += wide + gap
    return rows


def _state(seen: TokenView) -> SlotState:
    if not seen.asked:
        return "plain"
    if seen.shown == MASK:
        return "hidden"
    return "kept" if seen.shown == seen.piece else "random"


def slot_gap(slots: Sequence[TokenView]) -> str:
    """What stands between two slots of a row."""
    return "" if all(len(slot.piece) == 1 for slot in slots if not slot.piece.startswith("[")) else " "


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def by_letter(panel: Sequence[Line]) -> bool:
    """Whether the panel hides single letters; then a wrong one is enough, and what stood there can be guessed."""
    return all(len(cell.truth) <= 1 for line in panel for cell in line)


def wrong_text(guess: str, truth: str, panel: Sequence[Line]) -> str:
    """What is painted for a wrong guess: the guess, and what stood there where pieces are more than single letters."""
    return visible(guess) if by_letter(panel) else f"{visible(guess)}→{visible(truth)}"
