"""Kinds from outside: found, walked as strictly as our own, refused in words, run, and remembered by a run."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from unmask.core.config import build_plugin, dump_config
from unmask.core.errors import RecipeError, TextError
from unmask.core.plugins import PluginObjectiveConfig, PluginSamplerConfig, find, plugin_facts, user_frame
from unmask.core.types import SamplerContext
from unmask.data.sampling import PluginSampler
from unmask.data.settings import DataConfig
from unmask.data.sources import open_text
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import load_recipe

MODULE = '''
from dataclasses import dataclass

import numpy as np

from unmask.core.types import SampleSpec, SourceShard, DocumentChunk, TokenSpan
from unmask.objectives.mlm import MaskedLMObjective, MaskedLMConfig


class Half(MaskedLMObjective):
    """Masked language modelling at half the rate that it is told, with a number of its own beside."""

    @dataclass(frozen=True)
    class Settings:
        mask_rate: float = 0.4
        names: tuple[str, ...] = ()

        def __post_init__(self):
            if self.mask_rate > 1:
                raise ValueError("more than all")

        @property
        def masked_fraction(self):
            return self.mask_rate / 2

    metrics = (*MaskedLMObjective.metrics, "half")

    def __init__(self, settings, tools):
        super().__init__(MaskedLMConfig(mask_rate=settings.mask_rate / 2), tools.vocabulary.mask_id, tools.vocabulary.regular_token_ids)

    def loss(self, encoder, head, puzzle):
        found = super().loss(encoder, head, puzzle)
        total, count = found.metrics["loss"]
        return type(found)(found.sums, {**found.metrics, "half": (total / 2, count)})


class Starts:
    """The beginning of each document."""

    def __init__(self, settings, tools):
        self.lengths, self.length = tools.lengths_N, tools.length

    def count(self, epoch):
        return len(self.lengths)

    def cut(self, epoch, sample):
        return SampleSpec(epoch, sample, (TokenSpan(sample, 0, min(self.length, int(self.lengths[sample]))),))


class TooFar(Starts):
    def cut(self, epoch, sample):
        return SampleSpec(epoch, sample, (TokenSpan(sample, 0, 10_000),))


class Rows:
    """Documents of the paths' names, over and over."""

    @dataclass(frozen=True)
    class Settings:
        documents: int = 60

    def __init__(self, settings, tools):
        self.settings = settings
        self.words = [path.stem for path in tools.paths] or ["cat", "dog", "mat"]

    @property
    def fingerprint(self):
        return f"rows {self.settings} {self.words}"

    def parts(self):
        return [SourceShard("rows", 0, self.settings.documents)]

    def documents(self, part):
        for number in range(part.last_byte):
            text = " ".join(self.words[(number + k * k) % len(self.words)] for k in range(30))
            yield DocumentChunk(number, 0, text, len(text), True)


class Falls(Rows):
    def __init__(self, settings, tools):
        raise OSError("no such place")


class Loose:
    @dataclass
    class Settings:
        mask_rate: float = 0.4

    corrupt = loss = print


class Odd(Half):
    @dataclass(frozen=True)
    class Settings:
        mask_rate: object = object()


class Named(Half):
    @dataclass(frozen=True)
    class Settings:
        kind: str
        mask_rate: float = 0.4


