"""Nothing reads or writes a pickle, evaluates text, or trusts code of a model: loading a model must not run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for name in ("src", "benchmarks", "tests") for path in (ROOT / name).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.hub.load"}
ARRAY_CALLS = {"np.load", "numpy.load"}  # they read no pickle by default; the package needs none of them
EVALUATE = {"eval", "exec"}
UNSAFE_KEYWORDS = {"weights_only": "False", "trust_remote_code": "True", "allow_pickle": "True"}
# These send objects between ranks as pickles.
UNSAFE_NAMES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
# Programs that run the code of this repository's own documents, and tests that write what must be refused.
ALLOWED = {
    "benchmarks/walk.py": {"exec"},
    "tests/hub/test_export_formats.py": {"exec"},
    "tests/hub/test_to_hf.py": {"exec"},
    "tests/docs/test_docs.py": {"exec"},
    "tests/cli/test_embed_command.py": {"allow_pickle=True"},
    "tests/data/test_sources.py": {"pickle"},
}


def unsafe(tree: ast.AST, calls: set[str] = UNSAFE_CALLS | ARRAY_CALLS) -> Iterator[str]:
    """Modules, calls and arguments that may run code from a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in UNSAFE_MODULES:
                yield node.module
            yield from (alias.name for alias in node.names if f"{node.module}.{alias.name}" in calls)
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in calls or node.attr in UNSAFE_NAMES):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
            yield node.id
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in EVALUATE:
                yield node.func.id
            for keyword in node.keywords:
                if keyword.arg in UNSAFE_KEYWORDS and ast.unparse(keyword.value) == UNSAFE_KEYWORDS[keyword.arg]:
                    yield f"{keyword.arg}={UNSAFE_KEYWORDS[keyword.arg]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_runs_code_from_a_file(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    calls = UNSAFE_CALLS | ARRAY_CALLS if name.startswith("src/") else UNSAFE_CALLS
    assert set(unsafe(ast.parse(path.read_text(encoding="utf-8")), calls)) == ALLOWED.get(name, set())


def test_the_search_finds_what_it_looks_for() -> None:
    for text in [
        "import pickle",
        "from torch import load",
        "torch.load(x)",
        "np.load(x)",
        "from dill import loads",
        "d.gather_object(x)",
        "eval(x)",
        "exec(x)",
        "load(x, weights_only=False)",
        "load(x, trust_remote_code=True)",
    ]:
        assert list(unsafe(ast.parse(text))), text
    assert not list(unsafe(ast.parse("model.eval(); load(x, trust_remote_code=False)")))
