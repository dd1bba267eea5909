"""Room card: what a run does beside its steps: log, validate, keep the best, save.

Comes in: a workshop, a plan, where the run stands. Goes out: log.jsonl and what repeats it, step folders and the best
model, a Summary; crash.txt where the fault is ours. Called by: pretrain.
"""

from __future__ import annotations

import contextlib
import shlex
import tomllib
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unmask.core.config import dump_config
from unmask.core.errors import Stopped, StoreError, UnmaskError
from unmask.evaluation.validation import Validation
from unmask.training.display import Display, Summary
from unmask.training.estimate import Forecast
from unmask.training.loggers import CRASH, LOG, JsonLines, Repeaters, plain, read_log
from unmask.training.loop import EARLY, Duty, Interrupted, Signals, Standing, train
from unmask.training.plan import Plan, always, due
from unmask.training.recipe import Recipe
from unmask.training.runs import flattened
from unmask.training.setup import Workshop


def work(
    run: Path,
    workshop: Workshop,
    plan: Plan,
    standing: Standing,
    forecast: Forecast,
    display: Display,
    signals: Signals,
) -> Summary:
    """Train with the duties of a run; then sum up."""
    recipe, every = workshop.recipe, workshop.recipe.train.every
    tokens_before, seconds_before, early = standing.tokens, standing.training_seconds, ""
    duty = _Duties(run, workshop, plan, display)
    duties = [
        Duty(always, display.step),
        Duty(due(every.log, plan), duty.log),
        Duty(due(every.validate, plan), duty.validate),
        Duty(due(every.save, plan), duty.save),
    ]
    display.begin(plan, standing, forecast.flops_per_token, forecast.flops_per_second)
    with _going_on_told(run), _crash_kept(run):
        duty.open()
        try:
            if recipe.start.model and not standing.step:
                duty.validate(standing)
            ended = train(duty.training, standing, duties, signals.wish, lambda now: has_enough(recipe, now))
            if ended and standing.step < plan.steps:
                if ended == EARLY:
                    early = enough_in_words(recipe)
                    duty.end_early(standing, early)
                else:
                    if duty.saved != standing.step:
                        duty.save(standing)
                    raise Stopped(ended, str(run), standing.step)
        finally:
            duty.close()
    summary = Summary(
        run=run,
        steps=standing.step,
        tokens=standing.tokens,
        seconds=standing.seconds,
        planned_seconds=plan.seconds,
        training_seconds=standing.training_seconds,
        tokens_per_second=(standing.tokens - tokens_before) / max(standing.training_seconds - seconds_before, 1e-9),
        validation=duty.last,
        best_step=standing.best["step"] if standing.best else None,
        best_loss=standing.best["loss"] if standing.best else None,
        early=early,
        before=_before(run) if recipe.start.model else None,
    )
    if workshop.world.first:
        display.done(summary)
    return summary


def _before(run: Path) -> Mapping[str, Any] | None:
    """The first validation of a run, of the model that it went on from."""
    first = next((line for line in read_log(run / LOG) if "validation" in line), None)
    return first["validation"] if first and first["step"] == 0 else None


def has_enough(recipe: Recipe, now: Standing) -> bool:
    """Whether the validation of this very step was the last that the run waits for."""
    patience = recipe.train.patience
    validated = now.validation is not None and now.validation["step"] == now.step
    return bool(patience) and validated and now.without_gain >= patience


def enough_in_words(recipe: Recipe) -> str:
    """Why it ends then."""
    patience = recipe.train.patience
    return f"{patience} validation{'s' if patience > 1 else ''} without gain"


class _Duties:
    """The duties of a run: log, validate, save."""

    def __init__(self, run: Path, workshop: Workshop, plan: Plan, display: Display) -> None:
        self.run, self.workshop, self.plan, self.display = run, workshop, plan, display
        self.training = workshop.training(plan)
        self.last: Validation | None = None
        self.saved: int | None = None
        self._sink: JsonLines | None = None
        self._repeaters = Repeaters(display.say)

    def open(self) -> None:
        """Open the log, and what repeats it."""
        if not self.workshop.world.first:
            return
        self._sink = JsonLines(self.run / LOG)
        recipe = self.workshop.recipe
        if recipe.train.sinks:
            written = dump_config(recipe)
            self._repeaters.open(
                recipe.train.sinks, self.run, list(read_log(self.run / LOG)), flattened(tomllib.loads(written)), written
            )

    def close(self) -> None:
        """Close them."""
        self._repeaters.close()
        if self._sink:
            self._sink.close()

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """One line of the log."""
        if self._sink:
            self._sink.write(step, line)
            self._repeaters.write(step, line)

    def log(self, now: Standing) -> None:
        """A training line."""
        line = _line(now)
        now.window = type(now.window)()
        if self._sink:
            self.write(now.step, line)
            self.display.logged(now.step, line)

    def validate(self, now: Standing) -> None:
        """Judge the model, and keep it where it is the best so far."""
        workshop, judged = self.workshop, self.training.judged
        found = self.last = workshop.validate(judged, self.plan.stage_at(now.step - 1))
        measured = plain(asdict(found))
        now.validation = {"step": now.step, **measured}
        gained = now.judge(found.loss)
        clock = {"seconds": round(now.seconds, 4), "training_seconds": round(now.training_seconds, 4)}
        self.write(now.step, {"tokens": now.tokens, **clock, "validation": measured})
        if workshop.world.first:
            self.display.validated(now.step, found, workshop.panel.ask(judged.encoder, judged.head, workshop.world))
            if gained and workshop.recipe.train.keep_best:
                workshop.save_best(self.run, self.training, now)

    def save(self, now: Standing) -> None:
        """A step folder."""
        if self._sink:
            self._sink.sync()  # a step on the disk has its log lines there too
            self.display.saved(self.workshop.save(self.run, self.training, now))
        self.saved = now.step
        self.workshop.world.barrier()

    def end_early(self, now: Standing, why: str) -> None:
        """Note why, and save."""
        clock = {"seconds": round(now.seconds, 4), "training_seconds": round(now.training_seconds, 4)}
        self.write(now.step, {"tokens": now.tokens, **clock, "ended_early": why, "best": now.best})
        if self.saved != now.step:
            self.save(now)


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
    line |= {name: window.mean(name) for name in sorted(window.counts) if name not in line}  # an objective's own
    return plain(line)  # a window in which nothing was asked has no loss, and JSON no NaN


@contextmanager
def _going_on_told(run: Path) -> Generator[None]:
    """A disk without room ends a run; say that nothing which was saved is lost, and how to go on."""
    try:
        yield
    except StoreError as error:
        raise StoreError(
            error.what,
            where=error.where,
            next="make room there, or give yourself the right to write; nothing that was saved is lost; then go on: "
            f"unmask pretrain --resume {shlex.quote(str(run))}",
        ) from error


@contextmanager
def _crash_kept(run: Path) -> Generator[None]:
    """Keep the traceback of a fault of ours in the run's crash.txt."""
    try:
        yield
    except (UnmaskError, Stopped, Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        path = run / CRASH
        with contextlib.suppress(OSError):  # a full disk must not hide the fault
            path.write_text(traceback.format_exc(), encoding="utf-8")
            error.crash_file = str(path)  # type: ignore[attr-defined]
        raise
