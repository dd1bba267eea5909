"""`unmask embed` and `unmask search`: vectors of texts and files, neighbors, and inputs that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import unmask as package

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
LINES = ["The cat sat on the mat.", "the dog sat on the log and the cat", "the mat", "dog and cat and log"]


@pytest.fixture
def lines(place: Path) -> Path:
    """A file with four texts and a blank line."""
    (place / "lines.txt").write_text("\n".join([LINES[0], "", *LINES[1:]]) + "\n")
    return place / "lines.txt"


def test_files_and_output_have_the_vectors_of_the_function(
    unmask: Command, run: Path, lines: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = package.embed(package.load(run), LINES, last_layers=1)
    code, out, _ = unmask("embed", "run", "--file", "lines.txt", "--out", "v.npy")
    assert code == 0 and "v.npy: 4 vectors of 16 numbers (mean of the last layer)" in out
    stored = np.lib.format.open_memmap(place / "v.npy", mode="r")
    assert stored.dtype == np.float32 and np.array_equal(stored, expected)
    code, out, _ = unmask("embed", "run", *LINES[:1], "--file", "lines.txt", "--out", "v.jsonl", "--json")
    assert code == 0 and json.loads(out) == {
        "path": "v.jsonl", "texts": 5, "size": 16, "pooling": "mean", "last_layers": 1
    }  # fmt: skip
    rows = [json.loads(line) for line in (place / "v.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [LINES[0], *LINES]
    assert np.abs(np.array([row["vector"] for row in rows[1:]], np.float32) - expected).max() < 1e-6
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == []
    code, out, _ = unmask("embed", "run", LINES[0], LINES[2])
    assert [json.loads(line)["text"] for line in out.splitlines()] == [LINES[0], LINES[2]]
    assert [row["text"] for row in json.loads(unmask("embed", "run", *LINES[:2], "--json")[1])] == LINES[:2]
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = unmask("embed", "run", LINES[0], LINES[2], LINES[0])[1]
    assert "cosines" in table and table.count("1.000") == 5 and LINES[2] in table


def test_search_finds_neighbors_with_stored_vectors_and_without(
    unmask: Command, run: Path, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = unmask("search", "run", LINES[2], "--file", "lines.txt", "--top", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["texts"] == 4 and len(found["nearest"]) == 2
    assert found["nearest"][0] == {"number": 3, "cosine": pytest.approx(1, abs=1e-6), "text": LINES[2]}
    unmask("embed", "run", "--file", "lines.txt", "--out", "v.npy")
    stored = unmask("search", "run", LINES[2], "--file", "lines.txt", "--top", "2", "--json", "--vectors", "v.npy")[1]
    assert [near["number"] for near in json.loads(stored)["nearest"]] == [near["number"] for near in found["nearest"]]
    printed = unmask("search", "run", LINES[2], "--file", "lines.txt")[1].splitlines()
    assert len(printed) == 4 and printed[0].split(maxsplit=2) == ["1.000", "3", LINES[2]]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "50")
    shown = unmask("search", "run", "dog", "--file", "lines.txt")[1]
    assert "█" in shown and "…" in shown


def test_output_that_would_replace_something_is_refused(refused: Refused, run: Path, lines: Path, place: Path) -> None:
    (place / "v.npy").write_bytes(b"kept")
    (place / "rows.jsonl").write_text('{"text": "the cat"}\n')
    refused("embed", "run", "a", "--out", "v.npy", says="the path exists already")
    refused("embed", "run", "a", "--out", "run", says="unknown format")
    refused("embed", "run", "a", "--out", "v.bin", says="unknown format '.bin'")
    refused("embed", "run", "--file", "rows.jsonl", "--out", "rows.jsonl", "--force", says="the output is the input")
    refused("embed", "run", "a", "--out", "cat.txt/v.npy", says="--out")
    refused("embed", "run", says="no text was given")
    refused("embed", "run", "a", "--last-layers", "2", says="got 2, expected 1 to 1")
    refused("embed", "run", "", says="the text has no tokens")
    refused("search", "run", "the cat", "--file", "none.txt", says="none.txt")


def test_force_replaces_a_file(unmask: Command, run: Path, place: Path) -> None:
    (place / "v.npy").write_bytes(b"old")
    assert unmask("embed", "run", "the cat", "--out", "v.npy", "--force")[0] == 0
    assert np.lib.format.open_memmap(place / "v.npy", mode="r").shape == (1, 16)


def test_vectors_of_something_else_are_refused(
    unmask: Command, refused: Refused, run: Path, lines: Path, place: Path
) -> None:
    unmask("embed", "run", "--file", "lines.txt", "--out", "mean.npy")
    (place / "less.txt").write_text("the cat\n")
    np.save(place / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (place / "short.npy").write_bytes((place / "mean.npy").read_bytes()[:150])
    header = (place / "mean.npy").read_bytes()
    (place / "header.npy").write_bytes(header.replace(b"'fortran_order':", b"'fortran_order' "))
    (place / "type.npy").write_bytes(header.replace(b"<f4", b"<,4"))
    search = ("search", "run", "cat", "--vectors")
    refused(*search, "mean.npy", "--file", "less.txt", says="got 4 × 16 in float32, expected 1 texts × 16")
    refused(*search, "mean.npy", "--file", "lines.txt", "--pooling", "cls", says="the vector of text 1 is another one")
    refused(*search, "objects.npy", "--file", "lines.txt", says="not an array of numbers")
    refused(*search, "short.npy", "--file", "lines.txt", says="not an array of numbers")
    refused(*search, "header.npy", "--file", "lines.txt", says="not an array of numbers")
    refused(*search, "type.npy", "--file", "lines.txt", says="not an array of numbers")
    refused(*search, "none.npy", "--file", "lines.txt", says="can't read: No such file")


def test_too_many_texts_are_refused(refused: Refused, run: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.cli.embed.MAX_TEXTS", 3)
    refused("embed", "run", "--file", "lines.txt", says="more than 3 texts")
    monkeypatch.setattr("unmask.cli.embed.MAX_CHARACTERS", 20)
    refused("search", "run", "cat", "--file", "lines.txt", says="or 20 characters")
