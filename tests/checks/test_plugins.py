"""Each planted fault is found by the check that is about it; correct plugins pass all checks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unmask.checks.plugins import check_plugin
from unmask.checks.plugins.fixtures import (
    CheckResult,
    LoggerFixture,
    SamplerFixture,
    SourceFixture,
    objective_fixture,
    run_checks,
    sample_tokenizer,
    sampler_contexts,
)
from unmask.checks.plugins.suites import LOGGER_CHECKS, OBJECTIVE_CHECKS, SAMPLER_CHECKS, SOURCE_CHECKS
from unmask.cli import main
from unmask.core.config import build_plugin
from unmask.core.errors import RecipeError
from unmask.core.plugins import (
    PluginLoggerConfig,
    PluginObjectiveConfig,
    PluginSamplerConfig,
    PluginSourceConfig,
    make,
)
from unmask.core.types import ObjectiveContext, SourceContext

PLANTED = '''
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from unmask.core.types import SPECIAL, DocumentChunk, LossSums, MaskedBatch, SampleSpec, SourceShard, TokenSpan
from unmask.core.types import logits_at


class EveryThird:
    """Masks every third regular token of a sample."""

    loss_weights = {"third": 1.0}
    metrics = ("loss",)
    sampler = "windows"

    def __init__(self, settings, tools):
        self.vocabulary = tools.vocabulary
        self.modules = nn.Module()

    def positions(self, batch, seed):
        marks, starts = batch.token_flags_T.tolist(), batch.offsets
        texts = [range(starts[b], starts[b + 1]) for b in range(batch.num_samples)]
        ordinary = [[slot for slot in text if not marks[slot] & SPECIAL] for text in texts]
        return [slot for text in ordinary for slot in text[::3]]

    def corrupt(self, batch, seed):
        return self.mask(batch, self.positions(batch, seed))

    def mask(self, batch, at):
        positions_M = torch.tensor(at, dtype=torch.int64)
        ids_T = batch.ids_T.clone()
        ids_T[positions_M] = self.vocabulary.mask_id
        num_maskable = int(((batch.token_flags_T & SPECIAL) == 0).sum())
        masked = replace(batch, ids_T=ids_T)
        return MaskedBatch(masked, positions_M, batch.ids_T[positions_M], {"third": len(at)}, num_maskable)

    def nats(self, encoder, head, masked):
        logits_MV = logits_at(encoder, head, masked.batch, masked.positions_M)
        return F.cross_entropy(logits_MV, masked.labels_M, reduction="none")

    def loss(self, encoder, head, masked):
        total = self.nats(encoder, head, masked).sum()
        return LossSums({"third": total}, {"loss": (total.detach(), len(masked.positions_M))})


class Impure(EveryThird):
    def positions(self, batch, seed):
        return [slot for slot in super().positions(batch, seed) if random.random() < 0.5]


class Stateful(EveryThird):
    calls = 0

    def positions(self, batch, seed):
        self.calls += 1
        return super().positions(batch, seed)[self.calls > 1 :]


class ByPosition(EveryThird):
    def positions(self, batch, seed):
        return [slot for slot in super().positions(batch, seed) if slot % 2]


class InPlace(EveryThird):
    def corrupt(self, batch, seed):
        masked = super().corrupt(batch, seed)
        batch.ids_T[masked.positions_M] = self.vocabulary.mask_id
        return masked


class MasksSpecials(EveryThird):
    def positions(self, batch, seed):
        return sorted({*super().positions(batch, seed), *batch.offsets[: batch.num_samples]})


class Outside(EveryThird):
    def mask(self, batch, at):
        masked = super().mask(batch, at)
        positions_M = torch.cat([masked.positions_M, torch.tensor([batch.tokens])])
        return replace(masked, positions_M=positions_M, labels_M=torch.cat([masked.labels_M, torch.tensor([0])]))


class Descends(EveryThird):
    def positions(self, batch, seed):
        return super().positions(batch, seed)[::-1]


class CorruptedLabels(EveryThird):
    def corrupt(self, batch, seed):
        masked = super().corrupt(batch, seed)
        return replace(masked, labels_M=masked.batch.ids_T[masked.positions_M])


class Miscounts(EveryThird):
    def corrupt(self, batch, seed):
        return replace(super().corrupt(batch, seed), denominators={"second": 1})


class OutsideVocabulary(EveryThird):
    def corrupt(self, batch, seed):
        masked = super().corrupt(batch, seed)
        return replace(masked, batch=replace(masked.batch, ids_T=masked.batch.ids_T + 1000))


class MasksNothing(EveryThird):
    def positions(self, batch, seed):
        return []


class Mean(EveryThird):
    def nats(self, encoder, head, masked):
        nats_M = super().nats(encoder, head, masked)
        return nats_M / max(1, len(nats_M))


class Unnamed(EveryThird):
    metrics = ("loss", "accuracy")


class Noisy(EveryThird):
    def nats(self, encoder, head, masked):
        nats_M = super().nats(encoder, head, masked)
        return nats_M + torch.rand_like(nats_M)


class Detached(EveryThird):
    def nats(self, encoder, head, masked):
        return super().nats(encoder, head, masked).detach()


class NanAlone(EveryThird):
    def loss(self, encoder, head, masked):
        count = len(masked.positions_M)
        total = self.nats(encoder, head, masked).sum() * (count / torch.tensor(float(count)))
        return LossSums({"third": total}, {"loss": (total.detach(), len(masked.positions_M))})


class NoTerms(EveryThird):
    loss_weights = {}


class Raises(EveryThird):
    def corrupt(self, batch, seed):
        return 1 / 0


class Windows:
    """Windows of `length` tokens, in the order of the text; an empty document has none."""

    def __init__(self, settings, tools):
        self.tools = tools
        self.spans = [
            TokenSpan(document, first, min(first + tools.length, tokens))
            for document, tokens in enumerate(tools.lengths.tolist())
            for first in range(0, tokens, tools.length)
        ]

    def count(self, epoch):
        return len(self.spans)

    def spec(self, epoch, sample):
        return SampleSpec(epoch, sample, (self.spans[sample],))


class Overruns(Windows):
    def spec(self, epoch, sample):
        document, first, _, _ = self.spans[sample]
        return SampleSpec(epoch, sample, (TokenSpan(document, first, first + self.tools.length),))


class TooLong(Windows):
    def spec(self, epoch, sample):
        document, _, last, _ = self.spans[sample]
        return SampleSpec(epoch, sample, (TokenSpan(document, 0, last),))


class Grows(Windows):
    def count(self, epoch):
        return len(self.spans) + min(epoch, 1)


class OneKey(Windows):
    def spec(self, epoch, sample):
        return SampleSpec(epoch, 0, (self.spans[sample],))


class NoEpoch(Windows):
    def spec(self, epoch, sample):
        return SampleSpec(0, sample, (self.spans[sample],))


class Draws(Windows):
    def spec(self, epoch, sample):
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
    def parts(self):  # with three texts a part, two readings would agree once in 36 times
        return [SourceShard("only", 0, 50)]

    def texts(self, part):
        return random.sample(super().texts(part), len(super().texts(part)))


class ReversesParts(Counts):
    turned = False

    def parts(self):
        self.turned = not self.turned
        return super().parts()[:: -1 if self.turned else 1]


class ConstantFingerprint(Counts):
    fingerprint = "counts"


class RandomFingerprint(Counts):
    @property
    def fingerprint(self):
        return str(random.random())


class NeverEnds(Counts):
    def documents(self, part):
        return (passage._replace(last=False) for passage in super().documents(part))


class GlobalNumbers(Counts):
    def documents(self, part):
        return (passage._replace(document=part.first_byte + passage.document) for passage in super().documents(part))


class Decomposed(Counts):
    def texts(self, part):
        return ["cafe\\u0301", *super().texts(part)[1:]]


class OneChunk(Counts):
    def texts(self, part):
        return ["word " * 210_000]


class Blank(Counts):
    def texts(self, part):
        return [" "]


class Salted(Counts):
    @property
    def fingerprint(self):
        return f"counts {hash(str(self.settings))}"

class Lines:
    """Appends one line per number to a file in the run."""

    @dataclass(frozen=True)
    class Settings:
        file: str = "lines.txt"

    def __init__(self, settings, context):
        self.path = context.run / settings.file
        self.path.write_text("")
        for line in context.lines:
            self.write(line["step"], line)

    def write(self, step, metrics):
        with self.path.open("a") as file:
            file.writelines(f"{step} {name} {value}\\n" for name, value in metrics.items())

    def close(self):
        self.closed = True


class NumbersOnly(Lines):
    def write(self, step, metrics):
        super().write(step, {name: value * 1.0 for name, value in metrics.items()})


class NewFile(Lines):
    def __init__(self, settings, context):
        self.path = context.run / "new.txt"
        self.path.touch(exist_ok=False)


class Pops(Lines):
    def write(self, step, metrics):
        metrics.pop("seconds", None)


class Jitters(Lines):
    def write(self, step, metrics):
        super().write(step + random.random(), metrics)


class Overwrites(Lines):
    def close(self):
        (self.path.parent / "log.jsonl").unlink(missing_ok=True)
'''


@pytest.fixture(scope="module", autouse=True)
def _planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted_faults.py").write_text(PLANTED, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    torch.set_num_threads(threads)


def failures(results: list[CheckResult]) -> dict[str, str]:
    return {result.check: result.detail for result in results if not result.passed}


def check_objective(name: str) -> dict[str, str]:
    config = build_plugin(PluginObjectiveConfig, {"kind": f"planted_faults:{name}"}, "here")
    objective = make(config, ObjectiveContext(sample_tokenizer(), 32))
    return failures(run_checks(OBJECTIVE_CHECKS, objective_fixture(objective)))


def check_sampler(name: str) -> dict[str, str]:
    config = build_plugin(PluginSamplerConfig, {"kind": f"planted_faults:{name}"}, "here")
    fixture = SamplerFixture(lambda context: make(config, context), sampler_contexts())
    return failures(run_checks(SAMPLER_CHECKS, fixture))


def check_source(name: str) -> dict[str, str]:
    def creator(**table: int):
        config = build_plugin(PluginSourceConfig, {"kind": f"planted_faults:{name}", **table}, "here")
        return lambda: make(config, SourceContext(()))

    return failures(run_checks(SOURCE_CHECKS, SourceFixture(creator(), [("begin = 2", creator(begin=2))])))


def check_logger(name: str, run: Path) -> dict[str, str]:
    config = build_plugin(PluginLoggerConfig, {"kind": f"planted_faults:{name}"}, "here")
    return failures(run_checks(LOGGER_CHECKS, LoggerFixture(lambda context: make(config, context), run)))


def test_correct_plugins_pass_all_checks(tmp_path: Path) -> None:
    assert (check_objective("EveryThird"), check_sampler("Windows"), check_source("Counts")) == ({}, {}, {})
    assert check_logger("Lines", tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "check", "detail"),
    [
        ("Impure", "corrupt is pure", "it drew from a random generator (random)"),
        ("Stateful", "corrupt is pure", "the second time"),
        ("ByPosition", "masks do not depend on the batch", "alone differs from"),
        ("InPlace", "corrupt is pure", "changed in place"),
        ("MasksSpecials", "special tokens are never masked", "positions [0, "),
        ("Outside", "positions ascend", "are outside the batch of"),
        ("Descends", "positions ascend", "is not ascending"),
        ("CorruptedLabels", "labels are the original ids", "not batch.ids_T[positions_M]"),
        ("Miscounts", "counts match the positions", "['second']"),
        ("OutsideVocabulary", "only ids change", "outside the vocabulary"),
        ("MasksNothing", "some tokens are masked", "no token is masked in 10 samples"),
        ("Mean", "sums add over micro batches", "is it a mean?"),
        ("Unnamed", "loss returns named sums", "not ['accuracy', 'loss']"),
        ("Noisy", "loss is deterministic", "in `corrupt`"),
        ("Detached", "gradients are finite", "was a tensor detached?"),
        ("NanAlone", "nothing to mask costs nothing", "not finite if nothing is masked"),
        ("NoTerms", "attributes are valid", "`loss_weights` is empty"),
        ("Raises", "corrupt is pure", "ZeroDivisionError: division by zero (at "),
    ],
)
def test_a_planted_fault_of_an_objective_is_found(name: str, check: str, detail: str) -> None:
    assert detail in check_objective(name)[check]


@pytest.mark.parametrize(
    ("name", "check", "detail"),
    [
        ("Overruns", "samples are spans of documents", "of a document of"),
        ("TooLong", "samples fit", "32 tokens"),
        ("Grows", "count is constant", "epochs have different numbers of samples"),
        ("OneKey", "keys are unique", "has the epoch and number of epoch 0, sample 0"),
        ("NoEpoch", "keys are unique", "epoch 1, sample 0 has the epoch and number of epoch 0, sample 0"),
        ("Draws", "spec is pure", "read backwards"),
    ],
)
def test_a_planted_fault_of_a_sampler_is_found(name: str, check: str, detail: str) -> None:
    assert detail in check_sampler(name)[check]


@pytest.mark.parametrize(
    ("name", "check", "detail"),
    [
        ("AnyOrder", "documents are reproducible", "the second reading"),
        ("ReversesParts", "parts have a fixed order", "different the second time"),
        (
            "ConstantFingerprint",
            "fingerprint changes with the text",
            "one fingerprint for two texts: unchanged, and begin = 2",
        ),
        ("RandomFingerprint", "fingerprint is stable", "fingerprint"),
        ("NeverEnds", "chunks are in order", "expected (0, 1)"),
        ("GlobalNumbers", "chunks are in order", "second, chunk 0: document and number are (3, 0), expected (0, 0)"),
        ("Decomposed", "text is valid", "not in NFC"),
        ("OneChunk", "chunks are bounded", "1,050,000 characters"),
        ("Blank", "text is valid", "only white space"),
    ],
)
def test_a_planted_fault_of_a_source_is_found(name: str, check: str, detail: str) -> None:
    assert detail in check_source(name)[check]


@pytest.mark.parametrize(
    ("name", "check", "detail"),
    [
        ("NumbersOnly", "every line is accepted", "TypeError"),
        ("NewFile", "a run can be resumed", "FileExistsError"),
        ("Pops", "metrics are unchanged", "`write` changed its metrics to {"),
        ("Jitters", "no generator is used", "it drew from a random generator (random)"),
        ("Overwrites", "files of the run are unchanged", "log.jsonl was changed or removed"),
    ],
)
def test_a_planted_fault_of_a_logger_is_found(name: str, check: str, detail: str, tmp_path: Path) -> None:
    assert detail in check_logger(name, tmp_path)[check]


def test_a_check_with_a_second_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["unmask", "check-plugin", "planted_faults:Salted", "--settings", "documents=4", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    report = json.loads(capsys.readouterr().out)
    assert ended.value.code == 3 and not report["passed"]
    assert (report["role"], report["settings"].splitlines()[1]) == ("source", "documents = 4")
    (failed,) = [result for result in report["results"] if not result["passed"]]
    assert failed["check"] == "results are the same in another process" and "hash()" in failed["detail"]


def test_a_logger_is_recognized_and_checked() -> None:
    report = check_plugin("planted_faults:Lines", ["file=points.txt"])
    assert report.role == "logger" and report.passed and 'file = "points.txt"' in report.settings
    assert [result.check for result in report.results] == [check.name for check in LOGGER_CHECKS]


def test_the_page_names_every_check() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8").split())
    for suite in (OBJECTIVE_CHECKS, SAMPLER_CHECKS, SOURCE_CHECKS, LOGGER_CHECKS):
        for check in suite:
            assert f"**{check.name}**: {' '.join(check.sentence.split())}" in page


def test_a_class_of_no_plugin_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has the methods of no plugin type"):
        check_plugin("planted_faults:LossSums")
    with pytest.raises(RecipeError, match="only a source reads TEXT"):
        check_plugin("planted_faults:Windows", paths=[tmp_path])
    with pytest.raises(RecipeError, match=r"`Windows` in .* is not a valid source: it lacks `parts`, `documents`"):
        check_plugin("planted_faults:Windows", role="source")
