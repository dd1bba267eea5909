"""Tokenizers: the same bytes in every process, the same ids in transformers, marks that belong to the text."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from unmask.core.errors import TokenizerError
from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START
from unmask.tokenization.analysis import TokenFormatter
from unmask.tokenization.fast_encode import CachedEncoder
from unmask.tokenization.settings import CharacterConfig, TokenizerConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

ENGLISH = "The cat sat on the mat, and the dog sat on the log. A naïve café! They said so — didn't they? "
KOREAN = "나는 학교에 갔다. 너는 학교에 가고, 우리는 집에 있다. "
CHINESE = "天氣很好，我們去公園。他說：「好！」 "  # noqa: RUF001
SPEECH = (ENGLISH + KOREAN + CHINESE) * 20 + "\n🙂👍🏽 done\n"
DRAW = random.Random(0)
WORDS = ["".join(DRAW.choices("abcdefghstan", k=DRAW.randint(2, 7))) for _ in range(300)]
SAMPLE = [SPEECH + " ".join(DRAW.choices(WORDS, k=3000))]
SPEECHES = [ENGLISH, KOREAN, "line one\nline two\n\n\tend", "smile 🙂👍🏽 é é", CHINESE, "q" * 200, "\u0631 x\x00y", ""]


@pytest.fixture(
    scope="module", params=[WordPieceConfig(vocab_size=300), CharacterConfig()], ids=lambda value: value.kind
)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(SAMPLE, request.param)


PROGRAM = """
import random, sys
from pathlib import Path
from unmask.tokenization.tokenizer import *
draw = random.Random(0)
words = ["".join(draw.choices("abcdefgh한국어學", k=draw.randint(1, 6))) for _ in range(900)]
texts = [" ".join(draw.choices(words, k=200)) for _ in range(60)]
learnt = [make(vocab_size=size) for make in (WordPieceConfig, UnigramConfig) for size in (100, 500)]
for settings in (ByteBpeConfig(vocab_size=700), ByteConfig(), CharacterConfig(), *learnt):
    print(train_tokenizer(texts, settings).to_json())
