"""The floors: a room imports downstairs only, and no package knows its neighbour."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lint_imports(folder: Path, search: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command; sys.argv[1:] = ['--no-cache', '--no-logo']"
    script += f"; sys.path.insert(0, {str(search)!r}); lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_floors_hold() -> None:
    result = lint_imports(ROOT, ROOT / "src")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_room_that_looks_upstairs_is_found(tmp_path: Path) -> None:
    package = tmp_path / "unmask"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("from unmask import schedule\n")
    (package / "schedule.py").write_text("")
    (package / "optim.py").write_text("from unmask import schedule\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    result = lint_imports(tmp_path, tmp_path)
    assert result.returncode == 1
    assert "unmask.errors is not allowed to import unmask.schedule" in result.stdout
    assert "unmask.optim is not allowed to import unmask.schedule" in result.stdout
