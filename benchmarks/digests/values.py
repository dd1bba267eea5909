"""Computes every value that is digested.

No name of unmask is part of a value: settings, modules, log keys and files may be renamed. Tensors of formats that are
unmask's own are compared as a sorted list; names count only in the formats of transformers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapter
import cases
import numpy as np
import texts as material
import torch

Pair = tuple[str, Any]  # a name and its value
Texts = Mapping[str, Path]

# Digests ------------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of a value; bits count, not printed digits."""
    state = hashlib.sha256()
    _update(state, value)
    return state.hexdigest()[:16]


def _update(state: Any, value: Any) -> None:
    """Adds type, size and bytes of a value, so that different values never give the same bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        state.update(f"array {value.dtype.str} {value.shape} ".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        state.update(f"table {len(value)} ".encode())
        for key in sorted(value):
            _update(state, key)
            _update(state, value[key])
    elif isinstance(value, list | tuple):
        state.update(f"list {len(value)} ".encode())
        for entry in value:
            _update(state, entry)
    else:
        assert value is None or isinstance(value, bool | int | float | str), f"no digest of {type(value)}"
        written = repr(value).encode()
        state.update(f"{type(value).__name__} {len(written)} ".encode() + written)


def tensors_of(file: Path) -> dict[str, list[Any]]:
    """Returns dtype, shape and SHA-256 of each tensor of a safetensors file, read without that library."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors: dict[str, list[Any]] = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = content[8 + size + first : 8 + size + last]
        tensors[name] = [entry["dtype"], entry["shape"], hashlib.sha256(data).hexdigest()]
    return tensors


def unnamed(file: Path, is_left_out: Callable[[str], bool] = lambda name: False) -> list[list[Any]]:
    """Returns the tensors of a file as a sorted list without their names."""
    return sorted(tensor for name, tensor in tensors_of(file).items() if not is_left_out(name))


def numbers_in(value: Any) -> list[float]:
    """Returns all numbers of a JSON value, sorted, without names, strings and booleans."""
    if isinstance(value, Mapping):
        return sorted(number for entry in value.values() for number in numbers_in(entry))
    if isinstance(value, list | tuple):
        return sorted(number for entry in value for number in numbers_in(entry))
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def prefixed(prefix: str, pairs: Iterator[Pair]) -> Iterator[Pair]:
    """Adds a prefix to each name."""
    for name, value in pairs:
        yield f"{prefix}/{name}", value


# Runs ---------------------------------------------------------------------------------------------------------------

HF_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "modernbert")  # their tensors have the names of transformers
PROMPTS = ["The captain of the [MASK] had a letter.", "They went to the [MASK] [MASK] before winter."]


def vocabulary(folder: Path) -> dict[str, Any]:
    """Returns the ids of all tokens, and the rest of tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = content["model"]["vocab"]
    added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    ids = dict(enumerate(tokens)) if isinstance(tokens, list) else {**tokens, **added}
    rest = {key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")}
    return {
        "tokens": {str(key): value for key, value in ids.items()},
        "file": {**rest, "post": content["post_processor"]},
    }


def model_folder(folder: Path) -> Iterator[Pair]:
    """Yields weights, tokenizer and, where transformers reads them, names and config of a saved model."""
    config = json.loads((folder / "config.json").read_text())
    yield "tensors", unnamed(folder / "model.safetensors")
    if config["model_type"] in HF_MODEL_TYPES:
        yield "named tensors", tensors_of(folder / "model.safetensors")
        yield "config", config
    for key, value in vocabulary(folder).items():
        yield f"tokenizer {key}", value


def run_folder(run: Path) -> Iterator[Pair]:
    """Yields everything that a run writes except times."""
    step = adapter.last_step(run)
    yield from model_folder(step)
    best = adapter.best_model(run)
    if best.exists():
        yield "best tensors", unnamed(best / "model.safetensors")
    for key, file in adapter.resume_files(step).items():
        if file.is_file():
            yield f"resume {key}", unnamed(file)
    lines = adapter.training_lines(run)
    yield "losses", [line[2] for line in lines]
    yield "training lines", lines
    yield "validations", adapter.validation_lines(run)
    yield "state", adapter.resume_state(step)


def golden(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields the runs of tests/training/test_golden.py, 50 steps each."""
    for name, run in cases.GOLDEN.items():
        out = place / f"golden-{name}"
        adapter.start_run(run, [str(texts[run.text])], out)
        losses = [line[2] for line in adapter.training_lines(out)]
        assert len(losses) == 50
        yield from prefixed(f"golden/{name}", run_folder(out))


