"""Checkpoints of a run: writing step folders, the best model and the link `latest`, and restoring a training state."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unmask.core import files
from unmask.core.distributed import DistributedContext
from unmask.core.errors import DamagedError, RunError
from unmask.core.files import RunLayout
from unmask.models.model import Model, follow, how_to_point, save_model
from unmask.models.parallel import held_rows, like_parameter, set_parameter, to_cpu
from unmask.training.checkpoint.shards import (
    EMA,
    OPTIMIZER,
    WEIGHTS,
    Part,
    WriterGroup,
    file_of,
    open_tensors,
    parts_of,
    write_index,
    write_together,
)
from unmask.training.loop import IsDue, TrainLoopInputs, TrainModule, TrainState

_log = logging.getLogger("unmask")
_STATE = "state.json"


def step_name(step: int) -> str:
    """Returns the name of a step's folder."""
    return f"step-{step:07d}"


@dataclass(frozen=True)
class _Snapshot:
    """What a checkpoint of a step is written from."""

    step: int
    state: dict[str, Any]  # content of state.json
    module: TrainModule  # the weights for `transformers`; of a sharded run, without their values
    parts: Mapping[str, Mapping[str, Part]]  # what this rank writes to resume/, by kind and name


def prepare(
    run: Path,
    as_model: Callable[[TrainModule], Model],
    training: TrainLoopInputs,
    state: TrainState,
    outdated: Callable[[Path], Sequence[Path]],
    *,
    copies: bool,
) -> Callable[[], Path]:
    """Returns a function that writes a step folder, points `latest` to it and deletes outdated steps.

    `transformers` loads the folder as a model. Its `resume/` contains the training state, which only unmask reads. All
    ranks call both functions. If the run is sharded, each rank writes its own rows, else rank 0 writes everything.

    Args:
        run: Folder of the run.
        as_model: Function that returns the model of a module with the weights to export.
        training: Weights and optimizer, which may be sharded.
        state: Training state.
        outdated: Function that returns the step folders of a run that are deleted once this step is complete.
        copies: Whether everything is copied to the CPU now. The function may then run in another thread while training
            goes on. Without copies, it writes the tensors as they are when it is called.

    Returns:
        A function that returns the step folder. It raises StoreError if the disk is full or not writable; earlier steps
        are intact.
    """
    target, is_sharded = run / step_name(state.step), training.parallelism.is_sharded
    if not training.context.is_main_process and not is_sharded:
        return lambda: target
    snapshot = _take_snapshot(training, state, copies=copies)
    if not is_sharded:
        return partial(_write_step, target, snapshot, as_model(snapshot.module), outdated, None)
    group = _group_of(training.context)
    if not training.context.is_main_process:
        return partial(_write_part, target, snapshot, training.context.rank, group)
    return partial(_write_step, target, snapshot, as_model(snapshot.module), outdated, group)


def _take_snapshot(training: TrainLoopInputs, state: TrainState, *, copies: bool) -> _Snapshot:
    parallelism, context, average = training.parallelism, training.context, training.ema
    exported = average.module if average else training.module
    if copies or parallelism.is_sharded:
        exported = parallelism.snapshot(exported)
    tensors: dict[str, Mapping[str, Tensor]] = {
        WEIGHTS: training.module.state_dict(),
        OPTIMIZER: training.optimizer.state_tensors(),
    }
    if average:
        tensors[EMA] = average.state_dict()
    parts: dict[str, Mapping[str, Part]] = {}
    for kind, named in tensors.items():
        # The exported weights were copied just now: one copy is enough.
        is_exported = kind == (EMA if average else WEIGHTS) and not parallelism.is_sharded
        named = exported.state_dict() if is_exported else named
        parts[kind] = parts_of(named, context, copies=copies and not is_exported)
    return _Snapshot(state.step, copy.deepcopy(state.to_json()), exported, parts)


_groups: dict[int, WriterGroup] = {}  # by number of ranks: one per process, whose ranks stay the same


def _group_of(context: DistributedContext) -> WriterGroup:
    if context.ranks not in _groups:
        _groups[context.ranks] = WriterGroup(context)
    return _groups[context.ranks]


def _write_part(target: Path, snapshot: _Snapshot, rank: int, group: WriterGroup) -> Path:
    write_together(None, snapshot.parts, rank, group)
    group.finish(None, str(target))
    return target


