"""Room card: a budget made into a plan.

Comes in: the recipe's stages and budget, how many tokens the text has, seconds per step measured by a probe. Goes
out: a Plan (steps, tokens and stages as whole numbers), fixed before the first step and written into recipe.toml;
what is due when. Called by: pretrain, the loop, the forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from unmask.core.errors import RecipeError
from unmask.core.quantities import Fraction, Quantity

BUDGET_UNITS = ("seconds", "steps", "tokens", "epochs")
_MOST_VALIDATING = 0.2  # of a budget in seconds
SHORTEST = 3  # slots of a text: one token between [CLS] and [SEP]


@dataclass(frozen=True)
class StageConfig:
    """One row of the curriculum: until which share of the planned tokens, how long a text, how much a step."""

    until: Fraction = Fraction(1.0)
    max_seq_len: int = 128
    batch_size: Quantity = Quantity(16_384, "tokens")

    @property
    def batch_tokens(self) -> int:
        """Tokens that a step takes at least."""
        return round(self.batch_size.number * (self.max_seq_len if self.batch_size.unit == "texts" else 1))


@dataclass(frozen=True)
class EveryConfig:
    """How often something is done: a share of the plan, steps or seconds."""

    log: Fraction | Quantity = Fraction(0.01)
    validate: Fraction | Quantity = Fraction(0.05)
    save: Fraction | Quantity = Fraction(0.2)

    def __post_init__(self) -> None:
        for name in ("log", "validate", "save"):
            every = getattr(self, name)
            if isinstance(every, Quantity) and every.unit not in ("steps", "seconds"):
                raise RecipeError(f"every {every}", location=name, hint='write a share ("5%"), steps or seconds')


@dataclass(frozen=True)
class StagePlan:
    """One stage in whole numbers; it holds steps [first_step, first_step + steps)."""

    max_seq_len: int
    batch_tokens: int
    first_step: int
    steps: int
    seconds_per_step: float


@dataclass(frozen=True)
class Plan:
    """What a run will do. Everything that follows from progress is a pure function of this and the step."""

    stages: tuple[StagePlan, ...]
    validate_seconds: float = 0.0
    save_seconds: float = 0.0
    overhead_seconds: float = 0.0  # validations and saves, all of them

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Planned tokens of all stages; a step takes whole texts, so a run sees up to a text more per step."""
        return sum(stage.steps * stage.batch_tokens for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Expected seconds, validation and saving included; 0 where nothing was measured."""
        return sum(stage.steps * stage.seconds_per_step for stage in self.stages) + self.overhead_seconds

    def stage_at(self, step: int) -> int:
        """The number of the stage that this step belongs to."""
        for number, stage in enumerate(self.stages):
            if step < stage.first_step + stage.steps:
                return number
        return len(self.stages) - 1

    def progress(self, step: int) -> float:
        """The share of the planned tokens that lies before this step, in [0, 1]."""
        stage = self.stages[self.stage_at(step)]
        before = sum(s.steps * s.batch_tokens for s in self.stages if s.first_step < stage.first_step)
        return (before + (step - stage.first_step) * stage.batch_tokens) / self.tokens


@dataclass(frozen=True)
class Measured:
    """What the probe found: seconds per step of each stage, per validation and per save."""

    step_seconds: tuple[float, ...]
    validate_seconds: float = 0.0
    save_seconds: float = 0.0


def make_plan(
    stages: Sequence[StageConfig],
    budget: Quantity,
    every: EveryConfig,
    epoch_tokens: Sequence[int],
    measured: Measured,
) -> Plan:
    """Turn a budget into steps per stage.

    Args:
        stages: the curriculum; `until` rises to 100 %.
        budget: in steps, tokens, epochs or seconds.
        every: how often the run validates and saves, which a budget in seconds pays for too.
        epoch_tokens: tokens of one epoch at each stage's length.
        measured: what the probe found; needed for a budget in seconds, else it only forecasts.

    Raises:
        RecipeError: a stage that is never reached, a budget too small for one step.
    """
    check_stages(stages)
    check_budget(budget)
    shares = [stage.until.fraction - before for stage, before in zip(stages, _befores(stages), strict=True)]
    sizes = [stage.batch_tokens for stage in stages]
    step_share = [share / size for share, size in zip(shares, sizes, strict=True)]  # steps per planned token
    duties = ((every.validate, measured.validate_seconds), (every.save, measured.save_seconds))
    if budget.unit == "tokens":
        tokens = budget.number
    elif budget.unit == "epochs":
        tokens = budget.number / sum(share / epoch for share, epoch in zip(shares, epoch_tokens, strict=True))
    else:
        steps = budget.number
        if budget.unit == "seconds":
            per_token = sum(share * seconds for share, seconds in zip(step_share, measured.step_seconds, strict=True))
            steps = _steps_within(budget.number, per_token / sum(step_share), lambda n, s: _overhead(n, s, duties))
        tokens = steps / sum(step_share)
    edges = [0.0, *accumulate(tokens * steps for steps in step_share)]
    up = math.ceil if budget.unit in ("tokens", "epochs") else round
    whole = [up(round(edge, 6)) for edge in edges]
    # Rounding must not take a stage its only step, where there are steps enough for all.
    count = len(stages)
    latest = [max(whole[-1] - (count - number), 0) for number in range(count)]
    whole = [
        *(min(max(edge, number), most) for number, (edge, most) in enumerate(zip(whole, latest, strict=False))),
        whole[-1],
    ]
    plans = tuple(
        StagePlan(stage.max_seq_len, stage.batch_tokens, first, last - first, seconds)
        for stage, (first, last), seconds in zip(stages, pairwise(whole), measured.step_seconds, strict=True)
    )
    for number, (stage, plan) in enumerate(zip(stages, plans, strict=True)):
        if plan.steps < 1:
            raise RecipeError(
                f"the stage of length {stage.max_seq_len} is never reached: the budget {budget} gives it no step",
                location=f"stage.{number}",
                hint="give a larger budget, a smaller batch, or take the stage out",
            )
    training = sum(stage.steps * stage.seconds_per_step for stage in plans)
    overhead = _overhead(whole[-1], training, duties)
    return Plan(plans, measured.validate_seconds, measured.save_seconds, overhead)


def affordable(every: EveryConfig, budget: Quantity, measured: Measured) -> tuple[EveryConfig, str]:
    """Fewer validations where those asked for, a share of the plan each, would take too much of a budget in seconds.

    Returns:
        What to plan with, and a sentence where that differs from what was asked or costs as much all the same.
    """
    cost, room = measured.validate_seconds, _MOST_VALIDATING * budget.number
    if budget.unit != "seconds" or not cost:
        return every, ""
    wanted = every.validate
    if isinstance(wanted, Quantity):
        if wanted.unit == "seconds" and cost > _MOST_VALIDATING * wanted.number:
            return every, f"each validation takes {cost:.0f} s, and one is due every {wanted} (train.every.validate)"
        return every, ""
    times = math.ceil(1 / wanted.fraction - 1e-9) if wanted.fraction else 1
    if times * cost <= room or times == 1:
        return every, ""
    fewer = max(1, math.floor(room / cost))
    what = f"validation takes {cost:.0f} s each time, so it is done {fewer} times instead of {times}"
    mend = "a smaller data.held_out.max_size makes it shorter"
    share = Fraction(math.ceil(10_000 / fewer) / 10_000)  # upwards, or there would be one more
    return replace(every, validate=share), f"{what}: at most a fifth of the budget goes to it; {mend}"


def prolong(plan: Plan, budget: Quantity, *, every: EveryConfig, epoch_tokens: int) -> Plan:
    """The same plan with a longer last stage, for a budget that is a new total or, `relative`, comes on top.

    Raises:
        RecipeError: the new total lies before the steps that the plan has already, or the unit is none of a budget's.
    """
    check_budget(budget)
    last = plan.stages[-1]
    duties = ((every.validate, plan.validate_seconds), (every.save, plan.save_seconds))

    def overhead(steps: int, seconds: float) -> float:
        tokens = steps * last.batch_tokens
        return _overhead(steps, seconds, duties, part=tokens / (plan.tokens + tokens))

    if budget.unit == "steps":
        more = budget.number if budget.relative else budget.number - plan.steps
    elif budget.unit == "seconds":
        left = budget.number if budget.relative else budget.number - plan.seconds
        more = _steps_within(left, last.seconds_per_step, overhead)
    else:
        total = budget.number * (epoch_tokens if budget.unit == "epochs" else 1)
        more = (total if budget.relative else total - plan.tokens) / last.batch_tokens
    steps = math.ceil(more - 1e-9)
    if steps < 1:
        raise RecipeError(
            f"{budget} is no more than the run's plan of {plan.steps} steps and {plan.tokens:,} tokens",
            hint='give a larger total, or what comes on top: --budget "+1 epoch"',
        )
    return replace(
        plan,
        stages=(*plan.stages[:-1], replace(last, steps=last.steps + steps)),
        overhead_seconds=plan.overhead_seconds + overhead(steps, steps * last.seconds_per_step),
    )


def check_budget(budget: Quantity, where: str = "") -> None:
    """Refuse a budget in a unit that a run is not counted in."""
    if budget.unit not in BUDGET_UNITS:
        what = f"a budget of {budget}: a run is not counted in {budget.unit}"
        raise RecipeError(what, location=where, hint="give it in seconds, steps, tokens or epochs")


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Refuse a curriculum whose stages are empty, out of order or don't fill the plan."""
    if not stages:
        raise RecipeError(
            "a recipe needs at least one [[stage]]", hint="add one with until, max_seq_len and batch_size"
        )
    for number, (stage, before) in enumerate(zip(stages, _befores(stages), strict=True)):
        where = f"stage.{number}"
        if stage.until.fraction <= before:
            raise RecipeError(
                f"the stage of length {stage.max_seq_len} is never reached: it ends at {stage.until}",
                location=where,
                hint="let `until` rise from stage to stage",
            )
        if stage.max_seq_len < SHORTEST:
            what = f"max_seq_len = {stage.max_seq_len} leaves no room for text"
            raise RecipeError(what, location=where, hint=f"use {SHORTEST} or more")
        if stage.batch_size.unit not in ("tokens", "texts"):
            raise RecipeError(
                f"a batch in {stage.batch_size.unit}", location=where, hint='write "16k tokens" or "64 texts"'
            )
        if stage.batch_tokens < 1:
            raise RecipeError(f"a batch of {stage.batch_size}", location=where, hint='write "16k tokens" or "64 texts"')
    if abs(stages[-1].until.fraction - 1.0) > 1e-9:
        raise RecipeError(
            f"the last stage ends at {stages[-1].until} of the plan",
            location=f"stage.{len(stages) - 1}.until",
            hint='the last stage ends at "100%"',
        )


def _befores(stages: Sequence[StageConfig]) -> list[float]:
    return [0.0, *(stage.until.fraction for stage in stages[:-1])]


def _steps_within(seconds: float, step_seconds: float, overhead: Callable[[int, float], float]) -> int:
    """The most steps that fit, with all that is due meanwhile, in so many seconds.

    `overhead` gives the seconds of what is due, for a number of steps and their seconds; it must not fall.
    """
    step_seconds = max(step_seconds, 1e-9)
    fits, most = 0, max(0, math.floor(seconds / step_seconds))
    while fits < most:
        middle = (fits + most + 1) // 2
        if middle * step_seconds + overhead(middle, middle * step_seconds) <= seconds:
            fits = middle
        else:
            most = middle - 1
    return fits


def _overhead(
    steps: int, training_seconds: float, duties: Sequence[tuple[Fraction | Quantity, float]], part: float = 1.0
) -> float:
    """Seconds of all that is due, each (how often, seconds each time), in so many steps: `part` of the plan.

    What is due is due at the end too, and never more often than after every step.
    """
    known, by_clock = 0.0, list[tuple[float, float]]()
    for every, cost in duties:
        if isinstance(every, Fraction):
            times = math.ceil(part / every.fraction - 1e-9) if every.fraction else 1
        elif every.unit == "steps":
            times = math.ceil(steps / max(1, round(every.number)))
        else:
            by_clock.append((every.number, cost))
            continue
        known += cost * min(max(times, 1), steps)
    # What is due by the clock takes time itself, in which it becomes due again.
    busy = sum(cost / max(interval, 1e-9) for interval, cost in by_clock)
    if busy >= 1:  # due again before it is done
        return known + steps * sum(cost for _, cost in by_clock)
    seconds = (training_seconds + known) / (1 - busy)
    return known + sum(cost * min(steps, seconds // max(interval, 1e-9) + 1) for interval, cost in by_clock)


def always(step: int, tokens: int, since: float) -> bool:
    """Due after every step."""
    return True


def due(every: Fraction | Quantity, plan: Plan) -> Callable[[int, int, float], bool]:
    """A function of (step done, tokens seen, seconds since it was last true) that says whether something is due now."""
    if isinstance(every, Fraction):
        if not every.fraction:
            return lambda step, tokens, since: step == plan.steps
        marks = {_step_at(plan, every.fraction * k) for k in range(1, math.ceil(1 / every.fraction))}
        return lambda step, tokens, since: step in marks or step == plan.steps
    if every.unit == "steps":
        interval = max(1, round(every.number))
        return lambda step, tokens, since: step % interval == 0 or step == plan.steps
    assert every.unit == "seconds", f"settings refuse what is due every {every}"
    return lambda step, tokens, since: since >= every.number or step == plan.steps


def _step_at(plan: Plan, share: float) -> int:
    """The step after which this share of the planned tokens has been seen."""
    tokens, wanted = 0, share * plan.tokens
    for stage in plan.stages:
        here = stage.steps * stage.batch_tokens
        if tokens + here >= wanted:
            return stage.first_step + max(1, round((wanted - tokens) / stage.batch_tokens))
        tokens += here
    return plan.steps
