"""Metrics of fine-tuned models, and mean and standard error over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.integer[Any]] | NDArray[np.floating[Any]]
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over runs with its standard error; None with a single run."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate of a metric from its values in several runs."""
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(np.mean(values)), error)


def confusion_matrix(labels: Numbers, predictions: Numbers, num_labels: int) -> NDArray[np.int64]:
    """Return counts (num_labels, num_labels): a row for each label, a column for each prediction."""
    flat = labels.astype(np.int64) * num_labels + predictions.astype(np.int64)
    return np.bincount(flat, minlength=num_labels**2).reshape(num_labels, num_labels)


def classification_metrics(labels: Numbers, predictions: Numbers, num_labels: int) -> dict[str, float]:
    """Return accuracy, macro-averaged F1 and Matthews correlation.

    F1 is averaged over the labels that occur among labels or predictions. The correlation is that of several classes
    (Gorodkin 2004); it is 0 if all labels or all predictions are equal.
    """
    counts = confusion_matrix(labels, predictions, num_labels).astype(np.float64)
    correct, actual, predicted, total = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    occurring = (actual + predicted) > 0
    f1 = 2 * correct[occurring] / (actual + predicted)[occurring]
    spread = math.sqrt(float(total**2 - (predicted**2).sum())) * math.sqrt(float(total**2 - (actual**2).sum()))
    covariance = float(correct.sum() * total - (predicted * actual).sum())
    return {
        "accuracy": float(correct.sum() / total),
        "macro_f1": float(f1.mean()),
        "matthews": covariance / spread if spread else 0.0,
    }


def regression_metrics(labels: Numbers, predictions: Numbers) -> dict[str, float]:
    """Return Pearson and Spearman correlation, NaN if all predictions are equal, and the root mean square error."""
    return {
        "pearson": _correlation(labels, predictions),
        "spearman": _correlation(_ranks(labels), _ranks(predictions)),
        "rmse": float(np.sqrt(np.mean((labels.astype(np.float64) - predictions) ** 2))),
    }


def _correlation(a: Numbers, b: Numbers) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((x**2).sum())) * math.sqrt(float((y**2).sum()))
    return float((x * y).sum() / norm) if norm > 0 else math.nan


def _ranks(values: Numbers) -> NDArray[np.float64]:
    """Return the rank of each value; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


Span = tuple[int, int, str]  # first word, word after the last, type


def spans_of(tags: Sequence[str]) -> set[Span]:
    """Return the spans of a sentence in BIO tags. As in conlleval, an I- that continues no span begins one."""
    spans = set[Span]()
    begin, kind = 0, ""
    for number, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        continues = prefix == "I" and name == kind
        if kind and not continues:
            spans.add((begin, number, kind))
        if not continues:
            begin, kind = number, name if prefix in ("B", "I") else ""
    return spans


def is_bio(labels: Sequence[str]) -> bool:
    """Return whether all labels are BIO tags, and at least one begins a span."""
    return all(label == "O" or label.startswith(("B-", "I-")) for label in labels) and any(
        label.startswith("B-") for label in labels
    )


def tagging_metrics(
    labels: Numbers, predictions: Numbers, names: Sequence[str], sentence_starts: NDArray[np.int64]
) -> dict[str, float]:
    """Return the accuracy over words and, of BIO tags, precision, recall and F1 of spans (as conlleval counts them)."""
    metrics = {"accuracy": float((labels == predictions).mean())}
    if not is_bio(names):
        return metrics
    correct = actual = predicted = 0
    for part, guess in zip(
        np.split(labels, sentence_starts[1:]), np.split(predictions, sentence_starts[1:]), strict=True
    ):
        expected, found = (spans_of([names[int(tag)] for tag in tags]) for tags in (part, guess))
        correct, actual, predicted = correct + len(expected & found), actual + len(expected), predicted + len(found)
    precision, recall = correct / max(1, predicted), correct / max(1, actual)
    return {
        "span_f1": 2 * correct / max(1, actual + predicted),
        "precision": precision,
        "recall": recall,
        **metrics,
    }
