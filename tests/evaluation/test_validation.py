"""Validation on the texts of data.valid, in addition to the held-out text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unmask.core.errors import RecipeError, RunError, TextError
from unmask.data.settings import DataConfig
from unmask.data.sources import open_source
from unmask.evaluation.masked_lm import EvalResult, documents_from_source
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import train_tokenizer
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import load_recipe

SMALL = [
    "data.document=line", "data.tokenizer={kind = 'characters'}", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16",
    "stage=[{until = '50%', max_seq_len = 24, batch_size = '8 texts'}, "
    "{until = '100%', max_seq_len = 32, batch_size = '8 texts'}]",
    "train.budget=4 steps", "train.every.validate=2 steps", "train.threads=1",
]  # fmt: skip
NEWS = "the news of the day is that the cat sat on the mat\n" * 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training text, two validation texts, and a run that used them."""
    home = tmp_path_factory.mktemp("sets")
    lines = [f"the cat number {i} sat on mat {i * 7 % 31} and the dog on the log" for i in range(200)]
    (home / "train.txt").write_text("\n".join(lines))
    (home / "news.txt").write_text(NEWS)
    (home / "play.txt").write_text("enter a dog, sadly\nexit the cat\n" * 40)
    launch([home / "train.txt"], out=home / "run", settings=[*SMALL, *valid(home)])
    return home


def valid(home: Path, **more: str) -> list[str]:
    named = {"news": str(home / "news.txt"), "play-2": str(home / "play.txt"), **more}
    return [f"data.valid={{{', '.join(f'{name} = {json.dumps(path)}' for name, path in named.items())}}}"]


def test_each_set_is_evaluated_logged_and_saved(home: Path) -> None:
    log = [json.loads(line) for line in (home / "run" / "log.jsonl").read_text().splitlines()]
    result = [line["validation"]["sets"] for line in log if "validation" in line]
    assert len(result) == 2 and all(set(sets) == {"news", "play-2"} for sets in result)
    for sets in result:
        assert set(sets["news"]) == set(EvalResult.__dataclass_fields__)
        known = len(NEWS.replace("\n", "")) * (1 - sets["news"]["unknown_share"])
        assert sets["news"]["masked_tokens"] == pytest.approx(0.15 * known, rel=0.05)
    assert result[0]["news"]["loss"] != result[1]["news"]["loss"]
    assert result[0]["news"]["unigram_loss"] == result[1]["news"]["unigram_loss"] < 4
    assert result[0]["news"]["unigram_loss"] != result[0]["play-2"]["unigram_loss"]
    card = json.loads((home / "run" / "latest" / "card.json").read_text())
    assert card["validation"]["sets"] == result[-1]
    kept = json.loads((home / "run" / "env.json").read_text())["text"]["valid"]
    assert (
        kept["news"]["path"] == str(home / "news.txt") and kept["news"]["fingerprint"] != kept["play-2"]["fingerprint"]
    )


def test_validation_sets_do_not_change_training(home: Path, tmp_path: Path) -> None:
    launch([home / "train.txt"], out=tmp_path / "run", settings=SMALL)
    logs = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if "learning_rate" in line]
        for run in (home / "run", tmp_path / "run")
    ]
    assert logs[0] == logs[1]
    assert "sets" not in (tmp_path / "run" / "recipe.toml").read_text()


def test_a_changed_text_prevents_resuming(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run, symlinks=True)
    monkeypatch.chdir(tmp_path)  # paths are kept as they were meant, not as they were written
    log = run / "log.jsonl"
    resume(run, budget="+1 steps")
    last = json.loads(log.read_text().splitlines()[-1])
    assert set(last.get("validation", {"sets": {"news", "play-2"}})["sets"]) == {"news", "play-2"}
    (home / "news.txt").write_text(NEWS + "more\n")
    try:
        with pytest.raises(RunError, match="`news` has changed since the run was started"):
            resume(run, budget="+1 steps")
    finally:
        (home / "news.txt").write_text(NEWS)


def test_errors_are_raised_before_training(home: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"data\.valid\.gone"):
        launch([home / "train.txt"], out=tmp_path / "a", settings=[*SMALL, *valid(home, gone="nowhere.txt")])
    with pytest.raises(RecipeError, match="invalid name of a validation text"):
        load_recipe("tiny", ['data.valid={"a b" = "x.txt"}'])
    (tmp_path / "foreign.txt").write_text("ключ\n" * 9)
    with pytest.raises(TextError, match=r"data\.valid\.foreign.*foreign\.txt"):
        launch(
            [home / "train.txt"], out=tmp_path / "b",
            settings=[*SMALL, *valid(home, foreign=str(tmp_path / "foreign.txt"))],
        )  # fmt: skip
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize("max_size", [1, 8, 9, 10, 25, 10_000])
def test_max_size_limits_what_is_read(tmp_path: Path, max_size: int) -> None:
    text = "one two\n\nthree\nfour\n\n\nfive"
    (tmp_path / "a.txt").write_text(text)
    tokenizer = train_tokenizer([text], CharacterConfig())
    source = open_source([tmp_path / "a.txt"], DataConfig())
    result = documents_from_source(source, tokenizer, "spaces", max_size)
    assert result.characters == min(max_size, len(text)) == sum(one.characters for one in result.documents)
    assert result.complete == (max_size >= len(text))
    decoded = [tokenizer.decode(one.ids) for one in result.documents]
    *before, last = ["one two", "three\nfour", "five"][: len(decoded)]
    assert before == decoded[:-1] and last.startswith(decoded[-1])
