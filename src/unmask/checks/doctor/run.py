"""Findings about a run: its curve, its plan, its text and its masks."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from unmask.checks.audit import audit
from unmask.checks.audit.maskers import ObjectiveMasker, claims_of_config
from unmask.checks.audit.settings import AuditConfig, AuditReport
from unmask.checks.doctor import Finding, Severity, finding, named, severity
from unmask.core.errors import DamagedError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.format import count, duration, visible
from unmask.core.plugins import is_marked
from unmask.core.types import ProgressCallback
from unmask.data.advice import MANY_UNKNOWN
from unmask.data.inputs import sends_requests
from unmask.models import non_embedding_parameters
from unmask.objectives.masking import MaskingConfig
from unmask.objectives.word_boost import resolve_word_list
from unmask.tokenization.analysis import first_texts
from unmask.tokenization.words import detect_words
from unmask.training.display.text import MANY_EPOCHS, epochs_text
from unmask.training.environment import load_run_tokenizer, read_environment, reopen_text
from unmask.training.guards import MIN_JUMP, smallest_jump
from unmask.training.loggers import read_log
from unmask.training.plan import Plan
from unmask.training.recipe import Recipe, read_marks, read_recipe
from unmask.training.runs import RunSummary, read_run, require_run_format
from unmask.training.setup import build_objective

_BELOW_UNIGRAM: Final = 0.1  # nats below the unigram line, from which context is learned (checks/studies/measures.py)
_FEW_TOKENS: Final = 5_000_000  # the slowest shipped recipe left the line at 2.4M tokens (docs/diary.md)
_DEVIATION: Final = 0.15  # of the planned time, as in training/plan.py
_UNKNOWN: Final = (0.001, MANY_UNKNOWN)
_CHANGE_SPREAD: Final = 1.0  # nats; standard deviation of the change of a token's loss between two validations
# Numbers of the log's lines; a loss that is not finite is null there.
_LINE: Final = ("masked_tokens", "training_seconds", "data_wait_fraction", "loss", "grad_norm")
_VALIDATION: Final = ("masked_tokens", "unigram_loss", "loss")
_OR_NULL: Final = ("loss", "grad_norm")
_TOO_LARGE: Final = 2**63
_NAMED: Final = 10  # steps that a finding names
_CRASH_BYTES: Final = 1 << 16  # at the end of crash.txt
_CRASH_SHOWN: Final = 500  # characters of its last line
_AUDIT_CHARACTERS: Final = 300_000
_AUDIT: Final = AuditConfig(samples=512, length=64, batch=8, workers=0, ranks=1)

Line = Mapping[str, Any]


@dataclass(frozen=True)
class _Examined:
    """A run as its files describe it."""

    folder: Path
    summary: RunSummary
    recipe: Recipe
    plan: Plan
    environment: Mapping[str, Any]
    lines: Sequence[Line]  # of training
    validations: Sequence[Line]  # with the objective of the last stage

    @property
    def tokens(self) -> int:
        """Tokens that the run has seen."""
        return self.summary.tokens or 0

    def resume(self, budget: str = "") -> str:
        """Return the command that resumes or prolongs the run."""
        return f"unmask pretrain --resume {shlex.quote(str(self.folder))}" + (f' --budget "{budget}"' if budget else "")

    def again(self, *settings: str) -> str:
        """Return the command that starts a run with the same recipe and other settings."""
        options = " ".join(f"--set {setting}" for setting in settings)
        return f"unmask pretrain {named(self.environment['text']['paths'])} --recipe {self.recipe_path()} {options}"

    def recipe_path(self) -> str:
        """Return the path of the recipe, as an argument of a shell."""
        return shlex.quote(str(self.folder / RunLayout.RECIPE))

    def slower(self) -> str:
        """Return the command that starts a run with half of the learning rates."""
        return self.again(*self.recipe.optimizer.scaled_rates(0.5))


def examine_run(folder: Path, progress: ProgressCallback) -> list[Finding]:
    """Return the findings about a run, in a fixed order. A run that is still training may be examined.

    Raises:
        RunError: the folder is not a run, or an earlier version wrote it.
        DamagedError: a file of the run is damaged.
    """
    require_run_format(folder)
    recipe, plan = read_recipe(folder)
    environment, log = read_environment(folder), list(read_log(folder / RunLayout.LOG))
    same = list(takewhile(lambda objective: objective == recipe.objectives[-1], reversed(recipe.objectives)))
    first_step = plan.stages[-len(same)].first_step
    validations = [line for line in log if "validation" in line and line["step"] > first_step]
    lines = [line for line in log if "masked_tokens" in line]
    _check_log(folder, lines, validations)
    run = _Examined(folder, read_run(folder), recipe, plan, environment, lines, validations)
    found = [_state(run), _log(run)]
    if lines:
        found += [_divergence(run), *_guards(run)]
    if validations and recipe.objectives[-1].kind != "rtd":  # whose loss is not that of tokens
        found += [_unigram_line(run), _overfitting(run)]
    found.append(_unknown(run))
    if lines:
        found += [_repetition(run), _plan(run)]
    return [*found, _masking(run, progress)]


def _check_log(folder: Path, lines: Sequence[Line], validations: Sequence[Line]) -> None:
    """Check that the log has the numbers that are examined.

    Raises:
        DamagedError: one is missing or impossible; the error names the step.
    """
    tables: list[tuple[int, Any, Sequence[str]]] = [(line["step"], line, _LINE) for line in lines]
    tables += [(line["step"], line["validation"], _VALIDATION) for line in validations]
    for step, table, names in tables:
        if missing := _missing(table, names):
            raise DamagedError(
                f"invalid log line: {missing} of step {step:,} is not a number"
                + ("" if missing in _OR_NULL else " of 0 or more, and below 2^63"),
                location=str(folder / RunLayout.LOG),
                hint="fix or delete that line",
            )


def _missing(table: Any, names: Sequence[str]) -> str:
    """Return the first name whose value is not a number, or not one that it can have; an empty string if all are."""
    values: Mapping[str, Any] = table if isinstance(table, dict) else {}
    return next((name for name in names if not (name in values and _is_possible(name, values[name]))), "")


def _is_possible(name: str, value: Any) -> bool:
    if name in _OR_NULL:
        # An objective of a plugin may have a negative loss. A JSON integer may be too large for a float.
        return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < _TOO_LARGE)
    return isinstance(value, int | float) and 0 <= value < _TOO_LARGE  # neither NaN nor infinite


# State and log --------------------------------------------------------------------------------------------------------


def _state(run: _Examined) -> Finding:
    summary = run.summary
    figure = f"{summary.state} at step {summary.step or 0:,} of {run.plan.steps:,}"
    crash = run.folder / RunLayout.CRASH
    if summary.state == "crashed" and crash.is_file():
        text = _end_of(crash, _CRASH_BYTES).decode("utf-8", "replace").strip()
        figure += f": {visible(text.splitlines()[-1])[:_CRASH_SHOWN] if text else 'crash.txt is empty'}"
    if summary.problem:
        figure += f": {summary.problem}"
    levels: dict[str, Severity] = {"crashed": "problem", "damaged": "problem", "killed": "note", "stopped": "note"}
    why = "the learning rate falls at the end of the plan: a run that stopped earlier is worse than it could be"
    return finding("state", levels.get(summary.state, "ok"), figure, why, run.resume())


def _end_of(path: Path, length: int) -> bytes:
    """Return the last bytes of a file."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - length))
        return file.read(length)


