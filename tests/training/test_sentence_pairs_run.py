"""A run on masks and sentence pairs: checkpoints that transformers loads, resuming, refusals."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unmask
from unmask.core.errors import RecipeError, Stopped, TextError, TokenizerError, UnmaskError
from unmask.core.types import Sample, pack
from unmask.models.model import load
from unmask.training.display import Display
from unmask.training.display.plain import PlainDisplay
from unmask.training.pretrain import launch, resume

SMALL = [
    "data.tokenizer={kind = 'characters'}", "data.held_out={method = 'hash', fraction = '10%'}",
    "model={kind = 'bert', num_hidden_layers = 1, hidden_size = 16, num_attention_heads = 2, intermediate_size = 16, "
    "max_position_embeddings = 64}",
    "objective={kind = 'mlm+pairs', pair_task = 'next-sentence'}",
    "train.every.log=1 steps", "train.every.validate=4 steps", "train.every.save=4 steps", "train.threads=1",
    "stage=[{until = '50%', max_seq_len = 48, batch_size = '12 texts'}, "
    "{until = '100%', max_seq_len = 64, batch_size = '12 texts'}]",
    "train.budget=8 steps", "train.ema_decay=0.9", "preview.num_samples=1",
]  # fmt: skip


class StopsAt(Display):
    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state) -> None:
        if state.step == self._step:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def whole(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pairs") / "whole"
    launch([prose], recipe="tiny", out=run, settings=SMALL)
    return run


def log(run: Path) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second", "training_seconds", "phase_seconds", "data_wait_fraction"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def test_pairs_are_logged_and_validated(whole: Path) -> None:
    training = [line for line in log(whole) if "loss" in line]
    assert len(training) == 8
    assert all(0 <= line["pair_accuracy"] <= 1 and line["pair_loss"] > 0 for line in training)
    validations = [line["validation"] for line in log(whole) if "validation" in line]
    first, last = (one["pair"] for one in validations)
    assert first["pairs"] == last["pairs"] > 10 and set(first["earlier"]) == {"48"} and last["earlier"] == {}
    card = json.loads((whole / "latest" / "card.json").read_text())
    assert card["validation"]["pair"] == last


def test_a_resumed_run_is_bit_identical(whole: Path, prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=run, settings=SMALL, display=StopsAt(5))
    resume(run)
    assert log(run) == log(whole)
    step = (whole / "latest").resolve()
    names = [path.relative_to(step) for path in step.rglob("*.safetensors")]
    assert {name.name for name in names} >= {"objective.safetensors", "ema.safetensors", "model.safetensors"}
    for name in names:
        first, second = load_file(run / "latest" / name), load_file(whole / "latest" / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_transformers_loads_the_checkpoint(whole: Path) -> None:
    from transformers import AutoTokenizer, BertForPreTraining

    folder = (whole / "latest").resolve()
    reference, report = BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    first, second = "the cat sat on the mat", "a dog ran"
    given = AutoTokenizer.from_pretrained(folder)(first, second, return_tensors="pt")
    model = load(folder)
    assert model.pair is not None
    parts = load_file(folder / "objective.safetensors")
    assert all(torch.equal(parts[name], tensor) for name, tensor in model.pair.state_dict().items())
    ids, segment = given["input_ids"][0].numpy(), given["token_type_ids"][0].numpy()
    assert segment.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    batch = pack([Sample(ids, ids.astype("uint8") * 0, token_type_ids=segment)])
    with torch.inference_mode():
        logits = reference.eval()(**given).seq_relationship_logits
        torch.testing.assert_close(model.pair(model.encoder(batch), batch), logits, atol=1e-5, rtol=0)
    assert unmask.load(whole / "best").pair is not None and (whole / "best" / "objective.safetensors").is_file()


def test_the_display_shows_pairs(prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = [*SMALL, "objective.pair_task=sentence-order", "train.budget=4 steps"]
    launch([prose], recipe="tiny", out=tmp_path / "run", settings=order, display=PlainDisplay())
    output = capsys.readouterr().out
    assert "pairs (sentence-order): from" in output and "of two sentences or more; the other" in output
    assert "  pairs " in output and "chance 50%" in output and "sentence-pair accuracy" in output


BAD: list[tuple[list[str], type[UnmaskError], str]] = [
    (["model={kind = 'modernbert', num_hidden_layers = 1, hidden_size = 16, num_attention_heads = 2, "
      "intermediate_size = 16}"], RecipeError, "two token types, but this model has fewer"),
    (["model.type_vocab_size=1"], RecipeError, r"fewer \(type_vocab_size = 1\)"),
    (["data.document=file", "data.held_out={method = 'tail'}"], TextError, "only one document has two sentences"),
    (["data.tokenizer={kind = 'characters', special_tokens = ['[UNK]', '[MASK]']}"], TokenizerError,
     "adds no token between two texts"),
    (["stage=[{max_seq_len = 4}]"], RecipeError, "invalid max_seq_len: got 4"),
    (["objective.short_seq_prob=2"], RecipeError, "invalid short_seq_prob"),
    (["objective.pair_task=previous"], RecipeError, "previous"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "kind", "match"), BAD, ids=[match for *_, match in BAD])
def test_settings_and_text_without_pairs_are_refused(
    settings: list[str], kind: type[UnmaskError], match: str, prose: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=match) as caught:
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, *settings])
    assert caught.value.hint and caught.value.location and not (tmp_path / "run").exists()


def test_lines_of_one_sentence_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"this is line {number}" for number in range(300)))
    with pytest.raises(TextError, match="no document has two sentences") as caught:
        launch([text], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, "data.document=line"])
    assert "lines.txt" in caught.value.location


def test_too_little_held_out_is_refused(prose: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n\n".join(f"one sentence {number}. two of them. three." for number in range(30)))
    with pytest.raises(TextError, match="not enough held-out text for sentence pairs") as caught:
        launch([few], recipe="tiny", out=tmp_path / "run", settings=[*SMALL, "data.held_out={method = 'tail'}"])
    assert "held_out.fraction" in caught.value.hint


def test_weights_are_refused(prose: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(prose.read_bytes())
    with pytest.raises(RecipeError, match="texts with weights can't be combined with sentence pairs"):
        launch([f"{prose}:2", f"{other}:1"], recipe="tiny", out=tmp_path / "run", settings=SMALL)


JOINT = """
from torch import nn
from unmask.objectives.mlm import MaskedLMObjective, MaskedLMConfig
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective

