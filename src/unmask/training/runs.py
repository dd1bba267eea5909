"""The state of runs on disk: a lock, so that one process works on a run at a time, summaries, comparisons of groups."""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import logging
import math
import statistics
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, Literal, cast

from filelock import SoftFileLock, Timeout

from unmask.core import files
from unmask.core.config import load_toml
from unmask.core.errors import RunError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.format import join_names
from unmask.training.loggers import TENSORBOARD, WANDB, read_log
from unmask.training.recipe import MAY_CHANGE

# Time for a second attempt: the first may only remove the lock of a dead process, and a new lock may still be empty.
_LOCK_SECONDS = 0.3
_POLL_SECONDS = 0.05
_LOCK_BYTES = 4096  # more than a lock has
# What a run writes to in place; other files are replaced whole.
_WRITTEN = (RunLayout.LOCK, RunLayout.LOG, RunLayout.DISCARDED, RunLayout.CRASH, TENSORBOARD, WANDB)

_logger = logging.getLogger("unmask")


# Lock -----------------------------------------------------------------------------------------------------------------
#
# filelock's soft lock is a file that only one process can create. It contains the process number, the host (with the
# PID namespace of a container) and a token of the process's start. filelock takes over a lock only if its process is
# provably dead, so never a lock of another host. Locks of the operating system don't work on all network file systems.


@contextmanager
def run_lock(run: Path) -> Generator[None]:
    """Holds the lock of a run. A lock left by a dead process is taken over, with a log message.

    Raises:
        RunError: another process holds the lock and may be alive, or a file that a run writes to is a link or a pipe.
    """
    _check_written(run)
    previous_owner = _describe_owner(run) if (run / RunLayout.LOCK).exists() else ""
    lock = SoftFileLock(run / RunLayout.LOCK, timeout=_LOCK_SECONDS, poll_interval=_POLL_SECONDS)
    with files.wrap_os_errors(run / RunLayout.LOCK):
        try:
            lock.acquire()
        except Timeout:
            raise _in_use_error(run) from None
    try:
        if previous_owner:
            _logger.info("took over the lock of %s, which no longer runs", previous_owner)
        yield
    finally:
        lock.release()


def _check_written(run: Path) -> None:
    """Checks that a run from elsewhere can't make this process write outside its folder.

    Raises:
        RunError: a file or folder that a run writes to is a symbolic link, or no regular file.
    """
    for path in (run / name for name in _WRITTEN):
        if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
            raise RunError(
                "the run would write through this symbolic link" if path.is_symlink() else "this is no regular file",
                location=str(path),
                hint="remove it, or replace it by a copy of what it names",
            )


