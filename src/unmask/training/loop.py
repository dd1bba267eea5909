"""The training loop: gradient accumulation over micro-batches and ranks, callbacks, signals, weight averaging.

The loop keeps no generator state. The samples of a step follow from its number and the data cursor, and masks follow
from (seed, epoch, sample, offset). The batches of the next step can therefore be prepared in a background thread.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from unmask.core import rng
from unmask.core.distributed import DistributedContext
from unmask.core.errors import Interrupted, RunError
from unmask.core.hardware import cores
from unmask.core.types import AdaptiveObjective, Batch, LossSums, MaskedBatch, Objective
from unmask.models import EncoderModule, HeadModule
from unmask.models.parallel import Parallelism, held
from unmask.training.optim import Optimizer
from unmask.training.plan import Plan

PHASES = ("data", "forward", "backward", "optimizer")
PREFETCH_THREAD = "unmask-prefetch"
FINGERPRINTS = 1 << 32  # of samples; sums over ranks stay exact in float64
MAX_SKIPPED_STEPS = 10  # in a row


# Modules --------------------------------------------------------------------------------------------------------------


class TrainModule(nn.Module):
    """All trainable parameters of a run: encoder, head and the modules of its objectives."""

    # The attribute names are part of the checkpoint format: they begin the names of the saved tensors.

    def __init__(self, encoder: EncoderModule, head: HeadModule, parts: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.parts = parts

    def forward(self, objective: Objective, masked: MaskedBatch) -> LossSums:
        """Returns an objective's loss sums for one micro-batch."""
        return objective.loss(self.encoder, self.head, masked)


class EMA:
    """Exponential moving average of the weights in float32: average ← average + (1 − d) · (weights − average).

    After n earlier steps, d is min(decay, (1 + n) / (10 + n)). Early on the average therefore covers about n / 9 steps
    instead of 1 / (1 − decay), so it forgets the random initialization quickly and runs of any length can be validated.
    Dividing by 1 − decayⁿ instead would weight all early steps alike: after 100 steps, the random weights of the first
    step would count as much as those of the last. n is the step number, so only the average itself is saved.
    """

    def __init__(self, copied: TrainModule, decay: float) -> None:
        """Creates an average that begins with the weights of a copy, which it changes."""
        assert 0 < decay < 1, f"invalid EMA decay: got {decay}"
        self.decay = decay
        self.module = copied.float()
        self.module.requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """Returns the decay that is used after step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, module: TrainModule, step: int, applies: Tensor | None = None) -> None:
        """Adds the weights as they are after step `step`, counted from 0.

        If `applies`, a boolean on the device, is false, the average stays as it is.
        """
        share = 1 - self.decay_at(step)
        if applies is not None:
            share = torch.where(applies, share, 0.0)
        for average, weights in zip(self.module.parameters(), module.parameters(), strict=True):
            held(average).lerp_(held(weights).to(average.dtype), share)
        for average, values in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(values)  # buffers are not averaged

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged tensors (not copies) under the names of the module's weights."""
        return self.module.state_dict()


class StepLoader(Protocol):
    """Training samples of one stage."""

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """Returns this rank's micro-batches of the next step and the cursor after them.

        The micro-batches of all ranks together hold at least `tokens` tokens.
        """
        ...

    def first_cursor(self, stage: int) -> int:
        """Returns the cursor at which a stage begins."""
        ...


@dataclass(frozen=True)
class TrainLoopInputs:
    """The parts of a run that stay the same objects while it trains."""

    module: TrainModule
    objectives: Sequence[Objective]  # one per stage
    loaders: Sequence[StepLoader]  # one per stage
    optimizer: Optimizer
    lr_factor: Callable[[float, int], float]  # of progress and step
    context: DistributedContext
    seed: int
    ema: EMA | None = None
    parallelism: Parallelism = field(default_factory=Parallelism)  # how the ranks share the module
    max_skipped_steps: int = MAX_SKIPPED_STEPS  # steps in a row without a finite gradient, after which training ends

    def eval_module(self, *, main_only: bool = False) -> contextlib.AbstractContextManager[TrainModule]:
        """Returns a context with the weights that are validated and saved: the moving average if there is one.

        All ranks enter it together. With `main_only`, only rank 0 may use the weights.
        """
        return self.parallelism.whole(self.ema.module if self.ema else self.module, main_only=main_only)


