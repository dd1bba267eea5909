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
from typing import Any, Final, cast

import torch

from unmask.core import files
from unmask.core.errors import DamagedError, RunError, Stopped, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.plugins import code_allowed
from unmask.core.quantities import Quantity
from unmask.core.types import ProgressCallback
from unmask.training import checkpoint
from unmask.training.checkpoint import step_name
from unmask.training.checkpoint.shards import EMA, OPTIMIZER, WEIGHTS, kinds_in, open_tensors
from unmask.training.display import Display
from unmask.training.environment import read_environment
from unmask.training.loggers import read_log
from unmask.training.loop import TrainState
from unmask.training.plan import Plan
from unmask.training.pretrain import resume
from unmask.training.recipe import Recipe, read_recipe
from unmask.training.runs import flatten

CLOCKS: Final = frozenset(
    {"seconds", "training_seconds", "phase_seconds", "tokens_per_second", "data_wait_fraction", "data_wait_seconds"}
)
"""Values of log lines and training states that differ in each repetition."""

_TENSORS: Final = {WEIGHTS: "weights", OPTIMIZER: "optimizer state", EMA: "weight average"}
"""Names of the kinds of tensors in `resume/`."""

# Nothing of the copy is sent elsewhere or shown.
_SETTINGS: Final = ("train.report=false", "train.loggers=[]", "train.upload=''", "train.keep_last=2")
_COPIED: Final = (RunLayout.RECIPE, RunLayout.ENVIRONMENT, RunLayout.TEXTS, RunLayout.PAIRS)
_POLL_SECONDS: Final = 0.2
_COPIES: Final = 5  # tries to copy checkpoints of a run that deletes them meanwhile
_ERROR_CHARACTERS: Final = 2000
_RESTORE: Final = "restore the file, or verify between other checkpoints: --from STEP --to STEP"


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
    left_out: Sequence[str] = ()  # what was not compared, and why
    possible_reasons: Sequence[str] = ()  # of a difference: changes of the run after which earlier steps differ

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
    a fingerprint of the samples. Times are left out. What happens at intervals in seconds (`train.every`) happens after
    other steps in the repetition: only log lines of the same steps are compared then.

    Args:
        run: Folder of the run.
        first_step: Step of the checkpoint to begin with, or 0 for the start of the run; default: the last but one, or
            the start if there is only one.
        last_step: Step of the checkpoint to compare with; default: the last one.
        allow_different_environment: Compare although machine or versions differ.
        allow_code: Import plugins that the run's recipe names, also if the run came from elsewhere.
        on_progress: Called with a task and the fraction of it that is done.

    Raises:
        RunError: a checkpoint is missing or was deleted meanwhile, or the span can't be trained again: the text has
            changed, or the machine.
        DamagedError: a file of the run is damaged.
    """
    environment = read_environment(run)
    recipe, _ = read_recipe(run)  # of another version, or damaged
    ranks = int(environment["determinism"].get("ranks", 1))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unmask-verify-") as folder:
        copied, expected = Path(folder) / "run", Path(folder) / "expected"
        first, last = _copy_checkpoints(run, (first_step, last_step), copied, expected)
        _check_rollbacks(run, (first, last), copied, expected)
        with files.wrap_os_errors(Path(folder)):
            lines = _copy_start(run, copied, first)
        options = {"environment": allow_different_environment, "code": allow_code}
        _train_again(run, copied, (first, last), ranks, options, on_progress)
        found, timed = copied / step_name(last), _timed(recipe)
        log, left_out = _compare_logs(list(read_log(copied / RunLayout.LOG)), lines, (first, last), timed)
        comparisons = [
            _compare_tensors("model", found, expected, Path(RunLayout.WEIGHTS).stem),
            *(_compare_tensors(_TENSORS[kind], found / RunLayout.RESUME, expected / RunLayout.RESUME, kind)
              for kind in kinds_in(expected / RunLayout.RESUME)),
            _compare_states(found, expected, timed),
            log,
        ]  # fmt: skip
        changes = read_environment(copied).get("resumed_in_different_environment", [])
    before = environment.get("resumed_in_different_environment", [])
    seconds = round(time.monotonic() - begin, 1)
    reasons = [] if all(each.is_equal for each in comparisons) else _possible_reasons(environment)
    return Verification(str(run), first, last, ranks, seconds, comparisons, changes[len(before) :], left_out, reasons)


def _possible_reasons(environment: Mapping[str, Any]) -> list[str]:
    """Return the changes of a run after which a repetition of earlier steps differs; their steps are not recorded."""
    reasons: list[str] = []
    if changes := environment.get("resumed_in_different_environment", []):
        listed = "; ".join(map(str, changes))
        reasons.append(f"steps before the run was resumed in another environment were computed in the first ({listed})")
    if isinstance(extended := environment.get("extended"), dict):
        steps = cast("dict[str, Any]", extended).get("steps")
        reasons.append(f"steps before the run was extended to {steps} steps had the learning rates of another plan")
    return reasons


def _span(run: Path, first: int | None, last: int | None) -> tuple[int, int]:
    """Return the steps of the checkpoints at which the span begins and ends.

    Raises:
        RunError: there is no such checkpoint, or the span is empty.
    """
    numbers = {folder.name.removeprefix("step-") for folder in run.glob("step-*") if folder.is_dir()}
    steps = sorted(int(number) for number in numbers if number.isdecimal())
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


def _copy_checkpoints(
    run: Path, wanted: tuple[int | None, int | None], copied: Path, expected: Path
) -> tuple[int, int]:
    """Copy the checkpoints at the beginning and the end of the span, and return their steps.

    The run may delete them meanwhile (`train.keep_last`). Then a span that exists is chosen again.

    Raises:
        RunError: there is no such checkpoint, or each was deleted before it was copied.
        DamagedError: a checkpoint is damaged.
    """
    for _ in range(_COPIES):
        first, last = _span(run, *wanted)
        # The older one first, because it is the next to be deleted.
        copies = {**({first: copied / step_name(first)} if first else {}), last: expected}
        try:
            for step, target in copies.items():
                _copy_checkpoint(run / step_name(step), target)
        except _Vanished:
            for target in (copied, expected):
                shutil.rmtree(target, ignore_errors=True)
        else:
            copied.mkdir(exist_ok=True)
            return first, last
    raise RunError(
        "the run deleted its checkpoints before they were copied",
        location=str(run),
        hint="verify it when it has stopped, or keep more checkpoints: train.keep_last",
    )


def _check_rollbacks(run: Path, span: tuple[int, int], copied: Path, expected: Path) -> None:
    """Check that the run has not gone back to an earlier checkpoint, with lower rates, after the span's first step.

    Raises:
        RunError: it has: the steps of the span were trained from another checkpoint than the first one.
    """
    first, last = span
    folders = [*([copied / step_name(first)] if first else []), expected]
    before, after = [0, *(checkpoint.read_state(folder).rollbacks for folder in folders)][-2:]
    if after != before:
        raise RunError(
            f"between steps {first:,} and {last:,} the run went back to an earlier checkpoint and lowered its learning "
            "rates, so this span was not trained in one go",
            location=str(run),
            hint="begin with a checkpoint after the return (--from), or verify it when there are two of them",
        )


class _Vanished(Exception):
    """A checkpoint was deleted while it was copied."""


def _copy_checkpoint(folder: Path, target: Path) -> None:
    """Copy the files of a checkpoint that its digests name, and compare them with these.

    Raises:
        _Vanished: it was deleted meanwhile.
        DamagedError: it is damaged.
    """
    for is_last in (False, True):
        shutil.rmtree(target, ignore_errors=True)
        try:
            with files.wrap_os_errors(target):
                for place in ("", RunLayout.RESUME):
                    _copy_named(folder / place, target / place)
            files.verify_manifest(target)
            files.verify_manifest(target / RunLayout.RESUME)
        except UnmaskError:
            time.sleep(_POLL_SECONDS)  # the run may be deleting it
            if not folder.is_dir():
                raise _Vanished from None
            if is_last:
                raise
        else:
            return


def _copy_named(folder: Path, target: Path) -> None:
    """Copy the files that the manifest of a folder names, if they have its sizes.

    Raises:
        DamagedError: the manifest is invalid; or a file is missing, of another size, a device or a pipe.
    """
    target.mkdir(parents=True)
    for name, entry in files.read_manifest(folder).items():
        source = folder / name
        if not source.exists():
            message = "a file of this directory is missing"
            raise DamagedError(message, location=str(source), hint=_RESTORE)
        files.require_regular(source)
        if source.stat().st_size != entry["bytes"]:  # a run from elsewhere may have a link to any file, of any size
            message = f"invalid file size: got {source.stat().st_size:,} bytes, expected {entry['bytes']:,}"
            raise DamagedError(message, location=str(source), hint=_RESTORE)
        shutil.copy2(source, target / name)
    shutil.copy2(folder / RunLayout.DIGESTS, target / RunLayout.DIGESTS)


def _copy_start(run: Path, copied: Path, first: int) -> list[dict[str, Any]]:
    """Copy what a resume needs besides the checkpoint; returns all log lines of the run.

    Raises:
        DamagedError: a link leads out of the run, or to a folder; or a file is a device or a pipe.
    """
    given = [run / name for name in (*_COPIED, RunLayout.RUN_TOKENIZER, RunLayout.START)]
    for path in (each for top in given if top.exists() for each in (top, *sorted(top.rglob("*")))):
        if files.leaves(run, path) or (path.is_symlink() and path.is_dir()):
            raise DamagedError(
                "this link leads out of the run, or to another folder",
                location=str(path),
                hint="put a copy of what it leads to in its place",
            )
        target = copied / path.relative_to(run)
        if path.is_dir():
            target.mkdir()
        else:
            files.require_regular(path)
            shutil.copy2(path, target)
    if first:
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
    run: Path,
    copied: Path,
    span: tuple[int, int],
    ranks: int,
    options: Mapping[str, bool],
    on_progress: ProgressCallback,
) -> None:
    """Resume the copy of a run in a new process, or under torchrun, until the last step.

    Raises:
        RunError: it failed; the message is that of the process.
    """
    logs = f"--log-dir={copied.with_name('logs')}"  # not in a folder of its own, which would stay
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0", logs] if ranks > 1 else []  # fmt: skip
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
    message, hint = (text.replace(str(copied), str(run)) for text in (message, hint))  # the copy is deleted now
    raise RunError(f"the steps could not be trained again: {message}", location=str(run), hint=hint)


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


def _compare_tensors(name: str, found: Path, expected: Path, kind: str) -> Comparison:
    """Compare the tensors of a kind in two folders, bit for bit."""
    now, before = _read_tensors(found, kind), _read_tensors(expected, kind)
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


def _read_tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    with open_tensors(folder, kind) as saved:
        return {name: saved.whole(name) for name in saved}


_INTERVALS: Final = {
    "training": "train.every.log",
    "validation": "train.every.validate",
    "pairs": "train.evaluate.every",
}
"""Kinds of log lines, and the settings of their intervals."""

_STATE_OF: Final = {
    "training": ("metrics",),
    "validation": ("validation", "best", "validations_without_gain"),
    "pairs": (),
}
"""Values of the training state that depend on when the last line of a kind was written."""


def _timed(recipe: Recipe) -> list[str]:
    """Return the kinds of log lines whose interval is in seconds."""
    every = recipe.train.every
    intervals = {"training": every.log, "validation": every.validate, "pairs": recipe.train.evaluate.every}
    return [kind for kind, each in intervals.items() if isinstance(each, Quantity) and each.unit == "seconds"]


def _compare_states(found: Path, expected: Path, timed: Sequence[str]) -> Comparison:
    """Compare the training states: step, next sample, tokens, learning rate, metrics and validation, without times."""
    ignored = {name for kind in timed for name in _STATE_OF[kind]}

    def state(folder: Path) -> dict[str, str]:
        tree = files.read_json(folder / RunLayout.RESUME / "state.json")
        return _flat({name: value for name, value in tree.items() if name not in ignored})

    return _compare_values("training state", state(found), state(expected))


def _compare_logs(
    found: Sequence[Mapping[str, Any]],
    expected: Sequence[Mapping[str, Any]],
    span: tuple[int, int],
    timed: Sequence[str],
) -> tuple[Comparison, list[str]]:
    """Compare the log lines of a span, without times; also return what was left out, and why.

    Of a kind whose interval is in seconds, lines are compared if both logs have one of this step. A line of training is
    about the steps since the one before it, which must be equal too.
    """
    logs = [_lines(log, span) for log in (found, expected)]
    common = {(kind, place) for kind, place, _ in logs[0]} & {(kind, place) for kind, place, _ in logs[1]}
    left_out: list[str] = []
    for kind in timed:
        counts = [len([1 for other, place, _ in log if other == kind and (kind, place) not in common]) for log in logs]
        if any(counts):
            left_out.append(
                f"{counts[1]:,} log lines of {kind}: {_INTERVALS[kind]} is in seconds, so the repetition wrote "
                f"{counts[0]:,} after other steps"
            )
    one, other = (
        {
            f"line {number} of step {line['step']}: {name}": value
            for number, line in enumerate(
                (line for kind, place, line in log if kind not in timed or (kind, place) in common), start=1
            )
            for name, value in _flat(line).items()
        }
        for log in logs
    )
    return _compare_values("log", one, other), left_out


def _lines(
    log: Sequence[Mapping[str, Any]], span: tuple[int, int]
) -> list[tuple[str, tuple[int, int], Mapping[str, Any]]]:
    """Return the kind of each log line of a span, the steps that it is about, and the line."""
    lines: list[tuple[str, tuple[int, int], Mapping[str, Any]]] = []
    before = 0
    for line in log:
        kind = next((each for each in ("validation", "pairs") if each in line), "training")
        step = line["step"]
        if span[0] < step <= span[1]:
            lines.append((kind, (before if kind == "training" else step, step), line))
        if "masked_tokens" in line:
            before = step
    return lines


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
