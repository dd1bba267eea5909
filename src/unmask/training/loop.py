"""Room card: the one module of a run.

Comes in: encoder, head, objective. Goes out: a Learner, whose parameters are all that is trained. Called by: workshop,
the loop, the average.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.core import rng
from unmask.core.distributed import DistributedContext
from unmask.core.errors import RunError
from unmask.core.types import Batch, LossSums, MaskedBatch, Objective
from unmask.training.optim import Optimizer
from unmask.training.plan import Plan


class TrainModule(nn.Module):
    """The one module of a run: encoder, head, the objective's parts. Sharding, clipping and the optimizer see this."""

    def __init__(self, encoder: nn.Module, head: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.parts = objective.modules
        self._objective = objective

    def forward(self, masked: MaskedBatch) -> LossSums:
        """The objective's sums for one micro-batch."""
        return self._objective.loss(self.encoder, self.head, masked)


class EMA:
    """An exponential moving average in float32: average ← average + (1 − d) · (weights − average).

    With n steps averaged before, d is min(decay, (1 + n) ÷ (10 + n)): early on the average looks back over about n ÷ 9
    steps instead of 1 ÷ (1 − decay), so that it forgets the random start at once and a run of any length can be judged
    from its first validation. (Dividing by 1 − decayⁿ instead would weigh all early steps alike: after 100 steps the
    first, with its random weights, as much as the last.) n is the step, so that nothing but the average is kept.
    """

    def __init__(self, learner: TrainModule, decay: float) -> None:
        assert 0 < decay < 1, f"an average with a decay of {decay}"
        self.decay = decay
        self.learner = copy.deepcopy(learner).float()
        self.learner.requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay after step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, learner: TrainModule, step: int) -> None:
        """Take in the weights as they are after step `step`, counted from 0."""
        share = 1 - self.decay_at(step)
        for mine, theirs in zip(self.learner.parameters(), learner.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), share)
        for mine, theirs in zip(self.learner.buffers(), learner.buffers(), strict=True):
            mine.copy_(theirs)  # what is no weight is taken as it is

    def state_dict(self) -> dict[str, Tensor]:
        """The average, named as the learner names its weights; live tensors, not copies."""
        return self.learner.state_dict()


INTERRUPTED, TERMINATED = 130, 75  # exit codes of a run that a person, or a scheduler, stopped
EARLY = 1  # what `train` returns where there was enough before the plan was done
PHASES = ("data", "forward", "backward", "optimizer")


class Feed(Protocol):
    """Samples of one stage: the next step's batches of this rank, and the cursor after them."""

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        """Micro-batches that together with the other ranks' hold at least `tokens` tokens."""
        ...

    def first_cursor(self, stage: int) -> int:
        """Where the stage's order begins."""
        ...


@dataclass
class MetricAccumulator:
    """Measurements since the last log line; kept in the checkpoint, so that a resumed run logs the same numbers."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, seen: Mapping[str, tuple[float, int]]) -> None:
        """Add sums and counts of one step."""
        for name, (total, count) in seen.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name: str) -> float:
        """Sum over count; NaN where nothing was counted."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else float("nan")


