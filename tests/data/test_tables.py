"""Tables: equal documents from every format; malformed rows are errors with their line, or counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import TextError
from unmask.data.readers import bytes as byte_reader
from unmask.data.readers import tables
from unmask.data.settings import ErrorsRule
from unmask.data.sources import FileSource

LABEL = "x" * 9


def documents(source: FileSource) -> list[str]:
    texts: list[str] = []
    for part in source.parts():
        before = len(texts)
        for passage in source.documents(part):
            if not passage.number:
                texts.append("")
            assert passage.document == len(texts) - before - 1
            texts[-1] += passage.text
    return texts


def read(path: Path | str, errors: ErrorsRule = "strict", field: str = "text") -> list[str]:
    return documents(FileSource([path], "line", errors, field))


def delimited(texts: Sequence[str], delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([("label", "text"), *((LABEL, text) for text in texts)])
    return stream.getvalue().encode()


def lines_of_json(texts: Sequence[str]) -> bytes:
    lines = [json.dumps({"label": LABEL, "text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    return "\n".join(lines).encode()


FORMATS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "txt": lambda texts: "\n".join(texts).encode(),
    "jsonl": lines_of_json,
    "csv": lambda texts: delimited(texts, ","),
    "tsv": lambda texts: delimited(texts, "\t"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: b"".join(zstandard.compress(half) for half in (data[:7], data[7:])),  # two frames
}


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from('ab "",;\'\t{é\u0301語😀\\u'), max_size=30), min_size=1, max_size=8))
def test_the_same_documents_from_every_format(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("formats")
    texts = [*texts, "the last"]
    (folder / "all.txt").write_bytes(FORMATS["txt"](texts))
    expected = read(folder / "all.txt")
    assert len(expected) == sum(bool(text.strip()) for text in texts)
    for ending, written in FORMATS.items():
        for packing, pack in COMPRESSIONS.items():
            path = folder / f"all.{ending}{packing}"
            path.write_bytes(pack(written(texts)))
            assert read(path) == expected, path.name
    pq.write_table(pa.table({"text": texts}), folder / "all.parquet", row_group_size=3)
    assert read(folder / "all.parquet") == expected


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_compressed_parquet_file_is_an_error(tmp_path: Path, packing: str) -> None:
    pq.write_table(pa.table({"text": ["some text"]}), tmp_path / "rows.parquet")
    path = tmp_path / f"rows.parquet{packing}"
    path.write_bytes(COMPRESSIONS[packing]((tmp_path / "rows.parquet").read_bytes()))
    source = FileSource([path], "line", "strict")
    for function in (source.check, source.parts):
        with pytest.raises(TextError, match="compressed as a whole") as caught:
            function()
        assert caught.value.location == str(path) and "decompress" in caught.value.hint


def test_no_damaged_footer_ends_the_process(tmp_path: Path) -> None:
    """Where a Parquet file says how its columns are stored, one bit of any byte is changed."""
    pq.write_table(pa.table({"text": ["some text", None, "more"], "stars": [1, 2, 3]}), tmp_path / "rows.parquet")
    program = f"""
from pathlib import Path
from unmask.core.errors import TextError
from unmask.data.sources import FileSource
path = Path({str(tmp_path / "rows.parquet")!r})
whole = path.read_bytes()
refused = 0
for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    try:
        source = FileSource([path], "line", "strict")
        [list(source.documents(part)) for part in source.parts()]
    except TextError:
        refused += 1
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50


def test_a_carriage_return_in_the_header_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\rid,text\n1,a\n")
    with pytest.raises(TextError) as caught:
        read(tmp_path / "rows.csv")
    assert str(tmp_path / "rows.csv") in caught.value.location and caught.value.hint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of save_to_disk: one dataset, and one with two splits."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    dataset = datasets.Dataset.from_dict({"text": ["one", "two\nlines", " ", "three"], "stars": [1, 2, 3, 4]})
    dataset.save_to_disk(folder / "plain")
    dataset.select([0, 1]).save_to_disk(folder / "again")
    datasets.Dataset.from_dict({"text": ["one", "two\nlines"], "stars": [5, 5]}).save_to_disk(folder / "same")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "splits")
    return folder


