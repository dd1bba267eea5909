"""Checkpoints of a run: writing step folders, the best model and the link `latest`, and restoring a training state."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import DamagedError, RunError
from unmask.core.files import RunLayout
from unmask.models.model import Model, follow, how_to_point, save_model
from unmask.models.parallel import as_held, gather
from unmask.training.loop import TrainLoopInputs, TrainState

_log = logging.getLogger("unmask")
_STATE, _OPTIMIZER, _WEIGHTS, _EMA = "state.json", "optimizer.safetensors", "weights.safetensors", "ema.safetensors"


def step_name(step: int) -> str:
    """Returns the name of a step's folder."""
    return f"step-{step:07d}"


def save(
    run: Path,
    model: Model,
    parts: nn.Module,
    training: TrainLoopInputs,
    state: TrainState,
    keep: int,
) -> Path:
    """Writes a step folder, points `latest` to it and deletes all but the last `keep` step folders.

    `transformers` loads the folder as a model. Its `resume/` contains the training state, which only unmask reads. All
    ranks call this: rank 0 gathers one tensor after the other, and writes.

    Args:
        run: Folder of the run.
        model: The model, with whole weights on rank 0.
        parts: Modules of its objective.
        training: Weights and optimizer, which may be sharded.
        state: Training state.
        keep: Number of step folders that are kept.

    Raises:
        StoreError: the disk is full or not writable; earlier steps are intact.
    """
    target = run / step_name(state.step)
    if not training.context.is_main_process:
        for tensors in _resume_tensors(training).values():
            for tensor in tensors.values():
                gather(tensor)
        return target
    with files.atomic_directory(target) as folder:
        save_model(folder, model)
        _write_parts(folder, parts)
        resume = folder / RunLayout.RESUME
        resume.mkdir()
        # model.safetensors has the layout of transformers: some tensors are stacked or transposed. A resume needs the
        # tensors of the modules themselves.
        for name, tensors in _resume_tensors(training).items():
            _write_tensors(resume / name, tensors)
        files.write_json(resume / _STATE, state.to_json())
        files.write_manifest(resume)
        files.write_manifest(folder)
    if not files.write_pointer(run / RunLayout.LATEST, target.name):
        _log.info(f"can't create symbolic links: `{RunLayout.LATEST}` is a text file that names the last checkpoint")
    for old in sorted(run.glob("step-*"))[:-keep]:
        if old.name != target.name:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _resume_tensors(training: TrainLoopInputs) -> dict[str, Mapping[str, Tensor]]:
    """Returns the tensors of each file of resume/: of a sharded module, this rank's rows."""
    average = {_EMA: training.ema.state_dict()} if training.ema else {}
    return {_WEIGHTS: training.module.state_dict(), _OPTIMIZER: training.optimizer.state_tensors(), **average}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {name: gather(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    files.save_tensors(whole, path)


def _write_parts(folder: Path, parts: nn.Module | None) -> None:
    """Writes the parameters of the objective, if it has any."""
    tensors = parts.state_dict() if parts else {}
    if tensors:
        _write_tensors(folder / RunLayout.OBJECTIVE, tensors)


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


def load(run: Path, training: TrainLoopInputs) -> TrainState:
    """Restores weights, optimizer state and training state from a run's latest step.

    Raises:
        RunError: the run has no checkpoint, or recipe.toml was changed to a model of another shape.
        DamagedError: a file is missing, truncated or changed; the error names it.
    """
    folder = latest(run)
    try:
        files.verify_manifest(folder)
        files.verify_manifest(folder / RunLayout.RESUME)
    except DamagedError as error:
        others = [path.name for path in sorted(run.glob("step-*")) if path != folder]
        earlier = f", or resume from an earlier step: {how_to_point(run, others[-1])}" if others else ""
        raise DamagedError(error.message, location=error.location, hint=f"restore it from a copy{earlier}") from error
    resume = folder / RunLayout.RESUME
    try:
        training.module.load_state_dict(_read_tensors(resume / _WEIGHTS, training.module.state_dict()))
        if training.ema:
            training.ema.module.load_state_dict(_read_tensors(resume / _EMA, training.ema.state_dict()))
    except RuntimeError as error:  # torch names each tensor that differs
        raise RunError(
            f"the weights don't match the run's recipe: {error}",
            location=str(resume),
            hint="undo the changes to recipe.toml",
        ) from error
    training.optimizer.load_state_tensors(_read_tensors(resume / _OPTIMIZER, training.optimizer.state_tensors()))
    if not training.context.is_main_process:
        return read_state(folder)
    files.recover(run / RunLayout.BEST)
    # A kill during a save leaves these folders.
    for name in ("step-*", RunLayout.BEST, f"{RunLayout.KEPT}*"):
        for leftover in run.glob(f".{name}.aside-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return read_state(folder)


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
        DamagedError: another version of this package wrote it.
    """
    path = folder / RunLayout.RESUME / _STATE
    tree: Any = files.read_json(path)
    try:
        return TrainState.from_json(tree)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"invalid training state: {type(error).__name__}: {error}",
            location=str(path),
            hint="resume with the version of unmask that env.json names",
        ) from error


def _read_tensors(path: Path, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a file of tensors; of one that is sharded in `current`, it keeps this rank's rows."""
    files.check_tensor_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            file: Any = opened
            tensors: dict[str, Tensor] = {}
            names: list[str] = file.keys()
            for name in names:
                tensor = file.get_tensor(name)
                like = current.get(name)
                # Another shape is an error, which is reported with both shapes.
                tensors[name] = tensor if like is None or like.shape != tensor.shape else as_held(tensor, like)
            return tensors
    except (SafetensorError, OSError) as error:
        raise DamagedError(
            f"invalid safetensors file: {error}", location=str(path), hint="resume from another step folder"
        ) from error
