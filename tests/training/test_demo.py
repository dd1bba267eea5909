"""The demo: real text and a short budget. An earlier demo is replaced, another run never."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.core.errors import RunError
from unmask.training.demo import RECIPE_NAME, SENTENCES, demo

pytestmark = pytest.mark.slow

SMALL = {
    "train.budget": "3 steps", "model.num_hidden_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2,
    "model.intermediate_size": 32, "train.threads": 1, "stage.0.batch_size": "500 tokens",
    "stage.1.batch_size": "500 tokens", "data.held_out.max_size": "20k characters",
}  # fmt: skip


def test_the_demo_runs_and_can_be_repeated_and_has_not_seen_the_sentences(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.toml").write_text(f'name = "{RECIPE_NAME}"\n')
    result = demo(tmp_path / "demo", overrides=SMALL)
    assert [filled.text for filled in result.filled] == [sentence for sentence, _ in SENTENCES]
    assert all(len(filled.masks[0].candidates) == 5 for filled in result.filled) and 0 <= result.num_correct <= 5
    assert f'name = "{RECIPE_NAME}"' in (tmp_path / "demo" / "recipe.toml").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"], (
        "the earlier demo is deleted, and nothing else is left"
    )
    lines = (tmp_path / "demo" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    text = " ".join(" ".join(json.loads(line).split()) for line in lines).lower()
    assert len(lines) > 100 and "return true if" in text
    for sentence, word in SENTENCES:
        assert sentence.replace("[MASK]", word).lower() not in text, "the model can't have memorized it"


def test_a_run_that_is_not_a_demo_is_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    for recipe in ('name = "demo"\n', f'about = \'name = "{RECIPE_NAME}"\'\nname = "mine"\n', "not TOML"):
        (run / "recipe.toml").write_text(recipe)
        with pytest.raises(RunError, match="is not the run of a demo"):
            demo(run, overrides=SMALL)
        assert (run / "recipe.toml").read_text() == recipe
