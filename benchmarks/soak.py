"""Does a long run grow? Trains for hours with everything switched on, and watches its memory and open files.

Starts one training process with frequent validation, checkpoints, kept best models, report and the loggers TensorBoard
and trackio, and reads from /proc, once per interval: resident memory, open file descriptors and threads. After a part
at the start, in which caches fill, a straight line is fitted to the memory: its slope is what an hour adds.

    python benchmarks/soak.py notes.txt --minutes 120 --results benchmarks/results/soak.json
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from unmask.core.hardware import processor_name
from unmask.core.version import __version__

SETTINGS = [
    "train.every={log = '5 s', validate = '20 s', save = '20 s'}", "train.keep_last=2", "train.threads=1",
    "train.loggers=['tensorboard', 'trackio']", "train.report=true",
]  # fmt: skip
SETTLED = 0.25  # fraction of the time after which memory is expected to be flat


def sample(pid: int, began: float) -> dict[str, float]:
    """Return minutes, resident memory in MB, open descriptors and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "megabytes": round(int(fields["VmRSS"].split()[0]) / 1000, 2),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
    }


def watch(command: list[str], environment: dict[str, str], minutes: float, interval: float) -> list[dict[str, float]]:
    """Run a training process for a time, end it with SIGTERM and return the samples.

    Raises:
        SystemExit: the process ended by itself, or did not save after the signal.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    samples: list[dict[str, float]] = []
    while time.monotonic() - began < minutes * 60:
        time.sleep(interval)
        if process.poll() is not None:
            sys.exit(f"training ended with {process.returncode}: {process.communicate()[1][-2000:]}")
        samples.append(sample(process.pid, began))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    if process.returncode != os.EX_TEMPFAIL:
        sys.exit(f"after SIGTERM, training ended with {process.returncode}: {err[-2000:]}")
    return samples


def summary(samples: Sequence[dict[str, float]], run: Path) -> dict[str, Any]:
    """Return the slope of the memory after the start, the ranges of the other numbers, and what the run did."""
    settled = [each for each in samples if each["minutes"] >= SETTLED * samples[-1]["minutes"]]
    hours, memory = [each["minutes"] / 60 for each in settled], [each["megabytes"] for each in settled]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "minutes": samples[-1]["minutes"],
        "steps": log[-1]["step"],
        "log lines": len(log),
        "validations": sum("validation" in line for line in log),
        "median megabytes": median(memory),
        "megabytes per hour": round(linear_regression(hours, memory).slope, 2),
        "most megabytes": max(memory),
        "descriptors": [min(each["descriptors"] for each in settled), max(each["descriptors"] for each in settled)],
        "threads": [min(each["threads"] for each in settled), max(each["threads"] for each in settled)],
    }


def main() -> int:
    """Train, print the summary and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to train on")
    parser.add_argument("--recipe", default="char", help="recipe (char)")
    parser.add_argument("--minutes", type=float, default=120, help="how long to train (120)")
    parser.add_argument("--interval", type=float, default=10, help="seconds between two samples (10)")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = folder / "run"
        program = [sys.executable, "-m", "unmask", "pretrain", str(given.text), "--recipe", given.recipe]
        # More steps than the time suffices for: SIGTERM ends the run.
        command = [*program, "--budget", "10_000_000 steps", "--out", str(run)]
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRACKIO_DIR": str(folder / "trackio")}
        samples = watch(command, environment, given.minutes, given.interval)
        results = summary(samples, run)
    for label, value in results.items():
        print(f"{label}: {value}")
    if given.results:
        facts = {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]), "unmask": __version__}
        facts |= {"processor": processor_name(), "settings": SETTINGS}
        given.results.write_text(json.dumps({**facts, **results, "samples": samples}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