def _write_step(
    target: Path,
    snapshot: _Snapshot,
    model: Model,
    outdated: Callable[[Path], Sequence[Path]],
    group: WriterGroup | None,
) -> Path:
    """Writes a step folder on rank 0; with a group, each of its ranks writes its part of resume/."""
    run = target.parent
    try:
        with files.atomic_directory(target) as folder:
            resume = folder / RunLayout.RESUME
            resume.mkdir()
            if group is None:
                for kind, parts in snapshot.parts.items():
                    files.save_tensors({name: part.rows for name, part in parts.items()}, file_of(resume, kind))
            else:
                write_together(resume, snapshot.parts, 0, group)
                write_index(resume, snapshot.parts)
                _fill(snapshot, resume)
            # model.safetensors has the layout of transformers: some tensors are stacked or transposed. A resume needs
            # the tensors of the modules themselves.
            save_model(folder, model)
            _write_parts(folder, snapshot.module.parts)
            files.write_json(resume / _STATE, snapshot.state)
            files.write_manifest(resume)
            files.write_manifest(folder)
        has_links = files.write_pointer(run / RunLayout.LATEST, target.name)
    except Exception as error:
        if group is not None:
            group.finish(error, str(target))
        raise
    if group is not None:
        group.finish(None, str(target))
    if not has_links:
        _log.info(f"can't create symbolic links: `{RunLayout.LATEST}` is a text file that names the last checkpoint")
    for old in outdated(run):
        shutil.rmtree(old, ignore_errors=True)
    return target


def _fill(snapshot: _Snapshot, resume: Path) -> None:
    """Reads the weights to export from the files of all ranks."""
    with open_tensors(resume, EMA if EMA in snapshot.parts else WEIGHTS) as saved:
        for name, _ in list(snapshot.module.named_parameters()):
            set_parameter(snapshot.module, name, saved.whole(name))


def _write_parts(folder: Path, parts: nn.Module | None) -> None:
    """Writes the parameters of the objective, if it has any."""
    tensors = parts.state_dict() if parts else {}
    if tensors:
        files.save_tensors(
            {name: to_cpu(tensor, copies=False) for name, tensor in tensors.items()}, folder / RunLayout.OBJECTIVE
        )


def save_best(run: Path, model: Model, parts: nn.Module | None = None) -> Path:
    """Replaces the best model: a model folder without `resume/`. `parts` are the modules of the objective."""
    return save_kept(run, RunLayout.BEST, model, parts)


def save_kept(run: Path, name: str, model: Model, parts: nn.Module | None = None) -> Path:
    """Writes or replaces a model folder without `resume/`. `parts` are the modules of the objective."""
    target = run / name
    with files.atomic_directory(target) as folder:
        save_model(folder, model)
        _write_parts(folder, parts)
        files.write_manifest(folder)
    return target