def is_in_use(run: Path) -> bool:
    """Returns whether a process that may be alive holds the lock of a run.

    filelock checks a copy of the lock file, so that the lock itself is not changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / RunLayout.LOCK
        try:
            files.require_regular(run / RunLayout.LOCK)
            with (run / RunLayout.LOCK).open("rb") as lock:
                copy.write_bytes(lock.read(_LOCK_BYTES))
        except FileNotFoundError:
            return False
        try:
            with SoftFileLock(copy, timeout=_LOCK_SECONDS, poll_interval=_POLL_SECONDS):
                return False
        except Timeout:
            return True


def check_not_in_use(run: Path) -> None:
    """Checks that no process works on a run.

    Raises:
        RunError: a process that may be alive holds its lock.
    """
    if is_in_use(run):
        raise _in_use_error(run)


def _in_use_error(run: Path) -> RunError:
    return RunError(
        f"run is in use by {_describe_owner(run)}",
        location=str(run / RunLayout.LOCK),
        hint=f"stop that process or wait until it ends; if it no longer exists, remove {run / RunLayout.LOCK}",
    )


def _describe_owner(run: Path) -> str:
    """Describes the process that a lock names: "process 12 on host, since 2026-01-01 12:00:00+00:00"."""
    try:
        pid, host, *_ = (run / RunLayout.LOCK).read_text(encoding="utf-8", errors="replace").splitlines()
        written = datetime.datetime.fromtimestamp((run / RunLayout.LOCK).stat().st_mtime, datetime.UTC).astimezone()
    except (OSError, ValueError):
        return "an unknown process"
    since = written.isoformat(sep=" ", timespec="seconds")
    return f"process {pid} on {host.partition('?pidns-')[0]}, since {since}"


# Formats --------------------------------------------------------------------------------------------------------------

RUN_FORMAT = 4
"""Number of the file formats of recipe.toml, env.json and state.json, and of what a step computes."""


def require_run_format(run: Path) -> None:
    """Checks that a run has the file formats of this version.

    Raises:
        RunError: it was written by an earlier or later version.
        ModelError: it is no run, but a checkpoint with pickles.
    """
    files.refuse_pickled(run)
    path = run / RunLayout.ENVIRONMENT
    if not path.is_file():
        return  # no run: reading recipe.toml reports it
    environment: Any = files.read_json(path)
    if isinstance(environment, dict) and environment.get("format") != RUN_FORMAT:
        raise RunError(
            f"run format {environment.get('format', 1)} is not supported: this version of unmask reads format "
            f"{RUN_FORMAT}",
            location=str(path),
            hint="start a new run; fill, evaluate, export and --from still open the models of this one",
        )


_OF_A_START = (RunLayout.RECIPE, RunLayout.PAIRS, RunLayout.START, RunLayout.RUN_TOKENIZER, RunLayout.TEXTS)


def is_unfinished_start(folder: Path) -> bool:
    """Returns whether a folder has nothing but the files of a run whose start was killed before it could be resumed."""
    if (folder / RunLayout.ENVIRONMENT).is_file():
        environment: Any = files.read_json(folder / RunLayout.ENVIRONMENT)
        if "requested" in environment:  # written last
            return False
    known = (*_OF_A_START, RunLayout.ENVIRONMENT, RunLayout.LOCK)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else ["a file"]
    return all(name in known or name.startswith(tuple(f".{each}" for each in known)) for name in names)


# Summaries ------------------------------------------------------------------------------------------------------------

State = Literal["running", "finished", "ended early", "stopped", "crashed", "killed", "damaged"]
_RUN_FILES = (RunLayout.RECIPE, RunLayout.ENVIRONMENT, RunLayout.LOG)
_MACHINE = ("device", "precision", "threads", "ranks")
_STATE = "state.json"
_NOT_COMPARED = ("about", "preview", "name", "plan")  # the name has a column of its own


@dataclass(frozen=True)
class RunSummary:
    """State and results of one run. A field is None if the run's files don't contain it."""

    run: Path
    state: State
    problem: str = ""  # why a run is "damaged"
    recipe: str = ""
    text: str = ""
    tokenizer: str = ""  # first characters of its fingerprint
    tokenizer_kind: str = ""
    held_out: str = ""  # digest of text and split: losses of runs with the same one are on the same text
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    loss: float | None = None  # of the last validation, like the next two
    accuracy: float | None = None
    bits_per_character: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    skipped_steps: int = 0  # whose loss or gradient was not finite, with those before a return
    rollbacks: int = 0  # returns to an earlier checkpoint
    modified: float = 0.0  # when its log was last written, in seconds since the epoch
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # dotted key -> value


def find_runs(folder: Path) -> list[RunSummary]:
    """Returns the runs in a folder, newest first; if the folder is a run itself, only that one.

    Raises:
        RunError: the folder does not exist.
    """
    if not folder.is_dir():
        raise RunError("folder not found", location=str(folder), hint="name a folder that contains runs")
    if _is_run(folder):
        return [read_run(folder)]
    runs = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir() and _is_run(path)]
    return sorted(map(read_run, runs), key=lambda summary: (-summary.modified, summary.run.name))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _RUN_FILES)


def read_run(run: Path) -> RunSummary:
    """Summarizes a run. A problem with its files is reported in the summary, never raised."""
    log = run / RunLayout.LOG
    modified = (log if log.is_file() else run).stat().st_mtime
    try:
        return _read_run(run, modified)
    except UnmaskError as error:
        return RunSummary(run, "damaged", problem=f"{error.message} ({error.location})", modified=modified)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # unexpected structure
        return RunSummary(run, "damaged", problem=f"{type(error).__name__}: {error}", modified=modified)


def _read_run(run: Path, modified: float) -> RunSummary:
    require_run_format(run)
    tree = load_toml(run / RunLayout.RECIPE)
    plan: Mapping[str, Any] = tree.get("plan", {})
    environment: Mapping[str, Any] = files.read_json(run / RunLayout.ENVIRONMENT)
    lines = list(read_log(run / RunLayout.LOG))
    last_line: Mapping[str, Any] = lines[-1] if lines else {}
    validations = [line for line in lines if "validation" in line]
    # The losses of different objectives can't be compared: the best model is one of the last objective.
    last_objective = _objective_at(tree, int(validations[-1]["step"])) if validations else None
    comparable = takewhile(lambda line: _objective_at(tree, int(line["step"])) == last_objective, reversed(validations))
    losses = [(_number(line["validation"].get("loss")), int(line["step"])) for line in comparable]
    finite_losses = [(loss, step) for loss, step in losses if loss is not None]
    saved = _saved_state(run)
    skipped_steps, rollbacks = _count_guards(saved, lines)
    best: Mapping[str, Any] | None = saved.get("best")
    if rollbacks and best and _objective_at(tree, int(best["step"])) == last_objective:
        finite_losses.append((float(best["loss"]), int(best["step"])))  # best/ may be of steps that were discarded
    last: Mapping[str, Any] = validations[-1]["validation"] if validations else {}
    steps = sum(int(stage["steps"]) for stage in plan["stages"]) if plan else None
    step = max(int(last_line.get("step", 0)), files.last_step(run) or 0)  # a run may be saved between two log lines
    text: Mapping[str, Any] = environment["text"]
    names = ", ".join(Path(path).name for path in text["paths"]) or "in memory"
    machine = {f"machine.{name}": environment["determinism"].get(name) for name in _MACHINE}
    settings = {key: value for key, value in flatten(tree).items() if key.split(".")[0] not in _NOT_COMPARED}
    return RunSummary(
        run=run,
        state=_state(run, last_line, step, steps),
        recipe=str(tree.get("name", "")),
        text=names,
        tokenizer=str(text["tokenizer"])[:8],
        tokenizer_kind=str(settings.get("data.tokenizer.kind", "")),
        held_out=files.digest(str(text.get("fingerprint")), str(text.get("facts", {}).get("held_out_digest")))[:8],
        step=step,
        steps=steps,
        tokens=next((int(line["tokens"]) for line in reversed(lines) if "tokens" in line), None),
        seconds=next((_number(line["seconds"]) for line in reversed(lines) if "seconds" in line), None),
        loss=_number(last.get("loss")),
        accuracy=_number(last.get("accuracy")),
        bits_per_character=_number(last.get("bits_per_character")),
        best_loss=min(finite_losses)[0] if finite_losses else None,
        best_step=min(finite_losses)[1] if finite_losses else None,
        skipped_steps=skipped_steps,
        rollbacks=rollbacks,
        modified=modified,
        settings={"text": names, **settings, **machine},
    )


def _saved_state(run: Path) -> Mapping[str, Any]:
    """Returns state.json of the last checkpoint; nothing if it can't be read, as while it is being replaced."""
    step, state = files.read_pointer(run / RunLayout.LATEST), None
    if step:
        with contextlib.suppress(UnmaskError, OSError):
            state = files.read_json(step / RunLayout.RESUME / _STATE)
    return cast("Mapping[str, Any]", state) if isinstance(state, dict) else {}


