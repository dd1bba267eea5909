"""Budgets become whole steps; progress and what is due are functions of the plan."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.core.errors import RecipeError
from unmask.core.quantities import Fraction, Quantity
from unmask.training.plan import (
    EveryConfig,
    Measured,
    Plan,
    StageConfig,
    describe_deviation,
    due,
    extend_plan,
    limit_validation,
    make_plan,
    tenth,
)

EVERY = EveryConfig()
TWO = (
    StageConfig(Fraction(0.6), 128, Quantity(1000, "tokens")),
    StageConfig(Fraction(1.0), 512, Quantity(4000, "tokens")),
)
MEASURED = Measured((0.1, 0.5), validate_seconds=1.0, save_seconds=0.5)


def plan(budget: str, stages: tuple[StageConfig, ...] = TWO) -> Plan:
    return make_plan(
        stages, Quantity.parse(budget), EVERY, [100_000] * len(stages), Measured((0.1, 0.5)[: len(stages)], 1.0, 0.5)
    )


def test_steps_are_exact() -> None:
    for n in (2, 3, 7, 100, 1001):
        assert plan(f"{n} steps").steps == n


def test_tokens_and_epochs_are_reached() -> None:
    made = plan("2M tokens")
    assert [stage.steps for stage in made.stages] == [1200, 200] and made.tokens == 2_000_000
    assert plan("3 epochs").tokens == 300_000


def test_seconds_pay_for_validation_and_saving() -> None:
    made = plan("300 s")
    assert made.overhead_seconds == 20 * 1.0 + 5 * 0.5
    assert made.seconds == pytest.approx(300, rel=0.01)
    shares = [stage.steps * stage.batch_tokens / made.tokens for stage in made.stages]
    assert shares == pytest.approx([0.6, 0.4], abs=0.01)


def count_seconds(made: Plan, every: EveryConfig, measured: Measured) -> float:
    """Counts the seconds of a run of this plan, step by step, as the loop does."""
    clock, since = 0.0, {"validate": 0.0, "save": 0.0}
    due_functions = {name: due(getattr(every, name), made) for name in since}
    costs = {"validate": measured.validate_seconds, "save": measured.save_seconds}
    for step in range(1, made.steps + 1):
        clock += made.stages[made.stage_at(step - 1)].seconds_per_step
        before = clock  # all of a step see the clock before the first of them
        for name, is_due in due_functions.items():
            if is_due(step, before - since[name]):
                clock += costs[name]
                since[name] = before
    return clock


INTERVALS = st.one_of(
    st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]).map(Fraction),
    st.builds(Quantity, st.sampled_from([1.0, 7.0, 100.0, 10_000.0]), st.just("steps")),
    st.builds(Quantity, st.sampled_from([0.5, 7.0, 60.0, 1e6]), st.just("seconds")),
)


@given(INTERVALS, INTERVALS, st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from([0.0, 0.1, 2.0]), st.integers(60, 1000))
def test_a_budget_in_seconds_is_kept_however_often_it_validates_and_saves(
    validate: Fraction | Quantity, save: Fraction | Quantity, validate_seconds: float, save_seconds: float, seconds: int
) -> None:
    every = EveryConfig(validate=validate, save=save)
    measured = Measured((0.1, 0.5), validate_seconds, save_seconds)
    made = make_plan(TWO, Quantity(seconds, "seconds"), every, [100_000] * 2, measured)
    longest_step = 0.5 + validate_seconds + save_seconds
    assert count_seconds(made, every, measured) <= made.seconds + longest_step <= seconds + 2 * longest_step
    more = extend_plan(made, Quantity(seconds, "seconds", relative=True), every=every, epoch_tokens=100_000)
    assert more.overhead_seconds >= made.overhead_seconds
    assert more.seconds - made.seconds <= seconds + longest_step
    assert count_seconds(more, every, measured) <= 2 * seconds + 3 * longest_step


def test_a_validation_every_so_many_steps_is_paid_for() -> None:
    every = EveryConfig(validate=Quantity(10, "steps"), save=Quantity(60, "seconds"))
    made = make_plan(TWO[1:], Quantity(300, "seconds"), every, [100_000], Measured((0.5,), 5.0, 1.0))
    assert 300 - 6 < made.seconds <= 300, "one step is half a second, and another half of its validation"
    assert made.overhead_seconds == 5.0 * -(-made.steps // 10) + 1.0 * 5
    assert count_seconds(made, every, Measured((0.5,), 5.0, 1.0)) == pytest.approx(made.seconds, abs=1.5)
    other = make_plan(TWO[1:], Quantity(100, "steps"), every, [100_000], Measured((0.5,), 5.0, 1.0))
    assert other.overhead_seconds == 10 * 5.0 + 2 * 1.0, "with a budget in steps the time is predicted the same way"


@given(st.integers(2, 5000))
def test_progress_rises_from_zero_to_one(steps: int) -> None:
    made = plan(f"{steps} steps")
    values = [made.progress(step) for step in range(0, steps, max(1, steps // 50))]
    assert values[0] == 0 and all(b > a for a, b in pairwise(values)) and values[-1] < 1
    assert made.progress(steps) == pytest.approx(1.0)
    edges = [made.stage_at(step) for step in range(steps)]
    assert edges == sorted(edges) and set(edges) == {0, 1}


@given(st.integers(2, 3000), st.sampled_from([0.01, 0.05, 0.2, 0.5, 1.0]))
def test_a_share_is_due_as_often_as_it_says_and_at_the_end(steps: int, share: float) -> None:
    made = plan(f"{steps} steps")
    is_due = due(Fraction(share), made)
    times = [step for step in range(1, steps + 1) if is_due(step, 0.0)]
    assert times[-1] == steps and len(times) <= round(1 / share)
    if steps > 20 / share:
        assert len(times) == round(1 / share)


def test_steps_and_seconds_are_due() -> None:
    made = plan("10 steps")
    is_due = due(Quantity(4, "steps"), made)
    assert [step for step in range(1, 11) if is_due(step, 0)] == [4, 8, 10]
    is_due = due(Quantity(5, "seconds"), made)
    assert not is_due(3, 4.9) and is_due(3, 5.0) and is_due(10, 0.0)


def test_a_plan_is_extended() -> None:
    made = plan("100 steps")
    before = made.stages[0]
    longer = extend_plan(made, Quantity(50, "steps", relative=True), every=EVERY, epoch_tokens=100_000)
    assert longer.steps == 150 and longer.stages[0] == before
    assert extend_plan(made, Quantity(120, "steps"), every=EVERY, epoch_tokens=100_000).steps == 120
    epoch = extend_plan(made, Quantity(1, "epochs", relative=True), every=EVERY, epoch_tokens=100_000)
    assert epoch.tokens - made.tokens == 100_000
    with pytest.raises(RecipeError, match="does not exceed"):
        extend_plan(made, Quantity(100, "steps"), every=EVERY, epoch_tokens=100_000)


def test_an_extension_in_seconds_includes_validation_and_saving() -> None:
    made = plan("300 s")
    longer = extend_plan(made, Quantity(300, "seconds", relative=True), every=EVERY, epoch_tokens=100_000)
    assert longer.seconds == pytest.approx(600, abs=2)
    assert longer.overhead_seconds > made.overhead_seconds
    total = extend_plan(made, Quantity(600, "seconds"), every=EVERY, epoch_tokens=100_000)
    assert total.steps == pytest.approx(longer.steps, abs=2)


@pytest.mark.parametrize("unit", ["texts", "characters"])
def test_an_invalid_unit_of_a_budget_is_refused(unit: str) -> None:
    message = f"invalid budget: got 5 {unit}, expected a number of seconds, steps, tokens or epochs"
    with pytest.raises(RecipeError, match=message):
        plan(f"5 {unit}")
    with pytest.raises(RecipeError, match="invalid budget") as caught:
        extend_plan(plan("100 steps"), Quantity(5, unit, relative=True), every=EVERY, epoch_tokens=100_000)
    assert "500 steps" in caught.value.hint


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((TWO[1], TWO[0]), "never reached"),
        ((TWO[0],), "invalid until of the last stage: got 60%"),
        ((), "has no stage"),
        ((StageConfig(max_seq_len=2),), "invalid max_seq_len: got 2"),
        ((StageConfig(batch_size=Quantity(3, "epochs")),), "invalid batch_size: got 3 epochs"),
        ((StageConfig(batch_size=Quantity(0, "tokens")),), "invalid batch_size: got 0 tokens"),
    ],
)
def test_invalid_stages_are_refused(stages: tuple[StageConfig, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan("100 steps", stages)


def test_a_budget_too_small_for_a_stage() -> None:
    with pytest.raises(RecipeError, match=r"stage 0 .max_seq_len = 128. is never reached"):
        plan("1 steps")


@given(st.floats(0.01, 100), st.sampled_from(["1%", "5%", "10%", "33%", "100%", "0%"]))
def test_validation_leaves_most_of_a_budget_in_seconds_to_training(cost: float, validate: str) -> None:
    measured, wanted = Measured((0.1, 0.5), cost, 0.0), EveryConfig(validate=Fraction.parse(validate))
    every, note = limit_validation(wanted, Quantity.parse("300 s"), measured)
    loaded = Fraction.parse(str(every.validate))  # as in recipe.toml
    made = make_plan(TWO, Quantity.parse("300 s"), replace(every, validate=loaded), [1, 1], measured)
    times = round(made.overhead_seconds / cost)
    assert times == 1 or times * cost <= 60
    assert bool(note) == (every != wanted)
    if note:
        assert (times + 1) * cost > 60, "no fewer than the budget allows"
        assert (f"{times} times instead of" if times > 1 else "once instead of") in note
        assert ("at most a fifth of the budget" in note) == (times * cost <= 60)


def test_validations_by_the_clock_are_kept_with_a_note() -> None:
    every = EveryConfig(validate=Quantity(10, "seconds"))
    kept, note = limit_validation(every, Quantity.parse("300 s"), Measured((0.1, 0.5), 5.0, 0.0))
    assert kept == every and "each validation takes 5 s" in note
    assert limit_validation(every, Quantity.parse("300 s"), Measured((0.1, 0.5), 1.0, 0.0)) == (every, "")
    assert limit_validation(EveryConfig(), Quantity.parse("300 steps"), Measured((0.1, 0.5), 50.0, 0.0))[1] == ""


@given(st.integers(5, 60), st.floats(0.01, 0.4), st.floats(0.0, 0.5), st.floats(0.0, 0.3), st.booleans())
def test_a_short_budget_is_used_up_also_with_one_stage(
    seconds: int, step: float, validate_seconds: float, save_seconds: float, two: bool
) -> None:
    stages = TWO if two else (StageConfig(batch_size=Quantity(1000, "tokens")),)
    measured = Measured((step, 2 * step)[: len(stages)], validate_seconds, save_seconds)
    budget = Quantity(seconds, "seconds")
    every, _ = limit_validation(EVERY, budget, measured)
    made = make_plan(stages, budget, every, [100_000] * len(stages), measured)
    longest = 4 * step + validate_seconds + save_seconds
    assert seconds - longest <= made.seconds <= seconds + longest
    assert made.training_seconds(made.steps) == pytest.approx(made.seconds - made.overhead_seconds)
    assert made.training_seconds(0) == 0


@pytest.mark.parametrize(
    ("measured", "message", "hint"),
    [
        (Measured((0.5, 0.5), 30.0, 1.0), "too short for one validation, which takes about 30 s", "held_out.max_size"),
        (Measured((20.0, 9.0), 1.0, 1.0), "too short for one step of each stage, which take about 37 s", "batch_size"),
    ],
)
def test_a_budget_too_short_for_a_validation_or_a_step(measured: Measured, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"the budget of 20 s is {message}") as caught:
        make_plan(TWO, Quantity.parse("20 s"), EVERY, [1, 1], measured)
    assert hint in caught.value.hint
    enough = re.search(r'at least "(.*?)"', caught.value.hint)
    assert enough
    budget = Quantity.parse(enough[1])
    every, _ = limit_validation(EveryConfig(save=Fraction(1.0)), budget, measured)
    assert make_plan(TWO, budget, every, [1, 1], measured).steps >= 2
    assert make_plan(TWO, Quantity.parse("20 steps"), EVERY, [1, 1], measured).steps == 20, "only seconds can be short"


@given(st.floats(0.1, 5.0))
def test_a_wrong_plan_is_reported_with_the_command_that_prolongs_it(ratio: float) -> None:
    made = plan("300 s")
    step = tenth(made)
    assert made.progress(step) == pytest.approx(0.1, abs=0.01)
    training = made.training_seconds(made.steps)
    message = describe_deviation(made, step, ratio * made.training_seconds(step), "runs/notes")
    expected = ratio * training + made.overhead_seconds
    assert bool(message) == (abs(expected - made.seconds) > 0.15 * made.seconds)
    if not message:
        return
    if ratio > 1:
        assert "slower than its plan" in message and "Ctrl-C" in message and "--budget" not in message
        return
    found = re.search(r'unmask pretrain --resume runs/notes --budget "(\+\d+ steps)"', message)
    assert found and "faster than its plan" in message
    longer = extend_plan(made, Quantity.parse(found[1], relative=True), every=EVERY, epoch_tokens=100_000)
    actual = ratio * longer.training_seconds(longer.steps) + longer.overhead_seconds
    assert actual == pytest.approx(made.seconds, rel=0.1), "the prolonged run takes the time of the first plan"
