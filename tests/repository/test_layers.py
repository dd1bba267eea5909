"""Seven layers, no import cycle, packages of a size that one can take in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "unmask"
TOP_ENTRIES = {
    "__init__.py", "__main__.py", "py.typed", "core", "tokenization", "data", "models", "objectives", "evaluation",
    "hub", "training", "checks", "cli", "report", "serve",
}  # fmt: skip


def lint_imports(folder: Path, search: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command; sys.argv[1:] = ['--no-cache', '--no-logo']"
    script += f"; sys.path.insert(0, {str(search)!r}); lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def cycles(package: str) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others; imports inside functions count."""
    graph = grimp.build_graph(package, cache_dir=None)
    imports = networkx.DiGraph(
        (module, imported) for module in graph.modules for imported in graph.find_modules_directly_imported_by(module)
    )
    # The public API of the root names all modules and imports them when they are first asked for.
    imports.remove_edges_from(list(imports.out_edges(package)))
    return [sorted(group) for group in networkx.strongly_connected_components(imports) if len(group) > 1]


def test_the_layers_hold() -> None:
    result = lint_imports(ROOT, ROOT / "src")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    package = tmp_path / "unmask"
    modules = {
        "__init__": "", "core/__init__": "", "core/errors": "from unmask.training import optim\n",
        "training/__init__": "", "training/optim": "",
        "models/__init__": "from unmask.data import loader\n", "data/__init__": "", "data/loader": "",
    }  # fmt: skip
    for name, text in modules.items():
        path = package / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    result = lint_imports(tmp_path, tmp_path)
    assert result.returncode == 1
    assert "unmask.core is not allowed to import unmask.training" in result.stdout
    assert "unmask.models is not allowed to import unmask.data" in result.stdout


def test_no_module_imports_itself_through_others() -> None:
    assert cycles("unmask") == []


def test_a_cycle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ring_of_three"
    package.mkdir()
    (package / "__init__.py").write_text("from ring_of_three import a\n")
    for name, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        (package / f"{name}.py").write_text(f"def late():\n    from ring_of_three.{imported} import late\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cycles("ring_of_three") == [["ring_of_three.a", "ring_of_three.b", "ring_of_three.c"]]


def test_the_tree_stays_small() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert entries <= TOP_ENTRIES
    files = list(SOURCE.rglob("*.py"))
    assert len(files) <= 175
    for folder in {path.parent for path in files}:
        modules = [path for path in files if path.parent == folder and path.name != "__init__.py"]
        assert len(modules) <= 15, f"{folder.relative_to(SOURCE)} has {len(modules)} modules"


def test_tests_mirror_the_tree() -> None:
    """Each folder of tests is a package, or one of the three that test what lies beside the source."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= folders
    assert folders - packages <= {"repository", "docs", "benchmarks"}