def _count_guards(saved: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Returns the number of skipped steps and of returns to an earlier checkpoint, up to the end of the log.

    The log lacks those of lines that were discarded, which the last checkpoint counts, and two returns before the next
    line are one there.
    """
    guards: Mapping[str, Any] = saved.get("guards", {})
    later = [line for line in lines if line["step"] > int(saved.get("step", -1))]
    skipped = sum(line["skipped_steps"] for line in later if isinstance(line.get("skipped_steps"), int))
    pending = int(saved.get("metrics", {}).get("skipped", 0))  # counted before the checkpoint, and in the line after it
    rollbacks = int(guards.get("rollbacks", 0)) if saved else sum("rollback" in line for line in lines)
    return int(guards.get("skipped_steps", 0)) + max(0, skipped - pending), rollbacks


def _objective_at(tree: Mapping[str, Any], step: int) -> Any:
    """Returns the settings of the objective that the last of `step` steps trained."""
    ends = accumulate(int(stage["steps"]) for stage in tree.get("plan", {}).get("stages", []))
    number = next((number for number, end in enumerate(ends) if step <= end), -1)
    stages = tree.get("stage", [])
    return (stages[number].get("objective") if stages else None) or tree.get("objective")


def _state(run: Path, last_line: Mapping[str, Any], step: int, steps: int | None) -> State:
    has_lock = (run / RunLayout.LOCK).exists()
    if has_lock and is_in_use(run):
        return "running"  # or on another host, whose processes can't be checked
    if (run / RunLayout.CRASH).is_file():
        return "crashed"
    if "ended_early" in last_line:
        return "ended early"
    if has_lock:  # a process that ends releases its lock
        return "killed"
    return "finished" if steps is not None and step >= steps else "stopped"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree of settings as dotted keys. Entries of a list of tables are numbered from 0."""
    return dict(_flat_items(tree, ""))


def _flat_items(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in cast("Mapping[str, Any]", value).items():
            yield from _flat_items(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in cast("list[Any]", value)):
        for number, entry in enumerate(cast("list[Any]", value)):
            yield from _flat_items(entry, f"{key}.{number}")
    else:
        yield key, value


def differing_settings(runs: Sequence[RunSummary]) -> list[str]:
    """Returns the settings in which undamaged runs differ, in the recipe's order. A missing setting is a difference."""
    settings = [summary.settings for summary in runs if summary.settings]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


# Comparing groups -----------------------------------------------------------------------------------------------------

COMPARED = ("loss", "best_loss", "accuracy", "bits_per_character", "seconds")
NOISE_FACTOR = 2  # a difference counts from twice its standard deviation over the seeds, as in studies
_ENDED = ("finished", "ended early")
# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond, an approximation that is off by 0.001.
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class GroupDifference:
    """One measure of two groups of runs, and the difference of their means: second − first."""

    measure: str
    first: tuple[float, ...]  # of each run
    second: tuple[float, ...]
    difference: float
    noise: float | None  # standard deviation of the difference of two runs; None with one seed in a group
    interval: tuple[float, float] | None  # 95 %, of the difference of the means

    @property
    def differs(self) -> bool | None:
        """Whether the difference exceeds twice its noise; None if the noise is unknown."""
        return None if self.noise is None else abs(self.difference) > NOISE_FACTOR * self.noise


@dataclass(frozen=True)
class GroupComparison:
    """Two groups of runs, each with runs that differ in their seed only."""

    first: tuple[RunSummary, ...]
    second: tuple[RunSummary, ...]
    is_paired: bool  # whether both groups have the same seeds: differences are then taken seed by seed
    settings: tuple[str, ...]  # that differ between the groups
    differences: tuple[GroupDifference, ...]
    left_out: tuple[RunSummary, ...]  # runs of the groups that have not ended


def compare_runs(folder: Path, first: str, second: str) -> GroupComparison:
    """Compares two groups of runs in a folder.

    Args:
        folder: Folder of the runs.
        first: Name of a run, which stands for all runs that differ from it in the seed only, or a pattern of names.
        second: The other group.

    Raises:
        RunError: no run has this name, the runs of a group differ in more than their seed, or the groups have no
            common measure: another tokenizer, or other held-out text.
    """
    runs = find_runs(folder)
    groups = [_group(runs, folder, name) for name in (first, second)]
    left_out = [run for group in groups for run in group if run.state not in _ENDED]
    ended = [sorted((run for run in group if run.state in _ENDED), key=_seed) for group in groups]
    for name, group in zip((first, second), ended, strict=True):
        if not group:
            raise RunError(f"no run of `{name}` has ended", location=str(folder), hint="wait, or resume one of them")
    one, other = ended
    if {run.run for run in one} & {run.run for run in other}:
        raise RunError(
            f"`{first}` and `{second}` name the same run: {one[0].run.name}",
            location="--compare",
            hint="name two runs that differ in more than their seed",
        )
    for name, what in (("tokenizer", "tokenizers"), ("held_out", "held-out texts")):
        if len(values := {getattr(run, name) for run in (*one, *other)}) > 1:
            raise RunError(
                f"losses of different {what} don't compare: {' and '.join(sorted(values))}",
                location="--compare",
                hint="compare runs that `unmask runs` lists under one tokenizer, on one text",
            )
    seeds = [[_seed(run) for run in group] for group in ended]
    is_paired = seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0])
    differing = tuple(key for key in differing_settings([*one, *other]) if not _may_differ(key))
    values = ((measure, *(_values(group, measure) for group in ended)) for measure in COMPARED)
    has_noise = all(len(set(each)) > 1 for each in seeds)  # runs of one seed may be equal, bit for bit
    differences = tuple(
        _difference(*row, is_paired=is_paired, has_noise=has_noise) for row in values if row[1] and row[2]
    )
    return GroupComparison(tuple(one), tuple(other), is_paired, differing, differences, tuple(left_out))


