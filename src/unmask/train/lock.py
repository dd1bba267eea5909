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
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask import store
from unmask.errors import RunError

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
    with store.saying_where(path):
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
    raise RunError(f"this run is in use by {held.in_words}", where=str(path), next=next)


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
