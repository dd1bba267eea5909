"""Room card: a run from beginning to end.

Comes in: text, a recipe (name, file, changes), a budget; or a run to go on with. Goes out: RUN on disk (recipe.toml,
env.json, log.jsonl, latest, best, step folders) and the model in hand. Called by: people through `unmask.pretrain`, the
command line, demo.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from unmask.core import files
from unmask.core.distributed import device_note, differences, init_distributed, load_warning
from unmask.core.errors import RecipeError, RunError, StoreError
from unmask.core.files import default_cache
from unmask.core.hardware import cores
from unmask.core.quantities import Quantity
from unmask.data.sources import open_text
from unmask.models.model import LATEST, Model, load, save_model
from unmask.objectives.word_boost import resolve_word_list
from unmask.training import checkpoint
from unmask.training.callbacks import enough_in_words, has_enough, work
from unmask.training.display import Display, Summary
from unmask.training.display.plain import SilentDisplay
from unmask.training.environment import (
    ENVIRONMENT,
    determinism_key,
    open_text_again,
    open_valid,
    open_valid_again,
    read_environment,
    write_environment,
)
from unmask.training.estimate import CostEstimate
from unmask.training.loggers import CRASH, check_installed, discard_after
from unmask.training.loop import Signals, TrainState
from unmask.training.plan import Plan, affordable, check_budget, make_plan, prolong
from unmask.training.recipe import Recipe, change, load_recipe, read_recipe, write_recipe
from unmask.training.runs import locked
from unmask.training.setup import Workshop
from unmask.training.warm_start import DECIDED, START, WarmStart, started_from, with_run_tokenizer


def for_stream(stream: TextIO, quiet: bool = False) -> Display:
    """The display that fits a stream: live in a terminal and in a notebook that has ipywidgets, else plain lines."""
    # rich costs 50 ms and these two know this module's dataclasses, so they are met only here.
    from rich.console import Console

    from unmask.training.display.live import LiveDisplay
    from unmask.training.display.plain import PlainDisplay, SilentDisplay

    if quiet:
        return SilentDisplay()
    console = Console(file=stream)
    in_terminal = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
    in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return LiveDisplay(console) if in_terminal or in_notebook else PlainDisplay(stream)


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    run: Path | None  # None for a forecast alone
    model: Model | None
    forecast: CostEstimate | None
    summary: Summary | None
    finished_before: bool = False


def pretrain(
    texts: str | Path | Sequence[str | Path],
    *,
    recipe: str | Path = "",
    budget: str | None = None,
    out: str | Path = "runs/model",
    seed: int | None = None,
    settings: Sequence[str] = (),
    start: str | Path | WarmStart | None = None,
    display: Display | None = None,
) -> Model:
    """Pretrain an encoder and give it back; what `unmask pretrain` does, for programs and notebooks.

    Args:
        texts: paths of text files or folders; or the texts themselves, one document each: strings of which at least one
            can't be meant as a path, because it has lines, or spaces where no file has that name.
        recipe: a shipped recipe's name or a TOML file; without one "tiny", or "continue" where there is a start.
        budget: "300 s", "120 steps", "2M tokens" or "3 epochs"; the recipe's own where it isn't given.
        out: the folder of the run; it must not exist yet.
        seed: of all draws.
        settings: `key=value` texts, as for `--set`.
        start: the folder of a model to go on from, or a Start, which may add pieces to its vocabulary.
        display: what shows the run; by default nothing is printed.

    Raises:
        UnmaskError: whatever a person can mend, in words that say how.
    """
    begun = WarmStart.open(start) if isinstance(start, str | Path) else start
    given = [texts] if isinstance(texts, str | Path) else list(texts)
    overrides = {"seed": seed, "train.budget": budget}
    result = launch(
        given,
        recipe=recipe or ("continue" if begun else "tiny"),
        out=out,
        settings=settings,
        display=display,
        start=begun,
        overrides={key: value for key, value in overrides.items() if value is not None},
    )
    assert result.model is not None
    return result.model


def launch(
    texts: Sequence[str | Path],
    *,
    recipe: str | Path | Recipe = "tiny",
    out: str | Path,
    settings: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    display: Display | None = None,
    dry_run: bool = False,
    start: WarmStart | None = None,
) -> Result:
    """Start a run. `overrides` are explicit flags (dotted key -> value): they beat `settings`, and those the recipe.

    With `start` it begins with the weights of a model, which decides encoder and tokenizer.
    """
    display = display or SilentDisplay()
    run = Path(out)
    if os.path.lexists(run) and not dry_run:
        raise RunError(
            "there is something at this path already",
            location=str(run),
            hint=f"choose another --out, or go on with that run: unmask pretrain --resume {run}",
        )
    decided = DECIDED if start else ()
    whole = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings, overrides, decided)
    notes = list[str]()
    if start:
        whole, notes = start.apply_to(whole, default_cache())
    elif whole.init.required:
        raise RecipeError(
            f"the recipe `{whole.name}` goes on from a model, and none is named",
            hint="name it: --from MODEL; or take another recipe: unmask recipe list",
        )
    # A run goes on from wherever it is resumed, whatever became of a list of words.
    whole = replace(whole, data=whole.data.absolute(), objective=resolve_word_list(whole.objective))
    source, valid = open_text(texts, whole.data), open_valid(whole.data)
    check_installed(whole.train.loggers)
    with _told(display), Signals() as signals:
        world = init_distributed(whole.train.precision, whole.train.threads, whole.train.device)
        for note in filter(None, (*notes, load_warning(world), device_note(world))):  # the load is not yet our own
            display.message(note)
        if world.is_main_process and not dry_run:
            files.check_writable(run)
        workshop = Workshop(whole, source, world, display, valid, start)
        whole = workshop.recipe
        measured = workshop.probe()
        every, note = affordable(whole.train.every, whole.train.budget, measured)
        if note:
            display.message(note)
            whole = workshop.recipe = replace(whole, train=replace(whole.train, every=every))
        plan = make_plan(
            whole.stage, whole.train.budget, every, [feed.epoch_tokens for feed in workshop.feeds], measured
        )
        forecast = workshop.forecast(plan)
        if world.is_main_process:
            display.forecast(forecast)
            display.text(*workshop.text_as_seen())
        if dry_run:
            return Result(None, None, forecast, None)
        signals.remember_from_now_on()  # before anything is written, so that what is written can go on
        if world.is_main_process:
            with files.wrap_os_errors(run):
                run.mkdir(parents=True)
        with _alone(run, display):
            if world.is_main_process:
                try:
                    write_recipe(run, whole, plan)
                    if start:  # so that the run can begin again, and be compared, when the model is gone
                        save_model(run / START, start.model)
                    write_environment(run, workshop, texts, forecast.flops_per_second)
                except StoreError:  # nothing in it could go on, and it would stand in the way of another try
                    shutil.rmtree(run, ignore_errors=True)
                    raise
            world.barrier()
            state = TrainState()
            summary = work(run, workshop, plan, state, forecast, display, signals)
            return Result(run, _model(run, workshop, state), forecast, summary)


def resume(
    run: str | Path,
    *,
    budget: str | None = None,
    settings: Sequence[str] = (),
    display: Display | None = None,
    allow_different_environment: bool = False,
) -> Result:
    """Go on with a run where its last step folder stands, bit for bit as if it had never stopped.

    Args:
        run: the folder of the run.
        budget: a new total ("2000 steps") or what comes on top ("+1 epoch"); without it the run's own plan is finished.
        settings: `key=value` texts for what may change: `train.every`, `train.keep_last`, `train.early_stopping_patience`, `train.loggers`
            and `preview`.
        display: what shows the run.
        elsewhere: go on although the machine or the versions differ; the bits will differ too.

    Raises:
        RunError: the text, the machine or a setting is not what the run was started with; the difference is named.
    """
    display = display or SilentDisplay()
    folder = Path(run)
    recipe, plan = read_recipe(folder)
    more = None if budget is None else Quantity.parse(budget, relative=True)
    if more is not None:
        check_budget(more, where=f"--budget {budget}")
    elif told := _why_finished(folder, change(recipe, settings), plan):
        display.message(f"{folder} {told}")
        display.close()
        return Result(folder, load(folder), None, None, finished_before=True)
    with _told(display), Signals() as signals, _alone(folder, display):
        return _go_on(folder, more, settings, display, signals, allow_different_environment=allow_different_environment)


def _go_on(
    folder: Path,
    more: Quantity | None,
    settings: Sequence[str],
    display: Display,
    signals: Signals,
    *,
    allow_different_environment: bool,
) -> Result:
    """Resume a run that nobody else works on."""
    recipe, plan = read_recipe(folder)
    recipe = with_run_tokenizer(folder, change(recipe, settings))
    check_installed(recipe.train.loggers)
    environment = read_environment(folder)
    facts = environment["determinism"]
    threads = min(int(facts["threads"]), cores())
    world = init_distributed(recipe.train.precision, threads, recipe.train.device)
    changed = differences(determinism_key(world, recipe), facts)
    if changed and not allow_different_environment:
        raise RunError(
            "this machine would not compute the same bits: " + "; ".join(changed),
            location=str(folder / ENVIRONMENT),
            hint="resume where the run was started, or accept other bits with --allow-different-environment",
        )
    source = open_text_again(folder, environment, recipe.data)
    valid = open_valid_again(environment, recipe.data)
    is_new = not os.path.lexists(folder / LATEST)
    workshop = Workshop(recipe, source, world, display, valid, started_from(folder, recipe) if is_new else None)
    if workshop.tokenizer.fingerprint != environment["text"]["tokenizer"]:
        raise RunError(
            "the tokenizer that this text gives is not the run's",
            location=str(folder),
            hint="resume with the versions that env.json names, or start a new run",
        )
    if more is not None:
        plan = prolong(plan, more, every=recipe.train.every, epoch_tokens=workshop.feeds[-1].epoch_tokens)
    state = TrainState()
    if not is_new:
        state = checkpoint.load(folder, workshop.training(plan))
    forecast = workshop.forecast(plan)
    signals.remember_from_now_on()  # before anything is written
    if world.is_main_process:
        moved = discard_after(folder, state.step)
        if moved:
            display.message(f"{moved} log lines of steps that were not saved moved to discarded.jsonl")
        write_recipe(folder, recipe, plan)
        if changed:
            environment["resumed_in_different_environment"] = [
                *environment.get("resumed_in_different_environment", []),
                *changed,
            ]
            environment["determinism"] = determinism_key(world, recipe)
            files.write_json(folder / ENVIRONMENT, environment)
        with contextlib.suppress(FileNotFoundError):  # it tells of a fault that this run is past
            os.replace(folder / CRASH, folder / f"earlier-{CRASH}")
    display.message(f"going on at step {state.step} of {plan.steps}")
    summary = work(folder, workshop, plan, state, forecast, display, signals)
    return Result(folder, _model(folder, workshop, state), forecast, summary)


def _why_finished(run: Path, recipe: Recipe, plan: Plan) -> str:
    """Why there is nothing to go on with, and what can be done; empty where there is."""
    if not os.path.lexists(run / LATEST):
        return ""
    state = checkpoint.standing(checkpoint.latest(run))
    if state.step >= plan.steps:
        return f'is finished: {plan.steps} steps. Prolong it with --budget "+1 epoch".'
    if has_enough(recipe, state):
        early = f"ended early at step {state.step} of {plan.steps}: {enough_in_words(recipe)}"
        return f"{early}. Go on all the same with --set train.early_stopping_patience=0."
    return ""


def _model(run: Path, workshop: Workshop, state: TrainState) -> Model:
    """What `unmask.load` opens: the best by validation, not always the last; beyond the first rank, the last."""
    last_is_best = state.best is None or state.best["step"] == state.step
    if workshop.recipe.train.keep_best and not last_is_best and workshop.world.is_main_process:
        return load(run)
    learner = workshop.ema.learner if workshop.ema else workshop.learner
    return workshop.model(learner, workshop.card(state), str(run))


@contextmanager
def _told(display: Display) -> Generator[None]:
    """Give the terminal back, whatever happens."""
    try:
        yield
    finally:
        display.close()


@contextmanager
def _alone(run: Path, display: Display) -> Generator[None]:
    """Keep other processes off this run; of several ranks the first does it for all."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with locked(run, display.message):
        yield