def test_saved_datasets(saved: Path) -> None:
    assert read(saved / "plain") == read(f"dataset:{saved}/plain") == ["one", "two\nlines", "three"]
    assert read(saved / "splits") == ["one", "two\nlines", "three"]
    assert read(f"dataset:{saved}/splits@test") == ["one"]
    again, same, plain = (
        FileSource([saved / name], "line", "strict").fingerprint for name in ("again", "same", "plain")
    )
    assert again == same != plain, "the column's content counts"
    for text, field, says in (
        (f"dataset:{saved}/splits@valid", "text", ("no split `valid`", "@train", "@test")),
        (f"dataset:{saved}/plain@train", "text", ("has no splits",)),
        (f"dataset:{saved}/nowhere", "text", ("no such directory", "FOLDER")),
        ("dataset:", "text", ("invalid dataset",)),
        (str(saved / "plain"), "texts", ("did you mean `text`", "`stars`")),
        (str(saved / "plain"), "stars", ("type int64, expected text", "`text`")),
    ):
        with pytest.raises(TextError) as caught:
            FileSource([text], "line", "strict", field).check()
        assert all(words in str(caught.value) for words in says), str(caught.value)
    (saved / "plain" / "dataset_info.json").write_text("{")
    with pytest.raises(TextError, match="can't read this dataset"):
        from unmask.data.readers.hf_datasets import open_dataset

        open_dataset.cache_clear()
        read(saved / "plain")


MALFORMED: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
    "not json": (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "jsonl", ("line 2", "not JSON", "--errors skip")),
    "no object": (b'{"text": "a"}\n["b"]\n{"text": "c"}\n', "jsonl", ("line 2", "is a list")),
    "no field": (b'{"text": "a"}\n{"texts": 1, "id": 2}\n{"text": "c"}\n', "jsonl", ("line 2", "`texts`?", "`id`")),
    "null": (b'{"text": "a"}\n{"text": null}\n{"text": "c"}\n', "jsonl", ("line 2", "is null")),
    "number": (b'{"text": "a"}\n{"text": 7}\n{"text": "c"}\n', "jsonl", ("line 2", "the number 7")),
    "bytes": (b'{"text": "a"}\n\n{"text": "\x93b"}\n{"text": "c"}\n', "jsonl", ("line 3", "not UTF-8", "0x93")),
    "surrogate": (b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "c"}\n', "jsonl", ("line 2", "invalid character")),
    "deep": (b'{"text": "a"}\n' + b"[" * 200_000 + b'\n{"text": "c"}\n', "jsonl", ("line 2", "not JSON")),
    "too few cells": (b"id,text\n1,a\n2\n3,c\n", "csv", ("line 3", "1 columns", "expected 2")),
    "a quote inside": (b'id,text\n1,"a"\n2,"b"b\n3,c\n', "csv", ("line 3", "expected after", "double the quotes")),
    "cell bytes": (b'id\ttext\n1\ta\n2\t"b\n\x93b"\n3\tc\n', "tsv", ("line 4", "not UTF-8", "0x93", "--errors skip")),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_an_error_with_its_line_or_counted(tmp_path: Path, name: str) -> None:
    data, ending, says = MALFORMED[name]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(data)
    with pytest.raises(TextError) as caught:
        read(path)
    assert all(words in str(caught.value) for words in says), str(caught.value)
    assert str(path) in caught.value.location and caught.value.hint
    source = FileSource([path], "line", "skip")
    assert documents(source) == ["a", "c"]
    assert list(source.left_out.values()) == [1]
    if name in ("bytes", "surrogate", "cell bytes"):
        assert "\ufffd" in read(path, "replace")[1]


