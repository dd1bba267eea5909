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
from unmask.core.plugins import PluginConfig, PluginObjectiveConfig
from unmask.core.quantities import Quantity
from unmask.data.settings import DataConfig
from unmask.models import EncoderConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.mlm import MaskedLMConfig
from unmask.objectives.sentence_pairs import BertPretrainingConfig
from unmask.training.loggers import LoggerKind
from unmask.training.optim import OptimizerConfig, ScheduleConfig
from unmask.training.plan import EveryConfig, Plan, StageConfig, check_budget, check_stages

RECIPE, PLAN = "recipe.toml", "plan"
MAY_CHANGE = ("train.early_stopping_patience", "train.loggers", "train.every", "train.keep_last", "preview")
"""What a resumed run may be given anew, beside its budget: nothing here changes a bit of what a step computes."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often, how finely."""

    budget: Quantity = Quantity(600, "seconds")
    every: EveryConfig = field(default_factory=EveryConfig)
    micro_batch_size: Quantity = Quantity(16_384, "tokens")  # a step's tokens are dealt in pieces of at most this
    device: Device = "auto"
    precision: Precision = "auto"
    threads: int | Literal["auto"] = "auto"
    keep_last: int = 2  # step folders
    keep_best: bool = True  # the model of the best validation, in best/
    early_stopping_patience: int = 0  # validations without gain after which a run ends; 0: never
    ema_decay: float = 0.0  # the decay of an average of the weights, per step, e.g. 0.999; 0: none
    loggers: tuple[LoggerKind, ...] = ()  # what repeats the log: "tensorboard", "trackio"

    def __post_init__(self) -> None:
        check_budget(self.budget, where="budget")
        if self.micro_batch_size.unit != "tokens":
            raise RecipeError(
                f"a micro-batch in {self.micro_batch_size.unit}", location="micro_batch_size", hint='write "16k tokens"'
            )
        if self.micro_batch_size.number < 1:
            raise RecipeError(
                f"a micro-batch of {self.micro_batch_size}", location="micro_batch_size", hint='write "16k tokens"'
            )
        if self.early_stopping_patience < 0:
            raise RecipeError(
                f"`early_stopping_patience` is {self.early_stopping_patience}",
                location="early_stopping_patience",
                hint="give a number of validations without gain, e.g. 3, or 0 for never",
            )
        if not 0 <= self.ema_decay < 1:
            raise RecipeError(
                f"`ema_decay` is {self.ema_decay}",
                location="ema_decay",
                hint="give a decay below 1, e.g. 0.999, or 0 for none",
            )
        if self.keep_last < 1:
            raise RecipeError(
                f"keep_last = {self.keep_last} would remove every step", location="keep_last", hint="keep 1 or more"
            )


@dataclass(frozen=True)
class PreviewConfig:
    """What the panel shows: these prompts, or where there are none, the first lines of held-out text."""

    prompts: tuple[str, ...] = ()
    num_samples: int = 5
    max_chars: int = 160  # of a held-out text that serves as a prompt

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 0), ("max_chars", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint=f"give {least} or more")


@dataclass(frozen=True)
class InitConfig:
    """What a run's weights begin as: drawn, or those of a model; written by `unmask pretrain --from`."""

    required: bool = False  # such a recipe makes no sense without a model
    model: str = ""  # the folder that it came from; "": drawn
    vocab_size: int = 0  # of its token table, once the vocabulary is known


@dataclass(frozen=True)
class Recipe:
    """One complete run."""

    name: str = "custom"
    about: str = ""
    seed: int = 17
    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=ModernBertConfig)
    objective: MaskedLMConfig | BertPretrainingConfig | PluginObjectiveConfig = field(default_factory=MaskedLMConfig)
    stage: tuple[StageConfig, ...] = (StageConfig(),)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        check_stages(self.stage)
        longest = max(stage.max_seq_len for stage in self.stage)
        if longest > self.model.max_position_embeddings:
            raise RecipeError(
                f"a stage of length {longest} in an encoder that holds {self.model.max_position_embeddings}",
                location="stage",
                hint=f"shorten the stage or set model.max_position_embeddings={longest}",
            )

    @property
    def outside(self) -> Sequence[PluginConfig]:
        """The kinds of a person's own that this recipe names, whose code it runs."""
        named = (self.objective, self.data.source, self.data.sampler)
        return [kind for kind in named if isinstance(kind, PluginConfig)]


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
        location=f"{name}: {key}",
        hint="leave it out of the recipe (and of --set), take --recipe continue, or start without --from",
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
            "this folder is no run: there is no recipe.toml", location=str(run), hint="give the folder of a run"
        )
    tree = load_toml(path)
    plan = tree.pop(PLAN, None)
    if not isinstance(plan, dict):
        raise RunError("recipe.toml has no [plan]", location=str(path), hint="restore it, or start a new run")
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
                location=f"--set {text}",
                hint=f"what may change: --budget, {', '.join(MAY_CHANGE)}; for the rest start a new run",
            )
        tree = apply_set(tree, text)
    return build_config(Recipe, tree, "the run's recipe", settings)
