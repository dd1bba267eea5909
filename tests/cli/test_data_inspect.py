"""`unmask data inspect`, and named validation texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def lines(place: Path) -> None:
    (place / "lines.txt").write_text("\n".join(f"line {i % 90} of a text about cats" for i in range(120)))


def test_a_report_in_plain_lines(unmask: Command, place: Path) -> None:
    lines(place)
    code, out, err = unmask("data", "inspect", "lines.txt", "--recipe", "small.toml", "--set", "data.document=line")
    assert code == 0, err
    assert "\x1b" not in out and "█" not in out
    content = " ".join(out.split())
    for words in (
        "documents 120",
        "duplicates 30 documents (25.0%)",
        "characters, 29 tokens",
        "sequences of",
        "held out",
    ):
        assert words in content, out
    assert "l·i·n·e·␣ 1·4·␣ o·f" in out, "word boundaries are visible"
    assert "warning: 25% of the documents are copies" in out
    assert {path.name for path in place.iterdir()} == {"small.toml", "cat.txt", "lines.txt"}, "nothing is written"


def test_a_report_as_json(unmask: Command, place: Path) -> None:
    lines(place)
    arguments = ("data", "inspect", "lines.txt", "--recipe=small.toml", "--set=data.document=line", "--json")
    code, out, err = unmask(*arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["documents"] == 120 and found["copies"]["documents"] == 30 and found["words"] == "spaces"
    assert len(found["examples"]) == 5 and found["stages"][0]["length"] == 32
    assert found["tokenizer"]["trained"] and found["tokenizer"]["kind"] == "characters"
    again = json.loads(unmask(*arguments)[1])
    assert again == found
    other = json.loads(unmask(*arguments, "--seed", "4")[1])
    assert [one["document"] for one in other["examples"]] != [one["document"] for one in found["examples"]]


def test_a_report_with_the_tokenizer_of_a_model(unmask: Command, run: Path, place: Path) -> None:
    (place / "other.txt").write_text("The Cat is an Ostrich.\n\n" * 40)
    code, out, _ = unmask("data", "inspect", "other.txt", "--tokenizer", str(run / "latest"), "--json")
    found = json.loads(out)["tokenizer"]
    assert code == 0 and not found["trained"] and found["unknown_share"] > 0
    assert any(token["is_unknown"] for one in json.loads(out)["examples"] for token in one["tokens"])


def test_a_table_with_broken_rows_is_read_as_in_training(unmask: Command, refused: Refused, place: Path) -> None:
    rows = [json.dumps({"body": f"row {number} of a text about cats"}) for number in range(40)]
    (place / "rows.jsonl").write_text("\n".join([*rows, "{broken"]))
    refused("data", "inspect", "rows.jsonl", says=("`body`", "--field"))
    refused("data", "inspect", "rows.jsonl", "--field", "body", says=("rows.jsonl, line 41", "--errors skip"))
    code, out, err = unmask("data", "inspect", "rows.jsonl", "--field", "body", "--errors", "skip", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["documents"], report["left_out"]) == (40, 1)
    assert any("tokens instead of 8,192, because this text gives no more" in told for told in report["choices"])
    explicit = ("--set", "data.tokenizer.vocab_size=8192", "--field", "body", "--errors", "skip", "--json")
    report = json.loads(unmask("data", "inspect", "rows.jsonl", *explicit)[1])
    hint = "is too large: this text gives"  # an explicit size is kept: the one that would fit is named
    assert not report["choices"]
    assert any(hint in told and "--set data.tokenizer.vocab_size=" in told for told in report["warnings"])


def test_user_errors(refused: Refused, place: Path) -> None:
    refused("data", "inspect", "nowhere.txt", says="nowhere.txt")
    refused("data", "inspect", "cat.txt", "--recipe", "tinny", says="did you mean `tiny`?")
    refused("data", "inspect", "cat.txt", "--tokenizer", "nowhere", says="no such file or folder")


def test_a_named_validation_text(unmask: Command, refused: Refused, place: Path) -> None:
    (place / "dogs.txt").write_text("The dog sat on the cat. " * 30)
    start = ("pretrain", "cat.txt", "--recipe", "small.toml")
    refused(*start, "--valid", "dogs.txt", says="validation text without a name")
    refused(*start, "--valid", "dogs=nowhere.txt", says=("data.valid.dogs", "nowhere.txt"))
    refused(*start, "--valid", "d s=dogs.txt", says=("invalid name of a validation text", "--valid"))
    refused(*start, "--valid", "a=dogs.txt", "--valid", "a=cat.txt", says="duplicate name `a`")
    code, out, err = unmask(*start, "--out", "run", "--valid", "dogs=dogs.txt")
    assert code == 0, err
    assert "validation set dogs: 720 characters" in out
    assert out.count("dogs  loss ") == 2 and "loss on dogs (unigram" in out
    refused("pretrain", "--resume", "run", "--valid", "cats=cat.txt", says="the run has no validation text `cats`")
    refused("pretrain", "--resume", "run", "--valid", "dogs=cat.txt", says="the content of `cat.txt` differs")
    code, out, err = unmask("pretrain", "--resume", "run", "--budget", "+1 steps", "--json")
    assert code == 0, err
    assert json.loads(out)["summary"]["validation"]["sets"]["dogs"]["masked_tokens"] > 0
    (place / "dogs.txt").write_text("The dog sat on the log. " * 30)
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says="`dogs` has changed since the run was started")


def test_evaluating_a_limited_amount_of_text(unmask: Command, run: Path, place: Path) -> None:
    counts = []
    for more in ((), ("--max-size", "1k characters")):
        code, out, err = unmask("evaluate", str(run), "--text", "cat.txt", "--json", *more)
        assert code == 0, err
        counts.append(json.loads(out)["masked_tokens"])
    assert counts[1] == 150 < counts[0]
