"""Encoders, objectives, samplers, sources and loggers of the package meet the requirements of core/types.py.

A new class is one more entry in a list below. The checks are those of `unmask check-plugin`; tests/checks plants faults
to see that they are found.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyarrow import parquet
from torch import nn

from unmask.checks.plugins.fixtures import (
    CheckResult,
    LoggerFixture,
    SamplerFixture,
    SourceFixture,
    objective_fixture,
    run_checks,
    sampler_contexts,
)
from unmask.checks.plugins.suites import LOGGER_CHECKS, OBJECTIVE_CHECKS, SAMPLER_CHECKS, SOURCE_CHECKS
from unmask.core.types import (
    SENTENCE_START,
    SPECIAL,
    WORD_START,
    LoggerContext,
    MetricLogger,
    Objective,
    Sample,
    Sampler,
    SamplerContext,
    SampleSpec,
    Source,
    pack,
)
from unmask.data.prepare import CorpusGroup
from unmask.data.sampling import EPOCH_STRIDE, EpochSampler, MixtureSampler, WindowSampler
from unmask.data.sentence_pairs import PairKind, PairSampler
from unmask.data.sources import FileSource, MemorySource
from unmask.models import EncoderConfig, EncoderModule, HeadModule, build_model, build_pair
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.causal import CausalLMConfig, CausalLMObjective, MaskedNextTokenConfig, MaskedNextTokenObjective
from unmask.objectives.diffusion import MaskedDiffusionConfig, MaskedDiffusionObjective
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective
from unmask.training.loggers import JsonlLogger, TensorBoardLogger, read_log

VOCABULARY, SPECIALS, MASK = 40, 5, 4
ORDINARY = np.arange(SPECIALS, VOCABULARY)

ENCODERS: list[EncoderConfig] = [
    ModernBertConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=24, local_attention=8
    ),
    BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=24, max_position_embeddings=80
    ),
    TutorialConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=24),
]
OBJECTIVES: list[Objective] = [
    MaskedLMObjective(MaskedLMConfig(mask_rate=0.15), MASK, ORDINARY),
    MaskedLMObjective(MaskedLMConfig(mask_rate=0.4, mask_unit="whole-word"), MASK, ORDINARY),
    MaskedLMObjective(
        MaskedLMConfig(mask_rate=0.3, mask_unit="span", mask_token_rate=0.5, random_token_rate=0.5, keep_rate=0.0),
        MASK,
        ORDINARY,
    ),
    MaskedLMObjective(
        MaskedLMConfig(mask_rate=0.4, final_mask_rate=0.1, mask_unit="ngram", boosted_words=("a", "b")),
        MASK,
        ORDINARY,
        [(7,), (8, 9)],
    ),
    CausalLMObjective(CausalLMConfig()),
    CausalLMObjective(CausalLMConfig(predicted_fraction=0.3)),
    MaskedNextTokenObjective(
        MaskedNextTokenConfig(causal_fraction=0.0), MaskedLMObjective(MaskedLMConfig(mask_rate=0.3), MASK, ORDINARY)
    ),
    MaskedDiffusionObjective(MaskedDiffusionConfig(), MASK),
    MaskedDiffusionObjective(MaskedDiffusionConfig(min_mask_rate=0.1, weighted=False), MASK),
]
SOURCES: list[Callable[[Path, Sequence[str]], Source]] = [
    lambda folder, texts: MemorySource(texts),
    lambda folder, texts: FileSource(files(folder, texts), "file", "strict"),
    lambda folder, texts: FileSource([files(folder, texts)[0].parent], "blank-line", "strict"),
    lambda folder, texts: FileSource([rows(folder / "rows.jsonl", texts)], "line", "strict"),
    lambda folder, texts: FileSource([rows(folder / "rows.jsonl.gz", texts)], "line", "strict"),
    lambda folder, texts: FileSource([rows(folder / "rows.csv", texts)], "line", "strict"),
    lambda folder, texts: FileSource([rows(folder / "rows.parquet", texts)], "line", "strict"),
]
LOGGERS: list[Callable[[Path], MetricLogger]] = [JsonlLogger]

encoders = pytest.mark.parametrize("shape", ENCODERS, ids=lambda shape: shape.kind)
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)
sources = pytest.mark.parametrize(
    "create", SOURCES, ids=["memory", "files", "folder", "jsonl", "jsonl.gz", "csv", "parquet"]
)
loggers = pytest.mark.parametrize("create", LOGGERS, ids=["jsonl"])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(shape: EncoderConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    encoder, head = build_model(shape, VOCABULARY)
    return encoder.eval(), head.eval()


def text(length: int, number: int, maskable: bool = True) -> Sample:
    """Return a sample between special tokens; about every second token starts a word."""
    draw = np.random.default_rng(number)
    ids = np.where(np.arange(length) % (length - 1) == 0, 2, draw.integers(SPECIALS, VOCABULARY, length))
    marks = np.where(draw.random(length) < 0.6, WORD_START, 0).astype(np.uint8)
    marks[[0, -1] if maskable else slice(None)] = SPECIAL
    return Sample(ids, marks, epoch=2, number=number)


# Encoders ------------------------------------------------------------------------------------------------------------


@encoders
def test_an_encoder_has_the_attributes_of_the_protocol(shape: EncoderConfig) -> None:
    encoder, head = build(shape)
    assert isinstance(encoder, EncoderModule) and isinstance(head, HeadModule)
    assert (encoder.hidden_size, encoder.vocab_size) == (shape.hidden_size, VOCABULARY)
    assert encoder.token_embedding.shape == (VOCABULARY, shape.hidden_size)
    assert any(parameter is encoder.token_embedding for parameter in encoder.parameters())
    assert len(encoder.blocks) == shape.num_hidden_layers
    assert all(any(block is module for module in encoder.modules()) for block in encoder.blocks)
    batch = pack([text(9, 1), text(4, 2)])
    hidden_TD = encoder(batch)
    assert hidden_TD.shape == (13, shape.hidden_size) and hidden_TD.dtype == torch.float32
    logits_MV = head(hidden_TD[[3, 7]], encoder.token_embedding)
    assert logits_MV.shape == (2, VOCABULARY) and logits_MV.dtype == torch.float32


@encoders
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=9))
def test_a_sequence_does_not_depend_on_its_neighbors(shape: EncoderConfig, lengths: list[int]) -> None:
    """The vectors of a sequence in a batch are those of the sequence alone."""
    encoder, _ = build(shape)
    texts = [text(length, number) for number, length in enumerate(lengths)]
    with torch.no_grad():
        rows = encoder(pack(texts)).split(lengths)
        for one, row_SD in zip(texts, rows, strict=True):
            torch.testing.assert_close(row_SD, encoder(pack([one])), atol=1e-5, rtol=1e-5)


@encoders
@objectives
def test_gradients_are_finite(shape: EncoderConfig, objective: Objective) -> None:
    encoder, head = build(shape)
    lengths = [30, 3, 64, 2, 17]
    masked = objective.corrupt(pack([text(n, i) for i, n in enumerate(lengths)]), seed=4)
    loss = objective.loss(encoder.train(), head.train(), masked)
    sum(loss.sums.values(), torch.zeros(())).backward()
    gradients = [parameter.grad for module in (encoder, head) for parameter in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)


# Objectives ----------------------------------------------------------------------------------------------------------


def failures(results: Sequence[CheckResult]) -> list[str]:
    return [f"{result.check}: {result.detail}" for result in results if not result.passed]


@objectives
@encoders
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), max_size=7), seed=st.integers(0, 2**63))
def test_an_objective_passes_the_checks(
    objective: Objective, shape: EncoderConfig, lengths: list[int], seed: int
) -> None:
    texts = [text(length, number) for number, length in enumerate([*lengths, 9])]
    assert not failures(run_checks(OBJECTIVE_CHECKS, objective_fixture(objective, shape, texts, VOCABULARY, seed)))


@objectives
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=8), seed=st.integers(0, 2**63))
def test_tokens_that_are_not_masked_are_unchanged(objective: Objective, lengths: list[int], seed: int) -> None:
    batch = pack([text(length, number) for number, length in enumerate(lengths)])
    masked = objective.corrupt(batch, seed)
    untouched = torch.ones(len(batch.ids_T), dtype=torch.bool).index_fill_(0, masked.positions_M, False)
    assert torch.equal(masked.batch.ids_T[untouched], batch.ids_T[untouched])
    assert set(masked.denominators.values()) <= {len(masked.positions_M), masked.num_maskable}


# Samplers -------------------------------------------------------------------------------------------------------------


class OneByOne:
    """A sampler of this package by the protocol of plugins."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.count, self._sampler = sampler.count, sampler

    def spec(self, epoch: int, sample: int) -> SampleSpec:
        return self._sampler.specs(epoch, sample, sample + 1)[0]


