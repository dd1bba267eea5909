"""The command `finetune`: its output for people and programs, and the errors of its input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

ROWS = [("1", "the cat sat"), ("0", "the dog sat"), ("1", "a cat on the mat"), ("0", "the log and the dog")] * 5
TASK = ("--task", "classify", "--train", "train.tsv", "--valid", "valid.tsv")
QUICK = ("--seeds", "2", "--epochs", "2", "--batch-size", "8", "--threads", "1")


def write(name: str, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("label", "text")) -> None:
    Path(name).write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")


@pytest.fixture
def data(run: Path) -> Path:
    """A run, and labeled data in the working folder."""
    write("train.tsv", ROWS)
    write("valid.tsv", ROWS[:6])
    write("test.tsv", ROWS[2:9])
    return run


def test_scores_are_printed_and_the_model_is_written(unmask: Command, data: Path) -> None:
    code, out, err = unmask(
        "finetune", "run", *TASK, "--test", "test.tsv", "--out", "out", "--baselines", *QUICK
    )  # fmt: skip
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("fine-tuned", "from", "bag", "majority")] == [
        "fine-tuned",
        "from",
        "bag",
        "majority",
    ] * 2
    assert "examples    train 20, valid 6, test 7; 2 labels" in out
    assert "confusion of seed" in out and "written     out: ModernBertForSequenceClassification" in out
    assert "note        6 of 6 examples of valid have a text that also occurs in train" in out
    assert "seed 0: accuracy valid" in err and "seed 1: accuracy valid" in err
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "config.json", "finetune.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    code, _, err = unmask("finetune", "run", *TASK, "--out", "out", *QUICK)
    assert code == 2 and "exists already" in err and "--force" in err
    assert unmask("finetune", "run", *TASK, "--out", "out", "--force", *QUICK)[0] == 0


def test_json_has_what_is_printed(unmask: Command, data: Path) -> None:
    code, out, err = unmask("finetune", "run", *TASK, "--json", *QUICK)
    assert code == 0, err
    report = json.loads(out)
    assert report["task"] == "classify" and report["labels"] == ["0", "1"] and report["saved"] is None
    (tuned, majority) = report["rows"]
    assert (tuned["name"], majority["name"]) == ("fine-tuned", "majority class")
    assert set(tuned["valid"]["accuracy"]) == {"mean", "standard_error"} and tuned["test"] == {}
    assert majority["valid"]["accuracy"]["mean"] == 0.5
    assert [seed["seed"] for seed in report["seeds"]] == [0, 1]
    assert len(report["confusion"]["counts"]) == 2


def test_of_many_labels_the_most_frequent_confusions_are_printed(unmask: Command, data: Path) -> None:
    rows = [(f"label {number}", "the cat") for number in range(14)] * 2 + [("label 3", "the cat")] * 9
    write("train.tsv", rows)
    write("valid.tsv", rows[:14])
    code, out, err = unmask("finetune", "run", *TASK, *QUICK)
    assert code == 0, err
    table = out[out.index("most frequent confusions of seed") :].splitlines()
    assert table[1].split() == ["label", "prediction", "count"] and len(table) == 12
    assert all(line.endswith(" 1") for line in table[2:]), "the same text has the same prediction"


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ([("1", "a"), ("1", "b")], ("label", "text"), ("same label: '1'", "train.tsv, line 2")),
        ([("1", "a"), ("0", " ")], ("label", "text"), ("`text` is empty", "train.tsv, line 3")),
        ([("1", "a"), ("", "b")], ("label", "text"), ("`label` is empty", "train.tsv, line 3")),
        (ROWS, ("score1", "review1"), ("no column `text`", "--text-field", "`score1` and `review1`")),
        ([("1", "a", "b"), ("0", "c")], ("label", "text", "x"), ("2 columns, expected 3", "line 3")),
        ([], ("label", "text"), ("no examples", "train.tsv")),
    ],
)
def test_bad_training_data(
    refused: Refused, data: Path, rows: list[tuple[str, ...]], header: tuple[str, ...], says: tuple[str, ...]
) -> None:
    write("train.tsv", rows, header)
    refused("finetune", "run", *TASK, "--out", "out", *QUICK, says=says)


def test_labels_that_training_lacks(refused: Refused, data: Path) -> None:
    write("test.tsv", [("1", "a"), ("2", "b")])
    says = ("the label '2' of --test does not occur in training", "test.tsv, line 3", "'0' and '1'")
    refused("finetune", "run", *TASK, "--test", "test.tsv", "--out", "out", *QUICK, says=says)


def test_labels_that_are_no_numbers(refused: Refused, data: Path) -> None:
    write("train.tsv", [("1.5", "a"), ("good", "b")])
    arguments = ("--task", "regress", "--train", "train.tsv", "--valid", "valid.tsv", *QUICK)
    refused("finetune", "run", *arguments, says=("'good' is not a number", "train.tsv, line 3"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seeds", "0"), ("invalid seeds", "--seeds")),
        (("--lr", "0"), ("invalid lr", "--lr")),
        (("--batch-size", "0"), ("invalid batch_size", "--batch-size")),
        (("--epochs", "0"), "invalid number of epochs: got 0"),
        (("--epochs", "-1"), "invalid number of epochs: got -1"),
        (("--epochs", "nan"), "invalid number of epochs: got nan"),
        (("--budget", "5 tokens"), "invalid budget"),
        (("--budget", "5"), "needs a unit"),
        (("--budget", "5 steps", "--epochs", "2"), "both epochs and a budget"),
        (("--max-seq-len", "100000"), "reads at most"),
        (("--max-seq-len", "4"), "invalid max_seq_len"),
        (("--threads", "100000"), ("invalid threads", "--threads 100000")),
        (("--second-field", "text"), "--task pair"),
        (("--label-field", "kind"), ("no column `kind`", "`label` and `text`")),
        (("--valid", "nothing.tsv"), "nothing.tsv"),
        (("--train", "cat.txt"), ("cat.txt", "ends in .csv")),
    ],
)
def test_bad_options(refused: Refused, data: Path, arguments: tuple[str, ...], says: str | tuple[str, ...]) -> None:
    quick = ("--threads", "1") if "--epochs" in arguments or "--budget" in arguments else QUICK
    refused("finetune", "run", *TASK, *quick, *arguments, "--out", "out", says=says)


def test_an_output_that_is_not_a_model_is_not_replaced(refused: Refused, data: Path) -> None:
    Path("kept").mkdir()
    Path("kept/notes.txt").write_text("mine")
    refused("finetune", "run", *TASK, "--out", "kept", "--force", *QUICK, says="not a model directory")
    refused("finetune", "run", *TASK, "--out", "run", "--force", *QUICK, says="is or contains the input")


def test_a_model_without_a_class_for_classification(refused: Refused, data: Path) -> None:
    shutil.rmtree("run")
    refused("finetune", "run", *TASK, says="the path doesn't exist")
