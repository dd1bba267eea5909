"""Calls unmask, and returns arrays, numbers and paths in an order that does not depend on its names.

A renamed function or field changes this file and cases.py, never a digest.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cases
import numpy as np
import torch

from unmask.core import rng
from unmask.core.config import shipped_recipes
from unmask.core.distributed import init_distributed
from unmask.core.errors import Stopped
from unmask.core.quantities import Fraction, Quantity
from unmask.core.types import SPECIAL, WORD_START, Sample, logits_at, pack
from unmask.data import workers as data_workers
from unmask.data.loader import PairSampling, StageLoader, build_sampler
from unmask.data.prepare import META, prepare
from unmask.data.sources import open_source
from unmask.evaluation.masked_lm import build_eval_set, build_pair_eval_set, documents_from_shards
from unmask.evaluation.validation import evaluate_text
from unmask.hub.from_hf import import_model as import_hf_model
from unmask.hub.to_hf import export as export_hf_model
from unmask.models import BertConfig, build_model, build_pair, flops_per_token, num_parameters
from unmask.models.fill_mask import fill
from unmask.models.model import load
from unmask.tokenization.words import sentence_starts, word_starts
from unmask.training.display import Display
from unmask.training.loop import EMA
from unmask.training.optim import ScheduleConfig, lr_factor_at
from unmask.training.plan import EveryConfig, Measured, StageConfig, due, extend_plan, limit_validation, make_plan
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import load_recipe
from unmask.training.setup import build_objective, pair_sampling
from unmask.training.warm_start import WarmStart

CACHE_VARIABLE = "UNMASK_CACHE"


def check_recipes() -> None:
    """Fails if a shipped recipe has no case, or a case no recipe."""
    missing = set(shipped_recipes()) ^ {run.recipe for run in cases.RECIPES.values()}
    assert not missing, f"recipes without a case, or cases without a recipe: {sorted(missing)}"


# Runs ---------------------------------------------------------------------------------------------------------------


class _Interrupt(Display):
    """Sends SIGTERM to this process after a given step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: Any) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def start_run(
    run: cases.Run,
    texts: Sequence[str],
    out: Path,
    *,
    start: Path | None = None,
    stop_at: int = 0,
    valid: Path | None = None,
) -> None:
    """Trains a run.

    Args:
        run: recipe and settings.
        texts: what to train on.
        out: the directory of the run.
        start: a run whose model is trained further.
        stop_at: the step after which the run is stopped by a signal; 0 for never.
        valid: a further validation text.
    """
    warm_start = WarmStart.open(start, run.new_tokens) if start else None
    display = _Interrupt(stop_at) if stop_at else None
    overrides = {"data.valid": {"more": str(valid)}} if valid else {}
    try:
        launch(
            texts,
            recipe=run.recipe,
            out=out,
            settings=run.settings,
            overrides=overrides,
            display=display,
            start=warm_start,
        )
    except Stopped:
        assert stop_at, "the run was stopped"
    else:
        assert not stop_at, "the run was not stopped"


def resume_run(run: Path, budget: str | None = None) -> None:
    """Resumes a run."""
    resume(run, budget=budget)


def weighted(path: Path, weight: float) -> str:
    """Returns the command-line form of a text with a weight."""
    return f"{path}:{weight}"


def last_step(run: Path) -> Path:
    """Returns the last step folder."""
    return run / "latest"


def best_model(run: Path) -> Path:
    """Returns the model of the best validation."""
    return run / "best"


def resume_files(step: Path) -> dict[str, Path]:
    """Returns the tensor files of a step folder that only a resume reads."""
    return {name: step / "resume" / f"{name}.safetensors" for name in ("weights", "optimizer", "ema")}


def resume_state(step: Path) -> list[Any]:
    """Returns step, cursor, tokens, learning rate, gradient norm and the best validation of a checkpoint."""
    state = json.loads((step / "resume" / "state.json").read_text())
    best = state["best"] or {"step": None, "loss": None}
    names = ("step", "cursor", "tokens", "learning_rate", "grad_norm", "validations_without_gain")
    return [*(state[name] for name in names), best["step"], best["loss"]]


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def training_lines(run: Path) -> list[list[Any]]:
    """Returns each training line of the log without its times; the loss is the third value."""
    names = ("step", "tokens", "loss", "accuracy", "learning_rate", "grad_norm", "masked_tokens", "mask_rate",
             "pair_loss", "pair_accuracy")  # fmt: skip
    return [[line.get(name) for name in names] for line in _log(run) if "loss" in line]


