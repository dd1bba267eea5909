"""The laws find what is planted, each the fault that it is about; what is right keeps them all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unmask.checks.plugins import check_plugin
from unmask.checks.plugins.fixtures import cutter_cases, objective_subject, sample_tokenizer
from unmask.checks.plugins.runner import CheckResult, run_checks
from unmask.checks.plugins.suites import CUTTER_LAWS, OBJECTIVE_LAWS, SOURCE_LAWS, SamplerFixture, SourceFixture
from unmask.cli import main
from unmask.core.config import build_plugin
from unmask.core.errors import RecipeError
from unmask.core.plugins import PluginObjectiveConfig, PluginSamplerConfig, PluginSourceConfig, make
from unmask.core.types import ObjectiveContext, SourceContext

PLANTED = '''
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from unmask.core.types import SPECIAL, SampleSpec, LossSums, SourceShard, DocumentChunk, MaskedBatch, TokenSpan, logits_at


class Every:
    """Each third ordinary slot of a text."""

    loss_weights = {"third": 1.0}
    metrics = ("loss",)
    sampler = "windows"
    fills = True

    def __init__(self, settings, tools):
        self.vocabulary = tools.vocabulary
        self.modules = nn.Module()

    def at(self, batch, seed):
        marks, starts = batch.token_flags_T.tolist(), batch.offsets
        texts = [range(starts[b], starts[b + 1]) for b in range(batch.num_samples)]
        ordinary = [[slot for slot in text if not marks[slot] & SPECIAL] for text in texts]
        return [slot for text in ordinary for slot in text[::3]]

    def corrupt(self, batch, seed):
        return self.asked(batch, self.at(batch, seed))

    def asked(self, batch, at):
        positions_M = torch.tensor(at, dtype=torch.int64)
        ids_T = batch.ids_T.clone()
        ids_T[positions_M] = self.vocabulary.mask_id
        one_M, num_maskable = torch.ones(len(at)), int(((batch.token_flags_T & SPECIAL) == 0).sum())
        puzzle = replace(batch, ids_T=ids_T)
        return MaskedBatch(puzzle, positions_M, batch.ids_T[positions_M], one_M, 0 * one_M, {"third": len(at)}, num_maskable)

    def nats(self, encoder, head, puzzle):
        logits_MV = logits_at(encoder, head, puzzle.batch, puzzle.positions_M)
        return F.cross_entropy(logits_MV, puzzle.labels_M, reduction="none")

    def loss(self, encoder, head, puzzle):
        total = self.nats(encoder, head, puzzle).sum()
        return LossSums({"third": total}, {"loss": (total.detach(), len(puzzle.positions_M))})


class Impure(Every):
    def at(self, batch, seed):
        return [slot for slot in super().at(batch, seed) if random.random() < 0.5]


class Remembers(Every):
    calls = 0

    def at(self, batch, seed):
        self.calls += 1
        return super().at(batch, seed)[self.calls > 1 :]


class ByPlace(Every):
    def at(self, batch, seed):
        return [slot for slot in super().at(batch, seed) if slot % 2]


class InPlace(Every):
    def corrupt(self, batch, seed):
        puzzle = super().corrupt(batch, seed)
        batch.ids_T[puzzle.positions_M] = self.vocabulary.mask_id
        return puzzle


class AsksSpecials(Every):
    def at(self, batch, seed):
        return sorted({*super().at(batch, seed), *batch.offsets[: batch.num_samples]})


class AsksFiller(Every):
    def at(self, batch, seed):
        return [*super().at(batch, seed), *range(batch.tokens, len(batch.ids_T))]


class Descends(Every):
    def at(self, batch, seed):
        return super().at(batch, seed)[::-1]


class AnswersHidden(Every):
    def corrupt(self, batch, seed):
        puzzle = super().corrupt(batch, seed)
        return replace(puzzle, labels_M=puzzle.batch.ids_T[puzzle.positions_M])


class Miscounts(Every):
    def corrupt(self, batch, seed):
        return replace(super().corrupt(batch, seed), denominators={"second": 1})


class Beyond(Every):
    def corrupt(self, batch, seed):
        puzzle = super().corrupt(batch, seed)
        return replace(puzzle, batch=replace(puzzle.batch, ids_T=puzzle.batch.ids_T + 1000))


class Silent(Every):
    def at(self, batch, seed):
        return []


class Mean(Every):
    def nats(self, encoder, head, puzzle):
        nats_M = super().nats(encoder, head, puzzle)
        return nats_M / max(1, len(nats_M))


class Unnamed(Every):
    metrics = ("loss", "accuracy")


class Noisy(Every):
    def nats(self, encoder, head, puzzle):
        nats_M = super().nats(encoder, head, puzzle)
        return nats_M + torch.rand_like(nats_M)


class Detached(Every):
    def nats(self, encoder, head, puzzle):
        return super().nats(encoder, head, puzzle).detach()


class NanAlone(Every):
    def loss(self, encoder, head, puzzle):
        total = self.nats(encoder, head, puzzle).sum() * (len(puzzle.positions_M) / torch.tensor(float(len(puzzle.positions_M))))
        return LossSums({"third": total}, {"loss": (total.detach(), len(puzzle.positions_M))})


class WithoutTerms(Every):
    loss_weights = {}


class Breaks(Every):
    def corrupt(self, batch, seed):
        return 1 / 0


class Pieces:
    """Pieces of `length` tokens, in the order of the text; a document without tokens has none."""

    def __init__(self, settings, tools):
        self.tools = tools
        self.spans = [
            TokenSpan(document, first, min(first + tools.length, tokens))
            for document, tokens in enumerate(tools.lengths_N.tolist())
            for first in range(0, tokens, tools.length)
        ]

    def count(self, epoch):
        return len(self.spans)

    def cut(self, epoch, sample):
        return SampleSpec(epoch, sample, (self.spans[sample],))


class Overruns(Pieces):
    def cut(self, epoch, sample):
        document, first, _, _ = self.spans[sample]
        return SampleSpec(epoch, sample, (TokenSpan(document, first, first + self.tools.length),))


class TooLong(Pieces):
    def cut(self, epoch, sample):
        document, _, last, _ = self.spans[sample]
        return SampleSpec(epoch, sample, (TokenSpan(document, 0, last),))


class Grows(Pieces):
    def count(self, epoch):
        return len(self.spans) + min(epoch, 1)


class OneKey(Pieces):
    def cut(self, epoch, sample):
        return SampleSpec(epoch, 0, (self.spans[sample],))


class NoEpoch(Pieces):
    def cut(self, epoch, sample):
        return SampleSpec(0, sample, (self.spans[sample],))


class Draws(Pieces):
    def cut(self, epoch, sample):
        return SampleSpec(epoch, sample, (random.choice(self.spans),))


class Counts:
    """Lines of numbers, in documents of four."""

    @dataclass(frozen=True)
    class Settings:
        documents: int = 6
        begin: int = 1

    def __init__(self, settings, tools):
        self.settings = settings

    @property
    def fingerprint(self):
        return f"counts {self.settings}"

    def parts(self):
        return [SourceShard("first", 0, 3), SourceShard("second", 3, self.settings.documents)]

    def texts(self, part):
        return [" ".join(str(self.settings.begin + 4 * n + k) for k in range(4)) for n in range(*part[1:])]

    def documents(self, part):
        for number, text in enumerate(self.texts(part)):
            yield DocumentChunk(number, 0, text, len(text) + 1, last=True)


class AnyOrder(Counts):
    def texts(self, part):
        return random.sample(super().texts(part), len(super().texts(part)))


class PartsTurn(Counts):
    turned = False

    def parts(self):
        self.turned = not self.turned
        return super().parts()[:: -1 if self.turned else 1]


class Forgets(Counts):
    fingerprint = "counts"


class NewEachTime(Counts):
    @property
    def fingerprint(self):
        return str(random.random())


class NeverEnds(Counts):
    def documents(self, part):
        return (passage._replace(last=False) for passage in super().documents(part))


class CountsOn(Counts):
    def documents(self, part):
        return (passage._replace(document=part.first_byte + passage.document) for passage in super().documents(part))


class Decomposed(Counts):
    def texts(self, part):
        return ["cafe\\u0301", *super().texts(part)[1:]]


class OneLump(Counts):
    def texts(self, part):
        return ["word " * 210_000]


class Blank(Counts):
    def texts(self, part):
        return [" "]


class Salted(Counts):
    @property
    def fingerprint(self):
        return f"counts {hash(str(self.settings))}"
'''


@pytest.fixture(scope="module", autouse=True)
def _planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted_laws.py").write_text(PLANTED, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    torch.set_num_threads(threads)


def broken(verdicts: list[CheckResult]) -> dict[str, str]:
    return {verdict.check: verdict.detail for verdict in verdicts if not verdict.passed}


def of_objective(name: str) -> dict[str, str]:
    settings = build_plugin(PluginObjectiveConfig, {"kind": f"planted_laws:{name}"}, "here")
    objective = make(settings, ObjectiveContext(sample_tokenizer(), 32))
    return broken(run_checks(OBJECTIVE_LAWS, objective_subject(objective)))


def of_cutter(name: str) -> dict[str, str]:
    settings = build_plugin(PluginSamplerConfig, {"kind": f"planted_laws:{name}"}, "here")
    return broken(run_checks(CUTTER_LAWS, SamplerFixture(lambda tools: make(settings, tools), cutter_cases())))


def of_source(name: str) -> dict[str, str]:
    def source_of(**table: int):
        settings = build_plugin(PluginSourceConfig, {"kind": f"planted_laws:{name}", **table}, "here")
        return lambda: make(settings, SourceContext(()))

    return broken(run_checks(SOURCE_LAWS, SourceFixture(source_of(), [("begin = 2", source_of(begin=2))])))


def test_what_is_right_keeps_every_law() -> None:
    assert (of_objective("Every"), of_cutter("Pieces"), of_source("Counts")) == ({}, {}, {})


@pytest.mark.parametrize(
    ("name", "law", "says"),
    [
        ("Impure", "corrupt is pure", "it drew from a generator (random)"),
        ("Remembers", "corrupt is pure", "the second time"),
        ("ByPlace", "a text is asked alike in any company", "is another alone than"),
        ("InPlace", "corrupt is pure", "changed in place"),
        ("AsksSpecials", "special pieces are never asked", "slots [0, "),
        ("AsksFiller", "asked slots ascend inside texts", "lie in no text"),
        ("Descends", "asked slots ascend inside texts", "does not ascend"),
        ("AnswersHidden", "answers are what stood there", "not batch.ids_T[positions_M]"),
        ("Miscounts", "counts match what is asked", "['second']"),
        ("Beyond", "the layout stays", "beyond the vocabulary"),
        ("Silent", "asks something", "nothing was asked in 10 texts"),
        ("Mean", "losses add over micro batches", "is it a mean?"),
        ("Unnamed", "the loss is named sums", "not ['accuracy', 'loss']"),
        ("Noisy", "the loss draws nothing", "belongs into `corrupt`"),
        ("Detached", "gradients are finite", "was something detached?"),
        ("NanAlone", "nothing askable costs nothing", "no number where nothing is asked"),
        ("WithoutTerms", "says what it is", "`loss_weights` is empty"),
        ("Breaks", "corrupt is pure", "ZeroDivisionError: division by zero (at "),
    ],
)
def test_a_planted_objective_is_found(name: str, law: str, says: str) -> None:
    assert says in of_objective(name)[law]


@pytest.mark.parametrize(
    ("name", "law", "says"),
    [
        ("Overruns", "a sample is one span of a document", "of a document of"),
        ("TooLong", "a sample fits", "32 tokens"),
        ("Grows", "the number of samples is known", "epochs of different size"),
        ("OneKey", "a sample has its own key", "has the epoch and number of epoch 0, sample 0"),
        ("NoEpoch", "a sample has its own key", "epoch 1, sample 0 has the epoch and number of epoch 0, sample 0"),
        ("Draws", "cut is pure", "read backwards"),
    ],
)
def test_a_planted_cutter_is_found(name: str, law: str, says: str) -> None:
    assert says in of_cutter(name)[law]


@pytest.mark.parametrize(
    ("name", "law", "says"),
    [
        ("AnyOrder", "documents are the same each time", "the second reading"),
        ("PartsTurn", "parts come in a fixed order", "another order the second time"),
        ("Forgets", "a fingerprint changes with the text", "one fingerprint for two texts: as it is, and begin = 2"),
        ("NewEachTime", "a fingerprint is stable", "fingerprint"),
        ("NeverEnds", "passages come in order", "where (0, 1) come next"),
        ("CountsOn", "passages come in order", "second, passage 0: document and piece are (3, 0) where (0, 0)"),
        ("Decomposed", "text is text", "not NFC"),
        ("OneLump", "passages are bounded", "1,050,000 characters"),
        ("Blank", "text is text", "nothing but white space"),
    ],
)
def test_a_planted_source_is_found(name: str, law: str, says: str) -> None:
    assert says in of_source(name)[law]


def test_a_whole_check_with_another_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["unmask", "check-plugin", "planted_laws:Salted", "--settings", "documents=4", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 2 and not told["passed"]
    assert (told["role"], told["settings"].splitlines()[1]) == ("source", "documents = 4")
    (only,) = [verdict for verdict in told["results"] if not verdict["passed"]]
    assert only["check"] == "another process gives the same" and "hash()" in only["detail"]


def test_the_page_names_every_law() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8").split())
    for laws in (OBJECTIVE_LAWS, CUTTER_LAWS, SOURCE_LAWS):
        for law in laws:
            assert f"**{law.name}**: {' '.join(law.sentence.split())}" in page


def test_what_has_no_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has the methods of no role"):
        check_plugin("planted_laws:LossSums")
    with pytest.raises(RecipeError, match="TEXT is for sources"):
        check_plugin("planted_laws:Pieces", paths=[tmp_path])
    with pytest.raises(RecipeError, match=r"`Pieces` in .* is no source: it has no `parts`, `documents`"):
        check_plugin("planted_laws:Pieces", role="source")
