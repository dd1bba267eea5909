"""A display of plain lines without escape codes, for a pipe, a file or a dumb terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, final

from unmask.core.format import duration, number, visible
from unmask.evaluation.validation import Validation
from unmask.training.display import Display, PreviewLine, Summary, TokenView
from unmask.training.display.text import (
    Pace,
    cell_gap,
    cell_rows,
    comparison_rows,
    estimate_notes,
    estimate_rows,
    is_by_character,
    matmul_text,
    objective_line,
    pair_line,
    pair_text,
    probe_line,
    set_lines,
    stage_line,
    stage_rows,
    unigram_line,
    validation_line,
    wrong_text,
)
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

_PROGRESS_SECONDS = 5.0
_WIDTH = 100


def preview_lines(preview: Sequence[PreviewLine]) -> list[str]:
    """Marks predictions by brackets: [correct], {wrong}, or {wrong→truth} if tokens are longer than one character."""
    lines: list[str] = []
    for line in preview:
        spans: list[str] = []
        for span in line:
            if span.state == "plain":
                spans.append(visible(span.text))
            elif span.state == "correct":
                spans.append(f"[{visible(span.text)}]")
            else:
                spans.append(f"{{{wrong_text(span.text, span.truth, preview)}}}")
        lines.append("".join(spans))
    return lines


def legend(preview: Sequence[PreviewLine]) -> str:
    """Explains the brackets."""
    return "[correct] {wrong}" if is_by_character(preview) else "[correct] {wrong→truth}"


@final
class PlainDisplay(Display):
    """Writes one line per log interval and a few per validation."""

    def __init__(self, stream: TextIO | None = None, words: Callable[[str], str] = str) -> None:
        """Writes to a stream; `words` changes messages and notes, such as options to keywords."""
        self._stream = sys.stdout if stream is None else stream
        self._words = words
        self._open = True
        self._progress = ("", 0.0)  # the task, and when its last line was written
        self._plan: Plan | None = None
        self._pace: Pace | None = None
        self._train_state: TrainState | None = None
        self._preview: Sequence[PreviewLine] = ()  # of the last validation, unless it is written
        self._has_preview = False

    def message(self, message: str) -> None:
        """Writes a log message as one line."""
        self._write(self._words(message))

    def progress(self, what: str, fraction: float) -> None:
        """Writes a line when a task starts or ends, and every few seconds in between."""
        task, written = self._progress
        now = time.monotonic()
        if what == task and fraction < 1.0 and now - written < _PROGRESS_SECONDS:
            return
        if what == task and written == float("inf"):
            return
        self._progress = (what, now if fraction < 1.0 else float("inf"))
        self._write(f"{what}  {fraction:.0%}")

    def probe(self, fraction: float, seconds: float) -> None:
        """Writes one line when the probe starts."""
        if self._progress[0] != probe_line(seconds):
            self._progress = (probe_line(seconds), math.inf)
            self._write(probe_line(seconds))

    def estimate(self, estimate: CostEstimate) -> None:
        """Writes labels and values, one per line, then the stages."""
        self._plan = estimate.plan
        for label, value in estimate_rows(estimate):
            self._write(f"{label:<12} {value}")
        for row in stage_rows(estimate):
            self._write(stage_line(row))
        for note in estimate_notes(estimate):
            self._write(f"note: {self._words(note)}")

    def sample(self, text: str, tokens: Sequence[TokenView]) -> None:
        """Writes a sample in three lines per row: tokens, model input, and "^" below masked tokens."""
        self._write(f"sample       {visible(text)[: 2 * _WIDTH]}")
        gap = cell_gap(tokens)
        for row in cell_rows(tokens, _WIDTH - 13):
            self._write(f"tokens       {gap.join(cell.original for cell in row).rstrip()}")
            self._write(f"model input  {gap.join(cell.shown for cell in row).rstrip()}")
            if any("^" in cell.mark for cell in row):
                self._write(f"masked       {gap.join(cell.mark for cell in row).rstrip()}")

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Writes the number of steps."""
        self._plan, self._train_state = plan, state
        self._pace = Pace(plan, state, flops_per_token, flops_per_second)
        resumed = f", resumed after step {state.step:,}" if state.step else ""
        self._write(f"training for {plan.steps:,} steps{resumed}")

    def step(self, state: TrainState) -> None:
        """Keeps the state for the next log line."""
        self._train_state = state

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """Writes one line: step, loss, accuracy, speed, learning rate, elapsed and remaining time."""
        parts = [f"step {step:,}"]
        speed = number(metrics, "tokens_per_second")
        if self._plan is not None:
            steps = f"{self._plan.steps:,}"
            parts = [f"step {step:>{len(steps)},}/{steps} {step / self._plan.steps:>4.0%}"]
        parts.append(f"loss {number(metrics, 'loss'):.3f}")
        parts.append(f"accuracy {number(metrics, 'accuracy'):.1%}")
        parts.append(pair_text(metrics))
        parts.append(f"{speed:,.0f} tokens/s")
        if self._pace is not None:
            parts.append(matmul_text(self._pace.matmul_fraction(speed)))
        parts.append(f"lr {number(metrics, 'learning_rate'):.2e}")
        parts.append(f"elapsed {duration(number(metrics, 'seconds'))}")
        if self._pace is not None and self._train_state is not None:
            parts.append(f"ETA {duration(self._pace.seconds_left(self._train_state))}")
        self._write("  ".join(filter(None, parts)))

    def validated(self, step: int, validation: Validation, preview: Sequence[PreviewLine]) -> None:
        """Writes the results, the unigram baseline and the first preview."""
        self._write(f"validation at step {step:,}: {validation_line(validation)}")
        self._write(f"  {unigram_line(validation)}")
        if validation.pair is not None:
            self._write(f"  {pair_line(validation.pair)}")
        if line := objective_line(validation):
            self._write(f"  {line}")
        for line in set_lines(validation):
            self._write(f"  {line}")
        is_first, self._preview = not self._has_preview, preview
        if is_first or (self._plan is not None and step >= self._plan.steps):
            self._write_preview()

    def _write_preview(self) -> None:
        """Writes the last preview. Lines can't be redrawn, so only the first and the last preview are written."""
        for line in preview_lines(self._preview):
            self._write(f"  {line}")
        if self._preview:
            self._write(f"  ({legend(self._preview)})")
            self._has_preview = True
        self._preview = ()

    def saved(self, folder: Path) -> None:
        """Writes the path of the step folder."""
        self._write(f"saved {folder}")

    def train_end(self, summary: Summary) -> None:
        """Writes the last preview, if it isn't written yet, and the results, each with its estimate."""
        self._write_preview()
        rows = comparison_rows(summary, self._plan)
        width = max(len(row.label) for row in rows)
        for row in rows:
            estimate = f"  (estimate {row.estimate})" if row.estimate else ""
            self._write(f"{row.label:<{width}}  {row.actual}{estimate}")

    def _write(self, line: str) -> None:
        """Writes and flushes a line. If the pipe is closed, training continues without a display."""
        if not self._open:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
            self._stream.flush()
        except BrokenPipeError:
            self._open = False
