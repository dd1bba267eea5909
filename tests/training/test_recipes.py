"""Every shipped recipe loads, says what it is for, and takes shrunken steps: two, or one in each of its stages."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import unmask
from unmask.core.config import build_config, dump_config, resolve_recipe, shipped_recipes
from unmask.core.errors import RecipeError
from unmask.core.quantities import Fraction
from unmask.models import build_model as nets
from unmask.models import parameters
from unmask.models.bert import BertConfig
from unmask.models.hf_format import config, settings_of
from unmask.tokenization.settings import CharacterConfig
from unmask.training.pretrain import launch
from unmask.training.recipe import Recipe, load_recipe

SHRUNKEN = [
    "model.num_hidden_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=24",
    "train.every.log=1 steps", "train.threads=1", "train.micro_batch_size=100 tokens",
]  # fmt: skip


WIDER = {"bert-mini-pairs": ["model.hidden_size=64"]}  # heads that begin with a task need room for it
LEAST = {"wordpiece": 120, "bpe": 280}  # pieces that a few sentences give


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about.endswith(".") and len(recipe.about) < 120, "one sentence, for `unmask recipe list`"
    assert build_config(Recipe, tomllib.loads(dump_config(recipe)), name) == recipe
    tiny = load_recipe(name, [*SHRUNKEN, *WIDER.get(name, [])]).model
    assert parameters(tiny, 90) == sum(p.numel() for module in nets(tiny, 90) for p in module.parameters())
    # What a folder of this encoder says of itself leads back to the encoder: nothing shipped can't be held there. How
    # its weights began is no part of that, since it holds the weights.
    held = replace(recipe.model, init="normal") if isinstance(recipe.model, BertConfig) else recipe.model
    assert settings_of(config(recipe.model, 1000, {"pad": 0, "mask": 4})) == held


FROM_NOTHING = [name for name in shipped_recipes() if not load_recipe(name).init.required]  # test_start has the others


@pytest.mark.parametrize("name", FROM_NOTHING)
def test_shrunken_steps(name: str, prose: Path, tmp_path: Path) -> None:
    tree = resolve_recipe(name)
    stages = len(tree["stage"])
    steps = max(2, stages)
    settings = [
        *SHRUNKEN,
        *WIDER.get(name, []),
        f"train.budget={steps} steps",
        *(f"stage.{n}.batch_size=100 tokens" for n in range(stages)),
    ]
    if least := LEAST.get(tree["data"]["tokenizer"]["kind"]):
        settings.append(f"data.tokenizer.vocab_size={least}")
    result = launch([prose], recipe=name, out=tmp_path / "run", settings=settings)
    assert result.summary is not None and result.summary.steps == steps
    assert result.summary.tokens >= steps * 100
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps and all(map(math.isfinite, losses))
    (answer,) = unmask.fill(unmask.load(tmp_path / "run"), "the [MASK] sat on the mat")
    assert len(answer.masks[0].candidates) == 5


def test_another_kind_keeps_what_the_recipe_says_for_both() -> None:
    char = load_recipe("char", ["lr_schedule.kind=cosine", "optimizer.kind=adamw"])
    assert char.lr_schedule.kind == "cosine" and char.lr_schedule.warmup == Fraction(0.001)
    assert char.optimizer.kind == "adamw" and char.optimizer.lr == load_recipe("char").optimizer.lr
    tiny = load_recipe("tiny", ["optimizer.lr=1e-3", "optimizer.kind=adamw"])
    assert tiny.optimizer.lr == 1e-3
    letters = load_recipe("tiny", ["data.tokenizer.kind=characters"])
    assert letters.data.tokenizer == CharacterConfig(), "the vocabulary's size is WordPiece's own"
    assert load_recipe("tiny", ["model.kind=tutorial"]).model.hidden_size == load_recipe("tiny").model.hidden_size
    with pytest.raises(RecipeError, match="unknown key `vocab_size` of kind `characters`"):
        load_recipe("tiny", ["data.tokenizer.kind=characters", "data.tokenizer.vocab_size=5"])


@pytest.mark.parametrize("budget", ["300", "5 texts", "5 characters", "+1 epoch", ""])
def test_a_flag_that_says_nothing_is_named_as_it_was_written(budget: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", ["train.budget=3 steps"], {"train.budget": budget})
    assert caught.value.location == ("--budget 300" if budget == "300" else f'--budget "{budget}"')
