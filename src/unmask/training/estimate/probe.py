"""The probe: measures a run's seconds per step, per validation and per checkpoint, and its memory, before it starts.

Real steps are timed, on a copy of the weights and with a fresh optimizer. The first steps after the start of a process
are slow: kernels are compiled for new shapes, and memory is mapped for the first time. On two cores, the first ten
steps of recipe `tiny` took 0.25 s each, and later ones 0.19 s. So steps run until their times no longer fall, and only
then are timed. Stages alternate, so that a busy moment of the machine affects all of them.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from unmask.core.distributed import DistributedContext
from unmask.core.quantities import Fraction, Quantity
from unmask.data.prepare import TokenizedCorpus
from unmask.evaluation.masked_lm import EvalSet, evaluate
from unmask.evaluation.minimal_pairs import MinimalPair, evaluate_minimal_pairs
from unmask.evaluation.validation import validates
from unmask.models.model import Model
from unmask.models.parallel import share
from unmask.training import checkpoint
from unmask.training.estimate.memory import num_shards, peak_bytes, training_bytes
from unmask.training.loop import (
    EMA,
    Callback,
    StopReason,
    TrainLoopInputs,
    TrainModule,
    TrainState,
    has_free_core,
    train,
)
from unmask.training.optim import Optimizer
from unmask.training.plan import Measured, MeasuredMemory, Plan, StageConfig, StagePlan, always
from unmask.training.recipe import Recipe
from unmask.training.setup import RunComponents, as_model, build_loaders, build_train_module, validate

ProbeCallback = Callable[[float, float], None]
"""Is called with the fraction of the probe that is done, from 0 to 1, and the seconds that the probe takes at most."""


@dataclass(frozen=True)
class ProbeLimits:
    """Limits of the probe. The first step of each stage runs in any case, with few tokens."""

    seconds: float  # of all that is measured, warm-up included
    warm_up_steps: int  # of each stage
    steps: int  # timed steps of each stage


_FRACTION = 0.095  # of a budget in seconds; the last step may exceed the limit a little
_MAX_SECONDS = 12.0
_QUICK = ProbeLimits(seconds=5.0, warm_up_steps=1, steps=3)  # the times only predict when the run ends

_WARM_UP = 0.35  # of the probe's seconds, at most
_VALIDATION, _SAVING = 0.1, 0.2  # of the probe's seconds, about
_SETTLED = 0.95  # steps are warm if the last round took at least this fraction of the fastest one before it
_GROWTH = 8  # each trial step has at most this many times the tokens of the one before
_FIRST_GROWTH = 3.0  # expected seconds of the second size / those of the first
_SWEEP = 16  # trial steps cover the progress of a run in so many parts, because it may change the mask rate
_STRIDE = 5  # coprime to _SWEEP
_CHUNK_SECONDS = 0.4  # of consecutive steps of one stage
_TRIM = 0.2  # fraction of the fastest and of the slowest steps that is left out
_FIRST_PAIRS = 8  # of the first sample of minimal pairs; the next ones are twice as large
_SIZE_STEPS, _SIZE_FRACTION = (2, 8), 0.02  # steps of a model's warm-up and measurement; fraction of a budget
_BYTES_PER_SECOND = 2e8  # of writing a checkpoint, if none is written by the probe
_PREFIX = ".unmask-probe-"  # of the folder for this checkpoint
_LEFTOVER_SECONDS = 86_400.0  # after which no probe writes to its folder any more


def probe_limits(budget: Quantity) -> ProbeLimits:
    """Returns the limits for a budget: a tenth of a budget in seconds, else a few steps."""
    if budget.unit != "seconds":
        return _QUICK
    return ProbeLimits(min(_FRACTION * budget.number, _MAX_SECONDS), warm_up_steps=40, steps=400)


def _zero(progress: float, step: int) -> float:
    return 0.0


def _ignore(fraction: float, seconds: float) -> None:
    pass


def measure(
    recipe: Recipe,
    components: RunComponents,
    *,
    pairs: Sequence[MinimalPair] = (),
    on_probe: ProbeCallback = _ignore,
    folder: Path | None = None,
) -> Measured:
    """Measures seconds per step of each stage, per validation, per checkpoint and for minimal pairs, and the memory.

    The run itself is not changed: batches are functions of the cursor, so reading them changes no state.

    Args:
        recipe: Recipe of the run.
        components: Components of the run.
        pairs: Minimal pairs that the run is evaluated on.
        on_probe: Callback for the progress.
        folder: Directory on the disk of the run, for one checkpoint that is deleted again; None: the system's
            directory for temporary files. What a killed probe left there more than a day ago is deleted too.
    """
    context = components.context
    _build_eval_sets(recipe, components)
    before = peak_bytes(context)
    trial = _trial(recipe, components)
    probe = _Probe(recipe, components, trial, probe_limits(recipe.train.budget), on_probe)
    probe.warm_up()
    validations = probe.time_validation()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as temporary:
        if context.is_main_process:
            _remove_leftovers(Path(temporary))
        is_shared = folder is not None or context.ranks == context.local_ranks
        save_best_seconds, save_seconds = probe.time_saving(Path(temporary), is_shared=is_shared)
    pairs_seconds = probe.time_pairs(pairs) if pairs else 0.0
    probe.time_steps()
    steps = [timer.step_seconds for timer in probe.timers]
    # All ranks must make the same plan, so the times are averaged over ranks.
    sums = context.sum([*steps, *validations, save_best_seconds, save_seconds])
    *times, save_best_seconds, save_seconds = [seconds / context.ranks for seconds in sums]
    steps, validations = times[: len(steps)], times[len(steps) :]
    validation = sum(part * seconds for part, seconds in zip(_fractions(recipe), validations, strict=True))
    on_probe(1.0, probe.limits.seconds)
    return Measured(
        tuple(steps),
        validation + save_best_seconds,
        save_seconds,
        memory=probe.measure_memory(before),
        pairs_seconds=pairs_seconds,
    )


def _remove_leftovers(own: Path) -> None:
    """Deletes old folders of probes that were killed, beside the folder of this probe."""
    now = own.stat().st_mtime  # by the clock of the disk, which other machines may share
    for other in own.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process deletes it
            if now - other.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(other, ignore_errors=True)


def try_steps(recipe: Recipe, components: RunComponents) -> Measured:
    """Runs one small step of each stage, so that errors come before anything is written; measures nothing."""
    _build_eval_sets(recipe, components)
    for timer in _timers(recipe, _trial(recipe, components)):
        timer.run(min(timer.stage.batch_tokens, timer.stage.max_seq_len))
    return Measured((0.0,) * len(recipe.stage))


def _build_eval_sets(recipe: Recipe, components: RunComponents) -> None:
    """Builds the evaluation sets: once for the run, so that this is not part of a validation's time."""
    for length in {stage.max_seq_len for stage in recipe.stage}:
        components.validator.eval_set(length)


