"""Statistics of a text: counts that add up, copies, characters, warnings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.data.advice import TextFacts, adapt, advise, text_facts
from unmask.data.prepare import prepare
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


def facts(text: str, name: str, folder: Path) -> TextFacts:
    (folder / name).write_text(text, encoding="utf-8")
    return text_facts(open_source([folder / name], DataConfig()))


@pytest.mark.parametrize(
    ("name", "text", "kind", "document"),
    [
        ("news.txt", "The cat sat on the mat, and the dog saw it.\n" * 50, "wordpiece", "auto"),
        ("code.py", "def one():\n    return 1\n\n\n" * 50, "bpe", "file"),
        ("code.txt", "for (;;) {\n    if (a) {\n        b();\n    }\n}\n\n" * 50, "bpe", "file"),
        ("chr1.txt", "ACGTTGCAACGTNACGTTGCAACGGTTTACGTACGATTAGC\n" * 90, "characters", "auto"),
        ("smiles.txt", "CC(=O)Oc1ccccc1C(=O)O\nCN1C=NC2=C1C(=O)N(C(=O)N2C)C\n" * 50, "characters", "auto"),
        ("ko.txt", "그는 서울에서 태어나 대학교를 졸업하였다.\n" * 50, "unigram", "auto"),
        ("th.txt", "ประเทศไทยเป็นรัฐชาติอันตั้งอยู่ในภูมิภาคเอเชีย\n" * 50, "unigram", "auto"),
        ("ja.txt", "これはとてもおもしろいほんです。\n" * 50, "unigram", "auto"),
        ("zh.txt", "今天天氣很好，我們去公園。\n" * 50, "wordpiece", "auto"),
    ],
)
def test_settings_follow_from_the_text(name: str, text: str, kind: str, document: str, tmp_path: Path) -> None:
    found = facts(text, name, tmp_path)
    settings, choices = advise(found, DataConfig(), ())
    assert (settings.tokenizer.kind, settings.document) == (kind, document)
    assert len(choices) == (kind != "wordpiece") + (document == "file")
    assert all(", because " in str(choice) and "(overrule: --set data." in str(choice) for choice in choices)
    explicit = ("data.tokenizer.kind", "data.document")
    assert advise(found, replace(DataConfig(), document="line"), explicit)[1] == [], "what was set is kept"
    assert text_facts(open_source([tmp_path / name], DataConfig())) == found


def test_the_tokenizer_for_code_restores_every_space_and_line_end(tmp_path: Path) -> None:
    code = 'class A:\n\tdef f(self):\n\t\tif x:\n            return "a  b"   \n\n\n    # end\n'
    for number in range(40):
        (tmp_path / f"{number}.py").write_text(code + f"x{number} = {number}\n")
    source, settings, _ = adapt(open_source([str(tmp_path / "*.py")], DataConfig()), DataConfig(), ())
    corpus = prepare(source, settings, tmp_path / "cache", shrinks=True)
    assert corpus.facts["documents"] == 40, "a file is a document"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(code).ids) == code


def test_a_row_of_code_stays_a_document(tmp_path: Path) -> None:
    row = '{"text": "def f(a):\\n    return [\\n        a,\\n    ]\\n"}\n'
    (tmp_path / "code.jsonl").write_text(row * 30)
    source = open_source([tmp_path / "code.jsonl"], DataConfig())
    same, settings, choices = adapt(source, DataConfig(), ())
    assert same is source and settings.document == "auto" and settings.tokenizer.kind == "bpe" and len(choices) == 1
