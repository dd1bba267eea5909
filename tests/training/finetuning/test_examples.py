"""Labeled data: the same rows from every format, columns by name, and errors that name place and choice."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from unmask.core.errors import TextError
from unmask.training.finetuning.examples import (
    Example,
    labels_of,
    numbers_of,
    overlap_notes,
    read_examples,
    require_span,
)
from unmask.training.finetuning.settings import FieldsConfig

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1, max_size=12).filter(
    lambda text: not text.isspace()
)
tables = st.lists(st.tuples(cells.map(str.strip), cells), min_size=1, max_size=6)


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    records = [{"text": text, "label": label} for label, text in rows]
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    if name.endswith(".jsonl"):
        content = "".join(json.dumps(record) + "\n\n" for record in records)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, ["text", "label"], delimiter="," if name.endswith(".csv") else "\t")
        writer.writeheader()
        writer.writerows(records)
        content = table.getvalue()
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.tsv.gz"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, name: str, rows: list[tuple[str, str]]) -> None:
    read = read_examples(write_table(tmp_path / name, rows), "classify", FieldsConfig())
    assert [(one.labels[0], one.texts[0]) for one in read] == rows


def test_columns_are_found_by_name_or_given(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("id,sentence1,sentence2,label,gold\n1,a b,c d,0,x\n")
    assert read_examples(path, "pair", FieldsConfig())[0] == Example(("a b", "c d"), ("0",), f"{path}, line 2")
    fields = FieldsConfig(text="sentence2", second="id", label="gold")
    assert read_examples(path, "pair", fields)[0] == Example(("c d", "1"), ("x",), f"{path}, line 2")


def test_missing_numbers_of_pandas_are_named(tmp_path: Path) -> None:
    """A column of whole numbers with a missing one is a column of floats and NaN."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "label": [1.0, 0.0, float("nan")]}), path)
    with pytest.raises(TextError, match="`label` is empty") as caught:
        read_examples(path, "classify", FieldsConfig())
    assert caught.value.location == f"{path}, row 3"
    parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "label": [1.0, 0.0, 0.5]}), path)
    assert [one.labels[0] for one in read_examples(path, "classify", FieldsConfig())] == ["1", "0", "0.5"]


def test_json_labels_may_be_numbers_and_booleans(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": true}\n{"text": "c", "label": 0.5}\n')
    assert [one.labels[0] for one in read_examples(path, "classify", FieldsConfig())] == ["1", "true", "0.5"]


def test_quotes_are_characters_if_requested(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('label\ttext\n1\t"so" good\n0\tbad"\n')
    with pytest.raises(TextError, match="malformed row") as caught:
        read_examples(path, "classify", FieldsConfig())
    assert "--quoting none" in caught.value.hint
    read = read_examples(path, "classify", FieldsConfig(quoting="none"))
    assert [one.texts[0] for one in read] == ['"so" good', 'bad"']


def test_tokens_and_tags_come_from_columns_and_from_lists(tmp_path: Path) -> None:
    columns, lists, table = tmp_path / "a.conll", tmp_path / "a.jsonl", tmp_path / "a.parquet"
    columns.write_text("-DOCSTART- -X- O O\n\nAda NNP I-NP B-PER\nwrote VBD I-VP O\n\nGo\tO\n")
    rows = [{"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]}, {"tokens": ["Go"], "tags": ["O"]}]
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    expected = [(("Ada", "wrote"), ("B-PER", "O")), (("Go",), ("O",))]
    for path in (columns, lists, table):
        assert [(one.texts, one.labels) for one in read_examples(path, "tokens", FieldsConfig())] == expected
    assert read_examples(columns, "tokens", FieldsConfig())[1].location == f"{columns}, line 6"


@pytest.mark.parametrize(
    ("name", "content", "location", "says"),
    [
        ("a.csv", "text\nx\n", "a.csv", "no column `label`"),
        ("a.csv", "label,text\n1,\n", "line 2", "`text` is empty"),
        ("a.csv", "label,text\n1,  \n", "line 2", "`text` is empty"),
        ("a.csv", "label,text\n1,a\n,b\n", "line 3", "`label` is empty"),
        ("a.csv", "label,text\n1,a,b\n", "line 2", "3 columns, expected 2"),
        ("a.csv", "label,label,text\n", "line 1", "same name"),
        ("a.csv", "label,text\n", "a.csv", "no examples"),
        ("a.csv", "", "a.csv", "no examples"),
        ("a.jsonl", '{"label": 1}\n', "a.jsonl", "no column `text`"),
        ("a.jsonl", '{"label": 1, "text": "a"}\n{"label": 1}\n', "line 2", "`text` is empty"),
        ("a.jsonl", '{"label": 1, "text": "a"}\n{"label": NaN, "text": "b"}\n', "line 2", "`label` is empty"),
        ("a.jsonl", '{"label": 1, "text": 5}\n', "line 1", "has the type int"),
        ("a.jsonl", '{"label": [], "text": "a"}\n', "line 1", "has the type list"),
        ("a.jsonl", "[1]\n", "line 1", "not a JSON object"),
        ("a.jsonl", "{\n", "line 1", "not JSON"),
        ("a.parquet", "label,text\n1,a\n", "a.parquet", "not a Parquet file"),
        ("a.txt", "label,text\n1,a\n", "a.txt", "ends in .csv"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, content: str, location: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=says) as caught:
        read_examples(tmp_path / name, "classify", FieldsConfig())
    assert location in caught.value.location and caught.value.hint and "--errors" not in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.conll", "Ada B-PER\nwrote\n", "1 columns, expected a token and its tag"),
        ("a.conll", "1 Ada a b c d\n", "6 columns"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}\n', "2 tokens, but 1 tags"),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}\n', "not a list"),
        ("a.jsonl", '{"tokens": ["a", " "], "tags": ["O", "O"]}\n', "`tokens` is empty"),
    ],
)
def test_bad_sentences_are_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=says):
        read_examples(tmp_path / name, "tokens", FieldsConfig())


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [(str(number), f"text {number}") for number in range(99)])
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes(byte ^ 255 for byte in data[40:200]) + data[200:])
    with pytest.raises(TextError, match="damaged or truncated") as caught:
        read_examples(path, "classify", FieldsConfig())
    assert caught.value.location == str(path)