# State ----------------------------------------------------------------------------------------------------------------


@dataclass
class MetricAccumulator:
    """Sums over the steps since the last log line.

    It is saved in checkpoints, so that a resumed run logs the same numbers as an uninterrupted one.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    samples: int = 0  # fingerprint of the samples
    seconds: float = 0.0
    data_wait_seconds: float = 0.0  # part of `seconds`
    skipped: int = 0  # steps whose loss or gradient was not finite; they are not in sums and counts
    rollback: dict[str, Any] | None = None  # what `TrainState.go_back` did since the last log line

    def add(self, step_metrics: Mapping[str, tuple[float, int]]) -> None:
        """Adds the (sum, count) of each metric of one step."""
        for name, (total, count) in step_metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name: str) -> float:
        """Returns sum over count, or NaN if nothing was counted."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else float("nan")


@dataclass(frozen=True)
class SharedStep:
    """What the ranks agree on before the first forward pass of a step."""

    stop: StopReason | None  # a request of any rank
    clock: float  # mean over the ranks: a callback that is due after some seconds is due on all of them
    tokens: int
    samples: int  # fingerprint: a sum over the samples, whatever rank has them
    counts: Mapping[str, int]  # of each loss term


@dataclass
class TrainState:
    """Everything that changes during training except weights and optimizer state. It is saved as state.json."""

    step: int = 0
    cursor: int = 0  # number of the next sample; the whole state of the data loader
    tokens: int = 0
    seconds: float = 0.0  # wall clock of the run: training, validation and saving
    phase_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    metrics: MetricAccumulator = field(default_factory=MetricAccumulator)
    lr: float = 0.0  # of the last step, for the AdamW parameters
    grad_norm: float = 0.0  # of the last step that was not skipped
    validation: dict[str, Any] | None = None  # the last one, with its step
    best: dict[str, Any] | None = None  # step and loss of the best one, whose model is in best/
    lowest_loss: float | None = None  # of the validations that led to these weights; unlike `best`, it goes back too
    without_gain: int = 0  # number of validations since the one with the lowest loss
    skipped_steps: int = 0  # in the whole run, with those before a return to an earlier checkpoint
    skipping_since: int | None = None  # first of the skipped steps in a row that end with the last step, from 1
    rollbacks: int = 0  # how often the run went back to an earlier checkpoint
    lr_scale: float = 1.0  # factor on all learning rates; lower after each rollback

    @property
    def training_seconds(self) -> float:
        """Seconds spent waiting for data, in forward, in backward and in the optimizer."""
        return sum(self.phase_seconds.values())

    def record_step(self, step: SharedStep, cursor: int, seconds: float, waited: float) -> None:
        """Counts a step that took some seconds, of which it waited some for data."""
        self.step += 1
        self.cursor = cursor
        self.tokens += step.tokens
        self.metrics.tokens += step.tokens
        self.metrics.samples = (self.metrics.samples + step.samples) % FINGERPRINTS
        self.metrics.seconds += seconds
        self.metrics.data_wait_seconds += waited

    def record_skipped(self, step: int) -> int:
        """Counts a skipped step, numbered from 1; returns how many were skipped in a row."""
        self.metrics.skipped += 1
        self.skipped_steps += 1
        if self.skipping_since is None:
            self.skipping_since = step
        return step - self.skipping_since + 1

    def go_back(self, saved: TrainState, lr_factor: float) -> None:
        """Becomes the state of an earlier checkpoint, with lower learning rates.

        Times, the number of skipped steps and the best model, which is still there, are those of the whole run. The
        patience for validations without gain goes back too: those of the discarded steps say nothing about these rates.
        """
        scale = self.lr_scale * lr_factor
        rollback = {"from_step": self.skipping_since, "to_step": saved.step, "learning_rate_scale": scale}
        whole = ("seconds", "phase_seconds", "skipped_steps", "best", "rollbacks")
        vars(self).update(vars(saved) | {name: getattr(self, name) for name in whole})
        self.lr_scale, self.rollbacks, self.skipping_since = scale, self.rollbacks + 1, None
        self.metrics.rollback = rollback

    def record_validation(self, loss: float) -> bool:
        """Records the validation loss of this step and returns whether it is the lowest so far.

        While steps are skipped, validations don't count as ones without gain: they are of the same weights.
        """
        improved = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        if improved:
            self.best = {"step": self.step, "loss": loss}
        if self.skipping_since is None:
            gained = math.isfinite(loss) and (self.lowest_loss is None or loss < self.lowest_loss)
            self.lowest_loss, self.without_gain = (loss, 0) if gained else (self.lowest_loss, self.without_gain + 1)
        return improved

    def pop_metrics(self) -> MetricAccumulator:
        """Returns the metrics since the last call and starts new sums."""
        metrics, self.metrics = self.metrics, MetricAccumulator()
        return metrics

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Adds the seconds of a block to a phase."""
        begin = time.perf_counter()
        yield
        self.phase_seconds[phase] += time.perf_counter() - begin

    def to_json(self) -> dict[str, Any]:
        """Returns the content of state.json. The keys are a file format: a change needs a new `RUN_FORMAT`.

        Keys about skipped steps are there only if steps were skipped.
        """
        metrics, guards = asdict(self.metrics), {name: getattr(self, name) for name in _GUARDS}
        return {
            "step": self.step,
            "cursor": self.cursor,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "phase_seconds": dict(self.phase_seconds),
            "metrics": {key: value for key, value in metrics.items() if value or key not in ("skipped", "rollback")},
            "learning_rate": self.lr,
            "grad_norm": self.grad_norm,
            "validation": self.validation,
            "best": self.best,
            "validations_without_gain": self.without_gain,
            **({"guards": guards} if self.skipped_steps else {}),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> TrainState:
        """Returns the state that `to_json` wrote.

        Raises:
            KeyError, TypeError: a key is missing or has a value of another type.
        """
        metrics = cast("Mapping[str, Any]", tree["metrics"])
        guards, rollback = dict(tree.get("guards", {})), metrics.get("rollback")
        since, best = guards.get("skipping_since"), tree["best"]
        lowest = guards.get("lowest_loss", best["loss"] if best else None)
        return cls(
            step=int(tree["step"]),
            cursor=int(tree["cursor"]),
            tokens=int(tree["tokens"]),
            seconds=float(tree["seconds"]),
            phase_seconds={phase: float(tree["phase_seconds"][phase]) for phase in PHASES},
            metrics=MetricAccumulator(
                sums=dict(metrics["sums"]),
                counts=dict(metrics["counts"]),
                tokens=int(metrics["tokens"]),
                samples=int(metrics.get("samples", 0)),
                seconds=float(metrics["seconds"]),
                data_wait_seconds=float(metrics["data_wait_seconds"]),
                skipped=int(metrics.get("skipped", 0)),
                rollback=None if rollback is None else dict(rollback),
            ),
            lr=float(tree["learning_rate"]),
            grad_norm=float(tree["grad_norm"]),
            validation=tree["validation"],
            best=best,
            lowest_loss=None if lowest is None else float(lowest),
            without_gain=int(tree["validations_without_gain"]),
            skipped_steps=int(guards.get("skipped_steps", 0)),
            skipping_since=None if since is None else int(since),
            rollbacks=int(guards.get("rollbacks", 0)),
            lr_scale=float(guards.get("lr_scale", 1.0)),
        )


_GUARDS = ("skipped_steps", "skipping_since", "rollbacks", "lr_scale", "lowest_loss")  # fields of TrainState


# Callbacks and stopping -----------------------------------------------------------------------------------------------


class StopReason(Enum):
    """Why `train` returned."""

    PLAN_DONE = "all planned steps are done"
    EARLY = "early stopping"
    INTERRUPTED = "SIGINT"
    TERMINATED = "SIGTERM or SIGUSR1"

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 130 after Ctrl-C, 75 (try again) after a scheduler's signal, else 0."""
        return {StopReason.INTERRUPTED: 130, StopReason.TERMINATED: 75}.get(self, 0)


