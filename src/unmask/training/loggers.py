"""Room card: dashboards that repeat the log.

Comes in: which are wanted, the lines of the log so far, then each new line. Goes out: RUN/tensorboard/ (event files),
or a run in trackio's own store on this machine. Called by: pretrain.

The log stays the truth. A dashboard is written anew from it whenever a run starts or goes on, so that no point is
missing or doubled, whatever was killed or resumed; its own files may be removed at any time. Nothing here uses the
network.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, final

from unmask.core import files
from unmask.core.errors import DamagedError, RunError
from unmask.core.types import MetricLogger

LoggerKind = Literal["tensorboard", "trackio"]
PROJECT = "unmask"  # of trackio, where runs are compared
FOLDER = "tensorboard"  # in a run


def check_installed(kinds: Sequence[LoggerKind]) -> None:
    """Refuse a sink whose package isn't there, before any work is done.

    Raises:
        RunError: the package is named, and the line that installs it.
    """
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise RunError(
                f"{kind} is not installed",
                location="train.loggers",
                hint=f'install it: pip install "unmask[{kind}]", or leave it out: log.jsonl has everything',
            )


def points(line: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a log line under names that a dashboard groups: training/loss, validation/accuracy."""
    held = line.get("validation")
    if isinstance(held, Mapping):  # its clock and tokens stand in a training line
        return dict(_numbers(cast("Mapping[str, object]", held), "validation/"))
    return dict(_numbers({name: value for name, value in line.items() if name != "step"}, "training/"))


def _numbers(table: Mapping[str, object], under: str) -> Iterator[tuple[str, float]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(cast("Mapping[str, object]", value), f"{under}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{under}{name}", float(value)


@final
class TensorBoardLogger:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, lines: Sequence[Mapping[str, Any]], settings: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("recipe", "".join(f"    {line}\n" for line in settings.splitlines()))  # Markdown's code
        # Lines of the past keep their distances in time; when they were written the log doesn't say.
        self._began = time.time() - max((_seconds(line) for line in lines), default=0.0)
        for line in lines:
            self.write(line["step"], line)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """One point per number."""
        for name, value in points(metrics).items():
            self._writer.add_scalar(name, value, step, walltime=self._began + _seconds(metrics))
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


@final
class TrackioSink:
    """A run in trackio's own store on this machine (TRACKIO_DIR), project "unmask".

    It goes to the store itself: `trackio.init` would ask the hub for the person's name where a token is found, start
    threads and print.
    """

    def __init__(self, run: Path, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._store: Any = SQLiteStorage
        self._run, self._id = run.resolve().name, files.digest(str(run.resolve()))
        now = datetime.datetime.now(datetime.UTC)
        self._began = now - datetime.timedelta(seconds=max((_seconds(line) for line in lines), default=0.0))
        self._config = {name: value for name, value in settings.items() if not name.startswith("_")}
        self._store.init_db(PROJECT)
        self._store.delete_run(PROJECT, self._run, run_id=self._id)
        self._write([(line["step"], line) for line in lines])

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """One row."""
        self._write([(step, metrics)])

    def _write(self, rows: Sequence[tuple[int, Mapping[str, object]]]) -> None:
        told = [(step, points(line), _seconds(line)) for step, line in rows]
        told = [(step, numbers, seconds) for step, numbers, seconds in told if numbers]
        self._store.bulk_log(
            PROJECT,
            self._run,
            [numbers for _, numbers, _ in told],
            [step for step, _, _ in told],
            [(self._began + datetime.timedelta(seconds=seconds)).isoformat() for _, _, seconds in told],
            config=self._config,
            run_id=self._id,
        )

    def close(self) -> None:
        """Each row was written whole."""


def _seconds(line: Mapping[str, object]) -> float:
    value = line.get("seconds")
    return float(value) if isinstance(value, int | float) else 0.0


class MetricLoggers:
    """The sinks of a run beside its log: one that fails is left out with a word, because the log has everything."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._sinks: dict[str, MetricLogger] = {}

    def open(
        self,
        kinds: Sequence[LoggerKind],
        run: Path,
        lines: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        written: str,
    ) -> None:
        """Open the sinks and repeat the lines of the log so far; `settings` are the recipe's, `written` as TOML."""
        for kind in kinds:
            try:
                if kind == "tensorboard":
                    self._sinks[kind] = TensorBoardLogger(run, lines, written)
                    self._say(f"to look at it: tensorboard --logdir {run / FOLDER}")
                else:
                    self._sinks[kind] = TrackioSink(run, lines, settings)
                    self._say(f"to look at it: trackio show --project {PROJECT}")
            except Exception as error:
                self._leave_out(kind, error)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """The same line to each."""
        for kind, sink in list(self._sinks.items()):
            try:
                sink.write(step, metrics)
            except Exception as error:
                self._leave_out(kind, error)

    def close(self) -> None:
        """Close each."""
        for kind, sink in list(self._sinks.items()):
            try:
                sink.close()
            except Exception as error:
                self._leave_out(kind, error)

    def _leave_out(self, kind: str, error: Exception) -> None:
        """Whatever a dashboard's package raises (a full disk, a changed interface) must not cost the run."""
        self._sinks.pop(kind, None)
        self._say(f"{kind} is left out from here on: {type(error).__name__}: {error}; the log goes on")


LOG, DISCARDED, CRASH = "log.jsonl", "discarded.jsonl", "crash.txt"


class JsonlLogger:
    """A Sink: one JSON object a line. The log holds whole lines only, even where the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with files.wrap_os_errors(path):
            self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Append one line and hand it to the system at once: a kill after this call does not lose it.

        Raises:
            StoreError: there is no room for it; the lines before stand.
        """
        line = _json_line({"step": step, **metrics}).encode()
        with files.wrap_os_errors(self._path):
            whole = os.fstat(self._file.fileno()).st_size
            try:
                left = memoryview(line)
                while left:  # a disk that is nearly full takes a part
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(whole)
                raise

    def sync(self) -> None:
        """Force what was written to the disk."""
        with files.wrap_os_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


def plain(value: Any) -> Any:
    """A measurement as the log has it and as it will be read back: names are text, what is no finite number is null."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out.

    Raises:
        DamagedError: a line in the middle that isn't JSON or names no step; file and line are named.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield _measured(line)
        except ValueError as error:
            if number == len(lines) - 1:  # no line end after it: the write was cut
                return
            raise DamagedError(
                "no line of a log", location=f"{path}, line {number + 1}", hint="mend or remove that line"
            ) from error


def _measured(line: str) -> dict[str, Any]:
    """A line as JSON; a ValueError where it is none, or doesn't say of which step it is."""
    found: Any = json.loads(line)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(line)
    return cast("dict[str, Any]", found)


def discard_after(folder: Path, step: int) -> int:
    """Move log lines of steps that will be done again to discarded.jsonl, so that the log has each step once.

    Returns:
        How many lines were moved.
    """
    log = folder / LOG
    lines = list(read_log(log))
    keep = [line for line in lines if line["step"] <= step]
    gone = [line for line in lines if line["step"] > step]
    if gone:
        with files.wrap_os_errors(folder / DISCARDED), (folder / DISCARDED).open("a", encoding="utf-8") as file:
            file.writelines(_json_line(line) for line in gone)
    whole = "".join(_json_line(line) for line in keep)
    if not log.is_file() or log.read_text(encoding="utf-8", errors="replace") != whole:
        files.write_text(log, whole)
    return len(gone)
