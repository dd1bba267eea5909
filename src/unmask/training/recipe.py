"""Room card: the whole recipe, as one tree of the settings that each room owns.

Comes in: a recipe's name or file, `--set` texts, values of explicit flags. Goes out: a Recipe, and recipe.toml in a
run: every value with defaults filled in, and the plan that was made from the budget. Called by: workshop, pretrain,
cli.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import tomli_w

from unmask.core import files
from unmask.core.config import apply_set, assign, build_config, dump_config, load_toml, resolve_recipe
from unmask.core.distributed import Device, Precision
from unmask.core.errors import RecipeError, RunError
from unmask.core.plugins import Outside, OutsideObjective
from unmask.core.quantities import Amount
from unmask.data.settings import TextSettings
from unmask.models import EncoderSettings
from unmask.models.modernbert import ModernSettings
from unmask.objectives.mlm import MlmSettings
from unmask.objectives.sentence_pairs import BertSettings
from unmask.training.loggers import SinkKind
from unmask.training.optim import OptimiserSettings, ScheduleSettings
from unmask.training.plan import EverySettings, Plan, StageSettings, check_budget, check_stages, patience

RECIPE, PLAN = "recipe.toml", "plan"
MAY_CHANGE = ("train.stop_after", "train.sinks", "train.every", "train.keep", "show")
"""What a resumed run may be given anew, beside its budget: nothing here changes a bit of what a step computes."""


@dataclass(frozen=True)
class TrainSettings:
    """How long, how often, how finely."""

    budget: Amount = Amount(600, "seconds")
    every: EverySettings = field(default_factory=EverySettings)
    micro_batch: Amount = Amount(16_384, "tokens")  # a step's tokens are dealt in pieces of at most this
    device: Device = "by-machine"
    precision: Precision = "by-machine"
    threads: int | Literal["all"] = "all"
    keep: int = 2  # step folders
    keep_best: bool = True  # the model of the best validation, in best/
    stop_after: str = "never"  # or "3 validations without gain"
    average: float = 0.0  # the decay of an average of the weights, per step, e.g. 0.999; 0: none
    sinks: tuple[SinkKind, ...] = ()  # what repeats the log: "tensorboard", "trackio"

    @property
    def patience(self) -> int:
        """After how many validations without gain a run ends; 0: never."""
        return patience(self.stop_after)

    def __post_init__(self) -> None:
        check_budget(self.budget, where="budget")
        if self.micro_batch.unit != "tokens":
            raise RecipeError(
                f"a micro-batch in {self.micro_batch.unit}", where="micro_batch", next='write "16k tokens"'
            )
        if self.micro_batch.number < 1:
            raise RecipeError(f"a micro-batch of {self.micro_batch}", where="micro_batch", next='write "16k tokens"')
        patience(self.stop_after)
        if not 0 <= self.average < 1:
            raise RecipeError(
                f"`average` is {self.average}", where="average", next="give a decay below 1, e.g. 0.999, or 0 for none"
            )
        if self.keep < 1:
            raise RecipeError(f"keep = {self.keep} would remove every step", where="keep", next="keep 1 or more")


@dataclass(frozen=True)
class ShowSettings:
    """What the panel shows: these prompts, or where there are none, the first lines of held-out text."""

    prompts: tuple[str, ...] = ()
    lines: int = 5
    characters: int = 160  # of a held-out text that serves as a prompt

    def __post_init__(self) -> None:
        for name, least in (("lines", 0), ("characters", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", where=name, next=f"give {least} or more")


@dataclass(frozen=True)
class StartSettings:
    """What a run's weights begin as: drawn, or those of a model; written by `unmask pretrain --from`."""

    needed: bool = False  # such a recipe makes no sense without a model
    model: str = ""  # the folder that it came from; "": drawn
    rows: int = 0  # of its token table, once the vocabulary is known