def _log(run: _Examined) -> Finding:
    path = run.folder / RunLayout.LOG
    why = "the curve, and all findings on it, come from log.jsonl"
    if not path.is_file():
        return Finding("log", "problem", "log.jsonl is missing", why, run.resume())
    is_whole = _end_of(path, 1) in (b"", b"\n")
    figure = f"{len(run.lines):,} lines of training, {len(run.validations):,} validations"
    if not is_whole:
        figure += "; the last line is half-written"
    if not run.lines:
        figure = "no step is logged yet"
    is_running = run.summary.state == "running"
    level: Severity = "ok" if is_running or (run.lines and is_whole) else "note" if run.lines else "problem"
    return finding("log", level, figure, why, run.resume())


# Curve ----------------------------------------------------------------------------------------------------------------


def _unigram_line(run: _Examined) -> Finding:
    """Return whether the loss has left the plateau at the unigram loss."""
    last = run.validations[-1]["validation"]
    loss, unigram = _loss(last), float(last["unigram_loss"])
    below = unigram - loss
    figure = f"validation loss {loss:.3f}, {abs(below):.2f} nats {'below' if below >= 0 else 'above'} the unigram line"
    figure += f" of {unigram:.3f}, after {count(run.tokens)} tokens"
    values = {"loss": loss, "unigram_loss": unigram, "tokens": run.tokens}
    if below >= _BELOW_UNIGRAM:
        return Finding("unigram line", "ok", figure, "below it, predictions use the context", values=values)
    why = (
        "still at the unigram line, where only frequencies are predicted; the usual causes: too few steps, a learning "
        "rate that is too high or far too low, a mask rate that leaves no context, documents of a few tokens"
    )
    if run.summary.state == "running" and run.tokens < _FEW_TOKENS:
        why = "the first steps learn frequencies only; context follows after some hundred thousand to a million tokens"
        command = f"unmask doctor {shlex.quote(str(run.folder))}"
        return Finding("unigram line", "note", f"{figure}; the run goes on", why, command, values)
    is_complete = (run.summary.step or 0) >= run.plan.steps
    command = run.resume(f"+{run.plan.steps} steps" if is_complete else "")
    return Finding(
        "unigram line", "problem", figure, why, command if run.tokens < _FEW_TOKENS else run.slower(), values
    )


