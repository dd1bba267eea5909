"""Work units of tokenization as map tasks of Ray Data, on this machine or on a cluster.

The units, their files and their order are those of `data/workers.py`, so the bytes are the same. Ray runs the task of a
worker that died again; a task begins its files from the start. All machines need the text and the cache under the same
paths, and the same version of unmask; each task checks that.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import tokenizers

from unmask.core.config import build_config, dump_config
from unmask.core.errors import StoreError, TextError, WorkerError
from unmask.core.hardware import cores
from unmask.core.version import __version__
from unmask.data.inputs import absolute
from unmask.data.settings import DataConfig
from unmask.data.sources import BaseSource, FileSource, SourceRecipe, kind_of
from unmask.data.workers import SINGLE_THREAD, Message, Task, TaskRunner, WorkerPool, decode_error, encode_error

_OBJECT_STORE_BYTES: Final = 100 << 20  # of a local cluster: the tasks exchange a few kilobytes
_CONNECT_SECONDS: Final = 5.0
_QUIET: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}
_VERSIONS: Final = {"unmask": __version__, "tokenizers": tokenizers.__version__}


@dataclass(frozen=True)
class RayConfig:
    """Where Ray runs tasks."""

    address: str = ""  # "auto" or HOST:PORT of a cluster; "": a cluster of this process, which ends with it


class RayWorkers(WorkerPool):
    """Runs tasks on Ray; a context manager that disconnects from the cluster, or ends its own.

    Args:
        source: files and datasets.
        settings: settings that the source was opened with.
        engine: where Ray runs.
        units: number of units.

    Raises:
        WorkerError: Ray is not installed, there is no cluster, or the source can't be opened by other processes.
    """

    def __init__(self, source: BaseSource, settings: DataConfig, engine: RayConfig, units: int) -> None:
        if not isinstance(source, FileSource):
            raise WorkerError(
                "texts in memory and of plugins can't be read by Ray's workers",
                location=source.location,
                hint="write the text to files, or remove --engine ray",
            )
        self.local = TaskRunner(source)
        self.count = max(2, units)  # more than 1: `local` runs no task
        self._ray, self._is_own = _connect(engine, units)
        # Absolute, and without credentials: workers read the files of the tasks, never the names.
        self._setup = json.dumps(
            {"paths": list(source.paths), "settings": dump_config(settings), "versions": _VERSIONS}
        )
        self._sizes = {
            absolute(part.path): os.path.getsize(part.path)
            for part in source.parts()
            if kind_of(part.path) != "dataset"
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_own:
            self._ray.shutdown()

    def run(self, stage: str, tasks: Sequence[Task], report: Callable[[int], None]) -> list[Message]:
        """Run a stage on all tasks; `report` is called with the number of characters of each task that is done.

        Raises:
            UnmaskError: the error of the first task that failed; its location names the host.
            WorkerError: Ray lost a worker again and again.
        """
        import ray.data
        import ray.exceptions

        rows = [
            {
                "number": number,
                "stage": stage,
                "setup": self._setup,
                "sizes": json.dumps({part.path: self._sizes.get(part.path) for part in task.parts}),
                "task": json.dumps(task.to_json()),
            }
            for number, task in enumerate(map(_absolute, tasks))
        ]
        done: dict[int, Message] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Ray warns about its own defaults
                made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_run_row, num_cpus=1)
                for row in made.iter_rows():
                    answer: Message = json.loads(row["answer"])
                    done[int(row["number"])] = answer
                    report(answer.get("characters", 0))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1][:300]
            raise WorkerError(
                f"Ray could not run a task: {reason}",
                hint="look into the log of Ray (/tmp/ray/session_latest/logs), then run the command again",
            ) from error
        failed = next((done[number] for number in sorted(done) if "error" in done[number]), None)
        if failed is not None:
            raise decode_error(failed["error"])
        return [done[number]["result"] for number in range(len(tasks))]


def _absolute(task: Task) -> Task:
    """Return a task with absolute paths: a worker runs in the folder in which the cluster was started."""
    return replace(
        task,
        parts=[part._replace(path=absolute(part.path)) for part in task.parts],
        folder=os.path.abspath(task.folder),
        tokenizer=task.tokenizer and os.path.abspath(task.tokenizer),
    )


def _connect(engine: RayConfig, units: int) -> tuple[Any, bool]:
    """Return Ray, connected to a cluster, and whether this call connected it."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        message = f"--engine ray needs a package that is not installed: {error.name or 'ray'}"
        raise WorkerError(message, location="--engine ray", hint='pip install "unmask[ray]"') from error
    is_connected = ray.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not is_connected:
            _start(ray, engine, units)
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray, not is_connected


