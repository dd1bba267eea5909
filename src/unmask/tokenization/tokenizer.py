"""`Tokenizer`: encodes text with the `tokenizers` library and marks the tokens that start words and sentences.

A token starts a word if a word starts at its first visible character, or in text that the normalizer removed just
before it. A token that begins within a character of the token before it (the later bytes of a character) starts no
word. So the tokens from one start to the next are exactly one word, or several whole words if a token spans them.

If the vocabulary's tokens include the space before a word, a token that is only a space starts the word after it.
Otherwise the remaining space would reveal the form of a masked word.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import tokenizers
from jaxtyping import Bool, Int, UInt8
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, processors

from unmask.core.errors import TokenizerError, UnmaskError
from unmask.core.files import MAX_TOKENIZER_BYTES, RunLayout, digest, read_json, read_text, write_json, write_text
from unmask.core.types import SENTENCE_START, SPECIAL, WORD_START, ProgressCallback
from unmask.tokenization.extend import extend_vocabulary, require_ids
from unmask.tokenization.normalization import (
    META,
    Frame,
    frame_of,
    kept_letters,
    leading_space,
    model_unknown,
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
    TokenizerConfig,
    TrainedConfig,
    UnigramConfig,
    WordPieceConfig,
    check_specials,
)
from unmask.tokenization.trainers import byte_vocabulary, choose_characters, train_bpe, train_wordpiece
from unmask.tokenization.unigram import train_unigram
from unmask.tokenization.words import WordsRule, sentence_starts, white_space, word_starts


def token_marks(
    text: str, offsets: Int[np.ndarray, "N 2"], rule: WordsRule, is_space: Bool[np.ndarray, "N"]
) -> UInt8[np.ndarray, "N"]:
    """Return the bits WORD_START and SENTENCE_START of each token.

    Args:
        text: the text.
        offsets: the characters [first, last) of each token.
        rule: what a word is.
        is_space: whether each token is only the space before a word.
    """
    marks = np.zeros(len(offsets), dtype=np.uint8)
    visible = np.flatnonzero(~white_space(text))
    if not len(offsets) or not len(visible):
        return marks
    lasts = np.maximum.accumulate(offsets[:, 1])
    ends = np.concatenate([[0], lasts[:-1]])  # of the token before
    shares_character, firsts = offsets[:, 0] < ends, np.maximum(offsets[:, 0], ends)
    order = np.searchsorted(visible, firsts)
    first_visible = visible[np.minimum(order, len(visible) - 1)]
    is_visible = (order < len(visible)) & (first_visible < lasts)
    previous_ends = np.concatenate([[0], np.maximum.accumulate(np.where(is_visible, lasts, 0))[:-1]])
    for starts, bit in ((word_starts(text, rule), WORD_START), (sentence_starts(text), SENTENCE_START)):
        counts = np.concatenate([[0], np.cumsum(starts)])
        is_start = is_visible & ~shares_character & (counts[first_visible + 1] > counts[previous_ends])
        leads = np.append(is_space[:-1] & ~is_visible[:-1] & is_start[1:], False)
        is_start[1:] &= ~leads[:-1]
        marks[is_start | leads] |= bit
    return marks


_CONFIG: Final = "tokenizer_config.json"
_REASON_LENGTH: Final = 300  # characters of another library's message
_ROLES: Final = {  # role of a special token -> its usual names
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": (UNKNOWN, "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_RARE: Final = "\ua66e\U00013000\u2603\u0e51"  # hardly any vocabulary contains all of them


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text, without special tokens around it."""

    ids: Int[np.ndarray, "N"]  # int64
    marks: UInt8[np.ndarray, "N"]  # bits WORD_START, SENTENCE_START, SPECIAL
    offsets: Int[np.ndarray, "N 2"]  # characters [first, last) of each token in the text
    characters_unknown: int  # characters that became [UNK], or that no token represents


