"""The output of a run in a pipe and in a terminal."""

from __future__ import annotations

import io
import logging
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from unmask.core.format import count, duration, visible
from unmask.evaluation.validation import Validation
from unmask.objectives.mlm import MaskedLMConfig
from unmask.training.display import Display, PreviewLine, PreviewSpan, Summary, TokenView, show_log
from unmask.training.display.live import LiveDisplay, display_for
from unmask.training.display.plain import PlainDisplay
from unmask.training.display.text import (
    Pace,
    cell_rows,
    comparison_rows,
    estimate_notes,
    estimate_rows,
    matmul_text,
    stage_columns,
    stage_rows,
    unigram_line,
)
from unmask.training.estimate import CostEstimate, describe_objectives
from unmask.training.loop import TrainState
from unmask.training.plan import Plan, StagePlan
from unmask.training.recipe import load_recipe

PLAN = Plan((StagePlan(64, 4096, 0, 300, 0.02), StagePlan(128, 4096, 300, 200, 0.03)), 0.1, 0.1, 2.0)
ESTIMATE = CostEstimate(
    "tiny", 1_482_240, 9.2e6, 312, 1_200_000, PLAN, (60.8, 2.2), {"notes.txt": 63.0}, 1.6e11, 420_000_000, 38_000_000,
    "cpu", "bfloat16", 2, "muon",
)  # fmt: skip
LETTERS: list[PreviewLine] = [
    (
        PreviewSpan("We are acc"),
        PreviewSpan("o", "correct", "o"),
        PreviewSpan("u"),
        PreviewSpan("x", "wrong", "n"),
        PreviewSpan("ted\npoor"),
    )
]
WORDS: list[PreviewLine] = [
    (
        PreviewSpan("The "),
        PreviewSpan("cat", "correct", "cat"),
        PreviewSpan(" sat on "),
        PreviewSpan("dog", "wrong", "the"),
    )
]
TOKENS = [
    TokenView("[CLS]", "[CLS]", False),
    TokenView("the", "[MASK]", True),
    TokenView("cat", "horse", True),
    TokenView("sat", "sat", True),
    TokenView("down", "down", False),
]


def validation(loss: float) -> Validation:
    return Validation(loss, 0.3, 1.99, 3.31, masked_tokens=1000, length=128, unknown_share=0.0, earlier={64: 3.5})


def run(display: Display, preview: list[PreviewLine]) -> None:
    """Calls a display as pretrain does."""
    for fraction in (0.0, 0.4, 1.0):
        display.progress("reading the text", fraction)
    for fraction in (0.0, 0.5, 1.0):
        display.probe(fraction, 4.0)
    display.message("documents are separated by blank lines")
    display.estimate(ESTIMATE)
    display.sample("the cat sat down", TOKENS)
    state = TrainState()
    display.train_start(PLAN, state, 9.2e6, 1.6e11)
    for step in range(1, PLAN.steps + 1):
        state.step, state.tokens, state.seconds = step, step * 4096, step * 0.04
        state.metrics.add({"loss": (1800.0, 600), "accuracy": (200.0, 600)})
        state.metrics.tokens += 4096
        state.metrics.seconds += 0.04
        display.step(state)
        if step % 100 == 0:
            metrics = {"tokens": state.tokens, "seconds": state.seconds, "loss": 4 - step / 200, "accuracy": 0.3}
            display.logged(step, {**metrics, "tokens_per_second": 8000.0, "learning_rate": 1e-3})
            state.pop_metrics()
    display.validated(PLAN.steps, validation(2.4), preview)
    display.saved(Path("runs/x/step-0000500"))
    display.train_end(Summary(Path("runs/x"), 500, 2_048_000, 20.0, 14.0, 18.0, 8000.0, validation(2.4)))
    display.close()


def test_objectives_are_a_column_where_stages_differ() -> None:
    recipe = load_recipe("tiny-causal-first")
    first, *_, last = recipe.stage
    same_kind = replace(recipe, stage=(replace(first, objective=MaskedLMConfig(mask_rate=0.2)), last))
    assert describe_objectives(same_kind) == ("mlm, mask_rate 0.2", f"mlm, mask_rate {recipe.objective.mask_rate}")
    assert describe_objectives(load_recipe("tiny")) == ()
    out = io.StringIO()
    LiveDisplay(Console(file=out, width=100)).estimate(replace(ESTIMATE, objectives=describe_objectives(recipe)[:2]))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert [row[-1] for row in rows if row[:1] in (["stage"], ["1"], ["2"])] == ["objective", "causal", "mlm"]
    assert "objective" not in stage_columns(ESTIMATE)


