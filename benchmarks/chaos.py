"""Does a run survive? Kills real training processes at random moments, resumes them and compares every bit.

Each trial starts the same small run in a process of its own, kills it with SIGKILL, resumes it until it is finished,
and compares weights, optimizer state and log with those of a run that was never interrupted. Kinds of trials:

- kill: at a moment drawn uniformly from the time the whole run takes, its start included
- save: while a checkpoint is being written, seen by its temporary folder
- ranks: one of two ranks, under torchrun
- shards: the same, with weights, optimizer and checkpoints that are sharded (FSDP)
- disk: the disk is full at a random size of the run (a small tmpfs, which only root can mount); the run goes on without
  new checkpoints and ends with an error, because the last one is missing; the disk is enlarged before it is resumed

    python benchmarks/chaos.py notes.txt --results benchmarks/results/chaos.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from unmask.checks.verify import CLOCKS
from unmask.core.hardware import processor_name
from unmask.core.version import __version__

STEPS, SAVE_EVERY, RESTART_LIMIT = 60, 4, 5
SETTINGS = (
    "model.num_hidden_layers=2", "model.hidden_size=64", "model.num_attention_heads=2", "model.intermediate_size=96",
    "model.mlp_dropout=0.1", "train.threads=1", "train.report=false",
    f"train.every={{log = '1 steps', validate = '12 steps', save = '{SAVE_EVERY} steps'}}",
    "stage=[{until = '50%', max_seq_len = 32, batch_size = '1_024 tokens'}, "
    "{until = '100%', max_seq_len = 64, batch_size = '1_024 tokens'}]",
)  # fmt: skip
# Bytes of the tmpfs: from too little for the first checkpoint to nearly enough for the run.
SMALLEST_DISK, LARGEST_DISK, ENLARGED_DISK = 200_000, 4_000_000, "64M"


class Setup(NamedTuple):
    """What a run is trained on."""

    ranks: int
    parallel: str


SETUPS = {"kill": Setup(1, "ddp"), "save": Setup(1, "ddp"), "ranks": Setup(2, "ddp"), "shards": Setup(2, "fsdp"),
          "disk": Setup(1, "ddp")}  # fmt: skip
"""Kinds of trials."""


@dataclass
class Trial:
    """What happened to a run."""

    kind: str
    seed: int
    after_seconds: float
    step: int  # last logged step when it was interrupted; 0: none
    while_saving: bool  # a checkpoint was incomplete
    restarts: int
    same: bool
    problem: str = ""


class Runner:
    """Starts, interrupts and compares runs of one text."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.text, self.folder = text.absolute(), folder
        self.seconds: dict[Setup, float] = {}  # of the uninterrupted run

    def command(self, run: Path, setup: Setup, *, resume: bool) -> list[str]:
        """Return the command that starts or resumes a run."""
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={setup.ranks}", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=localhost:0"] if setup.ranks > 1 else []  # fmt: skip
        program = [sys.executable, *launcher, "-m", "unmask", "pretrain"]
        if resume:
            return [*program, "--resume", str(run)]
        own = (*SETTINGS, f"train.parallel={setup.parallel}")
        settings = [word for setting in own for word in ("--set", setting)]
        start = [str(self.text), "--recipe", "char", "--budget", f"{STEPS} steps", "--out", str(run)]
        return [*program, *start, *settings]

    def start(self, run: Path, setup: Setup, *, resume: bool = False) -> subprocess.Popen[str]:
        """Start a run in a group of processes of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "UNMASK_CACHE": str(self.folder / "cache")}
        return subprocess.Popen(
            self.command(run, setup, resume=resume), env=environment, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def reference(self, setup: Setup) -> Path:
        """Return the run that is never interrupted; it is trained once."""
        run = self.folder / f"reference-{setup.ranks}-{setup.parallel}"
        if not run.exists():
            for _ in range(2):  # the first one also writes the token cache
                shutil.rmtree(run, ignore_errors=True)
                begin = time.monotonic()
                finish(self.start(run, setup))
                self.seconds[setup] = time.monotonic() - begin
        return run

    def difference(self, run: Path, setup: Setup) -> str:
        """Return the first difference from the uninterrupted run; an empty string if there is none."""
        expected = self.reference(setup)
        names, own = (
            sorted(str(path.relative_to(each / "latest")) for path in (each / "latest").rglob("*.safetensors"))
            for each in (expected, run)
        )
        if names != own or not names:
            return f"the last checkpoint has the files {own}, expected {names}"
        for name in names:
            first, second = (load_file(each / "latest" / name) for each in (run, expected))
            if first.keys() != second.keys():
                return f"other tensors in {name}"
            for tensor, values in first.items():
                if not torch.equal(values, second[tensor]):
                    return f"{tensor} of {name} differs"
        if (run / "latest").resolve().name != (expected / "latest").resolve().name:
            return "another last step"
        logs = [log_lines(each) for each in (run, expected)]
        return "" if logs[0] == logs[1] else "the logs differ"


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a process that must succeed."""
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {err[-2000:]}")


