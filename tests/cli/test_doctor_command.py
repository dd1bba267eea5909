"""`unmask doctor`: what it prints, exit codes, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def test_a_text_is_examined_with_a_budget(unmask: Command, place: Path) -> None:
    settings = ("--recipe", "small.toml", "--budget", "900 steps", "--document", "blank-line")
    code, out, _ = unmask("doctor", "cat.txt", *settings, "--json")
    findings = {found["name"]: found for found in json.loads(out)["findings"]}
    assert code == 0 and json.loads(out)["target"] == ["cat.txt"]
    assert findings["documents"]["figure"] == "the text is a single document"
    budget = findings["budget"]
    assert budget["severity"] == "problem" and budget["values"]["steps"] == 900 and budget["values"]["epochs"] > 40
    assert budget["command"] == 'unmask pretrain cat.txt --budget "20 epochs"'
    code, plain, _ = unmask("doctor", "cat.txt", *settings, "--strict")
    assert code == 1, "a problem, with --strict"
    lines = plain.splitlines()
    number = next(number for number, line in enumerate(lines) if line.startswith("problem   budget"))
    assert any(line == f"{' ' * 10}{budget['command']}" for line in lines[number:])
    assert lines[-1] == "1 problem, 2 notes, 11 ok"
    out = unmask("doctor", "cat.txt", "--recipe", "small.toml", "--budget", "0.001 s")[1]
    assert "problem   budget" in out and "too short" in out and '--budget "0.001 s" --dry-run' in out
    assert not (place / "runs").exists(), "nothing is written"


def test_a_run_is_examined(unmask: Command, run: Path) -> None:
    code, out, _ = unmask("doctor", "run")
    assert code == 0 and out.startswith("ok        state")
    assert "problem   unigram line" in out and "+3 steps" in out, "three steps learn nothing"
    (run / "log.jsonl").unlink()
    code, out, _ = unmask("doctor", "run", "--strict")
    assert code == 1 and "log.jsonl is missing" in out and "unmask pretrain --resume run" in out


@pytest.mark.parametrize("content", [b"The cat sat on the mat.\n" * 60, "Die Katze saß.\n".encode("latin-1") * 60])
def test_standard_input_is_read_several_times(
    unmask: Command, place: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    settings = ("--recipe", "small.toml", "--budget", "4 steps", "--document", "line", "--errors", "strict")
    code, out, err = unmask("doctor", "-", *settings, "--json")
    assert code == 0, err
    findings = {found["name"]: found for found in json.loads(out)["findings"]}
    if content.isascii():
        assert findings["budget"]["values"]["steps"] == 4
    else:
        assert findings["encoding"]["severity"] == "problem" and findings["amount"]["values"]["characters"] > 800


def test_what_can_t_be_examined_is_refused(refused: Refused, run: Path, place: Path) -> None:
    refused("doctor", "nothing.txt", says="no such file")
    refused("doctor", "run", "cat.txt", says="a run is examined alone")
    refused("doctor", "cat.txt", "--budget", "soon", says=("not a quantity", "--budget soon"))
    refused("doctor", "run", "--budget", "10 min", says="--budget can't be combined with a run")
    refused("doctor", ".", says=("this folder contains runs", "unmask doctor run"))
    refused("doctor", "run/best", says=("this is a model", f"unmask doctor {run}"))
    for line in ("nothing", "[" * 100_000, '{"step": true}'):
        (run / "log.jsonl").write_text(f'{line}\n{{"step": 1}}\n')
        refused("doctor", "run", says=("invalid log line", "line 1"))
    (run / "env.json").unlink()
    refused("doctor", "run", says="env.json")
