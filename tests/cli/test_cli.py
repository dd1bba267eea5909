"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from unmask.cli import main
from unmask.cli.errors import handle_errors
from unmask.core.errors import CRASH_NOTE, Interrupted, Stopped

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
threads = 1
"""
TEXT = "The cat sat on the mat and the dog sat on the log. " * 60

Command = Callable[..., tuple[int, str, str]]


def process(*arguments: str, stdin: str = "", folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unmask", *arguments],
        capture_output=True, text=True, input=stdin, cwd=folder, timeout=120, check=False,
        env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip


@pytest.fixture
def unmask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in a temporary folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "cat.txt").write_text(TEXT)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


def test_help_needs_no_torch() -> None:
    script = "import sys; from unmask.cli import main; sys.argv = ['unmask', '--help']\ntry: main()\n"
    script += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False False"
    for command in ("pretrain", "fill", "evaluate", "demo", "recipe"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", ["pretrain", "fill", "evaluate", "demo", "recipe", "recipe show"])
def test_help_has_an_example(unmask: Command, command: str) -> None:
    code, out, _ = unmask(*command.split(), "--help")
    assert code == 0
    assert command == "recipe" or f"unmask {command} " in out.partition("Examples")[2]


def test_codes_and_streams_of_a_real_process(tmp_path: Path) -> None:
    version = process("--version")
    assert (version.returncode, version.stdout.split()[0]) == (0, "unmask")
    typo = process("pretrian", "x.txt")
    assert typo.returncode == 2 and "Did you mean 'pretrain'?" in typo.stderr and typo.stdout == ""
    missing = process("pretrain", "nothing.txt", folder=tmp_path)
    assert missing.returncode == 2 and "nothing.txt" in missing.stderr
    assert all("cores were busy" in line for line in missing.stdout.splitlines()), "at most a note about the load"
    assert missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_closed_pipe_is_no_error() -> None:
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w") as closed_pipe:
        result = subprocess.run(
            [sys.executable, "-m", "unmask", "recipe", "list"],
            stdout=closed_pipe, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "no text was given"),
        (["pretrain", "cat.txt", "--recipe", "tinny"], "did you mean `tiny`?"),
        (["pretrain", "cat.txt", "--recipe", "small.toml", "--budget", "20"], "needs a unit"),
        (["pretrain", "cat.txt", "--recipe", "small.toml", "--set", "train.bugdet=3 steps"], "did you mean `budget`?"),
        (["pretrain", "cat.txt", "--recipe", "small.toml", "--out", "small.toml"], "--resume"),
        (["pretrain", "cat.txt", "--resume", "run"], "TEXT can't be combined with --resume"),
        (["pretrain", "--resume", "run", "--seed", "3"], "--seed can't be combined with --resume"),
        (["pretrain", "--resume", "nowhere"], "not a run"),
        (["pretrain", "cat.txt", "--text", "cat.txt"], "--text needs --resume"),
        (["pretrain", "cat.txt", "--allow-different-environment"], "--resume RUN"),
        (["pretrain", "cat.txt", "--threads", "0"], "--threads"),
        (["fill", "nowhere", "a [MASK]"], "the path doesn't exist"),
        (["fill", "nowhere", "--file", "nothing.txt"], "nothing.txt"),
        (["evaluate", "nowhere", "--text", "cat.txt"], "the path doesn't exist"),
        (["recipe", "check", "nothing.toml"], "unknown recipe"),
        (["recipe", "show", "tiny", "--set", "stage.7.max_seq_len=3"], "stage.7"),
    ],
)
def test_user_errors_exit_with_2(unmask: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = unmask(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err and out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.txt", "small.toml"]


def test_debug_shows_the_traceback(unmask: Command) -> None:
    assert "Traceback" in unmask("recipe", "show", "tinny", "--debug")[2]
    assert "Traceback" in unmask("--debug", "recipe", "show", "tinny")[2]


def test_recipes_are_listed_shown_and_checked(unmask: Command) -> None:
    code, out, _ = unmask("recipe", "list", "--json")
    assert code == 0 and {"tiny", "char", "seed"} <= {entry["name"] for entry in json.loads(out)}
    code, out, _ = unmask("recipe", "show", "small.toml", "--set", "seed=5", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["seed"] == 5 and shown["model"]["num_hidden_layers"] == 1 and shown["name"] == "small"
    assert unmask("recipe", "check", "small.toml")[0] == 0


def test_a_dry_run_writes_nothing(unmask: Command, tmp_path: Path) -> None:
    code, out, err = unmask("pretrain", "cat.txt", "--recipe", "small.toml", "--dry-run", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["run"] is None and result["forecast"]["parameters"] > 0 and "parameters" in err
    assert not (tmp_path / "runs").exists()


def test_from_text_to_a_filled_mask(unmask: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = unmask(
        "pretrain", "cat.txt", "--recipe", "small.toml", "--budget", "4 steps", "--set", "train.budget=9 steps"
    )
    assert code == 0
    assert "step 4/4" in out, "an explicit flag beats --set"
    assert "unmask fill runs/small-1" in out.partition("next:")[2]
    assert "\x1b" not in out

    code, out, _ = unmask("fill", "runs/small-1", "The c[MASK]t s[MASK]t.", "--top", "3", "--json")
    (answer,) = json.loads(out)
    assert code == 0 and answer["text"] == "The c[MASK]t s[MASK]t." and len(answer["masks"]) == 2
    first = answer["masks"][0]["candidates"][0]
    assert set(first) == {"token_str", "id", "score", "sequence", "shown"} and "[MASK]" in first["sequence"]

    (tmp_path / "batch.txt").write_text("The d[MASK]g\n\nth[MASK]\n")
    code, out, _ = unmask("fill", "runs/small-1", "--file", "batch.txt", "--top", "1", "--json")
    assert code == 0 and [one["text"] for one in json.loads(out)] == ["The d[MASK]g", "", "th[MASK]"]
    code, out, _ = unmask("fill", "runs/small-1", "a[MASK]", "--top", "2")
    assert code == 0 and out.startswith("a[MASK]\n") and out.count("%") == 2
    (tmp_path / "broken.txt").write_bytes(b"ab\xff[MASK]\n")
    code, _, err = unmask("fill", "runs/small-1", "--file", "broken.txt")
    assert code == 2 and "byte 2" in err

    code, out, _ = unmask("evaluate", "runs/small-1", "--text", "cat.txt", "--document", "file", "--json")
    assert code == 0 and {"loss", "accuracy", "bits_per_character", "masked_tokens"} <= set(json.loads(out))

    code, out, _ = unmask("pretrain", "--resume", "runs/small-1")
    assert code == 0 and "finished" in out
    code, out, _ = unmask("pretrain", "--resume", "runs/small-1", "--budget", "+2 steps", "--json")
    assert code == 0 and json.loads(out)["summary"]["steps"] == 6
    code, out, _ = unmask("pretrain", "cat.txt", "--recipe", "small.toml", "--quiet")
    assert (code, out) == (0, "runs/small-2\n")


def test_standard_input_is_filled_line_by_line(unmask: Command, tmp_path: Path) -> None:
    assert unmask("pretrain", "cat.txt", "--recipe", "small.toml", "--out", "run", "--quiet")[0] == 0
    result = process("fill", "run", "--json", stdin="The c[MASK]t\n\n[MASK]og\n", folder=tmp_path)
    assert result.returncode == 0
    assert [one["text"] for one in json.loads(result.stdout)] == ["The c[MASK]t", "", "[MASK]og"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Stopped(130, "runs/my run", 1200), 130, "unmask pretrain --resume 'runs/my run'"),
        (Stopped(75, "runs/a", 3), 75, "saved at step 3"),
        (Interrupted(130), 130, "nothing was written"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("division by zero"), 1, "internal error: ZeroDivisionError: division by zero"),
    ],
)
def test_exit_codes_of_errors(capfd: pytest.CaptureFixture[str], error: BaseException, code: int, message: str) -> None:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        handle_errors(command)()
    assert ended.value.exit_code == code
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err


def test_an_internal_error_names_the_file_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        error = RuntimeError("no")
        error.add_note(f"{CRASH_NOTE}runs/a/crash.txt")
        raise error

    with pytest.raises(typer.Exit):
        handle_errors(command)()
    assert "runs/a/crash.txt" in capfd.readouterr().err
