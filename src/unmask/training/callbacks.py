"""The callbacks of a run: log, validate, keep the best model, save checkpoints, stop early."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from unmask.core import files
from unmask.core.config import dump_config
from unmask.core.distributed import compare_ranks, lost_ranks_explained
from unmask.core.errors import CRASH_NOTE, DamagedError, Interrupted, Stopped, StoreError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.remote.upload import RunUpload
from unmask.evaluation.minimal_pairs import MinimalPair, evaluate_minimal_pairs
from unmask.evaluation.validation import Validation, validates
from unmask.models.model import Model, ModelCard
from unmask.training import checkpoint
from unmask.training.checkpoint.background import CheckpointWriter
from unmask.training.checkpoint.shards import OtherRankError, error_code, raise_together
from unmask.training.display import Display, Preview, Summary, build_preview
from unmask.training.estimate import CostEstimate
from unmask.training.estimate.memory import MemoryLimit
from unmask.training.guards import ROLLBACK_LR_FACTOR, DiskWatch, LossSpikes, is_disk_full
from unmask.training.kept_models import KeptModels, count_train_words
from unmask.training.loggers import JsonlLogger, MetricLoggers, discard_after, plain, read_log
from unmask.training.loop import (
    Callback,
    Diverged,
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
        StoreError: the disk can't be written, or was still full at the end; earlier checkpoints are intact. Or the run
            is finished, and a part of it could not be uploaded.
        Diverged: loss or gradient was not finite, also after going back to earlier checkpoints.
    """
    recipe, plan = run.recipe, run.plan
    tokens_before, seconds_before, early = state.tokens, state.training_seconds, ""
    callbacks = RunCallbacks(run, display, _kept_models(run, state, display))
    display.train_start(plan, state, run.estimate.flops_per_token, run.estimate.flops_per_second)
    with _resume_hint(run.folder), _crash_file(run.folder), lost_ranks_explained():
        callbacks.open(state)
        waits, ended = True, cast("Stopped | Diverged | None", None)
        try:
            if recipe.init.model and not state.step:
                callbacks.validate(state)
                callbacks.evaluate_pairs(state)
            reason = _train(run, state, callbacks, display, signals)
            if state.step < plan.steps:
                if reason is StopReason.EARLY:
                    early = describe_early_stop(recipe)
                    callbacks.end_early(state, early)
                else:
                    callbacks.save_once(state, keeps_one_more=True)
                    ended = Stopped(reason.exit_code, str(run.folder), state.step)
        except Diverged as error:  # of all ranks
            ended = error
        except KeyboardInterrupt:  # a second Ctrl-C stops at once
            waits = False
            raise
        finally:
            callbacks.close(waits=waits)
        # Rank 0 uploads the rest of the run, which may take hours. If another rank ended now, torchrun would soon kill
        # rank 0, and a collective operation waits for COLLECTIVE_SECONDS at most.
        compare_ranks(run.components.context, {})
        run.components.context.barrier()  # rank 0 may have the store, so it ends when all others have read the result
        if ended:
            raise ended
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
        skipped_steps=state.skipped_steps,
        rollbacks=state.rollbacks,
        before=_first_validation(run.folder) if recipe.init.model else None,
    )
    if run.components.context.is_main_process:
        display.train_end(summary)
        callbacks.check_uploaded()
    return summary


