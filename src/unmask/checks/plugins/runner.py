"""Room card: what a law is, and how something is judged by laws.

Comes in: laws, each a small function that raises Broken, and what they are about. Goes out: one Verdict for each law.
Called by: the suites beside this module, check, tests/contracts.
"""

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
    """A law is broken: how, in words."""


@dataclass(frozen=True)
class Check(Generic[Fixture]):
    """A promise: its name, a sentence that says it, and the function that raises Broken where it is not kept."""

    name: str
    sentence: str
    test: Callable[[Fixture], None]


@dataclass(frozen=True)
class CheckResult:
    """Whether a law is kept and, where it isn't, what was seen."""

    check: str
    sentence: str
    passed: bool
    detail: str = ""


def law(suite: list[Check[Fixture]]) -> Callable[[Callable[[Fixture], None]], Callable[[Fixture], None]]:
    """Add a function to a suite; its name, spelt with spaces, is the law's, its docstring the sentence."""

    def add(test: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        suite.append(Check(test.__name__.replace("_", " "), (test.__doc__ or "").strip(), test))
        return test

    return add


def run_checks(checks: Sequence[Check[Fixture]], subject: Fixture) -> list[CheckResult]:
    """A verdict by each law; an error of the code that is judged breaks the law that met it."""
    return [_verdict(one, subject) for one in checks]


def _verdict(one: Check[Fixture], subject: Fixture) -> CheckResult:
    try:
        one.test(subject)
    except CheckFailed as broken:
        return CheckResult(one.name, one.sentence, passed=False, detail=str(broken))
    except UnmaskError as error:
        return CheckResult(one.name, one.sentence, passed=False, detail=error.message)
    except Exception as error:  # whatever the code that is judged does
        place = user_frame(error)
        reason = f"{type(error).__name__}: {error}" + (f" (at {place})" if place else "")
        return CheckResult(one.name, one.sentence, passed=False, detail=reason)
    return CheckResult(one.name, one.sentence, passed=True)


def require(kept: bool, otherwise: str) -> None:
    """Raise Broken unless `kept`."""
    if not kept:
        raise CheckFailed(otherwise)


def is_a(value: object, kind: type) -> bool:
    """Whether a value is of a type that its annotation only promises."""
    return isinstance(value, kind)


def generators() -> dict[str, str]:
    """The state of every generator that code could draw from unseen."""
    numpy_state = np.random.get_state()
    return {
        "torch": str(torch.get_rng_state().numpy().tobytes()),
        "numpy": str([part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]),
        "random": str(random.getstate()),
    }
