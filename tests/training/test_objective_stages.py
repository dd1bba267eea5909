"""Objectives by stage and objectives with a state: resuming is exact, and a model says what it predicts."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmask
from unmask.core.errors import ModelError, RecipeError, Stopped
from unmask.training.display import Display
from unmask.training.display.plain import PlainDisplay
from unmask.training.pretrain import launch, resume
from unmask.training.runs import read_run

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.intermediate_size=48", "model.embedding_dropout=0.1",
    "train.every.log=1 steps", "train.every.validate=4 steps", "train.every.save=4 steps", "train.threads=1",
    "train.budget=12 steps", "train.keep_last=9",
]  # fmt: skip
KINDS = {
    "causal": "{kind = 'causal'}",
    "mntp": "{kind = 'mntp', mask_rate = 0.3, causal_fraction = 0.5}",
    "diffusion": "{kind = 'diffusion'}",
    "adaptive": "{kind = 'adaptive', mask_rate = 0.3, update_every = 2}",
    "mlm": "{kind = 'mlm', mask_rate = 0.3}",
}


def stages(*kinds: str) -> str:
    """Return the setting of stages of equal length, one for each kind."""
    parts = [
        f"{{until = '{100 * (n + 1) // len(kinds)}%', max_seq_len = 32, batch_size = '512 tokens', "
        f"objective = {KINDS[kind]}}}"
        for n, kind in enumerate(kinds)
    ]
    return f"stage=[{', '.join(parts)}]"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    resumed = run / "latest" / "resume"
    return {**load_file(resumed / "weights.safetensors"), **load_file(resumed / "optimizer.safetensors")}


def losses(run: Path) -> list[float]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in log if "loss" in line]


def validations(run: Path) -> list[dict[str, object]]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["validation"] for line in log if "validation" in line]


class StopsAt(Display):
    """Asks this process to stop after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("kinds", "stop"),
    [
        (("causal", "mlm"), 5),  # the second stage begins after step 6
        (("mntp", "mlm"), 6),
        (("diffusion",), 7),
        (("adaptive",), 5),  # in an interval of two steps
        (("causal", "adaptive"), 8),
    ],
)
def test_a_stopped_and_resumed_run_is_bit_identical(
    kinds: tuple[str, ...], stop: int, prose: Path, tmp_path: Path
) -> None:
    settings = [*SMALL, stages(*kinds)]
    launch([prose], recipe="tiny", out=tmp_path / "whole", settings=settings)
    with pytest.raises(Stopped):
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=settings, display=StopsAt(stop))
    resume(tmp_path / "run")
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 12


def test_a_model_says_what_it_was_trained_on_last(prose: Path, tmp_path: Path) -> None:
    run, shown = tmp_path / "run", io.StringIO()
    settings = [*SMALL, "train.every.log=3 steps", stages("causal", "mntp", "mlm")]
    launch([prose], recipe="tiny", out=run, settings=settings, display=PlainDisplay(shown))
    assert re.findall(r"^stage (\d) .*, objective (\w+)$", shown.getvalue(), re.M) == [
        ("1", "causal"), ("2", "mntp"), ("3", "mlm"),
    ]  # fmt: skip
    assert "objective of this stage, with its own attention: loss" in shown.getvalue()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [3, 4, 6, 8, 9, 12], "no line has steps of two objectives"
    assert [line["mask_rate"] > 0.8 for line in logged if line["step"] not in (6, 8)] == [True, True, False, False]
    kinds = [unmask.load(step).card["objective"] for step in sorted(run.glob("step-*"))]
    assert kinds == ["causal", "mntp", "mlm"]
    assert [unmask.load(step).encoder.label_offset for step in sorted(run.glob("step-*"))] == [1, 1, 0]
    causal, mntp, mlm = validations(run)
    assert set(causal["objective"]) == {"loss", "accuracy", "mask_rate"}  # type: ignore[arg-type]
    assert not mntp["objective"] and not mlm["objective"]
    assert causal["loss"] != causal["objective"]["loss"]  # type: ignore[index]  # masked tokens, as in all stages
    for step, kind in zip(sorted(run.glob("step-*"))[:2], ("causal", "mntp"), strict=True):
        with pytest.raises(ModelError, match=f"objective.kind={kind}") as error:
            unmask.export(step, tmp_path / "out")
        assert 'only="encoder"' in str(error.value) and not (tmp_path / "out").exists()
    unmask.export(run / "latest", tmp_path / "out")
    unmask.export(sorted(run.glob("step-*"))[0], tmp_path / "encoder", only="encoder")
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "pretrained by causal language modeling" in card and "- causal-language-modeling" in card
    assert "15 % of the tokens" not in card and f"{causal['objective']['loss']:.4f}" in card  # type: ignore[index]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pretrained by masked-language modeling" in card and "| objective of stage 0 | kind causal" in card


