"""What a run was started with: names, texts and data sets are told apart, and opened again."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.core.errors import RecipeError, RunError, TextError
from unmask.data.settings import DataConfig
from unmask.data.sources import FileSource, MemorySource, absolute, open_text
from unmask.training.environment import open_text_again

SETTINGS = DataConfig(document="line")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    return tmp_path


@pytest.mark.parametrize(
    "texts",
    [
        ["b.txt"],
        ["my notes"],
        ["my notes:0.5", "b.txt:0.5"],
        ["*.txt"],
        ["all my */**/new ones.jsonl.gz"],
        ["dataset:some one/set"],
        [Path("a sentence that is a path")],
        ["absent"],
    ],
)
def test_names(texts: list[str | Path]) -> None:
    assert isinstance(open_text(texts, SETTINGS), FileSource)


@pytest.mark.parametrize("texts", [["a sentence."], ["two\nlines"], ["", "b"], ["we met at 3:15, at 4:30"]])
def test_texts(texts: list[str]) -> None:
    source = open_text(texts, SETTINGS)
    assert isinstance(source, MemorySource)
    assert len(list(source.documents(source.parts()[0]))) == len(texts)


def test_names_among_texts() -> None:
    for texts in (["b.txt", "and a sentence"], [Path("absent"), "and a sentence"]):
        with pytest.raises(TextError, match="a file among texts"):
            open_text(texts, SETTINGS)
    with pytest.raises(RecipeError, match="no text was given"):
        open_text([], SETTINGS)


@pytest.mark.parametrize("texts", [["my notes:3", "b.txt:1"], ["*.txt"], ["."]])
def test_the_same_text_again_in_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    source = open_text(texts, SETTINGS)
    assert isinstance(source, FileSource)
    paths = [absolute(path) for path in source.paths]
    environment = {"text": {"paths": paths, "fingerprint": source.fingerprint}}
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert open_text_again(place, environment, SETTINGS).fingerprint == source.fingerprint
    (place / "b.txt").write_text("changed")
    with pytest.raises(RunError, match="not what this run was started with"):
        open_text_again(place, environment, SETTINGS)
