"""Limits on the length of files and functions and on the number of parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "unmask"
MODULES = sorted(SOURCE.rglob("*.py"))
CROWDED = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_has_a_name_and_a_length_that_one_can_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 700, "a file stays under 700 lines"
    assert path.stem not in CROWDED, "a module is named for what it holds"


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_function_is_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        assert lines < 80, f"{node.name} has {lines} lines; 79 are allowed"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        # A command's parameters are its options: the reader of a command line counts them in --help, not here.
        if "cli" not in path.relative_to(SOURCE).with_suffix("").parts:
            assert count <= 8, f"{node.name} takes {count} parameters; eight are allowed"