IsDue = Callable[[int, float], bool]
"""A function of (steps done, seconds since the callback last ended)."""


@dataclass(frozen=True)
class Callback:
    """Work that is repeated during training: `run` is called after each step for which `is_due` returns True."""

    is_due: IsDue
    run: Callable[[TrainState], None]
    reads_results: bool = True  # whether it needs the metrics of its step, for which a GPU has to be waited


@dataclass(frozen=True)
class LogCallback:
    """A callback that gets the metrics since it last ran. It runs before the other callbacks of a step."""

    is_due: IsDue
    run: Callable[[TrainState, MetricAccumulator], None]


def _no_stop() -> StopReason | None:
    return None


def _never(state: TrainState) -> bool:
    return False


# Data -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedStep:
    """The masked micro-batches of one step and the cursor after them."""

    masked_batches: list[MaskedBatch]
    cursor: int
    spare: MaskedBatch | None = None  # of the samples of rank 0, if this rank has none


def prepare_step(inputs: TrainLoopInputs, plan: Plan, step: int, cursor: int) -> PreparedStep:
    """Reads and masks this rank's micro-batches of a step. A pure function of step and cursor."""
    number = plan.stage_at(step)
    stage, loader = plan.stages[number], inputs.loaders[number]
    if step == stage.first_step:
        cursor = loader.first_cursor(number)
    batches, after = loader.step(cursor, stage.batch_tokens, inputs.context.rank, inputs.context.ranks)
    others = [] if batches else loader.step(cursor, stage.batch_tokens, 0, inputs.context.ranks)[0][-1:]
    objective, progress = inputs.objectives[number], plan.progress(step)
    masked = [
        objective.corrupt(replace(batch, progress=progress, step=step), inputs.seed) for batch in [*batches, *others]
    ]
    if inputs.context.device.type == "cuda":
        masked = [batch.pinned() for batch in masked]  # copies to the GPU are asynchronous
    return PreparedStep(masked[: len(batches)], after, masked[-1] if others else None)