def test_quotes_in_a_table_separated_by_tabs(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('id\ttext\r\n1\t"A" and B\r\n2\t"all ""of"" it"\r\n\r\n3\t"half\r\n4\tsize 5" and "\r\n')
    literal = FileSource([path], "line", "strict", quoting="none")
    assert documents(literal) == ['"A" and B', '"all ""of"" it"', '"half', 'size 5" and "'], "each line is a row"
    assert literal.fingerprint != FileSource([path], "line", "strict").fingerprint
    with pytest.raises(TextError, match="malformed row") as caught:
        read(path)
    assert caught.value.location.endswith("line 2") and "data.quoting=none" in caught.value.hint
    path.write_text('id\ttext\n1\t"a\ttab"\n2\t"two\nlines"\n3\ta "word"\n4\t"all ""of"" it"\n')
    assert read(path) == ["a\ttab", "two\nlines", 'a "word"', 'all "of" it']
    path.write_text('id\ttext\n1\ta "b"\n2\n')
    for quoting in ("csv", "none"):
        with pytest.raises(TextError, match="1 columns, expected 2") as caught:
            documents(FileSource([path], "line", "strict", quoting=quoting))
        assert caught.value.location.endswith("line 3")
        assert documents(FileSource([path], "line", "skip", quoting=quoting)) == ['a "b"']


def test_an_unclosed_quote_is_an_error_under_every_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'id,text\n1,a\n2,"b\n3,c\n')
    for errors in ("strict", "skip"):
        with pytest.raises(TextError, match="never closed") as caught:
            read(path, errors)
        assert caught.value.location.endswith("line 3")
    monkeypatch.setattr(tables, "LONGEST_LINE", 100)
    path.write_bytes(b'id,text\n1,a\n2,"' + b"b\n" * 100)
    with pytest.raises(TextError, match="longer than 100"):
        read(path, "skip")


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_reader, "LONGEST_LINE", 50)
    monkeypatch.setattr(byte_reader, "CHUNK_BYTES", 16)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * 100 + '"}\n')
    with pytest.raises(TextError, match="longer than 50 bytes") as caught:
        read(path, "skip")
    assert caught.value.location.endswith("line 2")


def test_a_dotted_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"meta": {"body": "a"}}\n{"meta.body": "b"}\n')
    assert read(path, field="meta.body") == ["a", "b"]


