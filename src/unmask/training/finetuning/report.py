"""The result of a fine-tuning: scores over seeds, the confusion of labels, and baselines without a pretrained model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unmask.training.finetuning.encode import LabeledData
from unmask.training.finetuning.examples import Example
from unmask.training.finetuning.settings import Task
from unmask.training.finetuning.train import Estimate, SeedResult, Splits, confusion_matrix


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


# Baselines ------------------------------------------------------------------------------------------------------------


Predictions = list[NDArray[Any]]  # of each split

_WORD: Final = re.compile(r"\w+|[^\w\s]")
_NGRAMS: Final = (2, 3, 4)  # characters
_MIN_COUNT: Final = 2  # texts that contain a feature
_MAX_FEATURES: Final = 200_000
_MAX_CHARACTERS: Final = 2_000  # of a text
_DECAYS: Final = (1e-6, 1e-5, 1e-4, 1e-3)  # factors on the squared weights; the best in validation is taken
_ITERATIONS: Final = 60


def majority(splits: Splits, evaluated: Sequence[LabeledData]) -> Predictions:
    """Return the most frequent training label, or the mean of a regression, for each row."""
    if splits.task == "regress":
        return [np.full(len(data.labels), splits.scale[0], np.float32) for data in evaluated]
    most = int(np.bincount(splits.train.labels.astype(np.int64)).argmax())
    return [np.full(len(data.labels), most, np.int64) for data in evaluated]


def most_frequent_tags(splits: Splits, examples: Sequence[Sequence[Example]]) -> Predictions:
    """Return the tag that each word has most often in training; for an unknown word, the most frequent tag.

    Args:
        splits: the encoded data.
        examples: the sentences of training, then those of the splits to predict.
    """
    number = {label: index for index, label in enumerate(splits.labels)}
    counts: dict[str, Counter[str]] = {}
    for example in examples[0]:
        for word, tag in zip(example.texts, example.labels, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    usual = {word: number[max(sorted(tags), key=tags.__getitem__)] for word, tags in counts.items()}
    default = int(np.bincount(splits.train.labels.astype(np.int64)).argmax())
    return [
        np.array([usual.get(word, default) for example in part for word in example.texts], np.int64)
        for part in examples[1:]
    ]


def bag_of_words(
    splits: Splits, examples: Sequence[Sequence[Example]], on_progress: Callable[[float], None]
) -> Predictions:
    """Return the predictions of a linear model over words and character n-grams with tf-idf weights.

    It is a logistic regression, for numbers a linear one, whose weight decay is chosen in validation.

    Args:
        splits: the encoded data.
        examples: the examples of training, validation and, if there is one, test.
        on_progress: called with the fraction that is done.
    """
    counted = [[Counter(_features(example)) for example in part] for part in examples]
    texts = Counter(feature for counts in counted[0] for feature in counts)
    common = sorted(((-count, name) for name, count in texts.items() if count >= _MIN_COUNT))[:_MAX_FEATURES]
    if not common:
        return majority(splits, [data for data in (splits.valid, splits.test) if data is not None])
    columns = {name: column for column, (_, name) in enumerate(common)}
    idf = np.log(len(counted[0]) / -np.array([count for count, _ in common], np.float64)) + 1
    matrices = [_matrix(part, columns, idf) for part in counted]
    best: tuple[float, Predictions] | None = None
    for number, decay in enumerate(_DECAYS, 1):
        on_progress(number / (len(_DECAYS) + 1))
        weights = _linear_model(matrices[0], splits, decay)
        predictions = [_predicted(matrix, weights, splits) for matrix in matrices[1:]]
        rank = splits.rank(splits.metrics(splits.valid, predictions[0]))
        if best is None or rank > best[0]:
            best = rank, predictions
    on_progress(1.0)
    assert best is not None
    return best[1]


def _features(example: Example) -> Iterator[str]:
    """Yield the words and character n-grams of a text; those of a second text are features of their own."""
    for number, text in enumerate(example.texts):
        words = _WORD.findall(text[:_MAX_CHARACTERS].casefold())
        yield from (f"{number} {word}" for word in words)
        joined = f" {' '.join(words)} "
        for size in _NGRAMS:
            yield from (f"{number}{size}{joined[at : at + size]}" for at in range(len(joined) - size + 1))


def _matrix(texts: Sequence[Counter[str]], columns: dict[str, int], idf: NDArray[np.float64]) -> Tensor:
    """Return a sparse matrix with a row of length 1 for each text, (1 + log count) times the idf of each feature."""
    ends, indices, values = [0], list[NDArray[np.int64]](), list[NDArray[np.float32]]()
    for counts in texts:
        known = [(columns[name], count) for name, count in counts.items() if name in columns]
        index = np.array([column for column, _ in known], np.int64)
        value = (1 + np.log(np.array([count for _, count in known], np.float64))) * idf[index]
        indices.append(index)
        values.append((value / max(float(np.linalg.norm(value)), 1e-12)).astype(np.float32))
        ends.append(ends[-1] + len(known))
    rows = np.repeat(np.arange(len(texts)), np.diff(ends))
    places = torch.from_numpy(np.stack([rows, np.concatenate(indices)]))
    numbers = torch.from_numpy(np.concatenate(values))
    return torch.sparse_coo_tensor(places, numbers, (len(texts), len(columns)), check_invariants=True).coalesce()


def _linear_model(matrix_NF: Tensor, splits: Splits, decay: float) -> tuple[Tensor, Tensor]:
    """Return weights (F, C) and bias (C) that minimize the mean loss plus the decayed squares of the weights."""
    is_regression = splits.task == "regress"
    outputs = 1 if is_regression else len(splits.labels)
    labels_N = torch.from_numpy(splits.train.labels)
    mean, deviation = splits.scale if is_regression else (0.0, 1.0)
    transposed_FN = matrix_NF.t().coalesce()
    weight_FC = torch.zeros(matrix_NF.shape[1], outputs, requires_grad=True)
    bias_C = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_FC, bias_C], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        scores_NC = (torch.sparse.mm(matrix_NF, weight_FC.detach()) + bias_C.detach()).requires_grad_()
        if is_regression:
            loss = F.mse_loss(scores_NC[:, 0], (labels_N - mean) / deviation)
        else:
            loss = F.cross_entropy(scores_NC, labels_N)
        (gradient_NC,) = torch.autograd.grad(loss, scores_NC)
        weight_FC.grad = torch.sparse.mm(transposed_FN, gradient_NC) + 2 * decay * weight_FC.detach()
        bias_C.grad = gradient_NC.sum(0)
        return loss.detach() + decay * weight_FC.detach().square().sum()

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] (a loss without a graph)
    return weight_FC.detach(), bias_C.detach()


def _predicted(matrix_NF: Tensor, weights: tuple[Tensor, Tensor], splits: Splits) -> NDArray[Any]:
    scores_NC = torch.sparse.mm(matrix_NF, weights[0]) + weights[1]
    if splits.task == "regress":
        mean, deviation = splits.scale
        return (scores_NC[:, 0] * deviation + mean).numpy()
    return scores_NC.argmax(-1).numpy()
