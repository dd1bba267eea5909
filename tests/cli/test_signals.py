"""Real processes and real signals: Ctrl-C, the SIGTERM of a scheduler, and the command that resumes."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import typer

from unmask.cli.errors import handle_errors

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]
PATIENCE = 90.0  # seconds; a busy machine is slow


def environment(**more: str) -> dict[str, str]:
    """The command `unmask` of this Python comes first on the path, as after `make install`."""
    binaries = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1", **more}


def start(place: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "unmask", *arguments],
        cwd=place, env=environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "timeout"
        time.sleep(0.02)


def logged(run: Path) -> list[dict[str, object]]:
    log = run / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps(run: Path) -> list[object]:
    return [line["step"] for line in logged(run) if "loss" in line]


def stop_while_training(place: Path, number: int, *arguments: str) -> tuple[int, str]:
    """Start it, wait for five lines of the log, send a signal: exit code and standard error."""
    seldom = ["--set=train.report=false", *(f"--set=train.every.{what}=50%" for what in ("validate", "save"))]
    process = start(place, "pretrain", "cat.txt", "--recipe", "small.toml", "--out", "my run", *seldom, *arguments)
    wait_for(lambda: len(steps(place / "my run")) > 5, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err
    return process.returncode, err


def test_control_c_saves_and_prints_the_command_that_resumes(place: Path) -> None:
    code, err = stop_while_training(place, signal.SIGINT, "--budget", "120 steps")
    assert code == 130, err
    message = re.search(r"saved at step ([\d,]+)\n +hint: +(unmask pretrain --resume .+)\n", err)
    assert message, err
    stopped_at = int(message[1].replace(",", ""))
    run = place / "my run"
    assert (run / "latest").is_symlink() and str((run / "latest").readlink()) == f"step-{stopped_at:07d}"
    assert 5 < stopped_at < 120, "the signal came in time"
    # As a user pastes it into a shell.
    done = subprocess.run(
        ["sh", "-c", message[2]],
        cwd=place, env=environment(), text=True, capture_output=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {stopped_at} of 120" in done.stdout
    assert steps(run) == list(range(1, 121)), "each step once"
    assert not (run / "discarded.jsonl").exists()


def test_the_signal_of_a_scheduler_exits_with_75(place: Path) -> None:
    code, err = stop_while_training(place, signal.SIGTERM, "--budget", "1M steps")
    assert code == 75 and "saved at step" in err, err
    assert (place / "my run" / "latest" / "resume" / "state.json").is_file()


def test_a_run_belongs_to_one_process_and_to_the_next_when_that_is_killed(place: Path, unmask: Command) -> None:
    process = start(place, "pretrain", "cat.txt", "--recipe", "small.toml", "--out", "run", "--budget", "1M steps")
    wait_for(lambda: (place / "run" / "latest").exists(), process)
    code, _, err = unmask("pretrain", "--resume", "run")
    assert code == 2 and f"in use by process {process.pid} on {platform.node()}, since" in err, err
    assert json.loads(unmask("runs", ".", "--json")[1])[0]["state"] == "running"
    process.kill()
    process.communicate()
    assert json.loads(unmask("runs", ".", "--json")[1])[0]["state"] == "killed"
    code, _, err = unmask("pretrain", "--resume", "run", "--budget", "1000000 steps")
    assert code == 2 and "does not exceed" in err, "the lock was free, and is free again"
    assert not (place / "run" / "lock").exists()


def test_control_c_before_training(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """During the training of the tokenizer: exit code 130, no run, and no partial folder in the cache."""
    words = [f"w{number * 7919 % 20011}" for number in range(300_000)]
    (place / "long.txt").write_text(" ".join(words))
    cache = tmp_path_factory.mktemp("own-cache")
    before = sorted(place.iterdir())
    process = start(
        place, "pretrain", "long.txt", "--out", "runs/new", "--threads", "1",
        UNMASK_CACHE=str(cache), RAYON_NUM_THREADS="1",
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if line.startswith("training the tokenizer"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "nothing was written" in err and "Traceback" not in err, err
    assert sorted(place.iterdir()) == before
    # Digests of input files are valid on their own; nothing else may remain.
    assert all(path.name.endswith(".lock") or path.name == "digests" for path in cache.iterdir())


# Other commands -------------------------------------------------------------------------------------------------------

STUDY = """\
question = "Is a mask rate of 80 % too high?"
source = "a test"
recipe = "small.toml"
budget = "3 steps"
seeds = 50
measures = ["loss"]
[plot]
y = "loss"
[quick]
budget = "2 steps"
[[variant]]
name = "15 %"
[[variant]]
name = "80 %"
settings = ["objective.mask_rate=0.8"]
"""


# A shell starts processes in the background with SIGINT ignored.
LAUNCHER = """
import json, os, signal, sys
from pathlib import Path
import torch._dynamo, unmask.checks.studies.run, unmask.evaluation.minimal_pairs, unmask.models.generate
import unmask.training.finetuning.api
from unmask.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
commands, children = json.loads(sys.argv[1]), []
for arguments in commands:
    children.append(os.fork())
    if not children[-1]:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(sys.argv[2]) / f"{arguments[0]}.{name}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["unmask", *arguments]
        main()