def has_free_core(context: DistributedContext) -> bool:
    """Returns whether a background thread would not compete with the threads that train.

    On two cores, two training threads and this thread took 12 % longer for a step of recipe `demo` than without it.
    """
    return context.device.type != "cpu" or context.threads * context.ranks < cores()


def _prepared_steps(
    inputs: TrainLoopInputs, plan: Plan, state: TrainState, *, prefetch: bool | None
) -> Generator[PreparedStep]:
    """Yields the data of each remaining step. With `prefetch`, a thread prepares one step ahead.

    None means: if `has_free_core`. Closing the generator ends the thread. An exception of the thread is raised in the
    caller.
    """
    steps, cursor = range(state.step, plan.steps), state.cursor
    if not (has_free_core(inputs.context) if prefetch is None else prefetch):
        for step in steps:
            prepared = prepare_step(inputs, plan, step, cursor)
            cursor = prepared.cursor
            yield prepared
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=PREFETCH_THREAD) as executor:
        future = executor.submit(prepare_step, inputs, plan, state.step, cursor)
        for step in steps:
            prepared = future.result()
            if step + 1 < plan.steps:
                future = executor.submit(prepare_step, inputs, plan, step + 1, prepared.cursor)
            yield prepared


# The loop -------------------------------------------------------------------------------------------------------------