def _group(runs: Sequence[RunSummary], folder: Path, name: str) -> list[RunSummary]:
    """Returns the undamaged runs that a name or a pattern stands for."""
    known = [run for run in runs if run.state != "damaged"]
    path = Path(name)
    short = path.name if path.parent == folder else str(path)
    named = [run for run in known if run.run.name == short]
    matched = named or [run for run in known if fnmatch.fnmatch(run.run.name, short)]
    if not matched:
        names = join_names([run.run.name for run in known], 5)
        hint = f"use one of {names}" if names else "name a folder that contains runs"
        raise RunError(f"no run matches `{name}`", location=str(folder), hint=hint)
    if named:
        return [run for run in known if not _unlike([run, *named])]
    if different := _unlike(matched):
        raise RunError(
            f"the runs of `{name}` differ in more than their seed: {join_names(different)}",
            location=str(folder),
            hint="name one run of the group: those that differ from it in the seed only are found",
        )
    return matched


def _unlike(runs: Sequence[RunSummary]) -> list[str]:
    return [key for key in differing_settings(runs) if not _may_differ(key)]


def _may_differ(key: str) -> bool:
    """Returns whether runs of one group may differ in a setting: it changes no result, or only as a seed does."""
    ignored = ("seed", "machine", *MAY_CHANGE)
    return any(key == name or key.startswith(f"{name}.") for name in ignored)


