"""How well does a run keep its budget in seconds, and how near is its memory to the forecast?

Runs `unmask pretrain` with each recipe and each budget, one run after the other, and compares the seconds of training,
validation and saving with the budget, and the peak of the process (VmHWM, on Linux) with the forecast. Let the machine
do nothing else meanwhile. The runs are deleted.

    python benchmarks/budget.py notes.txt --recipe tiny --recipe char --budget "40 s" --budget "5 min" --times 5 \
        --results benchmarks/results/budget.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from unmask.core.distributed import init_distributed, load_warning
from unmask.core.version import __version__

# A process of its own for each run: the first steps of a process are slow.
CHILD = """
import json, sys, time
from pathlib import Path
from unmask.training.display import Display
from unmask.training.pretrain import launch

class Record(Display):
    probe_seconds, began = 0.0, None
    def probe(self, fraction, seconds):
        self.began = self.began or time.perf_counter()
        self.probe_seconds = time.perf_counter() - self.began

display = Record()
settings = json.loads(sys.argv[5])
result = launch([sys.argv[1]], recipe=sys.argv[2], out=sys.argv[3], settings=settings, display=display,
                overrides={"train.budget": sys.argv[4]})
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.is_file() else []
peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
print(json.dumps({
    "steps": result.summary.steps, "planned_seconds": result.summary.planned_seconds,
    "seconds": result.summary.seconds, "probe_seconds": display.probe_seconds,
    "forecast_bytes": result.forecast.memory_bytes, "peak_bytes": peak,
}))
"""


def run_once(text: Path, recipe: str, budget: str, settings: list[str]) -> dict[str, Any]:
    """Runs one plan and returns its planned and actual figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, str(text), recipe, f"{folder}/run", budget, json.dumps(settings)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return {"recipe": recipe, "budget": budget, "load": os.getloadavg()[0], **json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    """Runs all plans, prints a line for each, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to train on")
    parser.add_argument("--recipe", action="append", dest="recipes", help="recipe; may be repeated; default: tiny")
    parser.add_argument("--budget", action="append", dest="budgets", help='budget; may be repeated; default: "40 s"')
    parser.add_argument("--times", type=int, default=5, help="number of runs of each plan")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="setting of all runs, KEY=VALUE")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    if warning := load_warning(init_distributed()):
        print(f"warning: {warning}", file=sys.stderr)
    runs: list[dict[str, Any]] = []
    for recipe in given.recipes or ["tiny"]:
        for budget in given.budgets or ["40 s"]:
            plans = [run_once(given.text, recipe, budget, given.settings) for _ in range(given.times)]
            runs += plans
            for plan in plans:
                memory = f"memory {plan['forecast_bytes'] / 1e6:.0f} of {plan['peak_bytes'] / 1e6:.0f} MB"
                times = f"planned {plan['planned_seconds']:.1f} s  took {plan['seconds']:.1f} s"
                print(f"{recipe:12} {budget:>7}  {times}  probe {plan['probe_seconds']:.1f} s  {memory}", flush=True)
            median = statistics.median(plan["seconds"] / plan["planned_seconds"] for plan in plans)
            print(f"{recipe:12} {budget:>7}  median of took / planned: {median:.3f}", flush=True)
    if given.results:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        arguments = [arg if " " not in arg else f'"{arg}"' for arg in sys.argv[2:]]
        whole = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/budget.py", given.text.name, *arguments]),
            "unmask": __version__,
            "torch": torch.__version__,
            "device": init_distributed().describe(),
            "runs": runs,
        }
        given.results.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