def _trial(recipe: Recipe, components: RunComponents) -> TrainLoopInputs:
    """Returns a copy of the run's model and objectives, with a fresh optimizer."""
    training = components.training
    parallelism, module, objectives = training.parallelism.trial(training.module, training.objectives)
    return replace(
        training,
        module=module,
        objectives=objectives,
        parallelism=parallelism,
        optimizer=Optimizer(module, recipe.optimizer, bf16=components.context.precision == "bfloat16"),
        ema=EMA(parallelism.copy(module), training.ema.decay) if training.ema else None,
        lr_factor=_zero,  # without the warm-up of a run, the weights could diverge
    )


def _timers(recipe: Recipe, trial: TrainLoopInputs) -> list[_StageTimer]:
    return [
        _StageTimer(stage, replace(trial, objectives=[trial.objectives[number]], loaders=[trial.loaders[number]]))
        for number, stage in enumerate(recipe.stage)
    ]


def measure_token_seconds(recipe: Recipe, corpus: TokenizedCorpus, context: DistributedContext) -> float:
    """Returns the median seconds per token of some steps of the first stage, after a warm-up of two steps."""
    stage = replace(recipe.stage[0], until=Fraction(1.0))
    recipe = replace(recipe, stage=(stage,))
    module, objectives = build_train_module(recipe, corpus, context, None)
    parallelism = share(recipe.train.parallel, context, module, objectives)
    trial = TrainLoopInputs(
        module=module,
        objectives=objectives,
        parallelism=parallelism,
        loaders=build_loaders(recipe, corpus, [None]),
        optimizer=Optimizer(module, recipe.optimizer, bf16=context.precision == "bfloat16"),
        lr_factor=_zero,
        context=context,
        seed=recipe.seed,
    )
    timer, tokens = _StageTimer(stage, trial), stage.batch_tokens
    timer.run(tokens, _SIZE_STEPS[0])
    times = sorted(timer.run(tokens, _SIZE_STEPS[1], _SIZE_FRACTION * recipe.train.budget.number))
    return times[len(times) // 2] / tokens


def _fractions(recipe: Recipe) -> list[float]:
    """Returns the fraction of the plan that each stage has."""
    return [after - before for before, after in pairwise([0.0, *(stage.until.fraction for stage in recipe.stage)])]


@dataclass
class _StageTimer:
    """Runs and times steps of one stage. All ranks call it alike and get the same times."""

    stage: StageConfig
    trial: TrainLoopInputs  # with the loader of this stage only
    tokens: int = 0  # of a trial step: fewer than a step of the run if such a step takes too long
    times: list[float] = field(default_factory=list[float])  # of trial steps with `tokens` tokens, after the warm-up
    trial_seconds: float = math.inf  # of the last trial step
    extra_seconds: float = 0.0  # of a step of the run, in addition to those of a trial step
    runs: int = 0
    full_steps: int = 0  # with as many tokens as a step of the run
    sizes: set[int] = field(default_factory=set[int])  # tokens of these steps
    _cursor: int = 0

    @property
    def predicted(self) -> float:
        """Seconds of a step of the run, from the last trial step."""
        return self.trial_seconds + self.extra_seconds

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: mean of the timed ones without the fastest and the slowest, else the prediction."""
        ordered = sorted(self.times)
        cut = int(_TRIM * len(ordered))
        kept = ordered[cut : len(ordered) - cut]
        return sum(kept) / len(kept) + self.extra_seconds if kept else self.predicted

    def run(self, tokens: int, steps: int = 1, seconds: float = math.inf) -> list[float]:
        """Runs at most `steps` steps of `tokens` tokens, one at least, and returns their seconds."""
        context, first = self.trial.context, self.runs * _STRIDE % _SWEEP
        plan = Plan((StagePlan(self.stage.max_seq_len, tokens, 0, _SWEEP, 0.0),))
        state = TrainState(step=first, cursor=self._cursor)
        began = last = time.perf_counter()
        times: list[float] = []
        totals = [0]

        def record(state: TrainState) -> None:
            nonlocal last
            now = time.perf_counter()
            times.append(now - last)
            totals.append(state.tokens)
            last = now

        def stop_requested() -> StopReason | None:
            is_last = len(times) + 1 >= steps or time.perf_counter() - began > seconds
            return StopReason.TERMINATED if is_last else None

        train(self.trial, plan, state, [Callback(always, record)], stop_requested=stop_requested)
        self._cursor, self.runs, count = state.cursor, self.runs + 1, len(times)
        times = [each / context.ranks for each in context.sum(times)]
        self.trial_seconds = times[-1]
        if tokens == self.stage.batch_tokens:
            self.full_steps += count
            self.sizes |= {after - before for before, after in pairwise(totals)}
        # A background thread prepares batches: before the first step it had no time. Ranks may have other cores.
        return times[1:] if count > 1 and context.largest(has_free_core(context)) else times


class _Probe:
    """Measures within limits. What would exceed them is computed from what was measured."""

    def __init__(
        self,
        recipe: Recipe,
        components: RunComponents,
        trial: TrainLoopInputs,
        limits: ProbeLimits,
        on_probe: ProbeCallback,
    ) -> None:
        self.limits, self._on_probe = limits, on_probe
        self._recipe, self._components, self._trial = recipe, components, trial
        self.timers = _timers(recipe, trial)
        self._began = time.perf_counter()

    def _left(self) -> float:
        """Returns the seconds that are left, the same on all ranks, and shows the progress."""
        context = self._trial.context
        elapsed = context.sum([time.perf_counter() - self._began])[0] / context.ranks
        self._on_probe(min(elapsed / self.limits.seconds, 0.99), self.limits.seconds)
        return self.limits.seconds - elapsed

    # Steps ------------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Runs steps of each stage until their times no longer fall, or for a part of the probe's time."""
        # The largest micro-batches come first, so that later steps find their memory mapped.
        for timer in sorted(self.timers, key=lambda timer: -timer.stage.batch_tokens):
            self._find_size(timer)
        fastest, slower = math.inf, 0
        for _ in range(self.limits.warm_up_steps - 1):
            if self._left() < (1 - _WARM_UP) * self.limits.seconds or slower == 2:
                break
            seconds = sum(timer.run(timer.tokens)[-1] for timer in self.timers)
            slower = slower + 1 if seconds >= _SETTLED * fastest else 0
            fastest = min(fastest, seconds)

    def _find_size(self, timer: _StageTimer) -> None:
        """Runs larger and larger steps, up to the size of the run's, while the next one fits into half of the time."""
        full = timer.stage.batch_tokens
        tokens = min(full, max(timer.stage.max_seq_len, full // _GROWTH**2))
        smaller: tuple[int, float] | None = None  # tokens and seconds of the size before
        while True:
            timer.run(tokens)
            timer.tokens, timer.extra_seconds = tokens, 0.0
            if tokens == full:
                return
            seconds, larger = timer.run(tokens)[-1], min(full, tokens * _GROWTH)  # the first compiles kernels
            # A step has costs that don't depend on its tokens. They are most of the time of a small step.
            token_seconds, expected = seconds / tokens, _FIRST_GROWTH * seconds
            if smaller:
                token_seconds = max(0.0, seconds - smaller[1]) / (tokens - smaller[0])
                expected = seconds + token_seconds * (larger - tokens)
            timer.extra_seconds = token_seconds * (full - tokens)
            if expected > self._left() / 2:
                return
            tokens, smaller = larger, (tokens, seconds)

    def time_steps(self) -> None:
        """Times steps until the end of the probe; each stage gets a part of the time like that of the run."""
        shares = [
            part / timer.stage.batch_tokens * timer.predicted
            for timer, part in zip(self.timers, _fractions(self._recipe), strict=True)
        ]
        spent = [0.0] * len(shares)
        while True:
            left = self._left()
            open_stages = [
                number
                for number, timer in enumerate(self.timers)
                if len(timer.times) < self.limits.steps and timer.trial_seconds <= left
            ]
            if not open_stages:
                return
            number = min(open_stages, key=lambda number: spent[number] / shares[number])
            timer, before = self.timers[number], self._left()
            steps = self.limits.steps - len(timer.times)
            timer.times += timer.run(timer.tokens, steps, min(_CHUNK_SECONDS, left))
            spent[number] += max(before - self._left(), 1e-9)

    # Validation and saving --------------------------------------------------------------------------------------------

    def time_validation(self) -> list[float]:
        """Returns the seconds of a validation in each stage.

        Evaluates as many batches of the held-out text as fit into a part of the probe's time.
        """
        validator, stages = self._components.validator, self._recipe.stage
        seconds = {
            length: self._time_evaluation(validator.eval_set(length)) for length in {s.max_seq_len for s in stages}
        }
        longest = stages[-1].max_seq_len
        last = seconds[longest]
        held_out = [sum(seconds[length] for length in {s.max_seq_len, longest}) for s in stages]
        objectives = self._trial.objectives
        texts = len(self._components.valid_sources) + any(each.sampler != "windows" for each in objectives)
        # Texts of data.valid, sentence pairs and the metrics of an objective take about as long as the held-out text at
        # the last stage's length. Stages with the same objective take equally long for them.
        extra: dict[int, float] = {}
        for number, each in reversed(list(enumerate(objectives))):
            further = texts + (validates(each) != "masked-lm")
            if id(each) in extra or not further:
                continue
            extra[id(each)] = last * further
            if held_out[number] + last * further <= self._left() / 3:
                extra[id(each)] = max(self._agreed(partial(self._validate, number)) - held_out[number], 0.0)
        return [seconds + extra.get(id(each), 0.0) for seconds, each in zip(held_out, objectives, strict=True)]

    def _validate(self, stage: int) -> None:
        with self._trial.eval_module() as module:
            validate(self._components, module, stage)

    def _time_evaluation(self, eval_set: EvalSet) -> float:
        """Returns the seconds of an evaluation, from those of its first batches after a warm-up with one batch."""
        with self._trial.eval_module() as module:
            return self._time_module(module, eval_set)

    def _time_module(self, module: TrainModule, eval_set: EvalSet) -> float:
        context, ranks = self._trial.context, self._trial.context.ranks
        tokens = sum(masked.batch.tokens for masked in eval_set.batches)

        def run(batches: int) -> float:
            part = replace(eval_set, batches=eval_set.batches[:batches])
            return self._agreed(lambda: evaluate(module.encoder, module.head, part, context))

        def count_tokens(batches: int) -> int:
            return sum(masked.batch.tokens for masked in eval_set.batches[:batches])

        limit = _VALIDATION * self.limits.seconds / len({stage.max_seq_len for stage in self._recipe.stage})
        fastest = min(timer.predicted / timer.stage.batch_tokens for timer in self.timers)  # of a training token
        if fastest / 3 * count_tokens(ranks) > self.limits.seconds / 2:
            return fastest / 3 * tokens  # forward is a third of a step
        batches = min(ranks, len(eval_set.batches))
        token_seconds, allowed = run(batches) / count_tokens(batches), 2 * limit  # the first batch compiles kernels
        while token_seconds * count_tokens(batches) <= allowed:
            token_seconds, allowed = run(batches) / count_tokens(batches), limit
            if batches == len(eval_set.batches):
                break
            batches = min(2 * batches, len(eval_set.batches))
        return token_seconds * tokens

    def time_pairs(self, pairs: Sequence[MinimalPair]) -> float:
        """Returns the seconds of an evaluation of minimal pairs, from those of a sample of them."""
        with self._trial.eval_module() as module:
            return self._time_model(as_model(self._recipe, self._components, module, TrainState()), pairs)

    def _time_model(self, model: Model, pairs: Sequence[MinimalPair]) -> float:
        context, size = self._trial.context, min(_FIRST_PAIRS, len(pairs))
        limit = _VALIDATION * self.limits.seconds
        while True:
            sample = [pairs[number * len(pairs) // size] for number in range(size)]
            seconds = self._agreed(partial(evaluate_minimal_pairs, model, sample, context=context))
            if size == len(pairs) or 2 * seconds > limit:
                return seconds * len(pairs) / size
            size = min(2 * size, len(pairs))

    def time_saving(self, folder: Path, *, is_shared: bool) -> tuple[float, float]:
        """Returns the seconds of saving the best model and a checkpoint, which the main process does.

        Shards are written, and not computed from their size, only to a folder that is shared: all ranks see it.
        """
        with self._trial.eval_module(main_only=True) as module:
            return self._time_writing(module, folder, is_shared or not self._trial.parallelism.is_sharded)

    def _time_writing(self, module: TrainModule, folder: Path, is_seen: bool) -> tuple[float, float]:
        recipe, trial, is_main = self._recipe, self._trial, self._trial.context.is_main_process
        model = as_model(recipe, self._components, module, TrainState())
        size = training_bytes(self._components.num_parameters, has_ema=trial.ema is not None)
        left = _SAVING * self.limits.seconds
        best = save = 0.0
        if recipe.train.keep_best:
            best = self._components.num_parameters * 4 / _BYTES_PER_SECOND
            if best <= left:
                best = self._agreed(lambda: is_main and checkpoint.save_best(folder, model, module.parts))
        save = size / _BYTES_PER_SECOND
        if is_seen and max(save, best) <= left:
            save = self._agreed(partial(self._save, folder))
        return best, save

    def _save(self, folder: Path) -> None:
        """Writes a checkpoint as a run does, but not in the background."""

        def model_of(module: TrainModule) -> Model:
            return as_model(self._recipe, self._components, module, TrainState())

        checkpoint.prepare(folder, model_of, self._trial, TrainState(), lambda run: (), copies=False)()

    # Memory -----------------------------------------------------------------------------------------------------------

    def measure_memory(self, before: int) -> MeasuredMemory | None:
        """Returns the peak of the probe, without its copies of the weights; `before` was the peak before the probe.

        Returns None if the probe ran smaller micro-batches than the run, or if the system doesn't tell the peak.
        """
        context, has_ema = self._trial.context, self._trial.ema is not None
        peak, micro = context.sum([peak_bytes(context)])[0] / context.ranks, self._recipe.train.micro_batch_size.number
        if not peak or any(timer.tokens < min(micro, timer.stage.batch_tokens) for timer in self.timers):
            return None
        copies = self._components.num_parameters * 4 * (1 + has_ema) // num_shards(self._recipe, context)
        peak = max(before, round(peak) - copies)
        # A step takes whole sequences: if they have different lengths, it exceeds the size of the batch.
        sizes_vary = any(timer.sizes - {timer.stage.batch_tokens} for timer in self.timers)
        return MeasuredMemory(peak, tuple(timer.full_steps for timer in self.timers), sizes_vary)

    def _agreed(self, work: Callable[[], object]) -> float:
        """Runs a function and returns its seconds on the slowest rank, the same on all ranks."""
        context = self._trial.context
        begin = time.perf_counter()
        work()
        context.barrier()
        return context.sum([time.perf_counter() - begin])[0] / context.ranks
