"""Names of texts: patterns, directories, weights, standard input, datasets."""

from __future__ import annotations

import gzip
import io
import os
import sys
from pathlib import Path

import pytest

from unmask.core.errors import TextError
from unmask.core.files import default_cache
from unmask.data.inputs import sends_requests
from unmask.data.settings import DataConfig
from unmask.data.sources import FileSource, absolute, is_name, open_source, weighted

SETTINGS = DataConfig(document="line")


def documents(*names: str | Path, settings: DataConfig = SETTINGS) -> list[str]:
    source = open_source(names, settings)
    return [passage.text for part in source.parts() for passage in source.documents(part)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with texts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "old").mkdir(parents=True)
    (tmp_path / "notes" / "b.txt").write_text("b")
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "notes" / "old" / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    (tmp_path / "notes" / "old" / "d.JSONL").write_text('{"text": "d\\ne"}')
    (tmp_path / "notes" / "e.csv").write_text('text\n"e"\n')
    (tmp_path / "notes" / "readme").write_text("of an unknown extension")
    return tmp_path


def test_folders_and_patterns(place: Path) -> None:
    assert documents("notes") == ["a", "b", "e", "c", "d\ne"], "every known ending, sorted by path"
    assert documents("notes/*.txt") == documents(Path("notes/*.txt")) == ["a", "b"]
    assert documents("notes/**/*.txt*") == ["a", "b", "c"]
    assert documents("notes/r*", "notes/[ab].txt") == ["of an unknown extension", "a", "b"]
    (place / "notes" / "[ab].txt").write_text("itself")
    assert documents("notes/[ab].txt") == ["itself"], "what exists is no pattern"
    for name, says in (("notes/*.md", "no file matches"), ("*", "no file matches"), ("none", "no such file")):
        with pytest.raises(TextError, match=says) as caught:
            documents(name)
        assert caught.value.location == name and caught.value.hint


def test_texts_that_send_requests(place: Path) -> None:
    for name in ("rows", "a#b", "notes"):
        (place / name).mkdir(exist_ok=True)
    for name in ("rows", "a#b"):
        (place / name / "dataset_dict.json").write_text("{}")
    requests = ["dataset:imdb", "dataset:me/rows@train:2", "s3://bucket/a", "dataset:notes", "dataset:a#b", "a#b"]
    assert [text for text in requests if not sends_requests(text)] == []
    local = ["dataset:rows", "dataset:rows@train", "dataset:rows:0.5", "rows", "notes", "none", "", "\0", "a" * 5000, 7]
    assert [text for text in local if sends_requests(text)] == [], "a folder of save_to_disk, or no dataset at all"


def test_notes_describe_the_documents(place: Path) -> None:
    for names, note in (
        (["notes/a.txt"], "a document is a nonblank line"),
        (["notes/e.csv"], "a document is a row's `text`"),
        (["notes"], "a document is a nonblank line; in tables, a row's `text`"),
        (["notes/a.txt:3", "notes/e.csv:1"], "weights: notes/a.txt 0.75, notes/e.csv 0.25"),
    ):
        assert note in open_source(names, SETTINGS).notes


def test_weights(place: Path) -> None:
    source = open_source(["notes/*.txt:3", "notes/e.csv:1.0"], SETTINGS)
    assert [tuple(group) for group in source.groups] == [("notes/*.txt", 0.75, 2), ("notes/e.csv", 0.25, 1)]
    assert sum(group.parts for group in source.groups) == len(source.parts())
    plain = open_source(["notes/*.txt", "notes/e.csv"], SETTINGS)
    assert [group.weight for group in plain.groups] == [0.0, 0.0]
    assert plain.fingerprint != source.fingerprint
    assert source.fingerprint == open_source(["notes/[ab].txt:6", "notes/e.csv:2"], SETTINGS).fingerprint
    (place / "a:0.5").write_text("named so")
    assert documents("a:0.5") == ["named so"]
    for names, says in (
        (["notes/a.txt:1", "notes/b.txt"], "has no weight"),
        (["notes/a.txt:0"], "weight: got 0"),
        (["notes/a.txt:-1"], "weight: got -1"),
        (["notes/a.txt:1e999"], "weight: got inf"),
        (["notes/a.txt:x"], "no such file"),
    ):
        with pytest.raises(TextError, match=says) as caught:
            documents(*names)
        assert caught.value.location in names and caught.value.hint


def test_names(place: Path) -> None:
    assert weighted("dataset:7") == ("dataset:7", None)
    assert weighted("dataset:a/b#c@d:.5") == ("dataset:a/b#c@d", 0.5)
    assert absolute("notes/*.txt:2") == f"{place}/notes/*.txt:2"
    assert absolute("dataset:a/b:2") == "dataset:a/b:2" and absolute("-:2") == "-:2"
    assert absolute("dataset:notes@train:2") == f"dataset:{place}/notes@train:2"
    assert all(is_name(text) for text in ("-", "a b.txt", "a b.jsonl.zst", "a b.CSV:3", "dataset:a b", "a b.gz"))
    assert not any(is_name(text) for text in ("a sentence.", "a - b", "in 3:7 it says", ".txt and more"))


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_standard_input_is_stored_and_can_be_read_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, pack: type
) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    sources: list[FileSource] = []
    for _ in range(2):
        pipe(monkeypatch, pack("höre\nzu".encode()))
        sources.append(open_source(["-:3", "notes/a.txt:1"], SETTINGS))
    source, again = sources
    kept = list((default_cache() / "standard-input").iterdir())
    assert len(kept) == 1 and source.names == again.names == (f"{kept[0]}:3", "notes/a.txt:1")
    assert [group.name for group in source.groups] == ["standard input", "notes/a.txt"]
    assert f"standard input is stored as {kept[0]}" in source.notes
    for _ in range(2):
        assert documents(*source.names) == ["höre", "zu", "a"]
    kept[0].unlink()
    with pytest.raises(TextError, match="no longer in the cache"):
        documents(*source.names)


