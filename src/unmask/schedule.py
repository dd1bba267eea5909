"""Room card: rates as a pure function of progress.

Comes in: settings, the share of planned tokens that is done, the step. Goes out: the factor on all peak rates. Called
by: plan, loop. Nothing is stored, so that a resumed run needs to know only where it stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unmask.errors import RecipeError
from unmask.recipe import Share

START = 0.05  # of the peak: where the warm-up begins, so that the first step is not wasted on a rate of zero


@dataclass(frozen=True)
class ScheduleSettings:
    """How rates rise and fall; shares are of planned tokens.

    - stable: warm-up, then the peak, then a straight line to the floor over the last `decay` (warm-up, stable, decay).
    - linear, cosine: warm-up, then to the floor all the way.
    - noam: width^−½ · min(step^−½, step · warmup_steps^−1½) (arXiv 1706.03762, section 5.3); the rate is its factor.
    """

    kind: Literal["stable", "linear", "cosine", "noam"] = "stable"
    warmup: Share = Share(0.02)
    decay: Share = Share(0.40)  # of "stable" alone
    floor: float = 0.0  # part of the peak that is left at the end
    warmup_steps: int = 2000  # of "noam" alone

    def __post_init__(self) -> None:
        if self.kind == "stable" and self.warmup.fraction + self.decay.fraction > 1:
            raise RecipeError(
                f"warm-up ({self.warmup}) and decay ({self.decay}) are more than the whole run",
                where="decay",
                next="lower one of them",
            )
        if not 0 <= self.floor <= 1:
            raise RecipeError(f"`floor` is {self.floor}", where="floor", next="give a part of the peak, from 0 to 1")
        if self.warmup_steps < 1:
            raise RecipeError(f"`warmup_steps` is {self.warmup_steps}", where="warmup_steps", next="give at least 1")


def decay_in_words(settings: ScheduleSettings) -> str:
    """When the rates come down, for a person; empty where they don't, or have no end to come down to."""
    if settings.floor == 1 or settings.kind == "noam":
        return ""
    if settings.kind == "stable":
        return f"over the last {settings.decay} of the plan" if settings.decay.fraction else ""
    return "until the end of the plan"


def rate_factor(settings: ScheduleSettings, progress: float, step: int, width: int) -> float:
    """The factor on all peak rates of step `step` (from 0), begun when the share `progress` of planned tokens was done.

    Continuous; it rises during warm-up, never after it, and reaches the floor at progress 1. "noam" looks at step and
    at the encoder's width alone, the others at progress alone.
    """
    if settings.kind == "noam":
        return width**-0.5 * min((step + 1) ** -0.5, (step + 1) * settings.warmup_steps**-1.5)
    warmup = settings.warmup.fraction
    if progress < warmup:
        return START + (1 - START) * progress / warmup
    fall = settings.decay.fraction if settings.kind == "stable" else 1 - warmup
    left = 1.0 if fall == 0 else min(1.0, max(0.0, (1 - progress) / fall))
    if settings.kind == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.floor + (1 - settings.floor) * left
