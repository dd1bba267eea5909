"""The corpus: no held-out text is trained on, and nothing is built twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.config import build_config, dump_config, load_toml
from unmask.core.errors import DamagedError, RecipeError, StoreError, TextError, TokenizerError
from unmask.core.files import DigestCache, default_cache, file_digest
from unmask.core.quantities import Fraction, Quantity
from unmask.core.types import WORD_START
from unmask.data.prepare import TokenizedCorpus, prepare
from unmask.data.settings import DataConfig, HeldOutConfig
from unmask.data.shards import Shards
from unmask.data.sources import BaseSource, MemorySource, open_source
from unmask.data.split import (
    CharCounter,
    DocumentSlice,
    DocumentStats,
    Split,
    divide,
    measure_documents,
    number_documents,
    slice_documents,
)
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig

MARKER = "ŽŽŽ"
LETTERS = CharacterConfig()


def quiet(stage: str, share: float) -> None:
    assert stage and 0 <= share <= 1


def texts_of(shards: Shards, corpus: TokenizedCorpus) -> list[str]:
    pairs = enumerate(shards.lengths.tolist())
    return [corpus.tokenizer.decode(shards.ids(document, 0, length)) for document, length in pairs]


def survey(source: BaseSource) -> DocumentStats:
    counter = CharCounter(lambda count: None)
    infos = list(measure_documents((chunk for _, chunk in number_documents(source, source.parts())), counter))
    lengths, hashes = ([getattr(info, name) for info in infos] for name in ("length", "hash"))
    return DocumentStats(np.array(lengths), np.array(hashes, dtype=np.uint64), counter.characters, counter.sample)


def side(source: BaseSource, stats: DocumentStats, split: Split, which: str) -> list[DocumentSlice]:
    slices = slice_documents(number_documents(source, source.parts()), stats.lengths, split.first_held)
    return [part for part in slices if part.side == which]


def load_json(path: Path) -> dict[str, str]:
    return json.loads(path.read_text())


def held_out(by: str, share: str = "10%") -> HeldOutConfig:
    assert by in ("hash", "tail")
    return HeldOutConfig(by, Fraction.parse(share))  # type: ignore[arg-type]


def test_a_marker_in_the_tail_is_in_no_training_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} of the text\n" for number in range(400)) + f"the {MARKER} text\n")
    text = path.read_text()
    settings = DataConfig(document="file", tokenizer=LETTERS, held_out=held_out("tail"))
    corpus = prepare(open_source([path], settings), settings, tmp_path / "cache", quiet)
    (train,) = texts_of(corpus.train, corpus)
    kept = int(len(text) * 0.9)
    assert train == text[:kept] and corpus.train.characters == kept
    assert corpus.held_out.tokens == len(text) - kept == corpus.held_out.characters
    assert corpus.tokenizer.token_to_id("Ž") is None, "the tokenizer learns from training text alone"
    assert corpus.held_out.unknown_characters == 3 and corpus.train.unknown_characters == 0


def test_a_marker_in_the_held_out_documents_is_in_no_training_text(tmp_path: Path) -> None:
    plain = [f"document {number} says {number * 7919}" for number in range(300)]
    settings = DataConfig(tokenizer=LETTERS, held_out=HeldOutConfig(fraction=Fraction(0.05)))
    found = survey(MemorySource(plain))
    division = divide(found, settings.held_out)
    assert division.by == "hash"
    first = side(MemorySource(plain), found, division, "held-out")[0].text
    # The marker goes into a document of the held-out side and into a copy of it, with a hash before all others: both
    # fit in, so they are held out.
    at = plain.index(first)
    marked = next(
        f"{first} {MARKER}{tries}"
        for tries in range(100_000)
        if survey(MemorySource([f"{first} {MARKER}{tries}"])).hashes[0] < found.hashes.min()
    )
    documents = [*plain[:at], marked, *plain[at + 1 :], marked]
    corpus = prepare(MemorySource(documents), settings, tmp_path, quiet)
    assert not any(MARKER[0] in text for text in texts_of(corpus.train, corpus))
    assert corpus.tokenizer.token_to_id(MARKER[0]) is None
    assert corpus.held_out.unknown_characters == 2 * len(MARKER), "the copy fell on the same side"
    assert corpus.train.documents + corpus.held_out.documents == len(documents)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 30), min_size=2, max_size=60),
    by=st.sampled_from(["hash", "tail"]),
    share=st.sampled_from(["1%", "7%", "50%", "99%"]),
)
def test_both_sides_together_are_the_text(numbers: list[int], by: str, share: str) -> None:
    documents = ["".join(f"{number} " for _ in range(number)) for number in numbers]
    source = MemorySource(documents)
    found = survey(source)
    if by == "hash" and len({text for text in documents if text}) < 2:
        with pytest.raises(TextError):
            divide(found, held_out(by, share))
        return
    division = divide(found, held_out(by, share))
    train = {stretch.document: stretch for stretch in side(source, found, division, "train")}
    held = {stretch.document: stretch for stretch in side(source, found, division, "held-out")}
    for number, text in enumerate(documents):
        parts = [found[number] for found in (train, held) if number in found]
        assert "".join(part.text for part in parts) == text
        assert sum(part.characters for part in parts) == len(text) and all(part.last for part in parts)
    if by == "hash":
        texts_held = {text for number, text in enumerate(documents) if number in held}
        texts_kept = {text for number, text in enumerate(documents) if number in train}
        assert not texts_held & texts_kept, "copies fall on one side"
        assert any(stretch.text for stretch in held.values()) and any(stretch.text for stretch in train.values())


def test_long_documents_are_divided_across_their_passages(tmp_path: Path) -> None:
    text = "a few words. " * 200_000
    path = tmp_path / "long.txt"
    path.write_text(text)
    settings = DataConfig(document="file", held_out=held_out("tail", "30%"))
    source = open_source([path], settings)
    found = survey(source)
    division = divide(found, settings.held_out)
    train, held = (list(side(source, found, division, which)) for which in ("train", "held-out"))
    assert "".join(stretch.text for stretch in train) == text[: int(len(text) * 0.7)]
    assert "".join(stretch.text for stretch in train + held) == text
    assert sum(stretch.characters for stretch in train + held) == len(text)
    assert [stretch.last for stretch in train] == [False, True] and [stretch.last for stretch in held] == [False, True]


def test_the_share_and_the_most_that_is_held_out() -> None:
    found = survey(MemorySource([f"{number:100d}" for number in range(1000)]))
    counts = {
        (share, most): int((divide(found, HeldOutConfig("hash", share, most)).first_held == 0).sum())
        for share in (Fraction(0.01), Fraction(0.2))
        for most in (Quantity(50, "characters"), Quantity(1200, "characters"), Quantity(2e6, "characters"))
    }
    assert list(counts.values()) == [1, 10, 10, 1, 12, 200]
    few = survey(MemorySource(["x" * 1000] * 99))
    division = divide(few, HeldOutConfig())
    assert division.by == "tail" and set(division.first_held.tolist()) == {900}
    assert divide(found, HeldOutConfig()).by == "hash"


def held_sizes(documents: list[str], settings: HeldOutConfig) -> list[int]:
    found = survey(MemorySource(documents))
    held_N = divide(found, settings).first_held == 0
    return sorted(found.lengths[held_N & (found.lengths > 0)].tolist())


def test_a_large_document_is_skipped_whatever_its_hash() -> None:
    small = [f"{number:020d}" for number in range(200)]
    for number in range(60):  # its hash falls anywhere: first of all, in the middle, last
        large = f"{number} " * 2000
        assert (
            held_sizes([*small, large], HeldOutConfig("hash", Fraction(0.5), Quantity(110, "characters"))) == [20] * 5
        )


def test_where_nothing_fits_the_smallest_is_held_out() -> None:
    documents = [f"{number} " * (number + 200) for number in range(10, 30)]
    assert held_sizes(documents, HeldOutConfig("hash", Fraction(0.001))) == [min(map(len, documents))]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=2, max_size=60),
    share=st.sampled_from([0.01, 0.1, 0.5, 0.99]),
    most=st.sampled_from([1, 50, 2_000_000]),
)
def test_what_is_held_out_is_what_fits(counts: list[int], share: float, most: int) -> None:
    documents = ["x" * count for count in counts]
    different = {text for text in documents if text}
    if len(different) < 2:
        return
    chosen = HeldOutConfig("hash", Fraction(share), Quantity(most, "characters"))
    held, budget = held_sizes(documents, chosen), min(share * sum(counts), most)
    assert 0 < len(set(held)) < len(different), "something on both sides"
    groups = {len(text): documents.count(text) * len(text) for text in different}
    if min(groups.values()) > budget:
        assert sum(held) == min(groups.values())
    else:
        assert sum(held) <= budget
        left = [size for length, size in groups.items() if length not in held]
        assert len(left) == 1 or min(left) > budget - sum(held), "whatever still fits is in"


def test_a_division_says_whether_it_is_the_same() -> None:
    found = survey(MemorySource([f"{number:020d}" for number in range(200)]))
    digests = [divide(found, held_out("hash", share)).digest for share in ("5%", "5%", "6%")]
    assert digests[0] == digests[1] != digests[2]


def test_a_second_call_opens_the_cache(tmp_path: Path) -> None:
    source = MemorySource([f"one document, {number}. And its end." for number in range(120)])
    settings = DataConfig(tokenizer=WordPieceConfig(vocab_size=60))
    corpus = prepare(source, settings, tmp_path / "cache", quiet)
    stages: list[str] = []
    second = prepare(source, settings, tmp_path / "cache", lambda stage, share: stages.append(stage))
    assert not stages and second.fingerprint == corpus.fingerprint and second.facts == corpus.facts
    assert second.notes == corpus.notes and second.words == "spaces" == corpus.facts["words"]
    assert second.train.documents + second.held_out.documents == 120
    assert (second.train.token_flags(0, 0, 1) & WORD_START).all()
    other = prepare(source, replace(settings, words="characters"), tmp_path / "cache", quiet)
    assert other.fingerprint != corpus.fingerprint and other.words == "characters"
    given = prepare(source, settings, tmp_path / "cache", quiet, corpus.tokenizer)
    assert given.folder == corpus.folder and given.fingerprint == corpus.fingerprint
    elsewhere = prepare(source, settings, tmp_path / "elsewhere", quiet)
    assert elsewhere.fingerprint == corpus.fingerprint


def test_equal_tokenizers_share_their_shards(tmp_path: Path) -> None:
    """Whether given first or trained first, and by which settings: the tokenizer that results decides."""
    source = MemorySource([f"one document, {number}. And its end." for number in range(120)])
    settings = DataConfig(tokenizer=LETTERS)
    tokenizer = prepare(source, settings, tmp_path / "other").tokenizer
    given = prepare(source, DataConfig(), tmp_path / "cache", tokenizer=tokenizer)
    assert not (given.folder.parent / "tokenizers.json").exists()
    trained = prepare(source, settings, tmp_path / "cache")
    alike = prepare(source, replace(settings, tokenizer=CharacterConfig(min_frequency=2)), tmp_path / "cache")
    assert trained.folder == given.folder == alike.folder and trained.fingerprint == given.fingerprint
    assert len(load_json(given.folder.parent / "tokenizers.json")) == 2
    assert len(list(given.folder.parent.glob("*/meta"))) == 1


def test_a_start_reads_no_more_than_sizes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"one document, {number}. And its end." for number in range(120)))
    at = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(at, at))
    settings, digested = DataConfig(tokenizer=LETTERS), list[Path]()

    def counted(path: Path) -> str:
        digested.append(path)
        return file_digest(path)

    monkeypatch.setattr("unmask.data.sources.file_digest", counted)
    first = prepare(open_source([path], settings), settings, tmp_path / "cache")
    assert digested == [path]
    second = prepare(open_source([path], settings), settings, tmp_path / "cache")
    assert digested == [path] and second.fingerprint == first.fingerprint
    prepare(open_source([path], settings), settings, tmp_path / "cache", verify=True)
    assert digested == [path, path]
    prepare(open_source([path], settings), settings, tmp_path / "other")  # a build trusts no cached digest
    assert digested == [path, path, path]


def test_a_digest_of_a_file_just_written_is_not_kept(tmp_path: Path) -> None:
    """Another write within the same tick of the clock would leave size and time as they are."""
    path = tmp_path / "text.txt"
    path.write_text("one text")
    cache = DigestCache(tmp_path / "digests.json")
    cache.set("text", [path], "a digest", since_ns=path.stat().st_mtime_ns + 10**9)
    assert cache.get("text", [path]) is None
    cache.set("text", [path], "a digest", since_ns=path.stat().st_mtime_ns + 3 * 10**9)
    cache.save()
    assert DigestCache(tmp_path / "digests.json").get("text", [path]) == "a digest"
    path.write_text("one text more")
    assert DigestCache(tmp_path / "digests.json").get("text", [path]) is None


def test_a_damaged_cache_is_named_and_built_again_when_removed(tmp_path: Path) -> None:
    source = MemorySource([f"one document, {number}. And its end." for number in range(120)])
    settings = DataConfig(tokenizer=LETTERS)
    prepare(source, settings, tmp_path, quiet)
    for shard in sorted(tmp_path.rglob("*.safetensors")) + sorted(tmp_path.rglob("facts.json")):
        data = bytearray(shard.read_bytes())
        data[-20] ^= 4
        shard.write_bytes(data)
        with pytest.raises(DamagedError) as caught:
            prepare(source, settings, tmp_path, quiet)
        assert caught.value.location == str(shard)
        for file in shard.parent.iterdir():
            file.unlink()
        shard.parent.rmdir()
        prepare(source, settings, tmp_path, quiet)


def test_too_little_text_leaves_nothing_behind(tmp_path: Path) -> None:
    for texts in (["x"], [" ", "\n"]):
        with pytest.raises(TextError):
            prepare(MemorySource(texts), DataConfig(tokenizer=LETTERS), tmp_path, quiet)
    with pytest.raises(TokenizerError, match="is too large: this text gives"):
        prepare(MemorySource(["some words, and some words"]), DataConfig(), tmp_path, quiet)
    with pytest.raises(TextError, match="can't hold out documents"):
        prepare(MemorySource(["same"] * 200), DataConfig(tokenizer=LETTERS), tmp_path, quiet)
    assert all(path.name.endswith(".lock") for path in tmp_path.iterdir())


def test_a_cache_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="UNMASK_CACHE"):
        prepare(MemorySource(["a b c"]), DataConfig(tokenizer=LETTERS), tmp_path / "file" / "cache", quiet)


def test_chinese_is_read_by_characters(tmp_path: Path) -> None:
    corpus = prepare(MemorySource(["今天天氣很好。我們去公園。" * 20]), DataConfig(tokenizer=LETTERS), tmp_path, quiet)
    assert corpus.words == "characters" and any("each character" in sentence for sentence in corpus.notes)


def test_settings_survive_toml(tmp_path: Path) -> None:
    for chosen in (
        DataConfig(),
        DataConfig(
            document="line",
            words="characters",
            errors="replace",
            valid={"news": "news.txt"},
            held_out=held_out("tail", "12.5%"),
            tokenizer=CharacterConfig(min_frequency=3),
        ),
    ):
        path = tmp_path / "text.toml"
        path.write_text(dump_config(chosen))
        assert build_config(DataConfig, load_toml(path), str(path)) == chosen
    with pytest.raises(RecipeError, match="invalid fraction"):
        HeldOutConfig(fraction=Fraction(0.0))
    with pytest.raises(RecipeError, match="characters"):
        HeldOutConfig(max_size=Quantity(5, "tokens"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    monkeypatch.delenv("UNMASK_CACHE")
    assert default_cache() == tmp_path / "unmask"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "unmask"