def test_epochs_are_shown_in_total_by_stage_and_by_text() -> None:
    assert [row[4] for row in stage_rows(ESTIMATE)] == ["61", "2.2"]
    assert ("data", "312 documents, 1.2M tokens, 63 epochs") in estimate_rows(ESTIMATE)
    (warning,) = estimate_notes(ESTIMATE)
    assert "63 epochs over the same text" in warning and "early_stopping_patience" in warning
    assert "dropout" not in warning, "the model has it already"
    (warning,) = estimate_notes(replace(ESTIMATE, dropout_off=("model.hidden_dropout",)))
    assert "or use dropout (--set model.hidden_dropout=0.1);" in warning
    fits = replace(ESTIMATE, epochs=(1.0, 2.2), texts_seen={"notes.txt": 3.2})
    assert estimate_notes(fits) == []
    two = replace(ESTIMATE, epochs=(1.0, 0.5), texts_seen={"notes.txt": 3.2, "wiki": 0.4})
    by_text, unused = estimate_notes(two)
    assert by_text == "epochs by text: notes.txt 3.2 epochs, wiki 0.4 epochs" and "is not used" in unused
    once = replace(ESTIMATE, epochs=(1.0,), texts_seen={"notes.txt": 1.0})
    assert estimate_rows(once)[2][1].endswith(", 1 epoch")


def test_early_stopping_is_compared_with_the_decay_of_the_learning_rate() -> None:
    early = replace(ESTIMATE, epochs=(1.0, 2.2), texts_seen={}, patience=3, decay="over the last 40% of the plan")
    assert estimate_notes(early) == [
        "the run stops after 3 validations without improvement, possibly before the learning rate decays over the last "
        "40% of the plan"
    ]


def test_the_results_name_the_best_step_and_the_reason_of_an_early_stop() -> None:
    summary = Summary(
        Path("r"), 300, 1_228_800, 20.0, 14.0, 18.0, 8000.0, validation(2.5), 200, 2.4, "3 validations w.g."
    )
    rows = {row.label: row.actual for row in comparison_rows(summary, PLAN)}
    assert rows["best validation loss"] == "2.400 at step 200" and rows["stopped early"] == "3 validations w.g."
    labels = {row.label for row in comparison_rows(replace(summary, best_step=300, early=""), PLAN)}
    assert not labels & {"best validation loss", "stopped early"}


def plain(preview: list[PreviewLine]) -> str:
    stream = io.StringIO()
    run(PlainDisplay(stream), preview)
    return stream.getvalue()


def terminal(preview: list[PreviewLine], width: int = 80, **settings: object) -> str:
    stream = io.StringIO()
    options = {"color_system": "truecolor", "force_terminal": True, **settings}
    run(LiveDisplay(Console(file=stream, width=width, height=30, **options)), preview)
    return stream.getvalue()


def test_a_pipe_gets_lines_without_escape_codes() -> None:
    text = plain(LETTERS)
    assert "\x1b" not in text and "\r" not in text
    line = next(line for line in text.splitlines() if line.startswith("step 100/500"))
    # 9.2 MFLOPs × 8,000 tokens/s ÷ 160 GFLOP/s = 46 %. These steps took 4.0 s; the plan gave them 2.4 of its 14 s. So
    # the other 11.6 s become 19.3 s.
    for part in ("20%", "loss 3.500", "accuracy 30.0%", "8,000 tokens/s", "46% of matmul rate", "lr 1.00e-03"):
        assert part in line
    assert line.endswith("elapsed 4.0 s  ETA 19 s")
    assert text.count("probe: timing steps, validation and saving, at most 4.0 s") == 1
    assert text.count("reading the text") == 2, "a short task has a line at its start and one at its end"
    assert "unigram baseline 3.31: the loss is 0.9 nats below it" in text
    assert "(estimate 14 s)" in text


