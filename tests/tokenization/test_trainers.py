"""Byte-level BPE, Unigram, bytes and files: reproducible, the same in transformers, clear where they refuse."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers

from unmask.core.config import build_config, dump_config
from unmask.core.errors import RecipeError, TokenizerError
from unmask.data.settings import DataConfig
from unmask.tokenization.analysis import TokenFormatter
from unmask.tokenization.settings import (
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    FileTokenizerConfig,
    TokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

SPEECH = (
    "The cat sat on the mat, and the dog sat on the log. A naïve café! They didn't say so. "
    "나는 학교에 갔다. 너는 학교에 가고, 우리는 집에 있다. 天氣很好，我們去公園。他說：「好！」"  # noqa: RUF001
    "私は学校へ行きました。ガラスのコップが好きです。\n"
)
DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("abcdefghstan", k=DRAW.randint(2, 7))) for _ in range(300)]
SAMPLE = [SPEECH * 30 + " ".join(DRAW.choices(WORDS, k=3000))]
PROMPTS = [
    *SPEECH.split(". "),
    "e\u0301 각 \u1112\u1161\u11ab か\u3099",
    "👩‍👩‍👧 🙂👍🏽 ❤\ufe0f",
    "a\tb\n\nc  d \x00 x",
    "The [MASK] sat on the [MASK]. 서울[MASK] 간다",
    " lead and trail ",
    "[MASK]",
    "",
]
LEARNT = [ByteBpeConfig(vocab_size=400), UnigramConfig(vocab_size=250)]


@pytest.mark.parametrize(
    "chosen",
    [*LEARNT, ByteConfig(), ByteBpeConfig(vocab_size=400, lowercase=True, strip_accents=True, clean_text=True)],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_ids(tmp_path: Path, chosen: TokenizerConfig) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(SAMPLE, chosen)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == tokenizer.mask_id and len(theirs) == tokenizer.size
    for text in PROMPTS:
        encoded = tokenizer.encode(text, specials_in_text=True)
        framed, _ = tokenizer.add_special_tokens(encoded.ids, encoded.marks)
        assert theirs(text)["input_ids"] == framed.tolist(), text
        assert theirs.decode(framed, skip_special_tokens=True) == tokenizer.decode(framed)
    theirs.save_pretrained(tmp_path / "again")
    opened = train_tokenizer([], FileTokenizerConfig("file", tmp_path / "again"))
    assert opened.encode(PROMPTS[-4], specials_in_text=True).ids.tolist() == encoded_ids(tokenizer, PROMPTS[-4])
    assert opened.mask_takes_space == tokenizer.mask_takes_space == (chosen.kind != "bytes")


def encoded_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, specials_in_text=True).ids.tolist()


@pytest.mark.parametrize("chosen", [ByteBpeConfig(vocab_size=400), ByteConfig()], ids=repr)
def test_bytes_give_every_text_back(chosen: TokenizerConfig) -> None:
    tokenizer = train_tokenizer(SAMPLE, chosen)
    for text in [*PROMPTS, "뷁ŧ\u2028𐍈"]:
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded.ids) == unicodedata.normalize("NFC", text) and not encoded.characters_unknown
        assert not set(encoded.ids.tolist()) & set(tokenizer.special_ids), "letters are not a special token"
    assert tokenizer.size == (400 if chosen.kind == "bpe" else 261)


@pytest.mark.parametrize("make", [WordPieceConfig, ByteBpeConfig, UnigramConfig])
def test_normalisation_by_name(make: type[WordPieceConfig | ByteBpeConfig | UnigramConfig]) -> None:
    vocab = 400 if make is ByteBpeConfig else 130

    def shown(text: str, *, lowercase: bool = False, strip_accents: bool = False) -> str:
        settings = make(vocab_size=vocab, lowercase=lowercase, strip_accents=strip_accents)
        sample = "the café cafe naive school 학교에 갔다 the cafe café naïve school 학교에 갔다 TC "
        tokenizer = train_tokenizer([sample * 30 + SAMPLE[0]], settings)
        return tokenizer.decode(tokenizer.encode(text).ids).strip()

    assert shown("the café 학교에") == "the café 학교에"
    assert shown("THE café", lowercase=True) == "the café", "lower case alone leaves accents"
    assert shown("the café 학교에 갔다", strip_accents=True) == "the cafe 학교에 갔다", "Hangul stays whole"
    assert shown("THE CAFÉ", lowercase=True, strip_accents=True) == "the cafe"


@pytest.mark.parametrize("chosen", LEARNT, ids=repr)
def test_a_vocabulary_that_the_text_can_not_give(chosen: ByteBpeConfig | UnigramConfig) -> None:
    make = type(chosen)
    with pytest.raises(TokenizerError, match="is too large: this text gives") as caught:
        train_tokenizer(SAMPLE, make(vocab_size=50_000))
    size = int(caught.value.hint.split("vocab_size=")[1].split(",")[0])
    assert train_tokenizer(SAMPLE, make(vocab_size=size)).size == size
    with pytest.raises(TokenizerError):
        train_tokenizer([""], make(vocab_size=300))


def test_the_smallest_vocabulary_of_bytes_is_named() -> None:
    with pytest.raises(TokenizerError, match="261 tokens") as caught:
        train_tokenizer(["word"], ByteBpeConfig())
    assert (
        "vocab_size=261" in caught.value.hint and train_tokenizer(["word"], ByteBpeConfig(vocab_size=261)).size == 261
    )


def test_the_space_before_a_text_is_known_where_text_has_none() -> None:
    tokenizer = train_tokenizer(["ACGT" * 30 + "TTAGGC" * 30], UnigramConfig(vocab_size=12))
    encoded = tokenizer.encode("TTAGGCACGT")
    assert not encoded.characters_unknown and tokenizer.unknown_id not in encoded.ids
    assert TokenFormatter(tokenizer).display(int(encoded.ids[0])) == "␣" and encoded.marks.tolist()[:2] == [3, 0]


def test_what_settings_refuse() -> None:
    with pytest.raises(RecipeError, match="260") as caught:
        ByteBpeConfig(vocab_size=260)
    assert caught.value.location == "vocab_size" and "261" in caught.value.hint
    with pytest.raises(TokenizerError, match="lack"):
        train_tokenizer(SAMPLE, ByteConfig(special_tokens=("[UNK]",)))
    with pytest.raises(TokenizerError, match="lack"):
        train_tokenizer(SAMPLE, UnigramConfig(vocab_size=250, special_tokens=("[MASK]",)))
    assert train_tokenizer(SAMPLE, ByteConfig(special_tokens=("[MASK]",))).unknown_id is None


def test_the_sample_is_limited_and_progress_reported() -> None:
    for chosen in (ByteBpeConfig(vocab_size=262, max_train_chars=50), UnigramConfig(vocab_size=8, max_train_chars=50)):
        reports: list[tuple[str, float]] = []
        texts = ["ab " * 20, "zz " * 400_000]
        tokenizer = train_tokenizer(texts, chosen, lambda *report, reports=reports: reports.append(report))
        assert reports == sorted(reports) and all(0 <= share <= 1 for _, share in reports)
        assert "zz" not in tokenizer.to_json()


def test_every_kind_stands_in_a_recipe() -> None:
    for tokenizer in (*LEARNT, ByteConfig(), CharacterConfig(), FileTokenizerConfig("file", Path("a/b"))):
        tree = {"tokenizer": build_config(DataConfig, {"tokenizer": {"kind": tokenizer.kind} | (
            {"path": "a/b"} if tokenizer.kind == "file" else {})}, "x").tokenizer}  # fmt: skip
        assert tree["tokenizer"].kind == tokenizer.kind
        assert f'kind = "{tokenizer.kind}"' in dump_config(DataConfig(tokenizer=tokenizer))


def test_a_file_without_a_mask_or_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    built.save(str(file))
    with pytest.raises(TokenizerError, match="no mask token") as caught:
        train_tokenizer([], FileTokenizerConfig("file", file))
    assert "add_special_tokens" in caught.value.hint and str(file) == caught.value.location
    built.add_special_tokens(["<blank>"])
    built.save(str(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<blank>"}}))
    opened = train_tokenizer([], FileTokenizerConfig("file", tmp_path))
    assert opened.id_to_token(opened.mask_id) == "<blank>" and opened.role_id("mask_token") == opened.mask_id
    assert opened.role_id("cls_token") is None
    file.write_text("not JSON")
    with pytest.raises(TokenizerError, match="read this tokenizer"):
        train_tokenizer([], FileTokenizerConfig("file", tmp_path))


def test_letters_of_a_mask_in_a_file_that_looks_for_it(tmp_path: Path) -> None:
    tokens = [("<unk>", 0.0), ("<mask>", 0.0), *((letter, -2.0) for letter in "▁abkms<>")]
    built = tokenizers.Tokenizer(tokenizers.models.Unigram(tokens, unk_id=0))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    built.add_special_tokens(["<unk>", "<mask>"])
    built.save(str(tmp_path / "tokenizer.json"))
    opened = Tokenizer.load(tmp_path)
    assert opened.mask_id == 1
    assert 1 not in opened.encode("a <mask> b").ids and 1 in opened.encode("a <mask> b", specials_in_text=True).ids
    assert opened.encode("ab mask").ids.tolist() == opened.encode("ab mask", specials_in_text=True).ids.tolist()
