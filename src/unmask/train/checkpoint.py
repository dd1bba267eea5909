"""Room card: a step on disk, and the way back.

Comes in: the model, the optimiser, where the run stands. Goes out: RUN/step-0004000/ (the folder that `transformers`
opens, plus resume/) and RUN/latest, written aside, synced, sealed with digests and renamed; and the same in memory
again, bit for bit. Called by: pretrain.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask import bundle, store
from unmask.bundle import Model
from unmask.errors import DamagedError, RunError
from unmask.optim import Optimiser
from unmask.train.loop import Standing, Window

RESUME = "resume"
_STATE, _OPTIMISER, _MASTER = "state.json", "optimiser.safetensors", "weights.safetensors"


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:07d}"


def save(
    run: Path, model: Model, learner_state: Mapping[str, Tensor], optimiser: Optimiser, standing: Standing, keep: int
) -> Path:
    """Write a step folder, point `latest` at it and remove all but the last `keep`."""
    target = run / step_name(standing.step)
    with store.new_folder(target) as folder:
        bundle.save(folder, model)
        resume = folder / RESUME
        resume.mkdir()
        # The ecosystem's tensors stack Q, K and V; ours stand beside them, so that resuming computes nothing.
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in learner_state.items()}, resume / _MASTER
        )
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in optimiser.state_tensors().items()}
        save_file(state, resume / _OPTIMISER)
        store.write_json(resume / _STATE, asdict(standing))
        store.seal(resume)
        store.seal(folder)
    store.point(run / bundle.LATEST, target.name)
    for old in sorted(run.glob("step-*"))[:-keep]:
        if old.name != target.name:
            shutil.rmtree(old, ignore_errors=True)
    return target


def load(run: Path, learner: Any, optimiser: Optimiser) -> Standing:
    """Put a run's latest step back into the learner and the optimiser; the cost does not grow with the steps done.

    Raises:
        RunError: nothing was saved yet, or recipe.toml was changed into one of another shape.
        DamagedError: a file is missing, was cut short or changed; it is named.
    """
    folder = latest(run)
    try:
        store.check_seal(folder)
        store.check_seal(folder / RESUME)
    except DamagedError as error:
        others = [one.name for one in sorted(run.glob("step-*")) if one != folder]
        earlier = f", or go on from an earlier step: ln -sfn {others[-1]} {run / bundle.LATEST}" if others else ""
        raise DamagedError(error.what, where=error.where, next=f"restore it from a copy{earlier}") from error
    resume = folder / RESUME
    try:
        learner.load_state_dict(_tensors(resume / _MASTER))
    except RuntimeError as error:  # torch names every tensor that differs
        raise RunError(
            f"these weights are not those of the run's recipe: {error}",
            where=str(resume / _MASTER),
            next="undo what was changed in recipe.toml",
        ) from error
    optimiser.load_state_tensors(_tensors(resume / _OPTIMISER))
    for leftover in run.glob(".step-*.aside-*"):  # of saves that a kill cut short
        shutil.rmtree(leftover, ignore_errors=True)
    return standing(folder)


def latest(run: Path) -> Path:
    """The folder of the last step that was saved whole.

    Raises:
        RunError: nothing was saved yet, or copying has made `latest` a folder.
        DamagedError: what `latest` names is gone.
    """
    link = run / bundle.LATEST
    if not os.path.lexists(link):
        raise RunError(
            "this run has not saved a step yet", where=str(run), next="remove the folder and start again with pretrain"
        )
    if not link.is_symlink():
        raise RunError(
            "`latest` is a folder, where the next save would put a link",
            where=str(link),
            next="remove it and link the last step: ln -s step-… latest (cp -a and rsync -a keep links)",
        )
    return bundle.follow(link)


def standing(folder: Path) -> Standing:
    """Where the run stood when this step folder was written."""
    state: dict[str, Any] = store.read_json(folder / RESUME / _STATE)
    names = {field.name for field in dataclasses.fields(Standing)}
    if set(state) != names:
        raise DamagedError(
            f"this state names {sorted(set(state) ^ names)}, which this version doesn't",
            where=str(folder / RESUME / _STATE),
            next="resume with the version of unmask that wrote it (env.json names it)",
        )
    state["window"] = Window(**state["window"])
    return Standing(**state)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(
            f"not readable as safetensors: {error}", where=str(path), next="resume from another step folder"
        ) from error