def validation_lines(run: Path) -> list[list[Any]]:
    """Returns each validation: step, held-out text, earlier stages' lengths, further texts, pairs."""
    lines: list[list[Any]] = []
    for line in _log(run):
        if "validation" not in line:
            continue
        result = line["validation"]
        names = ("loss", "accuracy", "bits_per_character", "unigram_loss", "length")
        set_names = ("loss", "accuracy", "bits_per_character", "unigram_loss", "masked_tokens", "unknown_share")
        pair = result["pair"]
        lines.append([
            line["step"], line["tokens"], [result[name] for name in names], sorted(result["earlier"].items()),
            [[result["sets"][key][name] for name in set_names] for key in sorted(result["sets"])],
            pair and [pair["loss"], pair["accuracy"], pair["pairs"], sorted(pair["earlier"].items())],
        ])  # fmt: skip
    return lines


def fill_masks(run: Path, texts: Sequence[str]) -> list[Any]:
    """Returns ids and probabilities of the five best candidates of each mask."""
    return [
        [[candidate.id, candidate.score] for candidate in mask.candidates]
        for result in fill(load(run), texts, 5)
        for mask in result.masks
    ]


def evaluate(run: Path, text: Path, length: int) -> list[Any]:
    """Returns the evaluation of a model on an unseen text."""
    result = evaluate_text(load(run), [text], context=init_distributed("float32", 1), length=length)
    return [result.loss, result.accuracy, result.bits_per_character, result.unigram_loss, result.masked_tokens,
            result.unknown_share]  # fmt: skip


def export_model(run: Path, out: Path, *, only_encoder: bool) -> None:
    """Exports a model without the comparison with transformers, which takes seconds and changes no file."""
    export_hf_model(run, out, unverified=True, only="encoder" if only_encoder else "all")


def import_model(folder: Path, out: Path, seed: int) -> None:
    """Imports an exported model; missing heads are drawn from the seed."""
    import_hf_model(folder, out, seed=seed)


# Text ---------------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """A tokenized corpus."""

    arrays: dict[str, Any]
    numbers: list[Any]  # all counts of its metadata
    folder: Path
    tokenizer_folder: Path
    handle: Any  # unmask's own object


def tokenize(texts: Sequence[str], settings: Sequence[str], cache: Path, workers: int = 1) -> Corpus:
    """Tokenizes texts into shards."""
    config = load_recipe("tiny", [*settings]).data
    corpus = prepare(open_source(texts, config), config, cache, workers=workers)
    arrays: dict[str, Any] = {}
    for side, shards in (("train", corpus.train), ("held-out", corpus.held_out)):
        lengths = shards.lengths.tolist()
        arrays |= {
            f"{side}/ids": [shards.ids(number, 0, length) for number, length in enumerate(lengths)],
            f"{side}/flags": [shards.token_flags(number, 0, length) for number, length in enumerate(lengths)],
            f"{side}/lengths": shards.lengths,
            f"{side}/characters": shards.document_characters,
            f"{side}/unknown": shards.document_unknown_characters,
            f"{side}/counts": shards.token_counts,
            f"{side}/sentences": shards.sentences,
        }
    numbers = [value for value in corpus.facts.values() if isinstance(value, int | float) and type(value) is not bool]
    return Corpus(arrays, sorted(numbers), corpus.folder, corpus.folder / META, corpus)


@contextlib.contextmanager
def small_work_units(size: int) -> Iterator[None]:
    """Lets several processes share a small text."""
    before = data_workers.MIN_UNIT_BYTES
    data_workers.MIN_UNIT_BYTES = size  # type: ignore[misc]
    try:
        yield
    finally:
        data_workers.MIN_UNIT_BYTES = before  # type: ignore[misc]


def is_count_of_sentences(tensor: str) -> bool:
    """Returns whether a tensor of the shards was added after df4e979; the arrays of a corpus hold the same numbers."""
    return tensor == "sentences"


