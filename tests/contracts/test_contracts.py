"""What contracts.py promises, of everything that claims to keep it: encoders, objectives, sources, sinks.

A new encoder, objective, source or sink joins by one line in a list below.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unmask.contracts import FILLER_ID, SPECIAL, WORD_START, Encoder, Head, Objective, Sink, Source, Text, pack, unpack
from unmask.nn import EncoderSettings, ModernSettings, TutorialSettings, build
from unmask.objectives.mlm import Mlm, MlmSettings
from unmask.text.sources import FileSource, MemorySource
from unmask.train.track import JsonLines, read_log

VOCABULARY, SPECIALS, MASK = 40, 5, 4
ORDINARY = np.arange(SPECIALS, VOCABULARY)

ENCODERS: list[EncoderSettings] = [
    ModernSettings(layers=3, width=32, heads=2, feed_forward=24, local_window=8),
    TutorialSettings(layers=2, width=32, heads=2, feed_forward=24),
]
OBJECTIVES: list[Objective] = [
    Mlm(MlmSettings(rate=0.15), MASK, ORDINARY),
    Mlm(MlmSettings(rate=0.4, choose="word"), MASK, ORDINARY),
    Mlm(MlmSettings(rate=0.3, choose="span", mask=0.5, random=0.5, keep=0.0), MASK, ORDINARY),
]
SOURCES: list[Callable[[Path, Sequence[str]], Source]] = [
    lambda folder, texts: MemorySource(texts),
    lambda folder, texts: FileSource(files(folder, texts), "file", "strict"),
    lambda folder, texts: FileSource([files(folder, texts)[0].parent], "blank-line", "strict"),
]
SINKS: list[Callable[[Path], Sink]] = [JsonLines]

encoders = pytest.mark.parametrize("shape", ENCODERS, ids=lambda shape: shape.kind)
objectives = pytest.mark.parametrize("objective", OBJECTIVES, ids=["token", "word", "span"])
sources = pytest.mark.parametrize("source_of", SOURCES, ids=["memory", "files", "folder"])
sinks = pytest.mark.parametrize("sink_of", SINKS, ids=["json lines"])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(shape: EncoderSettings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    encoder, head = build(shape, VOCABULARY)
    return encoder.eval(), head.eval()


def text(length: int, number: int, askable: bool = True) -> Text:
    """Framed by special tokens; about every second token starts a word."""
    draw = np.random.default_rng(number)
    ids = np.where(np.arange(length) % (length - 1) == 0, 2, draw.integers(SPECIALS, VOCABULARY, length))
    marks = np.where(draw.random(length) < 0.6, WORD_START, 0).astype(np.uint8)
    marks[[0, -1] if askable else slice(None)] = SPECIAL
    return Text(ids, marks, epoch=2, number=number)


# Encoders ------------------------------------------------------------------------------------------------------------


@encoders
def test_an_encoder_says_what_it_is(shape: EncoderSettings) -> None:
    encoder, head = made(shape)
    assert isinstance(encoder, Encoder) and isinstance(head, Head)
    assert (encoder.width, encoder.vocabulary) == (shape.width, VOCABULARY)
    assert encoder.token_table.shape == (VOCABULARY, shape.width)
    assert any(parameter is encoder.token_table for parameter in encoder.parameters())
    assert len(encoder.blocks) == shape.layers
    assert all(any(block is module for module in encoder.modules()) for block in encoder.blocks)
    batch = pack([text(9, 1), text(4, 2)])
    hidden_TD = encoder(batch)
    assert hidden_TD.shape == (13, shape.width) and hidden_TD.dtype == torch.float32
    logits_MV = head(hidden_TD[[3, 7]], encoder.token_table)
    assert logits_MV.shape == (2, VOCABULARY) and logits_MV.dtype == torch.float32


@encoders
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=9), filler=st.integers(0, 40))
def test_a_text_is_alone_whatever_lies_beside_it(shape: EncoderSettings, lengths: list[int], filler: int) -> None:
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
def test_gradients_are_finite_beside_a_filler_text(shape: EncoderSettings, objective: Objective) -> None:
    encoder, head = made(shape)
    lengths = [30, 3, 64, 2, 17]
    puzzle = objective.corrupt(pack([text(n, i) for i, n in enumerate(lengths)], slots=200), seed=4)
    loss = objective.loss(encoder.train(), head.train(), puzzle)
    sum(loss.sums.values(), torch.zeros(())).backward()
    gradients = [parameter.grad for module in (encoder, head) for parameter in module.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    tied = isinstance(shape, ModernSettings)  # a tied table also has the gradient of the decoder
    assert FILLER_ID not in puzzle.batch.ids_T[: sum(lengths)] and encoder.token_table.grad is not None
    assert tied or not encoder.token_table.grad[FILLER_ID].any(), "nobody asks about the filler text"


# Objectives ----------------------------------------------------------------------------------------------------------


def everything_random() -> tuple[Tensor, str]:
    return torch.get_rng_state(), str(np.random.get_state())


@objectives
def test_an_objective_says_what_it_is(objective: Objective) -> None:
    assert objective.terms and all(weight > 0 for weight in objective.terms.values())
    assert isinstance(objective.parts, nn.Module) and isinstance(objective.fills, bool)
    assert objective.cutter == "windows"


@objectives
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=8), seed=st.integers(0, 2**63))
def test_corrupting_is_pure_and_counts_what_it_asks(objective: Objective, lengths: list[int], seed: int) -> None:
    batch = pack([text(length, number) for number, length in enumerate(lengths)])
    before, generators = batch.ids_T.clone(), everything_random()
    puzzle, again = objective.corrupt(batch, seed), objective.corrupt(batch, seed)
    assert torch.equal(batch.ids_T, before), "the batch is as it was"
    assert torch.equal(generators[0], torch.get_rng_state()) and generators[1] == everything_random()[1]
    for name in ("at_M", "answer_M", "weight_M", "chance_M"):
        assert torch.equal(getattr(puzzle, name), getattr(again, name))
    assert torch.equal(puzzle.batch.ids_T, again.batch.ids_T) and puzzle.counts == again.counts
    assert set(puzzle.counts) == set(objective.terms)
    assert puzzle.counts["mlm"] == len(puzzle.at_M) == len(puzzle.answer_M) == len(puzzle.chance_M)
    assert (puzzle.at_M.diff() > 0).all() and torch.equal(puzzle.answer_M, before[puzzle.at_M])
    untouched = torch.ones(len(before), dtype=torch.bool).index_fill_(0, puzzle.at_M, False)
    assert torch.equal(puzzle.batch.ids_T[untouched], before[untouched])
    assert ((puzzle.chance_M >= 0) & (puzzle.chance_M < 1)).all()


@objectives
@encoders
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(2, 50), min_size=2, max_size=8), data=st.data())
def test_sums_add_over_any_split_into_batches(
    objective: Objective, shape: EncoderSettings, lengths: list[int], data: st.DataObject
) -> None:
    encoder, head = made(shape)
    texts = [text(length, number) for number, length in enumerate(lengths)]
    group_of = data.draw(st.lists(st.integers(0, 3), min_size=len(texts), max_size=len(texts)))
    order = sorted(range(len(texts)), key=lambda number: group_of[number])
    groups = [[texts[i] for i in members] for _, members in itertools.groupby(order, key=lambda i: group_of[i])]
    with torch.no_grad():
        puzzles = [objective.corrupt(pack(group), 9) for group in [texts, *groups]]
        whole, *parts = [objective.loss(encoder, head, puzzle) for puzzle in puzzles]
    for term in objective.terms:
        assert puzzles[0].counts[term] == sum(puzzle.counts[term] for puzzle in puzzles[1:])
        total = torch.stack([part.sums[term] for part in parts]).sum()
        torch.testing.assert_close(whole.sums[term], total, rtol=1e-4, atol=1e-4)
    for name, (value, count) in whole.seen.items():
        assert count == sum(part.seen[name][1] for part in parts)
        assert float(value) == pytest.approx(sum(float(part.seen[name][0]) for part in parts), rel=1e-4, abs=1e-4)


@objectives
@encoders
def test_a_text_with_nothing_to_ask_costs_nothing(objective: Objective, shape: EncoderSettings) -> None:
    encoder, head = made(shape)
    puzzle = objective.corrupt(pack([text(6, 1, askable=False)]), 0)
    assert all(count == 0 for count in puzzle.counts.values()) and not len(puzzle.at_M)
    loss = objective.loss(encoder.train(), head.train(), puzzle)
    assert all(float(total.detach()) == 0 for total in loss.sums.values())
    assert all(float(value) == 0 and count == 0 for value, count in loss.seen.values())
    sum(loss.sums.values(), torch.zeros(())).backward()
    for module in (encoder, head):
        assert all(p.grad is None or not p.grad.any() for p in module.parameters()), "zero, and finite"


# Sources -------------------------------------------------------------------------------------------------------------


def files(folder: Path, texts: Sequence[str]) -> list[Path]:
    below = folder / "texts"
    below.mkdir(exist_ok=True)
    paths = [below / f"{number:03d}.txt" for number in range(len(texts))]
    for path, one in zip(paths, texts, strict=True):
        path.write_text(one, encoding="utf-8")
    return paths


TEXTS = ["One text.\nOf two lines.", "Une the\u0301ière, et du cafe\u0301.", "가나다 " * 50, "the last"]


@sources
def test_a_source_reads_the_same_each_time(tmp_path: Path, source_of: Callable[..., Source]) -> None:
    source = source_of(tmp_path, TEXTS)
    parts = list(source.parts())
    assert parts and parts == list(source.parts())
    first = {part: list(source.documents(part)) for part in parts}
    assert {part: list(source.documents(part)) for part in reversed(parts)} == first, (
        "in any order, any number of times"
    )
    passages = [passage for part in parts for passage in first[part]]
    assert [passage.text for passage in passages] == [unicodedata.normalize("NFC", one) for one in TEXTS]
    assert sum(passage.characters for passage in passages) == sum(len(unicodedata.normalize("NFC", x)) for x in TEXTS)
    for found in first.values():
        assert [passage.document for passage in found] == list(range(len(found)))
        assert all(passage.last and passage.piece == 0 for passage in found)


@sources
def test_a_fingerprint_changes_with_the_text(tmp_path: Path, source_of: Callable[..., Source]) -> None:
    def fingerprint(name: str, texts: Sequence[str]) -> str:
        (tmp_path / name).mkdir()
        return source_of(tmp_path / name, texts).fingerprint

    assert fingerprint("a", TEXTS) == fingerprint("b", TEXTS), "where files lie is no part of it"
    changed = [
        [*TEXTS, "one more"], TEXTS[:-1], [TEXTS[1], TEXTS[0], *TEXTS[2:]],
        [TEXTS[0] + ".", *TEXTS[1:]], [TEXTS[0][:-1], TEXTS[0][-1] + TEXTS[1], *TEXTS[2:]],
    ]  # fmt: skip
    fingerprints = [fingerprint(str(number), texts) for number, texts in enumerate([TEXTS, *changed])]
    assert len(set(fingerprints)) == len(fingerprints)


def test_a_fingerprint_changes_with_the_rules(tmp_path: Path) -> None:
    paths = files(tmp_path, TEXTS)
    rules = itertools.product(("blank-line", "line", "file"), ("strict", "replace"))
    assert len({FileSource(paths, document, errors).fingerprint for document, errors in rules}) == 6


# Sinks ---------------------------------------------------------------------------------------------------------------


@sinks
def test_a_line_is_on_the_disk_before_write_returns(tmp_path: Path, sink_of: Callable[[Path], Sink]) -> None:
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
