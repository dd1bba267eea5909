"""Metrics of fine-tuned models; trains a classifier with one seed and keeps the weights of the best validation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unmask.core import rng
from unmask.core.distributed import DistributedContext
from unmask.core.errors import RunError
from unmask.core.quantities import Fraction
from unmask.training.finetuning.encode import LabeledData, LabeledSequence, packed
from unmask.training.finetuning.examples import is_bio
from unmask.training.finetuning.heads import Classifier
from unmask.training.finetuning.settings import FinetuneConfig, Task
from unmask.training.optim import Optimizer, OptimizerConfig, ScheduleConfig, lr_factor_at

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


# Training -------------------------------------------------------------------------------------------------------------


_BETA2: Final = 0.999  # of BERT (arXiv 1810.04805, A.3)
_WARMUP_STEPS, _TIMED_STEPS = 2, 6  # of the measurement that converts seconds to steps


@dataclass(frozen=True)
class Splits:
    """Encoded data: training, validation and, if given, test; `labels` are their names, () for a regression."""

    task: Task
    labels: tuple[str, ...]
    train: LabeledData
    valid: LabeledData
    test: LabeledData | None

    @property
    def main_metric(self) -> str:
        """Name of the metric that chooses the best validation and the best seed."""
        if self.task == "regress":
            return "pearson"
        return "span_f1" if self.task == "tokens" and is_bio(self.labels) else "accuracy"

    @property
    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the training labels of a regression, whose network predicts scores."""
        labels = self.train.labels.astype(np.float64)  # squares of large or small numbers exceed float32
        return float(labels.mean()), float(labels.std())

    def metrics(self, data: LabeledData, predictions: NDArray[Any]) -> dict[str, float]:
        """Return the metrics of predictions, one for each row of the data."""
        if self.task == "regress":
            return regression_metrics(data.labels, predictions)
        if self.task == "tokens":
            return tagging_metrics(data.labels, predictions, self.labels, data.sentence_starts)
        return classification_metrics(data.labels, predictions, len(self.labels))

    def rank(self, metrics: Metrics) -> float:
        """Return the main metric for comparisons; a correlation that doesn't exist is the worst."""
        value = metrics[self.main_metric]
        return -math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class TrainProgress:
    """State of a run between two steps."""

    fraction: float
    epoch: float
    epochs: float
    loss: float  # of the last step
    examples_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class SeedResult:
    """The best validation of a run with one seed, and the results on the test data at that time."""

    seed: int
    epoch: float  # of the best validation
    valid: Metrics
    test: Metrics | None
    valid_predictions: NDArray[Any]
    test_predictions: NDArray[Any] | None


def fit(
    classifier: Classifier,
    splits: Splits,
    config: FinetuneConfig,
    context: DistributedContext,
    *,
    seed: int,
    steps: int,
    on_step: Callable[[TrainProgress], None],
) -> SeedResult:
    """Train a classifier in place; it ends with the weights of its best validation.

    Validation follows each epoch and the last step. On a CPU, the result is a function of the arguments.

    Raises:
        RunError: the loss is not finite.
    """
    lr = config.learning_rate(classifier.encoder.hidden_size)
    settings = OptimizerConfig(kind="adamw", lr=lr, weight_decay=config.weight_decay, beta2=_BETA2)
    schedule = ScheduleConfig(kind="linear", warmup=Fraction(config.warmup))
    optimizer = Optimizer(classifier, settings)
    per_epoch = steps_per_epoch(splits.train, config)
    best, best_state, best_at, unimproved = -math.inf, _state(classifier), 0, 0
    metrics: Metrics = {}
    start, evaluating = time.monotonic(), 0.0
    for step, batch in zip(range(steps), _training_batches(splits.train, config, seed), strict=False):
        torch.manual_seed(rng.integer(seed, "finetune dropout", step))
        factor = lr_factor_at(schedule, step / steps, step, classifier.encoder.hidden_size)
        loss = _train_step(classifier, optimizer, batch, splits, context, factor)
        done = step + 1
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is not finite in step {step:,}", location=f"--lr {lr:g}", hint="lower the learning rate"
            )
        spent = time.monotonic() - start - evaluating
        rate = done * config.batch_size / spent
        left = (steps - done) * (spent + evaluating) / done
        on_step(TrainProgress(done / steps, done / per_epoch, steps / per_epoch, loss, rate, left))
        if done % per_epoch and done != steps:
            continue
        before = time.monotonic()
        now = splits.metrics(splits.valid, predict(classifier, splits.valid, splits, context))
        evaluating += time.monotonic() - before
        if not metrics or splits.rank(now) > best:
            best, best_state, best_at, metrics = splits.rank(now), _state(classifier), done, now
            unimproved = 0
        else:
            unimproved += 1
        if unimproved == config.patience:
            break
    classifier.load_state_dict(best_state)
    valid = predict(classifier, splits.valid, splits, context)
    test = None if splits.test is None else predict(classifier, splits.test, splits, context)
    return SeedResult(
        seed=seed,
        epoch=best_at / per_epoch,
        valid=metrics,
        test=None if test is None or splits.test is None else splits.metrics(splits.test, test),
        valid_predictions=valid,
        test_predictions=test,
    )


