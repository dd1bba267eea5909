"""Examines a text before training, or a run after it: findings, each with a figure and a command that acts on it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Severity = Literal["ok", "note", "problem"]
_LONGEST_NAMES: Final = 300  # characters of the names of texts that are written out in a command


@dataclass(frozen=True)
class Finding:
    """The result of one examination."""

    name: str
    severity: Severity
    figure: str  # what was measured, in words
    why: str  # why it matters, in one sentence
    command: str = ""  # acts on it; "" for a finding that is ok
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the numbers, for programs


def severity(value: float, note: float, problem: float) -> Severity:
    """Return the severity of a value that should be small: a note and a problem above these limits."""
    return "problem" if value > problem else "note" if value > note else "ok"


def finding(
    name: str, severity: Severity, figure: str, why: str, command: str = "", values: Mapping[str, Any] | None = None
) -> Finding:
    """Return a finding; one that is ok has no command."""
    return Finding(name, severity, figure, why, "" if severity == "ok" else command, values or {})


def named(texts: Sequence[str]) -> str:
    """Return the names of texts as arguments of a shell; TEXT if there are none or too many."""
    joined = shlex.join(texts)
    return joined if 0 < len(joined) <= _LONGEST_NAMES else "TEXT"
