"""Room card: a run seen in a terminal or a notebook.

Comes in: what the run tells. Goes out: tables, one text as the model sees it, and a region at the bottom that is
redrawn in place: the panel, whose letters become right, and a bar. Called by: pretrain, through the Display protocol.

Right and wrong are told apart by underline and reverse, which NO_COLOR leaves; where a terminal has not even those, by
the brackets of plain.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from unmask.core.format import duration, number, sparkline, visible
from unmask.evaluation.validation import Validation
from unmask.training.display import Line, Summary, TokenView
from unmask.training.display.plain import legend, panel_lines
from unmask.training.display.text import (
    STAGE_COLUMNS,
    Pace,
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

_RIGHT, _WRONG = "bold green underline", "red reverse"
_SLOT_STYLES = {"plain": "", "hidden": "bold yellow reverse", "random": "bold magenta reverse", "kept": "underline"}
_UPDATE_SECONDS = 0.125
# A redraw costs 1 to 3 ms. Waiting 300 times as long before the next keeps the bar under 0.35 % of the run anywhere.
_PATIENCE = 300
_BAR = 30


@final
class LiveDisplay:
    """Tables before and after, a panel and a bar redrawn in place between."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(highlight=False) if console is None else console
        self._styled = self._console.color_system is not None or self._console.is_jupyter
        self._live: Live | None = None
        self._next_update = 0.0
        self._preparing: tuple[str, float] | None = None  # what, and when it began
        self._plan: Plan | None = None
        self._pace: Pace | None = None
        self._standing: TrainState | None = None
        self._panel: list[Text] = []
        self._losses: list[float] = []
        self._last_line: Mapping[str, object] = {}

    # Before training ------------------------------------------------------------------------------------------------

    def message(self, message: str) -> None:
        """One sentence, above the bar."""
        self._print(Text(message))

    def progress(self, what: str, share: float) -> None:
        """A bar while it lasts, a line with its time when it is done."""
        now = time.monotonic()
        if self._preparing is None or self._preparing[0] != what:
            self._preparing = (what, now)
            self._next_update = 0.0
        if share >= 1.0:
            began = self._preparing[1]
            self._end_preparing()
            self._print(Text.assemble((what, "dim"), (f"  {duration(now - began)}", "dim")))
        elif now >= self._next_update:
            self._draw(Text.assemble(f"{what}  ", *self._bar(share), f"  {share:.0%}"), now)

    def forecast(self, forecast: CostEstimate) -> None:
        """What the run will be and cost."""
        self._end_preparing()
        self._plan = forecast.plan
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, value in forecast_rows(forecast):
            grid.add_row(label, Text(value))
        stages = Table(box=None, padding=(0, 2), header_style="dim")
        for column in STAGE_COLUMNS:
            stages.add_column(column, justify="right")
        for row in stage_rows(forecast):
            stages.add_row(*row)
        self._print(Text("\nforecast", "bold"), grid, Text(""), stages)
        notes = forecast_notes(forecast)
        if notes:
            self._print(Text(""), *(Text(f"note: {note}", "yellow") for note in notes))

    def text(self, text: str, slots: Sequence[TokenView]) -> None:
        """One text: its pieces, what the model sees in their place, what it is asked (^)."""
        self._end_preparing()
        gap = slot_gap(slots)
        whole = Text(visible(text), "dim")
        whole.truncate(2 * self._console.width, overflow="ellipsis")
        self._print(Text("\none text, as the model sees it", "bold"), whole)
        joint = Text(gap)
        for row in slot_rows(slots, self._console.width - 14):
            shown = [Text(slot.shown, _SLOT_STYLES[slot.state]) for slot in row]
            self._print(
                Text("pieces        ", "dim").append_text(Text(gap.join(slot.piece for slot in row), "none")),
                Text("model sees    ", "dim").append_text(joint.join(shown)),
                Text("asked         ", "dim").append_text(Text(gap.join(slot.mark for slot in row), "yellow")),
            )
        self._print(Text(""))

    # While training -------------------------------------------------------------------------------------------------

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """The bar appears."""
        self._end_preparing()
        self._plan = plan
        self._pace = Pace(plan, state, flops_per_token, flops_per_second)
        self._standing = state
        self._redraw()

    def step(self, state: TrainState) -> None:
        """Redraw the bar where it is time to; else one look at the clock."""
        self._standing = state
        if time.monotonic() >= self._next_update:
            self._redraw()

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """Remembered for the bar and its small curve."""
        self._last_line = metrics
        self._losses.append(number(metrics, "loss"))

    def validated(self, step: int, validation: Validation, panel: Sequence[Line]) -> None:
        """A line that stays above, and the panel in its place."""
        self._print(Text.assemble((f"step {step:,}  ", "bold"), validation_line(validation)))
        if validation.pair is not None:
            self._print(Text(f"  {pair_line(validation.pair)}"))
        self._print(*(Text(f"  {line}") for line in set_lines(validation)))
        self._panel = [Text(""), Text(unigram_line(validation), "cyan"), *self._painted(panel), Text("")]
        self._redraw()

    def saved(self, folder: Path) -> None:
        """Where the step folder is."""
        self._print(Text(f"saved {folder}", "dim"))

    def train_end(self, summary: Summary) -> None:
        """The panel as it was last, and forecast against fact."""
        self._redraw()
        self._end_live(keep=True)
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("")
        table.add_column("forecast", justify="right")
        table.add_column("fact", justify="right", style="bold")
        for row in comparison_rows(summary, self._plan):
            table.add_row(*row)
        self._print(Text(""), table)

    def close(self) -> None:
        """Stop redrawing and show the cursor again."""
        self._end_live(keep=self._preparing is None)

    # Drawing --------------------------------------------------------------------------------------------------------

    def _bars(self, state: TrainState, plan: Plan, pace: Pace) -> list[Text]:
        """The bar's line and the line of measurements."""
        share = state.step / plan.steps
        left = duration(pace.seconds_left(state))
        bar = Text.assemble(
            f"{share:>4.0%} ", *self._bar(share), f" step {state.step:,}/{plan.steps:,}  {left} left", no_wrap=True
        )
        window, line = state.window, self._last_line
        # Just after a log line the window is nearly empty and would flicker: until it has filled, the line counts.
        fresh = not line or window.tokens * 20 >= number(line, "tokens") / max(len(self._losses), 1)
        fresh = fresh and window.seconds > 0
        loss = window.mean("loss") if fresh else number(line, "loss")
        accuracy = window.mean("accuracy") if fresh else number(line, "accuracy")
        speed = window.tokens / window.seconds if fresh else number(line, "tokens_per_second")
        if loss != loss:
            return [bar]
        words = [f"loss {loss:.3f}", f"accuracy {accuracy:.1%}", pair_words(line), f"{speed:,.0f} tokens/s"]
        words.append(share_of_matmul(pace.share_of_matmul(speed)))
        measured = "     " + "  ".join(filter(None, words)) + "  "
        room = min(20, self._console.width - len(measured))
        curve = "" if self._ascii or room < 2 else sparkline(self._losses, room)
        return [bar, Text.assemble(measured, (curve, "cyan"), no_wrap=True, overflow="crop")]

    def _bar(self, share: float) -> list[tuple[str, str]]:
        done, rest = ("=", "-") if self._ascii else ("━", "─")
        full = min(_BAR, int(share * _BAR + 1e-9))
        return [(done * full, "green"), (rest * (_BAR - full), "dim")]

    @property
    def _ascii(self) -> bool:
        return not self._console.encoding.lower().startswith("utf")

    def _painted(self, panel: Sequence[Line]) -> list[Text]:
        """The panel as lines of this width, as many as leave room for the bar."""
        if not panel:
            return []
        if self._styled:
            painted = [Text(overflow="fold") for _ in panel]
            for text, line in zip(painted, panel, strict=True):
                for cell in line:
                    if cell.state == "wrong":
                        text.append(wrong_text(cell.text, cell.truth, panel), _WRONG)
                    else:
                        text.append(visible(cell.text), _RIGHT if cell.state == "right" else "")
            key = Text.assemble(("right", _RIGHT), " ", (wrong_text("guess", "truth", panel), _WRONG))
        else:
            painted = [Text(line, overflow="fold") for line in panel_lines(panel)]
            key = Text(legend(panel))
        lines = [part for text in painted for part in text.wrap(self._console, self._console.width)]
        room = max(1, self._console.height - 8)
        return [*(lines if len(lines) <= room else [*lines[: room - 1], Text("…")]), key]

    def _redraw(self) -> None:
        if self._standing is not None and self._plan is not None and self._pace is not None:
            bars = self._bars(self._standing, self._plan, self._pace)
            self._draw(Group(*self._panel, *bars), time.monotonic())

    def _draw(self, region: Text | Group, now: float) -> None:
        """Put this at the bottom, and say when the next may come."""
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        self._live.update(region, refresh=True)
        spent = time.monotonic() - now
        self._next_update = now + max(_UPDATE_SECONDS, _PATIENCE * spent)

    def _print(self, *what: Text | Table) -> None:
        for one in what:
            self._console.print(one, highlight=False)

    def _end_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing = None
            self._end_live(keep=False)

    def _end_live(self, *, keep: bool) -> None:
        if self._live is not None:
            self._live.transient = not keep
            self._live.stop()
            self._live = None
