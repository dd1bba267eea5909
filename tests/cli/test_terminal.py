"""The command in a narrow terminal, without colors, in a dumb terminal, and completion in a shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9)\d")


def in_terminal(arguments: Sequence[str], columns: int, folder: Path, **environment: str) -> str:
    """What a command writes to a pseudo-terminal of this width."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    main, terminal = pty.openpty()
    size = b"".join(number.to_bytes(2, sys.byteorder) for number in (30, columns, 0, 0))  # struct winsize
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "unmask", *arguments],
        stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder,
        env={**kept, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(terminal)
    output = b""
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        output += data
    os.close(main)
    assert process.wait() == 0, output.decode()
    return output.decode()


RUN = ("pretrain", "cat.txt", "--recipe", "small.toml", "--set", "train.report=false", "--out")


@pytest.mark.parametrize(("columns", "variables"), [(40, {}), (60, {"NO_COLOR": "1"})])
def test_a_run_fits_a_narrow_terminal(place: Path, columns: int, variables: dict[str, str]) -> None:
    output = in_terminal([*RUN, "narrow"], columns, place, **variables)
    lines = [ESCAPE.sub("", line).rstrip() for part in output.split("\r\n") for line in part.split("\r")]
    lines = lines[: next(number for number, line in enumerate(lines) if line == "next:")]
    assert max(map(cell_len, lines)) <= columns
    bars = [line for line in lines if "━" in line and "step" in line]
    assert bars and all("step " in bar and "ETA" in bar for bar in bars), "the bar gives way to the numbers"
    assert any(line.startswith("stage 1") for line in lines), "the table of the stages is too wide"
    assert bool(COLOR.search(output)) != bool(variables)
    assert ("[correct] {wrong" in "".join(lines)) == bool(variables), "without colors, brackets mark predictions"


def test_a_dumb_terminal_gets_plain_lines(place: Path) -> None:
    output = in_terminal([*RUN, "dumb"], 80, place, TERM="dumb")
    assert not ESCAPE.search(output) and "step 3/3 100%" in output and "━" not in output


# Completion -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(place: Path) -> Path:
    """A folder with two runs, a model, a folder that is neither, and texts."""
    for name in ("runs/notes", "runs/law", "exported", "other"):
        (place / name).mkdir(parents=True)
    for name in ("runs/notes/recipe.toml", "runs/law/recipe.toml", "exported/config.json", "other/notes.txt"):
        (place / name).touch()
    return place


def shell(program: str, script: str, folder: Path) -> list[str]:
    """The lines that a script of a shell prints; `unmask` is the command of this environment."""
    if not shutil.which(program):
        pytest.skip(f"{program} is missing")
    (folder / "bin").mkdir()
    command = folder / "bin" / "unmask"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m unmask "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(
        [program, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()


BASH = """
source <(unmask --show-completion bash)
ask() { COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _unmask_completion unmask; echo "${COMPREPLY[*]}"; }
ask unmask fin
ask unmask fill ""
ask unmask fill ex
ask unmask pretrain --recipe bert-m
ask unmask pretrain --recipe sm
ask unmask pretrain ca
complete -p unmask
"""
FISH = """
unmask --show-completion fish | source
for words in "unmask fin" "unmask fill " "unmask fill ex" "unmask pretrain --recipe bert-m"
    complete -C $words | string replace --regex '\\s.*' '' | string join ' '
end
"""
ANSWERS = ["finetune", "exported runs/law runs/notes", "exported", "bert-medium bert-mini bert-mini-pairs"]


def test_bash_completes_commands_runs_and_recipes(desk: Path) -> None:
    *lines, rule = shell("bash", BASH, desk)
    assert lines[:4] == ANSWERS and lines[4] == "small.toml"
    assert lines[5] == "" and "-o default" in rule, "bash offers files where unmask has no names"


def test_fish_completes_commands_runs_and_recipes(desk: Path) -> None:
    assert shell("fish", FISH, desk) == ANSWERS


def test_zsh_gets_the_names_as_arguments(desk: Path) -> None:
    def answer(words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "unmask"], cwd=desk, capture_output=True, text=True, timeout=60, check=True,
            env={**os.environ, "_UNMASK_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words},
        )  # fmt: skip
        return done.stdout.strip()

    assert answer("unmask fill run") == """_arguments '*: :(("runs/law"\n"runs/notes"))'"""
    assert answer("unmask pretrain ca") == "_files"
