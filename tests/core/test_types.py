"""What contracts.py promises, of everything that claims to keep it: encoders, objectives, samplers, sources, sinks.

A new one joins by one line in a list below. The laws of objectives, samplers and sources are those of
unmask.checks.plugins, by which `unmask check-plugin` judges what comes from outside; tests/checks plants faults in
such, to see that they are found.
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

from unmask.checks.plugins.fixtures import cutter_cases, objective_subject
from unmask.checks.plugins.runner import CheckResult, run_checks
from unmask.checks.plugins.suites import CUTTER_LAWS, OBJECTIVE_LAWS, SOURCE_LAWS, SamplerFixture, SourceFixture
from unmask.core.types import (
    FILLER_ID,
    SENTENCE_START,
    SPECIAL,
    WORD_START,
    Encoder,
    Head,
    MetricLogger,
    Objective,
    Sample,
    Sampler,
    SamplerContext,
    Source,
    pack,
    unpack,
)
from unmask.data.prepare import CorpusGroup
from unmask.data.sampling import EPOCH_STRIDE, Mixture, WindowSampler
from unmask.data.sentence_pairs import PairKind, Pairs
from unmask.data.sources import FileSource, MemorySource
from unmask.models import EncoderConfig, build_model, build_pair
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective
from unmask.training.loggers import JsonlLogger, read_log

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
SINKS: list[Callable[[Path], MetricLogger]] = [JsonlLogger]

encoders = pytest.mark.parametrize("shape", ENCODERS, ids=lambda shape: shape.kind)
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=["token", "whole-word", "span", "ngram"])
sources = pytest.mark.parametrize(
    "source_of", SOURCES, ids=["memory", "files", "folder", "jsonl", "jsonl.gz", "csv", "parquet"]
)
sinks = pytest.mark.parametrize("sink_of", SINKS, ids=["json lines"])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(shape: EncoderConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    encoder, head = build_model(shape, VOCABULARY)
    return encoder.eval(), head.eval()


def text(length: int, number: int, askable: bool = True) -> Sample:
    """Framed by special tokens; about every second token starts a word."""
    draw = np.random.default_rng(number)
    ids = np.where(np.arange(length) % (length - 1) == 0, 2, draw.integers(SPECIALS, VOCABULARY, length))
    marks = np.where(draw.random(length) < 0.6, WORD_START, 0).astype(np.uint8)
    marks[[0, -1] if askable else slice(None)] = SPECIAL
    return Sample(ids, marks, epoch=2, number=number)


# Encoders ------------------------------------------------------------------------------------------------------------


@encoders
def test_an_encoder_says_what_it_is(shape: EncoderConfig) -> None:
    encoder, head = made(shape)
    assert isinstance(encoder, Encoder) and isinstance(head, Head)
    assert (encoder.width, encoder.vocabulary) == (shape.hidden_size, VOCABULARY)
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
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=9), filler=st.integers(0, 40))
def test_a_text_is_alone_whatever_lies_beside_it(shape: EncoderConfig, lengths: list[int], filler: int) -> None:
    """Neighbours and a filler text change nothing: each text's rows are those of the text alone."""
    encoder, _ = made(shape)
    texts = [text(length, number) for number, length in enumerate(lengths)]
    batch = pack(texts, slots=sum(lengths) + filler)
    with torch.no_grad():
        rows = unpack(encoder(batch), batch)
        for one, row_SD in zip(texts, rows, strict=True):
            torch.testing.assert_close(row_SD, encoder(pack([one])), atol=1e-5, rtol=1e-5)


@encoders
@objectives
def test_gradients_are_finite_beside_a_filler_text(shape: EncoderConfig, objective: Objective) -> None:
    encoder, head = made(shape)
    lengths = [30, 3, 64, 2, 17]
    masked = objective.corrupt(pack([text(n, i) for i, n in enumerate(lengths)], slots=200), seed=4)
    loss = objective.loss(encoder.train(), head.train(), masked)
    sum(loss.sums.values(), torch.zeros(())).backward()
    gradients = [parameter.grad for module in (encoder, head) for parameter in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    tied = isinstance(shape, ModernBertConfig | BertConfig)  # a tied table also has the gradient of the decoder
    assert FILLER_ID not in masked.batch.ids_T[: sum(lengths)] and encoder.token_embedding.grad is not None
    assert tied or not encoder.token_embedding.grad[FILLER_ID].any(), "nobody asks about the filler text"


# Objectives ----------------------------------------------------------------------------------------------------------


def broken(verdicts: Sequence[CheckResult]) -> list[str]:
    return [f"{verdict.check}: {verdict.detail}" for verdict in verdicts if not verdict.passed]


@objectives
@encoders
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), max_size=7), seed=st.integers(0, 2**63))
def test_an_objective_keeps_its_laws(objective: Objective, shape: EncoderConfig, lengths: list[int], seed: int) -> None:
    texts = [text(length, number) for number, length in enumerate([*lengths, 9])]
    assert not broken(run_checks(OBJECTIVE_LAWS, objective_subject(objective, shape, texts, VOCABULARY, seed)))


@objectives
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=8), seed=st.integers(0, 2**63))
def test_what_is_not_asked_is_not_hidden(objective: Objective, lengths: list[int], seed: int) -> None:
    batch = pack([text(length, number) for number, length in enumerate(lengths)])
    masked = objective.corrupt(batch, seed)
    untouched = torch.ones(len(batch.ids_T), dtype=torch.bool).index_fill_(0, masked.positions_M, False)
    assert torch.equal(masked.batch.ids_T[untouched], batch.ids_T[untouched])
    assert masked.denominators["mlm"] == len(masked.positions_M)