def test_brackets_mark_predictions_without_color() -> None:
    assert "We are acc[o]u{x}ted⏎poor" in plain(LETTERS)
    assert "The [cat] sat on {dog→the}" in plain(WORDS)
    bare = terminal(WORDS, color_system=None)
    assert "The [cat] sat on {dog→the}" in bare


def test_without_color_brackets_mark_the_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    styled = terminal(LETTERS)
    assert "\x1b[1;4;32mo\x1b[0m" in styled and "\x1b[7;31mx\x1b[0m" in styled
    monkeypatch.setenv("NO_COLOR", "1")
    colorless = terminal(LETTERS)
    assert "[o]" in colorless and "{x}" in colorless and "[correct] {wrong}" in colorless


@pytest.mark.parametrize("preview", [LETTERS, WORDS], ids=["letters", "words"])
def test_a_terminal_of_eighty_columns_holds_every_line(preview: list[PreviewLine]) -> None:
    text = terminal(preview, color_system=None)
    printed = [line for part in text.split("\n") for line in part.split("\x1b[2K")[-1:]]
    assert all(len(line.replace("\x1b[?25h", "").replace("\x1b[?25l", "").lstrip("\r")) <= 80 for line in printed)
    for part in ("1,482,240 parameters", "63 epochs", "memorize", "500 steps, 2.05M tokens", "actual", "[MASK]"):
        assert part in text


def test_a_terminal_shows_a_bar_and_then_a_line_of_the_probe() -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, width=100, height=30, force_terminal=True, color_system=None))
    display.probe(0.0, 4.0)
    assert "━" not in stream.getvalue() and "─" * 30 in stream.getvalue()
    display.probe(1.0, 4.0)
    assert "at most 4.0 s  0.0 s" in stream.getvalue(), "the line with the time that it took"


def test_a_step_larger_than_the_text_is_noted() -> None:
    small = replace(ESTIMATE, epochs=(1000.0, 2.2))
    (note,) = [note for note in estimate_notes(small) if "repeats" in note]
    assert note.startswith("a step of stage 0 has 4,096 tokens, more than the text with 1,229")
    assert note.endswith('--set "stage.0.batch_size=307 tokens"')


def test_a_narrower_terminal_keeps_no_ghost_of_the_bar() -> None:
    """A terminal that wraps lines when it becomes narrower: every row of the region is erased before the next one."""
    stream = io.StringIO()
    console = Console(file=stream, width=80, height=30, force_terminal=True, color_system=None)
    display = LiveDisplay(console)
    display.train_start(PLAN, TrainState(), 9.2e6, 1.6e11)
    stream.truncate(0)
    console.width = 20
    display.message("narrower")
    # One row of 56 columns was drawn. In 20 columns it takes three: two are erased, then Rich erases the one it knows.
    assert stream.getvalue().lstrip("\0").startswith("\x1b[2K\x1b[1A" * 2 + "\r\x1b[2K")
    stream.truncate(0)
    console.width = 120
    display.message("wider")
    assert stream.getvalue().lstrip("\0").startswith("\r\x1b[2K"), "nothing more to erase"
    display.close()


def test_the_cursor_is_restored() -> None:
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
    ("loss", "text"),
    [(2.4, "0.9 nats below it"), (3.25, "0.06 nats below it"), (3.31, "is not below it"), (3.6, "is not below it")],
)
def test_the_loss_is_compared_with_the_unigram_baseline(loss: float, text: str) -> None:
    assert text in unigram_line(validation(loss))


def test_the_remaining_time_follows_plan_and_speed() -> None:
    pace = Pace(PLAN, TrainState(step=100, seconds=10.0), 9.2e6, 1.6e11)
    # Steps 100 to 200 were planned to take 2.4 s and took 4.8; what remains of the plan, 9.6 s, takes twice as long.
    assert pace.seconds_left(TrainState(step=200, seconds=14.8)) == pytest.approx(2 * (14 - 2 * 2.4))
    assert pace.seconds_left(TrainState(step=500, seconds=30.0)) == 0
    unmeasured = Plan((StagePlan(64, 100, 0, 10, 0.0),))
    assert Pace(unmeasured, TrainState(), 1, 0).seconds_left(TrainState(step=5, seconds=3.0)) == pytest.approx(3.0)
    assert matmul_text(Pace(unmeasured, TrainState(), 1, 0).matmul_fraction(5.0)) == ""