class Diverged(RunError):
    """Loss or gradient was not finite in too many steps in a row. The weights are those before these steps."""


@dataclass(frozen=True)
class StepResult:
    """Numbers of a step that may still be on the device. Reading them waits until the device has computed them."""

    step: int  # number of the step, counted from 1
    metrics: Mapping[str, tuple[Tensor, int]]  # metric -> (sum, count)
    grad_norm: Tensor


def train(
    inputs: TrainLoopInputs,
    plan: Plan,
    state: TrainState,
    callbacks: Sequence[Callback] = (),
    *,
    log: LogCallback | None = None,
    stop_requested: Callable[[], StopReason | None] = _no_stop,
    has_enough: Callable[[TrainState], bool] = _never,
    prefetch: bool | None = None,
) -> StopReason:
    """Trains until the plan is done, `has_enough` returns True or a stop is requested.

    A step whose loss or gradient is not finite on any rank is skipped: it changes neither weights nor the state of the
    optimizer, and only the data go on.

    Args:
        inputs: model, objective, data loaders and optimizer.
        plan: number of steps of each stage.
        state: training state; updated in place after each step.
        callbacks: callbacks, which run in this order after the steps for which they are due.
        log: callback that gets the metrics; runs before `callbacks`.
        stop_requested: function that is called in each step. A request on any rank stops all ranks after the same step.
        has_enough: function that is called after the callbacks of each step. All ranks must get the same value.
        prefetch: whether a background thread prepares the batches of the next step; None: if `has_free_core`. The
            results are bit-identical.

    Raises:
        Diverged: `inputs.max_skipped_steps` steps in a row were skipped.
    """
    context, begin = inputs.context, time.perf_counter() - state.seconds
    start = context.sum([state.seconds])[0] / context.ranks  # after a return to a checkpoint, the ranks differ
    last_run, last_log = [start] * len(callbacks), start
    unread, ran = list[StepResult](), list[int]()  # ran: numbers of the callbacks that ran after the step before
    inputs.module.train()
    with contextlib.closing(_prepared_steps(inputs, plan, state, prefetch=prefetch)) as prepared_steps:
        while state.step < plan.steps:
            objective = inputs.objectives[plan.stage_at(state.step)]
            step_began = time.perf_counter()
            with state.timed("data"):
                prepared = next(prepared_steps)
                clock = time.perf_counter() - begin
                shared = _agree(inputs.context, objective, prepared.masked_batches, stop_requested(), clock)
                stop, clock = shared.stop, shared.clock
            # The time that a callback takes doesn't count: a long validation isn't due again at once.
            last_run = [clock if number in ran else last for number, last in enumerate(last_run)]
            waited = time.perf_counter() - step_began

            metrics, statistics = _accumulate_gradients(inputs, objective, state, prepared, shared.counts)
            with state.timed("optimizer"):
                grad_norm = _optimizer_step(inputs, state, plan.progress(state.step))
                if isinstance(objective, AdaptiveObjective):
                    objective.adapt(state.step, _counted(inputs.context, statistics, grad_norm))
                # A GPU computes this step while the host reads the numbers of the step before.
                _read_results(inputs, state, unread)
                unread = [StepResult(state.step + 1, metrics, grad_norm)]

            state.record_step(shared, prepared.cursor, time.perf_counter() - step_began, waited)
            state.seconds = time.perf_counter() - begin

            logs = log is not None and log.is_due(state.step, clock - last_log)
            due = [each.is_due(state.step, clock - last) for each, last in zip(callbacks, last_run, strict=True)]
            reads = any(is_due and each.reads_results for each, is_due in zip(callbacks, due, strict=True))
            if stop or logs or reads or state.step == plan.steps or inputs.context.device.type == "cpu":
                _read_results(inputs, state, unread)
                unread = []
            if log and logs:
                log.run(state, state.pop_metrics())
                last_log = clock
            ran = [number for number, is_due in enumerate(due) if is_due]
            for number in ran:
                callbacks[number].run(state)
                inputs.module.train()
                state.seconds = time.perf_counter() - begin
            if has_enough(state):
                return StopReason.EARLY
            if stop:
                return stop
    return StopReason.PLAN_DONE


