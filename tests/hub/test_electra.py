"""Discriminators of replaced token detection in the format of transformers: ElectraForPreTraining and its encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import unmask
from unmask.core.errors import ModelError
from unmask.core.types import Sample, pack
from unmask.hub.from_hf import import_model, open_model
from unmask.hub.parity import compare
from unmask.models.model import load
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.loggers import read_log

SMALL = [
    "data.tokenizer.vocab_size=120", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=48", "train.threads=1", "train.every.validate=2 steps", "preview.num_samples=1",
    "stage=[{max_seq_len = 32, batch_size = '500 tokens'}]", "train.budget=4 steps", "train.precision=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT."""
    out = tmp_path_factory.mktemp("electra") / "run"
    unmask.pretrain(prose, recipe="electra-mini", settings=SMALL, out=out)
    return out


@pytest.fixture(scope="module")
def modern_run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("electra") / "modern"
    settings = [*SMALL, "objective={kind = 'rtd', mask_rate = 0.2}", "train.ema_decay=0.9"]
    unmask.pretrain(prose, recipe="tiny", settings=settings, out=out)
    return out


def test_a_run_is_exported_as_electra(run: Path, tmp_path: Path) -> None:
    whole = unmask.export(run, tmp_path / "whole")
    assert whole.architecture == "ElectraForPreTraining" and whole.parity is not None
    assert whole.parity.source == "held-out texts of the run" and whole.parity.logits < 1e-5
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    for words in (
        "AutoModelForPreTraining", "by replaced token detection", "rtd accuracy", "- replaced-token-detection",
        "pipeline_tag: feature-extraction",
    ):  # fmt: skip
        assert words in card, words
    assert "fill-mask" not in card
    encoder = unmask.export(run, tmp_path / "encoder", only="encoder")
    assert encoder.architecture == "ElectraModel" and encoder.parity is not None and encoder.parity.logits < 1e-5
    automatic = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    assert type(automatic).__name__ == "ElectraModel"
    for name, tensor in load_file(tmp_path / "encoder" / "model.safetensors").items():
        assert torch.equal(tensor, automatic.get_parameter(name)), name


def test_a_checkpoint_has_the_trained_weights(run: Path) -> None:
    """The step folder has encoder and discriminator head; the generator is in objective.safetensors."""
    model = load(run / "latest")
    weights = load_file(run / "latest" / "resume" / "weights.safetensors")
    assert model.discriminator is not None and model.card.get("objective") == "rtd"
    for prefix, module in (("encoder.", model.encoder), ("parts.discriminator.", model.discriminator)):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, weights[prefix + name]), name
    own = load_file(run / "latest" / "objective.safetensors")
    assert {name.partition(".")[0] for name in own} == {"generator", "discriminator"}
    saved = load_file(run / "latest" / "model.safetensors")
    assert not any("cls." in name or "generator" in name for name in saved), "no untrained head"
    assert "parameters" in repr(model)
    with pytest.raises(ModelError, match="trains no predictions for masked tokens"):
        unmask.fill(model, "the [MASK] sat")


def test_a_modernbert_is_exported_as_the_encoder_alone(modern_run: Path, prose: Path, tmp_path: Path) -> None:
    exported = unmask.export(modern_run, tmp_path / "out")
    assert exported.architecture == "ModernBertModel"
    assert exported.parity is not None and exported.parity.logits < 1e-5
    config = json.loads((modern_run / "latest" / "config.json").read_text())
    assert config["architectures"] == ["ModernBertModel"]
    for folder in (modern_run, tmp_path / "out"):
        model = load(folder)
        assert model.discriminator is None
        with pytest.raises(ModelError, match="trains no predictions for masked tokens"):
            unmask.fill(model, "the [MASK] sat")
        with pytest.raises(ModelError, match="can't be evaluated on masked tokens"):
            unmask.evaluate(model, prose)


