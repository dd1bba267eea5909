"""The callbacks of a run: log, validate, keep the best model, save checkpoints, stop early."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.core.config import dump_config
from unmask.core.distributed import lost_ranks_explained
from unmask.core.errors import CRASH_NOTE, Interrupted, Stopped, StoreError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.remote.upload import RunUpload
from unmask.evaluation.minimal_pairs import MinimalPair, evaluate_minimal_pairs
from unmask.evaluation.validation import Validation, validates
from unmask.models.model import Model, ModelCard
from unmask.training import checkpoint
from unmask.training.display import Display, Preview, Summary, build_preview
from unmask.training.estimate import CostEstimate
from unmask.training.estimate.memory import MemoryLimit
from unmask.training.kept_models import KeptModels, count_train_words
from unmask.training.loggers import JsonlLogger, MetricLoggers, plain, read_log
from unmask.training.loop import (
    Callback,
    IsDue,
    LogCallback,
    MetricAccumulator,
    Signals,
    StopReason,
    TrainModule,
    TrainState,
    train,
)
from unmask.training.plan import Plan, always, describe_deviation, due, tenth
from unmask.training.recipe import Recipe
from unmask.training.setup import RunComponents, as_model, validate

_log = logging.getLogger("unmask")


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to train: its directory, its final recipe and plan, and the components built from them."""

    folder: Path
    recipe: Recipe
    plan: Plan
    components: RunComponents
    estimate: CostEstimate
    pairs: tuple[MinimalPair, ...] = ()  # on which the model is evaluated during training


def run_training(run: PreparedRun, state: TrainState, display: Display, signals: Signals) -> Summary:
    """Trains a run to its end, with all callbacks.

    Raises:
        Stopped: a signal stopped the run; a checkpoint was saved.
        StoreError: the disk is full or can't be written; earlier checkpoints are intact. Or the run is finished, and
            a part of it could not be uploaded.
    """
    recipe, plan, every = run.recipe, run.plan, run.recipe.train.every
    tokens_before, seconds_before, early = state.tokens, state.training_seconds, ""
    callbacks = RunCallbacks(run, display, _kept_models(run, state, display))
    first_tenth, memory = tenth(plan), MemoryLimit(run.estimate.memory_bytes, run.components.context)
    display.train_start(plan, state, run.estimate.flops_per_token, run.estimate.flops_per_second)
    with _resume_hint(run.folder), _crash_file(run.folder), lost_ranks_explained():
        callbacks.open()
        try:
            if recipe.init.model and not state.step:
                callbacks.validate(state)
                callbacks.evaluate_pairs(state)
            reason = train(
                run.components.training,
                plan,
                state,
                [
                    Callback(always, display.step, reads_results=False),
                    Callback(always, memory.check, reads_results=False),
                    Callback(lambda step, seconds: step == first_tenth, callbacks.compare_with_plan),
                    Callback(due(every.validate, plan), callbacks.validate),
                    Callback(due(recipe.train.evaluate.every, plan), callbacks.evaluate_pairs),
                    *([Callback(always, callbacks.keep, reads_results=False)] if recipe.train.keep_at else []),
                    Callback(due(every.save, plan), callbacks.save),
                ],
                log=LogCallback(_log_is_due(run), callbacks.log),
                stop_requested=signals.stop_requested,
                has_enough=lambda state: should_stop_early(recipe, state),
            )
            if state.step < plan.steps:
                if reason is StopReason.EARLY:
                    early = describe_early_stop(recipe)
                    callbacks.end_early(state, early)
                else:
                    callbacks.save_once(state)
                    raise Stopped(reason.exit_code, str(run.folder), state.step)
        finally:
            callbacks.close()
    summary = Summary(
        run=run.folder,
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        planned_seconds=plan.seconds,
        training_seconds=state.training_seconds,
        tokens_per_second=(state.tokens - tokens_before) / max(state.training_seconds - seconds_before, 1e-9),
        validation=callbacks.last_validation,
        best_step=state.best["step"] if state.best else None,
        best_loss=state.best["loss"] if state.best else None,
        early=early,
        before=_first_validation(run.folder) if recipe.init.model else None,
    )
    if run.components.context.is_main_process:
        display.train_end(summary)
        callbacks.check_uploaded()
    return summary


def _log_is_due(run: PreparedRun) -> IsDue:
    """Returns when a log line is due: at its interval, and after the last step of an objective.

    Without the latter, a line would average the losses of two objectives.
    """
    plan, objectives = run.plan, run.components.training.objectives
    at_interval = due(run.recipe.train.every.log, plan)
    changes = {
        stage.first_step
        for stage, before, after in zip(plan.stages[1:], objectives, objectives[1:], strict=False)
        if before is not after
    }
    return lambda step, seconds: step in changes or at_interval(step, seconds)


