"""Only one process works on a run at a time; the lock of a dead process is taken over."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmask.core.errors import DamagedError, RunError
from unmask.core.files import RunLayout
from unmask.training.runs import check_not_in_use, is_in_use, run_lock

HOLD = """
import sys
from pathlib import Path
from unmask.training.runs import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lock of tmp_path until a line is sent to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["log.jsonl", "discarded.jsonl", "crash.txt", "lock", "tensorboard", "wandb"])
def test_a_run_writes_through_no_link(tmp_path: Path, name: str) -> None:
    """A run from elsewhere could so append lines to a start-up script of a shell."""
    run, outside = tmp_path / "run", tmp_path / ".bashrc"
    run.mkdir()
    for target in (outside, tmp_path / "missing"):
        outside.write_text("keep\n")
        (run / name).symlink_to(target)
        with pytest.raises(RunError, match="would write through this symbolic link") as caught, run_lock(run):
            pass
        assert caught.value.location == str(run / name) and caught.value.hint
        (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(RunError, match="no regular file"), run_lock(run):
        pass
    if name == "lock":
        with pytest.raises(DamagedError, match="a device or a pipe"):
            is_in_use(run)
    assert outside.read_text() == "keep\n" and not (tmp_path / "missing").exists()


def test_a_run_in_use_is_refused_with_process_host_and_time(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    before = (tmp_path / RunLayout.LOCK).read_text()
    with (
        pytest.raises(RunError, match=f"process {holder.pid} on {platform.node()}, since 2") as caught,
        run_lock(tmp_path),
    ):
        pass
    assert f"remove {tmp_path / RunLayout.LOCK}" in caught.value.hint
    with pytest.raises(RunError, match=f"process {holder.pid}"):
        check_not_in_use(tmp_path)
    assert (tmp_path / RunLayout.LOCK).read_text() == before
    holder.communicate("end\n")
    assert not (tmp_path / RunLayout.LOCK).exists(), "the lock is released at the end"
    with run_lock(tmp_path):
        assert is_in_use(tmp_path), "its own process is alive"
    check_not_in_use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_with_a_message(
    tmp_path: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    before = (tmp_path / RunLayout.LOCK).read_text()
    assert not is_in_use(tmp_path) and (tmp_path / RunLayout.LOCK).read_text() == before, "a look changes nothing"
    with caplog.at_level(logging.INFO, "unmask"), run_lock(tmp_path):
        assert (tmp_path / RunLayout.LOCK).read_text().splitlines()[0] == str(os.getpid())
    (message,) = caplog.messages
    assert f"took over the lock of process {holder.pid} on {platform.node()}" in message
    assert not list(tmp_path.iterdir())


def test_a_later_process_with_the_same_number_is_not_the_owner(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Process numbers are reused: the recorded process lives, but it started at another time."""
    pid, host, start = (tmp_path / RunLayout.LOCK).read_text().splitlines()
    (tmp_path / RunLayout.LOCK).write_text(f"{pid}\n{host}\n{int(start) + 1}\n")
    assert not is_in_use(tmp_path)
    (tmp_path / RunLayout.LOCK).write_text(f"{pid}\n{host}\n")
    assert is_in_use(tmp_path), "without a start time a living process counts as the owner"
    (tmp_path / RunLayout.LOCK).write_text(f"{pid}\n{host}\n{start}\n")


def test_the_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / RunLayout.LOCK).write_text("1\nanother-host\n5\n")
    with pytest.raises(RunError, match="process 1 on another-host") as caught, run_lock(tmp_path):
        pass
    assert f"remove {tmp_path / RunLayout.LOCK}" in caught.value.hint and is_in_use(tmp_path)


def test_a_lock_that_names_no_process_is_never_taken_over(tmp_path: Path) -> None:
    """A kill between creating and writing the file leaves it empty."""
    (tmp_path / RunLayout.LOCK).touch()
    os.utime(tmp_path / RunLayout.LOCK, (1, 1))
    with pytest.raises(RunError, match="in use by an unknown process") as caught, run_lock(tmp_path):
        pass
    assert f"remove {tmp_path / RunLayout.LOCK}" in caught.value.hint


def test_only_one_process_takes_over_a_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    contend = """
import sys
from pathlib import Path
from unmask.core.errors import RunError
from unmask.training.runs import run_lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with run_lock(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.readline()
except RunError:
    print("refused", flush=True)
"""
    command = [sys.executable, "-c", contend, str(tmp_path)]
    processes = [subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:
        process.communicate("end\n")
    assert sorted(results) == ["locked\n", "refused\n", "refused\n"]
    assert not list(tmp_path.iterdir())