print(json.dumps(children), flush=True)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


def test_commands_that_a_signal_stops_leave_nothing_half_written(
    place: Path, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """All of them run at the same time, in processes forked from one that has imported everything."""
    step = json.loads((run / "best" / "card.json").read_text())["step"]
    (run / "latest").unlink()
    (run / "latest").symlink_to(f"step-{5 - step:07d}")  # not the best step, which the commands note when they begin
    (place / "study.toml").write_text(STUDY)
    (place / "many.txt").write_text("The cat sat on the log.\n" * 5_000)
    (place / "many.tsv").write_text("".join(f"The cat {n}.\tcat The {n}.\n" for n in range(5_000)))
    (place / "labels.tsv").write_text("text\tlabel\n" + "The cat sat.\tcat\nThe dog sat.\tdog\n" * 100)
    before = set(place.rglob("*"))
    labels = ("--task", "classify", "--train", "labels.tsv", "--valid", "labels.tsv", "--seeds", "100")
    begun = "the best by validation"
    cases = {
        ("score", "run", "--file", "many.txt"): (signal.SIGINT, begun),
        ("evaluate", "run", "--pairs", "many.tsv", "--predictions", "out.json"): (signal.SIGTERM, begun),
        ("generate", "run", "The", "--order", "gibbs", "--sweeps", "1000", "--num", "100"): (signal.SIGTERM, begun),
        ("finetune", "run", *labels, "--out", "tuned"): (signal.SIGUSR1, "seed 0: "),
        ("study", "run", "study.toml", "--text", "cat.txt", "--out", "study"): (signal.SIGINT, ": loss "),
    }
    output = tmp_path_factory.mktemp("output")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(list(cases)), str(output)],
        cwd=place, env=environment(OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert launcher.stdout
    children = dict(zip(cases, json.loads(launcher.stdout.readline()), strict=True))
    waiting = set(cases)

    def at_work() -> list[tuple[str, ...]]:
        begun = [each for each in waiting if cases[each][1] in printed(output, each, "err")]
        return [each for each in begun if each[0] != "study" or (place / "study" / "result.json").exists()]

    try:
        while waiting:
            wait_for(lambda: bool(at_work()), launcher)
            for each in at_work():
                os.kill(children[each], cases[each][0])
                waiting.remove(each)
        codes = json.loads(launcher.communicate(timeout=PATIENCE)[0])
    finally:
        if launcher.poll() is None:
            for child in children.values():
                os.kill(child, signal.SIGKILL)
            launcher.communicate()
    for (each, (number, _)), code in zip(cases.items(), codes, strict=True):
        err = printed(output, each, "err")
        assert code == (130 if number == signal.SIGINT else 75), (each, err)
        assert "stopped: " in err and "Traceback" not in err and not printed(output, each, "out"), (each, err)
        assert ("the same command continues the study" in err) == (each[0] == "study")
    written = {path for path in place.rglob("*") if path not in before}
    assert {path.relative_to(place).parts[0] for path in written} == {"study"}
    result = json.loads((place / "study" / "result.json").read_text())
    assert result["runs"] and all(one["measures"]["loss"] > 0 for one in result["runs"])


def printed(output: Path, arguments: Sequence[str], name: str) -> str:
    """What a command has printed so far."""
    path = output / f"{arguments[0]}.{name}"
    return path.read_text(errors="replace") if path.exists() else ""


def test_a_second_signal_does_not_interrupt_the_cleanup() -> None:
    cleaned = list[str]()
    before = signal.getsignal(signal.SIGTERM)

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            cleaned.append("all")

    with pytest.raises(typer.Exit) as ended:
        handle_errors(command)()
    assert ended.value.exit_code == 75 and cleaned == ["all"]
    assert signal.getsignal(signal.SIGTERM) is before