def _agree(
    context: DistributedContext,
    objective: Objective,
    masked_batches: Sequence[MaskedBatch],
    stop: StopReason | None,
    clock: float,
) -> SharedStep:
    """Sums the numbers over all ranks that they must share before the first forward pass."""
    terms = list(objective.loss_weights)
    own = [sum(masked.denominators[term] for masked in masked_batches) for term in terms]
    tokens = sum(masked.batch.tokens for masked in masked_batches)
    samples = sum(_fingerprint(masked) for masked in masked_batches) % FINGERPRINTS
    interrupted, stopped, clocks, all_tokens, all_samples, *totals = context.sum(
        [stop is StopReason.INTERRUPTED, stop is not None, clock, tokens, samples, *own]
    )
    shared_stop = StopReason.INTERRUPTED if interrupted else StopReason.TERMINATED if stopped else None
    counts = {term: int(total) for term, total in zip(terms, totals, strict=True)}
    return SharedStep(shared_stop, clocks / context.ranks, int(all_tokens), int(all_samples) % FINGERPRINTS, counts)


def _fingerprint(masked: MaskedBatch) -> int:
    """Returns a number that stands for the samples of a batch, in any order."""
    epochs_B, numbers_B = masked.batch.sample_keys_B2.numpy().T
    return int((rng.bits(0, "sample", epochs_B, numbers_B) % FINGERPRINTS).sum())


def _accumulate_gradients(
    inputs: TrainLoopInputs,
    objective: Objective,
    state: TrainState,
    prepared: PreparedStep,
    counts: Mapping[str, int],
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, Tensor]]:
    """Runs forward and backward over this rank's micro-batches; afterwards gradients are those of all ranks.

    Returns (sum, count) of each metric, and the sums of the objective's statistics. Each loss sum is divided by its
    count in the whole step, over all micro-batches and ranks.
    """
    parallelism, masked_batches = inputs.parallelism, prepared.masked_batches
    # A rank without samples still returns every metric, because all ranks must sum the same numbers.
    zero = torch.zeros((), device=inputs.context.device)
    metrics: dict[str, tuple[Tensor, int]] = dict.fromkeys(objective.metrics, (zero, 0))
    statistics = objective.no_statistics() if isinstance(objective, AdaptiveObjective) else {}
    passes = parallelism.passes(len(masked_batches))
    for micro in range(passes):
        is_own = micro < len(masked_batches)
        masked = masked_batches[micro] if is_own else prepared.spare or masked_batches[-1]
        # Only dropout draws from torch's generator. Seeding it for each micro-batch makes a resumed run drop the same
        # units as an uninterrupted one.
        torch.manual_seed(rng.integer(inputs.seed, "dropout", state.step, micro, inputs.context.rank))
        with parallelism.accumulating(is_last=micro == passes - 1):
            with state.timed("forward"), inputs.context.autocast():
                loss = parallelism.forward(inputs.module, objective, masked.to(inputs.context.device))
                total = torch.stack(
                    [weight * loss.sums[term] / max(counts[term], 1) for term, weight in objective.loss_weights.items()]
                ).sum()
            with state.timed("backward"):
                # A loss that is not finite makes the gradients NaN, and with them the norm on all ranks, even where
                # its own gradient is finite. The host doesn't wait for it.
                seed = torch.where(total.isfinite(), 1.0, math.nan).to(total.dtype)
                # Ranks compute together. One that has fewer samples repeats a batch, whose gradient is 0.
                (total if is_own else 0.0 * total).backward(seed)
        if not is_own:
            continue
        for name, (value, count) in loss.metrics.items():
            earlier_sum, earlier_count = metrics[name]
            metrics[name] = (earlier_sum + value, earlier_count + count)
        for name, value in loss.statistics.items():
            statistics[name] = statistics[name] + value
    return metrics, statistics


