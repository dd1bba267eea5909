"""Dashboards repeat the log: each point once, whatever was stopped, and without a network."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.core.errors import RunError, Stopped
from unmask.training.display.plain import SilentDisplay
from unmask.training.loggers import MetricLoggers, TensorBoardLogger, points
from unmask.training.pretrain import launch, resume

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2",
    "model.intermediate_size=16", "train.every.log=1 steps", "train.every.validate=2 steps", "train.every.save=4 steps",
    "train.threads=1", "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "train.budget=6 steps",
]  # fmt: skip
LINES = [
    {"step": 1, "tokens": 300, "seconds": 0.5, "loss": 3.5, "accuracy": None, "phase_seconds": {"data": 0.1}},
    {"step": 2, "tokens": 600, "seconds": 0.9, "loss": 3.25, "phase_seconds": {"data": 0.2}},
    {"step": 2, "tokens": 600, "seconds": 1.0, "validation": {"loss": 3.0, "earlier": {"32": 3.1}, "sets": {}}},
    {"step": 2, "tokens": 600, "seconds": 1.0, "ended_early": "3 validations without gain"},
]


class StopsAt(SilentDisplay):
    def step(self, state) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_line_becomes_points_that_a_dashboard_groups() -> None:
    assert points(LINES[0]) == {
        "training/tokens": 300, "training/seconds": 0.5, "training/loss": 3.5, "training/phase_seconds/data": 0.1,
    }  # fmt: skip
    assert points(LINES[2]) == {"validation/loss": 3.0, "validation/earlier/32": 3.1}


def test_a_package_that_is_not_there_is_named_before_any_work(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != "trackio"})
    with pytest.raises(RunError, match="trackio is not installed") as caught:
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, 'train.loggers=["trackio"]'])
    assert 'pip install "unmask[trackio]"' in caught.value.hint and not list(tmp_path.iterdir())


def test_tensorboard_has_each_point_of_the_log_once_after_a_stop(prose: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "unmask[tensorboard]"')
    run = tmp_path / "run"
    settings = [*SMALL, 'train.loggers=["tensorboard"]']
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=settings, display=StopsAt())
    resume(run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = scalars(run)
    expected = [(line["step"], line["loss"]) for line in log if "loss" in line]
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert found["training/loss"] == [(step, pytest.approx(loss)) for step, loss in expected]
    held = [(line["step"], pytest.approx(line["validation"]["loss"])) for line in log if "validation" in line]
    assert found["validation/loss"] == held


def test_a_sink_that_fails_does_not_cost_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "unmask[tensorboard]"')
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    said: list[str] = []
    repeaters = MetricLoggers(said.append)
    repeaters.open(["tensorboard"], tmp_path, LINES, {}, "")
    repeaters.write(3, {"loss": 2.0})
    repeaters.close()
    assert (
        len(said) == 1 and said[0].startswith("tensorboard is left out from here on") and "the log goes on" in said[0]
    )


def test_tensorboard_without_a_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "unmask[tensorboard]"')
    for _ in range(2):  # opened again, it repeats the log and doubles nothing
        sink = TensorBoardLogger(tmp_path, LINES, "seed = 17\n")
        sink.close()
    assert scalars(tmp_path)["training/loss"] == [(1, 3.5), (2, 3.25)]


def test_trackio_holds_each_point_once_and_uses_no_network(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where its store is once, when it is imported; sockets are forbidden."""
    pytest.importorskip("trackio", reason='trackio is not installed: pip install "unmask[trackio]"')
    program = f"""
import socket
def refuse(*arguments, **named):
    raise AssertionError("a network call")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from unmask.training.loggers import MetricLoggers
lines = {LINES!r}
for _ in range(2):
    repeaters = MetricLoggers(print)
    repeaters.open(["trackio"], Path({str(tmp_path / "run")!r}), lines, {{"model.hidden_size": 16}}, "")
    repeaters.write(3, {{"loss": 2.5, "seconds": 1.5}})
    repeaters.close()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "to look at it: trackio show --project unmask\n" * 2, (done.stdout, done.stderr)
    with sqlite3.connect(tmp_path / "store" / "unmask.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by step, id").fetchall()
    store.close()
    assert {run for run, _, _ in rows} == {"run"}
    assert [(step, json.loads(held).get("training/loss")) for _, step, held in rows][:2] == [(1, 3.5), (2, 3.25)]
    assert [step for _, step, _ in rows].count(3) == 1 and len(rows) == 5
