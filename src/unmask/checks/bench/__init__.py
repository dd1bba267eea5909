"""Measures the speed of unmask on this machine, and beside it that of `transformers` where it is installed."""

from __future__ import annotations

import contextlib
import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Final

import torch

from unmask.checks.bench.peer import (
    NOT_INSTALLED,
    Peer,
    PeerError,
    blocks_of,
    installed_version,
    missing_class,
)
from unmask.checks.bench.timing import OtherProcesses, Rounds, Work, in_turns
from unmask.checks.bench.work import (
    BenchedRecipe,
    ceiling_work,
    fill_work,
    load_new,
    masked_sentences,
    masking_work,
    matmul_work,
    native_precisions,
    open_recipe,
    preparation_work,
    training_work,
)
from unmask.core.distributed import DistributedContext, init_distributed, load_warning
from unmask.core.errors import RecipeError
from unmask.core.format import count, rate
from unmask.core.hardware import cores, processor_name
from unmask.core.version import __version__

RECIPES: Final = ("tiny", "char", "bert-mini")
MAX_CHARACTERS: Final = 1_000_000  # of the text; more would only train larger vocabularies
_SQUARE: Final = (1024, 1024, 1024)
_SENTENCES: Final = 32  # filled in one call
_COLLATED: Final = 8  # steps whose rows are masked in turn by the data collator
_BUSY_CORES: Final = 0.25  # cores of other processes above which the report warns
_UNMASK, _PEER, _CEILING = "unmask", "transformers", "ceiling"


@dataclass(frozen=True)
class Row:
    """One measurement. Numbers are medians over the rounds."""

    recipe: str  # "" for matrix products
    measurement: str
    unit: str  # "ms" for a latency, otherwise units per second
    unmask: float
    transformers: float | None = None
    missing: str = ""  # why `transformers` has no number
    ratio: float | None = None  # how many times as fast unmask is: median of the ratios of the rounds
    ratio_range: tuple[float, float] | None = None  # smallest and largest ratio of a round
    share: float | None = None  # FLOP/s of training ÷ FLOP/s of the ceiling
    ceiling: float | None = None  # FLOP/s of the recipe's matrix products alone
    rounds: int = 0

    @property
    def value(self) -> str:
        """The measurement of unmask as text."""
        return self._text(self.unmask)

    @property
    def peer(self) -> str:
        """The measurement of `transformers` as text, or why there is none."""
        return self.missing if self.transformers is None else self._text(self.transformers)

    def _text(self, number: float) -> str:
        if self.unit == "FLOP/s":
            return rate(number)
        short = f"{number:.3g}" if number < 100 else count(number)
        return f"{short} {self.unit}"


@dataclass(frozen=True)
class BenchedModel:
    """The sizes of a recipe, as measured."""

    recipe: str
    kind: str
    parameters: int
    vocab_size: int
    max_seq_len: int
    batch_tokens: int
    flops_per_token: float  # forward, backward, and the optimizer's matrix products
    optimizer_flops_per_step: float
    device: str
    precision: str
    threads: int


@dataclass(frozen=True)
class BenchReport:
    """All measurements and the facts about the machine on which they depend."""

    date: str
    unmask: str
    python: str
    torch: str
    transformers: str
    accelerate: str
    system: str
    processor: str
    cores: int
    device: str
    precision: str
    threads: int
    seconds: float  # per measurement
    documents: int
    characters: int
    cores_used_by_others: float | None  # mean over all measurements; None where it can't be measured
    warnings: tuple[str, ...]
    models: tuple[BenchedModel, ...]
    rows: tuple[Row, ...]


