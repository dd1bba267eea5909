"""The command that fine-tunes a model on labeled data."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.options import Force, Json, ModelPath, Threads, open_display, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.training.finetuning.report import Confusion, FinetuneReport
    from unmask.training.finetuning.train import Estimate

FINETUNE_EXAMPLES = """\
[bold]Examples[/bold]

unmask finetune runs/notes --task classify --train train.tsv --valid valid.tsv --test test.tsv
unmask finetune runs/notes --task classify --train train.tsv --valid valid.tsv --baselines --out models/reviews
unmask finetune runs/notes --task pair --train pairs.jsonl --valid valid.jsonl --label-field entailment
unmask finetune runs/notes --task tokens --train train.conll --valid valid.conll --json
"""
_LABELS_SHOWN = 12  # in the table of confusions
_PAIRS_SHOWN = 10  # confusions of more labels
_NAMES = {"macro_f1": "macro F1", "span_f1": "span F1", "matthews": "Matthews", "pearson": "Pearson",
          "spearman": "Spearman", "rmse": "RMSE"}  # fmt: skip


Task = Annotated[
    Literal["classify", "regress", "pair", "tokens"],
    typer.Option(help="classify: texts; pair: pairs of texts; regress: numbers; tokens: tags of words."),
]
Train = Annotated[
    Path, typer.Option(metavar="FILE", help="Labeled data: .csv, .tsv, .jsonl, .parquet; for tokens also CoNLL.")
]
Valid = Annotated[Path, typer.Option(metavar="FILE", help="Labeled data that chooses the epoch and the best seed.")]
Test = Annotated[Path | None, typer.Option(metavar="FILE", help="Labeled data for the final scores.")]
Out = Annotated[
    Path | None, typer.Option(metavar="OUT", help="Folder to write the best model to.", show_default="not saved")
]
Seeds = Annotated[int, typer.Option(help="Number of runs, for the standard error.")]
Baselines = Annotated[
    bool, typer.Option("--baselines", help="Also train from random weights, and a bag of words.", show_default=False)
]
Epochs = Annotated[float | None, typer.Option(help="Length of each run in epochs.", show_default="4")]
Budget = Annotated[
    str | None, typer.Option(help='Length of each run: "500 steps", "60 s" or "4 epochs".', show_default="4 epochs")
]
Patience = Annotated[int, typer.Option(help="Validations without improvement after which a run ends.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate.", show_default="by the width of the model")
]
BatchSize = Annotated[int, typer.Option(help="Number of examples per step.")]
MaxSeqLen = Annotated[
    int | None, typer.Option(help="Maximum length of a sequence in tokens.", show_default="the context, at most 256")
]
Pooling = Annotated[
    Literal["cls", "mean"] | None,
    typer.Option(help="Vector of a text: its first token, or the mean.", show_default="mean; of BERT cls"),
]
TextField = Annotated[
    str | None, typer.Option(help="Column of the text, or of the tokens.", show_default="text, sentence, …")
]
SecondField = Annotated[
    str | None, typer.Option(help="Column of the second text of a pair.", show_default="second, sentence2, …")
]
LabelField = Annotated[str | None, typer.Option(help="Column of the label, or of the tags.", show_default="label, …")]
Quoting = Annotated[
    Literal["csv", "none"],
    typer.Option(help="Quotes in tables: csv encloses cells in them, none reads them as characters."),
]


def finetune_model(
    model: ModelPath,
    task: Task,
    train: Train,
    valid: Valid,
    test: Test = None,
    out: Out = None,
    force: Force = False,
    seeds: Seeds = 3,
    baselines: Baselines = False,
    epochs: Epochs = None,
    budget: Budget = None,
    patience: Patience = 2,
    lr: LearningRate = None,
    batch_size: BatchSize = 32,
    max_seq_len: MaxSeqLen = None,
    pooling: Pooling = None,
    text_field: TextField = None,
    second_field: SecondField = None,
    label_field: LabelField = None,
    quoting: Quoting = "csv",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on labeled data with several seeds, and report mean scores with their standard errors.

    The labels are found in the training data. Each run keeps the weights of its best validation, and test data is
    scored with these. The best run in validation is saved in the format of transformers.
    """
    from unmask.training.finetuning.api import finetune

    with open_display(sys.stderr) as display:
        report = finetune(
            model,
            task=task,
            train=train,
            valid=valid,
            test=test,
            out=out,
            force=force,
            seeds=seeds,
            epochs=epochs,
            budget=budget,
            patience=patience,
            lr=lr,
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            pooling=pooling,
            baselines=baselines,
            text_field=text_field,
            second_field=second_field,
            label_field=label_field,
            quoting=quoting,
            threads=threads,
            display=display,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)


