"""Random and damaged input: a small share of `make fuzz`, and bugs that are planted, which it finds."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
CASES = {"recipe": 12, "import": 3, "checkpoint": 6, "run": 12, "model": 10, "shards": 15}  # others: 25
SEED = 3
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def program() -> Any:
    specification = importlib.util.spec_from_file_location("fuzz", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(program: Any) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.tempfile, "tempdir", program.tempfile.tempdir)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("UNMASK_CACHE", "")  # the fixtures set their own
        with program.small_run() as fixtures:
            yield fixtures


def test_readers_raise_only_errors_for_the_user(program: Any, made: Any) -> None:
    accepted = refused = 0
    for target in program.targets_of(made):
        outcome = program.run_target(target, CASES.get(target.name, 25), SEED, [made.folder], 0)
        assert not outcome.findings, f"{target.name}: {outcome.findings}"
        assert outcome.accepted + outcome.refused > 0, target.name
        accepted, refused = accepted + outcome.accepted, refused + outcome.refused
    assert accepted > 20 and refused > 50


def read_with_key_error(case: Any, folder: Path) -> None:
    if b"fix" in case:
        raise KeyError("planted")


def read_forever(case: Any, folder: Path) -> None:
    while b"loop" in case:
        pass


def read_gigabytes(case: Any, folder: Path) -> None:
    bytearray(1 << 40)


def write_outside(case: Any, folder: Path) -> None:
    (Path(__file__).parent / "outside.txt").open("ab").close()


def start_program(case: Any, folder: Path) -> None:
    subprocess.run([sys.executable, "--version"], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (read_with_key_error, "KeyError"),
        (read_forever, "more than"),
        (read_gigabytes, "MemoryError"),
        (write_outside, "outside.txt"),
        (start_program, "subprocess.Popen"),
    ],
)
def test_a_planted_bug_is_found(program: Any, made: Any, monkeypatch: pytest.MonkeyPatch, read: Any, says: str) -> None:
    monkeypatch.setattr(program, "CASE_SECONDS", 0.2)
    recipes = program.targets_of(made)[0]
    texts = program.byte_edits().map(lambda edits: program.edited(b"a prefix, a loop and a suffix", edits))
    try:
        outcome = program.run_target(replace(recipes, cases=texts, read=read), 200, SEED, [made.folder], 0)
    finally:
        (Path(__file__).parent / "outside.txt").unlink(missing_ok=True)
    assert len(outcome.findings) == 1 and says in outcome.findings[0]


def test_a_process_that_is_aborted_is_a_finding(program: Any, made: Any) -> None:
    recipes = program.targets_of(made)[0]
    target = replace(recipes, read=lambda case, folder: os.kill(os.getpid(), signal.SIGKILL))
    outcome = program.run_apart(target, 10, SEED, [made.folder])
    (finding,) = outcome.findings
    assert finding.startswith("the process ended with code -9: ")
    assert len(finding) > 50, "the case is shown"
    assert program.run_apart(recipes, 5, SEED, [made.folder]).findings == []


def test_damage_of_every_file_is_detected_or_harmless(program: Any, made: Any) -> None:
    damage = program.run_damage(made, 2)
    missed = {name: row["missed"] for name, row in damage.items() if row.get(program.MISSED)}
    assert not missed
    detected = {name for name, row in damage.items() if row.get(program.DETECTED)}
    step = f"run/{made.step.name}"
    assert {f"{step}/model.safetensors", f"{step}/resume/optimizer.safetensors", "run/recipe.toml"} <= detected
    assert set(damage["run/log.jsonl"]) <= {program.DETECTED, program.SHOWN, program.EQUAL, "missed"}


def test_damage_that_no_reader_detects_is_reported(program: Any, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison of the recipe with its digest, a changed digit goes unnoticed."""
    monkeypatch.setattr(program, "check_unchanged", lambda folder: None)
    recipe = made.run / "recipe.toml"
    expected = program._opened_run(made, made.run)
    data = recipe.read_bytes()
    recipe.write_bytes(data.replace(b"seed = 17", b"seed = 16"))
    try:
        found, detail = program._damage_outcome(lambda: program._opened_run(made, made.run), expected, recipe)
    finally:
        recipe.write_bytes(data)
    assert found == program.MISSED and "recipe" in detail
