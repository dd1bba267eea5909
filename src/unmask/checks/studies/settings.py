"""Studies as TOML files: a question, variants of a recipe, what is measured, and which figures are expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from unmask.checks.studies.measures import CURVES, MEASURES, ProbeConfig, PromptConfig
from unmask.core.config import build_config, load_toml, require
from unmask.core.errors import RecipeError
from unmask.core.quantities import Quantity, closest_match
from unmask.training.plan import check_budget
from unmask.training.recipe import Recipe, load_recipe

_FILE: Final = "study.toml"
_MAX_SEEDS: Final = 100
# Measured is the last model of a run, not the best of several.
_SETTINGS: Final = ("train.keep_best=false", "train.keep_last=1", "preview.num_samples=0")


@dataclass(frozen=True)
class VariantConfig:
    """A variant: the study's recipe with other settings."""

    name: str
    settings: tuple[str, ...] = ()  # `key=value`
    recipe: str = ""  # "": the study's
    budget: Quantity | None = None  # None: the study's


@dataclass(frozen=True)
class ExpectedConfig:
    """Bounds on the mean of a measure of one variant minus, or divided by, that of another, seed by seed.

    Bounds that come from a full run are its mean with a tolerance of twice its noise.
    """

    measure: str
    variant: str
    against: str
    basis: str  # where the bounds come from
    kind: Literal["difference", "ratio"] = "difference"
    at_least: float = -math.inf
    at_most: float = math.inf

    def __post_init__(self) -> None:
        if not self.at_least <= self.at_most or (math.isinf(self.at_least) and math.isinf(self.at_most)):
            raise RecipeError(
                f"invalid bounds: got {self.at_least:g} to {self.at_most:g}",
                location="at_least",
                hint="give at_least, at_most or both, in this order",
            )

    @property
    def bounds(self) -> str:
        """The bounds as text."""
        if math.isinf(self.at_least):
            return f"at most {self.at_most:g}"
        return f"at least {self.at_least:g}" if math.isinf(self.at_most) else f"{self.at_least:g} to {self.at_most:g}"


@dataclass(frozen=True)
class PlotConfig:
    """The plot: a measure that a validation gives, against tokens, predicted tokens or training seconds."""

    x: Literal["tokens", "predicted", "training_seconds"] = "tokens"
    y: str = "loss"
    variants: tuple[str, ...] = ()  # (): all; losses of different tasks don't belong in one plot


@dataclass(frozen=True)
class QuickConfig:
    """What `--quick` changes: enough to see that the study works, too little to judge it."""

    budget: Quantity
    settings: tuple[str, ...] = ()
    seeds: int = 1
    max_characters: int = 400_000
    probe: ProbeConfig = field(default_factory=lambda: ProbeConfig(200, 200, 1.0))


@dataclass(frozen=True)
class StudyConfig:
    """A study. The first variant is the one that the others are compared with."""

    question: str
    source: str  # paper and section
    recipe: str
    budget: Quantity  # of each run; in seconds of processor time, steps, tokens or epochs
    measures: tuple[str, ...]  # names in `MEASURES`
    variant: tuple[VariantConfig, ...]
    quick: QuickConfig
    settings: tuple[str, ...] = ()  # of all variants
    seeds: int = 3  # seeds are 1, 2, …
    max_characters: int = 20_000_000  # of the text; the rest is not read
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    plot: PlotConfig = field(default_factory=PlotConfig)
    prompt: PromptConfig | None = None
    expected: tuple[ExpectedConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variant]
        if len(names) < 2 or len(set(names)) < len(names):
            raise RecipeError(
                f"invalid variants: got {', '.join(names) or 'none'}, expected at least two different names",
                location="variant",
                hint="add a [[variant]] with name and settings",
            )
        require(self, "seeds", min=1, max=_MAX_SEEDS)
        require(self, "max_characters", min=1000)
        for place, measure in [("measures", each) for each in self.measures] + [
            ("expected.measure", each.measure) for each in self.expected
        ]:
            _require_name(measure, MEASURES, place)
        _require_name(self.plot.y, CURVES, "plot.y")
        for name in self.plot.variants:
            _require_name(name, names, "plot.variants")
        for expected in self.expected:
            _require_name(expected.measure, self.measures, "expected.measure")
            _require_name(expected.variant, names, "expected.variant")
            _require_name(expected.against, names, "expected.against")
        if self.prompt is None and "prompt" in (*self.measures, self.plot.y):
            raise RecipeError(
                "the measure `prompt` needs a prompt", location="prompt", hint="add [prompt] with text and answer"
            )
        for budget in (self.budget, self.quick.budget, *(each.budget for each in self.variant if each.budget)):
            _check_budget(budget, "budget")
        if any(each.budget and each.budget.unit != self.budget.unit for each in self.variant):
            raise RecipeError(
                f"a variant's budget has another unit than the study's {self.budget}",
                location="variant.budget",
                hint=f"give it in {self.budget.unit}",
            )


