"""Optional loggers repeat log.jsonl: each point once, also after a stop."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmask.core.errors import RecipeError, RunError, Stopped
from unmask.core.types import LoggerContext
from unmask.training.display import Display
from unmask.training.loggers import MetricLoggers, TensorBoardLogger, scalars
from unmask.training.pretrain import launch, resume

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "train.every.log=1 steps",
    "train.every.validate=2 steps", "train.every.save=4 steps", "train.threads=1",
    "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "train.budget=6 steps",
]  # fmt: skip
LINES = [
    {"step": 1, "tokens": 300, "seconds": 0.5, "loss": 3.5, "accuracy": None, "phase_seconds": {"data": 0.1}},
    {"step": 2, "tokens": 600, "seconds": 0.9, "loss": 3.25, "phase_seconds": {"data": 0.2}},
    {"step": 2, "tokens": 600, "seconds": 1.0, "validation": {"loss": 3.0, "earlier": {"32": 3.1}, "sets": {}}},
    {"step": 2, "tokens": 600, "seconds": 1.0, "ended_early": "3 validations without gain"},
]


class StopsAt(Display):
    def step(self, state) -> None:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_numbers_of_a_line_have_grouped_names() -> None:
    assert scalars(LINES[0]) == {
        "training/tokens": 300, "training/seconds": 0.5, "training/loss": 3.5, "training/phase_seconds/data": 0.1,
    }  # fmt: skip
    assert scalars(LINES[2]) == {"validation/loss": 3.0, "validation/earlier/32": 3.1}


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_any_work(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / package).mkdir()  # as loggers leave it in a working folder: no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != package})
    with pytest.raises(RunError, match=f"{package} is not installed") as caught:
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, f'train.loggers=["{package}"]'])
    assert f'pip install "unmask[{package}]"' in caught.value.hint and not (tmp_path / "run").exists()


def test_tensorboard_has_each_point_of_the_log_once_after_a_stop(prose: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "unmask[tensorboard]"')
    run = tmp_path / "run"
    settings = [*SMALL, 'train.loggers=["tensorboard"]']
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=settings, display=StopsAt())
    resume(run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    points = read_scalars(run)
    expected = [(line["step"], line["loss"]) for line in log if "loss" in line]
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert points["training/loss"] == [(step, pytest.approx(loss)) for step, loss in expected]
    held = [(line["step"], pytest.approx(line["validation"]["loss"])) for line in log if "validation" in line]
    assert points["validation/loss"] == held


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: those of a LevelDB log (blocks of 32 KiB), after a header of seven bytes."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The points of an offline run of W&B: step and values."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    points: list[tuple[int, dict[str, float]]] = []
    for data in wandb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if items:
            points.append((items["_step"], {name: value for name, value in items.items() if name[0] != "_"}))
    return points


def read_trackio(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The points of a run in trackio's database: step and values."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (found,) = (each for each in trackio.Api().runs("unmask") if each.config["folder"] == str(run.absolute()))
    assert found.config["model"]["hidden_size"] == 16
    logs = SQLiteStorage.get_logs("unmask", found.name, run_id=found.id)
    return [(log["step"], {name: value for name, value in log.items() if "/" in name}) for log in logs]


def test_wandb_and_trackio_have_each_point_of_the_log_once_after_a_stop(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason='wandb is not installed: pip install "unmask[wandb]"')
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason='trackio is not installed: pip install "unmask[trackio]"')
    for name in ("WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=[*SMALL, 'train.loggers=["wandb", "trackio"]'],
               display=StopsAt())  # fmt: skip
    identifier = (run / "wandb" / "unmask-id").read_text()
    resume(run)
    assert (run / "wandb" / "unmask-id").read_text() == identifier
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    held = [(line["step"], line["validation"]["loss"]) for line in log if "validation" in line]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    end = time.monotonic() + 30
    while len(read_wandb(run)) < len(losses) and time.monotonic() < end:  # W&B's own process may write a little later
        time.sleep(0.1)
    for points in (read_wandb(run), read_trackio(run)):
        for name, expected in (("training/loss", losses), ("validation/loss", held)):
            assert [(step, values[name]) for step, values in points if name in values] == expected
    assert not capfd.readouterr().out, "standard output is for results"


def test_a_logger_that_fails_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "unmask[tensorboard]"')
    (tmp_path / "tensorboard").write_text("a file in place of the folder")
    loggers = MetricLoggers()
    with caplog.at_level(logging.INFO, "unmask"):
        loggers.open(["tensorboard"], tmp_path, LINES, "")
        loggers.write(3, {"loss": 2.0})
        loggers.close()
    (message,) = caplog.messages
    assert message.startswith("logger tensorboard failed and is disabled: ")


def test_a_logger_that_is_opened_again_doubles_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "unmask[tensorboard]"')
    for _ in range(2):
        logger = TensorBoardLogger(LoggerContext(tmp_path, LINES, "seed = 17\n"))
        logger.close()
    assert read_scalars(tmp_path)["training/loss"] == [(1, 3.5), (2, 3.25)]


PLUGIN = """
import json
from dataclasses import dataclass

class CsvLogger:
    @dataclass(frozen=True)
    class Settings:
        separator: str = ","

    def __init__(self, settings, context):
        self._separator = settings.separator
        self._file = (context.run / "curve.csv").open("w")
        assert "hidden_size = 16" in context.recipe
        for line in context.lines:
            self.write(line["step"], line)

    def write(self, step, metrics):
        if "loss" in metrics:
            print(step, metrics["loss"], sep=self._separator, file=self._file, flush=True)

    def close(self):
        self._file.close()

class Broken:
    def __init__(self, settings, context):
        pass

    def close(self):
        pass

    def write(self, step, metrics):
        raise OSError("no space left")

class NoLogger:
    pass
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with loggers; modules are imported once, so each test has its own."""
    name = f"loggers_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_plugin_logger_gets_each_line_once_after_a_stop(prose: Path, tmp_path: Path, plugin: str) -> None:
    run = tmp_path / "run"
    loggers = f'train.loggers=["{plugin}:Broken", {{kind = "{plugin}:CsvLogger", separator = ";"}}]'
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=[*SMALL, loggers], display=StopsAt())
    before = (run / "curve.csv").read_text()
    resume(run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    expected = [f"{line['step']};{line['loss']}" for line in log if "loss" in line]
    assert (run / "curve.csv").read_text().splitlines() == expected and len(expected) == 6
    lines = before.splitlines()
    assert 3 <= len(lines) < 6 and lines == expected[: len(lines)]


def test_a_class_that_is_not_a_logger_is_refused_by_name(prose: Path, tmp_path: Path, plugin: str) -> None:
    with pytest.raises(RecipeError, match=r"NoLogger.*lacks .*write"):
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, f'train.loggers=["{plugin}:NoLogger"]'])
    with pytest.raises(RecipeError, match="tensorboard") as caught:
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, 'train.loggers=["mlflow"]'])
    assert "train.loggers" in caught.value.location and not (tmp_path / "run").exists()
