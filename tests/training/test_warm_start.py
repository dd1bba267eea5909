"""Continued pretraining: what the model determines, new tokens of its vocabulary, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import unmask
from unmask.core.errors import RecipeError
from unmask.core.files import RunLayout
from unmask.models.model import Model, load
from unmask.tokenization.extend import origins
from unmask.training.loggers import read_log
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import read_recipe
from unmask.training.warm_start import WarmStart

SMALL = """
[data]
tokenizer = { kind = "wordpiece", vocab_size = 90 }
[model]
kind = "modernbert"
num_hidden_layers = 1
hidden_size = 16
num_attention_heads = 2
intermediate_size = 16
max_position_embeddings = 48
[[stage]]
until = "100%"
max_seq_len = 32
batch_size = "256 tokens"
[train]
budget = "6 steps"
threads = 1
precision = "float32"
every = { log = "1 steps", validate = "50%", save = "50%" }
"""
QUICK = ("stage.0.batch_size=256 tokens", "train.threads=1", "train.precision=float32", "train.every.save=50%")
DOMAIN = (
    "the patient has hepatitis and an enlarged liver . the hepatocytes of this patient were enlarged .",
    "hepatitis of the liver is seen in every second patient ; gastritis and arthritis are as frequent .",
)


@pytest.fixture(scope="module")
def made(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.toml").write_text(SMALL)
    unmask.pretrain(prose, recipe=folder / "small.toml", out=folder / "run")
    return folder


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("domain") / "domain.txt"
    path.write_text("\n\n".join(f"{DOMAIN[i % 2]} {DOMAIN[(i + 1) % 2]} {i % 7}" for i in range(150)))
    return path


def same(one: Model, other: Model) -> bool:
    pairs = zip(
        [*one.encoder.parameters(), *one.head.parameters()],
        [*other.encoder.parameters(), *other.head.parameters()],
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_starts_with_the_weights_of_the_model_and_reports_before_and_after(
    made: Path, domain: Path, tmp_path: Path
) -> None:
    old = load(made / "run")
    result = launch(
        [domain],
        recipe="continue",
        out=tmp_path / "run",
        settings=[*QUICK, "train.budget=4 steps", "stage.0.max_seq_len=100"],
        start=WarmStart.open(made / "run"),
    )
    recipe, _ = read_recipe(tmp_path / "run")
    assert recipe.model == old.settings and recipe.stage[0].max_seq_len == 48, "shortened to the positions of the model"
    assert same(load(tmp_path / "run" / RunLayout.START), old)
    assert result.summary is not None and result.summary.before is not None and result.summary.validation is not None
    first = next(line for line in read_log(tmp_path / "run" / RunLayout.LOG) if "validation" in line)
    assert first["step"] == 0 and first["validation"] == result.summary.before
    assert result.summary.validation.loss != result.summary.before["loss"]
    assert load(tmp_path / "run").tokenizer.fingerprint == old.tokenizer.fingerprint


def test_a_run_resumes_when_the_model_is_gone(made: Path, domain: Path, tmp_path: Path) -> None:
    def run(name: str, budget: str) -> Path:
        model = tmp_path / f"model-{name}"
        shutil.copytree(made / "run" / "best", model)
        unmask.pretrain(
            domain,
            recipe="continue",
            out=tmp_path / name,
            settings=[*QUICK, "stage.0.max_seq_len=32", "lr_schedule.min_lr_ratio=1"],
            budget=budget,
            start=WarmStart.open(model, 6),
        )
        shutil.rmtree(model)
        return tmp_path / name

    whole, extended = run("whole", "6 steps"), run("extended", "3 steps")
    resume(extended, budget="6 steps")
    last = [load(folder / "latest") for folder in (whole, extended)]
    assert same(*last)
    unsaved = tmp_path / "unsaved"  # killed before its first step was saved
    shutil.copytree(whole, unsaved, symlinks=True)
    for name in ("latest", RunLayout.LOG):
        (unsaved / name).unlink()
    for folder in [*unsaved.glob("step-*"), unsaved / "best"]:
        shutil.rmtree(folder)
    resume(unsaved)
    assert same(load(unsaved / "latest"), last[0])


def test_new_tokens_are_initialized_with_the_mean_of_their_parts(made: Path, domain: Path, tmp_path: Path) -> None:
    start = WarmStart.open(made / "run", 6)
    old = start.model
    unmask.pretrain(domain, recipe="continue", out=tmp_path / "run", settings=QUICK, budget="1 steps", start=start)
    tokenizer = load(tmp_path / "run").tokenizer
    assert tokenizer.size == old.tokenizer.size + 6
    encoder, head = start.modules(tokenizer)
    table, before = cast(Any, encoder).token_embedding, cast(Any, old.encoder).token_embedding
    assert torch.equal(table[: len(before)], before)
    parts = origins(old.tokenizer.to_json(), tokenizer.to_json())
    for number, ids in enumerate(parts, start=old.tokenizer.size):
        assert not ids or torch.allclose(table[number], table[ids].mean(0))
    assert sum(len(ids) > 1 for ids in parts) > 2
    assert len({tuple(row) for row in table[len(before) :].tolist()}) == 6, "no two are equal"
    extended = [name for name, tensor in head.state_dict().items() if tensor.shape[0] == len(table)]
    assert extended, "the decoder bias too"
    config = json.loads((tmp_path / "run" / "latest" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.size
    assert read_recipe(tmp_path / "run")[0].init.vocab_size == tokenizer.size


@pytest.mark.parametrize("key", ["model.num_hidden_layers=2", "data.tokenizer.vocab_size=100"])
def test_settings_that_the_model_determines_are_refused(made: Path, domain: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match="is determined by the model"):
        unmask.pretrain(domain, recipe="continue", out=tmp_path / "run", settings=[key], start=made / "run")
    with pytest.raises(RecipeError, match=r"\[model\] is determined by"):
        unmask.pretrain(domain, recipe=made / "small.toml", out=tmp_path / "run", start=made / "run")


def test_the_recipe_continue_needs_a_model(domain: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs a model to start from") as refused:
        unmask.pretrain(domain, recipe="continue", out=tmp_path / "run")
    assert "start=MODEL" in refused.value.hint


def saved_by_transformers(kind: str, folder: Path) -> Path:
    """Saves a small model of `transformers` with random weights, and a tokenizer trained by unmask."""
    import transformers

    from unmask.tokenization.settings import ByteBpeConfig, WordPieceConfig
    from unmask.tokenization.tokenizer import train_tokenizer

    settings = WordPieceConfig(vocab_size=50) if kind == "bert" else ByteBpeConfig(vocab_size=280)
    tokenizer = train_tokenizer(["the cat sat on the mat and looked at the moon of the old man"] * 30, settings)
    sizes: dict[str, Any] = {
        "vocab_size": tokenizer.size + 3, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 50, "pad_token_id": tokenizer.role_id("pad_token"),
    }  # fmt: skip
    torch.manual_seed(5)
    if kind == "bert":
        net: Any = transformers.BertForPreTraining(transformers.BertConfig(**sizes))
    else:
        net = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes, type_vocab_size=1))
    net.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def test_a_bert_of_transformers_keeps_its_pair_head(domain: Path, tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    model = saved_by_transformers("bert", tmp_path / "model")
    unmask.pretrain(
        domain,
        recipe="continue",
        out=tmp_path / "run",
        budget="2 steps",
        settings=[
            *QUICK,
            'objective={kind="mlm+pairs", pair_task="next-sentence"}',
            "stage.0.max_seq_len=40",
            "optimizer.lr=1e-9",
        ],
        start=model,
        allow_unknown=True,
    )
    step = tmp_path / "run" / "latest"
    before, after = BertForPreTraining.from_pretrained(model), BertForPreTraining.from_pretrained(step)
    for name, tensor in before.state_dict().items():
        assert torch.allclose(after.state_dict()[name], tensor, atol=1e-6), name
    line = next(line for line in read_log(tmp_path / "run" / RunLayout.LOG) if "validation" in line)
    assert line["step"] == 0 and line["validation"]["pair"]["pairs"] > 0


def test_a_pair_head_that_masks_alone_don_t_train_is_not_dropped_unsaid(
    domain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved_by_transformers("bert", tmp_path / "model")
    with caplog.at_level("INFO", logger="unmask"):
        unmask.pretrain(
            domain, recipe="continue", out=tmp_path / "run", budget="1 steps", settings=QUICK, start=model,
            allow_unknown=True,
        )  # fmt: skip
    assert "pooler and pair head are not trained and not saved: objective.kind is not mlm+pairs" in caplog.text
    config = json.loads((tmp_path / "run" / "latest" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]


def test_a_roberta_keeps_its_positions_and_class(domain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    model = saved_by_transformers("roberta", tmp_path / "model")
    start = WarmStart.open(model, 12)
    unmask.pretrain(domain, recipe="continue", out=tmp_path / "run", budget="2 steps", settings=QUICK, start=start)
    recipe, _ = read_recipe(tmp_path / "run")
    first = start.model.tokenizer.role_id("pad_token")
    assert first is not None and recipe.stage[0].max_seq_len == 50 - first - 1
    after = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "latest")
    assert type(after).__name__ == "RobertaForMaskedLM"
    assert after.config.vocab_size == start.model.tokenizer.size + 12, (
        "new tokens first use padding entries of the embedding"
    )
