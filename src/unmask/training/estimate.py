"""Room card: what a run will cost, measured before it starts.

Comes in: the parts of a run. Goes out: seconds per step of each stage, per validation and per save (by warmed-up real
ones on copies that are thrown away), bytes of memory and disk. Called by: pretrain.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unmask.training.loop import EMA, Callback, TrainLoopInputs, TrainModule, TrainState, train
from unmask.training.optim import Optimizer
from unmask.training.plan import Measured, Plan, StageConfig, StagePlan, always


@dataclass(frozen=True)
class CostEstimate:
    """What a run will cost, before it starts."""

    recipe: str
    parameters: int
    flops_per_token: float  # training: forward and backward, the mean over the planned tokens
    documents: int
    corpus_tokens: int
    plan: Plan
    epochs: tuple[float, ...]  # how often the text will be seen, in each stage
    texts_seen: Mapping[str, float]  # the same in all, for each text by its name
    flops_per_second: float  # of this machine's matrix products at the model's own shapes
    memory_bytes: int
    disk_bytes: int
    device: str
    precision: str
    threads: int
    optimizer: str
    patience: int = 0  # validations without gain after which the run ends; 0: never
    decay: str = ""  # when the rates come down, in words


_PROBE_SECONDS = 2.5  # per stage


@dataclass(frozen=True)
class ProbeEffort:
    """How many steps of each stage are timed: `steps` at most, fewer where they are slow."""

    warm_up: int
    steps: int


FULL, QUICK = ProbeEffort(2, 24), ProbeEffort(1, 3)
"""Of a budget in time, whose number of steps depends on it; of any other, which only tells how long it will take."""


def measure_step_time(
    training: TrainLoopInputs,
    stages: tuple[StageConfig, ...],
    build_optimizer: Callable[[TrainModule], Optimizer],
    validate: Callable[[Path, TrainLoopInputs], object],
    save: Callable[[Path, TrainLoopInputs], object],
    care: ProbeEffort = FULL,
) -> Measured:
    """Time real steps at each stage's length, one validation and one save, on a copy of the learner.

    `validate` and `save` are given a folder to write to and a training whose parts are copies. The run itself is
    untouched: the copy has its own weights and optimizer, and samples are taken from the order, not used up.
    """
    learner = copy.deepcopy(training.learner)
    trial = replace(
        training,
        learner=learner,
        optimizer=build_optimizer(learner),
        ema=EMA(learner, training.ema.decay) if training.ema else None,
    )
    step_seconds: list[float] = []
    for number, stage in enumerate(stages):
        plan = Plan((StagePlan(stage.max_seq_len, stage.batch_tokens, 0, care.warm_up + care.steps, 0.0),))
        step_seconds.append(_seconds_per_step(replace(trial, feeds=[training.feeds[number]], plan=plan), care.warm_up))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        validate(Path(folder), trial)
        validated = time.perf_counter()
        save(Path(folder), trial)
    world = training.world
    seconds = world.sum([*step_seconds, validated - begin, time.perf_counter() - validated])
    *steps, validate_seconds, save_seconds = [value / world.ranks for value in seconds]  # one plan for all ranks
    return Measured(tuple(steps), validate_seconds, save_seconds)


def _seconds_per_step(trial: TrainLoopInputs, warm_up: int) -> float:
    """The median step after the warm-up."""
    times: list[float] = []
    last = time.perf_counter()

    def note(state: TrainState) -> None:
        nonlocal last
        now = time.perf_counter()
        times.append(now - last)
        last = now

    def enough() -> int:
        measured = times[warm_up:]
        return 1 if measured and sum(measured) > _PROBE_SECONDS else 0

    train(trial, TrainState(), [Callback(always, note)], enough)
    measured = sorted(times[warm_up:] or times)
    return measured[len(measured) // 2]


def memory_bytes(
    parameters: int,
    width: int,
    layers: int,
    micro_tokens: int,
    vocabulary: int,
    masked_fraction: float,
    *,
    averaged: bool = False,
) -> int:
    """A rough count: weights, their average, gradients and optimizer, and one micro-batch's activations and logits."""
    activations = micro_tokens * layers * width * 34 * 4
    logits = int(micro_tokens * masked_fraction) * vocabulary * 4 * 3
    return parameters * 4 * (4 + averaged) + activations + logits


def disk_bytes(
    parameters: int, keep: int, corpus_tokens: int, vocabulary: int, *, averaged: bool = False, best: bool = False
) -> int:
    """Step folders (the model twice, the average, the optimizer's state), the best model, token shards with marks.

    A folder is written before an older one goes: one step folder more than are kept, and the best model twice.
    """
    per_token = (2 if vocabulary <= 1 << 16 else 4) + 1
    return ((keep + 1) * (4 + averaged) + 2 * best) * parameters * 4 + corpus_tokens * per_token