def test_standard_input_that_can_not_be_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cache"))
    pipe(monkeypatch, b"")
    with pytest.raises(TextError, match="standard input is empty"):
        open_source(["-"], SETTINGS)
    assert not list((default_cache() / "standard-input").iterdir())
    with pytest.raises(TextError, match="once"):
        open_source(["-", "-"], SETTINGS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TextError, match="several processes"):
        open_source(["-"], SETTINGS)


def test_a_dataset_without_a_connection_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(TextError) as caught:
        documents("dataset:nobody/nothing#one@test")
    assert "dataset `nobody/nothing` is not in the local cache, and the Hub can't be reached" in caught.value.message
    assert "save_to_disk" in caught.value.hint and caught.value.location == "dataset:nobody/nothing#one@test"
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_each_file_is_read_once(place: Path) -> None:
    (place / "notes" / "loop").symlink_to(".")
    (place / "notes" / "again").symlink_to("../notes")
    (place / "notes" / "z.txt").symlink_to("a.txt")
    os.link("notes/a.txt", "notes/hard.txt")
    every = documents("notes")
    assert every == ["a", "b", "e", "c", "d\ne"]
    assert documents("notes/**/*.txt") == ["a", "b"]
    assert documents("notes", "./notes/a.txt", "notes/../notes", "notes/*.txt") == every
    assert "named or linked twice: ./notes/a.txt" in " ".join(
        open_source(["notes/a.txt", "./notes/a.txt"], SETTINGS).warnings
    )
    with pytest.raises(TextError, match="belongs to a text before it"):
        documents("notes/a.txt:1", "notes/z.txt:2")


def test_links_to_other_places(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "far.txt").write_text("far")
    (place / "notes" / "linked").symlink_to(other)
    (place / "notes" / "dead.txt").symlink_to("nowhere")
    os.mkfifo(place / "notes" / "pipe.txt")
    assert "far" in documents("notes") and "far" in documents("notes/**/*.txt")
    for name in ("notes", "notes/*.txt"):
        assert "links without a target: notes/dead.txt" in " ".join(open_source([name], SETTINGS).warnings)
    assert "1 sockets, pipes or devices" in " ".join(open_source(["notes"], SETTINGS).warnings)
    with pytest.raises(TextError, match="no target: nowhere"):
        documents("notes/dead.txt")


def test_what_a_directory_leaves_out(place: Path) -> None:
    for name in ("._a.txt", ".DS_Store", "a.txt~", "x.pdf", "y.PDF", "z.png", "empty.txt"):
        (place / "notes" / name).write_text("" if name == "empty.txt" else "left out")
    for folder in (".ipynb_checkpoints", "__MACOSX"):
        (place / "notes" / folder).mkdir()
        (place / "notes" / folder / "a.txt").write_text("left out")
    for name in ("f.md", "g.TEXT", "h.rst"):
        (place / "notes" / name).write_text(name)
    (place / "notes" / "i.ndjson").write_text('{"text": "i"}')
    assert documents("notes") == ["a", "b", "e", "f.md", "g.TEXT", "h.rst", "i", "c", "d\ne"]
    (warning,) = open_source(["notes"], SETTINGS).warnings
    for count in (
        "2 .pdf",
        "1 .png",
        "1 without an extension",
        "3 hidden or backup",
        "2 hidden directories",
        "1 empty or blank",
    ):
        assert count in warning


def test_a_directory_of_code(place: Path) -> None:
    """Files of code are read if there is no text beside them."""
    (place / "code" / "below").mkdir(parents=True)
    for name in ("code/a.py", "code/below/b.rs"):
        (place / name).write_text(name)
    (place / "code" / "logo.png").write_text("left out")
    assert documents("code") == ["code/a.py", "code/below/b.rs"]
    assert open_source(["code"], SETTINGS).warnings == ["left out of code: 1 .png"]
    (place / "code" / "README.md").write_text("text")
    assert documents("code") == ["text"]
    (warning,) = open_source(["code"], SETTINGS).warnings
    assert "1 .py" in warning and "1 .rs" in warning


def test_a_name_that_is_not_utf_8(place: Path) -> None:
    Path(os.fsdecode(b"notes/caf\xe9.txt")).write_text("name")
    for name in ("notes", "notes/*.txt", os.fsdecode(b"notes/caf\xe9.txt")):
        with pytest.raises(TextError, match="not UTF-8") as caught:
            documents(name)
        assert caught.value.location == "notes/caf\\xe9.txt"
