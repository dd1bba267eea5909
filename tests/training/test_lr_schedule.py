from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.core.errors import RecipeError
from unmask.core.quantities import Fraction
from unmask.training.optim import WARMUP_START, ScheduleConfig, lr_factor_at

KINDS = st.sampled_from(["wsd", "linear", "cosine"])
SHARES = st.floats(0.01, 0.5).map(Fraction)
SETTINGS = st.builds(ScheduleConfig, kind=KINDS, warmup=SHARES, decay=SHARES, min_lr_ratio=st.floats(0, 0.5))
PROGRESS = st.floats(0, 1, exclude_max=True)


def factor(settings: ScheduleConfig, progress: float) -> float:
    return lr_factor_at(settings, progress, step=0, hidden_size=128)


@given(SETTINGS, PROGRESS, PROGRESS)
def test_it_rises_during_warm_up_only(settings: ScheduleConfig, first: float, second: float):
    early, late = sorted((first, second))
    if late <= settings.warmup.fraction:
        assert factor(settings, early) <= factor(settings, late) + 1e-12
    if early >= settings.warmup.fraction:
        assert factor(settings, early) >= factor(settings, late) - 1e-12


@given(SETTINGS, PROGRESS)
def test_it_is_continuous_and_within_bounds(settings: ScheduleConfig, progress: float):
    near = min(progress + 1e-7, 1 - 1e-9)
    assert abs(factor(settings, progress) - factor(settings, near)) < 1e-3
    assert min(WARMUP_START, settings.min_lr_ratio) <= factor(settings, progress) <= 1


@given(SETTINGS)
def test_it_starts_above_zero_reaches_one_and_ends_at_the_minimum(settings: ScheduleConfig):
    assert factor(settings, 0.0) == WARMUP_START
    assert factor(settings, settings.warmup.fraction) == pytest.approx(1)
    assert factor(settings, 1 - 1e-9) == pytest.approx(settings.min_lr_ratio, abs=1e-6)


def test_wsd_stays_at_the_peak_until_the_decay():
    settings = ScheduleConfig(warmup=Fraction(0.1), decay=Fraction(0.4))
    assert [factor(settings, p) for p in (0.1, 0.3, 0.6, 0.8)] == pytest.approx([1, 1, 1, 0.5])


def test_no_warm_up_and_no_decay_is_a_constant():
    settings = ScheduleConfig(warmup=Fraction(0), decay=Fraction(0))
    assert [factor(settings, p) for p in (0.0, 0.5, 0.999)] == [1, 1, 1]


@given(st.integers(0, 10_000), st.floats(0, 0.99))
def test_noam_is_the_formula_of_the_paper_and_depends_on_the_step_only(step: int, progress: float):
    settings = ScheduleConfig(kind="noam", warmup_steps=2000)
    expected = 128**-0.5 * min((step + 1) ** -0.5, (step + 1) * 2000**-1.5)
    assert lr_factor_at(settings, progress, step, 128) == expected


def test_noam_peaks_at_the_end_of_its_warm_up():
    settings = ScheduleConfig(kind="noam", warmup_steps=50)
    assert max(range(200), key=lambda step: lr_factor_at(settings, 0.5, step, 64)) == 49


def test_invalid_settings_are_refused():
    with pytest.raises(RecipeError, match="whole run"):
        ScheduleConfig(warmup=Fraction(0.7), decay=Fraction(0.4))
    with pytest.raises(RecipeError):
        ScheduleConfig(min_lr_ratio=1.5)
