"""Fine-tuning learns, repeats, compares itself with baselines, and saves what pipelines open."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unmask
from unmask.core.errors import ModelError, RecipeError, RunError, TextError
from unmask.training.finetuning.report import FinetuneReport

QUICK: dict[str, Any] = {"epochs": 8, "batch_size": 16, "lr": 3e-3, "threads": 1, "display": None}


def classify(model: Path, splits: dict[str, Path], **options: Any) -> FinetuneReport:
    return unmask.finetune(model, task="classify", **{**splits, **QUICK, "seeds": 2, **options})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tuned(
    models: dict[str, Path], splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[FinetuneReport, Path]]:
    """Reports and folders of two architectures, with baselines."""
    folder = tmp_path_factory.mktemp("tuned")
    return {
        name: (classify(models[name], splits, out=folder / name, baselines=True), folder / name)
        for name in ("bert", "modernbert")
    }


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_it_learns_and_reports_every_method(tuned: dict[str, tuple[FinetuneReport, Path]], name: str) -> None:
    report, _ = tuned[name]
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["fine-tuned", "from scratch", "bag of words", "majority class"]
    assert rows["fine-tuned"].test["accuracy"].mean > 0.9
    assert rows["bag of words"].test["accuracy"].mean > 0.9  # one word decides
    assert 0.4 < rows["majority class"].test["accuracy"].mean < 0.6
    assert rows["majority class"].test["matthews"].mean == 0
    assert [row.runs for row in report.rows] == [2, 2, 1, 1]
    assert rows["majority class"].test["accuracy"].standard_error is None
    values = [seed.test["accuracy"] for seed in report.seeds if seed.test]
    assert rows["fine-tuned"].test["accuracy"].mean == pytest.approx(sum(values) / 2)
    assert rows["fine-tuned"].test["accuracy"].standard_error == pytest.approx(abs(values[0] - values[1]) / 2)
    assert report.examples == {"train": 200, "valid": 40, "test": 60} and report.labels == ("neg", "pos")
    assert report.confusion is not None and report.confusion.split == "test"
    assert sum(map(sum, report.confusion.counts)) == 60
    best = next(seed for seed in report.seeds if seed.seed == report.best_seed)
    assert best.valid["accuracy"] == max(seed.valid["accuracy"] for seed in report.seeds)
    diagonal = report.confusion.counts[0][0] + report.confusion.counts[1][1]
    assert best.test is not None and diagonal / 60 == pytest.approx(best.test["accuracy"])
    assert ("initialized the pooler: the model was pretrained without one" in report.notes) == (name == "bert")


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_saved_model_is_that_of_the_report_in_a_pipeline(
    tuned: dict[str, tuple[FinetuneReport, Path]], splits: dict[str, Path], name: str
) -> None:
    from transformers import pipeline

    report, folder = tuned[name]
    assert report.saved is not None and report.saved.difference is not None and report.saved.difference < 1e-4
    assert json.loads((folder / "finetune.json").read_text()) == json.loads(json.dumps(report.as_dict()))
    assert json.loads((folder / "config.json").read_text())["problem_type"] == "single_label_classification"
    rows = [line.split("\t") for line in splits["test"].read_text().splitlines()[1:]]
    answers = pipeline("text-classification", model=str(folder), device="cpu")([text for _, text in rows])
    accuracy = np.mean([answer["label"] == label for answer, (label, _) in zip(answers, rows, strict=True)])
    best = next(seed for seed in report.seeds if seed.seed == report.best_seed)
    assert best.test is not None and accuracy == pytest.approx(best.test["accuracy"])


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_scores(
    models: dict[str, Path], splits: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (classify(models["modernbert"], splits, out=tmp_path / name, epochs=1) for name in "ab")
    assert first.seeds == second.seeds and first.rows == second.rows
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    state = torch.get_rng_state()
    one = classify(models["modernbert"], splits, epochs=1, seeds=1)
    assert one.seeds == first.seeds[:1], "a seed's run doesn't depend on the number of seeds"
    assert first.seeds[0].valid != first.seeds[1].valid
    assert torch.equal(state, torch.get_rng_state()), "the generator of the caller is left as it was"


def test_training_stops_without_improvement_and_keeps_the_best(
    models: dict[str, Path], splits: dict[str, Path]
) -> None:
    report = classify(models["modernbert"], splits, epochs=1000, patience=1, seeds=1)
    assert report.seeds[0].epoch < 100
    assert report.rows[0].valid["accuracy"].mean > 0.9


def test_a_budget_in_steps_is_exact_and_one_in_seconds_is_planned(
    models: dict[str, Path], splits: dict[str, Path]
) -> None:
    report = classify(models["bert"], splits, epochs=None, budget="5 steps", seeds=1)
    assert report.settings["steps"] == 5 and report.seeds[0].epoch == pytest.approx(5 / 13)
    report = classify(models["bert"], splits, epochs=None, budget="0.2 s", seeds=1)
    assert isinstance(report.settings["steps"], int) and report.settings["steps"] >= 1


def test_numbers_are_predicted_in_their_units(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import pipeline

    draw = random.Random(5)
    rows = [
        {"text": " ".join(draw.choices(("film", "music"), k=3) + ["good"] * count), "label": 1000 + 50 * count}
        for count in draw.choices(range(5), k=160)
    ]
    train, valid = write(tmp_path / "train.jsonl", rows[:120]), write(tmp_path / "valid.jsonl", rows[120:])
    out = tmp_path / "out"
    report = unmask.finetune(
        models["modernbert"], task="regress", train=train, valid=valid, out=out, seeds=1, baselines=True, **QUICK
    )
    rows_by_name = {row.name: row for row in report.rows}
    assert list(rows_by_name) == ["fine-tuned", "from scratch", "bag of words", "mean"]
    assert report.main_metric == "pearson" and report.confusion is None and not report.labels
    assert rows_by_name["fine-tuned"].valid["pearson"].mean > 0.8
    assert rows_by_name["bag of words"].valid["pearson"].mean > 0.8
    assert np.isnan(rows_by_name["mean"].valid["pearson"].mean)
    assert report.as_dict()["rows"][3]["valid"]["pearson"]["mean"] is None
    scores = pipeline("text-classification", model=str(out), device="cpu")([row["text"] for row in rows[120:]])
    errors = [score["score"] - row["label"] for score, row in zip(scores, rows[120:], strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(rows_by_name["fine-tuned"].valid["rmse"].mean, rel=1e-3)


def test_pairs_are_learned(models: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(6)
    rows = [
        {"sentence1": draw.choice(("good", "bad")), "sentence2": draw.choice(("film", "music")), "label": ""}
        for _ in range(200)
    ]
    for row in rows:
        row["label"] = "yes" if row["sentence2"] == "film" else "no"
    train, valid = write(tmp_path / "train.jsonl", rows[:150]), write(tmp_path / "valid.jsonl", rows[150:])
    report = unmask.finetune(models["bert-pair"], task="pair", train=train, valid=valid, seeds=1, **QUICK)
    assert report.rows[0].valid["accuracy"].mean > 0.9 and report.saved is None
    assert report.confusion is not None and report.confusion.split == "valid"
    assert not any("pooler" in note for note in report.notes)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sentences in which two adjectives in a row are a span."""
    draw, folder = random.Random(7), tmp_path_factory.mktemp("tagged")
    paths: dict[str, Path] = {}
    for name, count in (("train", 150), ("valid", 40), ("test", 40)):
        lines: list[str] = []
        for _ in range(count):
            for word in draw.choices(("film", "music", "story", "good"), k=5):
                lines += ["good\tB-ADJ", "lovely\tI-ADJ"] if word == "good" else [f"{word}\tO"]
            lines.append("")
        paths[name] = folder / f"{name}.conll"
        paths[name].write_text("\n".join(lines))
    return paths


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_tags_are_learned_and_a_pipeline_finds_the_spans(
    models: dict[str, Path], tagged: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from transformers import pipeline

    out = tmp_path / "out"
    report = unmask.finetune(models[name], task="tokens", out=out, seeds=1, baselines=True, **tagged, **QUICK)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["fine-tuned", "from scratch", "most frequent tag", "majority class"]
    assert rows["fine-tuned"].test["span_f1"].mean > 0.95
    assert rows["most frequent tag"].test["span_f1"].mean == 1.0
    assert rows["majority class"].test["span_f1"].mean == 0.0
    assert report.main_metric == "span_f1" and report.labels == ("B-ADJ", "I-ADJ", "O")
    found = pipeline("token-classification", model=str(out), device="cpu", aggregation_strategy="first")(
        "film good lovely music"
    )
    assert [(span["entity_group"], span["word"]) for span in found] == [("ADJ", "good lovely")]


def test_a_model_without_a_class_is_an_error_before_the_data_is_read(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neomme"):
        classify(models["neomme"], {"train": tmp_path / "none.tsv", "valid": tmp_path / "none.tsv"})


def test_a_loss_that_is_not_finite_is_an_error_and_nothing_is_written(
    models: dict[str, Path], splits: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="not finite"):
        classify(models["bert"], splits, lr=1e30, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_errors_name_keywords(models: dict[str, Path], splits: dict[str, Path]) -> None:
    with pytest.raises(TextError, match="no column `kind`") as caught:
        classify(models["bert"], splits, label_field="kind")
    assert "choose one with label_field (available: `label` and `text`)" in caught.value.hint
    with pytest.raises(RecipeError, match="invalid seeds"):
        classify(models["bert"], splits, seeds=0)
    with pytest.raises(RecipeError, match="both epochs and a budget"):
        classify(models["bert"], splits, budget="5 steps")
    with pytest.raises(RecipeError, match="unknown keyword `epoch`"):
        classify(models["bert"], splits, epoch=2)


def test_long_texts_are_noted(models: dict[str, Path], splits: dict[str, Path]) -> None:
    report = classify(models["bert"], splits, max_seq_len=8, epochs=1, seeds=1)
    assert any("are longer than 8 tokens" in note for note in report.notes)
    with pytest.raises(RecipeError, match="reads at most 64 tokens, got 65"):
        classify(models["bert"], splits, max_seq_len=65)
