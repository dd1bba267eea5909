"""Room card: what a person sees of a run.

Comes in: what the run tells (a forecast, a text as the model sees it, measurements, the panel). Goes out: the Display
protocol and the one that fits where a run speaks: a live bar, tables and coloured letters in a terminal (terminal.py),
plain lines in a pipe (plain.py), nothing. Called by: pretrain, through the protocol; cli, which chooses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from unmask.train.loop import Standing
from unmask.train.panel import Line, Seen
from unmask.train.plan import Plan


@dataclass(frozen=True)
class Forecast:
    """What a run will cost, before it starts."""

    recipe: str
    parameters: int
    flops_per_token: float  # training: forward and backward, the mean over the planned tokens
    documents: int
    corpus_tokens: int
    plan: Plan
    epochs: tuple[float, ...]  # how often the text will be seen, in each stage
    texts_seen: Mapping[str, float]  # the same in all, for each text by its name
    flops_per_second: float  # of this machine's matrix products at the model's own shapes
    memory_bytes: int
    disk_bytes: int
    device: str
    precision: str
    threads: int
    optimiser: str
    patience: int = 0  # validations without gain after which the run ends; 0: never
    decay: str = ""  # when the rates come down, in words


@dataclass(frozen=True)
class SetValidation:
    """What was measured on one text of a person's own, at the last stage's length."""

    loss: float
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    asked: int
    unknown_share: float


@dataclass(frozen=True)
class PairValidation:
    """What was measured on frozen pairs of segments, at the last stage's length."""

    loss: float
    accuracy: float
    pairs: int
    earlier: Mapping[int, float]  # length -> accuracy, of the stage that runs where it isn't the last


@dataclass(frozen=True)
class Validation:
    """One validation: measurements by text length, the last stage's first."""

    loss: float
    accuracy: float
    bits_per_character: float
    unigram_loss: float
    length: int
    earlier: Mapping[int, float]  # length -> loss, of the stage that runs where it isn't the last
    sets: Mapping[str, SetValidation] = field(default_factory=dict[str, SetValidation])  # by name: text.valid
    pair: PairValidation | None = None  # where the objective asks about pairs


@dataclass(frozen=True)
class Summary:
    """Forecast against fact."""

    run: Path
    steps: int
    tokens: int
    seconds: float
    planned_seconds: float
    training_seconds: float
    tokens_per_second: float
    validation: Validation | None
    best_step: int | None = None  # of the lowest validation loss
    best_loss: float | None = None
    early: str = ""  # why the run ended before its plan, where it did
    before: Mapping[str, Any] | None = None  # the validation of the model that the run went on from


class Display(Protocol):
    """What a run tells while it works."""

    def say(self, message: str) -> None:
        """One sentence for the person."""
        ...

    def preparing(self, what: str, share: float) -> None:
        """How far a preparation (reading, training the tokenizer, writing shards) is, 0 to 1."""
        ...

    def forecast(self, forecast: Forecast) -> None:
        """Before the first step."""
        ...

    def text(self, text: str, slots: Sequence[Seen]) -> None:
        """One text as the model will see it."""
        ...

    def begin(self, plan: Plan, standing: Standing, flops_per_token: float, flops_per_second: float) -> None:
        """Training starts or goes on."""
        ...

    def step(self, standing: Standing) -> None:
        """After each step; cheap."""
        ...

    def logged(self, step: int, metrics: Mapping[str, object]) -> None:
        """A training line was written to the log."""
        ...

    def validated(self, step: int, validation: Validation, panel: Sequence[Line]) -> None:
        """After each validation."""
        ...

    def saved(self, folder: Path) -> None:
        """A step folder was written."""
        ...

    def done(self, summary: Summary) -> None:
        """The plan is finished, or the run was stopped."""
        ...

    def close(self) -> None:
        """Give the terminal back; called whatever happened."""
        ...


def for_stream(stream: TextIO, quiet: bool = False) -> Display:
    """The display that fits a stream: live in a terminal and in a notebook that has ipywidgets, else plain lines."""
    # rich costs 50 ms and these two know this module's dataclasses, so they are met only here.
    from rich.console import Console

    from unmask.train.plain import PlainDisplay, SilentDisplay
    from unmask.train.terminal import LiveDisplay

    if quiet:
        return SilentDisplay()
    console = Console(file=stream)
    in_terminal = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
    in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return LiveDisplay(console) if in_terminal or in_notebook else PlainDisplay(stream)
