"""Room card: a step on disk, and the way back.

Comes in: the model, the optimizer, where the run stands. Goes out: RUN/step-0004000/ (the folder that `transformers`
opens, plus resume/), RUN/latest and RUN/best/ (a model folder alone), written aside, synced, sealed with digests and
renamed; and the same in memory again, bit for bit. Called by: pretrain, workshop.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import DamagedError, RunError
from unmask.models.model import BEST, LATEST, Model, follow, how_to_point, save_model
from unmask.training.loop import MetricAccumulator, TrainLoopInputs, TrainState

RESUME = "resume"
_STATE, _OPTIMIZER, _MASTER = "state.json", "optimizer.safetensors", "weights.safetensors"
_AVERAGE = "ema.safetensors"
OBJECTIVE = "objective.safetensors"  # the objective's own parameters, beside the model's


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:07d}"


def save(
    run: Path,
    model: Model,
    training: TrainLoopInputs,
    state: TrainState,
    keep: int,
    say: Callable[[str], object] = lambda sentence: None,
) -> Path:
    """Write a step folder, point `latest` at it and remove all but the last `keep`.

    Raises:
        StoreError: there is no room, or no right to write; the steps before stand as they were.
    """
    target = run / step_name(state.step)
    with files.atomic_directory(target) as folder:
        save_model(folder, model)
        _write_parts(folder, training.judged.parts)
        resume = folder / RESUME
        resume.mkdir()
        # The ecosystem's tensors stack Q, K and V; ours stand beside them, so that resuming computes nothing.
        _write_tensors(resume / _MASTER, training.learner.state_dict())
        _write_tensors(resume / _OPTIMIZER, training.optimizer.state_tensors())
        if training.ema:
            _write_tensors(resume / _AVERAGE, training.ema.state_dict())
        files.write_json(resume / _STATE, asdict(state))
        files.write_manifest(resume)
        files.write_manifest(folder)
    if not files.write_pointer(run / LATEST, target.name):
        say(f"symbolic links can't be made here: `{LATEST}` is a small file that names the last step")
    for old in sorted(run.glob("step-*"))[:-keep]:
        if old.name != target.name:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_parts(folder: Path, parts: nn.Module | None) -> None:
    """The objective's own parameters as they are judged, where it has any."""
    tensors = parts.state_dict() if parts else {}
    if tensors:
        _write_tensors(folder / OBJECTIVE, tensors)


def save_best(run: Path, model: Model, parts: nn.Module | None = None) -> Path:
    """Put this model in the place of the best so far: a whole model folder, without what resuming needs.

    `parts` are the objective's own, which stand beside it.
    """
    target = run / BEST
    with files.atomic_directory(target) as folder:
        save_model(folder, model)
        _write_parts(folder, parts)
        files.write_manifest(folder)
    return target


def load(run: Path, training: TrainLoopInputs) -> TrainState:
    """Put a run's latest step back into what it trains; the cost does not grow with the steps done.

    Raises:
        RunError: nothing was saved yet, or recipe.toml was changed into one of another shape.
        DamagedError: a file is missing, was cut short or changed; it is named.
    """
    folder = latest(run)
    try:
        files.verify_manifest(folder)
        files.verify_manifest(folder / RESUME)
    except DamagedError as error:
        others = [one.name for one in sorted(run.glob("step-*")) if one != folder]
        earlier = f", or go on from an earlier step: {how_to_point(run, others[-1])}" if others else ""
        raise DamagedError(error.message, location=error.location, hint=f"restore it from a copy{earlier}") from error
    resume = folder / RESUME
    try:
        training.learner.load_state_dict(_tensors(resume / _MASTER))
        if training.ema:
            training.ema.learner.load_state_dict(_tensors(resume / _AVERAGE))
    except RuntimeError as error:  # torch names every tensor that differs
        raise RunError(
            f"these weights are not those of the run's recipe: {error}",
            location=str(resume),
            hint="undo what was changed in recipe.toml",
        ) from error
    training.optimizer.load_state_tensors(_tensors(resume / _OPTIMIZER))
    files.recover(run / BEST)
    for leftover in [*run.glob(".step-*.aside-*"), *run.glob(f".{BEST}.aside-*")]:  # of saves that a kill cut
        shutil.rmtree(leftover, ignore_errors=True)
    return standing(folder)


def latest(run: Path) -> Path:
    """The folder of the last step that was saved whole.

    Raises:
        RunError: nothing was saved yet, or copying has made `latest` a folder.
        DamagedError: what `latest` names is gone.
    """
    link = run / LATEST
    if not os.path.lexists(link):
        raise RunError(
            "this run has not saved a step yet",
            location=str(run),
            hint="remove the folder and start again with pretrain",
        )
    if link.is_dir() and not link.is_symlink():
        raise RunError(
            "`latest` is a folder, where the next save would put a link",
            location=str(link),
            hint="remove it and link the last step: ln -s step-… latest (cp -a and rsync -a keep links)",
        )
    return follow(link)


def standing(folder: Path) -> TrainState:
    """Where the run stood when this step folder was written."""
    state: dict[str, Any] = files.read_json(folder / RESUME / _STATE)
    names = {field.name for field in dataclasses.fields(TrainState)}
    if set(state) != names:
        raise DamagedError(
            f"this state was written by another version: they differ in {', '.join(sorted(set(state) ^ names))}",
            location=str(folder / RESUME / _STATE),
            hint="resume with the version of unmask that wrote it (env.json names it)",
        )
    state["window"] = MetricAccumulator(**state["window"])
    return TrainState(**state)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(
            f"not readable as safetensors: {error}", location=str(path), hint="resume from another step folder"
        ) from error
