"""benchmarks/digests: random draws equal the stored ones, and a changed digest is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def compare(stored: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "digests"), "--only", "draws", "--compare", str(stored)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_only_a_changed_digest_differs(tmp_path: Path) -> None:
    """The draws of every other seed and stream are those that the results file holds: on any machine, for ever."""
    stored = json.loads((BENCHMARKS / "results" / "digests.json").read_text(encoding="utf-8"))
    stored["digests"]["draws"]["draws/17/order"] = "0" * 16
    file = tmp_path / "digests.json"
    file.write_text(json.dumps(stored), encoding="utf-8")
    done = compare(file)
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith("|")] == ["differs: draws/17/order"]


def test_the_results_name_what_they_hold_for() -> None:
    stored = json.loads((BENCHMARKS / "results" / "digests.json").read_text(encoding="utf-8"))
    assert {"date", "command", "commit", "processor", "cores", "versions", "count"} <= stored.keys()
    names = [name for part in stored["digests"].values() for name in part]
    assert len(set(names)) == len(names) == stored["count"]
    assert all(len(digest) == 16 for part in stored["digests"].values() for digest in part.values())
