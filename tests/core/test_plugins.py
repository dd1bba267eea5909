"""Plugins: import, strict settings, error messages, training, and what a run records."""

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
from unmask.core.plugins import (
    PluginLoggerConfig,
    PluginObjectiveConfig,
    PluginSamplerConfig,
    find,
    plugin_facts,
    user_frame,
)
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
    """Masked language modeling at half the rate, with a metric of its own."""

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
        vocabulary = tools.vocabulary
        config = MaskedLMConfig(mask_rate=settings.mask_rate / 2)
        super().__init__(config, vocabulary.mask_id, vocabulary.regular_token_ids)

    def loss(self, encoder, head, masked):
        loss = super().loss(encoder, head, masked)
        total, count = loss.metrics["loss"]
        return type(loss)(loss.sums, {**loss.metrics, "half": (total / 2, count)})


class Starts:
    """The beginning of each document."""

    def __init__(self, settings, tools):
        self.lengths, self.length = tools.lengths, tools.length

    def count(self, epoch):
        return len(self.lengths)

    def spec(self, epoch, sample):
        return SampleSpec(epoch, sample, (TokenSpan(sample, 0, min(self.length, int(self.lengths[sample]))),))


class TooFar(Starts):
    def spec(self, epoch, sample):
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


class Lines:
    """A logger that writes steps and losses."""

    @dataclass(frozen=True)
    class Settings:
        file: str = "lines.txt"

    def __init__(self, settings, context):
        self.path = context.run / settings.file
        self.path.write_text("".join(f"{line['step']}\\n" for line in context.lines))

    def write(self, step, metrics):
        with self.path.open("a") as file:
            file.write(f"{step}\\n")

    def close(self):
        self.closed = True


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


def test_a_recipe_has_its_plugins() -> None:
    recipe = load_recipe("three.toml")
    assert [kind.kind for kind in recipe.plugins] == [f"outside_three:{name}" for name in ("Half", "Rows", "Starts")]
    assert recipe.objective.masked_fraction == 0.15
    again = tomllib.loads(dump_config(recipe))
    assert again["objective"] == {"kind": "outside_three:Half", "mask_rate": 0.3, "names": []}
    assert again["data"]["sampler"] == {"kind": "outside_three:Starts"}
    assert load_recipe("three.toml", ("objective.names=['a']",)).objective != recipe.objective
    assert load_recipe("tiny").plugins == [] and load_recipe("tiny").objective.masked_fraction == 0.4


def test_a_changed_kind_drops_settings_of_the_base_recipe(folder: Path) -> None:
    (folder / "above.toml").write_text('extends = "tiny"\n[objective]\nkind = "outside_three:Half"\n')
    objective = load_recipe("above.toml").objective
    assert isinstance(objective, PluginObjectiveConfig) and objective.settings.mask_rate == 0.4, "what both know stays"
    (folder / "back.toml").write_text('extends = "three.toml"\n[objective]\nkind = "mlm"\nmask_unit = "whole-word"\n')
    back = load_recipe("back.toml", ("objective.keep_rate=0.1",)).objective
    assert not isinstance(back, PluginObjectiveConfig) and (back.mask_rate, back.mask_unit) == (0.3, "whole-word")
    cutter = load_recipe("three.toml", ("data.sampler.kind=windows", "data.source.kind=files")).data
    assert (cutter.sampler.kind, cutter.source.kind) == ("windows", "files")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("objective.mask_rat=1", "unknown key `mask_rat` of kind `outside_three:Half`: did you mean `mask_rate`?"),
        ("objective.mask_rate=high", 'invalid objective.mask_rate: got "high", expected a number'),
        (
            "data.sampler.length=3",
            "unknown key `length` of kind `outside_three:Starts`\n  location: --set data.sampler.length=3",
        ),
        ("objective.kind=outside_tree:Half", "no module `outside_tree`: did you mean `outside_three`?"),
        ("objective.kind=no.such:Half", "there is no module `no`"),
        ("objective.kind=outside_three:Haft", "outside_three.py: did you mean `Half`?"),
        ("objective.kind=outside_three:a_rate", "is a float, not a class"),
        ("objective.kind=outside_three:Rows", "is not a valid objective: it lacks `corrupt`, `loss`"),
        ("data.source.kind=outside_three:Half", "is not a valid source: it lacks `parts`, `documents`"),
        ("objective.kind=outside_three:Loose", "is not a frozen dataclass"),
        ("objective.kind=outside_broken:Half", "ZeroDivisionError: division by zero\n  in: "),
        ("objective.kind=outside_unfinished:Half", "SyntaxError: invalid syntax\n  in: "),
        ("objective.kind=a b:c", "invalid plugin name: got `a b:c`"),
        ("objective.kind=mml", 'did you mean "mlm"?'),
        ("data.sampler.kind=sentences", 'choose one of "windows", or a class of your own: package.module:Name'),
    ],
)
def test_errors_name_the_cause(setting: str, says: str) -> None:
    message = refused(setting)
    assert says in message and "  hint: " in message and f"--set {setting}" in message


