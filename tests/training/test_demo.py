"""The demonstration: real text, a short budget; an earlier demo is replaced, a person's run never."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.core.errors import RunError
from unmask.training.demo import MARK, SENTENCES, demo, english_of_python

SMALL = {
    "train.budget": "3 steps", "model.num_hidden_layers": 1, "model.hidden_size": 32, "model.num_attention_heads": 2, "model.intermediate_size": 32,
    "train.threads": 1,
}  # fmt: skip


def test_the_demo_runs_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "recipe.toml").write_text(f'name = "{MARK}"\n')
    made = demo(tmp_path / "demo", overrides=SMALL)
    assert [one.text for one in made.filled] == [sentence for sentence, _ in SENTENCES]
    assert all(len(one.masks[0].candidates) == 5 for one in made.filled) and 0 <= made.right <= 5
    assert f'name = "{MARK}"' in (tmp_path / "demo" / "recipe.toml").read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"], "the earlier demo is gone, nothing else came"


def test_a_run_of_the_recipe_demo_is_not_replaced(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "recipe.toml").write_text('name = "demo"\n')
    with pytest.raises(RunError, match="not made by a demo"):
        demo(run, overrides=SMALL)
    assert (run / "recipe.toml").read_text() == 'name = "demo"\n'


def test_the_sentences_are_not_in_the_text() -> None:
    """The masks are filled from what was learnt, not remembered."""
    text = " ".join(" ".join(document.split()) for document in english_of_python()).lower()
    for sentence, word in SENTENCES:
        assert sentence.replace("[MASK]", word).lower() not in text
