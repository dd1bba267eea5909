"""Extended vocabularies: old ids stay, and text without new tokens is encoded as before."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.core.errors import RecipeError, TokenizerError
from unmask.tokenization.extend import extend_vocabulary, origins
from unmask.tokenization.settings import (
    ByteBpeConfig,
    CharacterConfig,
    ExtendedTokenizerConfig,
    UnigramConfig,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

ENGLISH = "the cat sat on the mat and looked at the moon while a dog ran over the hill to meet the old man . "
DOMAIN = (
    "the patient has hepatitis and hepatomegaly , an enlarged liver . hepatocytes of the patient were enlarged , "
    "cirrhosis , splenomegaly , gastritis . "
)
KOREAN = "고양이가 매트 위에 앉아 있다 . 고양이가 달을 보았다 . 개가 언덕을 넘어 달렸다 . "
KINDS = {"wordpiece": WordPieceConfig(vocab_size=70), "bpe": ByteBpeConfig(vocab_size=300)}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    train_tokenizer([ENGLISH] * 20, KINDS[request.param]).save(folder)
    return folder


def extended(base: Path, text: str, count: int) -> tuple[Tokenizer, Tokenizer]:
    settings = ExtendedTokenizerConfig("extended", base, count)
    return Tokenizer.load(base), train_tokenizer([text] * 20, settings)


@pytest.mark.parametrize("text", [DOMAIN, KOREAN])
def test_new_tokens_follow_the_old_ones_and_shorten_the_text(base: Path, text: str) -> None:
    old, new = extended(base, text, 14)
    assert new.size == old.size + 14
    assert [new.id_to_token(number) for number in range(old.size)] == [
        old.id_to_token(number) for number in range(old.size)
    ]
    assert (new.mask_id, new.unknown_id, new.cls_sep_ids, new.special_ids) == (
        old.mask_id, old.unknown_id, old.cls_sep_ids, old.special_ids,
    )  # fmt: skip
    before, after = old.encode(text), new.encode(text)
    assert after.characters_unknown <= before.characters_unknown
    known = before.characters_unknown == 0
    assert len(after.ids) < len(before.ids) if known else after.characters_unknown < before.characters_unknown
    assert (after.ids >= old.size).any() and new.decode(new.encode(ENGLISH).ids) == old.decode(old.encode(ENGLISH).ids)


def test_text_without_the_letters_of_new_tokens_is_encoded_as_before(base: Path) -> None:
    old, new = extended(base, DOMAIN, 14)
    tokens = [new.id_to_token(number).removeprefix("##").removeprefix("Ġ") for number in range(old.size, new.size)]

    @settings(max_examples=80, deadline=None)
    @given(
        st.lists(
            st.sampled_from(["cat", "sat", "mat", "dog", "hill", "moon", "hepat", "itis", "liver", "고양이", "zq"])
        )
    )
    def law(words: list[str]) -> None:
        text = " ".join(words)
        if not any(token in text for token in tokens):
            assert new.encode(text).ids.tolist() == old.encode(text).ids.tolist()

    law()
    assert sum(token not in " ".join(ENGLISH.split()[:6]) for token in tokens) > 7, "the law is not empty"


def test_a_new_token_consists_of_older_ones(base: Path) -> None:
    for text in (DOMAIN, KOREAN):
        old, new = extended(base, text, 14)
        parts = origins(old.to_json(), new.to_json())
        assert len(parts) == 14
        for number, tokens in enumerate(parts, start=old.size):
            letters = [new.id_to_token(token).removeprefix("##") for token in tokens]
            body = new.id_to_token(number).removeprefix("##")
            assert "".join(letters) == body if tokens else len(body) == 1
            assert all(token < number for token in tokens)


def test_the_same_text_gives_the_same_tokens(base: Path) -> None:
    first = extended(base, DOMAIN, 15)[1].to_json()
    assert extended(base, DOMAIN, 15)[1].to_json() == first


def test_older_files_write_merges_as_texts(tmp_path: Path) -> None:
    train_tokenizer([ENGLISH] * 20, KINDS["bpe"]).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    file.write_text(json.dumps(content))
    old, new = extended(tmp_path, DOMAIN, 10)
    assert len(new.encode(DOMAIN).ids) < len(old.encode(DOMAIN).ids)
    assert all(origins(old.to_json(), new.to_json()))


@pytest.mark.parametrize("kind", [UnigramConfig(vocab_size=60), CharacterConfig()])
def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path, kind: UnigramConfig | CharacterConfig) -> None:
    train_tokenizer([ENGLISH] * 20, kind).save(tmp_path)
    with pytest.raises(TokenizerError, match="can't extend"):
        extended(tmp_path, DOMAIN, 10)


def test_more_than_the_text_gives_is_refused_with_what_it_gives(base: Path) -> None:
    with pytest.raises(TokenizerError, match="but this text gives") as refused:
        extended(base, DOMAIN, 5000)
    assert "or less" in refused.value.hint
    with pytest.raises(RecipeError, match="num_new_tokens: got 0"):
        ExtendedTokenizerConfig("extended", base, 0)


def test_learning_ends_where_words_come_once(base: Path) -> None:
    letters = random.Random(7)
    once = " ".join("".join(letters.choices("abcdefgh", k=9)) for _ in range(50))
    with pytest.raises(TokenizerError, match="gives 0 new tokens"):
        train_tokenizer([once], ExtendedTokenizerConfig("extended", base, 10))


def test_added_tokens_keep_their_ids(base: Path, tmp_path: Path) -> None:
    """Tokens that are added after training, as by add_tokens of transformers, are not in the model's vocabulary."""
    inner = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    inner.add_tokens([tokenizers.AddedToken("covid19", single_word=True), "newword"])
    inner.add_special_tokens(["<entity>"])
    Tokenizer(inner).save(tmp_path)
    old, new = extended(tmp_path, DOMAIN, 8)
    before, after = vocabulary(old), vocabulary(new)
    assert before.items() <= after.items() and len(set(after.values())) == len(after) == len(before) + 8
    new.save(tmp_path / "new")
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert auto.get_vocab() == after
    auto.save_pretrained(tmp_path / "again")
    assert vocabulary(Tokenizer.load(tmp_path / "again")) == after
    text = "the cat sat <entity> newword"
    ids = [one.encode(text, specials_in_text=True).ids.tolist() for one in (old, new)]
    assert ids[0] == ids[1] and old.token_to_id("<entity>") in ids[0]
    parts = origins(old.to_json(), new.to_json())
    assert len(parts) == 8 and max(id for ids in parts for id in ids) < new.size
    twice = extended(tmp_path / "new", KOREAN, 3)[1]
    assert after.items() <= vocabulary(twice).items()


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizers.Tokenizer.from_str(tokenizer.to_json()).get_vocab(with_added_tokens=True)


def test_an_added_token_that_would_match_inside_a_word_is_refused() -> None:
    """WordPiece has no tokens for whole words only: an extension would change how "foobarly" is encoded."""
    letters = "foobarlyz"
    vocabulary = ["[UNK]", "[MASK]", *dict.fromkeys(letters), *(f"##{letter}" for letter in dict.fromkeys(letters))]
    model = tokenizers.models.WordPiece({token: id for id, token in enumerate(vocabulary)}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_tokens([tokenizers.AddedToken("foobar", single_word=True)])
    assert "foobar" not in inner.encode("foobarly").tokens
    spec = ExtendedTokenizerConfig("extended", path=Path("base"), num_new_tokens=1, min_frequency=2)
    with pytest.raises(TokenizerError, match=r"'foobarly' would become \['foobar', '##l', '##y'\]"):
        extend_vocabulary(inner.to_str(), ["foobarly foobarly " + "zz " * 20], spec, None)
    assert extend_vocabulary(inner.to_str(), ["zz " * 20], spec, None)
