"""Fine-tunes exported models with the Trainer of `transformers`: a few steps of sequence classification.

    python benchmarks/trainer.py RUN [RUN ...] --train train.tsv --valid valid.tsv [--steps 60] [--results FILE]

RUN is a run of `unmask pretrain`. It is exported and loaded with AutoTokenizer and AutoModelForSequenceClassification,
without code of unmask. The tables have columns `label` (0 or 1) and `text`. A few steps show that a model can be
fine-tuned, not how good it is.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

ROWS, LENGTH, BATCH = 4096, 64, 32


def read(path: Path, rows: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{"text": row["text"] or "", "labels": int(row["label"])} for row in islice(table, rows)]


def tokenize(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    return [{**tokenizer(row["text"], truncation=True, max_length=LENGTH), "labels": row["labels"]} for row in rows]


def fine_tune(run: Path, train: Path, valid: Path, steps: int, work: Path) -> dict[str, Any]:
    """Exports and fine-tunes a run; returns the accuracy on held-out rows before and after."""
    folder = work / run.name
    subprocess.run([sys.executable, "-m", "unmask", "export", str(run), str(folder)], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    transformers.set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    valid_set = tokenize(read(valid, 1000), tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=5e-4,
            lr_scheduler_type="linear",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=tokenize(read(train, ROWS), tokenizer),  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
    )
    before = trainer.predict(valid_set).metrics or {}  # pyright: ignore[reportArgumentType]
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    after = trainer.predict(valid_set).metrics or {}  # pyright: ignore[reportArgumentType]
    return {
        "run": run.name,
        "class": type(model).__name__,
        "accuracy_before": before["test_accuracy"],
        "accuracy_after": after["test_accuracy"],
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/trainer.json"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for run in arguments.runs:
            row = fine_tune(run, arguments.train, arguments.valid, arguments.steps, Path(work))
            rows.append(row)
            print(
                f"{row['run']:<16} {row['class']:<40} accuracy {row['accuracy_before']:.1%} before, "
                f"{row['accuracy_after']:.1%} after {arguments.steps} steps",
                flush=True,
            )
    results = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": f"python benchmarks/trainer.py RUN ... --train {arguments.train.name} "
        f"--valid {arguments.valid.name} --steps {arguments.steps}",
        "batch": BATCH,
        "valid_rows": 1000,
        "rows": rows,
    }
    arguments.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
