"""Room card: a run told in plain lines, for a pipe, a file or a dumb terminal; or not told at all.

Comes in: what the run tells. Goes out: lines without escape codes, each written at once; right and wrong guesses are
told apart by brackets. Called by: pretrain, through the Display protocol.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO, final

from unmask.core.format import duration, number, visible
from unmask.evaluation.validation import Validation
from unmask.training.display import Line, Summary, TokenView
from unmask.training.display.text import (
    Pace,
    by_letter,
    comparison_rows,
    forecast_notes,
    forecast_rows,
    pair_line,
    pair_words,
    set_lines,
    share_of_matmul,
    slot_gap,
    slot_rows,
    stage_rows,
    unigram_line,
    validation_line,
    wrong_text,
)
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

_PREPARING_SECONDS = 5.0
_WIDTH = 100


def panel_lines(panel: Sequence[Line]) -> list[str]:
    """The panel in brackets: [right], {wrong}, {guess→truth} where pieces are more than single letters."""
    lines: list[str] = []
    for line in panel:
        cells: list[str] = []
        for cell in line:
            if cell.state == "plain":
                cells.append(visible(cell.text))
            elif cell.state == "right":
                cells.append(f"[{visible(cell.text)}]")
            else:
                cells.append(f"{{{wrong_text(cell.text, cell.truth, panel)}}}")
        lines.append("".join(cells))
    return lines


def legend(panel: Sequence[Line]) -> str:
    """What the brackets mean."""
    return "[right] {wrong}" if by_letter(panel) else "[right] {guess→truth}"


@final
class PlainDisplay:
    """One line per log interval, a few around each validation."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._open = True
        self._preparing = ("", 0.0)
        self._plan: Plan | None = None
        self._pace: Pace | None = None
        self._standing: TrainState | None = None

    def message(self, message: str) -> None:
        """One sentence, on a line of its own."""
        self._write(message)

    def progress(self, what: str, share: float) -> None:
        """A line when a preparation starts or ends, and every few seconds while it lasts."""
        before, said_at = self._preparing
        now = time.monotonic()
        if what == before and share < 1.0 and now - said_at < _PREPARING_SECONDS:
            return
        if what == before and said_at == float("inf"):
            return
        self._preparing = (what, now if share < 1.0 else float("inf"))
        self._write(f"{what}  {share:.0%}")

    def forecast(self, forecast: CostEstimate) -> None:
        """Label and value, a line each, then the stages."""
        self._plan = forecast.plan
        for label, value in forecast_rows(forecast):
            self._write(f"{label:<12} {value}")
        for row in stage_rows(forecast):
            stage, length, batch, steps, seen, seconds = row
            counts = f"length {length}, {batch} a step, {steps} steps, seen {seen}, {seconds}"
            self._write(f"{'stage ' + stage:<12} {counts}")
        for note in forecast_notes(forecast):
            self._write(f"note: {note}")

    def text(self, text: str, slots: Sequence[TokenView]) -> None:
        """One text in three lines per row: its pieces, what the model sees, what is asked (^)."""
        self._write(f"one text     {visible(text)[: 2 * _WIDTH]}")
        gap = slot_gap(slots)
        for row in slot_rows(slots, _WIDTH - 13):
            self._write(f"pieces       {gap.join(slot.piece for slot in row).rstrip()}")
            self._write(f"model sees   {gap.join(slot.shown for slot in row).rstrip()}")
            if any("^" in slot.mark for slot in row):
                self._write(f"asked        {gap.join(slot.mark for slot in row).rstrip()}")

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Where training starts."""
        self._plan, self._standing = plan, state
        self._pace = Pace(plan, state, flops_per_token, flops_per_second)
        going_on = f", going on after step {state.step:,}" if state.step else ""
        self._write(f"training {plan.steps:,} steps{going_on}")

    def step(self, state: TrainState) -> None:
        """Only remembered; a line comes with the log."""
        self._standing = state

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """One line: step, loss, accuracy, speed, rate, time gone and left."""
        parts = [f"step {step:,}"]
        speed = number(metrics, "tokens_per_second")
        if self._plan is not None:
            steps = f"{self._plan.steps:,}"
            parts = [f"step {step:>{len(steps)},}/{steps} {step / self._plan.steps:>4.0%}"]
        parts.append(f"loss {number(metrics, 'loss'):.3f}")
        parts.append(f"accuracy {number(metrics, 'accuracy'):.1%}")
        parts.append(pair_words(metrics))
        parts.append(f"{speed:,.0f} tokens/s")
        if self._pace is not None:
            parts.append(share_of_matmul(self._pace.share_of_matmul(speed)))
        parts.append(f"lr {number(metrics, 'learning_rate'):.2e}")
        parts.append(f"{duration(number(metrics, 'seconds'))} gone")
        if self._pace is not None and self._standing is not None:
            parts.append(f"{duration(self._pace.seconds_left(self._standing))} left")
        self._write("  ".join(filter(None, parts)))

    def validated(self, step: int, validation: Validation, panel: Sequence[Line]) -> None:
        """Measurements, the unigram line, the panel."""
        self._write(f"validation at step {step:,}: {validation_line(validation)}")
        self._write(f"  {unigram_line(validation)}")
        if validation.pair is not None:
            self._write(f"  {pair_line(validation.pair)}")
        for line in set_lines(validation):
            self._write(f"  {line}")
        for line in panel_lines(panel):
            self._write(f"  {line}")
        if panel:
            self._write(f"  ({legend(panel)})")

    def saved(self, folder: Path) -> None:
        """Where the step folder is."""
        self._write(f"saved {folder}")

    def train_end(self, summary: Summary) -> None:
        """Forecast against fact."""
        rows = comparison_rows(summary, self._plan)
        wide = max(len(row.label) for row in rows)
        for row in rows:
            forecast = f"  (forecast {row.forecast})" if row.forecast else ""
            self._write(f"{row.label:<{wide}}  {row.fact}{forecast}")

    def close(self) -> None:
        """Nothing to give back."""

    def _write(self, line: str) -> None:
        """A line, written at once. A run goes on where nobody reads any more: its log is in its folder."""
        if not self._open:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._open = False


@final
class SilentDisplay:
    """Tells nothing: for tests, for scripts, for every rank but the first."""

    def message(self, message: str) -> None:
        """Nothing."""

    def progress(self, what: str, share: float) -> None:
        """Nothing."""

    def forecast(self, forecast: CostEstimate) -> None:
        """Nothing."""

    def text(self, text: str, slots: Sequence[TokenView]) -> None:
        """Nothing."""

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Nothing."""

    def step(self, state: TrainState) -> None:
        """Nothing."""

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """Nothing."""

    def validated(self, step: int, validation: Validation, panel: Sequence[Line]) -> None:
        """Nothing."""

    def saved(self, folder: Path) -> None:
        """Nothing."""

    def train_end(self, summary: Summary) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