def _divergence(run: _Examined) -> Finding:
    """Return losses that are not finite, jumps of the training loss, and whether it came back."""
    why = "after a jump of the loss, the steps before it are partly lost; a lower learning rate avoids it"
    undefined = [line["step"] for line in run.lines if line["masked_tokens"] and not math.isfinite(_loss(line))]
    if undefined:
        figure = f"the loss of step {undefined[0]:,} is not a number"
        return Finding("divergence", "problem", figure, why, run.slower(), {"step": undefined[0]})
    jumps: list[tuple[float, int]] = []
    end_rise, last_step = 0.0, 0
    for stage in run.plan.stages:
        end = stage.first_step + stage.steps
        lines = [line for line in run.lines if stage.first_step < line["step"] <= end and line["masked_tokens"]]
        lowest = math.inf
        for line in lines:
            noise = smallest_jump(line["masked_tokens"])
            if _loss(line) > lowest + noise:
                jumps.append((_loss(line) - lowest, line["step"]))
            lowest = min(lowest, _loss(line))
        if lines:
            end_rise, last_step = _loss(lines[-1]) - lowest, lines[-1]["step"]
    if not jumps:
        largest = max(float(line["grad_norm"] or 0) for line in run.lines)
        figure = f"no jump of the training loss; largest logged gradient norm {largest:.3g}"
        return Finding("divergence", "ok", figure, why)
    rise, step = max(jumps)
    has_diverged = jumps[-1][1] == last_step and end_rise > MIN_JUMP
    figure = f"the training loss was {rise:.2f} nats above its lowest value at step {step:,}, and " + (
        f"is {end_rise:.2f} above it at the end" if has_diverged else "came back"
    )
    level = "problem" if has_diverged else "note"
    return Finding("divergence", level, figure, why, run.slower(), {"step": step, "rise": rise})