def log_lines(run: Path) -> list[dict[str, Any]]:
    """Return the log without times."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def last_step(run: Path) -> int:
    """Return the last step with a complete line in the log; 0 if there is none."""
    if not (run / "log.jsonl").is_file():
        return 0
    steps = [line for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return int(json.loads(steps[-1])["step"]) if steps else 0


def incomplete(run: Path, prefix: str = ".") -> bool:
    """Return whether a folder or file of the run is being written: its temporary name begins with a period."""
    try:
        return any(name.startswith(prefix) for name in os.listdir(run))
    except FileNotFoundError:  # the run has no folder yet, or its folder is being renamed
        return False


def ranks_of(run: Path) -> list[int]:
    """Return the processes of the ranks of a run. torchrun gives each a session of its own."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(run) in words and any(word.startswith(b"LOCAL_RANK=") for word in environment):
                found.append(int(entry.name))
    return found


def kill_all(process: subprocess.Popen[str], run: Path) -> None:
    """Kill a process and the ranks that it has started, and wait for it."""
    process.kill()
    for number in ranks_of(run):  # torchrun starts no more
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate()


def interrupt(runner: Runner, run: Path, kind: str, draw: random.Random) -> Trial:
    """Start a run and interrupt it; the trial says when."""
    setup = SETUPS[kind]
    runner.reference(setup)
    process, begin = runner.start(run, setup), time.monotonic()
    if kind == "save":
        wanted = draw.randrange(1, STEPS // SAVE_EVERY)
        seen, saving = 0, False
        while process.poll() is None and not (saving and seen >= wanted):
            was, saving = saving, incomplete(run, ".step-")
            seen += saving and not was
            time.sleep(0.0005)
    else:
        wait = draw.uniform(0, runner.seconds[setup])
        while process.poll() is None and time.monotonic() - begin < wait:
            time.sleep(0.001)
    after = time.monotonic() - begin
    members = ranks_of(run)
    if members:
        os.kill(draw.choice(members), signal.SIGKILL)  # torchrun then ends the other rank
        process.communicate()
    else:
        kill_all(process, run)
    return Trial(kind, 0, round(after, 3), last_step(run), incomplete(run), 0, same=False)


def until_finished(runner: Runner, run: Path, setup: Setup) -> tuple[int, str]:
    """Resume a run, or start it if it had written nothing; returns the number of attempts and the last error."""
    problem = ""
    for attempt in range(1, RESTART_LIMIT + 1):
        process = runner.start(run, setup, resume=(run / "env.json").is_file())
        if not (run / "env.json").is_file():
            shutil.rmtree(run, ignore_errors=True)
        _, err = process.communicate()
        if process.returncode == 0:
            return attempt, ""
        problem = err.strip()[-500:]
    return RESTART_LIMIT, problem


def fill_disk(runner: Runner, run: Path, draw: random.Random) -> Trial:
    """Train on a file system that becomes full, then enlarge it; the trial says at which step it was full."""
    setup = SETUPS["disk"]
    runner.reference(setup)
    size, begin = draw.randrange(SMALLEST_DISK, LARGEST_DISK), time.monotonic()
    run.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run.parent)], check=True)
    process = runner.start(run, setup)
    _, err = process.communicate()
    trial = Trial("disk", 0, round(time.monotonic() - begin, 3), last_step(run), incomplete(run), 0, same=False)
    if process.returncode == 0:
        trial.problem = "the disk was large enough"
    elif process.returncode != 2 or "Traceback" in err:
        trial.problem = f"exit code {process.returncode}: {err.strip()[-500:]}"
    subprocess.run(["mount", "-o", f"remount,size={ENLARGED_DISK}", str(run.parent)], check=True)
    return trial


def one_trial(runner: Runner, kind: str, seed: int) -> Trial:
    """Interrupt a run, finish it and compare it."""
    draw = random.Random(f"{kind} {seed}")
    run = runner.folder / f"{kind}-{seed}" / "run"
    try:
        if kind == "disk":
            trial = fill_disk(runner, run, draw)
        else:
            run.parent.mkdir()
            trial = interrupt(runner, run, kind, draw)
        trial.seed = seed
        trial.restarts, problem = until_finished(runner, run, SETUPS[kind])
        trial.problem = trial.problem or problem or runner.difference(run, SETUPS[kind])
        trial.same = not trial.problem
        return trial
    finally:
        if kind == "disk":
            subprocess.run(["umount", str(run.parent)], check=False)
        shutil.rmtree(run.parent, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all trials, print a line for each and a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text to train on")
    for kind, number in (("kill", 40), ("save", 10), ("ranks", 20), ("shards", 10), ("disk", 10)):
        parser.add_argument(f"--{kind}", type=int, default=number, help="number of trials of this kind")
    parser.add_argument("--results", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(given.text, Path(folder))
        for kind in SETUPS:
            for seed in range(getattr(given, kind)):
                trials.append(trial := one_trial(runner, kind, seed))
                saving = ", while saving" if trial.while_saving else ""
                outcome = "same" if trial.same else f"DIFFERS: {trial.problem}"
                print(
                    f"{kind} {seed}: after {trial.after_seconds:.1f} s, step {trial.step}{saving}: {outcome}",
                    flush=True,
                )
    for kind in dict.fromkeys(trial.kind for trial in trials):
        own = [trial for trial in trials if trial.kind == kind]
        saving = sum(trial.while_saving for trial in own)
        print(f"{kind}: {sum(trial.same for trial in own)} of {len(own)} the same, {saving} while saving")
    if given.results:
        facts = {"date": date.today().isoformat(), "command": " ".join(["python", *sys.argv]), "unmask": __version__}
        results = {**facts, "processor": processor_name(), "steps": STEPS, "save every": SAVE_EVERY,
                   "trials": [asdict(trial) for trial in trials]}  # fmt: skip
        given.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(trial.same for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
