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
from unmask.training.estimate import CostEstimate
from unmask.training.loggers import CRASH, LOG, JsonlLogger, MetricLoggers, plain, read_log
from unmask.training.loop import EARLY, Callback, Interrupted, Signals, TrainState, train
from unmask.training.plan import Plan, always, due
from unmask.training.recipe import Recipe
from unmask.training.runs import flattened
from unmask.training.setup import Workshop


def work(
    run: Path,
    workshop: Workshop,
    plan: Plan,
    state: TrainState,
    forecast: CostEstimate,
    display: Display,
    signals: Signals,
) -> Summary:
    """Train with the duties of a run; then sum up."""
    recipe, every = workshop.recipe, workshop.recipe.train.every
    tokens_before, seconds_before, early = state.tokens, state.training_seconds, ""
    duty = RunCallbacks(run, workshop, plan, display)
    duties = [
        Callback(always, display.step),
        Callback(due(every.log, plan), duty.log),
        Callback(due(every.validate, plan), duty.validate),
        Callback(due(every.save, plan), duty.save),
    ]
    display.train_start(plan, state, forecast.flops_per_token, forecast.flops_per_second)
    with _going_on_told(run), _crash_kept(run):
        duty.open()
        try:
            if recipe.init.model and not state.step:
                duty.validate(state)
            ended = train(duty.training, state, duties, signals.wish, lambda now: has_enough(recipe, now))
            if ended and state.step < plan.steps:
                if ended == EARLY:
                    early = enough_in_words(recipe)
                    duty.end_early(state, early)
                else:
                    if duty.saved != state.step:
                        duty.save(state)
                    raise Stopped(ended, str(run), state.step)
        finally:
            duty.close()
    summary = Summary(
        run=run,
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        planned_seconds=plan.seconds,
        training_seconds=state.training_seconds,
        tokens_per_second=(state.tokens - tokens_before) / max(state.training_seconds - seconds_before, 1e-9),
        validation=duty.last,
        best_step=state.best["step"] if state.best else None,
        best_loss=state.best["loss"] if state.best else None,
        early=early,
        before=_before(run) if recipe.init.model else None,
    )
    if workshop.world.is_main_process:
        display.train_end(summary)
    return summary


def _before(run: Path) -> Mapping[str, Any] | None:
    """The first validation of a run, of the model that it went on from."""
    first = next((line for line in read_log(run / LOG) if "validation" in line), None)
    return first["validation"] if first and first["step"] == 0 else None


def has_enough(recipe: Recipe, now: TrainState) -> bool:
    """Whether the validation of this very step was the last that the run waits for."""
    patience = recipe.train.early_stopping_patience
    validated = now.validation is not None and now.validation["step"] == now.step
    return bool(patience) and validated and now.without_gain >= patience


def enough_in_words(recipe: Recipe) -> str:
    """Why it ends then."""
    patience = recipe.train.early_stopping_patience
    return f"{patience} validation{'s' if patience > 1 else ''} without gain"


class RunCallbacks:
    """The duties of a run: log, validate, save."""

    def __init__(self, run: Path, workshop: Workshop, plan: Plan, display: Display) -> None:
        self.run, self.workshop, self.plan, self.display = run, workshop, plan, display
        self.training = workshop.training(plan)
        self.last: Validation | None = None
        self.saved: int | None = None
        self._sink: JsonlLogger | None = None
        self._repeaters = MetricLoggers(display.message)

    def open(self) -> None:
        """Open the log, and what repeats it."""
        if not self.workshop.world.is_main_process:
            return
        self._sink = JsonlLogger(self.run / LOG)
        recipe = self.workshop.recipe
        if recipe.train.loggers:
            written = dump_config(recipe)
            self._repeaters.open(
                recipe.train.loggers,
                self.run,
                list(read_log(self.run / LOG)),
                flattened(tomllib.loads(written)),
                written,
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

    def log(self, now: TrainState) -> None:
        """A training line."""
        line = _line(now)
        now.window = type(now.window)()
        if self._sink:
            self.write(now.step, line)
            self.display.logged(now.step, line)

    def validate(self, now: TrainState) -> None:
        """Judge the model, and keep it where it is the best so far."""
        workshop, judged = self.workshop, self.training.judged
        found = self.last = workshop.validate(judged, self.plan.stage_at(now.step - 1))
        measured = plain(asdict(found))
        now.validation = {"step": now.step, **measured}
        gained = now.record_validation(found.loss)
        clock = {"seconds": round(now.seconds, 4), "training_seconds": round(now.training_seconds, 4)}
        self.write(now.step, {"tokens": now.tokens, **clock, "validation": measured})
        if workshop.world.is_main_process:
            self.display.validated(now.step, found, workshop.panel.ask(judged.encoder, judged.head, workshop.world))
            if gained and workshop.recipe.train.keep_best:
                workshop.save_best(self.run, self.training, now)

    def save(self, now: TrainState) -> None:
        """A step folder."""
        if self._sink:
            self._sink.sync()  # a step on the disk has its log lines there too
            self.display.saved(self.workshop.save(self.run, self.training, now))
        self.saved = now.step
        self.workshop.world.barrier()

    def end_early(self, now: TrainState, why: str) -> None:
        """Note why, and save."""
        clock = {"seconds": round(now.seconds, 4), "training_seconds": round(now.training_seconds, 4)}
        self.write(now.step, {"tokens": now.tokens, **clock, "ended_early": why, "best": now.best})
        if self.saved != now.step:
            self.save(now)


def _line(now: TrainState) -> dict[str, Any]:
    """A training line of the log: means since the line before."""
    window = now.window
    line: dict[str, Any] = {
        "tokens": now.tokens,
        "seconds": round(now.seconds, 4),
        "loss": window.mean("loss"),
        "accuracy": window.mean("accuracy"),
        "tokens_per_second": window.tokens / window.seconds if window.seconds else 0.0,
        "learning_rate": now.lr,
        "grad_norm": now.grad_norm,
        "masked_tokens": window.counts.get("loss", 0),
        "mask_rate": window.mean("mask_rate"),  # realised: asked of what might have been
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
            error.message,
            location=error.location,
            hint="make room there, or give yourself the right to write; nothing that was saved is lost; then go on: "
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