def _print_report(report: FinetuneReport) -> None:
    """Print facts, scores and confusions: tables in a terminal, aligned lines in a pipe."""
    from rich.console import Console

    from unmask.core.format import duration

    console = Console(highlight=False, soft_wrap=True)
    settings = report.settings
    print(f"model       {report.model} ({report.kind}), task {report.task}")
    examples = ", ".join(f"{name} {count:,}" for name, count in report.examples.items())
    labels = f"; {len(report.labels):,} labels" if report.labels else ""
    print(f"examples    {examples}{labels}")
    print(
        f"training    {settings['steps']:,} steps of {settings['batch_size']} examples at most, lr {settings['lr']:g}, "
        f"sequences of {settings['max_seq_len']} tokens, seeds {len(report.seeds)}, {duration(report.seconds)}"
    )
    for note in report.notes:
        print(f"note        {note}")
    parts = [part for part in ("test", "valid") if part in report.examples]
    for part in parts:
        rows = [(row.name, row.test if part == "test" else row.valid) for row in report.rows]
        print()
        _print_table(console, [part, *(_NAMES.get(name, name) for name in rows[0][1])], [_cells(*row) for row in rows])
    epochs = ", ".join(f"{seed.epoch:g}" for seed in report.seeds)
    print(
        f"\nbest epochs {epochs}; best seed {report.best_seed} by {_NAMES.get(report.main_metric, report.main_metric)}"
    )
    if report.confusion is not None:
        print()
        _print_confusion(console, report.confusion, report.best_seed)
    if report.saved is not None:
        saved = report.saved
        difference = "" if saved.difference is None else f"; scores differ from transformers by {saved.difference:.1e}"
        print(f"\nwritten     {saved.path}: {saved.architecture}{difference}")


def _cells(name: str, scores: Mapping[str, Estimate]) -> list[str]:
    from unmask.training.finetuning.report import estimate_text

    return [name, *(estimate_text(score, metric) for metric, score in scores.items())]


def _print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    if console.is_terminal:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for number, row in enumerate(rows):
            table.add_row(*(Text(cell, "" if number else "bold") for cell in row))
        console.print(table)
        return
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            " " * (width - cell_len(cell)) + cell if number else cell + " " * (width - cell_len(cell))
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_confusion(console: Console, confusion: Confusion, seed: int) -> None:
    """Print the counts of labels and predictions; of many labels, the most frequent confusions."""
    from unmask.core.format import visible

    labels = [visible(label) for label in confusion.labels]
    if len(labels) <= _LABELS_SHOWN:
        rows = [[label, *map(str, counts)] for label, counts in zip(labels, confusion.counts, strict=True)]
        print(f"confusion of seed {seed} ({confusion.split}): labels in rows, predictions in columns")
        _print_table(console, ["", *labels], rows)
        return
    wrong = [
        (count, labels[row], labels[column])
        for row, counts in enumerate(confusion.counts)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    print(f"most frequent confusions of seed {seed} ({confusion.split})")
    rows = [[label, prediction, str(count)] for count, label, prediction in sorted(wrong, reverse=True)[:_PAIRS_SHOWN]]
    _print_table(console, ["label", "prediction", "count"], rows)