def _guards(run: _Examined) -> list[Finding]:
    """Return what the guards of the run have logged, if anything: skipped steps, returns and jumps of the loss."""
    found: list[Finding] = []
    skipped = [line for line in run.lines if isinstance(line.get("skipped_steps"), int)]
    returns = [line["rollback"] for line in run.lines if isinstance(line.get("rollback"), Mapping)]
    count_skipped, rollbacks = run.summary.skipped_steps, run.summary.rollbacks  # also in discarded lines
    if count_skipped or rollbacks:
        figure = f"{count_skipped:,} steps were skipped" + _at_steps([line["step"] for line in skipped])
        if rollbacks:
            back = ", ".join(f"from {each.get('from_step')} to {each.get('to_step')}" for each in returns[:_NAMED])
            times = f" {rollbacks} times" if rollbacks > 1 else ""
            figure += f"; the run went back to an earlier checkpoint{times}" + (f": steps {back}" if back else "")
        why = "their loss or gradient was not finite; after a return, the learning rates are half as high"
        level: Severity = "problem" if rollbacks else "note"
        values = {"skipped_steps": count_skipped, "rollbacks": rollbacks}
        found.append(Finding("skipped steps", level, figure, why, run.slower(), values))
    spikes = [line["step"] for line in run.lines if isinstance(line.get("loss_spike"), int | float)]
    if spikes:
        figure = f"{len(spikes):,} jumps of the training loss above the lines before" + _at_steps(spikes)
        why = "a jump that comes back costs the steps until then; a few in a long run are common"
        found.append(Finding("loss spikes", "note", figure, why, run.slower(), {"steps": spikes[:_NAMED]}))
    return found


def _at_steps(steps: Sequence[int]) -> str:
    """Return the numbers of the first log lines of some."""
    if not steps:
        return ""
    more = ", …" if len(steps) > _NAMED else ""
    return f", in the lines of steps {', '.join(f'{step:,}' for step in steps[:_NAMED])}{more}"


def _overfitting(run: _Examined) -> Finding:
    """Return whether the validation loss rises while the training loss falls."""
    losses = [(_loss(line["validation"]), int(line["step"])) for line in run.validations]
    losses = [each for each in losses if math.isfinite(each[0])] or losses
    (best, best_step), (last, last_step) = min(losses), losses[-1]
    masked = int(run.validations[-1]["validation"]["masked_tokens"])
    noise = max(0.02, 2 * _CHANGE_SPREAD / math.sqrt(max(1, masked)))
    before, after = _training_loss(run.lines, best_step), _training_loss(run.lines, last_step)
    values = {"best": best, "best_step": best_step, "last": last}
    why = "the model memorizes the training text; unmask.load opens the best model, and later steps are lost time"
    if last - best <= noise or not after < before:
        figure = f"best validation loss {best:.3f} at step {best_step:,}, last {last:.3f}"
        return Finding("overfitting", "ok", figure, why, values=values)
    figure = (
        f"since step {best_step:,} the validation loss rose from {best:.3f} to {last:.3f}, and the training loss fell "
        f"from {before:.3f} to {after:.3f}"
    )
    return Finding("overfitting", "problem", figure, why, run.again("train.early_stopping_patience=3"), values)


def _training_loss(lines: Sequence[Line], step: int) -> float:
    """Return the training loss of the log line nearest to a step; NaN without lines."""
    nearest = min(lines, key=lambda line: abs(line["step"] - step), default=None)
    return math.nan if nearest is None else _loss(nearest)


def _loss(line: Line) -> float:
    """Return the loss of a line; NaN if the log has null in its place."""
    return math.nan if line.get("loss") is None else float(line["loss"])


# Text, plan and masks -------------------------------------------------------------------------------------------------


def _unknown(run: _Examined) -> Finding:
    facts = run.environment["text"]["facts"]
    share = int(facts["train_unknown_characters"]) / max(1, int(facts["train_characters"]))
    figure = f"{share:.2%} of the characters of the training text are [UNK]"
    why = "unknown characters are never predicted and give no context"
    command = run.again("data.tokenizer.kind=bpe")
    return finding("unknown characters", severity(share, *_UNKNOWN), figure, why, command, {"share": share})


def _repetition(run: _Examined) -> Finding:
    epochs = run.tokens / max(1, int(run.environment["text"]["facts"]["train_tokens"]))
    weights = non_embedding_parameters(run.recipe.model, int(run.environment["text"]["facts"]["vocabulary"]))
    figure = (
        f"{count(run.tokens)} tokens are {epochs_text(epochs)}, and {run.tokens / max(1, weights):.1f} for each of "
        f"{count(weights)} parameters outside the embedding"
    )
    why = "dozens of epochs over one text mostly memorize it"
    command = run.again("train.early_stopping_patience=3")
    return finding("repetition", severity(epochs, MANY_EPOCHS, math.inf), figure, why, command, {"epochs": epochs})