def test_a_run_that_ends_causal_is_validated_by_its_own_loss(prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, stages("causal")])
    last = validations(run)[-1]
    assert last["loss"] == last["objective"]["loss"]  # type: ignore[index]
    assert last["loss"] < 5 and last["accuracy"] == last["objective"]["accuracy"]  # type: ignore[operator, index]
    with pytest.raises(ModelError, match="causal"):
        unmask.fill(unmask.load(run), "a [MASK] b")


def test_diffusion_reports_its_bound_beside_the_masked_loss(prose: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, stages("diffusion")])
    last = validations(run)[-1]
    bound = last["objective"]["bound"]  # type: ignore[index]
    assert 1 < bound < 5 and bound != last["loss"]


def test_two_objectives_with_a_state_are_refused(prose: Path, tmp_path: Path) -> None:
    pairs = "{kind = 'mlm+pairs'}"
    setting = stages("adaptive", "mlm").replace(KINDS["mlm"], pairs)
    model = "model={kind = 'bert', num_hidden_layers = 2, hidden_size = 32, num_attention_heads = 2}"
    settings = ["data.tokenizer={kind = 'wordpiece', vocab_size = 120}", model, "model.intermediate_size=48", setting]
    with pytest.raises(RecipeError, match="2 objectives have weights"):
        launch([prose], recipe="tiny", out=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists()


def test_mntp_needs_a_token_before_the_text(prose: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\[CLS\]"):
        launch([prose], recipe="seed", out=tmp_path / "run", settings=["objective={kind = 'mntp'}"])


def test_best_model_and_patience_are_those_of_one_objective(prose: Path, tmp_path: Path) -> None:
    """The masked loss of a causal stage neither stops the run nor chooses its best model."""
    run = tmp_path / "run"
    rates = ["optimizer.lr=1e-9", "optimizer.muon_lr=1e-9"]  # the first validation is about as good as the others
    patience = ["train.early_stopping_patience=1", "train.every.validate=1 steps"]
    launch([prose], recipe="tiny", out=run, settings=[*SMALL, *rates, *patience, stages("causal", "mlm")])
    assert len(validations(run)) > 6, "the causal stage of 6 steps is complete"
    best = unmask.load(run / "best").card
    assert best["objective"] == "mlm" and best["step"] > 6
    assert read_run(run).best_step == best["step"]


def test_a_causal_stage_without_a_token_before_the_text_is_validated(tmp_path: Path) -> None:
    """All documents of a validation text have one letter: the first token of a batch is masked."""
    text, one, pairs = tmp_path / "letters.txt", tmp_path / "one.txt", tmp_path / "pairs.tsv"
    letters = "abcdefghijklmnopqrstuvwxyz"
    text.write_text("\n".join(letters[n:] + letters[:n] for n in range(26)) + "\n")
    one.write_text("\n".join(letters) + "\n")
    pairs.write_text("a b\tb a\n")
    settings = [
        *SMALL[6:], "data.document=line", "data.held_out={method = 'hash', fraction = '20%'}",
        f"data.valid.one={one}", "model.num_hidden_layers=1",
        "model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=48", stages("causal", "mlm"),
    ]  # fmt: skip
    launch([text], recipe="seed", out=tmp_path / "run", settings=settings)
    assert all(isinstance(validation["loss"], float) for validation in validations(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"minimal pairs need a token such as \[CLS\]"):
        launch([text], recipe="seed", out=tmp_path / "other", settings=[*settings, f"train.evaluate.pairs={pairs}"])
    assert not (tmp_path / "other").exists()
