"""Losses of 25 or 50 steps on one CPU thread, compared with files.

If a commit changes numbers on purpose: UNMASK_WRITE_GOLDEN=1 pytest tests/training/test_golden.py, and give the
reason in the commit message.
"""

from __future__ import annotations

import json
import os
import string
from pathlib import Path

import pytest

import unmask
from unmask.training.pretrain import launch

HERE = Path(__file__).parent / "golden"
ALPHABET = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase  # the 65 characters of Tiny Shakespeare
RUNS = {
    "seed": ["train.every.validate=25 steps"],
    "modernbert": [
        "data.tokenizer.kind=characters", "data.document=file", "model.num_hidden_layers=3", "model.hidden_size=48",
        "model.num_attention_heads=3", "model.intermediate_size=64", "model.local_attention=16",
        "train.precision=float32", "objective.mask_unit=whole-word", "objective.mask_rate=0.2",
        "stage=[{until = '50%', max_seq_len = 32, batch_size = '1k tokens'}, "
        "{until = '100%', max_seq_len = 64, batch_size = '1k tokens'}]",
    ],
    "bert": [
        "data.tokenizer.kind=characters", "data.document=file",
        "model={kind = 'bert', num_hidden_layers = 2, hidden_size = 32}", "model.num_attention_heads=2",
        "model.intermediate_size=64", "optimizer.kind=adamw", "train.precision=float32",
        "stage=[{max_seq_len = 32, batch_size = '512 tokens'}]", "objective.mask_rate=0.3",
    ],
    "rtd": [
        "data.tokenizer.kind=characters", "data.document=file",
        "model={kind = 'bert', num_hidden_layers = 2, hidden_size = 32, init = 'neighbor-attention'}",
        "model.num_attention_heads=2", "model.intermediate_size=64", "train.precision=float32",
        "stage=[{max_seq_len = 32, batch_size = '512 tokens'}]",
        "objective={kind = 'rtd', mask_rate = 0.3, generator_width = 0.5}",
    ],
    **{
        kind: [
            "data.tokenizer.kind=characters", "data.document=file", "model.num_hidden_layers=2", "model.hidden_size=32",
            "model.num_attention_heads=2", "model.intermediate_size=48", "train.precision=float32",
            "stage=[{max_seq_len = 32, batch_size = '512 tokens'}]", f"objective={objective}",
        ]
        for kind, objective in {
            "causal": "{kind = 'causal'}",
            "mntp": "{kind = 'mntp', mask_rate = 0.3, causal_fraction = 0.3}",
            "diffusion": "{kind = 'diffusion', min_mask_rate = 0.1}",
            "adaptive": "{kind = 'adaptive', mask_rate = 0.3, update_every = 10}",
        }.items()
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40,000 characters; each of the 65 occurs in the training split and in the held-out split."""
    words = ["king", "Rome", "speak", "citizen", "hear", "mine", "what", "Zounds", "quick", "joy", "vex", "And", "But"]
    lines = [
        f"{ALPHABET[i * 5 % 65]} {words[i % 13]} {words[i * 7 % 13]}, "
        f"{words[i * i % 13]}; {ALPHABET[(i * 3 + 1) % 65]}.\n"
        for i in range(1600)
    ]
    path = tmp_path_factory.mktemp("play") / "play.txt"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", RUNS)
def test_the_first_losses(name: str, play: Path, tmp_path: Path) -> None:
    recipe, steps = ("seed", 25) if name == "seed" else ("tiny", 50)
    fixed = [f"train.budget={steps} steps", "train.every.log=1 steps", "train.threads=1"]
    launch([play], recipe=recipe, out=tmp_path / "run", settings=[*RUNS[name], *fixed])
    if name == "seed":
        check_the_tutorial_model(tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # The loss of a discriminator depends on its generator too.
    losses = [line["rtd_loss" if name == "rtd" else "loss"] for line in log if "loss" in line]
    assert len(losses) == steps
    golden = HERE / f"{name}.json"
    if os.environ.get("UNMASK_WRITE_GOLDEN"):
        golden.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    # Other processors round matrix products differently; changes of the algorithm are far larger.
    assert losses == pytest.approx(json.loads(golden.read_text()), abs=2e-3)


def check_the_tutorial_model(run: Path) -> None:
    """65 characters and two special tokens: 812,355 parameters."""
    model = unmask.load(run)
    assert model.tokenizer.size == 67
    assert sum(p.numel() for m in (model.encoder, model.head) for p in m.parameters()) == 812_355
    config = json.loads((run / "latest" / "config.json").read_text())
    assert config["model_type"] == "unmask-seed", "transformers must refuse it instead of initializing it at random"
