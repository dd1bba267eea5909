"""Room card: what a masker claims, and how long it is watched.

Comes in: what a person says, or what a masker's own attributes say. Goes out: frozen settings. Called by: the other
modules of audit, cli.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from unmask.core.errors import RecipeError

Units = Literal["tokens", "words", "spans"]
Seeds = Literal["apart", "alike"]

MOST_SLOTS: Final = 20_000_000  # kept at 13 bytes each until all is judged: 260 MB


@dataclass(frozen=True)
class Claims:
    """What a masker promises; the defaults are BERT's (arXiv 1810.04805)."""

    rate: float = 0.15  # of the tokens that may be asked
    mask: float = 0.8  # of the asked
    random: float = 0.1
    keep: float = 0.1
    units: Units = "tokens"  # words: hidden whole; spans: runs of whole words
    even: bool = True  # all words as often; not so where some are preferred

    def __post_init__(self) -> None:
        shares = (self.mask, self.random, self.keep)
        if not 0.0 < self.rate <= 1.0 or min(shares) < 0.0 or abs(sum(shares) - 1.0) > 1e-9:
            raise RecipeError(
                f"rate {self.rate:g} and split {self.mask:g}/{self.random:g}/{self.keep:g} can't be claimed",
                location="what the masker claims",
                hint="0 < rate <= 1, and three shares >= 0 that sum to 1, as in --rate 0.15 --split 80/10/10",
            )


@dataclass(frozen=True)
class AuditConfig:
    """How a masker is watched. The same settings give the same report, number for number."""

    samples: int = 2048  # 78,000 asked in two epochs of 128: a share of 9 % instead of 10 % is 9 standard errors off
    length: int = 128  # slots of a sample, special pieces included
    batch: int = 16
    epochs: int = 2
    workers: int = 2  # processes of each rank's loader; 0: none
    ranks: int = 2
    seed: int = 0
    seeds: Seeds = "apart"  # whether each rank seeds the global generators for itself, or all alike

    def __post_init__(self) -> None:
        least = {"samples": 1, "length": 8, "batch": 2, "epochs": 1, "workers": 0, "ranks": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise RecipeError(
                    f"{name} = {getattr(self, name)} is too little", location=name, hint=f"give {bound} or more"
                )
        if self.samples < self.row_of_batches:
            raise RecipeError(
                f"{self.samples} samples give no batch to each worker of each rank",
                location="samples",
                hint=f"give {self.row_of_batches} or more, or fewer ranks and workers",
            )
        if self.samples * self.length * self.epochs > MOST_SLOTS:
            raise RecipeError(
                f"{self.samples:,} samples of {self.length} slots in {self.epochs} epochs would not fit in memory",
                location="samples",
                hint=f"keep samples × length × epochs under {MOST_SLOTS:,}",
            )

    @property
    def lanes(self) -> int:
        """Loaders that draw at the same time in one rank: its workers, or itself."""
        return max(1, self.workers)

    @property
    def row_of_batches(self) -> int:
        """Samples of one batch for every lane of every rank, two kinds of batches each."""
        return self.batch * self.ranks * self.lanes * 2

    @property
    def turns(self) -> int:
        """Batches of each lane in an epoch: even ones of full samples, odd ones of mixed lengths."""
        return 2 * (self.samples // self.row_of_batches)

    @property
    def places(self) -> int:
        """Batches of each rank in an epoch."""
        return self.turns * self.lanes


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
    settings: AuditConfig
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