def runs(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields ten steps of every shipped recipe and of other settings, then what is done with these runs."""
    adapter.check_recipes()
    for group, table in (("recipe", cases.RECIPES), ("variant", cases.VARIANTS)):
        for name, run in table.items():
            out = place / f"run-{name}"
            start = place / f"run-{run.start}" if run.start else None
            adapter.start_run(run, [str(texts[run.text])], out, start=start)
            yield from prefixed(f"{group}/{name}", run_folder(out))
    for name in ("bert-mini", "modern-tiny", "bert-mini-pairs"):
        yield f"prediction/{name}/fill", adapter.fill_masks(place / f"run-{name}", PROMPTS)
        yield f"prediction/{name}/evaluate", adapter.evaluate(place / f"run-{name}", texts["more"], 32)
    yield from _exports(place)
    yield from _resumed(place, texts)


def _exports(place: Path) -> Iterator[Pair]:
    """Yields exported models, whole and without heads, and the same models imported."""
    for name in ("bert-mini", "bert-mini-pairs", "modern-tiny", "roberta"):
        for only_encoder in (False, True):
            content = "encoder" if only_encoder else "whole"
            exported, imported = (place / f"{action}-{name}-{content}" for action in ("export", "import"))
            adapter.export_model(place / f"run-{name}", exported, only_encoder=only_encoder)
            adapter.import_model(exported, imported, 3)
            yield from prefixed(f"export/{name} {content}", model_folder(exported))
            yield from prefixed(f"import/{name} {content}", model_folder(imported))


def _resumed(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields a run that was stopped and resumed, then prolonged; a run on weighted texts; one with a further text."""
    out, prose = place / "stopped", str(texts["prose"])
    adapter.start_run(cases.INTERRUPTED, [prose], out, stop_at=3)
    adapter.resume_run(out)
    resumed = dict(run_folder(out))
    uninterrupted = dict(run_folder(place / "run-dropout"))
    assert {name: digest(value) for name, value in resumed.items()} == {
        name: digest(value) for name, value in uninterrupted.items()
    }, "a resumed run differs from the uninterrupted one"
    yield from prefixed("resume/stopped", iter(resumed.items()))
    adapter.resume_run(out, budget="+3 steps")
    yield from prefixed("resume/prolonged", run_folder(out))
    mixture = [adapter.weighted(texts["prose"], 0.7), adapter.weighted(texts["other"], 0.3)]
    adapter.start_run(cases.WEIGHTED, mixture, place / "weighted")
    yield from prefixed("texts/weighted", run_folder(place / "weighted"))
    adapter.start_run(cases.FURTHER_TEXT, [prose], place / "further", valid=texts["more"])
    yield from prefixed("texts/further validation text", run_folder(place / "further"))


# Text and masks -----------------------------------------------------------------------------------------------------


def _corpus(corpus: Any) -> Iterator[Pair]:
    yield from corpus.arrays.items()
    yield "numbers", corpus.numbers
    yield "files", sorted(unnamed(file, adapter.is_count_of_sentences) for file in corpus.folder.rglob("*.safetensors"))
    for key, value in vocabulary(corpus.tokenizer_folder).items():
        yield f"tokenizer {key}", value


def shards(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields shards and vocabulary of every kind of tokenizer, file format and word rule."""
    for name, (text, settings) in cases.CORPORA.items():
        corpus = adapter.tokenize([str(texts[text])], settings, place / "corpora")
        yield from prefixed(f"shards/{name}", _corpus(corpus))
    text, settings = cases.SEVERAL_WORKERS
    with adapter.small_work_units(30_000):
        by_workers = [
            dict(_corpus(adapter.tokenize([str(texts[text])], settings, place / f"by-{count}", workers=count)))
            for count in (1, 2)
        ]
    assert digest(by_workers[0]) == digest(by_workers[1]), "the shards depend on the number of processes"
    yield from prefixed("shards/two workers", iter(by_workers[1].items()))
    sentences = {"zh": material.CHINESE, "ja": material.JAPANESE, "ko": material.KOREAN, "mixed": [material.MIXED]}
    for rule in cases.WORD_RULES:
        for language, lines in sentences.items():
            yield f"words/{rule}/{language}", [adapter.starts(line, rule) for line in lines]
    yield "inspect/prose", numbers_in(adapter.inspect(texts["prose"]))


def masks(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields masked batches for every mask_unit and pair task, at several epochs, lengths and points of a run."""
    cache = place / "corpora"
    corpora = {
        name: adapter.tokenize([str(texts[cases.CORPORA[name][0]])], cases.CORPORA[name][1], cache)
        for name in ("wordpiece", "bytes", "chinese-jieba", "japanese-sudachi")
    }
    wordpiece = corpora["wordpiece"]
    for name, settings in cases.MASKS.items():
        for epoch, length, progress in ((0, 64, 0.0), (1, 64, 0.5), (7, 23, 1.0)):
            masked = adapter.masked_batches(wordpiece, settings, length, epoch, progress, 12_000)
            yield f"masks/{name}/epoch {epoch}, length {length}, progress {progress}", masked
    for kind in ("chinese-jieba", "japanese-sudachi", "bytes"):
        for name in ("whole-word", "span", "ngram"):
            masked = adapter.masked_batches(corpora[kind], cases.MASKS[name], 48, 2, 0.0, 8_000)
            yield f"masks/{name}/{kind}", masked
    for name, settings in cases.PAIRS.items():
        for epoch in (0, 3):
            masked = adapter.masked_batches(wordpiece, settings, 64, epoch, 0.0, 12_000)
            yield f"pairs/{name}/epoch {epoch}", masked
    for kind, corpus in corpora.items():
        for length in (32, 128):
            yield f"evaluation set/{kind}/length {length}", adapter.eval_set(corpus, length)
    for task in cases.PAIR_TASKS:
        yield f"evaluation set/{task}", adapter.pair_eval_set(wordpiece, 64, task)
    mixture = [adapter.weighted(texts["prose"], 0.25), adapter.weighted(texts["other"], 0.75)]
    mixed = adapter.tokenize(mixture, cases.CORPORA["wordpiece"][1], cache)
    for epoch in (0, 5):
        masked = adapter.masked_batches(mixed, cases.MASKS["token"], 40, epoch, 0.0, 20_000)
        yield f"weighted texts/epoch {epoch}", masked
    for ranks in (1, 2, 3):
        yield f"micro-batches/{ranks} ranks", adapter.micro_batches(wordpiece, ranks)


def audits(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields the numbers of `unmask audit` for several mask_units."""
    text, settings = cases.CORPORA["wordpiece"]
    corpus = adapter.tokenize([str(texts[text])], settings, place / "corpora")
    for name in cases.AUDITS:
        findings, report = adapter.audit(name, texts["prose"], corpus.tokenizer_folder)
        yield f"audit/{name}/findings", numbers_in(findings)
        yield f"audit/{name}/report", numbers_in(report)


# Numbers ------------------------------------------------------------------------------------------------------------


def models(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields initial weights, outputs, gradients and sizes of every kind of model."""
    for name in cases.MODELS:
        for what, value in zip(("initial weights", "outputs", "gradients", "sizes"), adapter.model(name), strict=True):
            # Sorted by content: modules may be created in another order.
            yield f"model/{name}/{what}", value if what in ("outputs", "sizes") else sorted(map(digest, value))
    for decay in (0.5, 0.999):
        torch.manual_seed(1)
        yield f"ema/{decay}", adapter.moving_average(torch.nn.Linear(7, 5), decay, 20)


def draws(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields counter-based random numbers."""
    keys = ([3], [np.arange(-5, 50)], [np.arange(6)[:, None], np.arange(9)], [])
    for seed in (0, 17, 20181011, 2**63 + 5):
        for stream in ("order", "a stream with a long name", "한"):
            yield f"draws/{seed}/{stream}", [adapter.random_draws(seed, stream, key) for key in keys]


def plans(place: Path, texts: Texts) -> Iterator[Pair]:
    """Yields learning rate schedules and plans."""
    for name in cases.SCHEDULES:
        factors = [adapter.learning_rate_factor(name, step / 100, step, 128) for step in range(101)]
        yield f"schedule/{name}", factors
    for budget in ("500 steps", "2M tokens", "3 epochs", "0.4 epochs", "10 min", "40 s"):
        for more in ("+1 epoch", "+7 steps"):
            yield f"plan/{budget}, {more}", adapter.plan(budget, more)


PARTS: Mapping[str, Callable[[Path, Texts], Iterator[Pair]]] = {
    part.__name__: part for part in (golden, runs, shards, masks, audits, models, draws, plans)
}


def compute(place: Path, parts: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields part, name and digest of each value; all files are written below `place`."""
    texts = material.write_texts(place / "texts")
    for part in parts:
        for name, value in PARTS[part](place, texts):
            yield part, name, digest(value)


def is_available(name: str) -> bool:
    """Returns whether this machine can compute a digest; some need bfloat16."""
    return cases.HAS_BFLOAT16 or cases.BFLOAT16 not in name
