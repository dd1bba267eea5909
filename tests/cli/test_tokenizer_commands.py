"""`unmask tokenizer train`, `show` and `compare`: output, files and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture
def bpe(unmask: Command, place: Path) -> Path:
    """A byte-level BPE tokenizer, trained by the command."""
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
        "my-bpe",
    )
    assert code == 0, err
    assert out == "my-bpe: bpe, 270 tokens\n"
    return place / "my-bpe"


def test_train_writes_a_tokenizer_that_show_loads(unmask: Command, bpe: Path) -> None:
    assert sorted(path.name for path in bpe.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for opened in ("my-bpe", "my-bpe/tokenizer.json"):
        code, out, _ = unmask("tokenizer", "show", opened, "The cat sat 학.")
        assert code == 0 and out.startswith("the · ␣") and " · " in out and "⟨" in out
    code, out, _ = unmask("tokenizer", "show", "my-bpe", "--file", "cat.txt", "--characters", "12", "--json")
    shown = json.loads(out)
    assert code == 0 and shown["text"] == "The cat sat "
    assert next(shown["text"][one["first"] : one["last"]] for one in shown["tokens"] if one["starts_word"]) == "The"
    assert {"id", "token", "display", "first", "last", "starts_word", "starts_sentence", "is_special"} == set(
        shown["tokens"][0]
    )


def test_a_mask_is_a_token_in_a_prompt_and_text_in_a_file(unmask: Command, bpe: Path) -> None:
    whole = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    whole["added_tokens"][4]["content"] = "<mask>"
    whole["model"]["vocab"]["<mask>"] = whole["model"]["vocab"].pop("[MASK]")
    (bpe.parent / "other.json").write_text(json.dumps(whole), encoding="utf-8")
    (bpe.parent / "letters.txt").write_text("a [MASK] <mask>", encoding="utf-8")
    for tokenizer, mask in (("my-bpe", "[MASK]"), ("other.json", "<mask>")):
        _, out, err = unmask("tokenizer", "show", tokenizer, "a[MASK].")
        assert out == f"a · {mask} · .\n", err
        _, out, _ = unmask("tokenizer", "show", tokenizer, "--file", "letters.txt", "--json")
        assert not any(one["is_special"] for one in json.loads(out)["tokens"])


def test_compare_prints_a_row_per_tokenizer_and_text(unmask: Command, bpe: Path, run: Path) -> None:
    (bpe.parent / "other.txt").write_text("나는 학교에 갔다. " * 20, encoding="utf-8")
    code, out, err = unmask("tokenizer", "compare", "my-bpe", "run", "--text", "cat.txt", "--text", "other.txt")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5, err
    assert "tokens/word" in lines[0] and "unknown" in lines[0]
    code, out, _ = unmask("tokenizer", "compare", "my-bpe", "run", "--text", "other.txt", "--characters", "9", "--json")
    first, second = json.loads(out)
    assert code == 0 and (first["characters"], first["words"]) == (second["characters"], second["words"]) == (9, 3)
    assert first["unknown_share"] == 0 < second["unknown_share"] and first["tokens_per_word"] > 1


def test_user_errors(refused: Refused, unmask: Command, bpe: Path) -> None:
    place = bpe.parent
    (place / "none.txt").write_text("not a tokenizer")
    (place / "maskless").mkdir()
    whole = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    whole["added_tokens"] = [one for one in whole["added_tokens"] if one["content"] != "[MASK]"]
    whole["model"]["vocab"]["blank"] = whole["model"]["vocab"].pop("[MASK]")
    (place / "maskless" / "tokenizer.json").write_text(json.dumps(whole))
    train = ("tokenizer", "train", "cat.txt", "--kind")
    refused(*train, "bpe", "--out", "my-bpe", says="this path exists")
    refused(
        *train,
        "bpe",
        "--vocab-size",
        "200",
        "--out",
        "new",
        says=("invalid vocab_size: got 200", "--vocab-size", "at least 261"),
    )
    refused(
        *train,
        "bpe",
        "--vocab-size",
        "9000",
        "--out",
        "new",
        says=("is too large: this text gives", "hint: use --vocab-size 2"),
    )
    (place / "word.txt").write_text("word")
    refused("tokenizer", "train", "word.txt", "--out", "new", says=("no tokens can be learned", "--kind characters"))
    refused(*train, "unigram", "--vocab-size", "9000", "--out", "new", says="is too large: this text gives")
    refused(*train, "bytes", "--vocab-size", "300", "--out", "new", says="size of kind `bytes` is fixed")
    refused(*train, "bpe", "--set", "lowercas=true", "--out", "new", says="did you mean `lowercase`?")
    refused(
        *train,
        "bpe",
        "--set",
        "vocab=300",
        "--out",
        "new",
        says=("`[data.tokenizer] vocab` is now `[data.tokenizer] vocab_size`", "--set vocab=300: vocab"),
    )
    refused("tokenizer", "show", "none.txt", "text", says="can't read this tokenizer")
    refused("tokenizer", "show", "absent", "text", says="no such file or folder")
    refused("tokenizer", "show", "maskless", "text", says=("no mask token", "add_special_tokens"))
    refused("tokenizer", "show", "my-bpe", says="either a text or --file")
    refused("tokenizer", "show", "my-bpe", " ", says="the text is empty")
    refused("tokenizer", "compare", "my-bpe", "--text", "absent.txt", says="absent.txt")