def _state(classifier: Classifier) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in classifier.state_dict().items()}


def steps_per_epoch(train: LabeledData, config: FinetuneConfig) -> int:
    """Return the number of steps in which all training examples are used once."""
    return -(-len(train.sequences) // config.batch_size)


def _training_batches(train: LabeledData, config: FinetuneConfig, seed: int) -> Iterator[list[LabeledSequence]]:
    """Yield batches without end: each epoch has all examples, in an order of its own."""
    epoch, count = 0, len(train.sequences)
    while True:
        order = rng.permute(np.arange(count), count, seed, "finetune order", epoch).tolist()
        for first in range(0, count, config.batch_size):
            yield [train.sequences[number] for number in order[first : first + config.batch_size]]
        epoch += 1


def _train_step(
    classifier: Classifier,
    optimizer: Optimizer,
    sequences: Sequence[LabeledSequence],
    splits: Splits,
    context: DistributedContext,
    lr_factor: float,
) -> float:
    """Update the weights by the mean loss over the labels of a batch, and return this loss."""
    classifier.train()
    batch, positions_M, labels_M = packed(sequences)
    labels_M = labels_M.to(context.device)
    with context.autocast():
        scores_MC = classifier(batch.to(context.device), positions_M.to(context.device))
    if splits.task == "regress":
        mean, deviation = splits.scale
        loss = F.mse_loss(scores_MC[:, 0].float(), (labels_M - mean) / deviation)
    else:
        loss = F.cross_entropy(scores_MC.float(), labels_M)
    optimizer.zero_grad()
    loss.backward()
    optimizer.clip()
    optimizer.step(lr_factor)
    return loss.item()


@torch.inference_mode()
def predict(classifier: Classifier, data: LabeledData, splits: Splits, context: DistributedContext) -> NDArray[Any]:
    """Return the predicted number of a label, or the predicted value of a regression, for each row.

    A word without a token gets the most frequent label of the training data.
    """
    classifier.eval()
    is_regression = splits.task == "regress"
    default = 0 if is_regression else np.bincount(splits.train.labels.astype(np.int64)).argmax()
    predictions = np.full(len(data.labels), default, np.float32 if is_regression else np.int64)
    mean, deviation = splits.scale if is_regression else (0.0, 1.0)
    for sequences in data.batches():
        batch, positions_M, _ = packed(sequences)
        with context.autocast():
            scores_MC = classifier(batch.to(context.device), positions_M.to(context.device)).float()
        values_M = scores_MC[:, 0] * deviation + mean if is_regression else scores_MC.argmax(-1)
        predictions[np.concatenate([sequence.rows for sequence in sequences])] = values_M.cpu().numpy()
    return predictions


@torch.no_grad()
def fold_scale(classifier: Classifier, splits: Splits) -> None:
    """Change the last linear map of a regression so that it predicts values in the units of the labels."""
    mean, deviation = splits.scale
    linear = classifier.head.classifier
    linear.weight.mul_(deviation)
    linear.bias.mul_(deviation).add_(mean)


def planned_steps(classifier: Classifier, splits: Splits, config: FinetuneConfig, context: DistributedContext) -> int:
    """Return the number of steps of each run; seconds are converted by timing some steps of a copy of the model."""
    budget, per_epoch = config.budget, steps_per_epoch(splits.train, config)
    if budget.unit == "steps":
        return max(1, round(budget.number))
    if budget.unit == "epochs":
        return max(1, round(budget.number * per_epoch))
    trial = copy.deepcopy(classifier)
    optimizer = Optimizer(trial, OptimizerConfig(kind="adamw"))
    batches = _training_batches(splits.train, config, 0)
    start = 0.0
    for step in range(_WARMUP_STEPS + _TIMED_STEPS):
        if step == _WARMUP_STEPS:
            start = time.monotonic()
        _train_step(trial, optimizer, next(batches), splits, context, 1.0)
    seconds_per_step = (time.monotonic() - start) / _TIMED_STEPS
    start = time.monotonic()
    predict(trial, splits.valid, splits, context)
    validation = time.monotonic() - start  # once per epoch and at the end
    return max(1, int((budget.number - validation) / (seconds_per_step + validation / per_epoch)))
