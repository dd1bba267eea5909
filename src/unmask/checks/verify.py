"""Verifies that a run can be repeated: trains a span of it again in a new process and compares everything.

The span begins and ends at checkpoints, or begins at the start of the run. The run itself is only read, so it may go on
training meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from unmask.core import files
from unmask.core.errors import RunError, Stopped, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.plugins import code_allowed
from unmask.core.types import ProgressCallback
from unmask.training.checkpoint import step_name
from unmask.training.display import Display
from unmask.training.environment import read_environment
from unmask.training.loggers import read_log
from unmask.training.loop import TrainState
from unmask.training.plan import Plan
from unmask.training.pretrain import resume
from unmask.training.recipe import read_recipe
from unmask.training.runs import flatten

CLOCKS: Final = frozenset(
    {"seconds", "training_seconds", "phase_seconds", "tokens_per_second", "data_wait_fraction", "data_wait_seconds"}
)
"""Values of log lines and training states that differ in each repetition."""

_TENSORS: Final = {
    "model": Path(RunLayout.WEIGHTS),
    "weights": Path(RunLayout.RESUME, "weights.safetensors"),
    "optimizer state": Path(RunLayout.RESUME, "optimizer.safetensors"),
    "weight average": Path(RunLayout.RESUME, "ema.safetensors"),
}
# Nothing of the copy is sent elsewhere or shown.
_SETTINGS: Final = ("train.report=false", "train.loggers=[]", "train.upload=''", "train.keep_last=2")
_COPIED: Final = (RunLayout.RECIPE, RunLayout.ENVIRONMENT, RunLayout.TEXTS, RunLayout.PAIRS)
_POLL_SECONDS: Final = 0.2
_ERROR_CHARACTERS: Final = 2000


@dataclass(frozen=True)
class Comparison:
    """What was compared, how many values were equal, and the first that was not."""

    name: str
    compared: int
    equal: int
    largest_difference: float | None = None  # of tensors of equal shape
    first: str = ""  # description of the first difference

    @property
    def is_equal(self) -> bool:
        """Whether all values are equal, bit for bit."""
        return self.compared == self.equal


@dataclass(frozen=True)
class Verification:
    """The result of repeating a span of a run."""

    run: str
    first_step: int  # 0: the start of the run
    last_step: int
    ranks: int
    seconds: float  # of the repetition
    comparisons: Sequence[Comparison]
    environment: Sequence[str] = ()  # what differs from the machine and versions of the run

    @property
    def is_reproduced(self) -> bool:
        """Whether everything is equal, bit for bit."""
        return all(each.is_equal for each in self.comparisons)


def verify(
    run: Path,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
    allow_different_environment: bool = False,
    allow_code: bool = False,
    on_progress: ProgressCallback,
) -> Verification:
    """Train a span of a run again in a new process, with as many ranks, and compare it with the run.

    Compared are the weights, the optimizer state and the weight average at the last step; the training state, which
    contains the learning rate and the number of the next sample; and the log lines of the span, which contain
    a fingerprint of the samples. Times are left out.

    Args:
        run: Folder of the run.
        first_step: Step of the checkpoint to begin with, or 0 for the start of the run; default: the last but one, or
            the start if there is only one.
        last_step: Step of the checkpoint to compare with; default: the last one.
        allow_different_environment: Compare although machine or versions differ.
        allow_code: Import plugins that the run's recipe names, also if the run came from elsewhere.
        on_progress: Called with a task and the fraction of it that is done.

    Raises:
        RunError: a checkpoint is missing, or the span can't be trained again: the text has changed, or the machine.
        DamagedError: a file of the run is damaged.
    """
    environment = read_environment(run)
    read_recipe(run)  # of another version, or damaged
    first, last = _span(run, first_step, last_step)
    ranks = int(environment["determinism"].get("ranks", 1))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unmask-verify-") as folder:
        copied, expected = Path(folder) / "run", Path(folder) / "expected"
        with files.wrap_os_errors(Path(folder)):
            shutil.copytree(run / step_name(last), expected)  # the run may delete it meanwhile
            lines = _copy_start(run, copied, first)
        files.verify_manifest(expected)
        files.verify_manifest(expected / RunLayout.RESUME)
        options = {"environment": allow_different_environment, "code": allow_code}
        _train_again(copied, (first, last), ranks, options, on_progress)
        found = copied / step_name(last)
        comparisons = [
            *(_compare_tensors(name, found / path, expected / path) for name, path in _TENSORS.items()
              if (expected / path).is_file()),
            _compare_states(found, expected),
            _compare_logs(list(read_log(copied / RunLayout.LOG)), lines, (first, last)),
        ]  # fmt: skip
        changes = read_environment(copied).get("resumed_in_different_environment", [])
    before = environment.get("resumed_in_different_environment", [])
    seconds = round(time.monotonic() - begin, 1)
    return Verification(str(run), first, last, ranks, seconds, comparisons, changes[len(before) :])


def _span(run: Path, first: int | None, last: int | None) -> tuple[int, int]:
    """Return the steps of the checkpoints at which the span begins and ends.

    Raises:
        RunError: there is no such checkpoint, or the span is empty.
    """
    steps = [int(folder.name.removeprefix("step-")) for folder in sorted(run.glob("step-*")) if folder.is_dir()]
    if not steps:
        message = "the run has no checkpoint to compare with"
        raise RunError(message, location=str(run), hint="verify it after its first checkpoint")
    end = steps[-1] if last is None else last
    begin = max((step for step in steps if step < end), default=0) if first is None else first
    kept = ", ".join(map(str, steps))
    for step in (end, *([begin] if begin else [])):
        if step not in steps:
            raise RunError(
                f"the run has no checkpoint of step {step:,}; it has those of {kept}",
                location=str(run),
                hint="choose one of these steps (0 begins at the start), or keep more with train.keep_last",
            )
    if begin >= end:
        message = f"the span from step {begin:,} to step {end:,} is empty"
        raise RunError(message, location=str(run), hint=f"let --from be before --to; checkpoints: 0, {kept}")
    return begin, end


def _copy_start(run: Path, copied: Path, first: int) -> list[dict[str, Any]]:
    """Copy what a resume from a step needs; returns all log lines of the run."""
    copied.mkdir()
    for name in _COPIED:
        if (run / name).is_file():
            shutil.copy2(run / name, copied / name)
    for name in (RunLayout.RUN_TOKENIZER, RunLayout.START):
        if (run / name).is_dir():
            shutil.copytree(run / name, copied / name)
    if first:
        shutil.copytree(run / step_name(first), copied / step_name(first))
        files.write_pointer(copied / RunLayout.LATEST, step_name(first))
    lines = list(read_log(run / RunLayout.LOG))
    before = [line for line in lines if line["step"] <= first] if first else []
    files.write_text(copied / RunLayout.LOG, "".join(json.dumps(line) + "\n" for line in before))
    return lines


# Training again -------------------------------------------------------------------------------------------------------


class _StopsAt(Display):
    """Sends this process the signal of a scheduler before a step: the run saves a checkpoint after it and ends."""

    def __init__(self, step: int) -> None:
        self._step = step

    def train_start(self, plan: Plan, state: TrainState, flops_per_token: float, flops_per_second: float) -> None:
        """Compares the number of steps done with the last one of the span."""
        self.step(state)

    def step(self, state: TrainState) -> None:
        """Compares the number of steps done with the last one of the span."""
        if state.step == self._step - 1:
            signal.raise_signal(signal.SIGTERM)


def _train_again(
    copied: Path, span: tuple[int, int], ranks: int, options: Mapping[str, bool], on_progress: ProgressCallback
) -> None:
    """Resume the copy in a new process, or under torchrun, until the last step.

    Raises:
        RunError: it failed; the message is that of the process.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"] if ranks > 1 else []  # fmt: skip
    first, last = span
    command = [
        sys.executable,
        *launcher,
        "-m",
        "unmask.checks.verify",
        str(copied),
        str(last),
        json.dumps(dict(options)),
    ]
    errors = copied.with_name("errors.txt")
    with errors.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream)
        try:
            while process.poll() is None:
                logged = max((line["step"] for line in read_log(copied / RunLayout.LOG)), default=first)
                on_progress(f"training steps {first:,} to {last:,} again", (logged - first) / (last - first))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if (copied / step_name(last)).is_dir():
        return
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    message, hint = (
        "\n".join(lines)[-_ERROR_CHARACTERS:] or f"exit code {process.returncode}",
        "resume a copy of the run",
    )
    for line in lines:  # torchrun writes lines of its own after those of the ranks
        with contextlib.suppress(ValueError, KeyError, TypeError):
            failed = json.loads(line)
            message, hint = str(failed["message"]), str(failed["hint"])
            break
    raise RunError(f"the steps could not be trained again: {message}", location=str(copied), hint=hint)