def _plan(run: _Examined) -> Finding:
    """Compare the time of the steps so far with the plan."""
    step, last = run.lines[-1]["step"], run.lines[-1]
    seconds, planned = float(last["training_seconds"]), run.plan.training_seconds(step)
    waited = [float(line["data_wait_fraction"]) for line in run.lines]
    figure = f"step {step:,} of {run.plan.steps:,} after {duration(seconds)} of training"
    why = "a plan that is wrong by more than 15 % uses another budget than you gave"
    if not planned:
        return Finding("plan", "ok", f"{figure}; no time was planned", why)
    deviation = seconds / planned - 1
    figure += f", planned {duration(planned)} ({deviation:+.0%}); {sum(waited) / len(waited):.1%} spent on waiting"
    spare = max(1, round(run.plan.steps * (planned / max(seconds, 1e-9) - 1)))
    command = run.resume(f"+{spare} steps") if deviation < 0 else f"unmask bench --recipe {run.recipe_path()}"
    is_budget = run.recipe.train.budget.unit == "seconds"  # otherwise the time was a forecast only
    level = severity(abs(deviation), _DEVIATION, math.inf) if is_budget else "ok"
    return finding("plan", level, figure, why, command, {"seconds": seconds, "planned_seconds": planned})


def _masking(run: _Examined, progress: ProgressCallback) -> Finding:
    """Audit the objective of the last stage with the tokenizer and the text of the run."""
    why = "a masker that breaks its claims trains another task than the recipe says"
    objective = resolve_word_list(run.recipe.objectives[-1])
    if not isinstance(objective, MaskingConfig):
        return Finding("masking", "ok", f"objective {objective.kind} has no mask rate to audit", why)
    tokenizer = load_run_tokenizer(run.folder, run.environment)
    marks = read_marks(run.folder)
    named = [each for each in run.environment["text"]["paths"] if sends_requests(each)]
    if unknown := [each for each in named if not is_marked(each, marks)]:
        # A run from elsewhere could make this machine send requests to any address, or to the Hugging Face Hub.
        figure = f"not audited: you have not given this address on this machine: {visible(unknown[0])}"
        command = run.resume() + " --text ADDRESS"
        return Finding("masking", "note", figure, "addresses of a run from elsewhere are not opened", command)
    try:
        source = reopen_text(run.folder, run.environment, run.recipe.data)
        texts = list(first_texts(source, _AUDIT_CHARACTERS))
    except UnmaskError as error:
        command = run.resume() + " --text NEW"
        return Finding(
            "masking", "note", f"not audited: {error.message}", "the audit masks the run's own text", command
        )
    rule = run.recipe.data.words
    words = detect_words("".join(texts)) if rule == "auto" else rule
    masker = ObjectiveMasker(
        build_objective(objective, run.recipe, tokenizer, words),
        run.recipe.seed,
        str(run.folder),
        claims_of_config(objective, 0.0),
    )
    try:
        report = audit(masker, texts, tokenizer, settings=_AUDIT, words=words, progress=progress)
    except UnmaskError as error:  # the text is too short
        return Finding("masking", "ok", f"not audited: {error.message}", why)
    return _audited(run, report, why)


def _audited(run: _Examined, report: AuditReport, why: str) -> Finding:
    command = f"unmask audit --recipe {run.recipe_path()} --tokenizer {shlex.quote(str(run.folder))}"
    checks = sum(found.verdict in ("pass", "fail") for found in report.findings)
    if report.passed:
        figure = f"{checks} checks passed: {report['rate'].detail}"
        return Finding("masking", "ok", figure, why, values={"checks": checks})
    failed = ", ".join(report.failed)
    return Finding("masking", "problem", f"{len(report.failed)} of {checks} checks failed: {failed}", why, command)