train_tokenizer(texts, settings).save(Path(sys.argv[1]))
"""


def test_two_processes_make_the_same_bytes(tmp_path: Path) -> None:
    running: list[subprocess.Popen[bytes]] = []
    for number, threads in (("1", "1"), ("2", "4")):
        environment = os.environ | {"PYTHONHASHSEED": number, "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / number)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    first, second = (process.communicate()[0] for process in running)
    assert first == second and first.count(b"\n") >= 7 and not any(process.returncode for process in running)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path, longest=64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == tokenizer.mask_id and theirs.unk_token_id == tokenizer.unknown_id
    assert len(theirs) == tokenizer.size and theirs.model_max_length == 64
    for text in [*SPEECHES, "The [MASK] sat"]:
        encoded = tokenizer.encode(text, specials_in_text=True)
        framed, _ = tokenizer.add_special_tokens(encoded.ids, encoded.marks)
        assert theirs(text)["input_ids"] == framed.tolist()
        assert theirs.decode(framed, skip_special_tokens=True) == tokenizer.decode(framed)
    assert set(theirs("x")) == {"input_ids", "attention_mask"}
    theirs.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode(ENGLISH).ids.tolist() == tokenizer.encode(ENGLISH).ids.tolist()
    assert (again.mask_id, again.cls_sep_ids, again.special_ids) == (
        tokenizer.mask_id,
        tokenizer.cls_sep_ids,
        tokenizer.special_ids,
    )


def test_saving_and_loading(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(place)
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.to_json() == tokenizer.to_json()
        assert loaded.mask_id == tokenizer.mask_id and loaded.cls_sep_ids == tokenizer.cls_sep_ids
    with pytest.raises(TokenizerError, match="no tokenizer found"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json()[:100])
    with pytest.raises(TokenizerError, match="read this tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_parts_of_a_vocabulary(tokenizer: Tokenizer) -> None:
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert tokenizer.special_ids == (0, 1, 2, 3, 4) == tuple(tokenizer.token_to_id(name) for name in names)
    assert tokenizer.cls_sep_ids == (2, 3) and tokenizer.mask_id == 4 and tokenizer.unknown_id == 1
    assert tokenizer.regular_token_ids.tolist() == list(range(5, tokenizer.size))
    assert all(tokenizer.token_to_id(tokenizer.id_to_token(id)) == id for id in range(tokenizer.size))
    assert tokenizer.token_to_id("no such token") is None
    for id in (-1, tokenizer.size):
        with pytest.raises(TokenizerError):
            tokenizer.id_to_token(id)


def test_a_mask_in_training_text_is_letters(tokenizer: Tokenizer) -> None:
    text = "The [MASK] sat [SEP]"
    assert not set(tokenizer.encode(text).ids.tolist()) & (set(tokenizer.special_ids) - {tokenizer.unknown_id})
    assert not set(tokenizer.encode_batch([text])[0].ids.tolist()) & {tokenizer.mask_id, 3}
    prompt = tokenizer.encode(text, specials_in_text=True)
    assert prompt.ids.tolist().count(tokenizer.mask_id) == 1
    assert prompt.marks[prompt.ids == tokenizer.mask_id].tolist()[0] & SPECIAL


def test_a_token_of_characters_is_the_character() -> None:
    tokenizer = train_tokenizer(["ab\na \n"], CharacterConfig())
    assert [tokenizer.id_to_token(id) for id in range(5, tokenizer.size)] == ["\n", "a", " ", "b"]
    assert tokenizer.decode(tokenizer.encode("b a\nb").ids) == "b a\nb"
    encoded = tokenizer.encode("axb")
    assert encoded.characters_unknown == 1 and encoded.ids[1] == tokenizer.unknown_id


def test_marks_and_offsets() -> None:
    tokenizer = train_tokenizer(SAMPLE, WordPieceConfig(vocab_size=300))
    text = "The catlog sat. didn't ﷲﷲ they?"
    encoded = tokenizer.encode(text)
    words, sentences = ([text[first:last] for (first, last), mark in zip(encoded.offsets, encoded.marks, strict=True)
                         if mark & bit] for bit in (WORD_START, SENTENCE_START))  # fmt: skip
    assert "".join(words) != text and len(words) == 10  # The catlog sat . didn ' t ﷲﷲ they ?
    assert [word[0] for word in sentences] == ["T", "d"]
    unknown = (encoded.marks & SPECIAL) > 0
    assert (unknown == (encoded.ids == tokenizer.unknown_id)).all() and encoded.characters_unknown == 2
    assert len(encoded.ids) == len(encoded.marks) == len(encoded.offsets) > len(words)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("The cat.sat 나는天氣好!\n\t🙂éx"), max_size=80))
def test_marks_agree_with_each_other(tokenizer: Tokenizer, text: str) -> None:
    for rule in ("spaces", "characters"):
        encoded = tokenizer.encode(text, rule)
        starts = np.concatenate([np.arange(first, last) for first, last in encoded.offsets] or [np.zeros(0)])
        assert len(starts) == len(set(starts.tolist())), "offsets overlap"
        assert ((encoded.marks & SPECIAL) > 0).tolist() == np.isin(encoded.ids, tokenizer.special_ids).tolist()
        sentence, word = encoded.marks & SENTENCE_START > 0, encoded.marks & WORD_START > 0
        assert sentence.any() == word.any() == bool(text.strip()) and not (sentence & ~word).any()


@pytest.mark.parametrize("kind", [WordPieceConfig, CharacterConfig])
@pytest.mark.parametrize("specials", [("[UNK]",), ("[MASK]", "[PAD]"), ("[UNK]", "[MASK]", "[MASK]")])
def test_specials_that_are_needed(kind: type[TokenizerConfig], specials: tuple[str, ...]) -> None:
    with pytest.raises(TokenizerError) as caught:
        train_tokenizer(SAMPLE, kind(special_tokens=specials))
    assert caught.value.location == "data.tokenizer.special_tokens"


def test_a_tokenizer_without_a_frame() -> None:
    tokenizer = train_tokenizer(SAMPLE, WordPieceConfig(vocab_size=300, special_tokens=("[UNK]", "[MASK]")))
    encoded = tokenizer.encode(ENGLISH)
    assert tokenizer.cls_sep_ids is None and tokenizer.size == 300
    assert tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist() == encoded.ids.tolist()


def test_a_vocabulary_that_the_text_can_not_give() -> None:
    with pytest.raises(TokenizerError, match="is too large: this text gives") as caught:
        train_tokenizer(SAMPLE, WordPieceConfig(vocab_size=20_000))
    size = int(caught.value.hint.split("vocab_size=")[1].split(",")[0])
    assert train_tokenizer(SAMPLE, WordPieceConfig(vocab_size=size)).size == size
    for text in ("", "a b c"):
        with pytest.raises(TokenizerError, match="no tokens"):
            train_tokenizer([text], WordPieceConfig(vocab_size=100))


@pytest.mark.parametrize("vocab", [40, 100, 250])
def test_a_vocabulary_has_the_requested_size(vocab: int) -> None:
    tokenizer = train_tokenizer(SAMPLE, WordPieceConfig(vocab_size=vocab))
    assert tokenizer.size == vocab and len(set(tokenizer.regular_token_ids.tolist())) == vocab - 5


def test_lower_case_and_the_sample(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SAMPLE, WordPieceConfig(vocab_size=250, lowercase=True))
    assert tokenizer.encode("THE").ids.tolist() == tokenizer.encode("the").ids.tolist()
    short = WordPieceConfig(vocab_size=60, max_train_chars=1500)
    cut = train_tokenizer([SAMPLE[0][:1500]], short)
    assert train_tokenizer([SAMPLE[0][:1000], SAMPLE[0][1000:]], short).size == cut.size
    assert train_tokenizer(iter([SAMPLE[0][:1500], "zzz " * 500]), short).token_to_id("z") is None


LETTERS = "abcdefghijklmnopqrstuvwxyz"
AS_WORDS = {"[UNK]": 0, **{letter: number for number, letter in enumerate(LETTERS, start=1)}}


Change = Callable[[dict[str, Any]], object]


def wordpiece_file(folder: Path, change: Change, config: object = None) -> Path:
    """Write a small WordPiece whose special tokens have ids after the model's, with a change of tokenizer.json."""
    inner = tokenizers.Tokenizer(models.WordPiece(AS_WORDS, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "<bos>", "<eos>"])
    spec = json.loads(inner.to_str())
    change(spec)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CONTRADICTIONS: list[tuple[Change, object, str]] = [
    (lambda spec: spec["model"]["vocab"].update(new=33), None, "has the id 27 in tokenizer.json, but"),
    (lambda spec: spec["added_tokens"][0].update(id=99), None, "has the id 99 in tokenizer.json, but"),
    (lambda spec: spec["model"]["vocab"].update(new=2**31), None, "'new' has the id 2147483648, expected at most"),
    (lambda spec: spec["model"]["vocab"].update(new=26), None, "'z' and 'new' have the same id 26"),
    (lambda spec: None, {"cls_token": "<cls>"}, "the cls_token is '<cls>', which the vocabulary doesn't contain"),
    (lambda spec: None, {"mask_token": "<m>"}, "'<m>' is not in the vocabulary"),
    (lambda spec: spec["model"].update(unk_token="<gone>"), None, "fails at unknown characters"),
    (lambda spec: spec.update(post_processor=template("<bos> $A", 5)), None, "'<bos>' with the id 5"),
    (lambda spec: spec.update(post_processor=template("<bos> $A $A", 31)), None, "exactly once"),
]


