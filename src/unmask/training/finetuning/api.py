"""`finetune`: fine-tunes a model with several seeds, beside baselines, and saves the best one for `transformers`."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, Unpack

import numpy as np
import torch

from unmask.core import files, rng
from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import ModelError, RecipeError
from unmask.core.format import duration
from unmask.core.keywords import python_words
from unmask.core.quantities import Quantity
from unmask.data.settings import QuotingRule
from unmask.hub.from_hf import LEFT_OUT, open_model
from unmask.hub.parity import TOLERANCE, quiet_transformers
from unmask.models import build_model
from unmask.models.model import Model, check_output_directory
from unmask.training.display import Display
from unmask.training.display.live import display_for
from unmask.training.display.plain import PlainDisplay
from unmask.training.finetuning.encode import LabeledData, encode_texts, encode_words, packed
from unmask.training.finetuning.examples import (
    Example,
    labels_of,
    numbers_of,
    overlap_notes,
    read_examples,
    require_span,
)
from unmask.training.finetuning.heads import (
    Classifier,
    HeadShape,
    build_classifier,
    has_token_types,
    save_classifier,
    supported,
    with_pooler,
)
from unmask.training.finetuning.report import (
    FinetuneReport,
    Predictions,
    Row,
    Saved,
    SeedScore,
    bag_of_words,
    confusion_of,
    majority,
    most_frequent_tags,
    row_of,
)
from unmask.training.finetuning.settings import FieldsConfig, FinetuneConfig, Pooling, Task
from unmask.training.finetuning.train import SeedResult, Splits, TrainProgress, fit, fold_scale, planned_steps

RESULTS: Final = "finetune.json"  # the report, beside the saved model
_MAX_SEQ_LEN: Final = 256
# Of a smaller width, a step of 800 tokens is faster in float32 than in bfloat16 on a CPU: 58 against 80 ms for 128.
_BFLOAT16_WIDTH: Final = 256
_COMPARED: Final = 8  # examples whose scores are compared with transformers
_UPDATE_SECONDS, _LINE_SECONDS = 0.25, 10.0  # between updates of the progress in a terminal, and lines in a pipe


class FinetuneOptions(TypedDict, total=False):
    """Keywords of `finetune`: the options of the command `unmask finetune`."""

    seeds: int | None
    epochs: float | None
    budget: str | None
    patience: int | None
    lr: float | None
    batch_size: int | None
    max_seq_len: int | None
    pooling: Pooling | None
    baselines: bool
    text_field: str | None
    second_field: str | None
    label_field: str | None
    quoting: QuotingRule | None
    threads: int | None
    display: Display | Literal["auto"] | None


def finetune(
    model: str | Path,
    *,
    task: Task,
    train: str | Path,
    valid: str | Path,
    test: str | Path | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **options: Unpack[FinetuneOptions],
) -> FinetuneReport:
    """Fine-tune a model with several seeds and return their scores; the keywords are the options of `unmask finetune`.

    Args:
        model: Run, step folder, or folder that transformers saved.
        task: "classify" for texts, "pair" for pairs of texts, "regress" for numbers, "tokens" for tags of words.
        train: Labeled data: .csv, .tsv, .jsonl or .parquet, for tokens also a file with a token and its tag per line.
        valid: Labeled data that chooses the epoch and the best seed.
        test: Labeled data for the final scores.
        out: Folder for the model of the best seed; None: it is not saved.
        force: Whether to replace an existing model folder.
        **options: Keywords, all optional.
            seeds: number of runs (3); epochs: length of each (4), or budget: "500 steps", "60 s".
            patience: validations without improvement after which a run ends (2).
            lr, batch_size (32), max_seq_len (the context, at most 256), threads.
            pooling: "cls" or "mean" of ModernBERT. baselines: also train from random weights, and a bag of words.
            text_field, second_field, label_field: names of the columns. quoting: "csv" or "none".
            display: "auto" shows the progress; None shows nothing.

    Raises:
        UnmaskError: the model, the data or an option is not usable. Nothing is written then.
    """
    config = _config(task, options)
    target = None if out is None else check_output_directory(Path(out), Path(model), force=force)
    shown = options.get("display", "auto")
    display = (display_for(sys.stdout, words=python_words) if shown == "auto" else shown) or Display()
    try:
        paths = {"train": Path(train), "valid": Path(valid)} | ({} if test is None else {"test": Path(test)})
        return _Finetuning.prepare(Path(model), paths, config, display).run(target)
    finally:
        display.close()


def _config(task: Task, options: FinetuneOptions) -> FinetuneConfig:
    """Return the settings for keywords.

    Raises:
        RecipeError: a value is invalid, or there are both a budget and a number of epochs.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None and name != "display"}
    if "epochs" in given and "budget" in given:
        raise RecipeError(
            f"got both epochs and a budget: {given['epochs']:g} and {given['budget']!r}",
            location="--epochs",
            hint='give one of them: --budget "4 epochs"',
        )
    epochs = given.pop("epochs", None)
    if epochs is not None:
        if not 0 < epochs < math.inf:
            raise RecipeError(
                f"invalid number of epochs: got {epochs:g}, expected a number above 0",
                location="--epochs",
                hint="choose a number such as 4",
            )
        given["budget"] = f"{epochs:f} epochs"
    try:
        if "budget" in given:
            given["budget"] = Quantity.parse(given["budget"])
        names = {name: given.pop(f"{name}_field", "") for name in ("text", "second", "label")}
        return FinetuneConfig(task, fields=FieldsConfig(**names, quoting=given.pop("quoting", "csv")), **given)
    except RecipeError as error:
        option = error.location.replace("_", "-") or "budget"
        raise error.at(location=option if option.startswith("-") else f"--{option}") from error