@pytest.mark.parametrize("name", ["run", "modern_run"])
def test_masked_language_modeling_continues_from_the_encoder(
    name: str, prose: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    start: Path = request.getfixturevalue(name)
    settings = ["train.threads=1", "stage.0.batch_size=256 tokens"]
    model = unmask.pretrain(prose, start=start, out=tmp_path / "mlm", budget="2 steps", settings=settings, display=None)
    assert len(unmask.fill(model, "the [MASK] sat")[0].masks) == 1
    first = load(tmp_path / "mlm" / "start")
    assert all(
        torch.equal(a, b) for a, b in zip(first.encoder.parameters(), load(start).encoder.parameters(), strict=True)
    )


def test_the_log_has_both_losses(run: Path) -> None:
    lines = list(read_log(run / "log.jsonl"))
    training: Any = [line for line in lines if "rtd_loss" in line]
    assert len(training) >= 2
    validated: Any = [line["validation"] for line in lines if "validation" in line]
    for metrics in [*training, *(one["objective"] for one in validated)]:
        assert 0 < metrics["rtd_found"] + metrics["rtd_accuracy"] <= 2 and 0 < metrics["rtd_replaced"] < 0.5
        assert metrics["rtd_loss"] > 0 and metrics["loss"] > 0
    assert validated[-1]["loss"] == pytest.approx(validated[-1]["objective"]["loss"]), "the loss of the generator"


# Folders of transformers ----------------------------------------------------------------------------------------------


def electra(folder: Path, tokenizer: Tokenizer, name: str, **more: int) -> Any:
    config = transformers.ElectraConfig(**{
        "vocab_size": tokenizer.size, "embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64, **more,
    })  # fmt: skip
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


@pytest.mark.parametrize("name", ["ElectraForPreTraining", "ElectraModel", "ElectraForMaskedLM"])
@torch.no_grad()
def test_the_encoder_of_an_electra_folder_is_imported(
    name: str, tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path
) -> None:
    """A masked-language-modeling head is initialized."""
    expected = electra(tmp_path / "electra", tokenizers["wordpiece", "english"], name)
    imported = import_model(tmp_path / "electra", tmp_path / "imported")
    assert any(note.startswith("initialized the masked-language-modeling head") for note in imported.notes)
    assert any(note.startswith("left out") for note in imported.notes) == (name != "ElectraModel")
    ids = torch.randint(5, expected.config.vocab_size, (20,))
    hidden_TD = load(tmp_path / "imported").encoder(pack([Sample(ids.numpy(), ids.numpy().astype("uint8") * 0)]))
    output = getattr(expected, "electra", expected)(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden_TD, output, atol=1e-5, rtol=0)


def test_a_narrow_embedding_is_refused(tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path) -> None:
    """As in electra-small, whose embedding is projected."""
    electra(tmp_path / "small", tokenizers["wordpiece", "english"], "ElectraForPreTraining", embedding_size=16)
    with pytest.raises(ModelError, match=r"unsupported embedding_size: got 16, expected hidden_size = 32"):
        open_model(tmp_path / "small")


def test_damaged_discriminators_are_refused(run: Path, tmp_path: Path) -> None:
    unmask.export(run, tmp_path / "out", unverified=True)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "electra.encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load(tmp_path / "out")
    head = "discriminator_predictions.dense.bias"
    save_file({key: value for key, value in tensors.items() if key != head}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weights don't match config"):
        load(tmp_path / "out")


def test_another_discriminator_head_is_noticed(run: Path, tmp_path: Path) -> None:
    unmask.export(run, tmp_path / "out", unverified=True)
    model, file = load(run), tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    assert compare(tmp_path / "out", model, texts, "sentences").logits < 1e-5
    tensors["discriminator_predictions.dense_prediction.bias"] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"logits differ from those of transformers by 0\.01"):
        compare(tmp_path / "out", model, texts, "sentences")