def train_tokenizer(
    texts: Iterable[str], settings: TokenizerConfig, on_progress: ProgressCallback | None = None
) -> Tokenizer:
    """Train a tokenizer, byte-identical in every process, or load one from a file without reading text.

    Args:
        texts: the training text. Kinds with `max_train_chars` read at most that many characters.
        settings: settings of the tokenizer; their type selects the kind.
        on_progress: called with the name of the stage and the fraction done while text is read.

    Raises:
        TokenizerError: the special tokens lack [UNK] or [MASK], the text yields fewer tokens than `vocab_size`, or the
            file is not a tokenizer.
    """
    if isinstance(settings, FileTokenizerConfig):
        return Tokenizer.load(settings.path)
    if isinstance(settings, ExtendedTokenizerConfig):
        base = Tokenizer.load(settings.path)
        return base.with_json(extend_vocabulary(base.to_json(), texts, settings, on_progress))
    check_specials(settings)
    built = tokenizers.Tokenizer(_learn(texts, settings, on_progress))
    built.normalizer, built.pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    built.decoder = _decoder_of(settings)
    # If tokens include the space before a word, [MASK] includes it too, since it replaces such a token.
    takes_space = isinstance(settings, ByteBpeConfig | UnigramConfig)
    built.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=takes_space and token == MASK)
            for token in settings.special_tokens
        ]
    )
    if {"[CLS]", "[SEP]"} <= set(settings.special_tokens):
        built.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, built.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    return Tokenizer(built)


