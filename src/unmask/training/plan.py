"""Turns a budget into a plan: the number of steps per stage, fixed before the first step and saved in recipe.toml."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from unmask.core.errors import RecipeError
from unmask.core.format import duration
from unmask.core.plugins import PluginObjectiveConfig
from unmask.core.quantities import Fraction, Quantity
from unmask.objectives import ObjectiveConfig

BUDGET_UNITS = ("seconds", "steps", "tokens", "epochs")
_MAX_VALIDATION_FRACTION = 0.2  # of a budget in seconds
_MAX_DEVIATION = 0.15  # of the planned seconds, without a message
MIN_SEQ_LEN = 3  # [CLS], one token, [SEP]
_AT_END = Fraction(1.0)  # the interval of an action that happens after the last step only


@dataclass(frozen=True)
class StageConfig:
    """One training stage: sequences of at most `max_seq_len` tokens, until a fraction of the plan."""

    until: Fraction = Fraction(1.0)  # [fraction of the plan] End of the stage.
    max_seq_len: int = 128  # [tokens] Maximum length of a sequence, special tokens included.
    # [tokens or texts] Minimum size of a step; texts count as `max_seq_len` tokens each.
    batch_size: Quantity = Quantity(16_384, "tokens")
    # What the model learns to predict in this stage; by default, the recipe's objective.
    objective: ObjectiveConfig | PluginObjectiveConfig | None = None

    @property
    def batch_tokens(self) -> int:
        """Minimum number of tokens per step."""
        return round(self.batch_size.number * (self.max_seq_len if self.batch_size.unit == "texts" else 1))


@dataclass(frozen=True)
class EveryConfig:
    """Intervals between logging, validating and saving: a fraction of the plan, steps or seconds."""

    log: Fraction | Quantity = Fraction(0.01)  # [fraction of the plan, steps or seconds] Interval between log lines.
    # [fraction of the plan, steps or seconds] Interval between validations.
    validate: Fraction | Quantity = Fraction(0.05)
    save: Fraction | Quantity = Fraction(0.2)  # [fraction of the plan, steps or seconds] Interval between checkpoints.

    def __post_init__(self) -> None:
        for name in ("log", "validate", "save"):
            check_interval(getattr(self, name), name)


def check_interval(every: Fraction | Quantity, where: str) -> None:
    """Checks the unit of an interval.

    Raises:
        RecipeError: it is neither a fraction of the plan nor a number of steps or seconds.
    """
    if isinstance(every, Quantity) and every.unit not in ("steps", "seconds"):
        raise RecipeError(
            f"invalid interval: got {every}, expected a fraction, steps or seconds",
            location=where,
            hint='write for example "5%", "100 steps" or "10 min"',
        )


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan: the steps from `first_step` to `first_step + steps - 1`."""

    max_seq_len: int
    batch_tokens: int
    first_step: int
    steps: int
    seconds_per_step: float


