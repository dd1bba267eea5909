"""The command line in this process, in a temporary folder, and a small finished run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from unmask.cli import main
from unmask.training.pretrain import launch

SMALL = """\
about = "Small enough for a test."
[data]
document = "file"
held_out = { method = "tail", fraction = "10%" }
tokenizer = { kind = "characters" }
[model]
kind = "modernbert"
num_hidden_layers = 1
hidden_size = 16
num_attention_heads = 2
intermediate_size = 16
[[stage]]
max_seq_len = 32
batch_size = "8 texts"
[train]
budget = "3 steps"
every = { log = "1 steps", validate = "2 steps", save = "2 steps" }
threads = 1
"""
TEXT = "The cat sat on the mat and the dog sat on the log. " * 60

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def contents(folder: Path) -> Mapping[str, bytes | str]:
    """Map every path below a folder to its bytes, or to the target of a link."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "a folder"
        for path in folder.rglob("*")
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with cat.txt and small.toml in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "cat.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def unmask(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


@pytest.fixture
def refused(unmask: Command, place: Path) -> Refused:
    """A command that ends with a user error: exit 2, a message with a hint, no traceback, no file changed."""

    def run(*arguments: str, says: str | tuple[str, ...]) -> str:
        before = contents(place)
        code, _, err = unmask(*arguments)
        assert code == 2, err
        assert err.startswith("error: ") and "Traceback" not in err
        assert "  hint: " in err, "a message ends with a hint"
        for words in (says,) if isinstance(says, str) else says:
            assert words in " ".join(err.split()), err
        assert contents(place) == before
        return err

    return run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of small.toml; read-only."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.toml").write_text(SMALL)
    (folder / "cat.txt").write_text(TEXT)
    run = folder / "run"
    launch([folder / "cat.txt"], recipe=folder / "small.toml", out=run)
    return run


@pytest.fixture
def run(small_run: Path, place: Path) -> Path:
    """A copy of `small_run` in the working folder, which a test may damage."""
    return Path(shutil.copytree(small_run, place / "run", symlinks=True))
