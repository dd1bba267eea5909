"""Runs checks: small functions that raise `CheckFailed` if a requirement is not met."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from unmask.core.errors import UnmaskError
from unmask.core.plugins import user_frame

Fixture = TypeVar("Fixture")


class CheckFailed(Exception):
    """A requirement is not met; the message says what was observed."""


@dataclass(frozen=True)
class Check(Generic[Fixture]):
    """A requirement: its name, a sentence that states it, and the function that raises `CheckFailed`."""

    name: str
    sentence: str
    run: Callable[[Fixture], None]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; `detail` says what was observed if it failed."""

    check: str
    sentence: str
    passed: bool
    detail: str = ""


def check(suite: list[Check[Fixture]]) -> Callable[[Callable[[Fixture], None]], Callable[[Fixture], None]]:
    """Add a function to a suite: the check's name is the function's name, its sentence is the docstring."""

    def add(function: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        suite.append(Check(function.__name__.replace("_", " "), (function.__doc__ or "").strip(), function))
        return function

    return add


def run_checks(checks: Sequence[Check[Fixture]], fixture: Fixture) -> list[CheckResult]:
    """Run checks; an exception of the checked code fails the check in which it was raised."""
    return [_run(one, fixture) for one in checks]


def _run(check: Check[Fixture], fixture: Fixture) -> CheckResult:
    try:
        check.run(fixture)
    except CheckFailed as failure:
        return CheckResult(check.name, check.sentence, passed=False, detail=str(failure))
    except UnmaskError as error:
        return CheckResult(check.name, check.sentence, passed=False, detail=error.message)
    except Exception as error:
        place = user_frame(error)
        reason = f"{type(error).__name__}: {error}" + (f" (at {place})" if place else "")
        return CheckResult(check.name, check.sentence, passed=False, detail=reason)
    return CheckResult(check.name, check.sentence, passed=True)


def require(condition: bool, failure: str) -> None:
    """Raise `CheckFailed` with the message `failure` unless the condition holds."""
    if not condition:
        raise CheckFailed(failure)


def is_a(value: object, kind: type) -> bool:
    """Return whether a value has the type that its annotation only promises."""
    return isinstance(value, kind)


def generator_states() -> dict[str, str]:
    """Return the states of the global random generators."""
    numpy_state = np.random.get_state()
    return {
        "torch": str(torch.get_rng_state().numpy().tobytes()),
        "numpy": str([part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]),
        "random": str(random.getstate()),
    }


def require_no_draw(before: dict[str, str], advice: str) -> None:
    """Raise `CheckFailed` if a global random generator is not in the state that it had before."""
    after = generator_states()
    moved = [name for name in before if before[name] != after[name]]
    require(not moved, f"it drew from a random generator ({', '.join(moved)}): {advice}")