@pytest.mark.parametrize(("change", "config", "words"), CONTRADICTIONS)
def test_contradictions_in_a_file_are_refused(tmp_path: Path, change: Change, config: object, words: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(words)):
        Tokenizer.load(wordpiece_file(tmp_path / "t", change, config))


def template(single: str, id: int, pair: str = "$A $B:1") -> dict[str, Any]:
    built = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[("<bos>", id), ("<eos>", 32)])
    return json.loads(built.__getstate__())


@pytest.mark.parametrize("single", ["<bos> $A <eos>", "<bos> <bos> $A", "$A <eos> <eos>", "$A"])
def test_frame_of_the_post_processor(tmp_path: Path, single: str) -> None:
    pair = "<bos> $A <eos> <eos> $B:1 <eos>:1"
    folder = wordpiece_file(tmp_path / "t", lambda spec: spec.update(post_processor=template(single, 31, pair)))
    tokenizer, library = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode("a b c")
    ids, flags = tokenizer.add_special_tokens(encoded.ids, encoded.marks)
    expected = library.encode("a b c")
    assert ids.tolist() == expected.ids and (flags & SPECIAL != 0).tolist() == [
        mask == 1 for mask in expected.special_tokens_mask
    ]
    assert tokenizer.num_special_tokens() == len(ids) - 3 and tokenizer.frame.pair == ((31,), (32, 32), (32,))
    assert not {*tokenizer.frame.before, *tokenizer.frame.after} & set(tokenizer.regular_token_ids.tolist())


