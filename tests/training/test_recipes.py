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
from unmask.core.errors import ModelError, RecipeError, TokenizerError
from unmask.core.quantities import Fraction
from unmask.models import build_model, num_parameters
from unmask.models.bert import BertConfig
from unmask.models.hf_format import from_hf_config, to_hf_config
from unmask.tokenization.settings import CharacterConfig
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import Recipe, explicit_keys, load_recipe, read_recipe

SMALL = [
    "model.num_hidden_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=24",
    "train.every.log=1 steps", "train.threads=1", "train.micro_batch_size=100 tokens",
]  # fmt: skip

FEW_TOKENS = ["stage.0.batch_size=200 tokens", "stage.1.batch_size=200 tokens"]  # of recipe tiny

WIDER = {"bert-mini-pairs": ["model.hidden_size=64"]}  # its initialization needs larger attention heads
WITHOUT_MASKS = {"electra-mini"}  # the encoder is a discriminator
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
    model = unmask.load(tmp_path / "run")
    if name in WITHOUT_MASKS:
        with pytest.raises(ModelError, match="trains no predictions for masked tokens"):
            unmask.fill(model, "the [MASK] sat on the mat")
        return
    (filled,) = unmask.fill(model, "the [MASK] sat on the mat")
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


def test_only_what_a_user_set_is_explicit(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('extends = "tiny"\n[data.tokenizer]\nlowercase = true\n')
    assert explicit_keys("tiny") == frozenset()
    assert explicit_keys(own) == {"data.tokenizer.lowercase"}
    settings = ["data.tokenizer={kind='bpe'}", "stage.1.max_seq_len=64"]
    keys = {"data.tokenizer.kind", "stage.1.max_seq_len", "train.budget"}
    assert explicit_keys("tiny", settings, {"train.budget": "3 steps"}) == keys


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_a_vocabulary_that_nobody_set_shrinks_to_the_text(
    kind: str, prose: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [*SMALL, *FEW_TOKENS, "train.budget=2 steps", f"data.tokenizer.kind={kind}"]
    with caplog.at_level("INFO"):
        launch([prose], out=tmp_path / "run", settings=settings)
    size = unmask.load(tmp_path / "run").tokenizer.size
    assert f"vocabulary: {size:,} tokens instead of 8,192, because this text gives no more" in caplog.text
    recipe, plan = read_recipe(tmp_path / "run")
    assert getattr(recipe.data.tokenizer, "vocab_size", 0) == size and plan.steps == 2
    resume(tmp_path / "run", budget="+1 steps")
    assert read_recipe(tmp_path / "run")[0] == recipe, "a resumed run chooses nothing"
    with pytest.raises(TokenizerError, match="vocabulary size 8,192 is too large"):
        launch([prose], out=tmp_path / "other", settings=[*settings, "data.tokenizer.vocab_size=8192"])


def test_short_rows_get_stages_that_they_fill(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"the cat {n % 7} sat on mat {n % 11}\n" for n in range(400)))
    settings = [*SMALL, *FEW_TOKENS, "train.budget=2 steps", "data.document=line", "stage.0.max_seq_len=64"]
    with caplog.at_level("INFO"):
        launch([path], out=tmp_path / "run", settings=settings)
    recipe, _ = read_recipe(tmp_path / "run")
    assert [stage.max_seq_len for stage in recipe.stage] == [64, 16], "the stage that was set is kept"
    assert "stage 1: sequences of at most 16 tokens instead of 256" in caplog.text


def test_text_that_the_tokenizer_can_not_spell_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "thai.txt"
    path.write_text(
        "\n\n".join("ประเทศไทยเป็นรัฐชาติอันตั้งอยู่" * (3 + n % 4) + " และ มี ลาว" * 3 for n in range(80)), encoding="utf-8"
    )
    small = [*SMALL, *FEW_TOKENS, "train.budget=2 steps"]
    settings = [*small, "data.tokenizer.kind=wordpiece", "data.tokenizer.vocab_size=60"]
    with pytest.raises(TokenizerError, match="are unknown to the tokenizer") as caught:
        launch([path], out=tmp_path / "run", settings=settings)
    assert "more than 100 characters without a space" in caught.value.message
    assert "--set data.tokenizer.kind=unigram" in caught.value.hint and not (tmp_path / "run").exists()
    with caplog.at_level("WARNING"):
        launch([path], out=tmp_path / "run", settings=[*settings, "data.max_unknown=100%"])
    assert "are unknown to the tokenizer" in caplog.text
    resume(tmp_path / "run", budget="+1 steps")
    launch([path], out=tmp_path / "spelled", settings=small)
    assert read_recipe(tmp_path / "spelled")[0].data.tokenizer.kind == "unigram"