def mixed(tools: SamplerContext) -> Sampler:
    """Return a mixture of two texts, the second one upsampled; of one text if there is one document."""
    half = max(1, len(tools.lengths) // 2)
    bounds = [(0, half, 0.3), (half, len(tools.lengths), 0.7)]
    groups = [CorpusGroup(f"text {first}", weight, first, last) for first, last, weight in bounds if first < last]
    return OneByOne(
        MixtureSampler(tools.lengths, groups, tools.length, tools.seed, num_special_tokens=2, stride=EPOCH_STRIDE)
    )


SAMPLERS: list[Callable[[SamplerContext], Sampler]] = [
    lambda tools: OneByOne(WindowSampler(tools.lengths, tools.length, tools.seed)),
    mixed,
]


@pytest.mark.parametrize("create", SAMPLERS, ids=["windows", "mixture"])
def test_a_sampler_passes_the_checks(create: Callable[[SamplerContext], Sampler]) -> None:
    assert not failures(run_checks(SAMPLER_CHECKS, SamplerFixture(create, sampler_contexts())))


class Marked:
    """Documents in which about every fourth token starts a sentence."""

    def __init__(self, tools: SamplerContext) -> None:
        self.lengths = tools.lengths
        self._marks = [
            np.where(np.random.default_rng(n).random(n) < 0.25, SENTENCE_START, 0).astype(np.uint8)
            for n in tools.lengths.tolist()
        ]
        self.sentences = np.array([int((one[1:] > 0).sum()) + (len(one) > 0) for one in self._marks])

    def token_flags(self, document: int, first: int, last: int) -> NDArray[np.uint8]:
        return self._marks[document][first:last]


@pytest.mark.parametrize("kind", ["next-sentence", "sentence-order"])
def test_a_pair_sampler_passes_the_checks(kind: PairKind) -> None:
    cases = [case for case in sampler_contexts() if len(case.lengths) > 1]
    assert len(cases) > 1
    fixture = SamplerFixture(
        lambda tools: OneByOne(PairSampler(Marked(tools), tools.length, tools.seed, kind)), cases, spans=2
    )
    assert not failures(run_checks(SAMPLER_CHECKS, fixture))


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(4, 60), min_size=1, max_size=7), seed=st.integers(0, 2**63))
def test_an_objective_with_pairs_passes_the_checks(lengths: list[int], seed: int) -> None:
    shape = ENCODERS[1]
    torch.manual_seed(5)
    objective = BertPretrainingObjective(
        BertPretrainingConfig(), MaskedLMObjective(MaskedLMConfig(), MASK, ORDINARY), build_pair(shape)
    )
    texts = [text(length, number) for number, length in enumerate(lengths)]
    segments = [(np.arange(len(one.ids)) >= len(one.ids) // 2).astype(np.int64) for one in texts]
    for labelled in (False, True):
        if labelled:
            texts = [
                replace(one, token_type_ids=segment, pair_label=number % 2)
                for number, (one, segment) in enumerate(zip(texts, segments, strict=True))
            ]
        assert not failures(run_checks(OBJECTIVE_CHECKS, objective_fixture(objective, shape, texts, VOCABULARY, seed)))


# Sources -------------------------------------------------------------------------------------------------------------


def files(folder: Path, texts: Sequence[str]) -> list[Path]:
    below = folder / "texts"
    below.mkdir(exist_ok=True)
    paths = [below / f"{number:03d}.txt" for number in range(len(texts))]
    for path, one in zip(paths, texts, strict=True):
        path.write_text(one, encoding="utf-8")
    return paths


def rows(path: Path, texts: Sequence[str]) -> Path:
    """Write a table with one text per row."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": list(texts)}), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["number", "text"], *enumerate(texts)])
    else:
        lines = "".join(json.dumps({"text": one}) + "\n" for one in texts).encode()
        path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


TEXTS = ["One text.\nOf two lines.", "Une the\u0301ière, et du cafe\u0301.", "가나다 " * 50, "the last"]
CHANGED = [
    [*TEXTS, "one more"], TEXTS[:-1], [TEXTS[1], TEXTS[0], *TEXTS[2:]],
    [TEXTS[0] + ".", *TEXTS[1:]], [TEXTS[0][:-1], TEXTS[0][-1] + TEXTS[1], *TEXTS[2:]],
]  # fmt: skip


@sources
def test_a_source_passes_the_checks(tmp_path: Path, create: Callable[..., Source]) -> None:
    def made(name: str, texts: Sequence[str]) -> Callable[[], Source]:
        (tmp_path / name).mkdir()
        return lambda: create(tmp_path / name, texts)

    variants = [(f"change {number}", made(str(number), texts)) for number, texts in enumerate(CHANGED)]
    assert not failures(run_checks(SOURCE_CHECKS, SourceFixture(made("unchanged", TEXTS), variants)))
    fingerprints = {source().fingerprint for _, source in variants} | {made("a", TEXTS)().fingerprint}
    assert len(fingerprints) == 1 + len(CHANGED)
    assert made("b", TEXTS)().fingerprint in fingerprints, (
        "the fingerprint does not depend on the location of the files"
    )


@sources
def test_a_source_returns_the_texts(tmp_path: Path, create: Callable[..., Source]) -> None:
    source = create(tmp_path, TEXTS)
    chunks = [chunk for part in source.parts() for chunk in source.documents(part)]
    assert [chunk.text for chunk in chunks] == [unicodedata.normalize("NFC", one) for one in TEXTS]
    assert sum(chunk.characters for chunk in chunks) == sum(len(unicodedata.normalize("NFC", x)) for x in TEXTS)


def test_a_fingerprint_changes_with_the_rules(tmp_path: Path) -> None:
    paths = files(tmp_path, TEXTS)
    rules = itertools.product(("blank-line", "line", "file"), ("strict", "replace"))
    assert len({FileSource(paths, document, errors).fingerprint for document, errors in rules}) == 6


# Loggers -------------------------------------------------------------------------------------------------------------


@loggers
def test_a_line_is_on_the_disk_before_write_returns(tmp_path: Path, create: Callable[[Path], MetricLogger]) -> None:
    path = tmp_path / "log.jsonl"
    logger = create(path)
    written: list[dict[str, object]] = []
    for step in (1, 2, 5):
        written.append({"step": step, "loss": 1.5 / step, "note": "Straße", "nothing": None})
        logger.write(step, {name: value for name, value in written[-1].items() if name != "step"})
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == written
    logger.close()
    logger.close()
    later = create(path)  # a run that goes on adds to what stands there
    later.write(6, {})
    later.close()
    assert list(read_log(path)) == [*written, {"step": 6}]


def test_the_tensorboard_logger_passes_the_checks(tmp_path: Path) -> None:
    def create(context: LoggerContext) -> MetricLogger:
        return TensorBoardLogger(context)

    assert not failures(run_checks(LOGGER_CHECKS, LoggerFixture(create, tmp_path)))


@pytest.mark.parametrize("lengths", [[1], [32], [33], [5] * 200, [7, 1, 64] * 30, [2] * 700])
def test_a_rounded_batch_has_few_sizes_and_the_same_samples(lengths: list[int]) -> None:
    batch = pack([Sample(np.arange(n), np.zeros(n, np.uint8), 0, i) for i, n in enumerate(lengths)])
    rounded = batch.rounded()
    assert batch.tokens <= rounded.tokens <= batch.tokens * 32 / 31
    assert rounded.tokens % (1 << max(0, rounded.tokens.bit_length() - 6)) == 0
    assert torch.equal(rounded.ids_T[: batch.tokens], batch.ids_T)
    assert rounded.offsets[: batch.num_samples + 1] == batch.offsets
    assert tuple(rounded.cu_seqlens.tolist()) == rounded.offsets
    added = [last - first for first, last in itertools.pairwise(rounded.offsets)]
    assert max(added) == max(lengths) == rounded.max_seqlen
    assert len(rounded.sample_keys_B2) == rounded.num_samples
    assert len(rounded.token_flags_T) == rounded.tokens