@pytest.mark.parametrize("kind", ["BertProcessing", "RobertaProcessing"])
def test_frame_of_bert_and_roberta(tmp_path: Path, kind: str) -> None:
    processor = getattr(processors, kind)(("<eos>", 32), ("<bos>", 31))
    spec = json.loads(processor.__getstate__())
    folder = wordpiece_file(tmp_path / "t", lambda file: file.update(post_processor=spec))
    tokenizer, library = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    a, b = (library.encode(text, add_special_tokens=False).ids for text in ("a b", "c"))
    assert tokenizer.frame.pair is not None
    before, between, after = tokenizer.frame.pair
    assert [*before, *a, *between, *b, *after] == library.encode("a b", "c").ids


def test_fingerprint_covers_the_roles(tmp_path: Path) -> None:
    configs = (None, {"cls_token": "[CLS]"}, {"cls_token": "<bos>"}, {"pad_token": "<eos>"})
    loaded = [
        Tokenizer.load(wordpiece_file(tmp_path / str(number), lambda spec: None, config))
        for number, config in enumerate(configs)
    ]
    assert loaded[0].fingerprint == loaded[1].fingerprint
    assert len({one.fingerprint for one in loaded}) == 3 and len({one.to_json() for one in loaded}) == 1


def test_dropped_characters_are_unknown() -> None:
    """A BPE without an unknown token gives no token for a letter that it lacks."""
    inner = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    inner.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[MASK]"])
    tokenizer = Tokenizer(inner)
    texts, expected = ["abc กขค", "dé", "é ก7b", ""], [3, 0, 2, 0]
    assert [tokenizer.encode(text).characters_unknown for text in texts] == expected
    assert CachedEncoder(tokenizer, "spaces").encode(texts).num_unknown.tolist() == expected


@pytest.mark.parametrize(
    ("affix", "texts", "expected"),
    [
        ({"end_of_word_suffix": "</w>"}, ["abc zzz", "zz the cat", "a b"], [1, 2, 0]),
        ({"continuing_subword_prefix": "##"}, ["abc zzz", "zz the cat", "z t"], [2, 2, 0]),
    ],
)
def test_a_letter_with_an_affix_is_another_letter(affix: dict[str, str], texts: list[str], expected: list[int]) -> None:
    """The vocabulary has all letters, but only a to j with the prefix or suffix, so "z" is dropped at some places."""
    (name, mark), *_ = affix.items()
    affixed = [letter + mark if name.startswith("end") else mark + letter for letter in LETTERS[:10]]
    vocabulary = {token: number for number, token in enumerate([*LETTERS, *affixed])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], **affix))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[MASK]"])
    tokenizer = Tokenizer(inner)
    encoded = [tokenizer.encode(text) for text in texts]
    assert [one.characters_unknown for one in encoded] == expected
    letters = [len(text.replace(" ", "")) for text in texts]
    assert [count - len(one.ids) for count, one in zip(letters, encoded, strict=True)] == expected
    assert CachedEncoder(tokenizer, "spaces").encode(texts).num_unknown.tolist() == expected


def test_an_id_without_a_token(tmp_path: Path) -> None:
    def leave_holes(spec: dict[str, Any]) -> None:
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        spec["model"]["vocab"] |= {**added, "zed": 40}

    tokenizer = Tokenizer.load(wordpiece_file(tmp_path / "t", leave_holes))
    assert tokenizer.size == 41 and not {*range(33, 40)} & set(tokenizer.regular_token_ids.tolist())
    assert TokenFormatter(tokenizer).display(35) == "⟨no token 35⟩"


def test_byte_tokens_are_displayed_as_text() -> None:
    tokens = [*LETTERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, [], byte_fallback=True))
    inner.add_special_tokens(["[MASK]"])
    tokenizer = Tokenizer(inner)
    shown = [TokenFormatter(tokenizer).display(id) for id in tokenizer.encode('a"é').ids.tolist()]
    assert shown == ["a", '"', "⟨C3⟩", "⟨A9⟩"] and tokenizer.encode("é").characters_unknown == 0


def test_the_end_of_a_word_is_no_text() -> None:
    tokens = ["h", "a", "t", "hat", "hat</w>", "</w>"]
    model = models.BPE({token: id for id, token in enumerate(tokens)}, [], end_of_word_suffix="</w>")
    inner = tokenizers.Tokenizer(model)
    inner.add_special_tokens(["[MASK]"])
    formatter = TokenFormatter(Tokenizer(inner))
    assert [formatter.display(id) for id in range(6)] == ["h", "a", "t", "hat", "hat", "</w>"]
    assert formatter.read(4).letters == "hat"
