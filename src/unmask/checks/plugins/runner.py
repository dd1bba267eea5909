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
from unmask.core.plugins import culprit

Subject = TypeVar("Subject")


class Broken(Exception):
    """A law is broken: how, in words."""


@dataclass(frozen=True)
class Law(Generic[Subject]):
    """A promise: its name, a sentence that says it, and the function that raises Broken where it is not kept."""

    name: str
    sentence: str
    test: Callable[[Subject], None]


@dataclass(frozen=True)
class Verdict:
    """Whether a law is kept and, where it isn't, what was seen."""

    law: str
    sentence: str
    passed: bool
    detail: str = ""


def law(suite: list[Law[Subject]]) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Add a function to a suite; its name, spelt with spaces, is the law's, its docstring the sentence."""

    def add(test: Callable[[Subject], None]) -> Callable[[Subject], None]:
        suite.append(Law(test.__name__.replace("_", " "), (test.__doc__ or "").strip(), test))
        return test

    return add


def judge(laws: Sequence[Law[Subject]], subject: Subject) -> list[Verdict]:
    """A verdict by each law; an error of the code that is judged breaks the law that met it."""
    return [_verdict(one, subject) for one in laws]


def _verdict(one: Law[Subject], subject: Subject) -> Verdict:
    try:
        one.test(subject)
    except Broken as broken:
        return Verdict(one.name, one.sentence, passed=False, detail=str(broken))
    except UnmaskError as error:
        return Verdict(one.name, one.sentence, passed=False, detail=error.what)
    except Exception as error:  # whatever the code that is judged does
        place = culprit(error)
        reason = f"{type(error).__name__}: {error}" + (f" (at {place})" if place else "")
        return Verdict(one.name, one.sentence, passed=False, detail=reason)
    return Verdict(one.name, one.sentence, passed=True)


def require(kept: bool, otherwise: str) -> None:
    """Raise Broken unless `kept`."""
    if not kept:
        raise Broken(otherwise)


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
