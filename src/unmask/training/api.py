"""Python functions that train, and `Run`: what the commands `unmask pretrain` and `unmask runs` do, for code."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast, overload

from unmask.core.config import Override, dump_config
from unmask.core.errors import RecipeError, RunError
from unmask.core.files import RunLayout
from unmask.core.format import duration
from unmask.core.keywords import python_words, setting_texts
from unmask.core.quantities import Quantity
from unmask.data.inputs import Texts, list_texts
from unmask.data.settings import DocumentRule, ErrorsRule
from unmask.models.model import Model, load
from unmask.training import pretrain as training
from unmask.training.display import Display
from unmask.training.display.live import display_for
from unmask.training.environment import read_environment
from unmask.training.loggers import read_log
from unmask.training.plan import Plan
from unmask.training.pretrain import LaunchOptions, Result, launch, with_start_and_paths
from unmask.training.recipe import Recipe, load_recipe, read_recipe
from unmask.training.runs import RunSummary, State, flatten, is_unfinished_start, read_run, require_run_format
from unmask.training.warm_start import DECIDED, WarmStart

Settings = Mapping[str, Any] | Sequence[str]
Shown = Display | Literal["auto"] | None


class PretrainOptions(TypedDict, total=False):
    """Keywords of `pretrain`: the options of the command `unmask pretrain`, with None where an option is not given."""

    recipe: str | Path | Recipe | None
    budget: str | None
    out: str | Path | None
    exist_ok: Literal["resume", "new"] | None
    seed: int | None
    settings: Settings | None
    start: str | Path | WarmStart | None
    extend_vocabulary: int | None
    threads: int | None
    errors: ErrorsRule | None
    document: DocumentRule | None
    field: str | None
    valid: Mapping[str, str | Path] | None
    allow_unknown: bool
    verify: bool
    display: Shown


_KEYS = {
    "budget": "train.budget", "seed": "seed", "threads": "train.threads", "errors": "data.errors",
    "document": "data.document", "field": "data.field",
}  # fmt: skip


# Functions ------------------------------------------------------------------------------------------------------------


@overload
def pretrain(texts: Texts, *, dry_run: Literal[False] = False, **options: Unpack[PretrainOptions]) -> Model: ...


@overload
def pretrain(texts: Texts, *, dry_run: Literal[True], **options: Unpack[PretrainOptions]) -> None: ...


def pretrain(texts: Texts, *, dry_run: bool = False, **options: Unpack[PretrainOptions]) -> Model | None:
    """Pretrain an encoder and return its best model; the keywords are the options of `unmask pretrain`.

    Args:
        texts: Paths of text files or directories, or the texts themselves, one document each. Strings are texts if at
            least one of them can't be a path: it has line breaks, or spaces and no file has that name.
        dry_run: Estimate the cost, write nothing, and raise no error for an existing `out`; returns None.
        **options: Keywords, all optional.
            recipe: name of a shipped recipe, path of a TOML file, or a Recipe; default "tiny"; with a budget in
            seconds "auto", which chooses model and batches; with `start` "continue".
            budget: "300 s", "120 steps", "2M tokens" or "3 epochs"; default: the budget of the recipe.
            out: directory of the run; default: runs/RECIPE-N with an unused number.
            exist_ok: what to do if `out` exists: "resume" continues the same run and returns a finished one, "new"
            takes a new directory beside it; by default an error is raised.
            seed: random seed.
            settings: settings of the recipe as a dictionary, with dotted keys or nested, or as `key=value` strings.
            start: model to start from: a folder, or the address of a model or run in an object store.
            extend_vocabulary: number of tokens to learn from the text and add to the vocabulary of `start`.
            threads: number of CPU threads.
            errors: "strict", "replace" or "skip": handling of undecodable bytes and malformed rows.
            document: "blank-line", "line" or "file": unit of plain text that is one document.
            field: name of the field or column that contains the text.
            valid: further texts to validate on, by name.
            allow_unknown: train even if the tokenizer can't spell much of the text.
            verify: compare all bytes of the text and of the token cache.
            display: "auto" shows the progress in a terminal, a notebook or a pipe; None shows nothing.

    Raises:
        UnmaskError: the text, a setting, the disk or a file is not usable; the message has a hint.
        Stopped: Ctrl-C stopped the run after a checkpoint was saved.
    """
    return run_pretraining(texts, dry_run=dry_run, **options).model


def resume(
    run: str | Path,
    *,
    budget: str | None = None,
    settings: Settings | None = None,
    texts: Texts | None = None,
    valid: Mapping[str, str | Path] | None = None,
    allow_different_environment: bool = False,
    verify: bool = False,
    display: Shown = "auto",
) -> Model:
    """Resume a run that was stopped or killed, or extend a finished one, and return its best model.

    Args:
        run: Directory of the run.
        budget: A new total ("2 epochs") or an addition ("+1 epoch").
        settings: Changes of `train.every`, `train.keep_last`, `train.keep_at`, `train.early_stopping_patience`,
            `train.loggers`, `train.report` and `preview`; nothing else may change.
        texts: New paths of a text that was moved; its content must be equal.
        valid: New paths of validation texts that were moved, by name.
        allow_different_environment: Resume although machine or versions differ; the results will differ too.
        verify: Read all bytes of the text and of the token cache, instead of comparing sizes and times.
        display: As for `pretrain`.

    Raises:
        RunError: text, machine or a setting differs from the start of the run; the difference is named.
        Stopped: Ctrl-C stopped the run after a checkpoint was saved.
    """
    result = training.resume(
        run,
        budget=budget,
        settings=setting_texts(settings),
        display=_shown(display),
        allow_different_environment=allow_different_environment,
        verify=verify,
        texts=() if texts is None else list_texts(texts),
        valid=valid,
    )
    return cast("Model", result.model)


def run_pretraining(texts: Texts, *, dry_run: bool = False, **options: Unpack[PretrainOptions]) -> Result:
    """Start a run, as `pretrain` does, and return its result."""
    start = _warm_start(options.get("start"), options.get("extend_vocabulary"))
    recipe = options.get("recipe") or _default_recipe(start, options.get("budget"))
    overrides = {key: options.get(name) for name, key in _KEYS.items()}
    if valid := options.get("valid"):
        overrides["data.valid"] = Override({name: str(path) for name, path in valid.items()}, "--valid")
    if options.get("allow_unknown"):
        overrides["data.max_unknown"] = Override("100%", "--allow-unknown")
    overrides = {key: value for key, value in overrides.items() if value is not None}
    settings = setting_texts(options.get("settings"))
    if isinstance(recipe, Recipe) and (settings or overrides):
        raise RecipeError(
            "a Recipe has all settings: further ones can't be combined with it",
            location=", ".join([*settings, *overrides]),
            hint="change it with dataclasses.replace, or name a recipe: recipe=NAME",
        )
    named = list_texts(texts, options.get("field") or "text")
    display = _shown(options.get("display", "auto"))
    verify = options.get("verify", False)
    out = Path(options.get("out") or _unused_folder(recipe))
    exist_ok, is_left = options.get("exist_ok"), False
    if training.is_restarted() and os.path.lexists(out):  # torchrun repeats the command after a rank was killed
        is_left = is_unfinished_start(out)
        exist_ok = None if is_left else "resume"
    if exist_ok is not None and os.path.lexists(out) and not dry_run:
        if exist_ok == "resume":
            if not isinstance(recipe, Recipe):
                recipe = load_recipe(recipe, settings, overrides, DECIDED if start else ())
            _check_same_request(out, with_start_and_paths(recipe, start))
            return training.resume(out, texts=named, valid=options.get("valid"), display=display, verify=verify)
        existing, out = out, _next_folder(out)
        display.message(f"{existing} exists: the new run is written to {out}")
    return launch(
        named,
        recipe=recipe,
        out=out,
        settings=settings,
        overrides=overrides,
        display=display,
        start=start,
        options=LaunchOptions(dry_run=dry_run, verify=verify, replace=is_left),
    )


def _default_recipe(start: WarmStart | None, budget: str | None) -> str:
    """Returns the recipe of a run that names none: for a time, one that fits the model to it."""
    if start:
        return "continue"
    with contextlib.suppress(RecipeError):  # an invalid budget is reported when the recipe is loaded
        if budget and Quantity.parse(budget).unit == "seconds":
            return "auto"
    return "tiny"


def _warm_start(start: str | Path | WarmStart | None, extend_vocabulary: int | None) -> WarmStart | None:
    if start is None and extend_vocabulary:
        raise RecipeError(
            "--extend-vocabulary needs --from: it adds tokens to the vocabulary of a model",
            hint="name the model: --from MODEL; without one, set data.tokenizer.vocab_size",
        )
    return WarmStart.open(start, extend_vocabulary or 0) if isinstance(start, str | Path) else start


def _shown(display: Shown) -> Display:
    if display == "auto":
        return display_for(sys.stdout, os.environ.get("RANK", "0") != "0", python_words)
    return display or Display()


# Folders --------------------------------------------------------------------------------------------------------------


def _unused_folder(recipe: str | Path | Recipe) -> Path:
    """Return runs/NAME-N with the smallest number N that isn't in use."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("several processes need one folder", hint="name it: --out RUN")
    name = recipe.name if isinstance(recipe, Recipe) else Path(recipe).stem
    return next(path for number in itertools.count(1) if not (path := Path("runs") / f"{name}-{number}").exists())