def _seed(run: RunSummary) -> int:
    return int(run.settings.get("seed", 0))


def _values(group: Sequence[RunSummary], measure: str) -> tuple[float, ...]:
    """Returns a measure of each run; empty if a run lacks it."""
    values = [getattr(run, measure) for run in group]
    return () if None in values else tuple(values)


def _difference(
    measure: str, first: tuple[float, ...], second: tuple[float, ...], *, is_paired: bool, has_noise: bool
) -> GroupDifference:
    """Returns the difference of the means, paired by seed or after Welch (1947)."""
    difference = statistics.fmean(second) - statistics.fmean(first)
    if not has_noise:
        return GroupDifference(measure, first, second, difference, None, None)
    if is_paired:
        noise = statistics.stdev(two - one for one, two in zip(first, second, strict=True))
        error, degrees = noise / math.sqrt(len(first)), float(len(first) - 1)
    else:
        variances = statistics.variance(first), statistics.variance(second)
        noise = math.sqrt(sum(variances))
        parts = variances[0] / len(first), variances[1] / len(second)
        error = math.sqrt(sum(parts))
        weights = parts[0] ** 2 / (len(first) - 1) + parts[1] ** 2 / (len(second) - 1)
        degrees = error**4 / weights if weights else float(len(first) + len(second) - 2)
    half = t_quantile(degrees) * error
    return GroupDifference(measure, first, second, difference, noise, (difference - half, difference + half))


def t_quantile(degrees: float) -> float:
    """Returns the 97.5 % quantile of Student's t; fractional degrees of freedom are rounded down."""
    whole = max(1, math.floor(degrees))
    return _T_QUANTILES[whole - 1] if whole <= len(_T_QUANTILES) else 1.95996 + 2.46 / whole