@dataclass(frozen=True)
class Plan:
    """The steps of a run. Whatever depends on progress is a pure function of the plan and the step."""

    stages: tuple[StagePlan, ...]
    validate_seconds: float = 0.0
    save_seconds: float = 0.0
    overhead_seconds: float = 0.0  # all validations, saves and evaluations of minimal pairs
    pairs_seconds: float = 0.0  # of one evaluation of minimal pairs

    @property
    def steps(self) -> int:
        """Number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Planned tokens of all stages. A step takes whole sequences, so it may process up to one sequence more."""
        return sum(stage.steps * stage.batch_tokens for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Expected seconds, including validation and saving; 0 if nothing was measured."""
        return sum(stage.steps * stage.seconds_per_step for stage in self.stages) + self.overhead_seconds

    def epochs(self, tokens: int, epoch_tokens: Sequence[int]) -> float:
        """Returns how many epochs the first `tokens` tokens of the run contain, of `epoch_tokens` in each stage."""
        total, rest = 0.0, float(tokens)
        for stage, epoch in zip(self.stages, epoch_tokens, strict=True):
            part = rest if stage is self.stages[-1] else min(rest, stage.steps * stage.batch_tokens)
            total += part / epoch
            rest -= part
        return total

    def training_seconds(self, step: int) -> float:
        """Returns the expected seconds of the first `step` steps, without validation and saving."""
        return sum(min(max(step - stage.first_step, 0), stage.steps) * stage.seconds_per_step for stage in self.stages)

    def stage_at(self, step: int) -> int:
        """Returns the number of the stage that contains a step."""
        for number, stage in enumerate(self.stages):
            if step < stage.first_step + stage.steps:
                return number
        return len(self.stages) - 1

    def progress(self, step: int) -> float:
        """Returns the fraction of the planned tokens before a step, from 0 to 1."""
        stage = self.stages[self.stage_at(step)]
        before = sum(s.steps * s.batch_tokens for s in self.stages if s.first_step < stage.first_step)
        return (before + (step - stage.first_step) * stage.batch_tokens) / self.tokens


@dataclass(frozen=True)
class MeasuredMemory:
    """Memory that some steps of each stage needed."""

    peak_bytes: int  # of the process, or of its tensors on CUDA; without the copies of the probe
    steps: tuple[int, ...]  # of each stage
    sizes_vary: bool  # whether steps have different numbers of tokens


@dataclass(frozen=True)
class Measured:
    """Measured seconds per step of each stage, per validation and per save, and the memory of the process."""

    step_seconds: tuple[float, ...]
    validate_seconds: float = 0.0  # mean over the planned tokens
    save_seconds: float = 0.0
    memory: MeasuredMemory | None = None  # None: not measured
    pairs_seconds: float = 0.0  # per evaluation of minimal pairs


def make_plan(
    stages: Sequence[StageConfig],
    budget: Quantity,
    every: EveryConfig,
    epoch_tokens: Sequence[int],
    measured: Measured,
    pairs_every: Fraction | Quantity = _AT_END,
) -> Plan:
    """Turns a budget into steps per stage.

    Args:
        stages: Stages of the recipe; `until` rises to 100 %.
        budget: Number of steps, tokens, epochs or seconds.
        every: Intervals of validating and saving; a budget in seconds includes their time.
        epoch_tokens: Tokens of one epoch at each stage's length.
        measured: Measured times. They determine the plan if the budget is in seconds; else they only predict the time.
        pairs_every: Interval of evaluating minimal pairs.

    Raises:
        RecipeError: a stage is never reached, or the budget is too small for one step of each stage, or for one
            validation.
    """
    check_stages(stages)
    check_budget(budget)
    fractions = [stage.until.fraction - start for stage, start in zip(stages, _stage_starts(stages), strict=True)]
    sizes = [stage.batch_tokens for stage in stages]
    steps_per_token = [fraction / size for fraction, size in zip(fractions, sizes, strict=True)]
    periodic = _periodic(every, pairs_every, measured)
    if budget.unit == "tokens":
        tokens = budget.number
    elif budget.unit == "epochs":
        tokens = budget.number / sum(fraction / epoch for fraction, epoch in zip(fractions, epoch_tokens, strict=True))
    else:
        steps = budget.number
        if budget.unit == "seconds":
            seconds_per_token = sum(
                rate * seconds for rate, seconds in zip(steps_per_token, measured.step_seconds, strict=True)
            )
            step_seconds = seconds_per_token / sum(steps_per_token)
            _check_seconds(budget, len(stages) * step_seconds, measured)
            steps = _steps_within(budget.number, step_seconds, lambda n, s: _overhead(n, s, periodic))
        tokens = steps / sum(steps_per_token)
    exact_boundaries = [0.0, *accumulate(tokens * rate for rate in steps_per_token)]
    to_integer = math.ceil if budget.unit in ("tokens", "epochs") else round
    boundaries = [to_integer(round(boundary, 6)) for boundary in exact_boundaries]
    # Rounding must not remove the only step of a stage if there are enough steps for all stages.
    count, num_steps = len(stages), boundaries[-1]
    latest_starts = [max(num_steps - (count - number), 0) for number in range(count)]
    boundaries = [
        *(
            min(max(start, number), latest)
            for number, (start, latest) in enumerate(zip(boundaries, latest_starts, strict=False))
        ),
        num_steps,
    ]
    plans = tuple(
        StagePlan(stage.max_seq_len, stage.batch_tokens, first, last - first, seconds)
        for stage, (first, last), seconds in zip(stages, pairwise(boundaries), measured.step_seconds, strict=True)
    )
    for number, (stage, plan) in enumerate(zip(stages, plans, strict=True)):
        if plan.steps < 1:
            raise RecipeError(
                f"stage {number} (max_seq_len = {stage.max_seq_len}) is never reached: {budget} gives it no step",
                location=f"stage.{number}",
                hint="increase the budget, decrease the batch size or remove the stage",
            )
    training = sum(stage.steps * stage.seconds_per_step for stage in plans)
    overhead = _overhead(num_steps, training, periodic)
    return Plan(plans, measured.validate_seconds, measured.save_seconds, overhead, measured.pairs_seconds)


def _periodic(
    every: EveryConfig, pairs_every: Fraction | Quantity, costs: Measured | Plan
) -> tuple[tuple[Fraction | Quantity, float], ...]:
    """Returns interval and seconds of each periodic action that makes a run longer."""
    actions = ((every.validate, costs.validate_seconds), (every.save, costs.save_seconds))
    return (*actions, (pairs_every, costs.pairs_seconds)) if costs.pairs_seconds else actions


def limit_validation(every: EveryConfig, budget: Quantity, measured: Measured) -> tuple[EveryConfig, str]:
    """Reduces the number of validations if they would take more than a fifth of a budget in seconds.

    Only validations that are due every fraction of the plan are reduced.

    Returns:
        The intervals to plan with, and a note for the log if validation was reduced or takes too long anyway.
    """
    cost, limit = measured.validate_seconds, _MAX_VALIDATION_FRACTION * budget.number
    if budget.unit != "seconds" or not cost:
        return every, ""
    interval = every.validate
    if isinstance(interval, Quantity):
        if interval.unit == "seconds" and cost > _MAX_VALIDATION_FRACTION * interval.number:
            return every, f"each validation takes {cost:.2g} s, and one is due every {interval} (train.every.validate)"
        return every, ""
    times = math.ceil(1 / interval.fraction - 1e-9) if interval.fraction else 1
    if times * cost <= limit or times == 1:
        return every, ""
    fewer = max(1, math.floor(limit / cost))
    rounded = Fraction(math.ceil(10_000 / fewer) / 10_000)  # rounding down would add one validation
    share = cost / budget.number
    if fewer > 1 or cost <= limit:
        reason = f"{'once' if fewer == 1 else f'{fewer} times'} instead of {times} times, to spend at most a fifth"
    else:
        reason = f"only once instead of {times} times, which still takes {share:.0%}"
    note = (
        f"one validation takes {cost:.2g} s, so the run validates {reason} of the budget on it; "
        "a smaller data.held_out.max_size makes it faster"
    )
    return replace(every, validate=rounded), note


def limit_pairs(every: Fraction | Quantity, budget: Quantity, seconds: float) -> tuple[Fraction | Quantity, str]:
    """Reduces the number of evaluations of minimal pairs if they would take more than a fifth of a budget in seconds.

    Only those that are due every fraction of the plan are reduced.

    Returns:
        The interval to plan with, and a note for the log if it was reduced.
    """
    if budget.unit != "seconds" or not seconds or isinstance(every, Quantity):
        return every, ""
    times = math.ceil(1 / every.fraction - 1e-9) if every.fraction else 1
    fewer = max(1, math.floor(_MAX_VALIDATION_FRACTION * budget.number / seconds))
    if fewer >= times:
        return every, ""
    return Fraction(math.ceil(10_000 / fewer) / 10_000), (
        f"evaluating the minimal pairs takes {seconds:.2g} s, so the run does it {fewer} instead of {times} times; "
        "a smaller train.evaluate.subset makes it faster"
    )


def extend_plan(
    plan: Plan, budget: Quantity, *, every: EveryConfig, epoch_tokens: int, pairs_every: Fraction | Quantity = _AT_END
) -> Plan:
    """Returns the plan with a longer last stage. The budget is the new total or, if `relative`, the addition.

    Raises:
        RecipeError: the new total does not exceed the plan, or the budget has an invalid unit.
    """
    check_budget(budget)
    last = plan.stages[-1]
    periodic = _periodic(every, pairs_every, plan)

    def overhead(steps: int, seconds: float) -> float:
        tokens = steps * last.batch_tokens
        return _overhead(steps, seconds, periodic, fraction=tokens / (plan.tokens + tokens))

    if budget.unit == "steps":
        more = budget.number if budget.relative else budget.number - plan.steps
    elif budget.unit == "seconds":
        seconds = budget.number if budget.relative else budget.number - plan.seconds
        more = _steps_within(seconds, last.seconds_per_step, overhead)
    else:
        total = budget.number * (epoch_tokens if budget.unit == "epochs" else 1)
        more = (total if budget.relative else total - plan.tokens) / last.batch_tokens
    steps = math.ceil(more - 1e-9)
    if steps < 1:
        raise RecipeError(
            f"the budget {budget} does not exceed the run's plan of {plan.steps} steps and {plan.tokens:,} tokens",
            hint='give a larger total, or an addition such as --budget "+1 epoch"',
        )
    return replace(
        plan,
        stages=(*plan.stages[:-1], replace(last, steps=last.steps + steps)),
        overhead_seconds=plan.overhead_seconds + overhead(steps, steps * last.seconds_per_step),
    )


def with_times(plan: Plan, measured: Measured) -> Plan:
    """Returns a plan that was not measured, with the times of its steps, validations and checkpoints."""
    stages = zip(plan.stages, measured.step_seconds, strict=True)
    return replace(
        plan,
        stages=tuple(replace(stage, seconds_per_step=seconds) for stage, seconds in stages),
        validate_seconds=measured.validate_seconds,
        save_seconds=measured.save_seconds,
        pairs_seconds=measured.pairs_seconds,
    )


def tenth(plan: Plan) -> int:
    """Returns the step after which a tenth of the planned tokens is processed."""
    return _step_at(plan, 0.1)


def describe_deviation(plan: Plan, step: int, training_seconds: float, run: str) -> str:
    """Compares the training time of the first steps with the plan.

    Args:
        plan: Plan with measured times.
        step: Number of steps so far.
        training_seconds: Seconds that these steps took, without validation and saving.
        run: Directory of the run, quoted for a shell.

    Returns:
        A message if the run would end more than 15 % earlier or later than planned, else "". If earlier, it names the
        command that prolongs the run.
    """
    ratio = training_seconds / max(plan.training_seconds(step), 1e-9)
    expected = plan.training_seconds(plan.steps) * ratio + plan.overhead_seconds
    if abs(expected - plan.seconds) <= _MAX_DEVIATION * plan.seconds:
        return ""
    times = f"it will end after about {duration(expected)} instead of {duration(plan.seconds)}"
    if expected > plan.seconds:
        return f"the run is slower than its plan: {times}; Ctrl-C stops it earlier and saves a checkpoint"
    left = plan.seconds - expected
    share = 1 - plan.overhead_seconds / plan.seconds  # of training
    steps = round(share * left / (ratio * plan.stages[-1].seconds_per_step))
    return (
        f"the run is faster than its plan: {times}; when it has ended, prolong it by {duration(left)}: "
        f'unmask pretrain --resume {run} --budget "+{max(1, steps)} steps"'
    )


def check_budget(budget: Quantity, where: str = "") -> None:
    """Checks the unit of a budget.

    Raises:
        RecipeError: the unit is not in BUDGET_UNITS.
    """
    if budget.unit not in BUDGET_UNITS:
        raise RecipeError(
            f"invalid budget: got {budget}, expected a number of seconds, steps, tokens or epochs",
            location=where,
            hint='write for example "10 min", "500 steps", "2M tokens" or "3 epochs"',
        )


def _check_seconds(budget: Quantity, steps: float, measured: Measured) -> None:
    """Checks that a budget in seconds is enough for one step of each stage, one validation and one checkpoint.

    `steps` are the seconds of as many steps as there are stages.

    Raises:
        RecipeError: it isn't; the error names a budget that is.
    """
    validation = measured.validate_seconds
    least = steps + validation + measured.save_seconds
    if budget.number >= least:
        return
    if validation >= steps:
        what = f"one validation, which takes about {duration(validation)}"
        hint = ", or validate on less text: --set data.held_out.max_size"
    else:
        what = f"one step of each stage, which take about {duration(steps)}"
        hint = ", or choose a smaller batch_size or a smaller recipe: unmask recipe list"
    raise RecipeError(
        f"the budget of {budget} is too short for {what}",
        location="train.budget",
        hint=f'increase the budget to at least "{math.ceil(1.2 * least)} s"{hint}',
    )


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Checks that there are stages, that each is valid, and that they end in order, the last at 100 % of the plan.

    Raises:
        RecipeError: a stage is missing or invalid; the error names it.
    """
    if not stages:
        raise RecipeError("recipe has no stage", hint="add a [[stage]] with until, max_seq_len and batch_size")
    for number, (stage, start) in enumerate(zip(stages, _stage_starts(stages), strict=True)):
        location = f"stage.{number}"
        if stage.until.fraction <= start:
            raise RecipeError(
                f"stage {number} (max_seq_len = {stage.max_seq_len}) is never reached: it ends at {stage.until}",
                location=location,
                hint="increase `until` from stage to stage",
            )
        if stage.max_seq_len < MIN_SEQ_LEN:
            raise RecipeError(
                f"invalid max_seq_len: got {stage.max_seq_len}, expected at least {MIN_SEQ_LEN}",
                location=location,
                hint=f"set it to {MIN_SEQ_LEN} or more",
            )
        if stage.batch_size.unit not in ("tokens", "texts") or stage.batch_tokens < 1:
            raise RecipeError(
                f"invalid batch_size: got {stage.batch_size}, expected a number of tokens or texts",
                location=location,
                hint='write for example "16k tokens" or "64 texts"',
            )
    if abs(stages[-1].until.fraction - 1.0) > 1e-9:
        raise RecipeError(
            f"invalid until of the last stage: got {stages[-1].until}, expected 100%",
            location=f"stage.{len(stages) - 1}.until",
            hint='set it to "100%"',
        )


def _stage_starts(stages: Sequence[StageConfig]) -> list[float]:
    return [0.0, *(stage.until.fraction for stage in stages[:-1])]


def _steps_within(seconds: float, step_seconds: float, overhead: Callable[[int, float], float]) -> int:
    """Returns the largest number of steps that fits into `seconds`, overhead included.

    `overhead` returns the seconds of validations and saves for a number of steps and their training seconds. It must
    not decrease with the number of steps.
    """
    step_seconds = max(step_seconds, 1e-9)
    low, high = 0, max(0, math.floor(seconds / step_seconds))  # binary search
    while low < high:
        middle = (low + high + 1) // 2
        if middle * step_seconds + overhead(middle, middle * step_seconds) <= seconds:
            low = middle
        else:
            high = middle - 1
    return low


def _overhead(
    steps: int,
    training_seconds: float,
    periodic: Sequence[tuple[Fraction | Quantity, float]],
    fraction: float = 1.0,
) -> float:
    """Returns the seconds of all validations and saves.

    Each happens after the last step too, and at most once per step.

    Args:
        steps: Number of steps.
        training_seconds: Training time of these steps.
        periodic: Interval and seconds of validating and of saving.
        fraction: Tokens of these steps as a fraction of the planned tokens.
    """
    total, timed = 0.0, list[tuple[float, float]]()
    for every, cost in periodic:
        if isinstance(every, Fraction):
            times = math.ceil(fraction / every.fraction - 1e-9) if every.fraction else 1
        elif every.unit == "steps":
            times = math.ceil(steps / max(1, round(every.number)))
        else:
            timed.append((every.number, cost))
            continue
        total += cost * min(max(times, 1), steps)
    # Validations and saves with an interval in seconds make the run longer, so that more of them become due.
    busy = sum(cost / max(interval, 1e-9) for interval, cost in timed)
    if busy >= 1:  # each is due again before it ends, so they happen after every step
        return total + steps * sum(cost for _, cost in timed)
    seconds = (training_seconds + total) / (1 - busy)
    return total + sum(cost * min(steps, seconds // max(interval, 1e-9) + 1) for interval, cost in timed)


def always(step: int, seconds: float) -> bool:
    """Returns True: for a callback that runs after every step."""
    return True


def due(every: Fraction | Quantity, plan: Plan) -> Callable[[int, float], bool]:
    """Returns a function that returns whether a periodic action (log, validate, save) is due after a step.

    Its arguments are the number of the step, from 1, and the seconds since the action last ended.
    """
    if isinstance(every, Fraction):
        if not every.fraction:
            return lambda step, seconds: step == plan.steps
        steps = {_step_at(plan, every.fraction * k) for k in range(1, math.ceil(1 / every.fraction))}
        return lambda step, seconds: step in steps or step == plan.steps
    if every.unit == "steps":
        interval = max(1, round(every.number))
        return lambda step, seconds: step % interval == 0 or step == plan.steps
    assert every.unit == "seconds", f"EveryConfig rejects an interval of {every}"
    return lambda step, seconds: seconds >= every.number or step == plan.steps


def _step_at(plan: Plan, fraction: float) -> int:
    """Returns the step after which a fraction of the planned tokens is processed."""
    tokens, target = 0, fraction * plan.tokens
    for stage in plan.stages:
        stage_tokens = stage.steps * stage.batch_tokens
        if tokens + stage_tokens >= target:
            return stage.first_step + max(1, round((target - tokens) / stage.batch_tokens))
        tokens += stage_tokens
    return plan.steps