class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 2)
    def forward(self, hidden_TD, batch):
        return self.linear(hidden_TD.index_select(0, batch.cu_seqlens[: batch.num_samples]))

class Joint(BertPretrainingObjective):
    def __init__(self, settings, tools):
        mlm = MaskedLMObjective(MaskedLMConfig(), tools.vocabulary.mask_id, tools.vocabulary.regular_token_ids)
        super().__init__(BertPretrainingConfig(pair_task="sentence-order"), mlm, Head(tools.hidden_size))
"""


def test_a_plugin_objective_reads_pairs_and_saves_its_parameters(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "joint_plugin.py").write_text(JOINT)
    monkeypatch.chdir(tmp_path)
    settings = [one for one in SMALL if not one.startswith(("objective", "train.ema_decay"))]
    settings.append("objective={kind = 'joint_plugin:Joint'}")
    launch([prose], recipe="tiny", out=tmp_path / "whole", settings=settings)
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=settings, display=StopsAt(5))
    resume(tmp_path / "run")
    names = ("objective.safetensors", "model.safetensors", "resume/weights.safetensors")
    for name in names:
        first, second = load_file(tmp_path / "run" / "latest" / name), load_file(tmp_path / "whole" / "latest" / name)
        assert all(torch.equal(first[key], second[key]) for key in first | second), name
    assert set(load_file(tmp_path / "whole" / "latest" / names[0])) == {"linear.weight", "linear.bias"}
    assert log(tmp_path / "run") == log(tmp_path / "whole") and load(tmp_path / "whole" / "latest").pair is None