def _child(arguments: Sequence[str]) -> int:
    """Train in the new process: RUN, the last step, options. An error is printed as JSON on one line."""
    copied, last, options = Path(arguments[0]), int(arguments[1]), json.loads(arguments[2])
    try:
        with code_allowed(options["code"]):
            resume(
                copied, settings=_SETTINGS, display=_StopsAt(last), allow_different_environment=options["environment"]
            )
    except Stopped:  # the signal of `_StopsAt`
        return 0
    except UnmaskError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}), file=sys.stderr)
        return 1
    return 0


# Comparing ------------------------------------------------------------------------------------------------------------


def _compare_tensors(name: str, found: Path, expected: Path) -> Comparison:
    """Compare the tensors of two files, bit for bit."""
    for file in (found, expected):
        files.check_tensor_header(file)
    now, before = load_file(found), load_file(expected)
    equal, largest, first = 0, 0.0, ""
    for key in sorted({*now, *before}):
        one, other = now.get(key), before.get(key)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            first = first or f"{key}: missing, or another shape or type"
        elif torch.equal(one, other):
            equal += 1
        else:
            difference = float((one.double() - other.double()).abs().max())
            largest = max(largest, difference)
            first = first or f"{key}: up to {difference:.2g}"
    return Comparison(name, len({*now, *before}), equal, largest, first)


