"""The recipe of a run: all its settings as one tree, loaded from TOML files and options, and saved in the run."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import tomli_w

from unmask.core import files
from unmask.core.config import (
    Override,
    apply_set,
    assign,
    build_config,
    dump_config,
    load_toml,
    require,
    resolve_recipe,
)
from unmask.core.distributed import JOIN_SECONDS, Device, Precision
from unmask.core.errors import DamagedError, RecipeError, RunError
from unmask.core.files import RunLayout
from unmask.core.plugins import PluginConfig, PluginLoggerConfig, PluginObjectiveConfig, only_marked
from unmask.core.quantities import Fraction, Quantity
from unmask.core.remote import UPLOADS, require_public, scheme_of
from unmask.data.settings import DataConfig
from unmask.models import EncoderConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.models.parallel import Parallel
from unmask.objectives import ObjectiveConfig
from unmask.objectives.mlm import MaskedLMConfig
from unmask.training.kept_models import check_keep_at
from unmask.training.loggers import LoggerKind
from unmask.training.loop import MAX_SKIPPED_STEPS
from unmask.training.optim import OptimizerConfig, ScheduleConfig
from unmask.training.plan import EveryConfig, Plan, StageConfig, check_budget, check_interval, check_stages

_PLAN = "plan"
_SEAL = "# digest of the lines below: "  # begins recipe.toml of a run
MAY_CHANGE = (
    "train.background_save",
    "train.early_stopping_patience",
    "train.loggers",
    "train.keep_at",
    "train.every",
    "train.keep_last",
    "train.report",
    "train.upload",
    "preview",
)
"""Settings that may change when a run resumes, besides the budget. None of them changes what a step computes."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Minimal pairs on which the model is evaluated during training: a learning curve of accuracy."""

    # File or directory of minimal pairs, as for `unmask evaluate --pairs`; "": none. The run keeps a copy.
    pairs: str = ""
    # [fraction of the plan, steps or seconds] Interval between evaluations.
    every: Fraction | Quantity = Fraction(0.1)
    subset: int = 50  # Number of pairs of each paradigm; 0: all.
    # Lines that are no pairs, or whose sentences are identical; strict: an error; skip: they are left out.
    errors: Literal["strict", "skip"] = "strict"

    def __post_init__(self) -> None:
        check_interval(self.every, "every")
        require(self, "subset", min=0)


