"""The demo: real text and a short budget. An earlier demo is replaced, another run never."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.core.errors import RunError
from unmask.training.demo import RECIPE_NAME, SENTENCES, demo, python_documentation

SMALL = {
    "train.budget": "3 steps", "model.num_hidden_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2,
    "model.intermediate_size": 32, "train.threads": 1,
}  # fmt: skip


def test_the_demo_runs_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.toml").write_text(f'name = "{RECIPE_NAME}"\n')
    result = demo(tmp_path / "demo", overrides=SMALL)
    assert [filled.text for filled in result.filled] == [sentence for sentence, _ in SENTENCES]
    assert all(len(filled.masks[0].candidates) == 5 for filled in result.filled) and 0 <= result.num_correct <= 5
    assert f'name = "{RECIPE_NAME}"' in (tmp_path / "demo" / "recipe.toml").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"], (
        "the earlier demo is deleted, and nothing else is left"
    )


def test_a_run_that_is_not_a_demo_is_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    for recipe in ('name = "demo"\n', f'about = \'name = "{RECIPE_NAME}"\'\nname = "mine"\n', "not TOML"):
        (run / "recipe.toml").write_text(recipe)
        with pytest.raises(RunError, match="is not the run of a demo"):
            demo(run, overrides=SMALL)
        assert (run / "recipe.toml").read_text() == recipe


def test_the_sentences_are_not_in_the_text() -> None:
    """The model can't have memorized them."""
    text = " ".join(" ".join(document.split()) for document in python_documentation()).lower()
    for sentence, word in SENTENCES:
        assert sentence.replace("[MASK]", word).lower() not in text