def bench(
    texts: Sequence[str],
    recipes: Sequence[str] = RECIPES,
    *,
    seconds: float = 2.0,
    settings: Sequence[str] = (),
    threads: int | None = None,
    message: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Measure training, data preparation, masking and filling, each in turns with the same work of `transformers`.

    Args:
        texts: documents; those after the first million characters are not used.
        recipes: shipped names or TOML files.
        seconds: time per measurement.
        settings: changes of every recipe as `key=value`.
        threads: number of CPU threads; None: the recipe's, and all cores for matrix products alone.
        message: called with a line for each warning, each recipe and each measurement.

    Raises:
        RecipeError: a recipe is unknown or invalid, or `seconds` is not above 0.
        TextError: the text is too short.
        TokenizerError: no tokenizer can be trained on the text.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise RecipeError(
            f"invalid seconds: got {seconds:g}, expected more than 0", location="--seconds", hint="use --seconds 2"
        )
    for name in recipes:
        load_new(name, settings)  # an error of the last recipe is raised before anything is measured
    texts = first_characters(texts, MAX_CHARACTERS)
    context = init_distributed(threads="auto" if threads is None else threads)
    others, warnings = OtherProcesses(), list(filter(None, [load_warning(context)]))
    for warning in warnings:
        message(f"warning: {warning}")
    measuring = _Bench(texts, seconds, message)
    rows, models = list[Row](), list[BenchedModel]()
    with tempfile.TemporaryDirectory(prefix="unmask-bench-", ignore_cleanup_errors=True) as folder:
        for number, name in enumerate(recipes):
            message(f"{name}: training the tokenizer and building the model")
            benched = open_recipe(name, texts, Path(folder) / "cache", settings=settings, threads=threads)
            models.append(_facts(name, benched))
            rows += measuring.recipe(name, benched, Path(folder) / str(number))
    rows = [*measuring.matmul(context), *rows]  # after the recipes, so that a text that is too short fails at once
    used = others.cores_used()
    if used is not None and used > _BUSY_CORES:
        warnings.append(
            f"other processes used {used:.1f} of {cores()} cores during the measurements: all speeds are too low, and "
            "shares and ratios are less certain; stop them and measure again"
        )
    return BenchReport(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        unmask=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=measuring.transformers,
        accelerate=measuring.accelerate,
        system=f"{platform.system()} {platform.machine()}",
        processor=processor_name(),
        cores=cores(),
        device=context.describe()["device_name"],
        precision=context.precision,
        threads=context.threads,
        seconds=seconds,
        documents=len(texts),
        characters=sum(map(len, texts)),
        cores_used_by_others=used,
        warnings=tuple(warnings),
        models=tuple(models),
        rows=tuple(rows),
    )


def first_characters(texts: Sequence[str], limit: int) -> list[str]:
    """Return the first documents, until they have `limit` characters; the last one is cut there."""
    kept: list[str] = []
    for text in texts:
        if limit <= 0:
            break
        kept.append(text[:limit])
        limit -= len(text)
    return kept


@dataclass(frozen=True)
class _Beside:
    """Measures work beside that of `transformers`."""

    peer: Peer | None
    missing: str  # why there is no peer

    def measure(self, work: Mapping[str, Work], seconds: float, of_peer: Callable[[Peer], Work]) -> tuple[Rounds, str]:
        """Return the measurements, and why `transformers` has none. If it fails, the rest is measured alone."""
        missing = self.missing
        if self.peer:
            try:
                return in_turns({**work, _PEER: of_peer(self.peer)}, seconds), ""
            except PeerError as error:
                missing = str(error)
        return in_turns(work, seconds), missing


@dataclass(frozen=True)
class _Bench:
    """The settings of a bench, and its measurements."""

    texts: Sequence[str]
    seconds: float
    message: Callable[[str], None]
    transformers: str = field(default_factory=lambda: installed_version("transformers"))
    accelerate: str = field(default_factory=lambda: installed_version("accelerate"))

    def matmul(self, context: DistributedContext) -> list[Row]:
        """Measure products of square matrices, in float32 and in native bfloat16."""
        work = {one.precision: matmul_work([_SQUARE], one) for one in native_precisions(context)}
        rounds = in_turns(work, self.seconds)
        return [self._row("", f"matrix products, {precision}", "FLOP/s", rounds, name=precision) for precision in work]

    def recipe(self, name: str, benched: BenchedRecipe, folder: Path) -> list[Row]:
        """Measure everything of one recipe."""
        missing = NOT_INSTALLED if self.transformers == NOT_INSTALLED else missing_class(benched)
        no_trainer = missing or ("accelerate is missing" if self.accelerate == NOT_INSTALLED else "")
        with contextlib.ExitStack() as stack:
            peer = None if missing else stack.enter_context(Peer(benched, folder / "model"))
            return [
                self._training(name, benched, _Beside(None if no_trainer else peer, no_trainer)),
                *self._data(name, benched, _Beside(peer, missing), folder / "cache"),
                *self._filling(name, benched, _Beside(peer, missing)),
            ]

    def _training(self, name: str, benched: BenchedRecipe, beside: _Beside) -> Row:
        work = {_UNMASK: training_work(benched), _CEILING: ceiling_work(benched)}
        rounds, missing = beside.measure(work, self.seconds, lambda peer: peer.training_work(*blocks_of(benched)))
        flops = benched.flops_per_token
        share = median(flops * ratio for ratio in rounds.ratios(_UNMASK, _CEILING))
        ceiling = rounds.rate(_CEILING)
        return self._row(name, "training", "tokens/s", rounds, missing=missing, share=share, ceiling=ceiling)

    def _data(self, name: str, benched: BenchedRecipe, beside: _Beside, cache: Path) -> list[Row]:
        rounds = in_turns({_UNMASK: preparation_work(benched, cache)}, self.seconds)
        rows = [self._row(name, "data preparation", "tokens/s", rounds)]
        work, batches = {_UNMASK: masking_work(benched)}, benched.batches(_COLLATED)
        rounds, missing = beside.measure(work, self.seconds, lambda peer: peer.masking_work(batches))
        return [*rows, self._row(name, "masking and packing", "rows/s", rounds, missing=missing)]

    def _filling(self, name: str, benched: BenchedRecipe, beside: _Beside) -> list[Row]:
        model, sentences, rows = benched.model(), masked_sentences(self.texts, _SENTENCES), list[Row]()
        for measurement, unit, number in (
            ("filling one sentence", "ms", 1),
            (f"filling {_SENTENCES} sentences", "sentences/s", _SENTENCES),
        ):
            filled = sentences[:number]
            work = {_UNMASK: fill_work(model, filled)}
            rounds, missing = beside.measure(work, self.seconds, lambda peer, filled=filled: peer.fill_work(filled))
            rows.append(self._row(name, measurement, unit, rounds, missing=missing))
        return rows

    def _row(
        self,
        recipe: str,
        measurement: str,
        unit: str,
        rounds: Rounds,
        *,
        name: str = _UNMASK,
        missing: str = "",
        share: float | None = None,
        ceiling: float | None = None,
    ) -> Row:
        """Return a measurement as a row, and report it."""

        def number(of: str) -> float:
            return 1000.0 / rounds.rate(of) if unit == "ms" else rounds.rate(of)

        ratios = rounds.ratios(name, _PEER) if _PEER in rounds.seconds else None
        row = Row(
            recipe=recipe,
            measurement=measurement,
            unit=unit,
            unmask=number(name),
            transformers=number(_PEER) if ratios else None,
            missing=missing,
            ratio=median(ratios) if ratios else None,
            ratio_range=(ratios[0], ratios[-1]) if ratios else None,
            share=share,
            ceiling=ceiling,
            rounds=len(rounds.seconds[name]),
        )
        beside = f"; transformers {row.peer}" if row.peer else ""
        self.message(f"{recipe}: {measurement}  {row.value}{beside}".removeprefix(": "))
        return row


def _facts(name: str, benched: BenchedRecipe) -> BenchedModel:
    context, components = benched.context, benched.components
    return BenchedModel(
        recipe=name,
        kind=benched.recipe.model.kind,
        parameters=components.num_parameters,
        vocab_size=components.vocab_size,
        max_seq_len=benched.length,
        batch_tokens=benched.batch_tokens,
        flops_per_token=benched.flops_per_token,
        optimizer_flops_per_step=benched.optimizer_flops,
        device=context.describe()["device_name"],
        precision=context.precision,
        threads=context.threads,
    )
