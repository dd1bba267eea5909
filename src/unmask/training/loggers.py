"""Loggers of a run: log.jsonl, which contains everything, and optional loggers that copy it for dashboards.

An optional logger is rebuilt from log.jsonl whenever a run starts or resumes. Therefore no point is missing or
duplicated after a kill, and its files may be deleted at any time. Nothing is sent to a server unless a variable of the
environment says so: WANDB_MODE=online for W&B, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL for trackio.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import os
import secrets
import shlex
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, final

from unmask.core import files
from unmask.core.errors import DamagedError, RunError
from unmask.core.files import RunLayout
from unmask.core.plugins import PluginLoggerConfig, make
from unmask.core.types import LoggerContext, MetricLogger

LoggerKind = Literal["tensorboard", "wandb", "trackio"]  # also the names of the packages, and of the extras
TENSORBOARD, WANDB = "tensorboard", "wandb"  # also the names of the folders in a run
PROJECT = "unmask"  # of the runs in W&B, unless WANDB_PROJECT names another one, and in trackio

_logger = logging.getLogger("unmask")


# log.jsonl ------------------------------------------------------------------------------------------------------------


class JsonlLogger:
    """Writes one JSON object per line. The file holds complete lines only, even if the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with files.wrap_os_errors(path):
            self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Appends one line, unbuffered: a kill after this call doesn't lose it.

        Raises:
            StoreError: the disk is full or not writable; earlier lines are intact.
        """
        line = _json_line({"step": step, **metrics}).encode()
        with files.wrap_os_errors(self._path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                remaining = memoryview(line)
                while remaining:  # on a disk that is nearly full, only a part may be written
                    remaining = remaining[self._file.write(remaining) :]
            except OSError:
                self._file.truncate(size)
                raise

    def sync(self) -> None:
        """Forces everything written so far to the disk."""
        with files.wrap_os_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes the file."""
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()