# Samplers -------------------------------------------------------------------------------------------------------------


def mixed(tools: SamplerContext) -> Sampler:
    """Two texts, the second seen more often than it is long; one text alone where there is but one document."""
    half = max(1, len(tools.lengths_N) // 2)
    bounds = [(0, half, 0.3), (half, len(tools.lengths_N), 0.7)]
    groups = [CorpusGroup(f"text {first}", weight, first, last) for first, last, weight in bounds if first < last]
    return Mixture(tools.lengths_N, groups, tools.length, tools.seed, num_special_tokens=2, stride=EPOCH_STRIDE)


CUTTERS: list[Callable[[SamplerContext], Sampler]] = [
    lambda tools: WindowSampler(tools.lengths_N, tools.length, tools.seed),
    mixed,
]


@pytest.mark.parametrize("cutter_of", CUTTERS, ids=["windows", "mixture"])
def test_a_cutter_keeps_its_laws(cutter_of: Callable[[SamplerContext], Sampler]) -> None:
    assert not broken(run_checks(CUTTER_LAWS, SamplerFixture(cutter_of, cutter_cases())))


class Marked:
    """Documents in which about every fourth token starts a sentence."""

    def __init__(self, tools: SamplerContext) -> None:
        self.lengths_N = tools.lengths_N
        self._marks = [
            np.where(np.random.default_rng(n).random(n) < 0.25, SENTENCE_START, 0).astype(np.uint8)
            for n in tools.lengths_N.tolist()
        ]
        self.sentences_N = np.array([int((one[1:] > 0).sum()) + (len(one) > 0) for one in self._marks])

    def marks(self, document: int, first: int, last: int) -> NDArray[np.uint8]:
        return self._marks[document][first:last]


@pytest.mark.parametrize("kind", ["next-sentence", "sentence-order"])
def test_a_cutter_of_pairs_keeps_the_laws(kind: PairKind) -> None:
    cases = [case for case in cutter_cases() if len(case.lengths_N) > 1]
    assert len(cases) > 1
    subject = SamplerFixture(lambda tools: Pairs(Marked(tools), tools.length, tools.seed, kind), cases, spans=2)
    assert not broken(run_checks(CUTTER_LAWS, subject))


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(4, 60), min_size=1, max_size=7), seed=st.integers(0, 2**63))
def test_masks_and_pairs_keep_the_laws_of_objectives(lengths: list[int], seed: int) -> None:
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
        assert not broken(run_checks(OBJECTIVE_LAWS, objective_subject(objective, shape, texts, VOCABULARY, seed)))


# Sources -------------------------------------------------------------------------------------------------------------


def files(folder: Path, texts: Sequence[str]) -> list[Path]:
    below = folder / "texts"
    below.mkdir(exist_ok=True)
    paths = [below / f"{number:03d}.txt" for number in range(len(texts))]
    for path, one in zip(paths, texts, strict=True):
        path.write_text(one, encoding="utf-8")
    return paths


def rows(path: Path, texts: Sequence[str]) -> Path:
    """A table with one text a row."""
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
def test_a_source_keeps_its_laws(tmp_path: Path, source_of: Callable[..., Source]) -> None:
    def made(name: str, texts: Sequence[str]) -> Callable[[], Source]:
        (tmp_path / name).mkdir()
        return lambda: source_of(tmp_path / name, texts)

    variants = [(f"change {number}", made(str(number), texts)) for number, texts in enumerate(CHANGED)]
    assert not broken(run_checks(SOURCE_LAWS, SourceFixture(made("as it is", TEXTS), variants)))
    fingerprints = {source().fingerprint for _, source in variants} | {made("a", TEXTS)().fingerprint}
    assert len(fingerprints) == 1 + len(CHANGED)
    assert made("b", TEXTS)().fingerprint in fingerprints, "where files lie is no part of it"


@sources
def test_a_source_gives_the_texts(tmp_path: Path, source_of: Callable[..., Source]) -> None:
    source = source_of(tmp_path, TEXTS)
    passages = [passage for part in source.parts() for passage in source.documents(part)]
    assert [passage.text for passage in passages] == [unicodedata.normalize("NFC", one) for one in TEXTS]
    assert sum(passage.characters for passage in passages) == sum(len(unicodedata.normalize("NFC", x)) for x in TEXTS)


def test_a_fingerprint_changes_with_the_rules(tmp_path: Path) -> None:
    paths = files(tmp_path, TEXTS)
    rules = itertools.product(("blank-line", "line", "file"), ("strict", "replace"))
    assert len({FileSource(paths, document, errors).fingerprint for document, errors in rules}) == 6


# Sinks ---------------------------------------------------------------------------------------------------------------


@sinks
def test_a_line_is_on_the_disk_before_write_returns(tmp_path: Path, sink_of: Callable[[Path], MetricLogger]) -> None:
    path = tmp_path / "log.jsonl"
    sink = sink_of(path)
    written: list[dict[str, object]] = []
    for step in (1, 2, 5):
        written.append({"step": step, "loss": 1.5 / step, "note": "Straße", "nothing": None})
        sink.write(step, {name: value for name, value in written[-1].items() if name != "step"})
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == written
    sink.close()
    sink.close()
    later = sink_of(path)  # a run that goes on adds to what stands there
    later.write(6, {})
    later.close()
    assert list(read_log(path)) == [*written, {"step": 6}]