@dataclass(frozen=True)
class TrainConfig:
    """Budget, intervals, hardware, and what is saved and logged."""

    budget: Quantity = Quantity(600, "seconds")  # [seconds, steps, tokens or epochs] Total amount of training.
    # Whether the size of the model, and with it vocabulary, batch sizes and sequence lengths, is chosen for a budget in
    # seconds, from a measured speed.
    choose_model_size: bool = False
    every: EveryConfig = field(default_factory=EveryConfig)  # Intervals of logs, validations and checkpoints.
    # Minimal pairs on which the model is evaluated during training (docs/scores.md).
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # [tokens] Maximum size of a micro-batch; a step has as many as it needs.
    micro_batch_size: Quantity = Quantity(16_384, "tokens")
    device: Device = "auto"  # Device; auto: a CUDA device if there is one, else the CPU. mps is untested.
    # Data type of matrix products; auto: bfloat16 on CUDA and on CPUs with such instructions, else float32.
    precision: Precision = "auto"
    # What several processes share (docs/tutorials/cluster.md); ddp: each has the whole model, and gradients are added;
    # fsdp: each has a part of all weights, gradients and optimizer states, for models that don't fit into one device.
    parallel: Parallel = "ddp"
    # [seconds] How long a process waits at the start for the other processes of its launch.
    join_timeout: Quantity = Quantity(JOIN_SECONDS, "seconds")
    # Whether the blocks of the encoder are compiled with torch.compile, for GPUs: it takes half a minute, and on a CPU
    # nothing is gained (docs/diary.md). A resumed run may differ in the last bits.
    compile: bool = False
    # Number of CPU threads; auto: all cores, divided among the processes of a machine.
    threads: int | Literal["auto"] = "auto"
    keep_last: int = 2  # Number of checkpoints that are kept.
    # Whether checkpoints are written in a thread while training goes on, from a copy of weights and optimizer state in
    # memory; the last one is not.
    background_save: bool = True
    keep_best: bool = True  # Whether the model with the lowest validation loss is kept in best/.
    # [words] Numbers of words seen, e.g. ["1M words", "2M words"]; the model of the first step that reaches one is kept
    # in chck_1M/, chck_2M/, … (docs/babylm.md). Words are those of the training text between spaces, counted again in
    # each epoch. The last step also reaches a number of which at most 2% are missing.
    keep_at: tuple[Quantity, ...] = ()
    # [validations] Number of validations without improvement before the run stops; 0: never.
    early_stopping_patience: int = 0
    # [steps] Number of steps in a row whose loss or gradient is not finite, after which the run goes back to an earlier
    # checkpoint with half of the learning rates (docs/runs.md). Such a step is skipped: it changes no weights.
    max_skipped_steps: int = MAX_SKIPPED_STEPS
    max_rollbacks: int = 3  # How often a run goes back to an earlier checkpoint before it ends with an error; 0: never.
    ema_decay: float = 0.0  # Decay per step of an exponential moving average of the weights, e.g. 0.999; 0: no average.
    loggers: tuple[LoggerKind | PluginLoggerConfig, ...] = ()  # Loggers besides log.jsonl.
    report: bool = True  # Whether the run's report.html is written when the run ends or is stopped (docs/report.md).
    # Address of a copy of the run in an object store, e.g. "s3://bucket/runs/notes", written while the run is trained
    # (docs/remote.md); "": none.
    upload: str = ""

    def __post_init__(self) -> None:
        check_budget(self.budget, where="budget")
        if self.micro_batch_size.unit != "tokens" or self.micro_batch_size.number < 1:
            raise RecipeError(
                f"invalid micro_batch_size: got {self.micro_batch_size}, expected a number of tokens",
                location="micro_batch_size",
                hint='write for example "16k tokens"',
            )
        if self.join_timeout.unit != "seconds" or self.join_timeout.number <= 0:
            raise RecipeError(
                f"invalid join_timeout: got {self.join_timeout}, expected a time",
                location="join_timeout",
                hint='write for example "10 min"',
            )
        if self.upload and scheme_of(self.upload) not in UPLOADS:
            raise RecipeError(
                f"invalid upload: got {self.upload!r}, expected the address of an object store",
                location="upload",
                hint=f"begin it with {' or '.join(f'{scheme}://' for scheme in UPLOADS)}",
            )
        require_public(self.upload, "upload")
        if re.search(r"[*?\[\]]", self.upload):
            raise RecipeError(
                f"invalid upload: got {self.upload!r}, expected an address and not a pattern",
                location="upload",
                hint="use an address without * ? [ ]",
            )
        check_keep_at(self.keep_at)
        require(self, "early_stopping_patience", min=0)
        require(self, "ema_decay", min=0, below=1, hint="set it to a decay below 1, e.g. 0.999, or to 0 for no average")
        require(self, "keep_last", "max_skipped_steps", min=1)
        require(self, "max_rollbacks", min=0)


@dataclass(frozen=True)
class PreviewConfig:
    """Prompts whose masked tokens are predicted at each validation; without prompts, the first held-out documents."""

    prompts: tuple[str, ...] = ()  # Texts with [MASK], as for `unmask fill`.
    num_samples: int = 5  # Number of held-out documents used as prompts if `prompts` is empty.
    max_chars: int = 160  # [characters] Maximum length of a held-out document used as a prompt.

    def __post_init__(self) -> None:
        require(self, "num_samples", min=0)
        require(self, "max_chars", min=1)


