"""Room card: one process works on a run at a time.

Comes in: a run's folder. Goes out: RUN/lock.json (who works on it: process, host, since when) for as long as the work
lasts; a refusal that names the one who does; a lock whose process is gone, taken over. Called by: pretrain, history.

The lock is a file that only one process can make, on every system; nothing of the system's own locks is used, because
they end with a process that was forked, or don't reach over a network's folders. What stands in it tells a process
from a later one with the same number: the system is asked when it was started.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from unmask.core import files
from unmask.core.config import load_toml
from unmask.core.errors import RunError, UnmaskError
from unmask.training.loggers import CRASH, LOG, read_log

LOCK = "lock.json"
_WRITTEN_WITHIN_SECONDS = 5.0  # a lock without a word in it for longer than this was left by a kill while it was made


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    since: str  # with its time zone
    started: str  # what tells the process from a later one with its number; "" where the system doesn't say

    @property
    def in_words(self) -> str:
        """For a message."""
        return f"process {self.pid} on {self.host}, since {self.since}"


def holder(run: Path) -> Holder | None:
    """Who holds the lock of a run, dead or alive; None where nobody does, or it can't be read."""
    try:
        found: Any = json.loads((run / LOCK).read_text(encoding="utf-8"))
        return Holder(int(found["pid"]), str(found["host"]), str(found["since"]), str(found["started"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def is_gone(held: Holder) -> bool:
    """Whether the holder is known to be dead. Of another host nothing can be known."""
    if held.host != platform.node():
        return False
    now = process_started(held.pid)
    return now is None or bool(now and held.started and now != held.started)


@contextmanager
def locked(run: Path, say: Callable[[str], object]) -> Generator[None]:
    """Hold the lock of a run; what a dead process left is taken over with a word.

    Raises:
        RunError: another process works on this run, or one of another host, of which nothing can be known, may.
    """
    path = run / LOCK
    mine = _me()
    with files.wrap_os_errors(path):
        # Looked at again when it is made: one that clears a dead lock may have taken this one away while it was empty.
        while not _made(path, mine) or holder(run) != mine:
            _clear(run, say)
    try:
        yield
    finally:
        if holder(run) == mine:
            path.unlink(missing_ok=True)


def refuse_in_use(run: Path) -> None:
    """Refuse a run on which a process works that isn't known to be dead.

    Raises:
        RunError: it and its host are named.
    """
    held = holder(run)
    if held is None or is_gone(held):
        return
    path = run / LOCK
    if held.host == platform.node():
        next = "wait until it has ended, or stop it: Ctrl-C where it runs"
        next += f", or kill {held.pid}" if os.name != "nt" else ""
    else:
        next = f"look there; if that process is gone, remove {path}"
    raise RunError(f"this run is in use by {held.in_words}", location=str(path), hint=next)


def _me() -> Holder:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return Holder(os.getpid(), platform.node(), since, process_started(os.getpid()) or "")


def _made(path: Path, mine: Holder) -> bool:
    """Make the lock, unless there is one."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, (json.dumps(asdict(mine)) + "\n").encode())
    except OSError:
        os.close(handle)
        path.unlink(missing_ok=True)
        raise
    os.close(handle)
    return True


def _clear(run: Path, say: Callable[[str], object]) -> None:
    """Take a lock out of the way whose process is gone, or refuse."""
    path = run / LOCK
    held = holder(run)
    if held is None:  # one being made at this moment, or what a kill at such a moment left
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < _WRITTEN_WITHIN_SECONDS:
                time.sleep(0.05)
            else:
                path.unlink()
                say("an empty lock, left by a kill, was removed")
        return
    refuse_in_use(run)
    # Two that find the same dead lock: a rename is won by one alone; the other has renamed the winner's, and puts it
    # back.
    aside = run / f".{LOCK}.{os.getpid()}"
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    taken = json.loads(aside.read_text(encoding="utf-8") or "null")
    if taken is not None and taken != asdict(held):
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.write(handle, (json.dumps(taken) + "\n").encode())
            os.close(handle)
    else:
        say(f"the lock of {held.in_words}, is taken over: that process is gone")
    aside.unlink()


# Whether a process lives, and since when ------------------------------------------------------------------------------


def process_started(pid: int) -> str | None:
    """When a process was started, in the system's own words; "" where it doesn't say, None where no such one lives."""
    if sys.platform == "win32":
        return _started_on_windows(pid)
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return None
    if sys.platform.startswith("linux"):
        return _started_on_linux(pid)
    asked = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def _started_on_linux(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # /proc may hide what belongs to others
        return ""
    # Fields 3 and 22 of proc_pid_stat(5): the state, and the start in ticks since the machine was booted.
    return None if fields[0] in "ZXx" else f"{boot} {fields[19]}"


def _started_on_windows(pid: int) -> str | None:
    import ctypes

    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009 (only there is it known)
    query, still_active = 0x1000, 259  # PROCESS_QUERY_LIMITED_INFORMATION, STILL_ACTIVE
    handle = kernel.OpenProcess(query, False, pid)
    if not handle:
        return "" if kernel.GetLastError() == 5 else None  # 5: it lives, and is somebody else's
    try:
        code = ctypes.c_ulong()
        if kernel.GetExitCodeProcess(handle, ctypes.byref(code)) and code.value != still_active:
            return None
        times = [ctypes.c_ulonglong() for _ in range(4)]
        told = kernel.GetProcessTimes(handle, *(ctypes.byref(value) for value in times))
        return str(times[0].value) if told else ""
    finally:
        kernel.CloseHandle(handle)


State = Literal["running", "finished", "ended early", "stopped", "crashed", "killed", "damaged"]
_OURS = ("recipe.toml", "env.json", LOG)
_MACHINE = ("device", "precision", "threads", "ranks")
_NOT_COMPARED = ("about", "preview", "name", "plan")  # the name stands in a column of its own


@dataclass(frozen=True)
class RunSummary:
    """What became of one run; None where its files don't say."""

    run: Path
    state: State
    problem: str = ""  # of a damaged one
    recipe: str = ""
    text: str = ""
    tokenizer: str = ""  # the first letters of its fingerprint
    tokenizer_kind: str = ""
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    loss: float | None = None  # of the last validation, like the next two
    accuracy: float | None = None
    bits_per_character: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worked_on: float = 0.0  # when its log was last written, in seconds of the system's clock
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # dotted key -> value


def runs_in(folder: Path) -> list[RunSummary]:
    """The runs in a folder, or the one that it is, newest first.

    Raises:
        RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError("there is no such folder", location=str(folder), hint="name the folder that your runs are in")
    places = [folder] if _is_run(folder) else [one for one in folder.iterdir() if one.is_dir() and _is_run(one)]
    found = [read_run(place) for place in places if not place.name.startswith(".") or place == folder]
    return sorted(found, key=lambda past: (-past.worked_on, past.run.name))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OURS)


def read_run(run: Path) -> RunSummary:
    """What became of a run; whatever is wrong with its files is told in it."""
    log = run / LOG
    worked_on = (log if log.is_file() else run).stat().st_mtime
    try:
        return _read(run, worked_on)
    except UnmaskError as error:
        return RunSummary(run, "damaged", problem=f"{error.message} ({error.location})", worked_on=worked_on)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # of another shape
        return RunSummary(run, "damaged", problem=f"{type(error).__name__}: {error}", worked_on=worked_on)


def _read(run: Path, worked_on: float) -> RunSummary:
    tree = load_toml(run / "recipe.toml")
    plan: Mapping[str, Any] = tree.get("plan", {})
    environment: Mapping[str, Any] = files.read_json(run / "env.json")
    lines = list(read_log(run / LOG))
    last: Mapping[str, Any] = lines[-1] if lines else {}
    validations = [line for line in lines if "validation" in line]
    losses = [(_number(line["validation"].get("loss")), int(line["step"])) for line in validations]
    judged = [(loss, step) for loss, step in losses if loss is not None]
    held: Mapping[str, Any] = validations[-1]["validation"] if validations else {}
    steps = sum(int(stage["steps"]) for stage in plan["stages"]) if plan else None
    step = int(last.get("step", 0))
    text: Mapping[str, Any] = environment["text"]
    names = ", ".join(Path(path).name for path in text["paths"]) or "in memory"
    machine = {f"machine.{name}": environment["determinism"].get(name) for name in _MACHINE}
    settings = {key: value for key, value in flattened(tree).items() if key.split(".")[0] not in _NOT_COMPARED}
    return RunSummary(
        run=run,
        state=_state(run, last, step, steps),
        recipe=str(tree.get("name", "")),
        text=names,
        tokenizer=str(text["tokenizer"])[:8],
        tokenizer_kind=str(settings.get("data.tokenizer.kind", "")),
        step=step,
        steps=steps,
        tokens=next((int(line["tokens"]) for line in reversed(lines) if "tokens" in line), None),
        seconds=next((_number(line["seconds"]) for line in reversed(lines) if "seconds" in line), None),
        loss=_number(held.get("loss")),
        accuracy=_number(held.get("accuracy")),
        bits_per_character=_number(held.get("bits_per_character")),
        best_loss=min(judged)[0] if judged else None,
        best_step=min(judged)[1] if judged else None,
        worked_on=worked_on,
        settings={"text": names, **settings, **machine},
    )


def _state(run: Path, last: Mapping[str, Any], step: int, steps: int | None) -> State:
    held = holder(run)
    if held is not None and not is_gone(held):
        return "running"  # or on another host, of which nothing else can be known
    if (run / CRASH).is_file():
        return "crashed"
    if "ended_early" in last:
        return "ended early"
    if held is not None:
        return "killed"
    return "finished" if steps is not None and step >= steps else "stopped"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def flattened(tree: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys; entries of a list of tables are numbered from 0."""
    return dict(_flat(tree, under))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in cast("Mapping[str, Any]", value).items():
            yield from _flat(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in cast("list[Any]", value)):
        for number, entry in enumerate(cast("list[Any]", value)):
            yield from _flat(entry, f"{key}.{number}")
    else:
        yield key, value


def differing(pasts: Sequence[RunSummary]) -> list[str]:
    """The settings in which whole runs differ, in the recipe's order; a run that lacks one differs by that."""
    whole = [past.settings for past in pasts if past.settings]
    keys = dict.fromkeys(key for settings in whole for key in settings)
    return [key for key in keys if any(settings.get(key) != whole[0].get(key) for settings in whole)]