def test_invalid_utf_8_is_an_error_without_options_that_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"label,text\n1,caf\xe9\n")
    with pytest.raises(TextError, match="not UTF-8") as caught:
        read_examples(tmp_path / "a.csv", "classify", FieldsConfig())
    assert "line 2" in caught.value.location
    assert "--errors" not in caught.value.hint and caught.value.hint


def examples(*labels: str) -> list[Example]:
    return [Example((f"text {number}",), (label,), f"line {number}") for number, label in enumerate(labels)]


def test_labels_are_sorted_and_whole_numbers_by_value() -> None:
    assert labels_of(examples("10", "9", "-1", "9"), {}) == ("-1", "9", "10")
    assert labels_of(examples("pos", "neg", "10"), {}) == ("10", "neg", "pos")
    assert labels_of(examples("1", "01", "0", "-0", "001"), {}) == ("-0", "0", "001", "01", "1")


def test_one_label_and_an_unseen_label_are_errors() -> None:
    with pytest.raises(TextError, match="same label: '1'"):
        labels_of(examples("1", "1"), {})
    with pytest.raises(TextError, match="the label 'c' of --test does not occur in training") as caught:
        labels_of(examples("a", "b"), {"valid": examples("a"), "test": examples("b", "c")})
    assert caught.value.location == "line 1" and "'a' and 'b'" in caught.value.hint
    with pytest.raises(TextError, match=r"1,001 labels.*more than 1,000"):
        labels_of(examples(*map(str, range(1001))), {})


@pytest.mark.parametrize("label", ["a", "nan", "inf", "", "1e31", "-1e300"])
def test_numbers_are_finite(label: str) -> None:
    with pytest.raises(TextError, match="is not a number"):
        numbers_of(examples("1", label), must_differ=True)


def test_a_validation_without_spans_is_an_error() -> None:
    tagged = [Example(("Ada", "wrote"), ("B-PER", "O"), "line 1"), Example(("Go",), ("O",), "line 4")]
    require_span(tagged, ("B-PER", "O"))
    require_span(tagged[1:], ("O", "X"))
    with pytest.raises(TextError, match="every F1 is 0") as caught:
        require_span(tagged[1:], ("B-PER", "O"))
    assert caught.value.location == "line 4"


def test_equal_numbers_are_an_error_if_they_must_differ() -> None:
    assert numbers_of(examples("1.5", "1.5"), must_differ=False) == [1.5, 1.5]
    with pytest.raises(TextError, match=r"same label: 1\.5"):
        numbers_of(examples("1.5", "1.5"), must_differ=True)
    with pytest.raises(TextError, match=r"same label: 3"):
        numbers_of(examples("3"), must_differ=True)
    with pytest.raises(TextError, match=r"same label: 1\.67772e\+07"):
        numbers_of(examples("16777216", "16777217"), must_differ=True)


@pytest.mark.parametrize("field", ["text", "label"])
def test_half_of_a_surrogate_pair_is_an_error(field: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "b"} | {field: "\ud800"}) + "\n")
    with pytest.raises(TextError, match=f"`{field}` contains an invalid character") as caught:
        read_examples(path, "classify", FieldsConfig())
    assert caught.value.location == f"{path}, line 1" and caught.value.hint


def test_texts_that_occur_in_training_are_noted() -> None:
    train = examples("a", "b", "a")
    assert overlap_notes(train, {"test": train[:2]}) == [
        "2 of 2 examples of test have a text that also occurs in train"
    ]
    assert overlap_notes(train[:1], {"test": train[1:]}) == []
