"""`import unmask` is fast and prints nothing, and every public name exists."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

import unmask


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_import_loads_no_torch_and_prints_nothing() -> None:
    result = python("import sys, unmask; assert not {'torch', 'numpy', 'rich', 'typer'} & set(sys.modules), 'heavy'")
    assert result.stdout == ""
    times = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    assert len(times) == len(result.stderr.splitlines()), "only the table of import times is printed"
    # Microseconds; a quiet machine needs 10 ms, a busy one should not fail for it.
    spent = next(int(line.split("|")[1]) for line in times if line.endswith("| unmask"))
    assert spent < 500_000


def test_data_workers_import_no_torch() -> None:
    python("import sys, unmask.data.workers, unmask.data.prepare; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("name", unmask.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert name in dir(unmask)
    assert getattr(unmask, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unmask.nothing  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(unmask, "nothing")


@pytest.mark.parametrize("first", ["import unmask.training.pretrain", "import unmask.cli", "pass"])
def test_pretrain_is_the_function_after_any_import(first: str) -> None:
    script = f"{first}\nimport unmask\nassert callable(unmask.pretrain) and callable(unmask.fill)"
    script += "\nfrom unmask import pretrain\nassert pretrain is unmask.pretrain"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=os.environ)


def test_python_m_unmask_exists() -> None:
    assert importlib.util.find_spec("unmask.__main__") is not None