def load(run: Path, training: TrainLoopInputs, step: int | None = None) -> TrainState:
    """Restores weights, optimizer state and training state from the checkpoint of a step; None: from the latest one.

    Raises:
        RunError: the run has no checkpoint, or recipe.toml was changed to a model of another shape.
        DamagedError: a file is missing, truncated or changed, or the files of the ranks don't fit together; the error
            names the file.
        ModelError: the checkpoint has a pickle of `torch.distributed.checkpoint`.
    """
    folder = latest(run) if step is None else run / step_name(step)
    for place in (folder, folder / RunLayout.RESUME):
        files.refuse_pickled(place)
    verify_together(folder, training.context)
    resume = folder / RunLayout.RESUME
    try:
        training.module.load_state_dict(_read_tensors(resume, WEIGHTS, training.module.state_dict()))
        if training.ema:
            training.ema.module.load_state_dict(_read_tensors(resume, EMA, training.ema.state_dict()))
    except RuntimeError as error:  # torch names each tensor that differs
        raise RunError(
            f"the weights don't match the run's recipe: {error}",
            location=str(resume),
            hint="undo the changes to recipe.toml",
        ) from error
    training.optimizer.load_state_tensors(_read_tensors(resume, OPTIMIZER, training.optimizer.state_tensors()))
    if not training.context.is_main_process:
        return read_state(folder)
    files.recover(run / RunLayout.BEST)
    # A kill during a save leaves these folders.
    for name in ("step-*", RunLayout.BEST, f"{RunLayout.KEPT}*"):
        for leftover in run.glob(f".{name}.aside-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return read_state(folder)


def verify_together(folder: Path, context: DistributedContext) -> None:
    """Compares the files of a checkpoint with its manifests, each rank a part of them.

    Raises:
        DamagedError: on every rank: a file is damaged.
    """
    error: DamagedError | None = None
    try:
        places = (folder, folder / RunLayout.RESUME)
        entries = [(each["bytes"], at, name) for at in places for name, each in files.read_manifest(at).items()]
        own = sorted(entries, reverse=True)[context.rank :: context.ranks]  # similar numbers of bytes
        for place in places:
            files.verify_manifest(place, digested={name for _, at, name in own if at == place})
    except DamagedError as caught:
        error = caught
    last_rank = context.largest(context.rank + 1 if error else 0) - 1
    if error:
        others = [path.name for path in sorted(folder.parent.glob("step-*")) if path != folder]
        earlier = f", or resume from an earlier step: {how_to_point(folder.parent, others[-1])}" if others else ""
        raise DamagedError(error.message, location=error.location, hint=f"restore it from a copy{earlier}") from error
    if last_rank >= 0:
        raise DamagedError(
            f"rank {last_rank} found a damaged file", location=str(folder), hint="read the message of that rank"
        )


def latest(run: Path) -> Path:
    """Returns the folder of the last complete step.

    Raises:
        RunError: the run has no checkpoint, or `latest` became a folder when the run was copied.
        DamagedError: the step that `latest` names is missing.
    """
    link = run / RunLayout.LATEST
    if not os.path.lexists(link):
        raise RunError(
            "this run has no checkpoint yet",
            location=str(run),
            hint="delete the folder and start a new run",
        )
    if link.is_dir() and not link.is_symlink():
        raise RunError(
            "`latest` is a folder, not a link",
            location=str(link),
            hint="delete it and link the last step: ln -s step-… latest (cp -a and rsync -a keep links)",
        )
    return follow(link)


def read_state(folder: Path) -> TrainState:
    """Reads the training state of a step folder.

    Raises:
        DamagedError: it is damaged, or another version of this package wrote it.
    """
    path = folder / RunLayout.RESUME / _STATE
    tree: Any = files.read_json(path)
    try:
        return TrainState.from_json(tree)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedError(
            f"invalid training state: {type(error).__name__}: {error}",
            location=str(path),
            hint="resume with the version of unmask that env.json names",
        ) from error


def _read_tensors(resume: Path, kind: str, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the tensors of a kind; of one that is sharded in `current`, only this rank's rows."""
    tensors: dict[str, Tensor] = {}
    with open_tensors(resume, kind) as saved:
        for name in saved:
            like = current.get(name)
            if like is None or tuple(like.shape) != saved.shape(name):  # an error, which is reported with both shapes
                tensors[name] = saved.whole(name)
            else:
                tensors[name] = like_parameter(saved.rows(name, *held_rows(like)), like)
    return tensors


# The checkpoints of a run ---------------------------------------------------------------------------------------------


def earlier_steps(run: Path, step: int, is_due: IsDue) -> list[int]:
    """Returns the numbers of the checkpoints before a step, the one to go back to first.

    Checkpoints at the interval of the run come first, and of these the last one. Those that a signal left are at any
    step, and a run that was stopped and resumed should go back to the same step as one that was not.
    """
    earlier = [number for number, _ in _checkpoints(run) if number < step]
    return sorted(earlier, key=lambda number: (is_due(number, math.inf), number), reverse=True)


def outdated_checkpoints(run: Path, step: int, keep: int, is_due: IsDue) -> list[Path]:
    """Returns the folders of the checkpoints that are deleted when that of a step is complete.

    Of those at the interval of the run, to which it goes back, `keep` are kept. Those that a signal left are only for
    resuming: `keep` are kept until the next one at the interval, and longer only if there would be fewer than `keep`.
    """
    folders = dict(sorted(_checkpoints(run)))
    at_interval = [number for number in folders if is_due(number, math.inf)]
    others = [number for number in folders if number not in at_interval]
    kept = set(at_interval[-keep:])
    kept |= set(others[-keep:] if step in others else others[::-1][: max(keep - len(kept), 0)])
    return [folder for number, folder in folders.items() if number not in kept and number != step]


def make_latest(run: Path, step: int) -> None:
    """Points `latest` to the checkpoint of a step, and then deletes those of later steps.

    A kill between the two leaves checkpoints that the next call deletes.
    """
    for number, folder in _checkpoints(run):
        if number == step:
            files.write_pointer(run / RunLayout.LATEST, folder.name)
    for number, folder in _checkpoints(run):
        if number > step:
            shutil.rmtree(folder, ignore_errors=True)


def recover_checkpoints(run: Path) -> None:
    """Restores a checkpoint that was being replaced when the run was killed. No other process may use the run."""
    for folder in replaced_checkpoints(run):
        files.recover(folder)


def replaced_checkpoints(run: Path) -> list[Path]:
    """Returns the checkpoints whose replacement was interrupted between two renames of `files.atomic_directory`."""
    numbers = [path.name.split(".")[1] for path in run.glob(".step-*.aside-old")]
    return [run / name for name in numbers if not (run / name).exists()]


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Returns number and folder of each checkpoint of a run."""
    folders = [folder for folder in run.glob("step-*") if folder.name.removeprefix("step-").isdecimal()]
    return [(int(folder.name.removeprefix("step-")), folder) for folder in folders if folder.is_dir()]