def _start(ray: Any, engine: RayConfig, units: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not engine.address:
        limits = {"num_cpus": min(cores(), max(1, units)), "object_store_memory": _OBJECT_STORE_BYTES}
        ray.init(address="local", include_dashboard=False, **limits, **options)
        return
    hint = "start a cluster (ray start --head), or remove --address"
    if engine.address != "auto":
        _require_server(engine.address, hint)
    try:
        ray.init(address=engine.address, **options)
    except Exception as error:  # its classes differ between versions of Ray
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        message = f"no Ray cluster answers: {reason}"
        if engine.address != "auto":  # a cluster of `ray start` needs a token from Ray 2.59 on, read with `auto` only
            hint = "use --address auto on a machine of the cluster, or set RAY_AUTH_MODE=token if it needs a token"
        raise WorkerError(message, location=f"--address {engine.address}", hint=hint) from error


def _require_server(address: str, hint: str) -> None:
    """Check that something listens at HOST:PORT, because Ray itself would wait for a minute."""
    location = f"--address {address}"
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        message = f"invalid address: got {address}, expected auto or HOST:PORT"
        raise WorkerError(message, location=location, hint="run the command on a machine of the cluster with auto")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        message = f"no Ray cluster answers: {error}"
        raise WorkerError(message, location=location, hint=hint) from error


# In a worker ----------------------------------------------------------------------------------------------------------


def _run_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Run one task and return its number and its answer: the result or the error."""
    os.environ.update(SINGLE_THREAD)
    host, characters = socket.gethostname(), [0]

    def count(number: int) -> None:
        characters[0] += number

    try:
        task = Task.from_json(json.loads(row["task"]))
        _check_machine(json.loads(row["setup"])["versions"], json.loads(row["sizes"]), Path(task.folder), host)
        answer: Message = {"result": _runner(str(row["setup"])).run(str(row["stage"]), task, count)}
    except Exception as error:
        answer = {"error": encode_error(error)}
        place = answer["error"].get("location", "")
        answer["error"]["location"] = f"{place} on the machine {host}" if place else f"the machine {host}"
    return {"number": row["number"], "answer": json.dumps({**answer, "characters": characters[0]})}


@functools.lru_cache(maxsize=1)
def _runner(setup: str) -> TaskRunner:
    """Return the runner of a source; its cache of chunks serves all tasks of this process."""
    facts = json.loads(setup)
    settings = build_config(DataConfig, tomllib.loads(facts["settings"]), "the settings of the command")
    return TaskRunner(SourceRecipe(tuple(facts["paths"]), settings).open())


def _check_machine(versions: Mapping[str, str], sizes: Mapping[str, int | None], folder: Path, host: str) -> None:
    """Check that this machine has the same versions and files as the one of the command.

    Raises:
        WorkerError: a version differs.
        TextError: a file is missing or has another size.
        StoreError: the cache is not shared.
    """
    if versions != _VERSIONS:
        raise WorkerError(
            f"versions differ: {_VERSIONS} on this worker, {dict(versions)} at the command",
            hint="install the same versions on all machines of the cluster",
        )
    shared = "put text and cache (UNMASK_CACHE) where all machines of the cluster find them under the same paths"
    for path, size in sizes.items():
        if size is None:
            continue
        if not os.path.isfile(path):
            raise TextError("this file is missing on a worker", location=path, hint=shared)
        if (own := os.path.getsize(path)) != size:
            message = f"this file is another one on a worker: {own:,} bytes, expected {size:,}"
            raise TextError(message, location=path, hint=shared)
    if not folder.is_dir():
        raise StoreError("the cache is not shared with a worker", location=str(folder), hint=shared)