@dataclass(frozen=True)
class InitConfig:
    """Initial weights: random, or those of a model (`unmask pretrain --from`, which writes this section)."""

    required: bool = False  # Whether the recipe needs a model to start from.
    model: str = ""  # Directory or address of the model; "": random weights.
    vocab_size: int = 0  # [tokens] Size of the model's token embedding, which may exceed the tokenizer's vocabulary.


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    name: str = "custom"  # Name of the recipe; by default that of its file.
    about: str = ""  # Description in one sentence, for `unmask recipe list`.
    seed: int = 17  # Seed of initial weights, order of samples, masks and dropout.
    data: DataConfig = field(default_factory=DataConfig)  # How text is read, split, tokenized and sampled.
    model: EncoderConfig = field(default_factory=ModernBertConfig)  # Architecture of the encoder.
    # What the model learns to predict (docs/objectives.md).
    objective: ObjectiveConfig | PluginObjectiveConfig = field(default_factory=MaskedLMConfig)
    stage: tuple[StageConfig, ...] = (StageConfig(),)  # Stages of training, in order; the last one lasts until 100%.
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # Optimizer.
    lr_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # Schedule of the learning rates.
    # Budget, intervals, hardware, and what is saved and logged.
    train: TrainConfig = field(default_factory=TrainConfig)
    # Prompts whose masked tokens are predicted at each validation.
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    init: InitConfig = field(default_factory=InitConfig)  # Initial weights.

    def __post_init__(self) -> None:
        check_stages(self.stage)
        longest = max(stage.max_seq_len for stage in self.stage)
        if longest > self.model.max_position_embeddings:
            raise RecipeError(
                f"invalid max_seq_len: got {longest}, but the model has {self.model.max_position_embeddings} positions",
                location="stage",
                hint=f"decrease max_seq_len, or set model.max_position_embeddings={longest}",
            )

    @property
    def objectives(self) -> tuple[ObjectiveConfig | PluginObjectiveConfig, ...]:
        """The objective of each stage."""
        return tuple(stage.objective or self.objective for stage in self.stage)

    @property
    def plugins(self) -> Sequence[PluginConfig]:
        """The plugins that this recipe names, whose code a run executes."""
        stages = (stage.objective for stage in self.stage)
        candidates = (self.objective, *stages, self.data.source, self.data.sampler, *self.train.loggers)
        return [config for config in candidates if isinstance(config, PluginConfig)]


def load_recipe(
    name_or_path: str | Path = "tiny",
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    decided: Sequence[str] = (),
) -> Recipe:
    """Loads a recipe.

    Args:
        name_or_path: Name of a shipped recipe, or a TOML file.
        settings: Changes as `key=value`.
        overrides: Further changes, applied last: dotted key -> value, or an Override that names its option. A plain
            value counts as set by the option of the same name, for error messages.
        decided: Keys that the recipe must not set, because the model of --from determines them.

    Raises:
        RecipeError: a recipe, key or value is unknown or invalid, or a key of `decided` is set.
    """
    tree = resolve_recipe(name_or_path)
    tree.pop(_PLAN, None)
    for text in settings:
        tree = apply_set(tree, text)
    options: dict[str, str] = {}
    for key, value in (overrides or {}).items():
        override = value if isinstance(value, Override) else Override(value, _option(key, value))
        is_toml = isinstance(override.value, bool | int | float | str | list | dict)
        tree = assign(tree, key, override.value if is_toml else str(override.value), override.option)
        options[key] = override.option
    for key in decided:
        _check_not_set(tree, key, str(name_or_path))
    tree.setdefault("name", Path(name_or_path).stem)
    return build_config(Recipe, tree, str(name_or_path), settings, options)


