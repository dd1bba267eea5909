"""Metrics agree with scikit-learn and scipy, and spans are counted as conlleval does."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from unmask.training.finetuning.examples import is_bio
from unmask.training.finetuning.train import (
    Estimate,
    classification_metrics,
    confusion_matrix,
    regression_metrics,
    spans_of,
    tagging_metrics,
)

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(pairs)
def test_classification_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs).T
    found = classification_metrics(labels, predictions, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": sk.accuracy_score(labels, predictions),
            "macro_f1": sk.f1_score(labels, predictions, average="macro"),
            "matthews": sk.matthews_corrcoef(labels, predictions),
        }
        counts = sk.confusion_matrix(labels, predictions, labels=[0, 1, 2, 3])
    assert found == pytest.approx(expected, abs=1e-12)
    assert confusion_matrix(labels, predictions, 4).tolist() == counts.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy import stats

    labels, predictions = np.array(pairs, np.float64).T
    assume(labels.std() > 0 and predictions.std() > 0)
    found = regression_metrics(labels, predictions)
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, predictions)[0], abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, predictions)[0], abs=1e-9)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((labels - predictions) ** 2)))


def test_a_constant_prediction_has_no_correlation() -> None:
    found = regression_metrics(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])


def test_spans_begin_at_b_at_a_new_type_and_at_an_inside_tag_without_a_beginning() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "I-LOC", "B-LOC", "I-PER", "O"]
    assert spans_of(tags) == {(0, 2, "PER"), (3, 5, "LOC"), (5, 6, "LOC"), (6, 7, "PER")}


def test_span_f1_counts_a_span_only_if_borders_and_type_agree() -> None:
    names = ("B-LOC", "B-PER", "I-PER", "O")
    labels = np.array([1, 2, 3, 0, 3, 1])
    predictions = np.array([1, 2, 3, 1, 3, 3])
    found = tagging_metrics(labels, predictions, names, np.array([0, 4]))
    assert found == pytest.approx({"span_f1": 0.4, "precision": 0.5, "recall": 1 / 3, "accuracy": 4 / 6})


def test_a_span_never_crosses_sentences() -> None:
    names = ("B-PER", "I-PER", "O")
    labels = np.array([0, 1])
    assert tagging_metrics(labels, labels, names, np.array([0, 1]))["span_f1"] == 1.0
    crossing = tagging_metrics(np.array([0, 1]), np.array([0, 2]), names, np.array([0, 1]))
    assert crossing["recall"] == 0.5


def test_tags_of_parts_of_speech_have_an_accuracy_only() -> None:
    assert not is_bio(("NOUN", "VERB")) and not is_bio(("I", "O")) and is_bio(("B-X", "I-X", "O"))
    labels = np.array([0, 1, 1])
    assert tagging_metrics(labels, np.array([0, 1, 0]), ("NOUN", "VERB"), np.array([0])) == {"accuracy": 2 / 3}


def test_the_standard_error_is_that_of_a_mean() -> None:
    estimate = Estimate.of([0.80, 0.82, 0.84])
    assert estimate.mean == pytest.approx(0.82)
    assert estimate.standard_error == pytest.approx(0.02 / math.sqrt(3))
    assert Estimate.of([0.5]).standard_error is None
