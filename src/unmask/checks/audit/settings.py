"""Settings of an audit, claims of a masker, findings and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from unmask.core.config import require
from unmask.core.errors import RecipeError

Units = Literal["tokens", "words", "spans"]
Seeds = Literal["apart", "alike"]

MAX_TOKENS: Final = 20_000_000  # kept in memory at 13 bytes each: 260 MB


@dataclass(frozen=True)
class Claims:
    """What a masker claims to do; the defaults are BERT's (arXiv 1810.04805)."""

    rate: float = 0.15  # fraction of the maskable tokens that are masked
    mask: float = 0.8  # fractions of the masked tokens: replaced by [MASK],
    random: float = 0.1  # replaced by a random token,
    keep: float = 0.1  # unchanged
    units: Units = "tokens"  # words: whole words are masked; spans: runs of whole words
    uniform: bool = True  # all words are masked equally often; false if some are boosted

    def __post_init__(self) -> None:
        fractions = (self.mask, self.random, self.keep)
        if not 0.0 < self.rate <= 1.0 or min(fractions) < 0.0 or abs(sum(fractions) - 1.0) > 1e-9:
            raise RecipeError(
                f"invalid claims: got rate {self.rate:g} and split {self.mask:g}/{self.random:g}/{self.keep:g}, "
                "expected 0 < rate <= 1 and three fractions that sum to 1",
                location="claims of the masker",
                hint="give them as in --rate 0.15 --split 80/10/10",
            )


@dataclass(frozen=True)
class AuditConfig:
    """How a masker is run. The same settings give the same report, number for number."""

    samples: int = 2048  # 78,000 masked tokens in two epochs: 9 % instead of 10 % differs by 9 standard errors
    length: int = 128  # tokens of a sample, with special tokens
    batch: int = 16
    epochs: int = 2
    workers: int = 2  # processes of each rank's DataLoader; 0: none
    ranks: int = 2
    seed: int = 0
    seeds: Seeds = "apart"  # apart: each rank seeds the global generators differently; alike: all with one seed

    def __post_init__(self) -> None:
        require(self, "samples", "epochs", "ranks", min=1)
        require(self, "length", min=8)
        require(self, "batch", min=2)
        require(self, "workers", min=0)
        if self.samples < self.samples_per_round:
            raise RecipeError(
                f"{self.samples} samples are too few for a batch of each worker of each rank",
                location="samples",
                hint=f"give {self.samples_per_round} or more, or use fewer ranks and workers",
            )
        if self.samples * self.length * self.epochs > MAX_TOKENS:
            raise RecipeError(
                f"{self.samples:,} samples of {self.length} tokens in {self.epochs} epochs don't fit in memory",
                location="samples",
                hint=f"keep samples × length × epochs at {MAX_TOKENS:,} or less",
            )

    @property
    def loaders(self) -> int:
        """Number of processes of one rank that draw masks: its workers, or the rank itself."""
        return max(1, self.workers)

    @property
    def samples_per_round(self) -> int:
        """Samples of two batches for each loader of each rank: one of full samples, one of mixed lengths."""
        return self.batch * self.ranks * self.loaders * 2

    @property
    def rounds(self) -> int:
        """Batches of each loader in an epoch: even ones of full samples, odd ones of mixed lengths."""
        return 2 * (self.samples // self.samples_per_round)

    @property
    def batches(self) -> int:
        """Batches of each rank in an epoch."""
        return self.rounds * self.loaders


Verdict = Literal["pass", "fail", "info", "skipped"]

# A finding fails if its p-value is smaller: 4.9 standard errors.
SIGNIFICANCE: Final = 1e-6


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    verdict: Verdict  # info: a measurement without a requirement; skipped: there was nothing to measure
    detail: str
    measured: float | None = None
    expected: float | None = None
    standard_error: float | None = None  # of `measured`
    count: int = 0
    of: int = 0
    p_value: float | None = None  # None if a single case is a failure


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit."""

    masker: str
    claims: Claims
    settings: AuditConfig
    findings: tuple[Finding, ...]
    samples: int
    tokens: int  # maskable tokens, in all epochs together
    masked_tokens: int
    vocab_size: int
    words: str  # the rule by which words are recognized
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(finding.name for finding in self.findings if finding.verdict == "fail")

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def false_alarm(self) -> float:
        """Upper bound of the probability that a masker fails although all its claims are true."""
        return SIGNIFICANCE * sum(finding.p_value is not None for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)


def must_be_zero(name: str, count: int, of: int, description: str) -> Finding:
    """Return the finding of an event that must never happen."""
    detail = f"{count:,} of {of:,} {description}"
    return Finding(name, "fail" if count else "pass", detail, count / max(1, of), 0.0, 0.0, count, of)


def skipped(name: str, reason: str) -> Finding:
    """Return the finding of a check that could not be run."""
    return Finding(name, "skipped", reason)
