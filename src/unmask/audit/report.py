"""Room card: what an audit found.

Comes in: numbers. Goes out: Finding and AuditReport, plain data that becomes JSON as it is. Called by: the judging
modules of audit, cli.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from unmask.audit.settings import AuditSettings, Claims

Verdict = Literal["well", "found", "noted", "untested"]

CHANCE: Final = 1e-6  # a finding is made where chance alone would do so less often than this: 4.9 standard errors


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: Verdict  # noted: counted, but no promise; untested: there was nothing to look at
    says: str
    measured: float | None = None
    expected: float | None = None
    error: float | None = None  # one standard error of what was measured
    count: int = 0
    of: int = 0
    chance: float | None = None  # of this or worse, if the masker keeps its promise; None where none is allowed at all


@dataclass(frozen=True)
class AuditReport:
    """Everything that an audit says of a masker."""

    masker: str
    claims: Claims
    settings: AuditSettings
    findings: tuple[Finding, ...]
    samples: int
    tokens: int  # that were shown to the masker, all epochs together
    asked: int
    pieces: int  # of the tokenizer
    words: str  # the rule by which the text's words are told
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> tuple[str, ...]:
        """Names of what was found."""
        return tuple(finding.name for finding in self.findings if finding.verdict == "found")

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.found

    @property
    def false_alarm(self) -> float:
        """The chance, at most, that a masker which keeps every promise has something found."""
        return CHANCE * sum(finding.chance is not None for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)


def none_allowed(name: str, count: int, of: int, what: str) -> Finding:
    """What must not happen once."""
    return Finding(name, "found" if count else "well", f"{count:,} of {of:,} {what}", count / max(1, of), 0.0, 0.0,
                   count, of)  # fmt: skip


def untested(name: str, why: str) -> Finding:
    """What could not be looked at."""
    return Finding(name, "untested", why)