def test_an_error_in_a_plugin_names_its_line() -> None:
    assert "outside_broken.py, line 3" in refused("objective.kind=outside_broken:Half")
    starts = find("outside_three:Starts", PluginSamplerConfig)
    with pytest.raises(IndexError) as caught:
        starts(None, SamplerContext(np.zeros(1), 2, 3)).spec(0, "x")
    assert "outside_three.py, line " in user_frame(caught.value) and user_frame(caught.value).endswith("in spec")
    assert "outside_unfinished.py, line 1" in refused("objective.kind=outside_unfinished:Half")


def test_invalid_settings_name_the_line_or_the_value() -> None:
    assert "ValueError: more than all" in (message := refused("objective.mask_rate=3"))
    assert "outside_three.py, line 20" in message
    with pytest.raises(RecipeError, match=r"`Odd.Settings`: a recipe can't contain <object"):
        build_plugin(PluginObjectiveConfig, {"kind": "outside_three:Odd"}, "here")


def test_a_failing_constructor_is_reported() -> None:
    source = load_recipe("three.toml", ("data.source.kind=outside_three:Falls",)).data
    with pytest.raises(
        RecipeError,
        match=r"can't create `outside_three:Falls`: OSError: no such place\n  in: .*outside_three.py, line \d+",
    ):
        open_text([], source)


def test_a_source_needs_no_text_and_gets_its_paths(folder: Path) -> None:
    settings = load_recipe("three.toml").data
    source = open_text([], settings)
    assert next(source.documents(source.parts()[0])).text.startswith("cat dog")
    named = open_text([Path("one.txt"), "two.txt"], settings)
    assert next(named.documents(named.parts()[0])).text.startswith("one two one")
    with pytest.raises((RecipeError, TextError), match="no text was given"):
        open_text([], DataConfig())


def test_an_invalid_sample_is_refused() -> None:
    settings = load_recipe("three.toml", ("data.sampler.kind=outside_three:TooFar",)).data.sampler
    cutter = PluginSampler(settings, np.array([50, 60]), 30, seed=1)
    with pytest.raises(RecipeError, match="it gave tokens 0 to 10000 of a document of 50 tokens"):
        cutter.specs(0, 0, 1)
    with pytest.raises(RecipeError, match="has no samples for 0 documents"):
        PluginSampler(settings, np.zeros(0, dtype=np.int64), 30, seed=1)
    good = PluginSampler(load_recipe("three.toml").data.sampler, np.array([50, 20]), 30, seed=1)
    assert [cut.tokens for cut in good.specs(0, 0, 2)] == [30, 20] and good.mean_tokens == 25


def test_a_run_resumes_with_the_same_plugin_code(folder: Path) -> None:
    torch.set_num_threads(1)
    launch([], recipe="three.toml", out="whole")
    launch([], recipe="three.toml", out="half", settings=("train.budget=2 steps",))
    lines = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert logged[0]["half"] == pytest.approx(logged[0]["loss"] / 2)
    environment = json.loads(Path("half/env.json").read_text())
    assert environment["plugins"]["objective"]["file"] == str(folder / "outside_three.py")
    assert (
        environment["determinism"]["source outside_three:Rows"]
        == plugin_facts(load_recipe("three.toml").data.source)["digest"]
    )
    assert resume("half", budget="+1 steps").summary is not None
    (folder / "outside_three.py").write_text(MODULE + "\n# another word\n", encoding="utf-8")
    command = [sys.executable, "-m", "unmask", "pretrain", "--resume", "half", "--budget", "+1 steps"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 2 and "objective outside_three:Half: '" in done.stderr, done.stderr


def test_settings_may_have_a_kind() -> None:
    outside = build_plugin(PluginObjectiveConfig, {"kind": "outside_three:Named", "mask_rate": 0.2}, "here")
    assert outside.settings.kind == "outside_three:Named"
    assert tomllib.loads(dump_config(outside)) == {"kind": "outside_three:Named", "mask_rate": 0.2}


def test_a_logger_of_a_recipe_gets_every_line() -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("three.toml", ('train.loggers=["outside_three:Lines"]',))
    (logger,) = recipe.train.loggers
    assert isinstance(logger, PluginLoggerConfig) and logger in recipe.plugins
    again = tomllib.loads(dump_config(recipe))
    assert again["train"]["loggers"] == [{"kind": "outside_three:Lines", "file": "lines.txt"}]
    launch([], recipe=recipe, out="logged")
    steps = [json.loads(line)["step"] for line in Path("logged/log.jsonl").read_text().splitlines()]
    assert [int(line) for line in Path("logged/lines.txt").read_text().splitlines()] == steps
    assert "logger" not in json.loads(Path("logged/env.json").read_text())["plugins"]
    resume("logged", budget="+1 steps", settings=('train.loggers=[{kind="outside_three:Lines", file="b.txt"}]',))
    steps = [json.loads(line)["step"] for line in Path("logged/log.jsonl").read_text().splitlines()]
    assert [int(line) for line in Path("logged/b.txt").read_text().splitlines()] == steps
    assert "is not a valid logger: it lacks `write`, `close`" in refused('train.loggers=["outside_three:Half"]')
    assert 'choose one of "tensorboard"' in refused('train.loggers=["tensorbord"]')
