"""Sources: every character is accounted for, and files that are no text are errors with their name."""

from __future__ import annotations

import gzip
import pickle
import re
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.core.types import DocumentChunk
from unmask.data.readers import bytes as byte_reader
from unmask.data.readers import documents as document_reader
from unmask.data.readers.documents import CHUNK_CHARACTERS
from unmask.data.settings import DocumentRule, ErrorsRule
from unmask.data.sources import FileSource, MemorySource

RULES: tuple[DocumentRule, ...] = ("blank-line", "line", "file")


def passages(path: Path, rule: DocumentRule = "blank-line", errors: ErrorsRule = "strict") -> list[DocumentChunk]:
    source = FileSource([path], rule, errors)
    return [passage for part in source.parts() for passage in source.documents(part)]


def documents(chunks: list[DocumentChunk]) -> list[str]:
    texts: list[str] = []
    for passage in chunks:
        if passage.number == 0:
            texts.append("")
        assert passage.document == len(texts) - 1
        texts[-1] += passage.text
    assert [passage.document for passage in chunks if passage.last] == list(range(len(texts)))
    return texts


def written(folder: Path, text: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def test_what_a_document_is(tmp_path: Path) -> None:
    path = written(tmp_path, "\n  \nA title\nIts text.\r\n \n\n\nAnother,\nof two lines\n\n")
    assert documents(passages(path)) == ["A title\nIts text.", "Another,\nof two lines"]
    assert documents(passages(path, "line")) == ["A title", "Its text.", "Another,", "of two lines"]
    assert documents(passages(path, "file")) == ["\n  \nA title\nIts text.\n \n\n\nAnother,\nof two lines\n\n"]


TEXT = st.text(st.sampled_from("ab \n\n\r\t.é́̈가ᄀ\u1161\u11a8い𐀀\u2028\x0b"), max_size=200)


def plainly(text: str, rule: DocumentRule) -> list[str]:
    """A reference implementation of the rules, line by line."""
    texts: list[str] = []
    is_separated = True
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if not line.strip():
            is_separated = True
        elif is_separated or rule == "line":
            texts.append(line)
            is_separated = False
        else:
            texts[-1] += line
    return [text] if rule == "file" else [document.removesuffix("\n") for document in texts]


@settings(max_examples=60, deadline=None)
@given(text=TEXT, rule=st.sampled_from(RULES), limit=st.sampled_from([5, 12, 1000]), chunk=st.integers(1, 40))
def test_characters_add_up_and_chunks_join(
    tmp_path_factory: pytest.TempPathFactory, text: str, rule: DocumentRule, limit: int, chunk: int
) -> None:
    if not text.strip():
        text += "x"
    path = written(tmp_path_factory.mktemp("source"), text)
    if "\n" not in text and "\r" in text[:-1]:  # carriage returns end its lines
        text = text.replace("\r", "\n")
    normal = unicodedata.normalize("NFC", text.replace("\r\n", "\n"))
    with pytest.MonkeyPatch.context() as patch:  # a passage of a million characters takes too long to make by the dozen
        patch.setattr(document_reader, "CHUNK_CHARACTERS", limit)
        patch.setattr(byte_reader, "CHUNK_BYTES", chunk)
        found = passages(path, rule)
    whole = documents(found)
    # A cluster of marks longer than a passage may have to be broken; there NFC isn't the sum of its parts.
    if limit > 5:
        assert sum(passage.characters for passage in found) == len(normal)
        assert "".join("".join(whole).split()) == "".join(normal.split())
        assert all(unicodedata.is_normalized("NFC", passage.text) for passage in found)
    assert all(len(passage.text) <= limit for passage in found)
    if limit == 1000 or (rule == "file" and limit > 5):
        assert whole == plainly(normal, rule)


def test_where_a_long_document_is_split(tmp_path: Path) -> None:
    limit = CHUNK_CHARACTERS
    line = "word " * 19 + "end.\n"
    found = passages(written(tmp_path, line * (limit // len(line) + 2)))
    assert len(found) == 2 and found[0].text.endswith("end.\n") and not found[0].last and found[1].last
    found = passages(written(tmp_path, "word " * (limit // 5 + 100)), "line")
    assert len(found) == 2 and found[0].text.endswith("word ")
    text = "가" * (3 * limit + 7)
    decomposed = unicodedata.normalize("NFD", text)
    found = passages(written(tmp_path, decomposed), "file")
    assert [passage.number for passage in found] == list(range(len(found))) and len(found) >= 4
    assert "".join(passage.text for passage in found) == text
    assert sum(passage.characters for passage in found) == len(text)


def test_folders_and_gzip_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    written(tmp_path / "b", "two", "z.txt.gz")
    written(tmp_path, "\ufeffone", "a.txt")
    written(tmp_path, "left out", "a.log")
    source = FileSource([tmp_path], "file", "strict")
    source.check()
    assert [passage.text for part in source.parts() for passage in source.documents(part)] == ["one", "two"]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    first, again, other = (written(tmp_path, text, name) for text, name in (("a", "1"), ("a", "2"), ("b", "3")))
    prints = [FileSource([path], "line", "strict").fingerprint for path in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]
    assert FileSource([first], "file", "strict").fingerprint != prints[0]
    assert FileSource([first], "line", "replace").fingerprint != prints[0]
    assert MemorySource(["a", "b"]).fingerprint != MemorySource(["ab"]).fingerprint


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x1f\x8b\x08\x00", ".gz"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"text\0text", "byte 4"),
    ],
)
def test_a_file_that_is_no_text_is_an_error_with_its_name(tmp_path: Path, data: bytes, says: str) -> None:
    path = written(tmp_path, data, "bad.txt")
    with pytest.raises(TextError) as caught:
        FileSource([path], "blank-line", "strict").check()
    assert says in str(caught.value) and str(path) in caught.value.location and caught.value.hint
    with pytest.raises(TextError):
        passages(path)


@pytest.mark.parametrize("name", ["late.txt", "late.txt.gz"])
@pytest.mark.parametrize("before", [(1 << 20) - 1, 1 << 20, (1 << 21) + 7])
def test_a_zero_byte_far_into_a_file_is_named(tmp_path: Path, before: int, name: str) -> None:
    # Characters of three bytes: a chunk ends inside one, so what is pending must be counted.
    text = ("\ufeff" + "語" * (before // 3)).encode()
    path = written(tmp_path, text + b"\0 rest" + b"x" * (1 << 20), name)
    with pytest.raises(TextError, match=f"byte {len(text):,} .*is zero") as caught:
        passages(path)
    assert caught.value.location == f"{path}, byte {len(text)} (line 1)"
    assert ("decompressed" in caught.value.message) == name.endswith(".gz")
    assert "".join(passage.text for passage in passages(path, errors="replace")).count("\ufffd rest") == 1


def test_zero_bytes_are_invalid_bytes(tmp_path: Path) -> None:
    path = written(tmp_path, b"one\nt\0wo\nthree\n" + b"more text\n" * 20 + bytes(8))
    with pytest.raises(TextError, match=r"byte 5 is zero[\s\S]*line 2"):
        passages(path, "line")
    assert documents(passages(path, "line", "replace"))[:3] == ["one", "t\ufffdwo", "three"]
    assert documents(passages(path, "line", "skip"))[:2] == ["one", "three"]
    rows = written(tmp_path, b'{"text": "one"}\n{"text": "t\0wo"}\n', "rows.jsonl")
    assert documents(passages(rows, errors="skip")) == ["one"]
    assert documents(passages(rows, errors="replace")) == ["one", "t\ufffdwo"]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_every_line_end(tmp_path: Path, end: str, name: str) -> None:
    path = written(tmp_path, f"one{end}two{end}{end}three{end}", name)
    assert documents(passages(path, "line")) == ["one", "two", "three"]
    assert documents(passages(path)) == ["one\ntwo", "three"]
    rows = written(tmp_path, f"text,n{end}one,1{end}two,2{end}", "rows.csv")
    assert documents(passages(rows)) == ["one", "two"]
    rows = written(tmp_path, f'{{"text": "one"}}{end}{{"text": "two"}}{end}', "rows.jsonl")
    assert documents(passages(rows)) == ["one", "two"]


@pytest.mark.parametrize(
    "text", ["Plain words in English.\n" * 9, "한국어 문장입니다.\n" * 9, "日本語の文章です。\n" * 9]
)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_the_hint_for_other_encodings_works(tmp_path: Path, text: str, encoding: str) -> None:
    path = written(tmp_path, text.encode(encoding), "it's text.txt")
    with pytest.raises(TextError, match=encoding[:6].upper()) as caught:
        passages(path, errors="replace")
    command = caught.value.hint.removeprefix("save it as UTF-8: ")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "it's text-utf8.txt").read_text() == text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("CP949", "한국어는 한반도와 그 부속 도서에서 사용하는 언어이다. 오늘 날씨가 좋다.\n"),
        ("CP932", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"),
        ("GB18030", "北京是中华人民共和国的首都，今天天气很好，我们去公园散步。\n"),
        ("KOI8-R", "Мы знаем: счастливые семьи похожи друг на друга, каждая несчастливая семья.\n"),
    ],
)
@pytest.mark.parametrize("before", [0, 1 << 18])
def test_a_legacy_encoding_is_named(tmp_path: Path, encoding: str, text: str, before: int) -> None:
    path = written(tmp_path, b"plain\n" * (before // 6) + (text * 20).encode(encoding))
    with pytest.raises(TextError, match=f"looks like {encoding}") as caught:
        passages(path)
    assert "CP1252" not in caught.value.hint
    command = caught.value.hint[caught.value.hint.index("iconv") : caught.value.hint.index(", or replace")]
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "text-utf8.txt").read_text().endswith(text * 20)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("La biblioth\u00e8que o\u00f9 j'ai travaill\u00e9 n'ouvre qu'\u00e0 dix heures.\n", "CP1252"),
        ("Der Fluss f\u00fchrt Hochwasser, und die Br\u00fccke ist gesperrt.\n", "CP1252"),
        ("Biblioteka jest zamkni\u0119ta, poniewa\u017c zmieniaj\u0105 dach, a sklep te\u017c.\n", "CP1250"),
    ],
)  # fmt: skip
def test_western_text_is_not_taken_for_central_european(tmp_path: Path, text: str, encoding: str) -> None:
    with pytest.raises(TextError, match=f"looks like {encoding} "):
        passages(written(tmp_path, (text * 20).encode(encoding)))


def test_archives_are_named(tmp_path: Path) -> None:
    inner = written(tmp_path, "some text\n" * 99)
    for mode, name in (("w", "a.txt"), ("w:gz", "a.txt.gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(inner)
        with pytest.raises(TextError, match="tar archive"):
            passages(tmp_path / name, errors="replace")
    with pytest.raises(TextError, match="pickle"):
        passages(written(tmp_path, pickle.dumps(["text"] * 99), "p.txt"))


def test_zstandard_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    path = tmp_path / "long.txt.zst"
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(frame.compress(b"one\n" * 99) + frame.flush())
    assert documents(passages(path, "line")) == ["one"] * 99
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(TextError, match="damaged"):
        passages(path)


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(TextError) as caught:
            FileSource([path], "blank-line", "strict").check()
        assert str(path) in caught.value.location
    with pytest.raises(TextError):
        FileSource([], "blank-line", "strict").check()


@pytest.mark.parametrize("before", [0, 3, (1 << 20) - 1, 1 << 20, (1 << 20) + 5])
def test_invalid_utf8_is_named_by_its_byte(tmp_path: Path, before: int) -> None:
    path = written(tmp_path, b"a" * before + b"\xc3\x28 rest")
    with pytest.raises(TextError, match=f"byte {before:,} ") as caught:
        passages(path)
    assert caught.value.location == f"{path}, byte {before} (line 1)" and "--errors replace" in caught.value.hint
    assert "".join(passage.text for passage in passages(path, errors="replace")) == "a" * before + "\ufffd( rest"


def test_lines_that_are_not_utf_8_are_skipped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, b"one\ntw\xe9o\nthree\rstill\n\nfour\n\xff")
    source = FileSource([path], "blank-line", "skip")
    (part,) = source.parts()
    assert documents(list(source.documents(part))) == ["one\nthree\rstill", "four"]
    assert source.left_out == {part: 2}
    path.write_bytes(b"\xff\n\xff\n")
    with pytest.raises(TextError, match="2 lines or rows were skipped"):
        passages(path, errors="skip")


def test_a_line_too_long_to_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_reader, "LONGEST_SKIPPED", 100)
    monkeypatch.setattr(byte_reader, "CHUNK_BYTES", 16)
    good = "x" * 99 + "é" * 300
    path = written(tmp_path, good + "\nshort\n")
    assert documents(passages(path, "line", "skip")) == [good, "short"]
    for bad in (b"x" * 150 + b"\xff" + b"x" * 90, b"x" * 200 + b"\xff\n"):
        with pytest.raises(TextError, match="can't skip a line"):
            passages(written(tmp_path, bad), "line", "skip")


def test_unicode_forms(tmp_path: Path) -> None:
    path = written(tmp_path, "ﬁne e\u0301\n")
    for form, text in (("NFC", "ﬁne é"), ("NFKC", "fine é"), ("none", "ﬁne e\u0301")):
        source = FileSource([path], "line", "strict", unicode=form)
        assert [passage.text for part in source.parts() for passage in source.documents(part)] == [text]
    assert MemorySource(["ﬁ"], "NFKC").fingerprint != MemorySource(["ﬁ"]).fingerprint


def test_a_character_cut_short_at_the_end_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffabé".encode()[:-1])
    with pytest.raises(TextError, match="byte 5 "):
        passages(path)


def test_a_damaged_gz_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress(b"some text that is long enough" * 1000)[:-20])
    with pytest.raises(TextError, match="damaged or truncated"):
        passages(path)


def test_texts_in_memory() -> None:
    source = MemorySource(["e\u0301\r\nx", "", "a" * (CHUNK_CHARACTERS + 1)])
    chunks = [passage for part in source.parts() for passage in source.documents(part)]
    assert [(passage.document, passage.number, passage.characters) for passage in chunks] == [
        (0, 0, 3),
        (1, 0, 0),
        (2, 0, CHUNK_CHARACTERS),
        (2, 1, 1),
    ]
    assert chunks[0].text == "é\nx"
    with pytest.raises(TextError, match="surrogate"):
        MemorySource(["fine", "\ud800"]).check()
    with pytest.raises(TextError, match="white space"):
        MemorySource([" ", "\n"]).check()