a_rate = 0.4
'''
RECIPE = """\
[data]
document = "file"
held_out = { method = "tail", fraction = "10%" }
tokenizer = { kind = "characters" }
source = { kind = "outside_three:Rows", documents = 40 }
sampler = { kind = "outside_three:Starts" }
[model]
kind = "modernbert"
num_hidden_layers = 1
hidden_size = 16
num_attention_heads = 2
intermediate_size = 16
[objective]
kind = "outside_three:Half"
mask_rate = 0.3
[[stage]]
max_seq_len = 32
batch_size = "4 texts"
[train]
budget = "4 steps"
every = { log = "1 steps", validate = "2 steps", save = "2 steps" }
threads = 1
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, in which outside_three.py lies."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "outside_three.py").write_text(MODULE, encoding="utf-8")
    (folder / "outside_broken.py").write_text("import os\n\nx = 1 / 0\n", encoding="utf-8")
    (folder / "outside_unfinished.py").write_text("def f(:\n", encoding="utf-8")
    (folder / "three.toml").write_text(RECIPE, encoding="utf-8")
    path = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    sys.path[:] = path


def refused(*settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("three.toml", settings)
    return str(caught.value)


def test_a_recipe_holds_what_is_from_outside() -> None:
    recipe = load_recipe("three.toml")
    assert [kind.kind for kind in recipe.outside] == [f"outside_three:{name}" for name in ("Half", "Rows", "Starts")]
    assert recipe.objective.masked_fraction == 0.15
    again = tomllib.loads(dump_config(recipe))
    assert again["objective"] == {"kind": "outside_three:Half", "mask_rate": 0.3, "names": []}
    assert again["data"]["sampler"] == {"kind": "outside_three:Starts"}
    assert load_recipe("three.toml", ("objective.names=['a']",)).objective != recipe.objective
    assert load_recipe("tiny").outside == [] and load_recipe("tiny").objective.masked_fraction == 0.3


def test_another_kind_above_leaves_out_what_stands_below(folder: Path) -> None:
    (folder / "above.toml").write_text('extends = "tiny"\n[objective]\nkind = "outside_three:Half"\n')
    objective = load_recipe("above.toml").objective
    assert isinstance(objective, PluginObjectiveConfig) and objective.settings.mask_rate == 0.3, "what both know stays"
    (folder / "back.toml").write_text('extends = "three.toml"\n[objective]\nkind = "mlm"\nmask_unit = "whole-word"\n')
    back = load_recipe("back.toml", ("objective.keep_rate=0.1",)).objective
    assert not isinstance(back, PluginObjectiveConfig) and (back.mask_rate, back.mask_unit) == (0.3, "whole-word")
    cutter = load_recipe("three.toml", ("data.sampler.kind=windows", "data.source.kind=files")).data
    assert (cutter.sampler.kind, cutter.source.kind) == ("windows", "files")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("objective.mask_rat=1", "unknown key `mask_rat` of kind `outside_three:Half`: did you mean `mask_rate`?"),
        ("objective.mask_rate=high", '"high" is not a number'),
        (
            "data.sampler.length=3",
            "unknown key `length` of kind `outside_three:Starts`\n  where: --set data.sampler.length=3",
        ),
        ("objective.kind=outside_tree:Half", "no module `outside_tree`: did you mean `outside_three`?"),
        ("objective.kind=no.such:Half", "there is no module `no`"),
        ("objective.kind=outside_three:Haft", "outside_three.py: did you mean `Half`?"),
        ("objective.kind=outside_three:a_rate", "it is a float, not a class"),
        ("objective.kind=outside_three:Rows", "is no objective: it has no `corrupt`, `loss`"),
        ("data.source.kind=outside_three:Half", "is no source: it has no `parts`, `documents`"),
        ("objective.kind=outside_three:Loose", "is no frozen dataclass"),
        ("objective.kind=outside_broken:Half", "ZeroDivisionError: division by zero\n  at:    "),
        ("objective.kind=outside_unfinished:Half", "SyntaxError: invalid syntax\n  at:    "),
        ("objective.kind=a b:c", "does not name a class"),
        ("objective.kind=mml", 'did you mean "mlm"?'),
        ("data.sampler.kind=sentences", 'choose one of "windows", or name a class of your own'),
    ],
)
def test_what_is_wrong_is_said_in_words(setting: str, says: str) -> None:
    said = refused(setting)
    assert says in said and "  next:  " in said and f"--set {setting}" in said


def test_an_error_in_a_module_names_its_own_line() -> None:
    assert "outside_broken.py, line 3" in refused("objective.kind=outside_broken:Half")
    starts = find("outside_three:Starts", PluginSamplerConfig)
    with pytest.raises(IndexError) as caught:
        starts(None, SamplerContext(np.zeros(1), 2, 3)).cut(0, "x")
    assert "outside_three.py, line " in user_frame(caught.value) and user_frame(caught.value).endswith("in cut")
    assert "outside_unfinished.py, line 1" in refused("objective.kind=outside_unfinished:Half")


def test_settings_that_are_refused_name_the_line_or_the_value() -> None:
    assert "ValueError: more than all" in (said := refused("objective.mask_rate=3"))
    assert "outside_three.py, line 20" in said
    with pytest.raises(RecipeError, match=r"`Odd.Settings`: a recipe can't hold <object"):
        build_plugin(PluginObjectiveConfig, {"kind": "outside_three:Odd"}, "here")


def test_what_cant_be_made_is_said_in_words() -> None:
    source = load_recipe("three.toml", ("data.source.kind=outside_three:Falls",)).data
    with pytest.raises(RecipeError, match=r"can't be made: OSError: no such place\n  at: .*outside_three.py, line \d+"):
        open_text([], source)


def test_a_source_needs_no_text_and_is_given_what_there_is(folder: Path) -> None:
    settings = load_recipe("three.toml").data
    source = open_text([], settings)
    assert next(source.documents(source.parts()[0])).text.startswith("cat dog")
    named = open_text([Path("one.txt"), "two.txt"], settings)
    assert next(named.documents(named.parts()[0])).text.startswith("one two one")
    with pytest.raises((RecipeError, TextError), match="no text was given"):
        open_text([], DataConfig())


def test_a_cut_that_breaks_its_promise_is_not_read() -> None:
    settings = load_recipe("three.toml", ("data.sampler.kind=outside_three:TooFar",)).data.sampler
    cutter = PluginSampler(settings, np.array([50, 60]), 30, seed=1)
    with pytest.raises(RecipeError, match="it cuts tokens 0 to 10000 of a document that has 50"):
        cutter.cuts(0, 0, 1)
    with pytest.raises(RecipeError, match="finds no sample in 0 documents"):
        PluginSampler(settings, np.zeros(0, dtype=np.int64), 30, seed=1)
    good = PluginSampler(load_recipe("three.toml").data.sampler, np.array([50, 20]), 30, seed=1)
    assert [cut.tokens for cut in good.cuts(0, 0, 2)] == [30, 20] and good.mean_tokens == 25


def test_a_run_goes_on_with_what_it_was_started_with(folder: Path) -> None:
    torch.set_num_threads(1)
    launch([], recipe="three.toml", out="whole")
    launch([], recipe="three.toml", out="half", settings=("train.budget=2 steps",))
    lines = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert logged[0]["half"] == pytest.approx(logged[0]["loss"] / 2)
    told = json.loads(Path("half/env.json").read_text())
    assert told["outside"]["objective"]["file"] == str(folder / "outside_three.py")
    assert (
        told["determinism"]["source outside_three:Rows"]
        == plugin_facts(load_recipe("three.toml").data.source)["digest"]
    )
    assert resume("half", budget="+1 steps").summary is not None
    (folder / "outside_three.py").write_text(MODULE + "\n# another word\n", encoding="utf-8")
    command = [sys.executable, "-m", "unmask", "pretrain", "--resume", "half", "--budget", "+1 steps"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 2 and "objective outside_three:Half: '" in done.stderr, done.stderr


def test_settings_may_name_their_kind() -> None:
    outside = build_plugin(PluginObjectiveConfig, {"kind": "outside_three:Named", "mask_rate": 0.2}, "here")
    assert outside.settings.kind == "outside_three:Named"
    assert tomllib.loads(dump_config(outside)) == {"kind": "outside_three:Named", "mask_rate": 0.2}
