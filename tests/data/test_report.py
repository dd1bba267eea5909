"""What a text is like: counts that add up, copies, characters, warnings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.data.report import Letters, Report, look
from unmask.data.settings import DataConfig, HeldOutConfig
from unmask.data.sources import MemorySource, open_source
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer

CHARACTERS = DataConfig(tokenizer=CharacterConfig())


def quiet(what: str, share: float) -> None:
    assert 0 <= share <= 1


def report_on(texts: list[str], settings: DataConfig = CHARACTERS, lengths: tuple[int, ...] = (32,)) -> Report:
    return look(MemorySource(texts), settings, lengths, quiet)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs", "So"]), max_size=70), min_size=1, max_size=40))
def test_the_numbers_add_up(texts: list[str]) -> None:
    if not any(text.strip() for text in texts):
        with pytest.raises(TextError):
            report_on(texts)
        return
    found = report_on(texts)
    assert found.documents == len(texts) == sum(one.documents for one in found.lengths.bins)
    assert found.characters == sum(one.characters for one in found.lengths.bins)
    assert all(one.first <= one.last for one in found.lengths.bins)
    assert found.lengths.tenth <= found.lengths.median <= found.lengths.ninetieth <= found.lengths.longest
    assert found.copies.documents == sum(bool(text) for text in found_texts(texts)) - len(
        set(filter(None, found_texts(texts)))
    )
    assert found.bytes == sum(len(text.encode()) for text in found_texts(texts))
    assert found.alphabet.distinct == len(set("".join(found_texts(texts))))
    for example in found.examples:
        text = found_texts(texts)[example.document]
        shown = "".join(piece.text for piece in example.pieces)
        assert text.startswith(shown) and (not example.is_whole or shown == text)


def found_texts(texts: list[str]) -> list[str]:
    """As a source gives them."""
    source = MemorySource(texts)
    return [passage.text for part in source.parts() for passage in source.documents(part)]


def test_copies_and_their_example() -> None:
    found = report_on(["once", "many times", "many times", "twice", "twice", "many times"])
    assert (found.copies.documents, found.copies.most, found.copies.example) == (3, 3, "many times")
    assert found.copies.characters == len("many times") * 2 + len("twice")
    assert any("copies" in warning for warning in found.warnings)
    told = report_on(["once", "again", "again"], replace(CHARACTERS, drop_duplicates=True))
    assert not any("copies" in warning for warning in told.warnings)


def test_what_is_odd_about_a_text_is_said() -> None:
    odd = report_on(["ab\ufffd", "c\x07d"] * 60)
    said = " ".join(odd.warnings)
    assert "U+FFFD" in said and "control characters" in said and "at most 3 characters" in said
    one = report_on(["a single text that goes on for a while " * 30])
    assert "one document" in " ".join(one.warnings) and one.held_out and one.held_out.by == "tail"
    same = report_on(["the same text"] * 200, replace(CHARACTERS, held_out=HeldOutConfig(method="hash")))
    assert same.held_out is None and "nothing can be held out" in " ".join(same.warnings)
    poor = report_on(["a b c"] * 3, DataConfig(tokenizer=WordPieceConfig(vocab_size=500)))
    assert poor.tokenizer is None and poor.examples == () and "no such tokenizer" in " ".join(poor.warnings)


def test_unknown_characters_of_a_given_tokenizer() -> None:
    tokenizer = train_tokenizer(["abc "], CharacterConfig())
    found = look(MemorySource(["abc xyz"] * 30), CHARACTERS, [16, 7], quiet, tokenizer=tokenizer)
    assert found.tokenizer and found.tokenizer.kind == "given" and not found.tokenizer.trained
    assert found.tokenizer.unknown_share == pytest.approx(3 / 7)
    assert [piece.text for piece in found.examples[0].pieces if piece.is_unknown] == ["x", "y", "z"]
    assert any("[UNK]" in warning for warning in found.warnings)
    assert [stage.length for stage in found.stages] == [16, 7]
    assert [stage.windows for stage in found.stages] == [
        30,
        60,
    ]  # 6 tokens of each to train on, and special ones around


def test_words_and_scripts() -> None:
    found = report_on(["我在北京大学学习 ABC。" * 20])
    assert found.words == "characters" and list(found.alphabet.scripts) == ["HAN", "LATIN"]
    assert [one.character for one in found.alphabet.foreign] == ["。"]
    korean = report_on(["나는 학교에 갔다 λ " * 20])
    assert korean.words == "spaces" and [one.name for one in korean.alphabet.foreign] == ["GREEK SMALL LETTER LAMDA"]


def test_letters_of_a_text_and_of_its_parts() -> None:
    text = "aé漢😀\n\tb\x00" * 7
    whole, parts = Letters(), Letters()
    whole.add(text)
    for character in text:
        parts.add(character)
    assert (whole.counts_C == parts.counts_C).all()
    assert whole.utf8_bytes == len(text.encode()) and whole.distinct == len(set(text)) and whole.controls == 7


def test_several_texts_and_their_weights(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n\n" * 20)
    rows = [json.dumps({"text": f"the dog ran after cat {i}"}) for i in range(60)]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows[:30], "{broken", *rows[30:]]))
    settings = replace(CHARACTERS, errors="skip")
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    found = look(open_source([f"{path}:2" for path in paths], settings), settings, [16], quiet)
    assert [(Path(text.name).name, text.documents) for text in found.texts] == [("a.txt", 20), ("b.jsonl", 60)]
    assert [text.weight for text in found.texts] == [0.5, 0.5]
    assert sum(text.characters for text in found.texts) == found.characters
    first, second = found.stages[0].seen.values()
    assert first > 1 > second
    assert found.left_out == 1 and "1 lines" in found.warnings[0]
    plain = look(open_source(paths, settings), settings, [16], quiet)
    assert plain.stages[0].seen == {} and plain.texts[0].weight == 0
