"""Parts: read one by one, in any process, they give what one pass gives."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unmask.core.types import DocumentChunk, SourceShard
from unmask.data import sources
from unmask.data.readers import documents
from unmask.data.readers.bytes import read_chunks
from unmask.data.readers.documents import CHUNK_CHARACTERS
from unmask.data.settings import DataConfig, DocumentRule, ErrorsRule
from unmask.data.sources import FileSource, SourceRecipe

Documents = list[tuple[str, int]]


def joined(passages: list[DocumentChunk]) -> Documents:
    """The text of each document, and the characters that it covers."""
    texts: Documents = []
    for passage in passages:
        text, characters = texts.pop() if passage.number else ("", 0)
        texts.append((text + passage.text, characters + passage.characters))
    return texts


def whole(source: FileSource, path: Path) -> Documents:
    return joined(list(source.documents(SourceShard(str(path), 0, path.stat().st_size))))


def by_parts(source: FileSource) -> Documents:
    return [one for part in source.parts() for one in joined(list(source.documents(part)))]


LINES = st.lists(
    st.sampled_from(
        [b"\n", b" \r\n", b"\xe2\x80\x83\n", b"a\n", b"bc\r\n", b"\xff\n", b"  d e\n", b"long " * 9 + b"\n", b"\r"]
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(
    lines=LINES,
    rule=st.sampled_from(["blank-line", "line", "file"]),
    errors=st.sampled_from(["replace", "skip"]),
    size=st.integers(1, 30),
)
@example(lines=[b"\n"] * 20 + [b"a\n"], rule="line", errors="skip", size=3)
@example(lines=[b"a\n", b"\n", b"\xff\n", b"\n", b"b\n"], rule="blank-line", errors="skip", size=1)
def test_parts_of_plain_text(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], rule: DocumentRule, errors: ErrorsRule, size: int
) -> None:
    path = tmp_path_factory.mktemp("parts") / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" * (size % 2) + b"".join(lines) + b"end")
    source = FileSource([path], rule, errors)
    expected = whole(source, path)
    left_out = sum(source.left_out.values())
    source = FileSource([path], rule, errors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PART_BYTES", size)
        patch.setattr(documents, "_LINE_BYTES", 20)
        parts = source.parts()
    assert [part.first_byte for part in parts[1:]] == [part.last_byte for part in parts[:-1]]
    assert (parts[0].first_byte, parts[-1].last_byte) == (0, path.stat().st_size)
    assert by_parts(source) == expected
    assert sum(source.left_out.values()) == left_out
    assert all(joined(list(source.documents(part))) for part in parts), "no part is without a document"


def test_large_plain_text_has_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {number}\nof two lines" for number in range(2000)))
    for rule, wanted in (("blank-line", 50), ("line", 50), ("file", 1)):
        assert len(FileSource([path], rule, "strict").parts()) >= wanted
    path.write_text("one document\n" * 5000)
    assert len(FileSource([path], "blank-line", "strict").parts()) == 1, "no border, no cut"


def test_parts_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    texts = [f"text {number} " + "x" * (number % 90) for number in range(3000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet", row_group_size=100, compression="none")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(documents, "PART_BYTES", 10_000)
    monkeypatch.setattr(sources, "PART_BYTES", 10_000)
    for name in ("rows.jsonl", "rows.parquet", "saved"):
        source = FileSource([tmp_path / name], "line", "strict")
        assert len(source.parts()) >= 9, name
        assert [text for text, _ in by_parts(source)] == texts, name


def test_a_malformed_row_of_a_later_part_is_an_error_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 900 + '{"texts": "b"}\n' + '{"text": "c"}\n' * 10)
    (tmp_path / "text.txt").write_bytes(b"text\n" * 900 + b"\xff\n")
    for name in ("rows.jsonl", "text.txt"):
        source = FileSource([tmp_path / name], "line", "strict")
        assert len(source.parts()) > 3
        with pytest.raises(ValueError, match="line 901"):
            by_parts(source)


def test_a_recipe_opens_the_same_source_and_reads_a_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PART_BYTES", 100)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {number}" for number in range(100)))
    recipe = SourceRecipe((str(path),), DataConfig(document="line"))
    source, other = recipe.open(), SourceRecipe(recipe.open().names, recipe.settings).open()
    assert source.fingerprint == other.fingerprint and source.parts() == other.parts()
    part = source.parts()[3]
    assert list(other.documents(part)) == list(source.documents(part))


@pytest.mark.parametrize("content", [b"a", "가".encode(), "e\u0301".encode(), b"a b ", b"\xcc\x81"])
def test_one_line_of_any_length_is_read_in_bounded_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "line.txt"
    size = 8_000_000
    path.write_bytes(content * (size // len(content)))
    source = FileSource([path], "blank-line", "strict")
    (part,) = source.parts()
    tracemalloc.start()
    longest = max(len(passage.text) for passage in source.documents(part))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest <= CHUNK_CHARACTERS
    assert peak < 24_000_000, "some copies of a chunk, never of the line"


def test_a_highly_compressed_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    import zstandard

    path = tmp_path / "line.txt.zst"
    path.write_bytes(zstandard.compress(b"a" * 100_000_000))
    chunks = read_chunks(path)
    tracemalloc.start()
    assert sum(len(chunk) for chunk in chunks) == 100_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000
