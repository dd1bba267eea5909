"""Room card: which tokens start words and sentences.

Comes in: a text, the characters that each of its tokens stands for, a rule. Goes out: a mark for each token. Called by:
tokenizer.

A token starts a word where the first of its characters that is no white space does, or where a word starts in what the
normaliser took away before it; one that begins within a character of the token before it (its further bytes) starts
none. So the tokens from one start to the next stand for exactly one word; or, where a token holds characters of several
words, for whole neighbouring ones.
A piece of nothing but a space starts the word after it, in a tokenizer whose pieces carry the space before them: else
the shape of a word that is hidden could be seen from what is left before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import tokenizers
from jaxtyping import Bool, Int, UInt8
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, processors

from unmask.core.errors import TokenizerError
from unmask.core.files import digest, read_json, write_json, write_text
from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START
from unmask.tokenization.extend import extended
from unmask.tokenization.normalization import (
    META,
    leading_space,
    normalizer_of,
    pre_tokenizer_of,
    splits_at_spaces,
    without_specials,
)
from unmask.tokenization.settings import (
    LONGEST_WORD,
    MASK,
    PREFIX,
    UNKNOWN,
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    ExtendedTokenizerConfig,
    FileTokenizerConfig,
    Progress,
    TokenizerConfig,
    TrainedConfig,
    UnigramConfig,
    WordPieceConfig,
    check_specials,
)
from unmask.tokenization.trainers import choose_characters, choose_wordpieces, spell_bytes, train_bpe
from unmask.tokenization.unigram import train_unigram
from unmask.tokenization.words import WordsRule, sentence_starts, white_space, word_starts


def token_marks(
    text: str, offsets: Int[np.ndarray, "N 2"], rule: WordsRule, space_N: Bool[np.ndarray, "N"]
) -> UInt8[np.ndarray, "N"]:
    """The bits WORD_START and SENTENCE_START of each token; `space_N` are pieces of only the space before a word."""
    marks = np.zeros(len(offsets), dtype=np.uint8)
    visible = np.flatnonzero(~white_space(text))
    if not len(offsets) or not len(visible):
        return marks
    last_N = np.maximum.accumulate(offsets[:, 1])
    end_N = np.concatenate([[0], last_N[:-1]])  # of the token before
    shares_N, first_N = offsets[:, 0] < end_N, np.maximum(offsets[:, 0], end_N)
    order_N = np.searchsorted(visible, first_N)
    seen_N = visible[np.minimum(order_N, len(visible) - 1)]  # the first visible character from there on
    holds_N = (order_N < len(visible)) & (seen_N < last_N)
    before_N = np.concatenate([[0], np.maximum.accumulate(np.where(holds_N, last_N, 0))[:-1]])
    for starts, bit in ((word_starts(text, rule), WORD_START), (sentence_starts(text), SENTENCE_START)):
        counted = np.concatenate([[0], np.cumsum(starts)])
        at_N = holds_N & ~shares_N & (counted[seen_N + 1] > counted[before_N])
        led_N = np.append(space_N[:-1] & ~holds_N[:-1] & at_N[1:], False)
        at_N[1:] &= ~led_N[:-1]
        marks[at_N | led_N] |= bit
    return marks


_FILE: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"
_ROLES: Final = {  # what a piece is for -> what it is called where no configuration says so
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": (UNKNOWN, "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True)
class Encoded:
    """A text as its tokens, without special pieces around it."""

    ids: Int[np.ndarray, "N"]  # int64
    marks: UInt8[np.ndarray, "N"]  # bits WORD_START, SENTENCE_START, SPECIAL
    offsets: Int[np.ndarray, "N 2"]  # characters [first, last) of the text that each token stands for
    characters_unknown: int  # characters that became [UNK]


def train_tokenizer(texts: Iterable[str], settings: TokenizerConfig, progress: Progress | None = None) -> Tokenizer:
    """Learn a vocabulary from text, byte for byte the same in every process; or open a file, which reads no text.

    Args:
        texts: what is learnt from; at most `max_train_chars` of it, where the kind has such a setting.
        settings: the kind and its size.
        progress: told what is done and which share of it is, while text is fed.

    Raises:
        TokenizerError: the settings lack [UNK] or [MASK], ask for more pieces than the text gives, or name a file that
            is no tokenizer.
    """
    if isinstance(settings, FileTokenizerConfig):
        return Tokenizer.load(settings.path)
    if isinstance(settings, ExtendedTokenizerConfig):
        base = Tokenizer.load(settings.path)
        return base.changed(extended(base.to_json(), texts, settings, progress))
    check_specials(settings)
    built = tokenizers.Tokenizer(_learn(texts, settings, progress))
    built.normalizer, built.pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    built.decoder = _decoder_of(settings)
    # Where pieces carry the space before them, a mask takes it too: it stands for such a piece.
    takes_space = isinstance(settings, ByteBpeConfig | UnigramConfig)
    built.add_special_tokens(
        [
            AddedToken(piece, special=True, normalized=False, lstrip=takes_space and piece == MASK)
            for piece in settings.special_tokens
        ]
    )
    if {"[CLS]", "[SEP]"} <= set(settings.special_tokens):
        built.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(piece, built.token_to_id(piece)) for piece in ("[CLS]", "[SEP]")],
        )
    return Tokenizer(built)


def _learn(texts: Iterable[str], settings: TrainedConfig, progress: Progress | None) -> models.Model:
    if isinstance(settings, ByteBpeConfig):
        return train_bpe(texts, settings, progress)
    if isinstance(settings, ByteConfig):
        return spell_bytes(settings)
    if isinstance(settings, UnigramConfig):
        return train_unigram(texts, settings, progress)
    if isinstance(settings, CharacterConfig):
        characters = choose_characters(texts, settings)
        return models.WordLevel({piece: number for number, piece in enumerate(characters)}, unk_token=UNKNOWN)
    pieces = choose_wordpieces(texts, settings, progress)
    return models.WordPiece(
        {piece: number for number, piece in enumerate(pieces)},
        unk_token=UNKNOWN,
        continuing_subword_prefix=PREFIX,
        max_input_chars_per_word=LONGEST_WORD,
    )


def _decoder_of(settings: TrainedConfig) -> decoders.Decoder:
    if isinstance(settings, WordPieceConfig):
        return decoders.WordPiece(prefix=PREFIX)
    if isinstance(settings, CharacterConfig):
        return decoders.Fuse()
    if isinstance(settings, UnigramConfig):
        return decoders.Metaspace(replacement=META, prepend_scheme="first", split=False)
    return decoders.ByteLevel()


class Tokenizer:
    """A tokenizer of the tokenizers library, with the roles of its special pieces."""

    def __init__(self, inner: tokenizers.Tokenizer, roles: Mapping[str, str] | None = None) -> None:
        """`roles` says which piece is the "mask_token", "cls_token" and so on; without it, by their usual names.

        Raises:
            TokenizerError: it has no mask.
        """
        inner.no_padding()
        inner.no_truncation()
        self._json = inner.to_str()
        self._marked = inner  # reads "[MASK]" as the special piece
        self._plain = tokenizers.Tokenizer.from_str(without_specials(self._json))
        self._plain.encode_special_tokens = True  # spells it as letters
        given = roles or {}
        usual = {
            role: next((name for name in names if inner.token_to_id(name) is not None), None)
            for role, names in _ROLES.items()
        }
        self._roles = {role: name for role in _ROLES if (name := given.get(role, usual[role])) is not None}
        if "mask_token" not in self._roles or self.token_to_id(self._roles["mask_token"]) is None:
            raise TokenizerError(
                "this tokenizer has no piece for a mask",
                hint='name it in tokenizer_config.json beside tokenizer.json ("mask_token": ...), or add one: '
                'AutoTokenizer.from_pretrained(FOLDER), then add_special_tokens({"mask_token": "[MASK]"}) and '
                "save_pretrained(FOLDER)",
            )
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        added = cast("Mapping[int, AddedToken]", inner.get_added_tokens_decoder())
        special = {number for number, token in added.items() if token.special}
        special |= {vocabulary[name] for name in self._roles.values() if name in vocabulary}
        self.special_ids: tuple[int, ...] = tuple(sorted(special))
        self.regular_token_ids: NDArray[np.int64] = np.array(sorted(set(vocabulary.values()) - special), dtype=np.int64)
        self._special_V = np.zeros(self.size, dtype=bool)
        self._special_V[list(self.special_ids)] = True

    @property
    def mask_id(self) -> int:
        """The id of [MASK]."""
        return cast("int", self.role_id("mask_token"))

    @property
    def mask_takes_space(self) -> bool:
        """Whether [MASK] in a text swallows the space before it, because it stands for a piece that has one."""
        added = cast("Mapping[int, AddedToken]", self._marked.get_added_tokens_decoder())
        return self.mask_id in added and bool(added[self.mask_id].lstrip)

    @property
    def unknown_id(self) -> int | None:
        """The id of [UNK]; None for a tokenizer that can spell everything."""
        return self.role_id("unk_token")

    @property
    def cls_sep_ids(self) -> tuple[int, int] | None:
        """The ids of [CLS] and [SEP] that a text is set between, where both exist."""
        first, last = self.role_id("cls_token"), self.role_id("sep_token")
        return None if first is None or last is None else (first, last)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the whole tokenizer."""
        return digest(self._json)

    def role_id(self, role: str) -> int | None:
        """The id of the piece for pad_token, unk_token, cls_token, sep_token or mask_token, where it has one."""
        return self.token_to_id(self._roles[role]) if role in self._roles else None

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether encoding a text equals joining the encodings of its pieces, cut before single spaces.

        The spaces meant stand between two visible characters, and each piece keeps the one before it.
        """
        return splits_at_spaces(self._json)

    @cached_property
    def _space_id(self) -> int:
        """The piece that is only the space before a word, where pieces carry theirs; else none."""
        piece = leading_space(self._json)
        found = self.token_to_id(piece) if piece else None
        return -1 if found is None else found

    def token_to_id(self, piece: str) -> int | None:
        """The id of a piece, or None where the vocabulary has no such piece."""
        return self._marked.token_to_id(piece)

    def id_to_token(self, id: int) -> str:
        """The piece of an id.

        Raises:
            TokenizerError: no piece has this id.
        """
        piece = self._marked.id_to_token(id) if id >= 0 else None
        if piece is None:
            raise TokenizerError(f"no piece has the id {id}", hint=f"ids run from 0 to {self.size - 1}")
        return piece

    def encode(self, text: str, words: WordsRule = "spaces", *, specials_in_text: bool = False) -> Encoded:
        """The tokens of a text; "[MASK]" in it is the special piece only where `specials_in_text`."""
        return self._encode([text], words, self._marked if specials_in_text else self._plain)[0]

    def encode_batch(self, texts: Sequence[str], words: WordsRule = "spaces") -> list[Encoded]:
        """The tokens of several texts, on several threads."""
        return self._encode(list(texts), words, self._plain)

    def _encode(self, texts: list[str], words: WordsRule, inner: tokenizers.Tokenizer) -> list[Encoded]:
        encodings = inner.encode_batch(texts, add_special_tokens=False)
        return [self._encoded(text, encoding, words) for text, encoding in zip(texts, encodings, strict=True)]

    def _encoded(self, text: str, encoding: tokenizers.Encoding, words: WordsRule) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(ids))
        offsets = flat.reshape(-1, 2)
        marks = token_marks(text, offsets, words, ids == self._space_id)
        marks[self._special_V[ids]] |= SPECIAL
        unknown = offsets[ids == self.unknown_id] if self.unknown_id is not None else offsets[:0]
        return Encoded(ids, marks, offsets, int((unknown[:, 1] - unknown[:, 0]).sum()))

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_specials: bool = True) -> str:
        """The text of ids."""
        return self._marked.decode([int(number) for number in ids], skip_special_tokens=skip_specials)

    def add_special_tokens(
        self, ids: NDArray[np.integer[Any]], marks: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The ids and marks of a text between [CLS] and [SEP], where there are such pieces."""
        if self.cls_sep_ids is None:
            return ids.astype(np.int64), marks
        first, last = self.cls_sep_ids
        edge = np.array([SPECIAL], dtype=np.uint8)
        return np.concatenate([[first], ids, [last]]).astype(np.int64), np.concatenate([edge, marks, edge])

    def to_json(self) -> str:
        """The whole tokenizer as tokenizer.json holds it."""
        return self._json

    def changed(self, tokenizer_json: str) -> Tokenizer:
        """Another tokenizer, whose special pieces have the same roles as this one's."""
        return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json), self._roles)

    def save(
        self,
        folder: Path,
        *,
        inputs: Sequence[str] = ("input_ids", "attention_mask"),
        longest: int | None = None,
    ) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        `inputs` are what the model's forward takes (classic BERT adds "token_type_ids", which the modern one refuses);
        `longest` is the model's context in tokens.
        """
        config: dict[str, Any] = {
            # With BertTokenizer* version 5 of transformers throws away the normaliser; TokenizersBackend is not in 4.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": list(inputs),
            "clean_up_tokenization_spaces": False,
            **self._roles,
        }
        if longest is not None:
            config["model_max_length"] = longest
        write_text(folder / _FILE, self._json)
        write_json(folder / _CONFIG, config)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Open a tokenizer.json, or a folder with one, be it ours or made by transformers.

        Raises:
            TokenizerError: there is none, it can't be read, or it has no mask.
        """
        path = Path(path)
        file = path / _FILE if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                "there is no tokenizer here", location=str(file), hint="give a folder that holds a tokenizer.json"
            )
        try:
            inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises nothing more exact
            raise TokenizerError(
                f"this tokenizer can't be read: {error}", location=str(file), hint="restore it from a copy"
            ) from error
        try:
            return cls(inner, roles_in(file.parent))
        except TokenizerError as error:
            raise TokenizerError(error.message, location=error.location or str(file), hint=error.hint) from error


def roles_in(folder: Path) -> dict[str, str]:
    """Which piece plays which role, as the configuration beside a tokenizer.json says."""
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        if (folder / name).is_file():
            told = cast("Mapping[str, Any]", read_json(folder / name))
            if not isinstance(told, dict):
                raise TokenizerError("no table of settings", location=str(folder / name), hint="restore it from a copy")
            for role in _ROLES:
                piece = told.get(role)
                content = cast("Any", piece["content"]) if isinstance(piece, dict) else piece
                if isinstance(content, str):
                    roles[role] = content
    return roles
