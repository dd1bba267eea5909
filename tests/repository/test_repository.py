"""The repository names no package index, has no lock file, and its Makefile and CI agree."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ["src", "tests", "docs", "benchmarks", ".ci"]
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ""}
# Put together here, so that this file does not hold what it looks for.
INDEX_WORDS = [
    "py" + "pi.",
    "/sim" + "ple",
    "--index" + "-url",
    "--extra-" + "index",
    "--find" + "-links",
    "find" + "-links",
    "download.py" + "torch",
    "test.py" + "pi",
    "ana" + "conda.org",
    "trusted" + "-host",
]
LOCKS = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "conda-lock.yml", "pylock.toml", "requirements.lock"}


def files() -> Iterator[Path]:
    """The files of the repository, without the environment and build products."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for name in FOLDERS:
        for folder, below, names in os.walk(ROOT / name):
            below[:] = [one for one in below if one != "__pycache__" and not one.endswith(".egg-info")]
            yield from (Path(folder) / one for one in names)


def test_nothing_names_a_package_index() -> None:
    for path in files():
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="ignore").lower()
            for word in INDEX_WORDS:
                assert word not in text, f"{path.relative_to(ROOT)} names where to install from: {word}"


def test_there_is_no_lock_file() -> None:
    assert [path for path in files() if path.name in LOCKS] == []


def test_constraints_are_exact_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*( ; .+)?", pin), pin


def test_every_direct_dependency_is_constrained_and_open_upwards() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constrained = {
        line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in wanted:
        if requirement.startswith("unmask["):  # the extras that the tests need
            continue
        name, bound = re.split(r"(?=>=)", re.sub(r"\[.*\]", "", requirement))  # without extras
        assert name in constrained, f"{name} has no tested version in constraints.txt"
        assert "<" not in bound and "==" not in bound, f"{name}: a cap belongs in constraints.txt"


def test_continuous_integration_runs_all_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert {"make test", "make test-slow"} <= set(script.read_text(encoding="utf-8").splitlines())
    assert os.access(script, os.X_OK)


def test_make_bench_requires_a_text() -> None:
    """The error comes before anything is installed."""
    quiet = {name: value for name, value in os.environ.items() if name not in ("TEXT", "MAKEFLAGS", "MAKELEVEL")}
    for arguments, says in (([], "make bench TEXT="), (["TEXT=no/such.txt"], "file not found: no/such.txt")):
        made = subprocess.run(
            ["make", "bench", *arguments], cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=60, check=False
        )
        assert made.returncode == 2 and says in made.stderr and not made.stdout