def plain(value: Any) -> Any:
    """Returns a value as the log stores it: keys are strings, and NaN and infinity, which JSON lacks, are null."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(value: Mapping[str, Any]) -> str:
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log. A last line that a kill truncated is skipped.

    Raises:
        DamagedError: an earlier line is not JSON or has no step; the error names file and line. Or the log is larger
            than 2 GiB.
    """
    if not path.is_file():
        return
    if (length := path.stat().st_size) > files.MAX_LOG_BYTES:
        raise DamagedError(
            f"this log is too large: {length:,} bytes, expected at most {files.MAX_LOG_BYTES:,}",
            location=str(path),
            hint="move its first lines to another file",
        )
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield _parse_line(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1:  # without a line end: the write was interrupted
                return
            raise DamagedError(
                "invalid log line: expected a JSON object with a step",
                location=f"{path}, line {number + 1}",
                hint="fix or delete that line",
            ) from error


def _parse_line(line: str) -> dict[str, Any]:
    value: Any = json.loads(line)
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        raise ValueError(line)
    return cast("dict[str, Any]", value)


def discard_after(run: Path, step: int) -> int:
    """Moves log lines of later steps, which will be repeated, to discarded.jsonl.

    Returns:
        The number of lines moved.
    """
    log, discarded = run / RunLayout.LOG, run / RunLayout.DISCARDED
    lines = list(read_log(log))
    kept = [line for line in lines if line["step"] <= step]
    later = [line for line in lines if line["step"] > step]
    if later:
        with files.wrap_os_errors(discarded), discarded.open("a", encoding="utf-8") as file:
            file.writelines(_json_line(line) for line in later)
    text = "".join(_json_line(line) for line in kept)
    if not log.is_file() or log.read_text(encoding="utf-8", errors="replace") != text:
        files.write_text(log, text)
    return len(later)


# Optional loggers -----------------------------------------------------------------------------------------------------


def check_installed(loggers: Sequence[LoggerKind | PluginLoggerConfig]) -> None:
    """Checks, before any work is done, that the package of each logger is installed.

    Raises:
        RunError: a package is missing; the hint says how to install it.
    """
    for kind in loggers:
        if isinstance(kind, str) and not _is_installed(kind):
            raise RunError(
                f"{kind} is not installed",
                location="train.loggers",
                hint=f'run pip install "unmask[{kind}]", or remove it from train.loggers (log.jsonl has everything)',
            )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of this name alone is found too, without an origin


def scalars(line: Mapping[str, object]) -> dict[str, float]:
    """Returns the numbers of a log line under grouped names: training/loss, validation/accuracy."""
    validation = line.get("validation")
    if isinstance(validation, Mapping):  # seconds and tokens are in the training lines
        return dict(_scalars(cast("Mapping[str, object]", validation), "validation/"))
    pairs = line.get("pairs")
    if isinstance(pairs, Mapping):
        return dict(_scalars(cast("Mapping[str, object]", pairs), "pairs/"))
    return dict(_scalars({name: value for name, value in line.items() if name != "step"}, "training/"))


def _scalars(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _scalars(cast("Mapping[str, object]", value), f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


@final
class TensorBoardLogger:
    """Writes event files to RUN/tensorboard."""

    def __init__(self, context: LoggerContext) -> None:
        """Replaces the event files: writes the recipe as text and the lines of the log so far."""
        from torch.utils.tensorboard import SummaryWriter

        folder = context.run / TENSORBOARD
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        code_block = "".join(f"    {line}\n" for line in context.recipe.splitlines())  # Markdown
        self._writer.add_text("recipe", code_block)
        # The log has no absolute times: the last line is dated now, earlier lines keep their time differences.
        self._start = time.time() - max((_seconds(line) for line in context.lines), default=0.0)
        for line in context.lines:
            self.write(line["step"], line)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Writes one point per number."""
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(name, value, step, walltime=self._start + _seconds(metrics))
        self._writer.flush()

    def close(self) -> None:
        """Completes the event file."""
        self._writer.close()


def _seconds(line: Mapping[str, object]) -> float:
    value = line.get("seconds")
    return float(value) if isinstance(value, int | float) else 0.0


@final
class WandbLogger:
    """Writes to RUN/wandb what `wandb sync` uploads; with WANDB_MODE=online, uploads it meanwhile."""

    def __init__(self, context: LoggerContext) -> None:
        """Replaces the files of offline runs, and writes the recipe as config and the lines of the log so far."""
        import wandb

        folder, mode = context.run / WANDB, os.environ.get("WANDB_MODE", "offline")
        for earlier in folder.glob("offline-run-*"):
            shutil.rmtree(earlier, ignore_errors=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=context.run.name,
            id=self._id(folder),
            dir=str(context.run),
            mode=cast("Any", mode),
            reinit="create_new",  # a run of the user's own in this process stays as it is
            # Online, W&B ignores points of steps that it has: a resumed run repeats them bit for bit.
            resume="allow" if mode == "online" else None,
            config=tomllib.loads(context.recipe),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        for line in context.lines:
            self.write(line["step"], line)

    @staticmethod
    def _id(folder: Path) -> str:
        """Returns the run's identifier in W&B, which a resumed run keeps."""
        path = folder / "unmask-id"
        if not path.is_file():
            files.write_text(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Writes one point per number."""
        self._run.log(scalars(metrics), step=step)

    def close(self) -> None:
        """Completes the files."""
        self._run.finish()


@final
class TrackioLogger:
    """Writes to the local database of trackio, or to the Space or server that its environment variables name."""

    def __init__(self, context: LoggerContext) -> None:
        """Replaces the points of this run, and writes the recipe as config and the lines of the log so far."""
        with contextlib.redirect_stdout(io.StringIO()):  # where --json prints
            import trackio

            folder = str(context.run.absolute())
            with contextlib.suppress(ValueError):  # there is no project yet
                for run in list(trackio.Api().runs(PROJECT)):
                    if run.name == context.run.name and (run.config or {}).get("folder") == folder:
                        run.delete()
            self._finish = trackio.finish
            self._run = trackio.init(
                PROJECT,
                name=context.run.name,
                config={**tomllib.loads(context.recipe), "folder": folder},
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        for line in context.lines:
            self.write(line["step"], line)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Writes one point per number."""
        if numbers := scalars(metrics):
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Waits until all points are written."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()  # also forgets the run, which trackio would else finish again when the process ends


_LOGGERS: Mapping[LoggerKind, type[TensorBoardLogger | WandbLogger | TrackioLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
}


def _viewer(kind: LoggerKind, run: Path) -> str:
    """Returns the command that shows the curves."""
    if kind == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(run / TENSORBOARD))}"
    if kind == "trackio":
        return f"trackio show --project {PROJECT}"
    return f"wandb sync {shlex.quote(str(run / WANDB))}/offline-run-*"


class MetricLoggers:
    """The optional loggers of a run. One that fails is disabled with a warning, because log.jsonl has everything."""

    def __init__(self) -> None:
        self._loggers: dict[str, MetricLogger] = {}

    def open(
        self,
        loggers: Sequence[LoggerKind | PluginLoggerConfig],
        run: Path,
        lines: Sequence[Mapping[str, Any]],
        recipe_text: str,
    ) -> None:
        """Opens loggers. Each gets the lines of the log so far and the recipe as TOML."""
        context = LoggerContext(run, lines, recipe_text)
        for config in loggers:
            name = config.kind if isinstance(config, PluginLoggerConfig) else config
            try:
                if isinstance(config, PluginLoggerConfig):
                    self._loggers[name] = make(config, context)
                else:
                    self._loggers[name] = _LOGGERS[config](context)
                    _logger.info("show the curves with: %s", _viewer(config, run))
            except Exception as error:
                self._disable(name, error)

    def write(self, step: int, metrics: Mapping[str, object]) -> None:
        """Writes a line to each logger."""
        for name, logger in list(self._loggers.items()):
            try:
                logger.write(step, metrics)
            except Exception as error:
                self._disable(name, error)

    def close(self) -> None:
        """Closes each logger."""
        for name, logger in list(self._loggers.items()):
            try:
                logger.close()
            except Exception as error:
                self._disable(name, error)

    def _disable(self, name: str, error: Exception) -> None:
        # An exception of a logging package (full disk, changed interface) must not stop the run.
        self._loggers.pop(name, None)
        _logger.warning("logger %s failed and is disabled: %s: %s", name, type(error).__name__, error)
