"""A display for a terminal: tables, and a preview and progress bar that are redrawn in place.

Correct predictions are green and wrong ones red. Without colors (NO_COLOR), brackets mark them, as in plain.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, final

from rich.cells import cell_len
from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.measure import Measurement
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from unmask.core.format import duration, number, sparkline, visible
from unmask.evaluation.validation import Validation
from unmask.training.display import Display, PreviewLine, Summary, TokenView
from unmask.training.display.notebook import NotebookDisplay
from unmask.training.display.plain import PlainDisplay, legend, preview_lines
from unmask.training.display.text import (
    Pace,
    cell_gap,
    cell_rows,
    comparison_rows,
    estimate_notes,
    estimate_rows,
    matmul_text,
    objective_line,
    pair_line,
    pair_text,
    probe_line,
    set_lines,
    stage_columns,
    stage_line,
    stage_rows,
    unigram_line,
    validation_line,
    wrong_text,
)
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan

_CORRECT, _WRONG = "bold green underline", "red reverse"
_CELL_STYLES = {"plain": "", "mask": "bold yellow reverse", "random": "bold magenta reverse", "kept": "underline"}
_UPDATE_SECONDS = 0.125
# A redraw takes 1 to 3 ms. The next one waits at least 300 times as long, so drawing takes less than 0.35 % of a run.
_WAIT_FACTOR = 300
_BAR_WIDTH, _SHORTEST_BAR = 30, 4


@final
class LiveDisplay(Display):
    """Prints tables before and after training, and redraws a preview and a progress bar in between."""

    def __init__(self, console: Console | None = None, words: Callable[[str], str] = str) -> None:
        """Prints to a console; `words` changes messages and notes, such as options to keywords."""
        self._console = Console(highlight=False) if console is None else console
        self._words = words
        has_colors = self._console.color_system is not None and not self._console.no_color
        self._styled = has_colors
        self._live: Live | None = None
        self._drawn: tuple[Text | Group, int] | None = None  # what is on the screen, and the width it was drawn for
        self._next_update = 0.0
        self._task: tuple[str, float] | None = None  # a task before training, and when it started
        self._plan: Plan | None = None
        self._pace: Pace | None = None
        self._train_state: TrainState | None = None
        self._preview: list[Text] = []
        self._losses: list[float] = []
        self._last_line: Mapping[str, object] = {}

    # Before training ------------------------------------------------------------------------------------------------

    def message(self, message: str) -> None:
        """Prints a log message above the bar."""
        self._print(Text(self._words(message)))

    def progress(self, what: str, fraction: float) -> None:
        """Draws a bar while a task runs, and prints a line with its time at the end."""
        now = time.monotonic()
        if self._task is None or self._task[0] != what:
            self._task = (what, now)
            self._next_update = 0.0
        if fraction >= 1.0:
            started = self._task[1]
            self._end_task()
            self._print(Text.assemble((what, "dim"), (f"  {duration(now - started)}", "dim")))
        elif now >= self._next_update:
            columns = self._console.width - cell_len(what) - 8  # spaces and percentage
            self._draw(Text.assemble(f"{what}  ", *self._bar(fraction, columns), f"  {fraction:.0%}"), now)

    def probe(self, fraction: float, seconds: float) -> None:
        """Draws a bar while the probe runs, and prints a line with its time at the end."""
        self.progress(probe_line(seconds), fraction)

    def estimate(self, estimate: CostEstimate) -> None:
        """Prints size and cost of the run, its stages, and notes."""
        self._end_task()
        self._plan = estimate.plan
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in estimate_rows(estimate):
            grid.add_row(label, Text(value))
        self._print(Text("\nestimate", "bold"), grid, Text(""), self._stages(estimate))
        notes = estimate_notes(estimate)
        if notes:
            self._print(Text(""), *(Text(f"note: {self._words(note)}", "yellow") for note in notes))

    def _stages(self, estimate: CostEstimate) -> Table | Text:
        """Returns the stages as a table or, if it is wider than the terminal, in words."""
        rows = stage_rows(estimate)
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in stage_columns(estimate):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        unlimited = self._console.options.update(max_width=1000)
        if Measurement.get(self._console, unlimited, table).maximum <= self._console.width:
            return table
        return Text("\n".join(map(stage_line, rows)))

    def sample(self, text: str, tokens: Sequence[TokenView]) -> None:
        """Prints a sample: its tokens, the model input, and "^" below masked tokens."""
        self._end_task()
        gap = cell_gap(tokens)
        line = Text(visible(text), "dim")
        line.truncate(2 * self._console.width, overflow="ellipsis")
        self._print(Text("\none sample, as the model sees it", "bold"), line)
        for row in cell_rows(tokens, self._console.width - 14):
            shown = [Text(cell.shown, _CELL_STYLES[cell.state]) for cell in row]
            self._print(
                Text("tokens        ", "dim").append_text(Text(gap.join(cell.original for cell in row), "none")),
                Text("model input   ", "dim").append_text(Text(gap).join(shown)),
                Text("masked        ", "dim").append_text(Text(gap.join(cell.mark for cell in row), "yellow")),
            )
        self._print(Text(""))

    # During training ------------------------------------------------------------------------------------------------

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Draws the bar."""
        self._end_task()
        self._plan = plan
        self._pace = Pace(plan, state, flops_per_token, flops_per_second)
        self._train_state = state
        self._redraw()

    def step(self, state: TrainState) -> None:
        """Redraws the bar if enough time has passed."""
        self._train_state = state
        if time.monotonic() >= self._next_update:
            self._redraw()

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """Keeps the metrics for the bar and the loss curve."""
        self._last_line = metrics
        self._losses.append(number(metrics, "loss"))

    def validated(self, step: int, validation: Validation, preview: Sequence[PreviewLine]) -> None:
        """Prints the results above the bar and redraws the preview."""
        self._print(Text.assemble((f"step {step:,}  ", "bold"), f"validation {validation_line(validation)}"))
        if validation.pair is not None:
            self._print(Text(f"  {pair_line(validation.pair)}"))
        if line := objective_line(validation):
            self._print(Text(f"  {line}"))
        self._print(*(Text(f"  {line}") for line in set_lines(validation)))
        self._preview = [Text(""), Text(unigram_line(validation), "cyan"), *self._preview_texts(preview), Text("")]
        self._redraw()

    def saved(self, folder: Path) -> None:
        """Prints the path of the step folder."""
        self._print(Text(f"saved {folder}", "dim"))

    def train_end(self, summary: Summary) -> None:
        """Leaves the last preview on the screen and prints the results beside the estimate."""
        self._redraw()
        self._end_live(keep=True)
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("")
        table.add_column("estimate", justify="right")
        table.add_column("actual", justify="right", style="bold")
        for row in comparison_rows(summary, self._plan):
            table.add_row(*row)
        self._print(Text(""), table)

    def close(self) -> None:
        """Stops redrawing and shows the cursor again."""
        self._end_live(keep=self._task is None)

    # Drawing --------------------------------------------------------------------------------------------------------

    def _bars(self, state: TrainState, plan: Plan, pace: Pace) -> list[Text]:
        """Returns the line of the bar and the line of metrics."""
        fraction = state.step / plan.steps
        texts = [f"{fraction:>4.0%} ", f" step {state.step:,}/{plan.steps:,}"]
        eta = f"  ETA {duration(pace.seconds_left(state))}"
        columns = self._console.width - cell_len("".join((*texts, eta)))
        texts[1] += eta if columns >= _SHORTEST_BAR else ""  # in a terminal of less than about 40 columns
        columns = self._console.width - cell_len("".join(texts))
        bar = Text.assemble(texts[0], *self._bar(fraction, columns), texts[1], no_wrap=True)
        window, line = state.metrics, self._last_line
        # Just after a log line, the window has few tokens and noisy means: show the log line until it has more.
        filled = not line or window.tokens * 20 >= number(line, "tokens") / max(len(self._losses), 1)
        filled = filled and window.seconds > 0
        loss = window.mean("loss") if filled else number(line, "loss")
        accuracy = window.mean("accuracy") if filled else number(line, "accuracy")
        speed = window.tokens / window.seconds if filled else number(line, "tokens_per_second")
        if math.isnan(loss):
            return [bar]
        parts = [f"loss {loss:.3f}", f"accuracy {accuracy:.1%}", pair_text(line), f"{speed:,.0f} tokens/s"]
        parts.append(matmul_text(pace.matmul_fraction(speed)))
        metrics = "     "
        for part in filter(None, parts):  # those that fit
            if cell_len(metrics + part) <= self._console.width:
                metrics += f"{part}  "
        columns = min(20, self._console.width - len(metrics))
        curve = "" if self._ascii or columns < 2 else sparkline(self._losses, columns)
        return [bar, Text.assemble(metrics, (curve, "cyan"), no_wrap=True, overflow="crop")]

    def _bar(self, fraction: float, columns: int = _BAR_WIDTH) -> list[tuple[str, str]]:
        """Returns a bar of at most `columns` columns; none if they are too few."""
        done, rest = ("=", "-") if self._ascii else ("━", "─")
        width = min(_BAR_WIDTH, columns)
        if width < _SHORTEST_BAR:
            return []
        filled = min(width, int(fraction * width + 1e-9))
        return [(done * filled, "green"), (rest * (width - filled), "dim")]

    @property
    def _ascii(self) -> bool:
        return not self._console.encoding.lower().startswith("utf")

    def _preview_texts(self, preview: Sequence[PreviewLine]) -> list[Text]:
        """Returns the preview, wrapped to the console's width and cut so that the bar fits below."""
        if not preview:
            return []
        if self._styled:
            texts = [Text(overflow="fold") for _ in preview]
            for text, line in zip(texts, preview, strict=True):
                for span in line:
                    if span.state == "wrong":
                        text.append(wrong_text(span.text, span.truth, preview), _WRONG)
                    else:
                        text.append(visible(span.text), _CORRECT if span.state == "correct" else "")
            key = Text.assemble(("correct", _CORRECT), " ", (wrong_text("wrong", "truth", preview), _WRONG))
        else:
            texts = [Text(line, overflow="fold") for line in preview_lines(preview)]
            key = Text(legend(preview))
        lines = [part for text in texts for part in text.wrap(self._console, self._console.width)]
        limit = max(1, self._console.height - 8)
        return [*(lines if len(lines) <= limit else [*lines[: limit - 1], Text("…")]), key]

    def _redraw(self) -> None:
        if self._train_state is not None and self._plan is not None and self._pace is not None:
            bars = self._bars(self._train_state, self._plan, self._pace)
            self._draw(Group(*self._preview, *bars), time.monotonic())

    def _draw(self, region: Text | Group, now: float) -> None:
        """Draws the region at the bottom, and sets the time of the next update."""
        self._follow_resize()
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        self._live.update(region, refresh=True)
        self._drawn = (region, self._console.width)
        spent = time.monotonic() - now
        self._next_update = now + max(_UPDATE_SECONDS, _WAIT_FACTOR * spent)

    def _follow_resize(self) -> None:
        """Erases the rows that the region gained when a terminal became narrower and wrapped its lines.

        Rich erases as many rows as it drew, so the others would remain on the screen.
        """
        width = self._console.width
        if self._live is None or self._drawn is None or width >= self._drawn[1]:
            return
        region, drawn_width = self._drawn
        options = self._console.options.update(width=drawn_width)
        lines = self._console.render_lines(region, options, pad=False)
        extra = sum(max(0, -(-Segment.get_line_length(line) // width) - 1) for line in lines)
        self._console.control(Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * extra))
        self._drawn = (region, width)

    def _print(self, *renderables: Text | Table) -> None:
        self._follow_resize()
        for renderable in renderables:
            self._console.print(renderable, highlight=False)

    def _end_task(self) -> None:
        if self._task is not None:
            self._task = None
            self._end_live(keep=False)

    def _end_live(self, *, keep: bool) -> None:
        if self._live is not None:
            self._live.transient = not keep
            self._live.stop()
            self._live = None


def display_for(stream: TextIO, quiet: bool = False, words: Callable[[str], str] = str) -> Display:
    """Return the display that fits a stream: live in a terminal, a table in a notebook, else plain lines.

    `words` changes messages and notes, such as options of the command line to keywords.
    """
    if quiet:
        return Display()
    console = Console(file=stream)
    if console.is_jupyter:
        return NotebookDisplay(words)
    in_terminal = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console, words) if in_terminal else PlainDisplay(stream, words)
