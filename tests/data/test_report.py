"""Statistics of a text: counts that add up, copies, characters, warnings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.data.report import CharacterCounts, Report, inspect_text
from unmask.data.settings import DataConfig, HeldOutConfig
from unmask.data.sources import MemorySource, open_source
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer

CHARACTERS = DataConfig(tokenizer=CharacterConfig())


def quiet(what: str, share: float) -> None:
    assert 0 <= share <= 1


def report_on(texts: list[str], settings: DataConfig = CHARACTERS, lengths: tuple[int, ...] = (32,)) -> Report:
    return inspect_text(MemorySource(texts), settings, lengths, quiet)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs", "So"]), max_size=70), min_size=1, max_size=40))
def test_the_numbers_add_up(texts: list[str]) -> None:
    if not any(text.strip() for text in texts):
        with pytest.raises(TextError):
            report_on(texts)
        return
    report = report_on(texts)
    assert report.documents == len(texts) == sum(one.documents for one in report.lengths.bins)
    assert report.characters == sum(one.characters for one in report.lengths.bins)
    assert all(one.first <= one.last for one in report.lengths.bins)
    assert report.lengths.tenth <= report.lengths.median <= report.lengths.ninetieth <= report.lengths.longest
    assert report.copies.documents == sum(bool(text) for text in found_texts(texts)) - len(
        set(filter(None, found_texts(texts)))
    )
    assert report.bytes == sum(len(text.encode()) for text in found_texts(texts))
    assert report.alphabet.distinct == len(set("".join(found_texts(texts))))
    for example in report.examples:
        text = found_texts(texts)[example.document]
        shown = "".join(token.text for token in example.tokens)
        assert text.startswith(shown) and (not example.is_whole or shown == text)


def found_texts(texts: list[str]) -> list[str]:
    """The texts as a source yields them."""
    source = MemorySource(texts)
    return [passage.text for part in source.parts() for passage in source.documents(part)]


def test_copies_and_their_example() -> None:
    report = report_on(["once", "many times", "many times", "twice", "twice", "many times"])
    assert (report.copies.documents, report.copies.most, report.copies.example) == (3, 3, "many times")
    assert report.copies.characters == len("many times") * 2 + len("twice")
    assert any("copies" in warning for warning in report.warnings)
    without = report_on(["once", "again", "again"], replace(CHARACTERS, drop_duplicates=True))
    assert not any("copies" in warning for warning in without.warnings)


def test_warnings_about_a_text() -> None:
    odd = report_on(["ab\ufffd", "c\x07d"] * 60)
    warnings = " ".join(odd.warnings)
    assert "U+FFFD" in warnings and "control characters" in warnings and "at most 3 characters" in warnings
    one = report_on(["a single text that goes on for a while " * 30])
    assert "single document" in " ".join(one.warnings) and one.held_out and one.held_out.by == "tail"
    same = report_on(["the same text"] * 200, replace(CHARACTERS, held_out=HeldOutConfig(method="hash")))
    assert same.held_out is None and "can't hold out documents" in " ".join(same.warnings)
    poor = report_on(["a b c"] * 3, DataConfig(tokenizer=WordPieceConfig(vocab_size=500)))
    assert poor.tokenizer is None and poor.examples == () and "can't train this tokenizer" in " ".join(poor.warnings)


def test_unknown_characters_of_a_given_tokenizer() -> None:
    tokenizer = train_tokenizer(["abc "], CharacterConfig())
    report = inspect_text(MemorySource(["abc xyz"] * 30), CHARACTERS, [16, 7], quiet, tokenizer=tokenizer)
    assert report.tokenizer and report.tokenizer.kind == "given" and not report.tokenizer.trained
    assert report.tokenizer.unknown_share == pytest.approx(3 / 7)
    assert [token.text for token in report.examples[0].tokens if token.is_unknown] == ["x", "y", "z"]
    assert any("[UNK]" in warning for warning in report.warnings)
    assert [stage.length for stage in report.stages] == [16, 7]
    assert [stage.windows for stage in report.stages] == [
        30,
        60,
    ]  # 6 tokens of each to train on, and special ones around


def test_words_and_scripts() -> None:
    report = report_on(["我在北京大学学习 ABC。" * 20])
    assert report.words == "characters" and list(report.alphabet.scripts) == ["HAN", "LATIN"]
    assert [one.character for one in report.alphabet.foreign] == ["。"]
    korean = report_on(["나는 학교에 갔다 λ " * 20])
    assert korean.words == "spaces" and [one.name for one in korean.alphabet.foreign] == ["GREEK SMALL LETTER LAMDA"]


def test_counts_of_a_text_and_of_its_parts() -> None:
    text = "aé漢😀\n\tb\x00" * 7
    whole, parts = CharacterCounts(), CharacterCounts()
    whole.add(text)
    for character in text:
        parts.add(character)
    assert (whole.counts == parts.counts).all()
    assert whole.utf8_bytes == len(text.encode()) and whole.distinct == len(set(text)) and whole.controls == 7


def test_several_texts_and_their_weights(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n\n" * 20)
    rows = [json.dumps({"text": f"the dog ran after cat {i}"}) for i in range(60)]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows[:30], "{broken", *rows[30:]]))
    settings = replace(CHARACTERS, errors="skip")
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    report = inspect_text(open_source([f"{path}:2" for path in paths], settings), settings, [16], quiet)
    assert [(Path(text.name).name, text.documents) for text in report.texts] == [("a.txt", 20), ("b.jsonl", 60)]
    assert [text.weight for text in report.texts] == [0.5, 0.5]
    assert sum(text.characters for text in report.texts) == report.characters
    first, second = report.stages[0].seen.values()
    assert first > 1 > second
    assert report.left_out == 1 and "1 lines or rows" in report.warnings[0]
    plain = inspect_text(open_source(paths, settings), settings, [16], quiet)
    assert plain.stages[0].seen == {} and plain.texts[0].weight == 0
