"""The result of a fine-tuning: scores over seeds, baselines, and the confusion of labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unmask.training.finetuning.metrics import Estimate, confusion_matrix
from unmask.training.finetuning.settings import Task
from unmask.training.finetuning.train import SeedResult, Splits


@dataclass(frozen=True)
class Row:
    """The metrics of one method: means over its runs."""

    name: str  # fine-tuned, from scratch, bag of words, most frequent tag of each word, majority class, mean
    runs: int
    valid: Mapping[str, Estimate]
    test: Mapping[str, Estimate]  # empty without test data


@dataclass(frozen=True)
class SeedScore:
    """The results of one seed at its best validation."""

    seed: int
    epoch: float
    valid: Mapping[str, float]
    test: Mapping[str, float] | None


@dataclass(frozen=True)
class Confusion:
    """Counts of the labels (rows) and predictions (columns) of the best seed, in the order of `labels`."""

    split: str  # test, or valid without test data
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Saved:
    """The folder that was written, and its comparison with transformers."""

    path: str
    architecture: str
    difference: float | None  # largest difference of scores; None: transformers isn't installed


@dataclass(frozen=True)
class FinetuneReport:
    """The result of a fine-tuning."""

    task: Task
    model: str
    kind: str
    labels: Sequence[str]  # empty for a regression
    examples: Mapping[str, int]  # by split: texts, pairs or sentences
    main_metric: str  # chooses epoch and seed, in validation
    rows: Sequence[Row]
    seeds: Sequence[SeedScore]
    best_seed: int
    confusion: Confusion | None  # None for a regression
    settings: Mapping[str, object]
    seconds: float
    notes: Sequence[str] = ()
    saved: Saved | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; NaN, the correlation with a constant, is None."""
        return _without_nan(asdict(self))

    def __repr__(self) -> str:
        """Return the main metric of each method, one per line."""
        lines = [f"FinetuneReport({self.task} with {self.model!r}, {len(self.seeds)} seeds, {self.main_metric}"]
        for row in self.rows:
            scores = row.test or row.valid
            lines.append(f"  {row.name:<18} {estimate_text(scores[self.main_metric], self.main_metric)}")
        return "\n".join(lines) + ")"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_PERCENTAGES = ("accuracy", "macro_f1", "span_f1", "precision", "recall")


def estimate_text(estimate: Estimate, metric: str) -> str:
    """Return a mean and its standard error as text, such as "81.32 % ± 0.21"."""
    if estimate.mean != estimate.mean:
        return "undefined"
    scale, unit, digits = (100, " %", 2) if metric in _PERCENTAGES else (1, "", 3)
    error = "" if estimate.standard_error is None else f" ± {scale * estimate.standard_error:.{digits}f}"
    return f"{scale * estimate.mean:.{digits}f}{unit}{error}"


def row_of(name: str, results: Sequence[SeedResult]) -> Row:
    """Return the means over runs with several seeds."""
    valid = {metric: Estimate.of([one.valid[metric] for one in results]) for metric in results[0].valid}
    tests = [one.test for one in results if one.test is not None]
    test = {metric: Estimate.of([one[metric] for one in tests]) for metric in tests[0]} if tests else {}
    return Row(name, len(results), valid, test)


def confusion_of(splits: Splits, result: SeedResult) -> Confusion | None:
    """Return the confusion of labels on the test data, without it on the validation data."""
    if splits.task == "regress":
        return None
    name, data, predictions = "valid", splits.valid, result.valid_predictions
    if splits.test is not None and result.test_predictions is not None:
        name, data, predictions = "test", splits.test, result.test_predictions
    counts = confusion_matrix(data.labels, predictions, len(splits.labels))
    return Confusion(name, splits.labels, counts.tolist())
