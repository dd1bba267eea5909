"""Room card: what a run will cost, measured before it starts.

Comes in: the parts of a run. Goes out: seconds per step of each stage, per validation and per save (by warmed-up real
ones on copies that are thrown away), bytes of memory and disk. Called by: pretrain.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from unmask.contracts import Learner
from unmask.optim import Optimiser
from unmask.train.loop import Duty, Standing, Training, train
from unmask.train.plan import Measured, Plan, StagePlan, StageSettings, always

_WARM_UP_STEPS = 2
_PROBE_STEPS = 24  # at most; fewer where steps are slow
_PROBE_SECONDS = 2.5  # per stage


def probe(
    training: Training,
    stages: tuple[StageSettings, ...],
    build_optimiser: Callable[[Learner], Optimiser],
    validate: Callable[[Learner], object],
    save: Callable[[Path, Learner, Optimiser], object],
) -> Measured:
    """Time real steps at each stage's length, one validation and one save, on a copy of the learner.

    The run itself is untouched: the copy has its own weights and optimiser, and samples are taken from the order, not
    used up.
    """
    learner = copy.deepcopy(training.learner)
    optimiser = build_optimiser(learner)
    step_seconds: list[float] = []
    for number, stage in enumerate(stages):
        trial = replace(
            training,
            learner=learner,
            optimiser=optimiser,
            feeds=[training.feeds[number]],
            plan=Plan((StagePlan(stage.length, stage.batch_tokens, 0, _WARM_UP_STEPS + _PROBE_STEPS, 0.0),)),
        )
        step_seconds.append(_seconds_per_step(trial))
    begin = time.perf_counter()
    validate(learner)
    validated = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), learner, optimiser)
    world = training.world
    seconds = world.sum([*step_seconds, validated - begin, time.perf_counter() - validated])
    *steps, validate_seconds, save_seconds = [value / world.ranks for value in seconds]  # one plan for all ranks
    return Measured(tuple(steps), validate_seconds, save_seconds)


def _seconds_per_step(trial: Training) -> float:
    """The median step after the warm-up."""
    times: list[float] = []
    last = time.perf_counter()

    def note(standing: Standing) -> None:
        nonlocal last
        now = time.perf_counter()
        times.append(now - last)
        last = now

    def enough() -> int:
        measured = times[_WARM_UP_STEPS:]
        return 1 if measured and sum(measured) > _PROBE_SECONDS else 0

    train(trial, Standing(), [Duty(always, note)], enough)
    measured = sorted(times[_WARM_UP_STEPS:] or times)
    return measured[len(measured) // 2]


def memory_bytes(
    parameters: int, width: int, layers: int, micro_tokens: int, vocabulary: int, asked_share: float
) -> int:
    """A rough count: weights, gradients and optimiser in float32, activations and logits of one micro-batch."""
    activations = micro_tokens * layers * width * 34 * 4
    logits = int(micro_tokens * asked_share) * vocabulary * 4 * 3
    return parameters * 4 * 4 + activations + logits


def disk_bytes(parameters: int, keep: int, corpus_tokens: int, vocabulary: int) -> int:
    """Step folders (the model twice, the optimiser's state) and token shards with their marks."""
    per_token = (2 if vocabulary <= 1 << 16 else 4) + 1
    return (keep + 1) * parameters * 4 * 4 + corpus_tokens * per_token
