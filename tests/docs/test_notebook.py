"""The notebook of the tutorials runs from top to bottom with a shorter budget, and is stored without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorials" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "outputs are stored"
    (trains,) = (cell for cell in notebook.cells if "budget=" in cell.source)
    trains.source = re.sub(r'budget="\d+ steps"', 'budget="8 steps"', trains.source)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    assert any(text.startswith("[FillMaskResult('The cow ate [MASK]") for text in texts), "the filled mask is shown"
    assert any("finished, step 8 of 8" in text for text in texts), "the run is shown"
    assert (tmp_path / "runs" / "notebook" / "best").is_dir()
