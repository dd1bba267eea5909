"""A display for Jupyter: the estimate, then one table that is updated in place, with a progress bar and the preview.

It needs nothing but IPython, which every notebook has. All text is escaped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, final

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
    matmul_text,
    probe_line,
    stage_columns,
    stage_rows,
    unigram_line,
    wrong_text,
)
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

_UPDATE_SECONDS = 0.5  # each update is a message to the browser, and is saved in the notebook
_COLUMNS = ("step", "tokens", "training loss", "validation loss", "accuracy", "bits/character")
_CORRECT = "color: #0a7d28; font-weight: bold"
_WRONG = "color: #c62828; text-decoration: underline"
_SAMPLE_WIDTH = 90  # columns


@final
class NotebookDisplay(Display):
    """Shows a run in a notebook."""

    def __init__(self, words: Callable[[str], str] = str) -> None:
        """Shows nothing yet; `words` changes messages and notes, such as options to keywords."""
        self._words = words
        self._handle: Any = None  # of the output that is updated
        self._next_update = 0.0
        self._task = ("", 0.0)  # before training, and when it started
        self._plan: Plan | None = None
        self._pace: Pace | None = None
        self._train_state: TrainState | None = None
        self._last_line: Mapping[str, object] = {}
        self._rows: list[tuple[str, ...]] = []
        self._below: list[str] = []  # HTML below the table: unigram baseline and preview

    # Before training ------------------------------------------------------------------------------------------------

    def message(self, message: str) -> None:
        """Shows a log message as text."""
        print(self._words(message))

    def progress(self, what: str, fraction: float) -> None:
        """Updates the bar of a task, and shows its time at the end."""
        now = time.monotonic()
        if self._task[0] != what:
            self._task, self._next_update, self._handle = (what, now), 0.0, None
        if fraction >= 1.0:
            text = f"{what}  {duration(now - self._task[1])}"
            self._show(escape(text), text)
            self._handle = None
        elif now >= self._next_update:
            self._show(f"{escape(what)} {_bar(fraction)}", f"{what}  {fraction:.0%}")

    def probe(self, fraction: float, seconds: float) -> None:
        """Updates the bar of the probe, and shows its time at the end."""
        self.progress(probe_line(seconds), fraction)

    def estimate(self, estimate: CostEstimate) -> None:
        """Shows size and cost of the run, its stages, and notes."""
        self._handle, self._plan = None, estimate.plan
        rows, stages = estimate_rows(estimate), stage_rows(estimate)
        notes = [f"note: {self._words(note)}" for note in estimate_notes(estimate)]
        html = (
            _table((), rows) + _table(stage_columns(estimate), stages) + "".join(f"<p>{escape(n)}</p>" for n in notes)
        )
        self._show(html, "\n".join([*("  ".join(row) for row in (*rows, *stages)), *notes]))
        self._handle = None

    def sample(self, text: str, tokens: Sequence[TokenView]) -> None:
        """Shows a sample: its tokens, the model input, and "^" below masked tokens."""
        gap, lines = cell_gap(tokens), list[str]()
        for row in cell_rows(tokens, _SAMPLE_WIDTH):
            for name, part in (("tokens", "original"), ("model input", "shown"), ("masked", "mark")):
                lines.append(f"{name:<12} {gap.join(getattr(cell, part) for cell in row)}".rstrip())
        shown = "\n".join(lines)
        self._show(f"one sample, as the model sees it<pre>{escape(shown)}</pre>", shown)
        self._handle = None

    # During training ------------------------------------------------------------------------------------------------

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Shows the table, which has no rows yet."""
        self._plan, self._train_state, self._handle = plan, state, None
        self._pace = Pace(plan, state, flops_per_token, flops_per_second)
        self._update()

    def step(self, state: TrainState) -> None:
        """Updates the bar if enough time has passed."""
        self._train_state = state
        if time.monotonic() >= self._next_update:
            self._update()

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """Keeps the metrics for the next row."""
        self._last_line = metrics

    def validated(self, step: int, validation: Validation, preview: Sequence[PreviewLine]) -> None:
        """Adds a row and replaces the preview."""
        tokens = self._train_state.tokens if self._train_state else 0
        results = (validation.loss, validation.accuracy, validation.bits_per_character)
        loss = number(self._last_line, "loss")
        training = "" if loss != loss else f"{loss:.3f}"
        forms = (f"{results[0]:.3f}", f"{results[1]:.1%}", f"{results[2]:.3f}")
        self._rows.append((f"{step:,}", f"{tokens:,}", training, *forms))
        lines = "<br>".join(_preview_html(line, preview) for line in preview)
        self._below = [f"<p>{escape(unigram_line(validation))}</p>", f"<p>{lines}</p>" if lines else ""]
        self._update()

    def train_end(self, summary: Summary) -> None:
        """Completes the table and shows the results beside the estimate."""
        self._update()
        self._handle = None
        rows = comparison_rows(summary, self._plan)
        text = "\n".join(f"{row.label}  {row.actual}" for row in rows)
        self._show(_table(("", "estimate", "actual"), rows), text)
        self._handle = None

    # Drawing --------------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Shows bar, metrics, table and preview in place of what was shown before."""
        state, plan, pace = self._train_state, self._plan, self._pace
        if state is None or plan is None or pace is None:
            return
        speed = number(self._last_line, "tokens_per_second")
        parts = [f"step {state.step:,}/{plan.steps:,}"]
        if state.step < plan.steps:
            parts.append(f"ETA {duration(pace.seconds_left(state))}")
        if speed == speed:
            parts += [f"loss {number(self._last_line, 'loss'):.3f}", f"{speed:,.0f} tokens/s"]
            parts += [matmul_text(pace.matmul_fraction(speed))]
        line = "  ".join(filter(None, parts))
        html = f"<p>{_bar(state.step / plan.steps)} {escape(line)}</p>"
        html += _table(_COLUMNS, self._rows) + "".join(self._below)
        self._show(html, "\n".join([line, *("  ".join(row) for row in self._rows)]))

    def _show(self, html: str, text: str) -> None:
        """Shows HTML, and text where a program can't show HTML; replaces the output of the last call, if it is open."""
        from IPython.display import display

        content = {"text/html": f"<div>{html}</div>", "text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
        self._next_update = time.monotonic() + _UPDATE_SECONDS


def _bar(fraction: float) -> str:
    return f'<progress value="{fraction:.3f}" max="1" aria-label="progress">{fraction:.0%}</progress>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _preview_html(line: PreviewLine, preview: Sequence[PreviewLine]) -> str:
    """Returns one prompt: correct predictions are green and bold, wrong ones red and underlined."""
    spans: list[str] = []
    for span in line:
        if span.state == "plain":
            spans.append(escape(visible(span.text)))
        elif span.state == "correct":
            spans.append(f'<span style="{_CORRECT}">{escape(visible(span.text))}</span>')
        else:
            spans.append(f'<span style="{_WRONG}">{escape(wrong_text(span.text, span.truth, preview))}</span>')
    return "".join(spans)