@dataclass
class TrainState:
    """Where a run stands: all that changes but weights and optimizer; one integer finds the next sample."""

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of the budget's clock: training, validation, saving
    phase_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    window: MetricAccumulator = field(default_factory=MetricAccumulator)
    lr: float = 0.0  # of AdamW's parameters in the last step
    grad_norm: float = 0.0
    validation: dict[str, Any] | None = None  # the last one, with its step
    best: dict[str, Any] | None = None  # step and loss of the best one
    without_gain: int = 0  # validations since the best one

    @property
    def training_seconds(self) -> float:
        """Seconds in data, forward, backward and optimizer alone."""
        return sum(self.phase_seconds.values())

    def record_validation(self, loss: float) -> bool:
        """Note the loss of a validation at this step: whether it is below that of all before."""
        gained = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        if gained:
            self.best = {"step": self.step, "loss": loss}
        self.without_gain = 0 if gained else self.without_gain + 1
        return gained

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Add the seconds of a block to a phase."""
        begin = time.perf_counter()
        yield
        self.phase_seconds[phase] += time.perf_counter() - begin


@dataclass(frozen=True)
class Callback:
    """Something to do every so often: `due` is asked after each step, `act` is called where it says so."""

    is_due: Callable[[int, int, float], bool]
    run: Callable[[TrainState], None]


@dataclass(frozen=True)
class TrainLoopInputs:
    """The parts of a run that do not change while it trains."""

    learner: TrainModule
    objective: Objective
    feeds: Sequence[Feed]  # one per stage
    optimizer: Optimizer
    rate_factor: Callable[[float, int], float]  # of progress and step
    plan: Plan
    world: DistributedContext
    seed: int
    ema: EMA | None = None  # of the weights

    @property
    def judged(self) -> TrainModule:
        """What validations judge and model folders hold: the average of the weights where one is kept."""
        return self.ema.learner if self.ema else self.learner


def _never(state: TrainState) -> bool:
    return False


def train(
    training: TrainLoopInputs,
    state: TrainState,
    callbacks: Sequence[Callback],
    asked_to_stop: Callable[[], int],
    enough: Callable[[TrainState], bool] = _never,
) -> int:
    """Train until the plan is done, there is enough, or a stop is asked for.

    Returns:
        0; EARLY where `enough`, asked after the duties of each step and answered alike on all ranks, said so; or
        INTERRUPTED or TERMINATED where any rank's `asked_to_stop` did. All ranks stop after the same step.

    Raises:
        RunError: the gradient is no finite number.
    """
    plan, world, begin = training.plan, training.world, time.perf_counter() - state.seconds
    last_done = [state.seconds] * len(callbacks)
    training.learner.train()
    while state.step < plan.steps:
        stage = plan.stage_at(state.step)
        feed = training.feeds[stage]
        if state.step == plan.stages[stage].first_step:
            state.cursor = feed.first_cursor(stage)

        step_began = time.perf_counter()
        with state.timed("data"):
            batches, cursor = feed.step(state.cursor, plan.stages[stage].batch_tokens, world.rank, world.ranks)
            progress = plan.progress(state.step)
            batches = [replace(batch, progress=progress) for batch in batches]
            masked_batches = [training.objective.corrupt(batch, training.seed) for batch in batches]
            clock = time.perf_counter() - begin
            wish, clock, tokens, counts = _agree(world, masked_batches, training.objective, asked_to_stop(), clock)

        seen = _accumulate(training, state, masked_batches, counts)

        with state.timed("optimizer"):
            world.sum_gradients(training.learner)
            state.grad_norm = training.optimizer.clip()
            _check_finite(state)
            factor = training.rate_factor(progress, state.step)
            state.lr = training.optimizer.settings.lr * factor
            training.optimizer.step(factor)
            training.optimizer.zero_grad()
            if training.ema:
                training.ema.update(training.learner, state.step)

        state.step += 1
        state.cursor = cursor
        state.tokens += tokens
        state.window.add(_sum_seen(world, seen))
        state.window.tokens += tokens
        state.window.seconds += time.perf_counter() - step_began
        state.seconds = time.perf_counter() - begin

        for number, duty in enumerate(callbacks):
            if duty.is_due(state.step, state.tokens, clock - last_done[number]):
                duty.run(state)
                training.learner.train()
                state.seconds = time.perf_counter() - begin
                last_done[number] = clock
        if enough(state):
            return EARLY
        if wish:
            return wish
    return 0


def _agree(
    world: DistributedContext, masked_batches: Sequence[MaskedBatch], objective: Objective, wish: int, clock: float
) -> tuple[int, float, int, dict[str, int]]:
    """What all ranks share before the first forward: the wish to stop, one clock, the step's tokens, each term's count.

    The clock is the mean of all ranks', so that what is due after some seconds is due on all of them.
    """
    terms = list(objective.loss_weights)
    mine = [sum(masked.denominators[term] for masked in masked_batches) for term in terms]
    tokens = sum(puzzle.batch.tokens for puzzle in masked_batches)
    shared = world.sum([wish == INTERRUPTED, wish, clock, tokens, *mine])
    interrupted, wished, clocks, all_tokens, *totals = shared
    stop = INTERRUPTED if interrupted else TERMINATED if wished else 0
    counts = {term: int(total) for term, total in zip(terms, totals, strict=True)}
    return stop, clocks / world.ranks, int(all_tokens), counts


def _accumulate(
    training: TrainLoopInputs, state: TrainState, masked_batches: Sequence[MaskedBatch], counts: Mapping[str, int]
) -> dict[str, tuple[Tensor, int]]:
    """Forward and backward over this rank's micro-batches, each sum divided by the count of the whole step."""
    # A rank that was dealt nothing still names every metric: all ranks must sum the same numbers.
    nothing = torch.zeros((), device=training.world.device)
    seen: dict[str, tuple[Tensor, int]] = dict.fromkeys(training.objective.metrics, (nothing, 0))
    for micro, masked in enumerate(masked_batches):
        # Dropout is the one draw that torch makes; its generator starts anew for each micro-batch, so a resumed run and
        # an undisturbed one drop the same units.
        torch.manual_seed(rng.integer(training.seed, "dropout", state.step, micro, training.world.rank))
        with state.timed("forward"), training.world.autocast():
            loss: LossSums = training.learner(masked.to(training.world.device))
            total = torch.stack(
                [
                    weight * loss.sums[term] / max(counts[term], 1)
                    for term, weight in training.objective.loss_weights.items()
                ]
            ).sum()
        with state.timed("backward"):
            total.backward()
        for name, (value, count) in loss.metrics.items():
            before, number = seen[name]
            seen[name] = (before + value, number + count)
    return seen


def _sum_seen(world: DistributedContext, seen: Mapping[str, tuple[Tensor, int]]) -> dict[str, tuple[float, int]]:
    names = sorted(seen)
    flat = world.sum([number for name in names for number in (float(seen[name][0]), seen[name][1])])
    return {name: (flat[2 * i], int(flat[2 * i + 1])) for i, name in enumerate(names)}


def _check_finite(state: TrainState) -> None:
    """Stop before a step that would make the weights no numbers; nothing is saved over the last good checkpoint."""
    if not math.isfinite(state.grad_norm):
        raise RunError(
            f"the gradient's norm is {state.grad_norm} in step {state.step + 1}",
            location="training",
            hint="start a new run with lower rates, e.g. --set optimizer.lr=1e-3 --set optimizer.muon_lr=0.01",
        )


class Interrupted(Exception):
    """A signal came before there was anything to save."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("stopped before the first step; nothing was written")


class Signals:
    """A context in which signals are answered; outside the main thread (a notebook's worker, say) it does nothing."""

    def __init__(self) -> None:
        self._wish = 0
        self._training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]
            for number in (getattr(signal, name) for name in names):
                self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def remember_from_now_on(self) -> None:
        """From here on a signal is a wish; there is something to save."""
        self._training = True

    def wish(self) -> int:
        """0, INTERRUPTED or TERMINATED."""
        return self._wish

    def _answer(self, number: int, frame: FrameType | None) -> None:
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if not self._training:
            raise Interrupted(code)
        if self._wish == INTERRUPTED == code:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self._wish = code