def starts(text: str, rule: str) -> list[Any]:
    """Returns where words and sentences start."""
    return [word_starts(text, rule), sentence_starts(text)]  # type: ignore[arg-type]


def _command(arguments: Sequence[str]) -> Any:
    """Returns what `unmask … --json` prints."""
    before, output, errors = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["unmask", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_module("unmask", run_name="__main__")
    except SystemExit as ended:
        assert ended.code in (None, 0, 1) and output.getvalue(), f"{' '.join(sys.argv)}: {errors.getvalue()}"
    finally:
        sys.argv = before
    return json.loads(output.getvalue())


def inspect(text: Path) -> Any:
    """Returns what `unmask data inspect` prints."""
    return _command([*cases.INSPECT[:2], str(text), *cases.INSPECT[2:]])


# Masks --------------------------------------------------------------------------------------------------------------


def _batch(batch: Any) -> list[Any]:
    return [batch.ids_T, batch.token_flags_T, list(batch.offsets), batch.sample_keys_B2, batch.token_type_ids_T,
            batch.pair_labels_B]  # fmt: skip


def _masked(masked: Any) -> list[Any]:
    counts = [*sorted(masked.denominators.values()), masked.num_maskable]
    return [_batch(masked.batch), masked.positions_M, masked.labels_M, counts]


def _loader(corpus: Any, length: int, micro_tokens: int, seed: int, pairs: PairSampling | None = None) -> StageLoader:
    shards, tokenizer = corpus.train, corpus.tokenizer
    sampler = build_sampler(shards, tokenizer, length, seed, groups=corpus.groups, other=pairs)
    return StageLoader(shards, tokenizer, sampler, micro_tokens)


def micro_batches(corpus: Corpus, ranks: int) -> list[list[Any]]:
    """Returns the micro-batches of one step, for each rank."""
    loader = _loader(corpus.handle, 64, 300, 17)
    return [list(map(_batch, loader.step(5, 2500, rank, ranks)[0])) for rank in range(ranks)]


def masked_batches(
    corpus: Corpus, settings: Sequence[str], length: int, epoch: int, progress: float, tokens: int
) -> list[list[Any]]:
    """Returns the first batches of an epoch, each before and after masking."""
    recipe = load_recipe("tiny", [*settings])
    objective = build_objective(recipe.objective, recipe, corpus.handle.tokenizer, corpus.handle.words)
    loader = _loader(corpus.handle, length, 4096, recipe.seed, pair_sampling(recipe, [objective])[0])
    batches, cursor = loader.step(epoch * loader.samples, tokens, 0, 1)
    result: list[list[Any]] = [[loader.samples, loader.epoch_tokens, loader.first_cursor(1), cursor]]
    for batch in batches:
        result.append(_batch(batch))
        result.append(_masked(objective.corrupt(replace(batch, progress=progress), recipe.seed)))
    return result


def eval_set(corpus: Corpus, length: int) -> list[Any]:
    """Returns the evaluation set of the held-out text."""
    shards = corpus.handle
    found = build_eval_set(documents_from_shards(shards.held_out), shards.tokenizer, length, shards.train.token_counts)
    numbers = [found.masked_tokens, found.tokens, found.characters, found.unknown_share, found.unigram_loss]
    return [numbers, *map(_masked, found.batches)]


def pair_eval_set(corpus: Corpus, length: int, task: str) -> list[Any]:
    """Returns an evaluation set of sentence pairs, drawn from the training text, which has more documents."""
    found = build_pair_eval_set(corpus.handle.train, corpus.handle.tokenizer, length, task)  # type: ignore[arg-type]
    return [found.pairs, *map(_batch, found.batches)]


def audit(name: str, text: Path, tokenizer: Path) -> tuple[Any, Any]:
    """Returns the findings of an audit of unmask's masking, and its whole report."""
    options = ["--text", str(text), "--tokenizer", str(tokenizer), *cases.AUDITS[name], *cases.AUDIT_OPTIONS]
    report = _command(["audit", *options])
    return report["findings"], report


# Models, schedules, plans -------------------------------------------------------------------------------------------


def model(name: str) -> list[Any]:
    """Returns initial weights, outputs and gradients of a model, its number of parameters and its FLOPs."""
    config = load_recipe("tiny", ["stage=[{max_seq_len = 32}]", cases.MODELS[name]]).model
    vocabulary = 90
    torch.manual_seed(5)
    encoder, head = build_model(config, vocabulary)
    has_pair_head = isinstance(config, BertConfig) and config.model_type == "bert"
    modules = [encoder, head, *([build_pair(config)] if has_pair_head else [])]
    initial = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    samples = []
    for number, size in enumerate((20, 13, 33, 64, 1)):
        ids, flags = (np.arange(size) * 7 + number) % vocabulary, np.full(size, WORD_START, np.uint8)
        flags[0] = SPECIAL
        token_type_ids = (np.arange(size) > size // 2).astype(np.int64) if has_pair_head else None
        samples.append(Sample(ids, flags, 0, number, token_type_ids))
    batch = pack(samples)
    for module in modules:
        module.eval()
    logits = logits_at(encoder, head, batch, torch.arange(0, len(batch.ids_T), 3))
    outputs = [logits, *(module(encoder(batch), batch) for module in modules[2:])]
    sum((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() for output in outputs).backward()
    gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    sizes = [num_parameters(config, vocabulary), flops_per_token(config, vocabulary, 64, 0.3)]
    return [initial, outputs, gradients, sizes]


def learning_rate_factor(name: str, progress: float, step: int, width: int) -> float:
    """Returns a schedule's factor on all learning rates."""
    return lr_factor_at(ScheduleConfig(**cases.SCHEDULES[name]), progress, step, width)  # type: ignore[arg-type]


def random_draws(seed: int, stream: str, keys: Sequence[Any]) -> list[Any]:
    """Returns one result of every function of the random number generator."""
    return [
        rng.bits(seed, stream, *keys), rng.uniform(seed, stream, *keys), rng.below(1000, seed, stream, *keys),
        rng.integer(seed, stream, 3, 4), rng.permute(np.arange(100), 100, seed, stream, 7),
        rng.permute(np.arange(1), 1, seed, stream), rng.permute(np.arange(500, 600), 1025, seed, stream, 1, 2),
    ]  # fmt: skip


def moving_average(module: torch.nn.Module, decay: float, steps: int) -> list[Any]:
    """Returns the average of a module's weights while each step multiplies them by 1.1."""
    average: Any = EMA(copy.deepcopy(module), decay)  # type: ignore[arg-type]
    result: list[Any] = []
    for step in range(steps):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.1)
        average.update(module, step)
        result += [average.decay_at(step), *(tensor.clone() for tensor in average.state_dict().values())]
    return result


def _plan(plan: Any) -> list[Any]:
    stages = [[s.max_seq_len, s.batch_tokens, s.first_step, s.steps, s.seconds_per_step] for s in plan.stages]
    progress = [plan.progress(step) for step in range(0, plan.steps, max(1, plan.steps // 20))]
    return [stages, plan.steps, plan.tokens, plan.seconds, plan.overhead_seconds, progress]


def plan(budget: str, more: str) -> list[Any]:
    """Returns a plan of three stages, the steps at which something is due, and the plan prolonged.

    Seconds per step are given, not measured.
    """
    stages = tuple(
        StageConfig(Fraction(until), length, Quantity.parse(batch))
        for until, length, batch in ((0.02, 32, "512 tokens"), (0.7, 64, "2k tokens"), (1.0, 256, "16 texts"))
    )
    every = EveryConfig(Fraction(0.01), Fraction(0.05), Quantity.parse("30 steps"))
    measured = Measured((0.05, 0.11, 0.4), 1.5, 0.7)
    every, note = limit_validation(every, Quantity.parse(budget), measured)
    first = make_plan(stages, Quantity.parse(budget), every, [91_234, 90_001, 88_765], measured)
    steps = [
        [step for step in range(1, min(first.steps, 3000) + 1) if is_due(step, 0.0)]
        for is_due in (due(interval, first) for interval in (every.log, every.validate, every.save))
    ]
    longer = extend_plan(first, Quantity.parse(more, relative=True), every=every, epoch_tokens=88_765)
    return [_plan(first), steps, bool(note), _plan(longer)]