def _optimizer_step(inputs: TrainLoopInputs, state: TrainState, progress: float) -> Tensor:
    """Clips the gradients, updates the weights and their average; returns the norm before clipping.

    If the norm is not finite, nothing changes.
    """
    grad_norm = inputs.optimizer.clip()
    factor = inputs.lr_factor(progress, state.step) * state.lr_scale
    state.lr = inputs.optimizer.config.lr * factor
    # A GPU decides itself, because the host would have to wait for the norm. MPS can't: its AdamW ignores the flag.
    is_known = inputs.context.device.type != "cuda"
    applies = None if is_known else grad_norm.isfinite()
    if not is_known or math.isfinite(grad_norm):
        inputs.optimizer.step(factor, applies)
        if inputs.ema:
            inputs.ema.update(inputs.module, state.step, applies)
    inputs.optimizer.zero_grad()
    return grad_norm


def _counted(context: DistributedContext, statistics: Mapping[str, Tensor], grad_norm: Tensor) -> Mapping[str, Tensor]:
    """Returns statistics of an objective summed over all ranks; of a skipped step, zeros."""
    applies = grad_norm.isfinite()
    return context.sum_tensors({name: torch.where(applies, value, 0) for name, value in statistics.items()})


def _read_results(inputs: TrainLoopInputs, state: TrainState, results: Sequence[StepResult]) -> None:
    """Adds the results of steps to the state, summed over all ranks.

    Raises:
        Diverged: the last of too many skipped steps in a row is among them.
    """
    for result in results:
        grad_norm = float(result.grad_norm)
        if not math.isfinite(grad_norm):
            in_row = state.record_skipped(result.step)
            if in_row < inputs.max_skipped_steps:
                continue
            lower = inputs.optimizer.config.scaled_rates(state.lr_scale / 2)
            raise Diverged(
                f"loss or gradient is not finite in {in_row} steps in a row, up to step {result.step:,}",
                location="training",
                hint=f"start a new run with lower learning rates: {' '.join(f'--set {each}' for each in lower)}",
            )
        state.grad_norm, state.skipping_since = grad_norm, None
        names = sorted(result.metrics)
        flat = inputs.context.sum(
            [number for name in names for number in (float(result.metrics[name][0]), result.metrics[name][1])]
        )
        state.metrics.add({name: (flat[2 * i], int(flat[2 * i + 1])) for i, name in enumerate(names)})


# Signals --------------------------------------------------------------------------------------------------------------


class Signals:
    """Context manager that turns SIGINT, SIGTERM and SIGUSR1 into a request to stop.

    Outside the main thread (a worker of a notebook, for example) it does nothing.
    """

    def __init__(self) -> None:
        self._stop: StopReason | None = None
        self._training = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]
            for number in (getattr(signal, name) for name in names):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start_deferring(self) -> None:
        """Makes signals requests from now on. Before, when there is nothing to save, they raise Interrupted."""
        self._training = True

    def stop_requested(self) -> StopReason | None:
        """Returns INTERRUPTED or TERMINATED after a signal, else None."""
        return self._stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        reason = StopReason.INTERRUPTED if number == signal.SIGINT else StopReason.TERMINATED
        if not self._training:
            raise Interrupted(reason.exit_code)
        if self._stop is StopReason.INTERRUPTED and reason is StopReason.INTERRUPTED:  # a second Ctrl-C stops at once
            raise KeyboardInterrupt
        self._stop = reason
