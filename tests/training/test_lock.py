"""One process works on a run at a time; a lock whose process is gone is taken over."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from unmask.core.errors import RunError
from unmask.training.runs import LOCK, Holder, holder, is_gone, locked, process_started, refuse_in_use

HOLDS = """
import sys
from pathlib import Path
from unmask.training.runs import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lock of tmp_path until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_run_in_use_is_refused_with_process_host_and_time(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(RunError, match=f"process {other.pid} on {platform.node()}, since 2") as caught,
        locked(tmp_path, print),
    ):
        pass
    assert f"kill {other.pid}" in caught.value.hint and (tmp_path / LOCK).is_file()
    other.communicate("end\n")
    assert not (tmp_path / LOCK).exists(), "it goes with the work"
    with locked(tmp_path, print):
        assert holder(tmp_path) and not is_gone(holder(tmp_path))
    refuse_in_use(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_with_a_word(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert f"process {other.pid}" in said[0] and "taken over" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_later_process_with_the_same_number_is_no_holder(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    """A number is given again: this process lives, but was not started when the holder was."""
    held = holder(tmp_path)
    assert held and held.started and not is_gone(held)
    assert is_gone(replace(held, started=f"{held.started} and later"))
    assert not is_gone(replace(held, started="")), "where the system doesn't say, a living number counts"


def test_of_another_host_nothing_is_known(tmp_path: Path) -> None:
    elsewhere = Holder(1, "another-host", "2026-01-01 00:00:00+00:00", "x")
    (tmp_path / LOCK).write_text(json.dumps(asdict(elsewhere)))
    with pytest.raises(RunError, match="another-host") as caught, locked(tmp_path, print):
        pass
    assert f"remove {tmp_path / LOCK}" in caught.value.hint


def test_an_empty_lock_of_a_kill_is_removed_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    os.utime(tmp_path / LOCK, (1, 1))
    said: list[str] = []
    with locked(tmp_path, said.append):
        pass
    assert "left by a kill" in said[0]


def test_only_one_of_many_gets_a_dead_lock(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    left = Holder(int(dead.stdout), platform.node(), "2026-01-01 00:00:00+00:00", "x")
    (tmp_path / LOCK).write_text(json.dumps(asdict(left)))
    assert is_gone(left) and process_started(left.pid) is None
    contend = """
import sys
from pathlib import Path
from unmask.core.errors import RunError
from unmask.training.runs import locked
sys.stdin.readline()
try:
    with locked(Path(sys.argv[1]), lambda sentence: None):
        print("got it", flush=True)
        sys.stdin.readline()
except RunError:
    print("refused", flush=True)
"""
    command = [sys.executable, "-c", contend, str(tmp_path)]
    many = [subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for one in many:
        assert one.stdin
        one.stdin.write("go\n")
        one.stdin.flush()
    told = [one.stdout.readline() for one in many if one.stdout]
    for one in many:
        one.communicate("end\n")
    assert sorted(told) == ["got it\n", "refused\n", "refused\n"]
    assert not list(tmp_path.iterdir())
