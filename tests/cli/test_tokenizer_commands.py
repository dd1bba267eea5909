"""unmask tokenizer train, show, compare: what they write and print, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture
def pieces(unmask: Command, place: Path) -> Path:
    """A tokenizer made by the verb."""
    code, out, err = unmask(
        "tokenizer",
        "train",
        "cat.txt",
        "--kind",
        "bpe",
        "--vocab-size",
        "270",
        "--set",
        "lowercase=true",
        "--out",
        "pieces",
    )
    assert code == 0, err
    assert out == "pieces: bpe, 270 pieces\n"
    return place / "pieces"


def test_train_writes_what_the_others_open(unmask: Command, pieces: Path) -> None:
    assert sorted(path.name for path in pieces.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for opened in ("pieces", "pieces/tokenizer.json"):
        code, out, _ = unmask("tokenizer", "show", opened, "The cat sat 학.")
        assert code == 0 and out.startswith("the · ␣") and " · " in out and "⟨" in out
    code, out, _ = unmask("tokenizer", "show", "pieces", "--file", "cat.txt", "--characters", "12", "--json")
    told = json.loads(out)
    assert code == 0 and told["text"] == "The cat sat "
    assert next(told["text"][one["first"] : one["last"]] for one in told["tokens"] if one["starts_word"]) == "The"
    assert {"id", "piece", "shown", "first", "last", "starts_word", "starts_sentence", "is_special"} == set(
        told["tokens"][0]
    )


def test_a_mask_is_one_in_a_prompt_and_letters_in_a_file(unmask: Command, pieces: Path) -> None:
    whole = json.loads((pieces / "tokenizer.json").read_text(encoding="utf-8"))
    whole["added_tokens"][4]["content"] = "<mask>"
    whole["model"]["vocab"]["<mask>"] = whole["model"]["vocab"].pop("[MASK]")
    (pieces.parent / "theirs.json").write_text(json.dumps(whole), encoding="utf-8")
    (pieces.parent / "letters.txt").write_text("a [MASK] <mask>", encoding="utf-8")
    for tokenizer, mask in (("pieces", "[MASK]"), ("theirs.json", "<mask>")):
        _, out, err = unmask("tokenizer", "show", tokenizer, "a[MASK].")
        assert out == f"a · {mask} · .\n", err
        _, out, _ = unmask("tokenizer", "show", tokenizer, "--file", "letters.txt", "--json")
        assert not any(one["is_special"] for one in json.loads(out)["tokens"])


def test_compare_gives_a_row_for_each(unmask: Command, pieces: Path, run: Path) -> None:
    (pieces.parent / "other.txt").write_text("나는 학교에 갔다. " * 20, encoding="utf-8")
    code, out, err = unmask("tokenizer", "compare", "pieces", "run", "--text", "cat.txt", "--text", "other.txt")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5, err
    assert "tokens/word" in lines[0] and "unknown" in lines[0]
    code, out, _ = unmask("tokenizer", "compare", "pieces", "run", "--text", "other.txt", "--characters", "9", "--json")
    first, second = json.loads(out)
    assert code == 0 and (first["characters"], first["words"]) == (second["characters"], second["words"]) == (9, 3)
    assert first["unknown_share"] == 0 < second["unknown_share"] and first["tokens_per_word"] > 1


def test_what_is_refused(refused: Refused, unmask: Command, pieces: Path) -> None:
    place = pieces.parent
    (place / "none.txt").write_text("not a tokenizer")
    (place / "maskless").mkdir()
    whole = json.loads((pieces / "tokenizer.json").read_text(encoding="utf-8"))
    whole["added_tokens"] = [one for one in whole["added_tokens"] if one["content"] != "[MASK]"]
    whole["model"]["vocab"]["blank"] = whole["model"]["vocab"].pop("[MASK]")
    (place / "maskless" / "tokenizer.json").write_text(json.dumps(whole))
    train = ("tokenizer", "train", "cat.txt", "--kind")
    refused(*train, "bpe", "--out", "pieces", says="exists already")
    refused(
        *train,
        "bpe",
        "--vocab-size",
        "200",
        "--out",
        "new",
        says=("`vocab_size` is 200", "--vocab-size", "261 or more"),
    )
    refused(
        *train,
        "bpe",
        "--vocab-size",
        "9000",
        "--out",
        "new",
        says=("more than this text can give", "next: --vocab-size 2"),
    )
    (place / "word.txt").write_text("word")
    refused("tokenizer", "train", "word.txt", "--out", "new", says=("no pieces", "--kind characters"))
    refused(*train, "unigram", "--vocab-size", "9000", "--out", "new", says="more than this text can give")
    refused(*train, "bytes", "--vocab-size", "300", "--out", "new", says="no size to choose")
    refused(*train, "bpe", "--set", "lowercas=true", "--out", "new", says="did you mean `lowercase`?")
    refused("tokenizer", "show", "none.txt", "text", says="can't be read")
    refused("tokenizer", "show", "absent", "text", says="nothing at this path")
    refused("tokenizer", "show", "maskless", "text", says=("no piece for a mask", "add_special_tokens"))
    refused("tokenizer", "show", "pieces", says="give a text or a file")
    refused("tokenizer", "show", "pieces", " ", says="no text")
    refused("tokenizer", "compare", "pieces", "--text", "absent.txt", says="absent.txt")
