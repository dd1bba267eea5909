"""Reads what a report shows of a run: log, plan, environment, results, and the predictions on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from safetensors import safe_open
from torch import Tensor

from unmask.core import files
from unmask.core.distributed import init_distributed
from unmask.core.errors import DamagedError, RunError, UnmaskError
from unmask.core.files import RunLayout
from unmask.core.format import visible
from unmask.core.hardware import cores
from unmask.core.types import MaskedBatch, ProgressCallback
from unmask.data.prepare import no_progress
from unmask.data.shards import open_shards
from unmask.evaluation.details import DetailCounter, DetailedEvalResult
from unmask.evaluation.masked_lm import build_eval_set, documents_from_shards, evaluate
from unmask.models.model import find_checkpoint, load, predicts_masked_tokens
from unmask.training.api import Run
from unmask.training.environment import read_environment
from unmask.training.estimate.memory import stage_flops_per_token
from unmask.training.finetuning.api import RESULTS
from unmask.training.finetuning.report import estimate_text
from unmask.training.finetuning.train import Estimate
from unmask.training.plan import Plan
from unmask.training.recipe import Recipe
from unmask.training.runs import RunSummary

_POINTS: Final = 8_000  # log lines of all runs together
_PREVIEW_CHARACTERS: Final = 300_000  # of all runs together
_MAX_PREVIEWS: Final = 60
# Of a validation that was not measured, for each parameter and token: 23G of them took 0.7 s of one thread.
_SECONDS_PER_PARAMETER: Final = 3e-11
_MAX_LABELS: Final = 12  # in the table of confusions
_MAX_FINETUNED: Final = 200  # folders that are searched for results of fine-tuning
_TRAINING: Final = ("loss", "accuracy", "tokens_per_second", "learning_rate", "grad_norm")
_VALIDATION: Final = ("loss", "accuracy", "bits_per_character", "unigram_loss")

Row = dict[str, Any]
"""One point of a chart: a place on each x axis (step, seconds, tokens, flops), and values by name."""


@dataclass(frozen=True)
class ModelFacts:
    """The model that `unmask.load` opens for a run."""

    step: int | None
    parameters: int
    digest: str  # of model.safetensors


@dataclass(frozen=True)
class PreviewStep:
    """The sentences of a preview after one validation, each as (text, state, truth) spans."""

    step: int
    lines: Sequence[Sequence[tuple[str, str, str]]]


@dataclass(frozen=True)
class ConfusionTable:
    """How often each label (rows) got each prediction (columns)."""

    split: str  # "test" or "valid"
    seed: int
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Finetuned:
    """The scores of a fine-tuning: for each method its name, and its scores in validation and test as text."""

    name: str  # of the folder
    task: str
    metric: str
    seeds: int
    rows: Sequence[tuple[str, str, str]]
    confusion: ConfusionTable | None  # of the best seed; None for a regression or many labels


@dataclass(frozen=True)
class RunReport:
    """What a report shows of one run."""

    name: str
    summary: RunSummary
    recipe: Recipe
    plan: Plan
    environment: Mapping[str, Any]
    training: Sequence[Row]
    validations: Sequence[Row]
    last_validation: Mapping[str, Any]  # all results of the last validation; empty before the first one
    borders: Sequence[Row]  # where a stage ends and the next one begins
    previews: Sequence[PreviewStep]
    pairs: Sequence[Row]  # accuracy on minimal pairs by method, at each evaluation
    last_pairs: Mapping[str, Any] | None  # all accuracies of the last evaluation
    finetuned: Mapping[Path, Finetuned]  # results of `unmask finetune` on this run, by folder
    model: ModelFacts | None  # None: the run has not saved a step
    training_seconds: float  # without validation and saving
    details: DetailedEvalResult | None = None
    no_details: str = ""  # why there are no details: a word of words.json
    skipped_steps: int = 0  # whose loss or gradient was not finite
    rollbacks: int = 0  # returns to an earlier checkpoint
    loss_spikes: int = 0


def collect(
    runs: Sequence[Path],
    *,
    finetuned: Sequence[Path] = (),
    max_validation_seconds: float = math.inf,
    on_progress: ProgressCallback = no_progress,
) -> list[RunReport]:
    """Return what a report shows of runs.

    Args:
        runs: Folders of runs.
        finetuned: Further folders with results of `unmask finetune`.
        max_validation_seconds: Expected seconds of one validation above which no details are computed.
        on_progress: Called with a task and the fraction of it that is done.

    Raises:
        RunError: a folder is not a run, or its log has no line yet.
        DamagedError: a file of a run, or a named result of a fine-tuning, is damaged.
    """
    read = [_read(run, name, len(runs), finetuned) for run, name in zip(runs, _names(runs), strict=True)]
    named = {folder for report in read for folder in report.finetuned}
    for folder in finetuned:
        if folder.resolve() not in named:
            raise RunError(
                "this is not the result of a fine-tuning of these runs",
                location=str(folder),
                hint="name a folder that `unmask finetune RUN --out FOLDER` has written",
            )
    found: list[RunReport] = []
    for number, report in enumerate(read):

        def progress(fraction: float, number: int = number) -> None:
            on_progress("evaluating on held-out text", (number + fraction) / len(read))

        details, reason = _details(report, max_validation_seconds, progress)
        found.append(replace(report, details=details, no_details=reason))
    return found


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the last part of each path; the whole path if that is ambiguous."""
    names = [run.absolute().name for run in runs]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _read(path: Path, name: str, num_runs: int, finetuned: Sequence[Path]) -> RunReport:
    """Read the files of a run; its details are computed later."""
    run = Run(path)
    recipe, plan, environment, lines = run.recipe, run.plan, read_environment(path), run.log()
    summary = run.summary
    if summary.state == "damaged":
        raise RunError(f"damaged run: {summary.problem}", location=str(path), hint="restore the file that is named")
    if not lines:
        raise RunError(
            f"the run has no line in {RunLayout.LOG}, so there is nothing to report",
            location=str(path),
            hint="wait for its first line, or restore the file",
        )
    _check_lines(lines, path)
    flops = _FlopsCounter(recipe, plan, environment)
    training = [_row(line, line, _TRAINING, flops) for line in lines if "learning_rate" in line]
    validations = [_row(line, line["validation"], _VALIDATION, flops) for line in lines if "validation" in line]
    pair_lines = [line for line in lines if "pairs" in line]
    return RunReport(
        name=visible(name),
        summary=summary,
        recipe=recipe,
        plan=plan,
        environment=environment,
        training=_thin(training, _POINTS // num_runs),
        validations=_thin(validations, _POINTS // num_runs),
        last_validation=next((line["validation"] for line in reversed(lines) if "validation" in line), {}),
        borders=_borders(plan, [*training, *validations]),
        previews=_previews(lines, _PREVIEW_CHARACTERS // num_runs),
        pairs=_thin([row for line in pair_lines for row in _pair_rows(line, flops)], _POINTS // num_runs),
        last_pairs=pair_lines[-1]["pairs"] if pair_lines else None,
        finetuned=_finetuned(path, finetuned),
        model=_model_facts(path),
        training_seconds=next((float(line["training_seconds"]) for line in reversed(lines)), 0.0),
        skipped_steps=summary.skipped_steps,
        rollbacks=summary.rollbacks,
        loss_spikes=sum("loss_spike" in line for line in lines),
    )


def _check_lines(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Check that each line of a log has its place on the axes.

    Raises:
        DamagedError: a line lacks a number.
    """
    for line in lines:
        for key in ("tokens", "seconds", "training_seconds"):
            if not isinstance(line.get(key), int | float):
                raise DamagedError(
                    f"invalid log line of step {line['step']}: got no number {key!r}",
                    location=str(path / RunLayout.LOG),
                    hint="fix or delete that line",
                )


# Points of the charts -------------------------------------------------------------------------------------------------


class _FlopsCounter:
    """Computes the floating-point operations of matrix products up to a step, forward and backward."""

    def __init__(self, recipe: Recipe, plan: Plan, environment: Mapping[str, Any]) -> None:
        vocab_size = recipe.init.vocab_size or int(environment["text"]["facts"]["vocabulary"])
        self._plan = plan
        self._per_token = [stage_flops_per_token(recipe, stage, vocab_size) for stage in range(len(plan.stages))]

    def at(self, step: int, tokens: int) -> float:
        """Return the operations of the first `step` steps, which processed `tokens` tokens."""
        stages = self._plan.stages
        planned = [min(max(step - stage.first_step, 0), stage.steps) * stage.batch_tokens for stage in stages]
        weighted = sum(count * each for count, each in zip(planned, self._per_token, strict=True))
        return weighted * tokens / sum(planned) if sum(planned) else 0.0


def _row(line: Mapping[str, Any], values: Mapping[str, Any], names: Sequence[str], flops: _FlopsCounter) -> Row:
    step, tokens = int(line["step"]), int(line["tokens"])
    row: Row = {"step": step, "seconds": line["seconds"], "tokens": tokens, "flops": flops.at(step, tokens)}
    return {key: _rounded(value) for key, value in (row | {name: values.get(name) for name in names}).items()}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _thin(rows: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` rows, evenly spaced, with the first and the last one."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[round(number * (len(rows) - 1) / max(1, limit - 1))] for number in range(limit)]


def _borders(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """Return the ends of all stages but the last that the run has reached, between the log lines around them."""
    borders: list[Row] = []
    ordered = sorted(rows, key=lambda row: row["step"])
    for stage, following in zip(plan.stages, plan.stages[1:], strict=False):
        step = following.first_step
        before = [row for row in ordered if row["step"] <= step]
        after = [row for row in ordered if row["step"] > step]
        if not before or not after:
            continue
        first, last = before[-1], after[0]
        share = (step - first["step"]) / (last["step"] - first["step"])
        place = {key: first[key] + share * (last[key] - first[key]) for key in ("seconds", "tokens", "flops")}
        label = f"{stage.max_seq_len:,} → {following.max_seq_len:,}"
        borders.append({"step": step, **{key: _rounded(float(value)) for key, value in place.items()}, "label": label})
    return borders


def _pair_rows(line: Mapping[str, Any], flops: _FlopsCounter) -> list[Row]:
    """Return the overall accuracy of each method of one evaluation of minimal pairs, with its interval."""
    rows: list[Row] = []
    for method, result in line["pairs"]["methods"].items():
        overall = result["overall"]
        low, high = overall["interval"]
        values = {"accuracy": overall["accuracy"], "low": low, "high": high}
        rows.append(_row(line, values, tuple(values), flops) | {"method": method})
    return rows


def _previews(lines: Sequence[Mapping[str, Any]], characters: int) -> list[PreviewStep]:
    """Return the sentences after each validation; of many validations or long sentences, some validations only."""
    steps = [
        PreviewStep(
            int(line["step"]),
            [[(visible(span["text"]), span["state"], visible(span["truth"])) for span in spans] for spans in found],
        )
        for line in lines
        if (found := cast("Sequence[Any]", line.get("preview") or ()))
    ]
    size = max((sum(len(span[0]) for spans in each.lines for span in spans) for each in steps), default=0)
    return _thin(steps, max(2, min(_MAX_PREVIEWS, characters // max(size, 1))))


# Results --------------------------------------------------------------------------------------------------------------


def _model_facts(run: Path) -> ModelFacts | None:
    """Return the facts of the model that `unmask.load` opens; None if the run has not saved one that can be read."""
    try:
        folder = find_checkpoint(run)
        digest = str(files.read_json(folder / RunLayout.DIGESTS)[RunLayout.WEIGHTS]["digest"])
        card: Any = files.read_json(folder / RunLayout.CARD)
        files.check_tensor_header(folder / RunLayout.WEIGHTS)
        with safe_open(folder / RunLayout.WEIGHTS, framework="np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
    except (UnmaskError, OSError, KeyError):
        return None
    return ModelFacts(card.get("step"), sum(math.prod(shape) for shape in shapes), digest)


def _details(
    report: RunReport, max_validation_seconds: float, on_progress: Callable[[float], None]
) -> tuple[DetailedEvalResult | None, str]:
    """Return the details of the best model on the run's held-out text or, without them, the reason.

    Frequency ranks and the unigram baseline are those of the training text. The token cache must still exist.
    """
    text = report.environment["text"]
    parameters = report.model.parameters if report.model else 0
    expected = report.plan.validate_seconds or parameters * text["facts"]["held_out_tokens"] * _SECONDS_PER_PARAMETER
    if expected > max_validation_seconds:
        return None, "no_details_slow"
    held_out = Path(str(text.get("held_out_shards", "")))
    try:
        shards, train = open_shards(held_out), open_shards(held_out.with_name("train"))
        model = load(report.summary.run)
        if shards.tokenizer_fingerprint != model.tokenizer.fingerprint:
            return None, "no_details_cache"
        if not predicts_masked_tokens(model):
            return None, "no_details_objective"
        context = init_distributed("float32", min(int(report.environment["determinism"]["threads"]), cores()))
        documents, length = documents_from_shards(shards), report.recipe.stage[-1].max_seq_len
        eval_set = build_eval_set(documents, model.tokenizer, length, train.token_counts)
        counter = DetailCounter(model.tokenizer, train.token_counts)
        done = 0

        def add(masked: MaskedBatch, logits_MV: Tensor) -> None:
            nonlocal done
            counter.add(masked, logits_MV)
            done += len(masked.labels_M)
            on_progress(done / eval_set.masked_tokens)

        encoder, head = model.encoder.to(context.device), model.head.to(context.device)
        return counter.result(evaluate(encoder, head, eval_set, context, on_batch=add), context), ""
    except (UnmaskError, OSError):
        return None, "no_details_cache"


def _finetuned(run: Path, given: Sequence[Path]) -> dict[Path, Finetuned]:
    """Return the results of fine-tuning that name this run: of the given folders, and of those near it.

    Searched are the folders in the run, those beside it, and those in models/. A damaged result among these is left
    out.

    Raises:
        DamagedError: a given folder has no result, or a damaged one.
    """
    near = [
        path.parent for place in (run, run.absolute().parent, Path("models")) for path in place.glob(f"*/{RESULTS}")
    ]
    found: dict[Path, Finetuned] = {}
    for folder in [*given, *sorted(near)[:_MAX_FINETUNED]]:
        try:
            model, result = _read_finetuned(folder)
        except DamagedError:
            if folder in given:
                raise
            continue
        if run.resolve() in (model, *model.parents):
            found.setdefault(folder.resolve(), result)
    return found


def _read_finetuned(folder: Path) -> tuple[Path, Finetuned]:
    """Return the path of the model that was fine-tuned, and the scores.

    Raises:
        DamagedError: the file is missing or damaged.
    """
    path = folder / RESULTS
    values: Any = files.read_json(path)
    try:
        metric = str(values["main_metric"])
        rows = [
            (str(row["name"]), _score_text(row["valid"], metric), _score_text(row["test"], metric))
            for row in values["rows"]
        ]
        confusion = _read_confusion(values["confusion"], int(values["best_seed"]))
        result = Finetuned(folder.name, str(values["task"]), metric, len(values["seeds"]), rows, confusion)
        return Path(str(values["model"])).resolve(), result
    except (KeyError, TypeError, ValueError) as error:  # ValueError: a path with a null character, or no number
        hint = "run `unmask finetune` again, or delete the file"
        raise DamagedError("this is not a result of `unmask finetune`", location=str(path), hint=hint) from error


def _read_confusion(values: Mapping[str, Any] | None, seed: int) -> ConfusionTable | None:
    if values is None or len(values["labels"]) > _MAX_LABELS:
        return None
    labels = [str(label) for label in values["labels"]]
    counts = [[int(count) for count in row] for row in values["counts"]]
    if [len(row) for row in counts] != [len(labels)] * len(labels):
        raise ValueError(f"got {len(counts)} rows of counts for {len(labels)} labels")
    return ConfusionTable(str(values["split"]), seed, labels, counts)


def _score_text(scores: Mapping[str, Any], metric: str) -> str:
    if metric not in scores:
        return "–"
    found = scores[metric]
    mean = float("nan") if found["mean"] is None else float(found["mean"])  # of a correlation with a constant
    return estimate_text(Estimate(mean, found["standard_error"]), metric)