def _kept_models(run: PreparedRun, state: TrainState, display: Display) -> KeptModels:
    """Counts the words of the training text if the run needs their number; on the main process, which writes it."""
    components, keep_at, words = run.components, run.recipe.train.keep_at, 0
    counts = bool(keep_at or run.pairs) and components.context.is_main_process
    if counts:
        words = count_train_words(components.corpus, components.source, display.progress)
    epoch_tokens = [loader.epoch_tokens for loader in components.loaders]
    kept = KeptModels(keep_at, run.plan, epoch_tokens, words, state.tokens)
    if counts:
        _log.info(kept.describe())
    return kept


def _first_validation(run: Path) -> Mapping[str, Any] | None:
    """Returns the validation before the first step: the result of the model that the run started from."""
    first = next((line for line in read_log(run / RunLayout.LOG) if "validation" in line), None)
    return first["validation"] if first and first["step"] == 0 else None


def should_stop_early(recipe: Recipe, state: TrainState) -> bool:
    """Returns whether this step's validation used up the patience for validations without gain."""
    patience = recipe.train.early_stopping_patience
    is_validated = state.validation is not None and state.validation["step"] == state.step
    return bool(patience) and is_validated and state.without_gain >= patience


def describe_early_stop(recipe: Recipe) -> str:
    """Returns the reason for early stopping, e.g. "3 validations without gain"."""
    patience = recipe.train.early_stopping_patience
    return f"{patience} validation{'s' if patience > 1 else ''} without gain"


class RunCallbacks:
    """The callbacks of a run: log, validate, keep models, save."""

    def __init__(self, run: PreparedRun, display: Display, kept: KeptModels) -> None:
        self._run, self._display, self._kept = run, display, kept
        self._components, self._training = run.components, run.components.training
        self._context = run.components.context
        self._log: JsonlLogger | None = None
        self._loggers = MetricLoggers()
        self._saved_step: int | None = None
        self._upload: RunUpload | None = None
        self.last_validation: Validation | None = None

    @cached_property
    def _preview(self) -> Preview:
        return build_preview(self._run.recipe, self._components)

    def open(self) -> None:
        """Opens log.jsonl and the other loggers and starts the upload; on the main process only."""
        if not self._context.is_main_process:
            return
        log, recipe = self._run.folder / RunLayout.LOG, self._run.recipe
        self._log = JsonlLogger(log)
        if recipe.train.loggers:
            self._loggers.open(recipe.train.loggers, self._run.folder, list(read_log(log)), dump_config(recipe))
        if recipe.train.upload:
            self._upload = RunUpload(self._run.folder, recipe.train.upload, recipe.train.keep_last)
            self._upload.start()

    def close(self) -> None:
        """Closes all loggers and completes the upload."""
        self._loggers.close()
        if self._log:
            self._log.close()
        if self._upload:
            self._upload.close()

    def check_uploaded(self) -> None:
        """Checks that the whole run was uploaded, if it is uploaded at all.

        Raises:
            StoreError: a file was not; the error says how to upload it.
        """
        if self._upload and self._upload.error:
            raise self._upload.error

    def log(self, state: TrainState, metrics: MetricAccumulator) -> None:
        """Logs the metrics of the steps since the last training line."""
        if self._log:
            line = _training_line(state, metrics)
            self._write(state.step, line)
            self._display.logged(state.step, line)

    def compare_with_plan(self, state: TrainState) -> None:
        """Warns if the time of the steps so far shows that a plan made of seconds is wrong."""
        if self._run.recipe.train.budget.unit == "seconds":
            run = shlex.quote(str(self._run.folder))
            if message := describe_deviation(self._run.plan, state.step, state.training_seconds, run):
                _log.warning(message)

    def validate(self, state: TrainState) -> None:
        """Validates the model and saves it if it is the best so far."""
        with self._training.eval_module() as module:
            self._validate(state, module)

    def _validate(self, state: TrainState, module: TrainModule) -> None:
        stage = self._stage(state.step)
        result = self.last_validation = validate(self._components, module, stage)
        measured = plain(asdict(result))
        state.validation = {"step": state.step, **measured}
        objectives = self._training.objectives
        if state.best and objectives[self._stage(state.best["step"])] is not objectives[stage]:
            state.best = None  # another objective's model may predict nothing that this one is trained for
        improved = state.record_validation(result.loss)
        if objectives[stage] is not objectives[-1]:
            state.without_gain = 0  # the run must not stop before the objective that the loss is about
        line: dict[str, Any] = {"tokens": state.tokens, **_clock(state), "validation": measured}
        if self._context.is_main_process:
            own = validates(objectives[stage]) == "own"
            predictions = [] if own else self._preview.predict(module.encoder, module.head, self._context)
            if predictions:
                line["preview"] = [[asdict(span) for span in spans] for spans in predictions]
            self._write(state.step, line)
            self._display.validated(state.step, result, predictions)
            if improved and self._run.recipe.train.keep_best:
                checkpoint.save_best(self._run.folder, self._as_model(state, module), module.parts)

    def keep(self, state: TrainState) -> None:
        """Keeps the model if this step has reached a number of words of `train.keep_at`."""
        is_main = self._context.is_main_process  # which knows the number of words
        reached = self._kept.reached(state.tokens, is_last=state.step == self._run.plan.steps) if is_main else []
        if not self._context.largest(len(reached)):
            return
        with self._training.eval_module(main_only=True) as module:
            for name in reached:
                model = self._as_model(state, module)
                card: ModelCard = {**model.card, "words_seen": round(self._kept.words_seen(state.tokens))}
                path = checkpoint.save_kept(self._run.folder, name, replace(model, card=card), module.parts)
                self._display.saved(path)

    def evaluate_pairs(self, state: TrainState) -> None:
        """Evaluates the model on the run's minimal pairs, if any; logs the accuracies, and words and tokens seen."""
        if not self._run.pairs:
            return
        with self._training.eval_module() as module:
            result = evaluate_minimal_pairs(self._as_model(state, module), self._run.pairs, context=self._context)
        words = round(self._kept.words_seen(state.tokens))
        line = {"tokens": state.tokens, "words": words, **_clock(state), "pairs": result.summary()}
        self._write(state.step, plain(line))
        if self._context.is_main_process:
            accuracies = ", ".join(
                f"{each.overall.accuracy:.1%} ({each.overall.ties} ties, {name})"
                for name, each in result.methods.items()
            )
            _log.info(f"step {state.step:,}: {accuracies} of {result.pairs:,} minimal pairs; {words:,} words seen")

    def save(self, state: TrainState) -> None:
        """Saves a checkpoint; all ranks wait until it is written."""
        if self._log:
            self._log.sync()  # the log lines of a saved step must be on the disk too
        keep = self._run.recipe.train.keep_last
        with self._training.eval_module(main_only=True) as module:
            model = self._as_model(state, module)
            path = checkpoint.save(self._run.folder, model, module.parts, self._training, state, keep)
        if self._context.is_main_process:
            self._display.saved(path)
        if self._upload:
            self._upload.notify()
        self._saved_step = state.step
        self._context.barrier()

    def _as_model(self, state: TrainState, module: TrainModule) -> Model:
        return as_model(self._run.recipe, self._components, module, state, stage=self._stage(state.step))

    def _stage(self, step: int) -> int:
        """Returns the number of the stage that the last of `step` steps belongs to."""
        return self._run.plan.stage_at(max(step - 1, 0))

    def save_once(self, state: TrainState) -> None:
        """Saves a checkpoint unless this step was saved already."""
        if self._saved_step != state.step:
            self.save(state)

    def end_early(self, state: TrainState, reason: str) -> None:
        """Logs the reason for early stopping and saves a checkpoint."""
        self._write(state.step, {"tokens": state.tokens, **_clock(state), "ended_early": reason, "best": state.best})
        self.save_once(state)

    def _write(self, step: int, line: Mapping[str, Any]) -> None:
        if self._log:
            self._log.write(step, line)
            self._loggers.write(step, line)


