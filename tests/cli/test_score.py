"""`unmask score`, and minimal pairs in `unmask evaluate`."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from unmask.cli import evaluation
from unmask.evaluation import validation

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
TEXT = "The cat sat on the log."


@pytest.mark.parametrize("limit", ["MAX_SCORED_CHARACTERS", "MAX_SCORED_TEXTS"])
def test_a_file_with_too_much_text_is_refused(
    refused: Refused, run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """A small file may contain very much text; what was read until the limit is all that memory is needed for."""
    rows = json.dumps({"text": TEXT}) + "\n"
    for name, text in (("lines.txt.gz", f"{TEXT}\n"), ("rows.jsonl.gz", rows)):
        (place / name).write_bytes(gzip.compress(text.encode() * 1_000))
        monkeypatch.setattr(evaluation, limit, 500)
        refused("score", "run", "--file", name, says=("more than", " 500 ", name, "split the file"))


def test_a_text_to_evaluate_is_bounded_unless_a_size_is_given(
    refused: Refused, unmask: Command, run: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "much.txt.gz").write_bytes(gzip.compress(f"{TEXT}\n\n".encode() * 1_000))
    monkeypatch.setattr(validation, "MAX_CHARACTERS", 10_000)
    says = ("the text has more than 10,000 characters", "much.txt.gz", "--max-size")
    refused("evaluate", "run", "--text", "much.txt.gz", says=says)
    refused("evaluate", "run", "--text", "much.txt.gz", "--details", says=says)
    code, out, _ = unmask("evaluate", "run", "--text", "much.txt.gz", "--max-size", "12k characters", "--json")
    assert code == 0 and json.loads(out)


@pytest.fixture
def pairs(place: Path) -> Path:
    rows = [
        ("The cat sat on the mat.", "The cat the on sat mat.", "order", "syntax"),
        ("The dog sat on the log.", "dog The on sat log the.", "order", "syntax"),
        ("The cat sat.", "The mat sat.", "animacy", "semantics"),
    ]
    folder = place / "pairs"
    folder.mkdir()
    for good, bad, paradigm, field in rows:
        row = {"sentence_good": good, "sentence_bad": bad, "UID": paradigm, "field": field}
        with (folder / f"{paradigm}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return folder


# score ----------------------------------------------------------------------------------------------------------------


def test_words_and_texts_are_printed_and_equal_the_json(unmask: Command, run: Path) -> None:
    code, out, _ = unmask("score", "run", TEXT, "The dog.", "--json")
    assert code == 0
    tree = json.loads(out)
    assert tree["method"] == "within-word" and len(tree["texts"]) == 2
    first = tree["texts"][0]
    assert [word["word"] for word in first["words"]] == ["The", "cat", "sat", "on", "the", "log", "."]
    assert tree["total"]["surprisal"] == pytest.approx(sum(text["surprisal"] for text in tree["texts"]))
    code, out, _ = unmask("score", "run", TEXT)
    lines = out.splitlines()
    assert code == 0 and lines[0] == TEXT
    assert [line.split() for line in lines[1:8]] == [
        [word["word"], f"{word['surprisal']:.2f}"] for word in first["words"]
    ]
    assert f"{first['bits_per_character']:.4f} bits per character" in lines[8]


def test_the_units_of_the_output(unmask: Command, run: Path) -> None:
    tokens = unmask("score", "run", "log.", "--by", "token")[1].splitlines()
    assert [line.split()[0] for line in tokens[1:5]] == ["l", "o", "g", "."]
    out = unmask("score", "run", TEXT, "The dog.", "--by", "text")[1].splitlines()
    assert [line.split("  ")[-1] for line in out[:2]] == [TEXT, "The dog."]
    assert out[2].startswith("2 texts:") and "pseudo-perplexity" in out[2]


def test_a_file_has_one_text_per_line_or_per_document(unmask: Command, run: Path, place: Path) -> None:
    (place / "lines.txt").write_text(f"{TEXT}\n\nThe dog sat.\nThe cat.\n")
    counts = {}
    for rule in ("line", "blank-line", "file"):
        code, out, _ = unmask("score", "run", "--file", "lines.txt", "--document", rule, "--json")
        assert code == 0
        counts[rule] = [text["text"] for text in json.loads(out)["texts"]]
    assert counts["line"] == [TEXT, "The dog sat.", "The cat."]
    assert len(counts["blank-line"]) == 2 and len(counts["file"]) == 1
    out = unmask("score", "run", "--file", "lines.txt")[1]
    assert out.splitlines()[0].endswith(TEXT)


def test_methods_and_words_can_be_chosen(unmask: Command, run: Path) -> None:
    def bits(*options: str) -> float:
        return json.loads(unmask("score", "run", TEXT, "--json", *options)[1])["total"]["surprisal"]

    assert bits() == bits("--method", "within-word") != bits("--method", "original")
    # The units of a character tokenizer are characters, so a word of them is one token.
    assert bits("--words", "tokenizer") == pytest.approx(bits("--method", "original"), abs=1e-3)
    assert bits("--words", "characters") == pytest.approx(bits("--method", "original"), abs=1e-3)


def test_what_score_refuses(refused: Refused, run: Path, place: Path) -> None:
    (place / "blank.txt").write_text("\n \n")
    (place / "bytes.txt").write_bytes(b"caf\xe9\n")
    refused("score", "run", says="no text was given")
    refused("score", "run", " ", says="the text is blank")
    refused("score", "run", TEXT, "漢字", says=("text 2", "[UNK]"))
    refused("score", "run", "\udcff", says="not UTF-8")
    refused("score", "run", "--file", "missing.txt", says="missing.txt")
    refused("score", "run", "--file", "blank.txt", says="blank.txt")
    refused("score", "run", "--file", "bytes.txt", says="not UTF-8")
    refused("score", "nowhere", TEXT, says="doesn't exist")


def test_a_line_that_can_not_be_scored_is_refused_or_left_out(
    unmask: Command, refused: Refused, run: Path, place: Path
) -> None:
    (place / "lines.txt").write_bytes(f"{TEXT}\n\n漢字\n".encode() + b"caf\xe9\nThe dog sat.\n")
    (place / "letters.txt").write_text(f"{TEXT}\n\n漢字\n", encoding="utf-8")
    rows = [{"text": TEXT}, {"text": "漢字"}, {"text": "The dog."}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused("score", "run", "--file", "letters.txt", says=("[UNK]", "line 3: '漢字'", "--errors skip"))
    code, out, err = unmask("score", "run", "--file", "lines.txt", "--errors", "skip", "--json")
    tree = json.loads(out)
    assert code == 0 and "left out 2 of 4 texts, which can't be scored: line 3, line 4" in " ".join(err.split())
    assert [(text["line"], text["text"]) for text in tree["texts"]] == [(1, TEXT), (5, "The dog sat.")]
    assert [each["line"] for each in tree["left_out"]] == [3, 4] and tree["total"]["texts"] == 2
    assert "[UNK]" in tree["left_out"][0]["problem"] and "UTF-8" in tree["left_out"][1]["problem"]
    code, out, err = unmask("score", "run", "漢字", "--file", "rows.jsonl", "--errors", "skip")
    assert code == 0 and "left out 2 of 4 texts" in err and "text 1, document 2" in " ".join(err.split())
    assert out.splitlines()[-1].startswith("2 texts:")
    refused("score", "run", "漢字", "--errors", "skip", says="no text is left: 1 of 1")


def test_a_model_without_a_mask_token_is_refused(refused: Refused, run: Path, place: Path, pairs: Path) -> None:
    path = Path(shutil.copytree(run / "best", place / "model")) / "tokenizer.json"
    path.write_text(path.read_text().replace('"[MASK]"', '"[GAP]"'))
    (place / "model" / "digests.json").unlink()
    refused("score", "model", TEXT, says="no mask token")
    refused("evaluate", "model", "--pairs", "pairs", says="no mask token")


# Minimal pairs --------------------------------------------------------------------------------------------------------


def test_minimal_pairs_are_judged_by_both_methods(unmask: Command, run: Path, pairs: Path) -> None:
    code, out, _ = unmask("evaluate", "run", "--pairs", "pairs", "--json")
    assert code == 0
    tree = json.loads(out)
    assert set(tree) == {"pairs"} and tree["pairs"]["pairs"] == 3
    assert set(tree["pairs"]["methods"]) == {"original", "within-word"}
    for method in tree["pairs"]["methods"].values():
        paradigms = method["paradigms"]
        expected = (paradigms["order"]["accuracy"] + paradigms["animacy"]["accuracy"]) / 2
        assert method["overall"]["accuracy"] == pytest.approx(expected)
        assert method["fields"]["syntax"] == paradigms["order"]
    code, out, _ = unmask("evaluate", "run", "--pairs", "pairs")
    overall = next(line for line in out.splitlines() if line.startswith("overall  "))
    assert f"{tree['pairs']['methods']['original']['overall']['accuracy']:.1%}" in overall
    assert "3 of 2 paradigms" in out


def test_text_and_pairs_together_and_one_method(unmask: Command, run: Path, pairs: Path) -> None:
    options = ("--text", "cat.txt", "--document", "file", "--pairs", "pairs", "--method", "original", "--subset", "1")
    tree = json.loads(unmask("evaluate", "run", *options, "--json")[1])
    assert tree["loss"] > 0 and tree["pairs"]["pairs"] == 2
    assert set(tree["pairs"]["methods"]) == {"original"}
    out = unmask("evaluate", "run", *options)[1]
    assert "unigram loss" in out and "overall" in out and "within-word" not in out


def test_names_of_paradigms_are_no_markup(
    unmask: Command, run: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = json.loads((pairs / "order.jsonl").read_text().splitlines()[0])
    (pairs / "order.jsonl").write_text(json.dumps({**row, "UID": "[/b] \x1b[5m", "field": "[red]"}) + "\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = unmask("evaluate", "run", "--pairs", "pairs")
    assert code == 0 and "[/b] ␛[5m" in out and "[red]" in out, err


def test_predictions_are_written_for_each_pair(unmask: Command, run: Path, pairs: Path, place: Path) -> None:
    assert unmask("evaluate", "run", "--pairs", "pairs", "--predictions", "out/predictions.json")[0] == 0
    written = json.loads((place / "out" / "predictions.json").read_text())
    assert list(written) == ["animacy", "order"]
    for name, paradigm in written.items():
        lines = [json.loads(line) for line in (pairs / f"{name}.jsonl").read_text().splitlines()]
        for entry, line in zip(paradigm["predictions"], lines, strict=True):
            good, bad = entry["log_probability_good"], entry["log_probability_bad"]
            preferred = line["sentence_good"] if good > bad else line["sentence_bad"]
            assert entry["pred"] == (preferred if abs(good - bad) > 1e-4 else "")


def test_what_evaluate_refuses(refused: Refused, run: Path, pairs: Path, place: Path) -> None:
    with (pairs / "order.jsonl").open("a") as file:
        file.write('{"sentence_good": "A.", "sentence_bad": "A."}\n')
    refused("evaluate", "run", says=("nothing to evaluate on", "--pairs"))
    refused("evaluate", "run", "--pairs", "pairs", says=("order.jsonl, line 3", "identical", "--errors skip"))
    refused("evaluate", "run", "--pairs", "missing", says="doesn't exist")
    refused("evaluate", "run", "--pairs", "pairs", "--errors", "replace", says="no bytes to replace")
    refused(
        "evaluate", "run", "--pairs", "pairs", "--errors", "skip", "--subset", "0", says=("--subset 0", "at least 1")
    )
    refused("evaluate", "run", "--text", "cat.txt", "--predictions", "p.json", says="add --pairs")
    refused("evaluate", "run", "--text", "cat.txt", "--subset", "3", says=("--subset 3", "add --pairs"))
    refused("evaluate", "run", "--text", "cat.txt", "--method", "original", says=("--method original", "add --pairs"))
    for option, value in (("--length", "16"), ("--document", "line"), ("--field", "x"), ("--max-size", "9 characters")):
        refused("evaluate", "run", "--pairs", "pairs", option, value, says=(f"{option} {value}", "add --text FILE"))
    for amount in ("3 tokens", "0 characters", "many"):
        refused("evaluate", "run", "--text", "cat.txt", "--max-size", amount, says=f"--max-size {amount}")
    refused("evaluate", "run", "--pairs", "pairs", "--errors", "skip", "--predictions", "run", says="is a directory")
    for file in ("pairs/order.jsonl", "pairs/animacy.jsonl"):
        refused("evaluate", "run", "--pairs", "pairs", "--predictions", file, says="the output is the input")
    os.mkfifo("pipe")
    refused("evaluate", "run", "--pairs", "pairs", "--errors", "skip", "--predictions", "pipe", says="or a device")


def test_malformed_pairs_are_left_out_and_counted(unmask: Command, run: Path, pairs: Path) -> None:
    with (pairs / "order.jsonl").open("a") as file:
        file.write('{"sentence_good": "A."}\n')
    code, out, _ = unmask("evaluate", "run", "--pairs", "pairs", "--errors", "skip", "--json")
    assert code == 0 and json.loads(out)["pairs"]["left_out"] == 1
    assert "left out            1 line" in unmask("evaluate", "run", "--pairs", "pairs", "--errors", "skip")[1]
