"""Do 1, 2 and 4 ranks compute the same run, and how much memory does a rank need with replicas and with shards?

Trains a small model with 1, 2 and 4 ranks of `torchrun`, as replicas (DDP) and as shards (FSDP2), and one run that
changes from 1 rank to 2 and back to 1. Compares weights, optimizer states and sums of masked tokens with those of one
rank. Then trains a few steps of a larger recipe on two ranks and reads the peak memory of each process.

    python benchmarks/ranks.py --results benchmarks/results/ranks.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from unmask.core.hardware import processor_name
from unmask.core.version import __version__
from unmask.training.checkpoint.shards import OPTIMIZER, WEIGHTS, open_tensors

STEPS = 12
SMALL = [
    "model.num_hidden_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.intermediate_size=96",
    "data.tokenizer.kind=characters", "train.every.log=1 steps", "train.every.validate=100%", "train.report=false",
    "train.micro_batch_size=1k tokens", "stage=[{max_seq_len = 64, batch_size = '4k tokens'}]",
    "train.every.save=4 steps", "train.precision=float32", "train.threads=1",
]  # fmt: skip
LARGE = [
    "data.tokenizer.kind=characters", "train.every.validate=100%", "train.every.save=100%", "train.keep_best=false",
    "train.report=false", "train.precision=float32", "train.threads=1", "preview.num_samples=0",
    "data.held_out.max_size=2k characters", "train.micro_batch_size=128 tokens",
    "stage=[{max_seq_len = 64, batch_size = '256 tokens'}]",
]  # fmt: skip
# Runs the command line, then prints the rank and its peak memory.
PROGRAM = """
import os, resource, sys
from unmask.cli import main
try:
    main()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("peak", os.environ.get("RANK", "0"), peak, file=sys.stderr, flush=True)
"""


def train(folder: Path, ranks: int, *arguments: str) -> dict[str, int]:
    """Train with a number of ranks and return the peak memory of each, in bytes."""
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNMASK_CACHE": str(folder / "cache")}
    command = [*launcher, str(program), "pretrain", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    words = [line.split()[-3:] for line in done.stderr.splitlines() if "peak " in line]
    return {rank: int(peak) for _, rank, peak in words}


def options(settings: list[str]) -> list[str]:
    """Return settings as options of the command line."""
    return [option for setting in settings for option in ("--set", setting)]


def whole_tensors(resume: Path, kind: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a kind of a checkpoint, whatever number of ranks wrote it."""
    with open_tensors(resume, kind) as saved:
        return {name: saved.whole(name) for name in saved}


def differences(run: Path, base: Path) -> dict[str, Any]:
    """Return the largest differences of two runs, and whether they saw the same samples and masks."""
    found: dict[str, Any] = {}
    for name in (WEIGHTS, OPTIMIZER):
        one, other = (whole_tensors(path / "latest" / "resume", name) for path in (run, base))
        if one.keys() != other.keys():
            sys.exit(f"{run} and {base} have other tensors")
        found[name] = max(float((one[key] - other[key]).abs().max()) for key in one)
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (run, base)]
    masked = [[(line["tokens"], line["masked_tokens"]) for line in log if "loss" in line] for log in logs]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    found["loss"] = max(abs(one - other) for one, other in zip(*losses, strict=True))
    found["same samples"] = masked[0] == masked[1] and len(masked[0]) == STEPS
    return found


def equality(folder: Path, text: Path) -> list[dict[str, Any]]:
    """Return the differences of runs on several ranks from the run on one rank."""
    small, rows = [*options(SMALL), "--budget", f"{STEPS} steps"], list[dict[str, Any]]()
    base = folder / "1"
    train(folder, 1, str(text), "--out", str(base), *small)
    for parallel in ("ddp", "fsdp"):
        for ranks in (2, 4):
            run = folder / f"{parallel}-{ranks}"
            train(folder, ranks, str(text), "--out", str(run), *small, "--set", f"train.parallel={parallel}")
            rows.append({"ranks": str(ranks), "parallel": parallel, **differences(run, base)})
            print(rows[-1], flush=True)
        run = folder / f"{parallel}-changing"
        plan = ["--set", f"train.parallel={parallel}", "--set", "lr_schedule.decay=0%"]
        train(folder, 1, str(text), "--out", str(run), *options(SMALL), *plan, "--budget", "4 steps")
        train(folder, 2, "--resume", str(run), "--budget", "8 steps")
        train(folder, 1, "--resume", str(run), "--budget", f"{STEPS} steps")
        constant = folder / f"{parallel}-constant"
        train(folder, 1, str(text), "--out", str(constant), *options(SMALL), *plan, "--budget", "4 steps")
        train(folder, 1, "--resume", str(constant), "--budget", "8 steps")
        train(folder, 1, "--resume", str(constant), "--budget", f"{STEPS} steps")
        rows.append({"ranks": "1, 2, 1", "parallel": parallel, **differences(run, constant)})
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    """Train all runs, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-base", help="recipe of which the memory is measured")
    parser.add_argument("--only", choices=("equality", "memory"), help="one part of the benchmark")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args()
    results: dict[str, Any] = {"date": str(date.today()), "unmask": __version__, "torch": torch.__version__}
    results["processor"] = processor_name()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "docs.txt"
        text.write_text("\n\n".join(topics.values())[:60_000], encoding="utf-8")
        if given.only != "memory":
            results["equality"] = equality(folder, text)
        if given.only != "equality":
            memory: dict[str, Any] = {"recipe": given.recipe, "steps": 2, "tokens of a step": 256}
            for label, ranks, parallel in (("one process", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
                settings = [*options(LARGE), "--set", f"train.parallel={parallel}", "--budget", "2 steps"]
                out = ["--out", str(folder / f"large-{label}"), "--recipe", given.recipe]
                memory[label] = train(folder, ranks, str(text), *out, *settings)
                print(label, {rank: f"{peak / 1e9:.2f} GB" for rank, peak in memory[label].items()}, flush=True)
            results["peak bytes of each rank"] = memory
    if given.results:
        given.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