@dataclass(frozen=True)
class _Finetuning:
    """Model and data that were checked and encoded."""

    model: Model
    config: FinetuneConfig
    shape: HeadShape
    longest: int
    examples: Mapping[str, list[Example]]
    splits: Splits
    notes: tuple[str, ...]
    display: Display
    context: DistributedContext

    @classmethod
    def prepare(cls, folder: Path, paths: Mapping[str, Path], config: FinetuneConfig, display: Display) -> _Finetuning:
        """Open the model, read and encode the data.

        Raises:
            UnmaskError: the model or the data is not usable.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError(
                "fine-tuning runs in one process", location="WORLD_SIZE", hint="start it without torchrun"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = with_pooler(open_model(folder))
        settings, pooling = supported(model.settings, model.path, config.pooling)
        examples = {name: read_examples(path, config.task, config.fields) for name, path in paths.items()}
        others = {name: part for name, part in examples.items() if name != "train"}
        labels = () if config.task == "regress" else labels_of(examples["train"], others)
        if config.task == "tokens":
            require_span(examples["valid"], labels)
        longest = config.max_seq_len or min(model.context, _MAX_SEQ_LEN)
        if longest > settings.max_position_embeddings:
            raise RecipeError(
                f"the model reads at most {settings.max_position_embeddings} tokens, got {longest}",
                location=f"--max-seq-len {longest}",
                hint=f"choose at most {settings.max_position_embeddings}",
            )
        is_small = settings.hidden_size < _BFLOAT16_WIDTH and not torch.cuda.is_available()
        threads = "auto" if config.threads is None else config.threads
        try:
            context = init_distributed("float32" if is_small else "auto", threads)
        except RecipeError as error:
            raise error.at(location=f"--threads {threads}") from error
        data: dict[str, LabeledData] = {}
        for name, part in examples.items():
            on_progress = _delayed(display, f"encoding {name}")
            if config.task == "tokens":
                ids = {label: number for number, label in enumerate(labels)}
                data[name] = encode_words(part, ids, model.tokenizer, longest, on_progress=on_progress)
                continue
            data[name] = encode_texts(
                part,
                _labels(part, labels, must_differ=name != "test"),
                model.tokenizer,
                longest,
                token_types=has_token_types(settings),
                on_progress=on_progress,
            )
        kind = "TokenClassification" if config.task == "tokens" else "SequenceClassification"
        # Of a model without a head, the head for masked language modeling is not used, or is noted below.
        notes = [
            note.replace(LEFT_OUT, "left out, as fine-tuning begins with a new classifier")
            for note in model.notes
            if not note.startswith(("initialized ", "left out the pooler"))
        ]
        if model.is_causal:
            notes.append(
                "the model was trained with attention to the left; it is fine-tuned with attention to both sides"
            )
        notes += overlap_notes(examples["train"], others)
        notes += [
            f"{one.num_cut:,} of {len(examples[name]):,} examples of {name} are longer than {longest} tokens; their "
            "end is not read"
            for name, one in data.items()
            if one.num_cut
        ]
        return cls(
            model=model,
            config=config,
            shape=HeadShape(kind, max(1, len(labels)), config.dropout, pooling),
            longest=longest,
            examples=examples,
            splits=Splits(config.task, labels, data["train"], data["valid"], data.get("test")),
            notes=tuple(notes),
            display=display,
            context=context,
        )

    def run(self, target: Path | None) -> FinetuneReport:
        """Train all seeds and baselines, save the best model, and return the report."""
        start = time.monotonic()
        with torch.random.fork_rng():
            best, notes = self._build(0, pretrained=True)
            steps = planned_steps(best, self.splits, self.config, self.context)
            results, best_seed = list[SeedResult](), 0
            for seed in range(self.config.seeds):
                classifier, _ = self._build(seed, pretrained=True)
                result = self._fit(classifier, seed, steps, f"seed {seed}")
                if not results or self._rank(result) > max(map(self._rank, results)):
                    best, best_seed = classifier, seed
                results.append(result)
            rows = [row_of("fine-tuned", results), *self._baselines(steps)]
        splits, examples = self.splits, {name: len(part) for name, part in self.examples.items()}
        report = FinetuneReport(
            task=self.config.task,
            model=self.model.path,
            kind=self.model.settings.kind,
            labels=splits.labels,
            examples=examples,
            main_metric=splits.main_metric,
            rows=rows,
            seeds=[SeedScore(result.seed, result.epoch, result.valid, result.test) for result in results],
            best_seed=best_seed,
            confusion=confusion_of(splits, results[best_seed]),
            settings=self._settings(steps),
            seconds=time.monotonic() - start,
            notes=(*self.notes, *notes),
        )
        return report if target is None else self._save(best.eval(), target, report)

    def _rank(self, result: SeedResult) -> float:
        return self.splits.rank(result.valid)

    def _settings(self, steps: int) -> dict[str, object]:
        config = self.config
        return {
            "budget": str(config.budget),
            "steps": steps,
            "lr": config.learning_rate(self.model.settings.hidden_size),
            "batch_size": config.batch_size,
            "max_seq_len": self.longest,
            "patience": config.patience,
            "pooling": self.shape.pooling if self.shape.kind == "SequenceClassification" else None,
            "precision": self.context.precision,
            "device": self.context.device.type,
        }

    def _build(self, seed: int, *, pretrained: bool) -> tuple[Classifier, list[str]]:
        """Return a classifier with the model's weights, or with random ones, and notes on new weights."""
        model = self.model
        torch.manual_seed(rng.integer(seed, "finetune weights"))
        if pretrained:
            encoder, head, pair = copy.deepcopy((model.encoder, model.head, model.pair))
        else:
            encoder, head = build_model(model.settings, model.encoder.vocab_size)
            pair = None
        classifier, notes = build_classifier(encoder, head, pair, self.shape)
        return classifier.to(self.context.device), notes

    def _fit(self, classifier: Classifier, seed: int, steps: int, name: str) -> SeedResult:
        result = fit(
            classifier,
            self.splits,
            self.config,
            self.context,
            seed=seed,
            steps=steps,
            on_step=_progress_of(self.display, name),
        )
        metric = self.splits.main_metric
        scores = [
            f"{part} {value[metric]:.4f}" for part, value in (("valid", result.valid), ("test", result.test)) if value
        ]
        self.display.message(f"{name}: {metric} {', '.join(scores)} after epoch {result.epoch:g}")
        return result

    def _baselines(self, steps: int) -> list[Row]:
        splits, rows = self.splits, list[Row]()
        evaluated = [data for data in (splits.valid, splits.test) if data is not None]
        is_tokens = splits.task == "tokens"
        if self.config.baselines:
            results = [
                self._fit(self._build(seed, pretrained=False)[0], seed, steps, f"from scratch, seed {seed}")
                for seed in range(self.config.seeds)
            ]
            rows.append(row_of("from scratch", results))
            counted = [self.examples[name] for name in ("train", "valid", "test") if name in self.examples]
            if is_tokens:
                rows.append(self._row("most frequent tag", most_frequent_tags(splits, counted)))
            else:
                predictions = bag_of_words(splits, counted, _delayed(self.display, "bag of words"))
                rows.append(self._row("bag of words", predictions))
        name = "mean" if splits.task == "regress" else "majority class"
        return [*rows, self._row(name, majority(splits, evaluated))]

    def _row(self, name: str, predictions: Predictions) -> Row:
        """Return the metrics of a baseline from its predictions for validation and test."""
        splits = self.splits
        valid = splits.metrics(splits.valid, predictions[0])
        test = None if splits.test is None else splits.metrics(splits.test, predictions[1])
        return row_of(name, [SeedResult(0, 0.0, valid, test, predictions[0], None)])

    def _save(self, classifier: Classifier, target: Path, report: FinetuneReport) -> FinetuneReport:
        """Write the model if transformers computes the same scores; return the report with its path."""
        if self.splits.task == "regress":
            fold_scale(classifier, self.splits)
        with files.atomic_directory(target) as folder:
            architecture = save_classifier(
                folder,
                classifier,
                self.model.tokenizer,
                self.splits.labels,
                dropout=self.config.dropout,
                longest=self.longest,
            )
            difference = _compare(folder, classifier, architecture, self.splits.valid)
            saved = Saved(str(target), architecture, difference)
            report = replace(report, saved=saved)
            files.write_json(folder / RESULTS, report.as_dict())
        return report