def _train(
    run: PreparedRun, state: TrainState, callbacks: RunCallbacks, display: Display, signals: Signals
) -> StopReason:
    """Trains, and after too many skipped steps in a row goes back to an earlier checkpoint and trains on from there.

    Raises:
        Diverged: there is no earlier checkpoint, or `train.max_rollbacks` are used up.
    """
    recipe, plan, every = run.recipe, run.plan, run.recipe.train.every
    first_tenth, memory = tenth(plan), MemoryLimit(run.estimate.memory_bytes, run.components.context)
    begin = time.perf_counter() - state.seconds
    while True:
        try:
            return train(
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
                    Callback(always, lambda state: callbacks.check_saved(), reads_results=False),
                    Callback(callbacks.save_is_due, callbacks.save),
                ],
                log=LogCallback(_log_is_due(run), callbacks.log),
                stop_requested=signals.stop_requested,
                has_enough=lambda state: should_stop_early(recipe, state),
            )
        except Diverged as error:
            state.seconds = time.perf_counter() - begin
            callbacks.go_back(state, error)
            state.seconds = time.perf_counter() - begin
            display.train_start(plan, state, run.estimate.flops_per_token, run.estimate.flops_per_second)


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
        self._unwritten: list[tuple[int, Mapping[str, Any]]] = []  # log lines for which the disk has no space
        self._spikes = LossSpikes(run.plan)
        self._disk = DiskWatch(run.folder, run.estimate.checkpoint_bytes)
        self._saved_step: int | None = None
        self._is_save_overdue = False
        self._is_at_interval = due(run.recipe.train.every.save, run.plan)
        self._writer, self._writing_step, self._has_save_failed = CheckpointWriter(), 0, False
        self._upload: RunUpload | None = None
        self.last_validation: Validation | None = None

    @cached_property
    def _preview(self) -> Preview:
        return build_preview(self._run.recipe, self._components)

    def open(self, state: TrainState) -> None:
        """Opens log.jsonl and the other loggers and starts the upload; on the main process only."""
        if state.skipping_since is not None:  # a resumed run saves after the same step as one that was not stopped
            skipped = range(state.skipping_since, state.step + 1)
            self._is_save_overdue = any(self._is_at_interval(step, 0.0) for step in skipped)
        if not self._context.is_main_process:
            return
        self._open_loggers()
        recipe = self._run.recipe
        if recipe.train.upload:
            self._upload = RunUpload(self._run.folder, recipe.train.upload, recipe.train.keep_last)
            self._upload.start()

    def _open_loggers(self) -> None:
        log, recipe = self._run.folder / RunLayout.LOG, self._run.recipe
        self._log, lines = JsonlLogger(log), list(read_log(log))
        self._spikes = LossSpikes(self._run.plan)
        for line in lines:  # so that a resumed run finds the same spikes
            self._spikes.add(line)
        if recipe.train.loggers:
            self._loggers.open(recipe.train.loggers, self._run.folder, lines, dump_config(recipe))

    def close(self, *, waits: bool = True) -> None:
        """Closes all loggers; waits for the checkpoint that is being written and completes the upload.

        Each is closed, also if another one fails. Without `waits`, and after a second Ctrl-C meanwhile, checkpoint and
        upload stay incomplete.
        """
        with contextlib.ExitStack() as stack:  # the last one is closed first
            if waits:
                stack.push(self._complete_upload)
            if self._log:
                stack.callback(self._log.close)
            stack.callback(self._loggers.close)
            stack.callback(self._writer.close, waits=waits)

    def _complete_upload(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._upload and not (kind and issubclass(kind, KeyboardInterrupt)):
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
        if not self._log:
            return
        line = _training_line(state, metrics)
        if rise := self._spikes.add({"step": state.step, **line}):
            line["loss_spike"] = rise
            _log.warning(f"step {state.step:,}: the loss is {rise:.2f} nats above the median of the lines before")
        if metrics.skipped:
            steps = f"{metrics.skipped} step{'s' if metrics.skipped > 1 else ''}"
            _log.warning(f"step {state.step:,}: skipped {steps} since the last line: loss or gradient not finite")
        self._write(state.step, line)
        self._display.logged(state.step, line)
        if warning := self._disk.warning():
            _log.warning(warning)

    def compare_with_plan(self, state: TrainState) -> None:
        """Warns if the time of the steps so far shows that a plan made of seconds is wrong."""
        # After a return, the time has that of discarded steps.
        if self._run.recipe.train.budget.unit == "seconds" and not state.rollbacks:
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
        measured, earlier = plain(asdict(result)), state.validation
        state.validation = {"step": state.step, **measured}
        objectives = self._training.objectives
        if earlier and objectives[self._stage(earlier["step"])] is not objectives[stage]:
            state.lowest_loss = None
        if state.best and objectives[self._stage(state.best["step"])] is not objectives[stage]:
            state.best = None  # another objective's model may predict nothing that this one is trained for
        before = state.best, state.lowest_loss
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
            with self._may_fail(state.step, "the best model") as failure:
                if self._context.is_main_process:
                    checkpoint.save_best(self._run.folder, self._as_model(state, module), module.parts)
            if self._context.largest(len(failure)):
                state.best, state.lowest_loss = before  # which best/ still has

    def keep(self, state: TrainState) -> None:
        """Keeps the model if this step has reached a number of words of `train.keep_at`; not if the disk is full.

        It is not tried again: the model of a later step has seen more words.

        Raises:
            StoreError: the disk can't be written.
        """
        is_main = self._context.is_main_process  # which knows the number of words
        reached = self._kept.reached(state.tokens, is_last=state.step == self._run.plan.steps) if is_main else []
        if not self._context.largest(len(reached)):
            return
        with self._training.eval_module(main_only=True) as module:
            for name in reached:
                model = self._as_model(state, module)
                card: ModelCard = {**model.card, "words_seen": round(self._kept.words_seen(state.tokens))}
                try:
                    path = checkpoint.save_kept(self._run.folder, name, replace(model, card=card), module.parts)
                except StoreError as error:
                    if not is_disk_full(error):
                        raise
                    _log.warning(
                        f"step {state.step:,}: the model {name} is not kept ({error.message}); training goes on "
                        "without it: free disk space for the next ones"
                    )
                else:
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

    def save_is_due(self, step: int, seconds: float) -> bool:
        """Returns whether a checkpoint is due: at its interval, or later if one was put off."""
        return self._is_save_overdue or self._is_at_interval(step, seconds)

    def save(self, state: TrainState) -> None:
        """Saves a checkpoint at its interval, in the background unless it is the last one.

        While steps are skipped, it is put off, because it would replace one that the run may have to go back to. If the
        disk is full, the run goes on without it.

        Raises:
            StoreError: the disk can't be written, or is full after the last step.
        """
        is_last = state.step == self._run.plan.steps
        self._is_save_overdue = state.skipping_since is not None and not is_last
        if self._is_save_overdue:
            return
        if self._context.is_main_process and (warning := self._disk.warning()):
            _log.warning(warning)
        self.check_saved(wait=True)
        with self._may_fail(state.step, "the checkpoint") as failure:
            self._save(state, in_background=self._run.recipe.train.background_save and not is_last)
        if not self._context.largest(len(failure)):  # all ranks wait
            self._saved_step = state.step

    def _save(self, state: TrainState, *, in_background: bool = False, keeps_one_more: bool = False) -> None:
        """Writes a checkpoint, or begins to write it in the background. `keeps_one_more` adds to `train.keep_last`."""
        self._sync_log()
        keep, step = self._run.recipe.train.keep_last + keeps_one_more, state.step
        is_skipping = state.skipping_since is not None  # the run may have to go back to any of the earlier ones

        def outdated(run: Path) -> list[Path]:
            return [] if is_skipping else checkpoint.outdated_checkpoints(run, step, keep, self._is_at_interval)

        self._writing_step, self._has_save_failed = state.step, False
        write = checkpoint.prepare(
            self._run.folder,
            lambda module: self._as_model(state, module),
            self._training,
            state,
            outdated,
            copies=in_background,
        )
        if in_background:
            self._writer.start(write)
        else:
            self._report_saved(write())

    def _sync_log(self) -> None:
        """Writes the log lines of rank 0 to the disk: those of a saved step must be there too. All ranks call it.

        Raises:
            StoreError: on every rank: the disk is full or can't be written.
        """
        error: StoreError | None = None
        try:
            self._write_waiting_lines(is_last_try=True)
            if self._log:
                self._log.sync()
        except StoreError as caught:
            error = caught
        code = self._context.largest(error_code(error))
        raise_together(error, [code], RunLayout.LOG, str(self._run.folder / RunLayout.LOG))

    def check_saved(self, *, wait: bool = False) -> None:
        """Reports a checkpoint that was written in the background, or that the disk is full.

        Raises:
            StoreError: the disk can't be written.
        """
        with self._may_fail(self._writing_step, "the checkpoint") as failure:
            path = self._writer.finished(wait=wait)
            if path is not None:
                self._report_saved(path)
        self._has_save_failed |= bool(failure)

    def _report_saved(self, path: Path) -> None:
        if self._context.is_main_process:
            self._disk.measure(path)
            self._display.saved(path)
        if self._upload:
            self._upload.notify()

    @contextmanager
    def _may_fail(self, step: int, what: str) -> Generator[list[StoreError]]:
        """Yields a list that gets the error if the disk is full: the run goes on, and the next save is tried again.

        After the last step, the error is raised. All ranks of a sharded run have an error if one has.
        """
        failure: list[StoreError] = []
        try:
            yield failure
        except StoreError as error:
            if step == self._run.plan.steps or not is_disk_full(error):
                raise
            failure.append(error)
            last = files.last_step(self._run.folder)
            kept = "" if last is None else f"; the last checkpoint is that of step {last:,}"
            _log.warning(
                f"step {step:,}: {what} is not saved ({error.message}){kept}; training goes on, and saves at the "
                "next interval: free disk space"
            )

    def go_back(self, state: TrainState, error: Diverged) -> None:
        """Restores the last intact checkpoint before the skipped steps, with half of the learning rates.

        The same samples follow. Steps in a row that are not finite come from the weights: a single batch is skipped
        without going back. With lower rates, other weights meet the same batches, each sample still counts once in an
        epoch, and what follows is a function of the checkpoint alone.

        Raises:
            Diverged: there is no intact earlier checkpoint, or the run has gone back too often. All files stay.
        """
        run, limit = self._run.folder, self._run.recipe.train.max_rollbacks
        if state.rollbacks >= limit:
            tried = f"{error.message}, after going back to a checkpoint {limit} times" if limit else error.message
            raise Diverged(tried, location=error.location, hint=error.hint) from error
        self.check_saved(wait=True)
        before = (state.skipping_since or 1) - 1
        step = self._intact_step(before, error)
        if not step:
            reason, hint = f"{error.message}, and there is no checkpoint before step {max(before, 1):,}", error.hint
            if self._run.recipe.train.keep_last == 1 and before > 1:
                hint += "; a run that keeps two checkpoints could have gone back: --set train.keep_last=2"
            raise Diverged(f"{reason} to go back to", location=error.location, hint=hint) from error
        # By its step: on a network disk, other machines may see an old `latest` for a while.
        saved = checkpoint.load(run, self._training, step)
        self._sync_log()
        self._context.barrier()  # all ranks have read the checkpoint, which is replaced now
        if self._context.is_main_process:
            self._loggers.close()
            if self._log:
                self._log.close()
            checkpoint.make_latest(run, step)
            discard_after(run, step)
            self._open_loggers()
        state.go_back(saved, ROLLBACK_LR_FACTOR)
        self._kept.go_back(state.tokens)
        _log.warning(
            f"{error.message}: going back to the checkpoint of step {step:,}, with learning rates times "
            f"{state.lr_scale:g} (rollback {state.rollbacks} of at most {limit})"
        )
        # It is written again, so that a run that is killed now doesn't forget the lower rates.
        self._save(state)
        self._saved_step, self._is_save_overdue = step, False
        self._context.barrier()

    def _intact_step(self, before: int, error: Diverged) -> int:
        """Returns the step of the checkpoint to go back to, the same on all ranks; 0 without one before `before`.

        Raises:
            Diverged: all checkpoints before it are damaged.
        """
        run, damaged = self._run.folder, list[DamagedError]()
        is_main = self._context.is_main_process
        steps = iter(checkpoint.earlier_steps(run, before, self._is_at_interval) if is_main else ())
        while step := self._context.largest(next(steps, 0)):
            try:
                checkpoint.verify_together(run / checkpoint.step_name(step), self._context)
            except DamagedError as caught:
                _log.warning(f"the checkpoint of step {step:,} is damaged: {caught.message} ({caught.location})")
                damaged.append(caught)
            else:
                return step
        if damaged:
            reason = f"{error.message}, and no checkpoint before step {before:,} is intact: {damaged[0].message}"
            hint = "restore the checkpoint from a copy, then resume"
            raise Diverged(reason, location=damaged[0].location, hint=hint) from error
        return 0

    def _as_model(self, state: TrainState, module: TrainModule) -> Model:
        return as_model(self._run.recipe, self._components, module, state, stage=self._stage(state.step))

    def _stage(self, step: int) -> int:
        """Returns the number of the stage that the last of `step` steps belongs to."""
        return self._run.plan.stage_at(max(step - 1, 0))

    def save_once(self, state: TrainState, *, keeps_one_more: bool = False) -> None:
        """Saves a checkpoint unless this step was saved already.

        Args:
            state: Training state.
            keeps_one_more: Whether no earlier checkpoint is deleted for it: the run may have to go back to that one.

        Raises:
            StoreError: the disk is full or can't be written.
        """
        self.check_saved(wait=True)
        if self._context.largest(self._has_save_failed) or self._saved_step != state.step:
            self._save(state, keeps_one_more=keeps_one_more)
            self._saved_step = state.step
            self._context.barrier()

    def end_early(self, state: TrainState, reason: str) -> None:
        """Logs the reason for early stopping and saves a checkpoint."""
        self._write(state.step, {"tokens": state.tokens, **_clock(state), "ended_early": reason, "best": state.best})
        self.save_once(state)

    def _write(self, step: int, line: Mapping[str, Any]) -> None:
        if self._log:
            self._unwritten.append((step, line))
            self._write_waiting_lines(is_last_try=step == self._run.plan.steps)
            self._loggers.write(step, line)

    def _write_waiting_lines(self, *, is_last_try: bool = False) -> None:
        """Writes log lines; if the disk is full, they wait in memory until the next line or checkpoint.

        Raises:
            StoreError: the log can't be written, or the disk is full at the last try.
        """
        while self._log and self._unwritten:
            try:
                self._log.write(*self._unwritten[0])
            except StoreError as error:
                if is_last_try or not is_disk_full(error):
                    raise
                if len(self._unwritten) == 1:
                    _log.warning(f"log lines wait until the disk has space: {error.message} ({error.location})")
                return
            self._unwritten.pop(0)


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
    if metrics.skipped:
        line["skipped_steps"] = metrics.skipped  # their loss or gradient was not finite
    if metrics.rollback:
        line["rollback"] = metrics.rollback
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
        cure = error.hint if isinstance(error, OtherRankError) else "free disk space or fix the permissions"
        raise error.at(
            hint=f"{cure}, then resume ({kept}): unmask pretrain --resume {shlex.quote(str(run))}"
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
