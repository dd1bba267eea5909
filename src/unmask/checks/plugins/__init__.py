"""Room card: a kind from outside, judged by the laws of its role.

Comes in: "package.module:Name", its settings, for a source the paths that it shall read. Goes out: Checked: a verdict
by each law, one of them reached in a process of its own. Called by: cli, docs, tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from unmask.checks.plugins.fixtures import cutter_cases, objective_subject, objective_tools
from unmask.checks.plugins.runner import Check, CheckResult, require, run_checks
from unmask.checks.plugins.second_process import result_digest
from unmask.checks.plugins.suites import CUTTER_LAWS, OBJECTIVE_LAWS, SOURCE_LAWS, SamplerFixture, SourceFixture
from unmask.core.config import Tree, apply_set, build_plugin, dump_config
from unmask.core.errors import RecipeError
from unmask.core.plugins import PLUGIN_TYPES, PluginConfig, describe, find, make
from unmask.core.types import Objective, Sampler, SamplerContext, Source, SourceContext

_CHILD: Final = "from unmask.checks.plugins.second_process import answer_parent; answer_parent()"
_CHILD_SECONDS: Final = 300
_ALIKE: Final = "another process gives the same"


@dataclass(frozen=True)
class CheckReport:
    """What the laws say of a kind from outside."""

    role: str
    kind: str
    notes: str  # where its code lies
    settings: str  # as TOML
    results: Sequence[CheckResult]

    @property
    def passed(self) -> bool:
        """Whether every law is kept."""
        return all(verdict.passed for verdict in self.results)


def role_of(kind: str) -> str:
    """What the class that a kind names claims to be, by its methods.

    Raises:
        RecipeError: it can't be imported, or has the methods of no role.
    """
    cls = find(kind, PluginConfig)
    for name, role in PLUGIN_TYPES.items():
        if all(callable(getattr(cls, method, None)) for method in role.methods):
            return name
    wanted = "; ".join(f"{role.role}: {' and '.join(role.methods)}" for role in PLUGIN_TYPES.values())
    raise RecipeError(
        f"`{kind}` has the methods of no role",
        location=kind,
        hint=f"write the methods of what it shall be ({wanted}), or name it, as in --role sampler",
    )


def check_plugin(name: str, settings: Sequence[str] = (), paths: Sequence[Path] = (), role: str = "") -> CheckReport:
    """Judge a kind from outside by the laws of its role.

    Args:
        kind: "package.module:Name".
        settings: `key=value` texts, as they would stand in the recipe's table.
        paths: what a source shall read.
        role: "objective", "sampler" or "source"; told by the class's methods where it isn't given.

    Raises:
        RecipeError: it can't be imported or made, is nothing that a role asks for, or a setting is wrong.
    """
    tree: Tree = {"kind": name}
    for text in settings:
        tree = apply_set(tree, text)
    whole = tuple(path.absolute() for path in paths)
    outside = build_plugin(PLUGIN_TYPES[role or role_of(name)], tree, name, settings)
    if whole and outside.role != "source":
        raise RecipeError(f"TEXT is for sources, and `{name}` is a {outside.role}", hint="leave TEXT out")
    with _one_thread(), _judged(outside, whole) as verdicts:  # a source's changed files last as long as this block
        return CheckReport(
            outside.role, name, describe(outside), dump_config(outside), [*verdicts, _alike(outside, whole)]
        )


@contextmanager
def _one_thread() -> Generator[None]:
    """Matrices this small are slower on several threads, by ten times where other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _judged(outside: PluginConfig, paths: tuple[Path, ...]) -> Generator[list[CheckResult]]:
    if outside.role == "objective":
        objective: Objective = make(outside, objective_tools())
        yield run_checks(OBJECTIVE_LAWS, objective_subject(objective))
    elif outside.role == "sampler":

        def cutter_of(tools: SamplerContext) -> Sampler:
            return make(outside, tools)

        cases = cutter_cases()
        cutter_of(cases[0])  # what can't be made at all is one error and not one by each law
        yield run_checks(CUTTER_LAWS, SamplerFixture(cutter_of, cases))
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(outside, SourceContext(paths))
            yield run_checks(SOURCE_LAWS, SourceFixture(*_variants(outside, paths, Path(folder))))


Made = Callable[[], Source]


def _variants(outside: PluginConfig, paths: tuple[Path, ...], folder: Path) -> tuple[Made, list[tuple[str, Made]]]:
    """A way to make the source, and ways to make it with one setting or one text changed."""

    def made(settings: Any, read: tuple[Path, ...]) -> Made:
        return lambda: make(dataclasses.replace(outside, settings=settings), SourceContext(read))

    others: list[tuple[str, Made]] = []
    for field in dataclasses.fields(outside.settings):
        value = getattr(outside.settings, field.name)
        changed = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else value
        if changed != value:
            try:
                settings = dataclasses.replace(outside.settings, **{field.name: changed})
            except Exception:  # its own __post_init__ refuses the value, in whatever way
                continue
            others.append((f"{field.name} = {changed}", made(settings, paths)))
    for number, path in enumerate(path for path in paths if path.is_file()):
        lines = path.read_bytes().splitlines()
        longer = folder / f"{number}-{path.name}"
        longer.write_bytes(b"\n".join([*lines, *lines[-1:], b""]))  # its last line once more, so that it stays a table
        swapped = tuple(longer if one == path else one for one in paths)
        others.append((f"one line more in {path.name}", made(outside.settings, swapped)))
    return made(outside.settings, paths), others


# Another process ----------------------------------------------------------------------------------------------------


def _alike(outside: PluginConfig, paths: tuple[Path, ...]) -> CheckResult:
    """Whether a process of its own, in which Python's hashes are salted otherwise, gets the same results."""

    def test(asked: PluginConfig) -> None:
        task = {
            "role": asked.role,
            "toml": dump_config(asked),
            "paths": [str(path) for path in paths],
            "path": sys.path,
        }
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(task),
            env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=_CHILD_SECONDS,
            check=False,
        )
        lines = done.stderr.strip().splitlines()
        require(done.returncode == 0, f"the other process ended with an error: {lines[-1] if lines else 'none told'}")
        here, there = result_digest(asked, paths), done.stdout.split()[-1]
        require(
            here == there,
            "a new Python got another result: does it use hash(), a set's order, the time or the process?",
        )

    law: Check[PluginConfig] = Check(
        _ALIKE, "A new Python gets the same result: a run must go on in another process.", test
    )
    return run_checks([law], outside)[0]