def _learn(texts: Iterable[str], settings: TrainedConfig, on_progress: ProgressCallback | None) -> models.Model:
    if isinstance(settings, ByteBpeConfig):
        return train_bpe(texts, settings, on_progress)
    if isinstance(settings, ByteConfig):
        return byte_vocabulary(settings)
    if isinstance(settings, UnigramConfig):
        return train_unigram(texts, settings, on_progress)
    if isinstance(settings, CharacterConfig):
        characters = choose_characters(texts, settings)
        return models.WordLevel({token: number for number, token in enumerate(characters)}, unk_token=UNKNOWN)
    tokens = train_wordpiece(texts, settings, on_progress)
    return models.WordPiece(
        {token: number for number, token in enumerate(tokens)},
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
    """A tokenizer of the `tokenizers` library, with the roles of its special tokens."""

    def __init__(self, inner: tokenizers.Tokenizer, roles: Mapping[str, str] | None = None) -> None:
        """Wrap a tokenizer; `roles` maps "mask_token", "cls_token" and so on to tokens, by default the usual ones.

        Raises:
            TokenizerError: there is no mask token, the token of a role doesn't exist, the model fails at unknown
                characters, or the special tokens around a text can't be represented.
        """
        inner.no_padding()
        inner.no_truncation()
        self._json = inner.to_str()
        self._marked = inner  # encodes "[MASK]" as the special token
        self._plain = tokenizers.Tokenizer.from_str(without_specials(self._json))
        self._plain.encode_special_tokens = True  # encodes it as plain text
        custom = roles or {}
        usual = {
            role: next((name for name in names if inner.token_to_id(name) is not None), None)
            for role, names in _ROLES.items()
        }
        self._roles = {role: name for role in _ROLES if (name := custom.get(role, usual[role])) is not None}
        self._is_usual = self._roles == {role: name for role, name in usual.items() if name is not None}
        absent = next((role for role, name in self._roles.items() if self.token_to_id(name) is None), None)
        if absent not in (None, "mask_token"):
            raise TokenizerError(
                f"the {absent} is {self._roles[absent]!r}, which the vocabulary doesn't contain",
                hint=f"set {absent} in tokenizer_config.json and special_tokens_map.json to a token of the vocabulary, "
                "or remove it there",
            )
        if "mask_token" not in self._roles or absent == "mask_token":
            named = self._roles.get("mask_token")
            raise TokenizerError(
                "this tokenizer has no mask token" + (f": {named!r} is not in the vocabulary" if named else ""),
                hint='name it in tokenizer_config.json next to tokenizer.json ("mask_token": ...), or add one: '
                'AutoTokenizer.from_pretrained(FOLDER), then add_special_tokens({"mask_token": "[MASK]"}) and '
                "save_pretrained(FOLDER)",
            )
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        added = cast("Mapping[int, AddedToken]", inner.get_added_tokens_decoder())
        special = {number for number, token in added.items() if token.special}
        special |= {vocabulary[name] for name in self._roles.values()}
        spec = json.loads(self._json)
        self._unknown_token = model_unknown(spec)
        if self._unknown_token in vocabulary:
            special.add(vocabulary[self._unknown_token])
        self._letters = kept_letters(spec)
        self._check_unknown()
        frame = frame_of(spec, vocabulary)
        if frame is None:
            if (edges := self.cls_sep_ids) is None:
                frame = Frame((), (), None)
            else:
                first, last = edges[:1], edges[1:]
                frame = Frame(first, last, (first, last, last))
        self.frame: Frame = frame
        special |= {*frame.before, *frame.after}
        self.special_ids: tuple[int, ...] = tuple(sorted(special))
        self.regular_token_ids: NDArray[np.int64] = np.array(sorted(set(vocabulary.values()) - special), dtype=np.int64)
        self._special_V = np.zeros(self.size, dtype=bool)
        self._special_V[list(self.special_ids)] = True

    @property
    def model_type(self) -> str:
        """Type of the model in the `tokenizers` library, such as "WordPiece"."""
        return type(self._marked.model).__name__

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return cast("int", self.role_id("mask_token"))

    @cached_property
    def mask_takes_space(self) -> bool:
        """Whether [MASK] in a text absorbs the space before it, because it replaces a token with a space."""
        added = cast("Mapping[int, AddedToken]", self._marked.get_added_tokens_decoder())
        return self.mask_id in added and bool(added[self.mask_id].lstrip)

    @property
    def unknown_id(self) -> int | None:
        """Id of the token that the model gives unknown characters; None if the tokenizer has none."""
        own = self.token_to_id(self._unknown_token) if self._unknown_token is not None else None
        return self.role_id("unk_token") if own is None else own

    @property
    def cls_sep_ids(self) -> tuple[int, int] | None:
        """Ids of [CLS] and [SEP]; None unless both exist."""
        first, last = self.role_id("cls_token"), self.role_id("sep_token")
        return None if first is None or last is None else (first, last)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of tokenizer.json, and of the roles of special tokens if they are not the usual ones."""
        return digest(self._json) if self._is_usual else digest(self._json, json.dumps(self._roles, sort_keys=True))

    def role_id(self, role: str) -> int | None:
        """Return the id of pad_token, unk_token, cls_token, sep_token or mask_token; None if it doesn't exist."""
        return self.token_to_id(self._roles[role]) if role in self._roles else None

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text may be encoded in parts, split before single spaces between two visible characters.

        Each part keeps the space before it.
        """
        return splits_at_spaces(self._json)

    @cached_property
    def _space_id(self) -> int:
        """Id of the token that is only the space before a word; -1 if there is none."""
        space = leading_space(self._json)
        id = self.token_to_id(space) if space else None
        return -1 if id is None else id

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token, added tokens included."""
        return self._marked.get_vocab(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token; None if it isn't in the vocabulary."""
        return self._marked.token_to_id(token)

    def id_to_token(self, id: int) -> str:
        """Return the token of an id.

        Raises:
            TokenizerError: no token has this id.
        """
        token = self._marked.id_to_token(id) if id >= 0 else None
        if token is None:
            raise TokenizerError(f"no token has the id {id}", hint=f"use ids from 0 to {self.size - 1}")
        return token

    def encode(self, text: str, words: WordsRule = "spaces", *, specials_in_text: bool = False) -> Encoded:
        """Encode a text; "[MASK]" in it is the special token only with `specials_in_text`."""
        return self._encode([text], words, self._marked if specials_in_text else self._plain)[0]

    def encode_batch(self, texts: Sequence[str], words: WordsRule = "spaces") -> list[Encoded]:
        """Encode several texts on all threads of the library."""
        return self._encode(list(texts), words, self._plain)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts in which "[MASK]" is the special token, without special tokens around them.

        Words are not marked, so the package of a word segmenter need not be installed.
        """
        encode = partial(self._marked.encode_batch_fast, add_special_tokens=False)
        return [encoding.ids for encoding in _encode_utf8(encode, list(texts))]

    def _encode(self, texts: list[str], words: WordsRule, inner: tokenizers.Tokenizer) -> list[Encoded]:
        encodings = _encode_utf8(partial(inner.encode_batch, add_special_tokens=False), texts)
        return [self._encoded(text, encoding, words) for text, encoding in zip(texts, encodings, strict=True)]

    def _encoded(self, text: str, encoding: tokenizers.Encoding, words: WordsRule) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(ids))
        offsets = flat.reshape(-1, 2)
        marks = token_marks(text, offsets, words, ids == self._space_id)
        marks[self._special_V[ids]] |= SPECIAL
        unknown = offsets[ids == self.unknown_id] if self.unknown_id is not None else offsets[:0]
        num_unknown = int((unknown[:, 1] - unknown[:, 0]).sum()) + self.count_dropped(text)
        return Encoded(ids, marks, offsets, num_unknown)

    @property
    def drops_characters(self) -> bool:
        """Whether the model drops unknown characters: it is a BPE without an unknown token and without all bytes."""
        return self._letters is not None

    def count_dropped(self, text: str) -> int:
        """Return how many characters the model drops. Those that the normalizer removes don't count."""
        if self._letters is None:
            return 0
        normalizer, pre_tokenizer = self._marked.normalizer, self._marked.pre_tokenizer
        normal = normalizer.normalize_str(text) if normalizer else text
        is_affixed = bool(self._letters.prefix or self._letters.suffix)  # whether a letter's place in its word matters
        count = 0
        for part, times in ({normal: 1} if is_affixed else Counter(normal)).items():
            if part.isspace():
                continue
            words = pre_tokenizer.pre_tokenize_str(part) if pre_tokenizer else [(part, (0, 0))]
            num_dropped = sum(self._letters.count_dropped(word) for word, _ in words)
            count += times * (num_dropped if is_affixed else min(1, num_dropped))  # several letters: one character
        return count

    def _check_unknown(self) -> None:
        """Raise TokenizerError if the model fails at a character that its vocabulary lacks."""
        with library_errors(
            "the model of this tokenizer fails at unknown characters",
            hint="add its unknown token to model.vocab in tokenizer.json, or use another tokenizer",
        ):
            for character in _RARE:
                self._plain.encode(character)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_specials: bool = True) -> str:
        """Decode ids to text."""
        return self._marked.decode([int(number) for number in ids], skip_special_tokens=skip_specials)

    def add_special_tokens(
        self, ids: NDArray[np.integer[Any]], marks: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return the ids and marks with the special tokens of the frame around them, usually [CLS] and [SEP]."""
        before, after = self.frame.before, self.frame.after
        edges = [np.full(len(side), SPECIAL, dtype=np.uint8) for side in (before, after)]
        framed = np.concatenate([np.array(before, np.int64), ids, np.array(after, np.int64)])
        return framed.astype(np.int64), np.concatenate([edges[0], marks, edges[1]])

    def num_special_tokens(self, spans: int = 1) -> int:
        """Return the number of special tokens in a sample of one or two spans."""
        if spans == 2 and self.frame.pair is not None:
            return sum(map(len, self.frame.pair))
        return len(self.frame.before) + len(self.frame.after) if spans else 0

    def to_json(self) -> str:
        """Return the content of tokenizer.json."""
        return self._json

    def with_json(self, tokenizer_json: str) -> Tokenizer:
        """Return the tokenizer of another tokenizer.json, with the same roles of special tokens."""
        inner = tokenizers.Tokenizer.from_str(tokenizer_json)
        require_ids(tokenizer_json, inner)
        return Tokenizer(inner, self._roles)

    def save(
        self,
        folder: Path,
        *,
        inputs: Sequence[str] = ("input_ids", "attention_mask"),
        longest: int | None = None,
    ) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        Args:
            folder: the directory.
            inputs: arguments of the model's forward. BERT adds "token_type_ids", which ModernBERT rejects.
            longest: maximum sequence length of the model in tokens.
        """
        config: dict[str, Any] = {
            # With BertTokenizer* version 5 of transformers drops the normalizer; version 4 has no TokenizersBackend.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": list(inputs),
            "clean_up_tokenization_spaces": False,
            **self._roles,
        }
        if longest is not None:
            config["model_max_length"] = longest
        write_text(folder / RunLayout.TOKENIZER, self._json)
        write_json(folder / _CONFIG, config)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a tokenizer.json, or a directory with one, written by unmask or by transformers.

        Raises:
            TokenizerError: the file doesn't exist or can't be read, its ids are ambiguous, or the tokenizer can't be
                used for masked language modeling.
        """
        path = Path(path)
        file = path / RunLayout.TOKENIZER if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                "no tokenizer found", location=str(file), hint="name a directory that contains tokenizer.json"
            )
        try:
            with library_errors("can't read this tokenizer", hint="restore it from a copy"):
                content = read_text(file, MAX_TOKENIZER_BYTES)
                inner = tokenizers.Tokenizer.from_str(content)
                require_ids(content, inner)
                return cls(inner, roles_in(file.parent))
        except TokenizerError as error:
            raise error.at(location=error.location or str(file)) from None


def _encode_utf8(
    encode: Callable[[list[str]], Sequence[tokenizers.Encoding]], texts: list[str]
) -> Sequence[tokenizers.Encoding]:
    """Return the encodings of texts.

    Raises:
        TokenizerError: a text has half of a surrogate pair, which no UTF-8 has.
    """
    try:
        return encode(texts)
    except TypeError as error:
        invalid = next((text for text in texts if text.encode("utf-8", "ignore").decode() != text), "")
        raise TokenizerError(
            "text is not UTF-8: it has half of a surrogate pair",
            location=ascii(invalid[:60]),
            hint="remove it, or replace it by U+FFFD",
        ) from error


@contextmanager
def library_errors(problem: str, *, hint: str) -> Generator[None]:
    """Raise any exception of `tokenizers` or `transformers` as a TokenizerError; their types say little.

    A panic of `tokenizers` is a BaseException.
    """
    try:
        yield
    except (UnmaskError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_LENGTH]
        raise TokenizerError(f"{problem}: {reason}", hint=hint) from error


def roles_in(folder: Path) -> dict[str, str]:
    """Return the special token of each role, from the configuration files in a directory."""
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        if (folder / name).is_file():
            config = cast("Mapping[str, Any]", read_json(folder / name))
            if not isinstance(config, dict):
                raise TokenizerError(
                    "invalid configuration: expected a JSON object",
                    location=str(folder / name),
                    hint="restore it from a copy",
                )
            for role in _ROLES:
                token = config.get(role)
                content: Any = cast("Mapping[str, Any]", token).get("content") if isinstance(token, dict) else token
                if isinstance(content, str):
                    roles[role] = content
                elif token is not None:
                    raise TokenizerError(
                        f"invalid {role}: got {token!r}, expected a string, or an object with the string `content`",
                        location=str(folder / name),
                        hint=f"set {role} to the text of the token, or remove it",
                    )
    return roles