def test_a_sample_is_laid_out_token_by_token() -> None:
    rows = cell_rows(TOKENS, 20)
    assert [[cell.original for cell in row] for row in rows] == [["[CLS]", "the   ", "cat  "], ["sat", "down"]]
    assert [cell.state for row in rows for cell in row] == ["plain", "mask", "random", "kept", "plain"]
    assert rows[0][1].shown == "[MASK]" and rows[0][1].mark == "^^^^^^"
    letters = [TokenView("a", "[MASK]", True), TokenView("\n", "\n", False), TokenView("字", "b", True)]
    assert [(cell.original, cell.shown) for cell in cell_rows(letters, 80)[0]] == [
        ("a", "_"), ("⏎", "⏎"), ("字", "b "),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3599.6, "1 h"), (86399, "1 d 0 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert duration(float("nan")) == "?"


@pytest.mark.parametrize(
    ("number", "text"),
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
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in visible("a\x1b[31mred\x07\n\t")
    assert visible("a\x9b31m\x85b\u2028c\u202ed\u2066") == "a\ufffd31m\ufffdb⏎c\ufffdd\ufffd"
    assert visible("Ünï 한국어 שלום") == "Ünï 한국어 שלום"
    assert "\x1b" not in plain([(PreviewSpan("a\x1b[2J"), PreviewSpan("\x1b", "wrong", "b"))])


def test_a_long_task_writes_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_closed_pipe_does_not_stop_a_run() -> None:
    class Closed(io.StringIO):
        def write(self, text: str, /) -> int:
            raise BrokenPipeError

    run(PlainDisplay(Closed()), LETTERS)


def test_a_character_that_the_stream_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    run(PlainDisplay(stream), LETTERS)
    assert b"We are acc[o]u{x}ted?poor" in raw.getvalue()


def test_the_stream_decides() -> None:
    assert isinstance(display_for(io.StringIO()), PlainDisplay)
    assert type(display_for(io.StringIO(), quiet=True)) is Display
    run(display_for(io.StringIO(), quiet=True), LETTERS)


def test_a_display_shows_the_log_of_the_package() -> None:
    stream, logger = io.StringIO(), logging.getLogger("unmask")
    before = (logger.level, list(logger.handlers))
    with show_log(PlainDisplay(stream)):
        logger.debug("a detail")
        logger.info("read %d files", 3)
        logger.warning("one of them is empty")
    logger.info("later")
    assert stream.getvalue() == "read 3 files\nwarning: one of them is empty\n"
    assert (logger.level, list(logger.handlers)) == before


def test_a_terminal_gets_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(display_for(Terminal()), LiveDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display_for(Terminal()), PlainDisplay)


NOTEBOOK = """
import unmask
model = unmask.pretrain(
    "prose.txt", recipe="tiny", out="run", threads=1, budget="6 steps",
    settings={"data.tokenizer.kind": "characters", "model.num_hidden_layers": 1, "model.hidden_size": 16,
              "model.num_attention_heads": 2, "model.intermediate_size": 16, "train.every.log": "1 steps",
              "train.every.validate": "2 steps", "stage": [{"max_seq_len": 32, "batch_size": "256 tokens"}]},
)
"""


def test_a_notebook_shows_a_table_that_is_updated(prose: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    (tmp_path / "prose.txt").write_text(prose.read_text().replace("the cat", "<b>the cat</b>"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    messages: list[str] = []

    class Client(nbclient.NotebookClient):
        def process_message(self, msg, cell, cell_index):
            messages.append(msg["msg_type"])
            return super().process_message(msg, cell, cell_index)

    Client(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    (table,) = (html for html in tables if "validation loss</th>" in html)
    rows = re.findall(r"<tr><td>(.*?)</td>", table)
    assert rows == ["2", "4", "6"] and 'value="1.000"' in table and "unigram baseline" in table
    assert messages.count("update_display_data") >= 3, "one output is updated in place"
    assert any("<td>parameters" in html or "parameters," in html for html in tables), "the estimate is a table"
    assert "<b>the" not in "".join(tables), "text is escaped"
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert (tmp_path / "run" / "log.jsonl").exists()
