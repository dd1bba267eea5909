"""What a person sees of a run, in a pipe and in a terminal."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from unmask.core.format import count, duration, visible
from unmask.evaluation.validation import Validation
from unmask.training.display import Display, Line, PreviewSpan, Summary, TokenView
from unmask.training.display.live import LiveDisplay
from unmask.training.display.plain import PlainDisplay, SilentDisplay
from unmask.training.display.text import (
    Pace,
    comparison_rows,
    forecast_notes,
    forecast_rows,
    share_of_matmul,
    slot_rows,
    stage_rows,
    unigram_line,
)
from unmask.training.estimate import CostEstimate
from unmask.training.loop import TrainState
from unmask.training.plan import Plan, StagePlan
from unmask.training.pretrain import for_stream

PLAN = Plan((StagePlan(64, 4096, 0, 300, 0.02), StagePlan(128, 4096, 300, 200, 0.03)), 0.1, 0.1, 2.0)
FORECAST = CostEstimate(
    "tiny", 1_482_240, 9.2e6, 312, 1_200_000, PLAN, (60.8, 2.2), {"notes.txt": 63.0}, 1.6e11, 420_000_000, 38_000_000,
    "cpu", "bfloat16", 2, "muon",
)  # fmt: skip
LETTERS: list[Line] = [
    (
        PreviewSpan("We are acc"),
        PreviewSpan("o", "right", "o"),
        PreviewSpan("u"),
        PreviewSpan("x", "wrong", "n"),
        PreviewSpan("ted\npoor"),
    )
]
WORDS: list[Line] = [
    (
        PreviewSpan("The "),
        PreviewSpan("cat", "right", "cat"),
        PreviewSpan(" sat on "),
        PreviewSpan("dog", "wrong", "the"),
    )
]
SLOTS = [
    TokenView("[CLS]", "[CLS]", False),
    TokenView("the", "[MASK]", True),
    TokenView("cat", "horse", True),
    TokenView("sat", "sat", True),
    TokenView("down", "down", False),
]


def validation(loss: float) -> Validation:
    return Validation(loss, 0.3, 1.99, 3.31, 128, {64: 3.5})


def run(display: Display, panel: list[Line]) -> None:
    """A run as pretrain tells it."""
    for share in (0.0, 0.4, 1.0):
        display.progress("reading the text", share)
    display.message("a document is what stands between blank lines")
    display.forecast(FORECAST)
    display.text("the cat sat down", SLOTS)
    state = TrainState()
    display.train_start(PLAN, state, 9.2e6, 1.6e11)
    for step in range(1, PLAN.steps + 1):
        state.step, state.tokens, state.seconds = step, step * 4096, step * 0.04
        state.window.add({"loss": (1800.0, 600), "accuracy": (200.0, 600)})
        state.window.tokens += 4096
        state.window.seconds += 0.04
        display.step(state)
        if step % 100 == 0:
            metrics = {"tokens": state.tokens, "seconds": state.seconds, "loss": 4 - step / 200, "accuracy": 0.3}
            display.logged(step, {**metrics, "tokens_per_second": 8000.0, "learning_rate": 1e-3})
            state.window = type(state.window)()
    display.validated(PLAN.steps, validation(2.4), panel)
    display.saved(Path("runs/x/step-0000500"))
    display.train_end(Summary(Path("runs/x"), 500, 2_048_000, 20.0, 14.0, 18.0, 8000.0, validation(2.4)))
    display.close()


def test_how_often_the_text_is_seen_is_told_in_all_by_stage_and_by_text() -> None:
    assert [row[4] for row in stage_rows(FORECAST)] == ["61 times", "2.2 times"]
    assert ("text", "312 documents, 1.2M tokens, which will be seen 63 times") in forecast_rows(FORECAST)
    (warned,) = forecast_notes(FORECAST)
    assert "by heart" in warned and "early_stopping_patience" in warned
    fits = replace(FORECAST, epochs=(1.0, 2.2), texts_seen={"notes.txt": 3.2})
    assert forecast_notes(fits) == []
    two = replace(FORECAST, epochs=(1.0, 0.5), texts_seen={"notes.txt": 3.2, "wiki": 0.4})
    told, unread = forecast_notes(two)
    assert told == "of the texts, notes.txt will be seen 3.2 times, wiki will be seen 0.4 times" and "unread" in unread


def test_a_run_that_may_end_early_says_what_that_means_for_its_rates() -> None:
    early = replace(FORECAST, epochs=(1.0, 2.2), texts_seen={}, patience=3, decay="over the last 40% of the plan")
    assert (
        "after 3 validations without gain: maybe before the rates come down over the last" in forecast_notes(early)[0]
    )


def test_the_summary_names_the_best_step_and_why_it_ended_early() -> None:
    summary = Summary(
        Path("r"), 300, 1_228_800, 20.0, 14.0, 18.0, 8000.0, validation(2.5), 200, 2.4, "3 validations w.g."
    )
    rows = {row.label: row.fact for row in comparison_rows(summary, PLAN)}
    assert rows["best validation loss"] == "2.400 at step 200" and rows["ended early"] == "3 validations w.g."
    whole = {row.label for row in comparison_rows(replace(summary, best_step=300, early=""), PLAN)}
    assert not whole & {"best validation loss", "ended early"}


def plain(panel: list[Line]) -> str:
    stream = io.StringIO()
    run(PlainDisplay(stream), panel)
    return stream.getvalue()


def terminal(panel: list[Line], width: int = 80, **settings: object) -> str:
    stream = io.StringIO()
    options = {"color_system": "truecolor", "force_terminal": True, **settings}
    run(LiveDisplay(Console(file=stream, width=width, height=30, **options)), panel)
    return stream.getvalue()


def test_a_pipe_gets_lines_without_escape_codes() -> None:
    text = plain(LETTERS)
    assert "\x1b" not in text and "\r" not in text
    line = next(line for line in text.splitlines() if line.startswith("step 100/500"))
    # 9.2 MFLOPs × 8,000 tokens/s ÷ 160 GFLOP/s = 46 %. Of the planned 14 s these steps were to take 2.4 and took 4.0,
    # so the other 11.6 will take 19.3.
    for part in ("20%", "loss 3.500", "accuracy 30.0%", "8,000 tokens/s", "46% of matmul rate", "lr 1.00e-03"):
        assert part in line
    assert line.endswith("4.0 s gone  19 s left")
    assert text.count("reading the text") == 2, "a short preparation says that it began and that it ended"
    assert "unigram 3.31: the plateau; 0.9 nats under it" in text
    assert "forecast 14 s" in text


def test_guesses_are_told_apart_without_colour() -> None:
    assert "We are acc[o]u{x}ted⏎poor" in plain(LETTERS)
    assert "The [cat] sat on {dog→the}" in plain(WORDS)
    bare = terminal(WORDS, color_system=None)
    assert "The [cat] sat on {dog→the}" in bare


def test_without_colour_underline_and_reverse_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = terminal(LETTERS)
    assert "\x1b[1;4;32mo\x1b[0m" in coloured and "\x1b[7;31mx\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    colourless = terminal(LETTERS)
    assert "\x1b[1;4mo\x1b[0m" in colourless and "\x1b[7mx\x1b[0m" in colourless


@pytest.mark.parametrize("panel", [LETTERS, WORDS], ids=["letters", "words"])
def test_a_terminal_of_eighty_columns_holds_every_line(panel: list[Line]) -> None:
    text = terminal(panel, color_system=None)
    printed = [line for part in text.split("\n") for line in part.split("\x1b[2K")[-1:]]
    assert all(len(line.replace("\x1b[?25h", "").replace("\x1b[?25l", "").lstrip("\r")) <= 80 for line in printed)
    for part in ("1,482,240 parameters", "seen 63 times", "by heart", "500 steps, 2.05M tokens", "fact", "[MASK]"):
        assert part in text


def test_the_cursor_comes_back() -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, width=80, height=30, force_terminal=True, color_system="truecolor"))
    display.train_start(PLAN, TrainState(), 9.2e6, 1.6e11)
    assert stream.getvalue().count("\x1b[?25l") == 1
    display.close()
    display.close()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_between_redraws_a_step_costs_next_to_nothing() -> None:
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True, color_system="truecolor")
    display = LiveDisplay(console)
    state = TrainState()
    display.train_start(PLAN, state, 9.2e6, 1.6e11)
    drawn = 0
    for _ in range(2000):
        before = console.file.tell()
        display.step(state)
        drawn += console.file.tell() > before
    display.close()
    # A redraw is followed by a pause of an eighth of a second at least, and 2,000 steps take a few milliseconds.
    assert drawn <= 8


@pytest.mark.parametrize(
    ("loss", "said"),
    [(2.4, "0.9 nats under it"), (3.25, "0.06 nats under it"), (3.31, "still above it"), (3.6, "still above it")],
)
def test_the_unigram_line_says_where_the_plateau_ends(loss: float, said: str) -> None:
    assert said in unigram_line(validation(loss))


def test_what_is_left_follows_the_plan_and_the_pace() -> None:
    pace = Pace(PLAN, TrainState(step=100, seconds=10.0), 9.2e6, 1.6e11)
    # Steps 100 to 200 were planned to take 2.4 s and took 4.8; what remains of the plan, 9.6 s, takes twice as long.
    assert pace.seconds_left(TrainState(step=200, seconds=14.8)) == pytest.approx(2 * (14 - 2 * 2.4))
    assert pace.seconds_left(TrainState(step=500, seconds=30.0)) == 0
    unmeasured = Plan((StagePlan(64, 100, 0, 10, 0.0),))
    assert Pace(unmeasured, TrainState(), 1, 0).seconds_left(TrainState(step=5, seconds=3.0)) == pytest.approx(3.0)
    assert share_of_matmul(Pace(unmeasured, TrainState(), 1, 0).share_of_matmul(5.0)) == ""


def test_one_text_is_laid_out_slot_under_slot() -> None:
    rows = slot_rows(SLOTS, 20)
    assert [[slot.piece for slot in row] for row in rows] == [["[CLS]", "the   ", "cat  "], ["sat", "down"]]
    assert [slot.state for row in rows for slot in row] == ["plain", "hidden", "random", "kept", "plain"]
    assert rows[0][1].shown == "[MASK]" and rows[0][1].mark == "^^^^^^"
    letters = [TokenView("a", "[MASK]", True), TokenView("\n", "\n", False), TokenView("字", "b", True)]
    assert [(slot.piece, slot.shown) for slot in slot_rows(letters, 80)[0]] == [
        ("a", "_"), ("⏎", "⏎"), ("字", "b "),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3599.6, "1 h"), (86399, "1 d 0 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
    assert duration(float("nan")) == "?"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (812, "812"),
        (9999, "9,999"),
        (64_123, "64.1k"),
        (999_999, "1M"),
        (10_000, "10k"),
        (4e12, "4,000B"),
        (1_482_240, "1.48M"),
        (2e9, "2B"),
    ],
)
def test_counts(number: float, said: str) -> None:
    assert count(number) == said


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in visible("a\x1b[31mred\x07\n\t")
    assert "\x1b" not in plain([(PreviewSpan("a\x1b[2J"), PreviewSpan("\x1b", "wrong", "b"))])


def test_a_long_preparation_says_so_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    display = PlainDisplay(stream)
    for tenth in range(200):
        clock[0] = tenth / 10
        display.progress("reading the text", tenth / 200)
    display.progress("reading the text", 1.0)
    display.progress("reading the text", 1.0)
    assert stream.getvalue().splitlines()[0] == "reading the text  0%"
    assert len(stream.getvalue().splitlines()) == 5


def test_a_run_goes_on_where_nobody_reads() -> None:
    class Closed(io.StringIO):
        def write(self, text: str, /) -> int:
            raise BrokenPipeError

    run(PlainDisplay(Closed()), LETTERS)


def test_a_stream_that_cannot_hold_a_letter_gets_another() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    run(PlainDisplay(stream), LETTERS)
    assert b"We are acc[o]u{x}ted?poor" in raw.getvalue()


def test_the_stream_decides() -> None:
    assert isinstance(for_stream(io.StringIO()), PlainDisplay)
    assert isinstance(for_stream(io.StringIO(), quiet=True), SilentDisplay)
    run(for_stream(io.StringIO(), quiet=True), LETTERS)


def test_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(for_stream(Terminal()), LiveDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(for_stream(Terminal()), PlainDisplay)
