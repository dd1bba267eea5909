"""NeoMME in runs and folders: pretraining, resuming, export, import and continued training."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from unmask.cli import main
from unmask.core.errors import ModelError, RecipeError, Stopped
from unmask.hub.from_hf import open_model
from unmask.hub.parity import compare
from unmask.models.model import Model, load
from unmask.models.neomme import NeoMMEConfig
from unmask.training.display import Display
from unmask.training.loop import TrainState
from unmask.training.pretrain import launch, resume

SMALL = [
    "model.kind=neomme", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=48", "model.head_dim=16", "model.embedding_rank=16", "model.sliding_window=6",
    "train.threads=1", "data.tokenizer.vocab_size=120", "stage.0.batch_size=500 tokens",
    "stage.1.batch_size=500 tokens", "train.every.log=1 steps",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on the command line."""
    out = tmp_path_factory.mktemp("runs") / "notes"
    settings = [argument for setting in SMALL for argument in ("--set", setting)]
    assert command("pretrain", prose, "--recipe", "tiny", "--budget", "20 steps", "--out", out, *settings) == 0
    return out


def command(*arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def assert_equal(first: Model, second: Model) -> None:
    for one, other in ((first.encoder, second.encoder), (first.head, second.head)):
        tensors, others = one.state_dict(), other.state_dict()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert first.settings == second.settings


def hf_folder(source: Path, folder: Path, model_class: str, **settings: Any) -> Path:
    """Write a model with random weights and a run's tokenizer, as transformers saves it."""
    import transformers

    hf_config = transformers.NeoMMEConfig(
        vocab_size=load(source).tokenizer.size, hidden_size=32, embedding_rank=12, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=40, embedding_dim=8,
        **{"patch_size": 1, **settings},
    )  # fmt: skip
    torch.manual_seed(5)
    hf_model = getattr(transformers, model_class)(hf_config)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    hf_model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / "best" / name).read_bytes())
    return folder


def test_a_run_learns_and_resumes(run: Path) -> None:
    losses = [line["loss"] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in line]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    model = load(run)
    assert isinstance(model.settings, NeoMMEConfig) and model.settings.windows == [6, None]
    weights = model.encoder.state_dict()
    for name in ("value_embedding", "blocks.0.attention.output.weight", "blocks.1.mlp.output.weight"):
        assert weights[name].any(), f"{name} is 0 at first and is trained"


class StopsAt(Display):
    """Interrupts this process after a given step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: TrainState) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_and_resumed_run_is_bit_identical(prose: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        launch(
            [prose], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, "train.budget=20 steps"], display=StopsAt(8)
        )
    resume(tmp_path / "run")
    names = ("model.safetensors", "resume/weights.safetensors", "resume/optimizer.safetensors")
    for name in names:
        first, second = load_file(run / "latest" / name), load_file(tmp_path / "run" / "latest" / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_export_and_import_keep_every_tensor(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", run, tmp_path / "out", "--json") == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["architecture"] == "NeoMMEForMaskedLM" and exported["parity"]["logits"] < 1e-5
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline(" in card and "SentenceTransformer(" not in card
    assert command("import", tmp_path / "out", tmp_path / "imported") == 0
    assert "neomme, 2 layers, hidden size 32" in capsys.readouterr().out
    assert_equal(load(run), load(tmp_path / "imported"))


def test_the_encoder_alone_is_exported_and_has_a_tied_head_again(run: Path, tmp_path: Path) -> None:
    exported = unmask.export(run, tmp_path / "alone", only="encoder")
    assert exported.architecture == "NeoMMEModel" and exported.parity is not None
    names = load_file(tmp_path / "alone" / "model.safetensors").keys()
    assert not any(name.startswith("model.") for name in names) and "patch_embeddings.norm.bias" in names
    opened = open_model(tmp_path / "alone")
    assert_equal(load(run), opened)
    assert opened.notes == ()


@pytest.mark.parametrize("model_class", ["NeoMMEForMaskedLM", "NeoMMEModel", "NeoMMEForRetrieval"])
def test_folders_of_transformers_are_imported(model_class: str, run: Path, tmp_path: Path) -> None:
    folder = hf_folder(run, tmp_path / "hf", model_class)
    imported = unmask.import_model(folder, tmp_path / "imported")
    left_out = [note for note in imported.notes if note.startswith("left out")]
    assert "left out the patch embedding, which only images use" in left_out
    assert any("multi_vector_head.proj.weight" in note for note in left_out) is (model_class == "NeoMMEForRetrieval")
    assert not any(note.startswith("initialized") for note in imported.notes)
    exported = unmask.export(tmp_path / "imported", tmp_path / "out")
    assert exported.parity is not None and exported.parity.logits < 1e-4
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model." if model_class == "NeoMMEModel" else ""
    kept = {prefix + name: tensor for name, tensor in before.items() if "patch_embeddings" not in name}
    kept.pop("multi_vector_head.proj.weight", None)
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())


def test_an_untied_matrix_of_the_head_is_refused(run: Path, tmp_path: Path) -> None:
    folder = hf_folder(run, tmp_path / "hf", "NeoMMEForMaskedLM")
    tensors = load_file(folder / "model.safetensors")
    decoder = tensors["model.embed_tokens.word_embeddings.weight"] + 1
    save_file(tensors | {"lm_head.weight": decoder}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from the embedding"):
        open_model(folder)


def test_a_model_for_images_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf_folder(run, tmp_path / "hf", "NeoMMEForMaskedLM", patch_size=4)
    assert command("import", folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "unsupported patch_size: 4" in error and "hint: use a NeoMME model for text alone" in error
    assert not (tmp_path / "out").exists()


def test_training_continues_with_new_tokens(prose: Path, run: Path, tmp_path: Path) -> None:
    unmask.pretrain(
        prose, start=run, extend_vocabulary=5, out=tmp_path / "run", budget="1 steps",
        settings=["train.threads=1", "stage.0.batch_size=256 tokens"], display=None,
    )  # fmt: skip
    size = load(run).tokenizer.size
    model = load(tmp_path / "run")
    assert model.tokenizer.size == size + 5
    assert model.encoder.state_dict()["value_embedding"].shape == (size + 5, 16)


def test_sentence_pairs_need_bert(prose: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pair"):
        unmask.pretrain(
            prose, recipe="tiny", settings=[*SMALL, "objective.kind=mlm+pairs"], out=tmp_path / "run", display=None
        )


def test_a_class_that_transformers_lacks_is_an_error_with_a_hint(run: Path, tmp_path: Path) -> None:
    unmask.export(run, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace("NeoMMEForMaskedLM", "NeoMMEForPoetry"))
    with pytest.raises(ModelError, match="has no NeoMMEForPoetry") as refused:
        compare(tmp_path / "out", load(run), ["a text"], "one text")
    assert "--upgrade" in refused.value.hint