def _clock(state: TrainState) -> dict[str, float]:
    return {"seconds": round(state.seconds, 4), "training_seconds": round(state.training_seconds, 4)}


def _training_line(state: TrainState, metrics: MetricAccumulator) -> dict[str, Any]:
    """Returns a training line of the log: means over the steps since the line before."""
    line: dict[str, Any] = {
        "tokens": state.tokens,
        "seconds": round(state.seconds, 4),
        "loss": metrics.mean("loss"),
        "accuracy": metrics.mean("accuracy"),
        "tokens_per_second": metrics.tokens / metrics.seconds if metrics.seconds else 0.0,
        "learning_rate": state.lr,
        "grad_norm": state.grad_norm,
        "masked_tokens": metrics.counts.get("loss", 0),
        "samples": f"{metrics.samples:08x}",  # the same samples in another order, or on other ranks, give the same
        "mask_rate": metrics.mean("mask_rate"),  # masked tokens / maskable tokens
        "data_wait_fraction": round(metrics.data_wait_seconds / metrics.seconds, 4) if metrics.seconds else 0.0,
        "training_seconds": round(state.training_seconds, 4),
        "phase_seconds": {name: round(value, 4) for name, value in state.phase_seconds.items()},
    }
    line |= {name: metrics.mean(name) for name in sorted(metrics.counts) if name not in line}  # from the objective
    return plain(line)  # without a masked token the loss is NaN, which JSON lacks


@contextmanager
def _resume_hint(run: Path) -> Generator[None]:
    """Adds to an error of a full or read-only disk how to resume the run."""
    try:
        yield
    except StoreError as error:
        has_steps = os.path.lexists(run / RunLayout.LATEST)
        kept = "saved checkpoints are intact" if has_steps else "from step 0, because no checkpoint was saved"
        raise error.at(
            hint=f"free disk space or fix the permissions, then resume ({kept}): "
            f"unmask pretrain --resume {shlex.quote(str(run))}"
        ) from error


@contextmanager
def _crash_file(run: Path) -> Generator[None]:
    """Writes the traceback of an internal error to the run's crash.txt."""
    try:
        yield
    except (UnmaskError, Stopped, Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        path = run / RunLayout.CRASH
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            path.write_text(traceback.format_exc(), encoding="utf-8")
            error.add_note(f"{CRASH_NOTE}{path}")
        raise