def explicit_keys(
    name_or_path: str | Path, settings: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> frozenset[str]:
    """Returns the keys that the user set: in a recipe file of their own, by --set, or by an option."""
    keys = set(_leaves(resolve_recipe(name_or_path, own=True)))
    for text in settings:
        key, _, value = text.partition("=")
        with contextlib.suppress(ValueError, RecursionError):
            keys |= set(_leaves(tomllib.loads(f"value = {value.strip()}")["value"], key.strip()))
            continue
        keys.add(key.strip())
    for key, value in (overrides or {}).items():
        keys |= set(_leaves(value.value if isinstance(value, Override) else value, key))
    return frozenset(keys)


def _leaves(value: Any, key: str = "") -> Iterator[str]:
    """Yields the dotted keys of a tree."""
    if not isinstance(value, dict):
        yield key
        return
    for name, entry in cast("dict[str, Any]", value).items():
        yield from _leaves(entry, f"{key}.{name}" if key else name)


def _check_not_set(tree: Any, key: str, source: str) -> None:
    table = tree
    for part in key.split("."):
        if not isinstance(table, dict) or part not in table:
            return
        table = cast("dict[str, Any]", table)[part]
    raise RecipeError(
        f"[{key}] is determined by the model of --from and can't be set",
        location=f"{source}: {key}",
        hint="remove it from the recipe and from --set, use --recipe continue, or start without --from",
    )


def _option(key: str, value: Any) -> str:
    """Returns the command-line option that sets a key: `--budget "10 min"` for train.budget."""
    text = str(value) if str(value) and not any(map(str.isspace, str(value))) else f'"{value}"'
    return f"--{key.rpartition('.')[2].replace('_', '-')} {text}"


def write_recipe(run: Path, recipe: Recipe, plan: Plan) -> None:
    """Writes recipe.toml of a run: every setting, and the plan. A resumed run reads the plan instead of measuring."""
    tree = tomllib.loads(dump_config(recipe))
    tree[_PLAN] = _plain(asdict(plan))
    text = tomli_w.dumps(tree)
    files.write_text(run / RunLayout.RECIPE, f"{_SEAL}{files.digest(text)}\n{text}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in cast("dict[str, Any]", value).items()}
    return [_plain(entry) for entry in cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else value


def read_recipe(run: Path) -> tuple[Recipe, Plan]:
    """Reads recipe and plan of a run.

    Raises:
        RunError: the folder is not a run.
        RecipeError: recipe.toml is invalid, or names a plugin that needs permission (`core.plugins.only_marked`).
    """
    path = run / RunLayout.RECIPE
    if not path.is_file():
        raise RunError("not a run: recipe.toml is missing", location=str(run), hint="name the folder of a run")
    tree = load_toml(path)
    plan = tree.pop(_PLAN, None)
    if not isinstance(plan, dict):
        raise RunError("recipe.toml has no [plan]", location=str(path), hint="restore the file or start a new run")
    loaded_plan = build_config(Plan, cast("dict[str, Any]", plan), f"{path} [plan]")
    with only_marked(read_marks(run)):
        return build_config(Recipe, tree, str(path)), loaded_plan


def check_unchanged(run: Path) -> None:
    """Compares a run's recipe with the digest in its first line. Runs of earlier versions have none.

    Raises:
        DamagedError: it has changed since it was written.
    """
    path = run / RunLayout.RECIPE
    first, _, text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").partition("\n")
    if first.startswith(_SEAL) and first.removeprefix(_SEAL) != files.digest(text):
        raise DamagedError(
            "the settings of this run have changed since they were written",
            location=str(path),
            hint="undo the change; if it is intended, delete the first line",
        )


def read_marks(run: Path) -> Mapping[str, object]:
    """Returns the marks of a run's plugins and addresses; none if env.json can't be read."""
    with contextlib.suppress(DamagedError):
        environment: Any = files.read_json(run / RunLayout.ENVIRONMENT)
        marks: Any = cast("Mapping[str, Any]", environment).get("code") if isinstance(environment, dict) else None
        return cast("Mapping[str, object]", marks) if isinstance(marks, dict) else {}
    return {}


def change_recipe(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Returns the recipe of a run with changes as `key=value`.

    Raises:
        RunError: a setting may not change when a run resumes.
    """
    tree = tomllib.loads(dump_config(recipe))
    for text in settings:
        key = text.partition("=")[0].strip()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE):
            raise RunError(
                f"`{key}` can't change when a run resumes",
                location=f"--set {text}",
                hint=f"change only --budget, {', '.join(MAY_CHANGE)}, or start a new run",
            )
        tree = apply_set(tree, text)
    return build_config(Recipe, tree, "the run's recipe", settings)