def _labels(examples: list[Example], labels: tuple[str, ...], *, must_differ: bool) -> Any:
    """Return the number of each label, or its value if there are no labels."""
    if not labels:
        return np.array(numbers_of(examples, must_differ=must_differ), np.float32)
    ids = {label: number for number, label in enumerate(labels)}
    return np.array([ids[example.labels[0]] for example in examples], np.int64)


@torch.inference_mode()
def _compare(folder: Path, classifier: Classifier, architecture: str, data: LabeledData) -> float | None:
    """Return the largest difference between the scores of a classifier and those of transformers; None without it.

    Raises:
        ModelError: it is too large, or transformers doesn't find all tensors.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    with quiet_transformers():
        hf_model, report = getattr(transformers, architecture).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    unmatched = sorted(str(name) for kind in ("missing_keys", "unexpected_keys") for name in report[kind])
    hf_model.eval()
    classifier = classifier.to("cpu").eval()
    largest = 0.0
    for sequence in data.sequences[:_COMPARED]:
        batch, positions_M, _ = packed([sequence])
        inputs = {"input_ids": batch.ids_T[None]}
        if batch.token_type_ids_T is not None:
            inputs["token_type_ids"] = batch.token_type_ids_T[None]
        logits = hf_model(**inputs).logits[0]
        expected_MC = logits if classifier.kind == "SequenceClassification" else logits[positions_M]
        largest = max(largest, float((classifier(batch, positions_M) - expected_MC).abs().max()))
    # The scores of a regression are in the units of its labels.
    scale = max(1.0, float(np.abs(data.labels).max())) if data.labels.dtype == np.float32 else 1.0
    if unmatched or not largest <= TOLERANCE * scale:
        problem = f"it lacks {unmatched}" if unmatched else f"scores differ by {largest:.2g}"
        raise ModelError(
            f"transformers computes other scores from the fine-tuned model: {problem}",
            location=architecture,
            hint="report this message; leave out --out to see the scores without saving the model",
        )
    return largest


# Progress -----------------------------------------------------------------------------------------------------------


def _delayed(display: Display, what: str) -> Callable[[float], None]:
    """Return a progress callback for a task; a short task shows nothing."""
    start = time.monotonic()

    def on_progress(fraction: float) -> None:
        if time.monotonic() - start >= 2:
            display.progress(what, fraction)

    return on_progress


def _progress_of(display: Display, name: str) -> Callable[[TrainProgress], None]:
    """Return a callback that shows epoch, loss, speed and remaining time of a run from time to time."""
    interval = _LINE_SECONDS if isinstance(display, PlainDisplay) else _UPDATE_SECONDS
    shown = time.monotonic()

    def on_step(progress: TrainProgress) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= interval and progress.fraction < 1:
            shown = now
            display.progress(
                f"{name}: epoch {progress.epoch:.1f} of {progress.epochs:g}, loss {progress.loss:.3f}, "
                f"{progress.examples_per_second:,.0f} examples/s, ETA {duration(progress.seconds_left)}",
                progress.fraction,
            )

    return on_step
