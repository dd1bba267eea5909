"""Folders with one changed key: each is read as transformers reads it, or refused with an error for the user."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "fuzz_import.py"
CASES = 120


@pytest.fixture(scope="module")
def program() -> Any:
    specification = importlib.util.spec_from_file_location("fuzz_import", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz_import"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_changed_folders(program: Any, tmp_path: Path) -> None:
    folders = program.write_folders(tmp_path)
    cases = program.all_cases(folders)
    assert len(cases) >= 5000
    sample = program.all_cases(folders, CASES)
    results = program.run(folders, sample)
    assert not [f"{kind}: {case} {detail}" for case, kind, detail in results if kind in program.WRONG]
    assert sum(kind == program.EQUAL for _, kind, _ in results) > CASES / 10


@pytest.mark.filterwarnings("ignore")
def test_unchanged_folders_are_equal(program: Any, tmp_path: Path) -> None:
    folders = program.write_folders(tmp_path)
    for folder in folders.values():
        assert program.outcome(folder, tmp_path / "out")[0] == program.EQUAL
