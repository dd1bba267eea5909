"""Every shipped recipe loads, describes itself, and runs with a small model: two steps, or one per stage."""

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
from unmask.models import build_model, num_parameters
from unmask.models.bert import BertConfig
from unmask.models.hf_format import from_hf_config, to_hf_config
from unmask.tokenization.settings import CharacterConfig
from unmask.training.pretrain import launch
from unmask.training.recipe import Recipe, load_recipe

SMALL = [
    "model.num_hidden_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=24",
    "train.every.log=1 steps", "train.threads=1", "train.micro_batch_size=100 tokens",
]  # fmt: skip


WIDER = {"bert-mini-pairs": ["model.hidden_size=64"]}  # its initialization needs larger attention heads
VOCAB_SIZES = {"wordpiece": 120, "bpe": 280}  # that a few sentences give


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about.endswith(".") and len(recipe.about) < 120, "one sentence, for `unmask recipe list`"
    assert build_config(Recipe, tomllib.loads(dump_config(recipe)), name) == recipe
    tiny = load_recipe(name, [*SMALL, *WIDER.get(name, [])]).model
    assert num_parameters(tiny, 90) == sum(p.numel() for module in build_model(tiny, 90) for p in module.parameters())
    # config.json of transformers can express the model. The initialization is not part of it.
    expected = replace(recipe.model, init="normal") if isinstance(recipe.model, BertConfig) else recipe.model
    assert from_hf_config(to_hf_config(recipe.model, 1000, {"pad": 0, "mask": 4})) == expected


FROM_SCRATCH = [name for name in shipped_recipes() if not load_recipe(name).init.required]  # others: test_warm_start


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_small_model_takes_its_steps(name: str, prose: Path, tmp_path: Path) -> None:
    tree = resolve_recipe(name)
    stages = len(tree["stage"])
    steps = max(2, stages)
    settings = [
        *SMALL,
        *WIDER.get(name, []),
        f"train.budget={steps} steps",
        *(f"stage.{n}.batch_size=100 tokens" for n in range(stages)),
    ]
    if vocab_size := VOCAB_SIZES.get(tree["data"]["tokenizer"]["kind"]):
        settings.append(f"data.tokenizer.vocab_size={vocab_size}")
    result = launch([prose], recipe=name, out=tmp_path / "run", settings=settings)
    assert result.summary is not None and result.summary.steps == steps
    assert result.summary.tokens >= steps * 100
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == steps and all(map(math.isfinite, losses))
    (filled,) = unmask.fill(unmask.load(tmp_path / "run"), "the [MASK] sat on the mat")
    assert len(filled.masks[0].candidates) == 5


def test_another_kind_keeps_the_settings_that_both_have() -> None:
    char = load_recipe("char", ["lr_schedule.kind=cosine", "optimizer.kind=adamw"])
    assert char.lr_schedule.kind == "cosine" and char.lr_schedule.warmup == Fraction(0.001)
    assert char.optimizer.kind == "adamw" and char.optimizer.lr == load_recipe("char").optimizer.lr
    tiny = load_recipe("tiny", ["optimizer.lr=1e-3", "optimizer.kind=adamw"])
    assert tiny.optimizer.lr == 1e-3
    letters = load_recipe("tiny", ["data.tokenizer.kind=characters"])
    assert letters.data.tokenizer == CharacterConfig(), "vocab_size is a setting of WordPiece"
    assert load_recipe("tiny", ["model.kind=tutorial"]).model.hidden_size == load_recipe("tiny").model.hidden_size
    with pytest.raises(RecipeError, match="unknown key `vocab_size` of kind `characters`"):
        load_recipe("tiny", ["data.tokenizer.kind=characters", "data.tokenizer.vocab_size=5"])


@pytest.mark.parametrize("budget", ["300", "5 texts", "5 characters", "+1 epoch", ""])
def test_an_invalid_option_is_named_as_it_was_written(budget: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", ["train.budget=3 steps"], {"train.budget": budget})
    assert caught.value.location == ("--budget 300" if budget == "300" else f'--budget "{budget}"')