def _check_budget(budget: Quantity, place: str) -> None:
    check_budget(budget, where=place)
    if budget.number <= 0:
        raise RecipeError(f"invalid budget: got {budget}, expected more than 0", location=place, hint="increase it")


def _require_name(name: str, known: Iterable[str], place: str) -> None:
    names = list(known)
    if name not in names:
        near = closest_match(name, names)
        raise RecipeError(
            f"unknown name `{name}`" + (f": did you mean `{near}`?" if near else ""),
            location=place,
            hint=f"use one of {', '.join(names)}",
        )


@dataclass(frozen=True)
class Study:
    """A study with its name and the extent of one execution."""

    name: str
    config: StudyConfig
    quick: bool = False
    seeds: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()  # given by the user, after those of the study
    given_budget: Quantity | None = None  # given by the user

    @property
    def budget(self) -> Quantity:
        """Budget of a run whose variant has none of its own."""
        return self.given_budget or (self.config.quick.budget if self.quick else self.config.budget)

    @property
    def probe(self) -> ProbeConfig:
        """Size of the fine-tuning tasks."""
        return self.config.quick.probe if self.quick else self.config.probe

    @property
    def max_characters(self) -> int:
        """Number of characters of the text that are read."""
        return self.config.quick.max_characters if self.quick else self.config.max_characters

    def budget_of(self, variant: VariantConfig) -> Quantity:
        """Budget of a run of a variant: its own keeps its ratio to the study's."""
        if variant.budget is None or self.budget == self.config.budget:
            return variant.budget or self.budget
        number = variant.budget.number / self.config.budget.number * self.budget.number
        return Quantity(max(1.0, round(number)), self.budget.unit)

    def recipe(self, variant: VariantConfig, seed: int, budget: Quantity | None = None) -> Recipe:
        """Return the recipe of a run.

        Raises:
            RecipeError: a setting is unknown or invalid.
        """
        quick = self.config.quick.settings if self.quick else ()
        settings = [*_SETTINGS, *self.config.settings, *quick, *variant.settings, *self.settings]
        if self.config.prompt:  # a checkpoint at each validation, in which the prompt is filled after the run
            settings.append("train.keep_last=10000")
        overrides = {"seed": seed, "train.budget": str(budget or self.budget_of(variant)), "name": self.name}
        return load_recipe(variant.recipe or self.config.recipe, settings, overrides)


def shipped_studies() -> list[str]:
    """Return the names of the studies that come with the package, sorted."""
    folder = resources.files("unmask.checks.studies")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and (entry / _FILE).is_file())


def load_study(
    name: str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    budget: str | None = None,
    settings: Sequence[str] = (),
) -> Study:
    """Load a shipped study by name, or one of the user by the path of its folder or TOML file.

    Args:
        name: Name or path.
        quick: Whether to take the small budget.
        seeds: Number of seeds; None: the study's.
        budget: Length of each run; None: the study's.
        settings: Further changes of all recipes as `key=value`.

    Raises:
        RecipeError: the study is unknown or invalid, or a setting doesn't fit its recipe.
    """
    names = shipped_studies()
    if name in names:
        file = resources.files("unmask.checks.studies") / name / _FILE
    else:
        path = Path(name)
        file = path / _FILE if path.is_dir() else path
        if not file.is_file():
            near = closest_match(name, names)
            raise RecipeError(
                f"unknown study `{name}`" + (f": did you mean `{near}`?" if near else ""),
                hint=f"use one of {', '.join(names)}, or the path of a {_FILE}",
            )
        name = path.name if path.is_dir() else path.stem if path.name != _FILE else path.absolute().parent.name
    config = build_config(StudyConfig, load_toml(file), str(file))
    count = seeds if seeds is not None else config.quick.seeds if quick else config.seeds
    if not 1 <= count <= _MAX_SEEDS:
        raise RecipeError(
            f"invalid number of seeds: got {count}, expected 1 to {_MAX_SEEDS}",
            location=f"--seeds {count}",
            hint="give a smaller number, such as 3",
        )
    given = None if budget is None else Quantity.parse(budget)
    if given is not None:
        _check_budget(given, f"--budget {budget}")
    study = Study(name, config, quick, tuple(range(1, count + 1)), tuple(settings), given)
    for variant in config.variant:
        study.recipe(variant, 1)
    return study