@dataclass(frozen=True)
class Recipe:
    """One complete run."""

    name: str = "custom"
    about: str = ""
    seed: int = 17
    text: TextSettings = field(default_factory=TextSettings)
    encoder: EncoderSettings = field(default_factory=ModernSettings)
    objective: MlmSettings | BertSettings | OutsideObjective = field(default_factory=MlmSettings)
    stage: tuple[StageSettings, ...] = (StageSettings(),)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    show: ShowSettings = field(default_factory=ShowSettings)
    start: StartSettings = field(default_factory=StartSettings)

    def __post_init__(self) -> None:
        check_stages(self.stage)
        longest = max(stage.length for stage in self.stage)
        if longest > self.encoder.longest:
            raise RecipeError(
                f"a stage of length {longest} in an encoder that holds {self.encoder.longest}",
                where="stage",
                next=f"shorten the stage or set encoder.longest={longest}",
            )

    @property
    def outside(self) -> Sequence[Outside]:
        """The kinds of a person's own that this recipe names, whose code it runs."""
        named = (self.objective, self.text.source, self.text.cutter)
        return [kind for kind in named if isinstance(kind, Outside)]


def load_recipe(
    name_or_path: str | Path = "tiny",
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    decided: Sequence[str] = (),
) -> Recipe:
    """A shipped recipe or a TOML file, changed by `key=value` texts and then by flags (dotted key -> value).

    `decided` are keys that a model decides which the run goes on from.

    Raises:
        RecipeError: unknown recipe, key or value; the file, the key and the nearest name are given. A key that is
            decided elsewhere.
    """
    tree = resolve_recipe(name_or_path)
    tree.pop(PLAN, None)
    for text in settings:
        tree = apply_set(tree, text)
    flags = {key: _flag(key, value) for key, value in (overrides or {}).items()}
    for key, value in (overrides or {}).items():
        is_toml = isinstance(value, bool | int | float | str | list | dict)
        tree = assign(tree, key, value if is_toml else str(value), flags[key])
    for key in decided:
        _refuse_named(tree, key, str(name_or_path))
    tree.setdefault("name", Path(name_or_path).stem)
    return build_config(Recipe, tree, str(name_or_path), settings, flags)


def _refuse_named(tree: Any, key: str, name: str) -> None:
    """Refuse a recipe that names what the model decides."""
    table = tree
    for part in key.split("."):
        if not isinstance(table, dict) or part not in table:
            return
        table = cast("dict[str, Any]", table)[part]
    raise RecipeError(
        f"the model that the run goes on from decides [{key}]",
        where=f"{name}: {key}",
        next="leave it out of the recipe (and of --set), take --recipe continue, or start without --from",
    )


def _flag(key: str, value: Any) -> str:
    """The option that stands for a key, as a person writes it: train.budget is `--budget`."""
    shown = str(value) if str(value) and not any(map(str.isspace, str(value))) else f'"{value}"'
    return f"--{key.rpartition('.')[2].replace('_', '-')} {shown}"


def write_recipe(run: Path, recipe: Recipe, plan: Plan) -> None:
    """RUN/recipe.toml: every value, and the plan, which is never made again from the clock."""
    tree = tomllib.loads(dump_config(recipe))
    tree[PLAN] = _plain(asdict(plan))
    files.write_text(run / RECIPE, tomli_w.dumps(tree))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast("dict[str, Any]", value).items()}
    return [_plain(entry) for entry in cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else value


def read_recipe(run: Path) -> tuple[Recipe, Plan]:
    """What a run was started with.

    Raises:
        RunError: the folder is no run.
        RecipeError: recipe.toml was changed into something that is no recipe.
    """
    path = run / RECIPE
    if not path.is_file():
        raise RunError(
            "this folder is no run: there is no recipe.toml", where=str(run), next="give the folder of a run"
        )
    tree = load_toml(path)
    plan = tree.pop(PLAN, None)
    if not isinstance(plan, dict):
        raise RunError("recipe.toml has no [plan]", where=str(path), next="restore it, or start a new run")
    whole = build_config(Plan, cast("dict[str, Any]", plan), f"{path} [plan]")
    return build_config(Recipe, tree, str(path)), whole


def change(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe of a run with what may change on resume.

    Raises:
        RunError: a key that may not change; those that may are listed.
    """
    tree = tomllib.loads(dump_config(recipe))
    for text in settings:
        key = text.partition("=")[0].strip()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE):
            raise RunError(
                f"`{key}` can't change when a run goes on",
                where=f"--set {text}",
                next=f"what may change: --budget, {', '.join(MAY_CHANGE)}; for the rest start a new run",
            )
        tree = apply_set(tree, text)
    return build_config(Recipe, tree, "the run's recipe", settings)