def _next_folder(out: Path) -> Path:
    """Return the first of out-2, out-3, … that doesn't exist."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("several processes need one folder", hint="name a new one: --out RUN")
    names = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
    return next(path for path in names if not os.path.lexists(path))


def _check_same_request(run: Path, recipe: Recipe) -> None:
    """Check that a run was started with these settings.

    Raises:
        RunError: it is no run, or a setting differs; the first one is named.
    """
    require_run_format(run)
    read_recipe(run)
    requested = read_environment(run).get("requested")
    if not isinstance(requested, dict):
        message = "the settings that the run was started with are unknown, so it can't be compared"
        raise RunError(message, location=str(run), hint=f"resume it: unmask pretrain --resume {run}")
    before = flatten(cast("dict[str, Any]", requested))
    now = flatten(tomllib.loads(dump_config(recipe)))
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) != now.get(key):
            values = [repr(values[key]) if key in values else "nothing" for values in (before, now)]
            raise RunError(
                f"the run in this folder was started with other settings: `{key}` is {values[0]} there and "
                f"{values[1]} here",
                location=str(run),
                hint="restore that setting, or start a new run: --exist-ok new",
            )


# Runs -----------------------------------------------------------------------------------------------------------------


class Run:
    """A run on disk: finished, stopped or running. Every access to an attribute reads its files again."""

    def __init__(self, path: str | Path) -> None:
        """Find a run.

        Raises:
            RunError: the folder is not a run, or an earlier version wrote it.
        """
        self.path = Path(path)
        require_run_format(self.path)
        read_recipe(self.path)

    @property
    def recipe(self) -> Recipe:
        """The recipe, with every setting."""
        return read_recipe(self.path)[0]

    @property
    def plan(self) -> Plan:
        """The plan in steps that the budget was converted to."""
        return read_recipe(self.path)[1]

    @property
    def summary(self) -> RunSummary:
        """State and results, as `unmask runs` shows them."""
        return read_run(self.path)

    @property
    def status(self) -> State:
        """State: "running", "finished", "ended early", "stopped", "crashed", "killed" or "damaged"."""
        return self.summary.state

    @property
    def step(self) -> int:
        """Number of the last step in the log."""
        return self.summary.step or 0

    @property
    def steps(self) -> int:
        """Number of planned steps."""
        return self.plan.steps

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the log, one dictionary each: of training, and of validation."""
        return list(read_log(self.path / RunLayout.LOG))

    def model(self, which: Literal["best", "last"] = "best") -> Model:
        """Load the best model by validation, or the last one.

        Raises:
            ModelError: the run has not saved a step yet.
            RecipeError: `which` is neither "best" nor "last".
        """
        if which not in ("best", "last"):
            raise RecipeError(
                f"invalid which: got {which!r}, expected 'best' or 'last'", hint='ask for "best" or "last"'
            )
        return load(self.path / RunLayout.LATEST if which == "last" else self.path)

    def __repr__(self) -> str:
        """Return path, state, steps and best loss in one line."""
        summary = self.summary
        facts = [summary.state, f"step {summary.step or 0:,} of {summary.steps or 0:,}"]
        if summary.best_loss is not None:
            facts.append(f"best validation loss {summary.best_loss:.3f} at step {summary.best_step:,}")
        if summary.seconds is not None:
            facts.append(duration(summary.seconds))
        return f"Run({str(self.path)!r}: {', '.join([f'recipe {summary.recipe}', *facts])})"