def test_columns_that_are_missing_or_hold_no_text(tmp_path: Path) -> None:
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        (tmp_path / f"rows.{ending}").write_bytes(delimited(["a"], delimiter))
    table = pa.table({"label": [1], "text": ["a"], "raw": [b"b\xff"], "kind": pa.array(["c"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.tsv", "rows.parquet"):
        with pytest.raises(TextError, match="did you mean `label`") as caught:
            read(tmp_path / name, field="lable")
        assert "`text`" in caught.value.hint and name in caught.value.location
    with pytest.raises(TextError, match="type int64, expected text") as caught:
        read(tmp_path / "rows.parquet", field="label")
    assert "`text`" in caught.value.hint
    assert read(tmp_path / "rows.parquet", field="kind") == ["c"]
    with pytest.raises(TextError, match="invalid character") as caught:
        read(tmp_path / "rows.parquet", field="raw")
    assert caught.value.location.endswith("row 1")
    assert read(tmp_path / "rows.parquet", "replace", field="raw") == ["b\ufffd"]


def test_nulls_of_a_parquet_table_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c", "", None]}), path)
    with pytest.raises(TextError, match="is null") as caught:
        read(path)
    assert caught.value.location == f"{path}, row 2"
    source = FileSource([path], "line", "skip")
    assert documents(source) == ["a", "c"] and list(source.left_out.values()) == [2]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_short(tmp_path: Path, ending: str, packing: str) -> None:
    path = tmp_path / f"cut.{ending}{packing}"
    path.write_bytes(COMPRESSIONS[packing](FORMATS[ending]([f"text {number * 7919}" for number in range(9000)]))[:-20])
    with pytest.raises(TextError, match=rf"this \{packing} file is damaged or truncated") as caught:
        read(path)
    assert caught.value.location == str(path)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path)
    for data in (path.read_bytes()[:-30], b"PAR1", b"", b"text\na\n"):
        path.write_bytes(data)
        with pytest.raises(TextError, match="not a Parquet file") as caught:
            FileSource([path], "line", "strict").check()
        assert caught.value.location == str(path)
    for name, data, says in (
        ("rows.parquet.gz", gzip.compress(b"text"), "compressed as a whole"),
        ("rows.csv", b"", "empty"),
        ("rows.tsv", b"text\n", "empty"),
        ("rows.jsonl", b"\n \n", "empty"),
        ("rows.jsonl", b'{"text": " "}\n', "empty"),
        ("rows.csv", "text\n".encode("utf-16"), "UTF-16"),
        ("rows.jsonl", b'{"text": "a\0"}\n', "byte 11 is zero"),
        ("rows.zst", gzip.compress(b"text"), "damaged"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(TextError, match=says) as caught:
            FileSource([path], "line", "strict").check()
        assert caught.value.location.startswith(str(path)) and caught.value.hint


def texts(path: Path, field: str = "text", errors: ErrorsRule = "strict") -> list[str]:
    source = FileSource([path], "line", errors, field)
    source.check()
    return [chunk.text for part in source.parts() for chunk in source.documents(part)]


def test_json_files(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "n": {"text": "no"}} for number in range(5000)]
    expected = [row["text"] for row in rows]
    lines = "\n".join(json.dumps(row) for row in rows)
    for name, data in (
        ("a.json", json.dumps(rows)),
        ("b.json", json.dumps(rows, indent=2)),
        ("c.json", "\ufeff" + lines + "\n"),
        ("d.json", "\n".join(json.dumps(row, indent=1) for row in rows)),
        ("e.ndjson", lines),
        ("f.JSON", json.dumps(rows)),
        ("g.json", json.dumps(expected)),
    ):
        (tmp_path / name).write_text(data)
        assert texts(tmp_path / name) == expected
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert texts(tmp_path / "a.ndjson.gz") == texts(tmp_path / "a.json.gz") == expected
    path = tmp_path / "bad.json"
    for data, says in (
        ('{"data": [{"text": "a"}]}', r"rows may be in the list `data`[\s\S]*jq -c '\.data\[\]'"),
        ('[{"text": "a"}, {"text": ', "value 2"),
        ('[{"text": "a"}', "cut short"),
        ('[{"text": "a"} {"text": "b"}]', "comma"),
        ('[{"text": "a"}] more', "goes on"),
        ('[{"text": "a"}, {"body": "b"}]', "no field `text`"),
        ("[]", "empty"),
        ('[["a"], ["b"]]', "a list, expected an object"),
        ("plain words", "not JSON"),
        ('[{"text": "a", "text": "b"}]', "occurs twice"),
    ):
        path.write_text(data)
        with pytest.raises(TextError, match=says) as caught:
            texts(path)
        assert str(path) in caught.value.location and caught.value.hint
    path.write_text('[{"text": "a"}, {"text": 3}, {"text": "b"}]')
    assert texts(path, errors="skip") == ["a", "b"]


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with pytest.raises(TextError, match="`text`"):
            texts(tmp_path / name)
    (tmp_path / "a.jsonl").write_text('{"text": "a \\"text\\"", "other": {"text": "b"}}\n')
    assert texts(tmp_path / "a.jsonl") == ['a "text"']


def test_tables_of_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for data in (
        "n;text\n1;one, two\n2;three\n",
        "sep=;\r\nn;text\r\n1;one, two\r\n2;three\r\n",
        "\ufeffsep=;\nn;text\n1;one, two\n2;three\n",
        'n\ttext\n1\t"one, two"\n2\tthree\n',
        'n,text\n1,"one, two"\n2,three\n',
    ):
        path.write_text(data)
        assert texts(path) == ["one, two", "three"]
    path.write_text("n;body\n1;one\n")
    with pytest.raises(TextError, match="available: `n` and `body`"):
        texts(path)
