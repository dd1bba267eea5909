"""Sequences have the ids of AutoTokenizer, and each word has its label at its first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import ModelError
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.finetuning.encode import LabeledData, encode_texts, encode_words, packed
from unmask.training.finetuning.examples import Example

WORDS = ("good", "film", "lovely", "x", "music", "qq", "[SEP]", ".")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def auto_tokenizer(models: dict[str, Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models["bert"], local_files_only=True)


def encode(tokenizer: Tokenizer, examples: list[Example], longest: int, *, token_types: bool = True) -> LabeledData:
    labels = np.zeros(len(examples), np.int64)
    return encode_texts(examples, labels, tokenizer, longest, token_types=token_types, on_progress=lambda _: None)


@settings(max_examples=60, deadline=None)
@given(pair=st.tuples(texts, texts), longest=st.integers(8, 40))
def test_pairs_are_cut_as_by_autotokenizer(
    wordpiece: Tokenizer, auto_tokenizer: Any, pair: tuple[str, str], longest: int
) -> None:
    (sequence,) = encode(wordpiece, [Example(pair, ("a",), "")], longest).sequences
    expected = auto_tokenizer(*pair, truncation="longest_first", max_length=longest)
    assert sequence.sample.ids.tolist() == expected["input_ids"]
    assert sequence.sample.token_type_ids is not None
    assert sequence.sample.token_type_ids.tolist() == expected["token_type_ids"]


@settings(max_examples=40, deadline=None)
@given(text=texts, longest=st.integers(8, 20))
def test_texts_are_cut_as_by_autotokenizer(wordpiece: Tokenizer, auto_tokenizer: Any, text: str, longest: int) -> None:
    data = encode(wordpiece, [Example((text,), ("a",), "")], longest)
    assert (
        data.sequences[0].sample.ids.tolist() == auto_tokenizer(text, truncation=True, max_length=longest)["input_ids"]
    )
    assert data.num_cut == (len(auto_tokenizer(text)["input_ids"]) > longest)
    assert data.sequences[0].sample.token_type_ids is None


def test_without_token_types_a_pair_has_none(wordpiece: Tokenizer) -> None:
    data = encode(wordpiece, [Example(("good", "film"), ("a",), "")], 16, token_types=False)
    assert data.sequences[0].sample.token_type_ids is None


def test_a_pair_needs_a_separator(models: dict[str, Path], wordpiece: Tokenizer) -> None:
    import json

    spec = json.loads(wordpiece.to_json())
    template = spec["post_processor"]
    template["pair"] = [entry for entry in template["pair"] if "Sequence" in entry]
    plain = wordpiece.with_json(json.dumps(spec))
    with pytest.raises(ModelError, match="nothing between two texts"):
        encode(plain, [Example(("good", "film"), ("a",), "")], 16)


sentences = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(sentences=sentences, longest=st.integers(8, 40))
def test_each_word_has_one_label_at_its_first_token(
    wordpiece: Tokenizer, sentences: list[list[str]], longest: int
) -> None:
    tags = [[f"{word}{number % 2}" for number, word in enumerate(words)] for words in sentences]
    ids = {tag: number for number, tag in enumerate(sorted({tag for row in tags for tag in row}))}
    examples = [Example(tuple(words), tuple(row), "") for words, row in zip(sentences, tags, strict=True)]
    data = encode_words(examples, ids, wordpiece, longest, on_progress=lambda _: None)
    flat = [word for words in sentences for word in words]
    assert data.labels.tolist() == [ids[tag] for row in tags for tag in row]
    seen: list[int] = []
    for sequence in data.sequences:
        assert len(sequence.sample.ids) <= longest
        for position, label, row in zip(sequence.positions, sequence.labels, sequence.rows, strict=True):
            first = int(wordpiece.encode(flat[row]).ids[0])
            assert sequence.sample.ids[position] == first and label == data.labels[row]
        seen += sequence.rows.tolist()
    assert sorted(seen) == list(range(len(flat)))


def test_the_first_tokens_are_those_of_autotokenizer(wordpiece: Tokenizer, auto_tokenizer: Any) -> None:
    words = ("lovely", "qq", "music", "x1y", ".", "film")
    examples = [Example(words, tuple("abcdef"), "")]
    data = encode_words(examples, {letter: number for number, letter in enumerate("abcdef")}, wordpiece, 64,
                        on_progress=lambda _: None)  # fmt: skip
    expected = auto_tokenizer([list(words)], is_split_into_words=True)
    owners = expected.word_ids(0)
    firsts = [owners.index(number) for number in range(len(words))]
    assert data.sequences[0].sample.ids.tolist() == expected["input_ids"][0]
    assert data.sequences[0].positions.tolist() == firsts


def test_batches_contain_every_sequence_once_and_positions_follow_the_packing(wordpiece: Tokenizer) -> None:
    examples = [Example((" ".join(WORDS[: 1 + number % 6]),), ("a",), "") for number in range(30)]
    data = encode(wordpiece, examples, 64)
    batches = list(data.batches())
    assert sorted(int(sequence.rows[0]) for batch in batches for sequence in batch) == list(range(30))
    batch, positions_M, labels_M = packed(batches[0])
    assert positions_M.tolist() == list(batch.offsets[:-1]) and len(labels_M) == len(batches[0])
