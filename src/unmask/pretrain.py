"""Room card: a run from beginning to end.

Comes in: text, a recipe (name, file, changes), a budget; or a run to go on with. Goes out: RUN on disk (recipe.toml,
env.json, log.jsonl, latest, step folders) and the model in hand. Called by: people through `unmask.pretrain`, the
command line, demo.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask import store
from unmask.blueprint import Recipe, change, load_recipe, read_recipe, write_recipe
from unmask.bundle import LATEST, Model, load
from unmask.errors import RunError, Stopped, UnmaskError
from unmask.origin import ENVIRONMENT, bits, open_text, open_text_again, read_environment, write_environment
from unmask.recipe import Amount
from unmask.train import checkpoint
from unmask.train.loop import Duty, Standing, train
from unmask.train.plain import SilentDisplay
from unmask.train.plan import Plan, always, check_budget, due, make_plan, prolong
from unmask.train.show import Display, Forecast, Summary, Validation
from unmask.train.signals import Interrupted, Signals
from unmask.train.track import LOG, JsonLines, discard_after
from unmask.workshop import Workshop
from unmask.world import cores, differences, discover, load_warning

__all__ = ["Recipe", "Result", "launch", "load_recipe", "pretrain", "resume"]


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    run: Path | None  # None for a forecast alone
    model: Model | None
    forecast: Forecast | None
    summary: Summary | None
    finished_before: bool = False


def pretrain(
    texts: str | Path | Sequence[str | Path],
    *,
    recipe: str | Path = "tiny",
    budget: str | None = None,
    out: str | Path = "runs/model",
    seed: int | None = None,
    settings: Sequence[str] = (),
    display: Display | None = None,
) -> Model:
    """Pretrain an encoder and give it back; what `unmask pretrain` does, for programs and notebooks.

    Args:
        texts: paths of text files or folders; or the texts themselves, one document each: strings of which at least one
            can't be meant as a path, because it has lines, or spaces where no file has that name.
        recipe: a shipped recipe's name or a TOML file.
        budget: "300 s", "120 steps", "2M tokens" or "3 epochs"; the recipe's own where it isn't given.
        out: the folder of the run; it must not exist yet.
        seed: of all draws.
        settings: `key=value` texts, as for `--set`.
        display: what shows the run; by default nothing is printed.

    Raises:
        UnmaskError: whatever a person can mend, in words that say how.
    """
    given = [texts] if isinstance(texts, str | Path) else list(texts)
    overrides = {"seed": seed, "train.budget": budget}
    result = launch(
        given,
        recipe=recipe,
        out=out,
        settings=settings,
        display=display,
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
) -> Result:
    """Start a run. `overrides` are explicit flags (dotted key -> value): they beat `settings`, and those the recipe."""
    display = display or SilentDisplay()
    run = Path(out)
    if os.path.lexists(run) and not dry_run:
        raise RunError(
            "there is something at this path already",
            where=str(run),
            next=f"choose another --out, or go on with that run: unmask pretrain --resume {run}",
        )
    whole = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings, overrides)
    source = open_text(texts, whole.text)
    with _told(display), Signals() as signals:
        world = discover(whole.train.precision, whole.train.threads)
        if warning := load_warning(world):  # asked now, while the load is not yet our own
            display.say(warning)
        if world.first and not dry_run:
            store.check_writable(run)
        workshop = Workshop(whole, source, world, display)
        measured = workshop.probe()
        plan = make_plan(
            whole.stage, whole.train.budget, whole.train.every, [feed.epoch_tokens for feed in workshop.feeds], measured
        )
        forecast = workshop.forecast(plan)
        if world.first:
            display.forecast(forecast)
            display.text(*workshop.text_as_seen())
        if dry_run:
            return Result(None, None, forecast, None)
        signals.remember_from_now_on()  # before anything is written, so that what is written can go on
        if world.first:
            with store.saying_where(run):
                run.mkdir(parents=True)
            write_recipe(run, whole, plan)
            write_environment(run, workshop, texts, forecast.flops_per_second)
        world.barrier()
        standing = Standing()
        summary = _work(run, workshop, plan, standing, forecast, display, signals)
        return Result(run, workshop.model(workshop.learner, workshop.card(standing), str(run)), forecast, summary)


def resume(
    run: str | Path,
    *,
    budget: str | None = None,
    settings: Sequence[str] = (),
    display: Display | None = None,
    elsewhere: bool = False,
) -> Result:
    """Go on with a run where its last step folder stands, bit for bit as if it had never stopped.

    Args:
        run: the folder of the run.
        budget: a new total ("2000 steps") or what comes on top ("+1 epoch"); without it the run's own plan is finished.
        settings: `key=value` texts for what may change (`train.every`, `train.keep`, `show`).
        display: what shows the run.
        elsewhere: go on although the machine or the versions differ; the bits will differ too.

    Raises:
        RunError: the text, the machine or a setting is not what the run was started with; the difference is named.
    """
    display = display or SilentDisplay()
    folder = Path(run)
    recipe, plan = read_recipe(folder)
    recipe = change(recipe, settings)
    environment = read_environment(folder)
    more = None if budget is None else Amount.parse(budget, relative=True)
    if more is not None:
        check_budget(more, where=f"--budget {budget}")
    saved = checkpoint.standing(checkpoint.latest(folder)) if os.path.lexists(folder / LATEST) else None
    if saved and saved.step >= plan.steps and budget is None:
        display.say(f'{folder} is finished: {plan.steps} steps. Prolong it with --budget "+1 epoch".')
        display.close()
        return Result(folder, load(folder), None, None, finished_before=True)
    with _told(display), Signals() as signals:
        facts = environment["bits"]
        threads = min(int(facts["threads"]), cores())
        world = discover(recipe.train.precision, threads)
        changed = differences(bits(world), facts)
        if changed and not elsewhere:
            raise RunError(
                "this machine would not compute the same bits: " + "; ".join(changed),
                where=str(folder / ENVIRONMENT),
                next="resume where the run was started, or accept other bits with --elsewhere",
            )
        source = open_text_again(folder, environment, recipe.text)
        workshop = Workshop(recipe, source, world, display)
        if workshop.tokenizer.fingerprint != environment["text"]["tokenizer"]:
            raise RunError(
                "the tokenizer that this text gives is not the run's",
                where=str(folder),
                next="resume with the versions that env.json names, or start a new run",
            )
        if more is not None:
            plan = prolong(plan, more, every=recipe.train.every, epoch_tokens=workshop.feeds[-1].epoch_tokens)
        standing = checkpoint.load(folder, workshop.learner, workshop.optimiser) if saved else Standing()
        forecast = workshop.forecast(plan)
        signals.remember_from_now_on()  # before anything is written
        if world.first:
            moved = discard_after(folder, standing.step)
            if moved:
                display.say(f"{moved} log lines of steps that were not saved moved to discarded.jsonl")
            write_recipe(folder, recipe, plan)
            if changed:
                environment["resumed_elsewhere"] = [*environment.get("resumed_elsewhere", []), *changed]
                environment["bits"] = bits(world)
                store.write_json(folder / ENVIRONMENT, environment)
        display.say(f"going on at step {standing.step} of {plan.steps}")
        summary = _work(folder, workshop, plan, standing, forecast, display, signals)
        return Result(folder, workshop.model(workshop.learner, workshop.card(standing), str(folder)), forecast, summary)


def _work(
    run: Path,
    workshop: Workshop,
    plan: Plan,
    standing: Standing,
    forecast: Forecast,
    display: Display,
    signals: Signals,
) -> Summary:
    """Train with the duties of a run: log, validate, save; then sum up."""
    world, recipe = workshop.world, workshop.recipe
    every = recipe.train.every
    sink = JsonLines(run / LOG) if world.first else None
    last: list[Validation] = []
    saved: list[int] = []
    tokens_before, seconds_before = standing.tokens, standing.training_seconds

    def log(now: Standing) -> None:
        line = _line(now)
        now.window = type(now.window)()
        if sink:
            sink.write(now.step, line)
            display.logged(now.step, line)

    def validate(now: Standing) -> None:
        found = workshop.validate(workshop.learner, plan.stage_at(now.step - 1))
        last[:] = [found]
        now.validation = {"step": now.step, **json.loads(json.dumps(asdict(found)))}  # as it will be read back
        if sink:
            clock = {"seconds": round(now.seconds, 4), "training_seconds": round(now.training_seconds, 4)}
            sink.write(now.step, {"tokens": now.tokens, **clock, "validation": asdict(found)})
            display.validated(
                now.step, found, workshop.panel.ask(workshop.learner.encoder, workshop.learner.head, world)
            )

    def save(now: Standing) -> None:
        if world.first:
            if sink:
                sink.sync()  # a step on the disk has its log lines there too
            display.saved(workshop.save(run, workshop.learner, workshop.optimiser, now))
        saved[:] = [now.step]
        world.barrier()

    duties = [
        Duty(always, display.step),
        Duty(due(every.log, plan), log),
        Duty(due(every.validate, plan), validate),
        Duty(due(every.save, plan), save),
    ]
    display.begin(plan, standing, forecast.flops_per_token, forecast.flops_per_second)
    try:
        with _crash_kept(run):
            wish = train(workshop.training(plan), standing, duties, signals.wish)
            if wish and standing.step < plan.steps:
                if saved != [standing.step]:
                    save(standing)
                raise Stopped(wish, str(run), standing.step)
    finally:
        if sink:
            sink.close()
    summary = Summary(
        run=run,
        steps=standing.step,
        tokens=standing.tokens,
        seconds=standing.seconds,
        planned_seconds=plan.seconds,
        training_seconds=standing.training_seconds,
        tokens_per_second=(standing.tokens - tokens_before) / max(standing.training_seconds - seconds_before, 1e-9),
        validation=last[0] if last else None,
    )
    if world.first:
        display.done(summary)
    return summary


def _line(now: Standing) -> dict[str, Any]:
    """A training line of the log: means since the line before."""
    window = now.window
    line: dict[str, Any] = {
        "tokens": now.tokens,
        "seconds": round(now.seconds, 4),
        "loss": window.mean("loss"),
        "accuracy": window.mean("accuracy"),
        "tokens_per_second": window.tokens / window.seconds if window.seconds else 0.0,
        "learning_rate": now.rate,
        "gradient_norm": now.gradient_norm,
        "asked": window.counts.get("loss", 0),
        "rate": window.mean("rate"),  # realised: asked of what might have been
        "training_seconds": round(now.training_seconds, 4),
        "phase_seconds": {name: round(value, 4) for name, value in now.phase_seconds.items()},
    }
    # JSON has no NaN; a window in which nothing was asked has no loss.
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in line.items()}


@contextmanager
def _told(display: Display) -> Generator[None]:
    """Give the terminal back, whatever happens."""
    try:
        yield
    finally:
        display.close()


@contextmanager
def _crash_kept(run: Path) -> Generator[None]:
    """Keep the traceback of a fault of ours in the run's crash.txt."""
    try:
        yield
    except (UnmaskError, Stopped, Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        path = run / "crash.txt"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        error.crash_file = str(path)  # type: ignore[attr-defined]
        raise
