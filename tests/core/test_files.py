"""Files and directories are written completely or not at all; damage is found and named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from unmask.core import files
from unmask.core.errors import DamagedError, StoreError


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with files.atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with files.atomic_directory(target) as folder:
        (folder / "b").write_text("2")
    assert sorted(file.name for file in target.iterdir()) == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    """A directory named "*" leaves the half-written directories of other names alone."""
    foreign = tmp_path / ".other.aside-123"
    foreign.mkdir()
    for name in ("*", "[a]", "a?"):
        with files.atomic_directory(tmp_path / name) as folder:
            (folder / "file").write_text(name)
        assert (tmp_path / name / "file").read_text() == name
    assert foreign.is_dir()
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        half, left = tmp_path / f".x.aside-{running.pid}", tmp_path / ".x.aside-old"
        half.mkdir()
        left.mkdir()
        with files.atomic_directory(tmp_path / "x"):
            pass
        assert half.is_dir(), "its process still writes it"
    finally:
        running.communicate(b"\n")
    with files.atomic_directory(tmp_path / "x"):
        pass
    assert not half.exists()


def test_the_longest_name(tmp_path: Path) -> None:
    for name in ("x" * 255, "고" * 85):
        with files.atomic_directory(tmp_path / name) as folder:
            (folder / "a").write_text("old")
        with files.atomic_directory(tmp_path / name) as folder:
            (folder / "a").write_text("new")
        assert (tmp_path / name / "a").read_text() == "new"
        files.write_text(tmp_path / f"y{name[1:]}", "text")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits to set")
    files.write_text(tmp_path / "recipe.toml", "old")
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, allowed[1]))
    try:
        with pytest.raises(StoreError, match="File too large"):
            files.write_text(tmp_path / "recipe.toml", "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("recipe.toml", "old")]


def test_an_error_keeps_the_old_directory(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_kill_keeps_the_old_directory_and_the_next_write_cleans_up(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    program = (
        "import os, signal, sys; from pathlib import Path; from unmask.core import files\n"
        "with files.atomic_directory(Path(sys.argv[1])) as f:\n"
        "    (f / 'a').write_text('new'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x" / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with files.atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_manifest_names_the_damaged_file(tmp_path: Path, harm: str) -> None:
    victim = tmp_path / "ids"
    victim.write_bytes(bytes(range(256)) * 40)
    (tmp_path / "other").write_text("fine")
    files.write_manifest(tmp_path)
    files.verify_manifest(tmp_path)
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[777] ^= 4
        victim.write_bytes(data)
    elif harm == "cut":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    with pytest.raises(DamagedError, match="ids"):
        files.verify_manifest(tmp_path)


def test_a_pointer_is_replaced_atomically(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.write_pointer(tmp_path / "latest", name)
        assert os.readlink(tmp_path / "latest") == name


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        files.write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(StoreError), files.atomic_directory(tmp_path / "file" / "below"):
        pass


def test_truncated_json_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(DamagedError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(DamagedError, match=r"b\.json"):
        files.read_json(tmp_path / "b.json")


def test_check_writable_leaves_nothing(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    with pytest.raises(StoreError, match="too long"):
        files.check_writable(tmp_path / "a" / ("x" * 300))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_store_error(tmp_path: Path) -> None:
    """Errors that safetensors wraps are reported like those of the system; the old directory is intact."""
    resource = pytest.importorskip("resource")
    with files.atomic_directory(tmp_path / "step") as folder:
        (folder / "a").write_text("1")
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, allowed[1]))
    try:
        with pytest.raises(StoreError, match="free disk space"), files.atomic_directory(tmp_path / "step") as folder:
            save_file({"much": np.zeros(10_000)}, folder / "b.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert [file.name for file in (tmp_path / "step").iterdir()] == ["a"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The next write first restores the old directory."""
    aside = tmp_path / ".x.aside-old"
    aside.mkdir()
    (aside / "a").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "x"):
        raise RuntimeError
    assert (tmp_path / "x" / "a").read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["x"]