def _compare_states(found: Path, expected: Path) -> Comparison:
    """Compare the training states: step, next sample, tokens, learning rate, metrics and validation, without times."""
    one, other = (_flat(files.read_json(folder / RunLayout.RESUME / "state.json")) for folder in (found, expected))
    return _compare_values("training state", one, other)


def _compare_logs(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], span: tuple[int, int]
) -> Comparison:
    """Compare the log lines of a span, without times."""
    first, last = span

    def lines(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kept = [line for line in log if first < line["step"] <= last]
        return {
            f"line {number} of step {line['step']}: {name}": value
            for number, line in enumerate(kept, start=1)
            for name, value in _flat(line).items()
        }

    return _compare_values("log", lines(found), lines(expected))


def _compare_values(name: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Comparison:
    # Earlier versions recorded no fingerprint of the samples.
    keys = sorted(key for key in {*found, *expected} if key in expected or not key.endswith("samples"))
    differing = [key for key in keys if key not in found or key not in expected or found[key] != expected[key]]
    first = ""
    if differing:
        key = differing[0]
        first = f"{key}: {expected.get(key, 'nothing')} in the run, {found.get(key, 'nothing')} now"
    return Comparison(name, len(keys), len(keys) - len(differing), None, first)


def _flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of nested tables by dotted keys, without times. A number that is not finite equals itself."""
    return {key: json.dumps(value) for key, value in flatten(tree).items() if CLOCKS.isdisjoint(key.split("."))}


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1:]))
