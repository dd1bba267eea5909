"""No module reads or writes a pickle: loading a model must not run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "unmask"
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.hub.load", "np.load", "numpy.load"}
# These send objects between ranks as pickles.
UNSAFE_NAMES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "allow_pickle"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in UNSAFE_MODULES:
                yield node.module
            yield from (alias.name for alias in node.names if f"{node.module}.{alias.name}" in UNSAFE_CALLS)
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in UNSAFE_CALLS or node.attr in UNSAFE_NAMES):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
            yield node.id


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_module_reads_or_writes_a_pickle(path: Path) -> None:
    assert list(unsafe(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_search_finds_what_it_looks_for() -> None:
    for text in [
        "import pickle",
        "from torch import load",
        "torch.load(x)",
        "from dill import loads",
        "d.gather_object(x)",
    ]:
        assert list(unsafe(ast.parse(text))), text
