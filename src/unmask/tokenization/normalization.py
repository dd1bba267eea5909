"""Room card: what becomes of text before it is cut into pieces.

Comes in: a tokenizer's settings. Goes out: the normaliser (how characters are written) and the pre-tokenizer (borders
that no piece crosses) of its kind. Called by: tokenizer and the rooms that train each kind.

Borders are those of the words in text/words.py, so that no piece holds the end of one word and the start of another: a
run of letters, marks and numbers is a word, everything else that is visible stands alone with the marks on it. GPT-2's
pattern parts letters from their combining marks and joins "...", or an apostrophe and the s after it, which are several
words here; so it isn't used. A piece carries the space before its word (byte-level BPE, Unigram), which makes text come
back as it was, or white space is dropped (WordPiece).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, cast

from tokenizers import Regex, normalizers, pre_tokenizers

from unmask.tokenization.settings import CharacterConfig, TrainedConfig, UnigramConfig, WordPieceConfig

META: Final = "▁"  # U+2581, which stands for a space in Unigram's pieces
_RUN: Final = r"[^\p{P}\p{S}\p{Z}\p{Cc}]+"
_ALONE: Final = r"[\p{P}\p{S}][\p{M}\p{Cf}]*"
_WHITE: Final = r"[\p{Z}\p{Cc}]"
# The last space before a word goes with the word, other white space is apart.
_SPACED_WORDS: Final = rf" ?{_RUN}| ?{_ALONE}|{_WHITE}+(?= [^\p{{Z}}\p{{Cc}}])|{_WHITE}+"
_META_WORDS: Final = rf"{META}?{_RUN}|{META}?(?!{META}){_ALONE}|{META}"
_CHARACTERS: Final = r"[\s\S]"  # "(?s)." would say the same and is refused by the library's regex engine
CUTTING_PATTERNS: Final = (_SPACED_WORDS, _META_WORDS, _CHARACTERS)  # no match goes on over a single space


def normalizer_of(settings: TrainedConfig) -> normalizers.Normalizer:
    """NFC, then BERT's steps as far as they are asked for."""
    chinese = isinstance(settings, WordPieceConfig) and settings.handle_chinese_chars
    steps: list[normalizers.Normalizer] = [normalizers.NFC()]
    if settings.clean_text or chinese or settings.strip_accents or settings.lowercase:
        # BERT itself strips accents wherever it lower-cases; here each is asked for alone.
        steps.append(
            normalizers.BertNormalizer(
                clean_text=settings.clean_text,
                handle_chinese_chars=chinese,
                strip_accents=settings.strip_accents,
                lowercase=settings.lowercase,
            )
        )
    if settings.strip_accents:
        steps.append(normalizers.NFC())  # stripping tears Hangul into jamo: 한 would be three letters
    if isinstance(settings, UnigramConfig) and settings.clean_text:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False, right=True)]
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def pre_tokenizer_of(settings: TrainedConfig) -> pre_tokenizers.PreTokenizer:
    """The borders that no piece crosses."""
    if isinstance(settings, WordPieceConfig):
        return pre_tokenizers.BertPreTokenizer()
    if isinstance(settings, CharacterConfig):
        return pre_tokenizers.Split(Regex(_CHARACTERS), "isolated")
    if isinstance(settings, UnigramConfig):
        # "first": a text that begins within a word, as after [MASK], gets no space put before it.
        spaces = pre_tokenizers.Metaspace(replacement=META, prepend_scheme="first", split=False)
        return pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(_META_WORDS), "isolated")])
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPACED_WORDS), "isolated"), spelled])


Node = dict[str, Any]
_CHARACTERWISE: Final = frozenset({"NFC", "NFD", "Lowercase", "StripAccents", "BertNormalizer"})
_PARTS_AT_SPACES: Final = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
BYTE_SPACE: Final = "Ġ"
_SAFE: Final = frozenset(CUTTING_PATTERNS)


def splits_at_spaces(tokenizer_json: str) -> bool:
    """Whether a text's ids are those of its pieces, cut before every single space between two visible characters."""
    whole = cast("Node", json.loads(tokenizer_json))
    if not all(_normalizer_is_local(step) for step in _steps(whole.get("normalizer"), "normalizers")):
        return False
    for token in whole.get("added_tokens", ()):
        # Special ones are spelled as letters in a text; others are looked for, and may hold a space or eat one.
        if not token["special"] and (token["lstrip"] or token["rstrip"] or " " in token["content"]):
            return False
    steps = list(_steps(whole.get("pre_tokenizer"), "pretokenizers"))
    return bool(steps) and all(map(_keeps_its_space, steps)) and any(map(_cuts_at_spaces, steps))


def splits_at_lines(tokenizer_json: str) -> bool:
    """Whether the same holds before every single line feed between two visible characters."""
    if not splits_at_spaces(tokenizer_json):
        return False
    whole = cast("Node", json.loads(tokenizer_json))
    first = next(_steps(whole["pre_tokenizer"], "pretokenizers"))
    return lines_are_spaces(tokenizer_json) or first["type"] in ("ByteLevel", "Split")


def lines_are_spaces(tokenizer_json: str) -> bool:
    """Whether a line feed is to it what a space is."""
    whole = cast("Node", json.loads(tokenizer_json))
    if any(step.get("clean_text", False) for step in _steps(whole.get("normalizer"), "normalizers")):
        return True
    return any(step["type"] in _PARTS_AT_SPACES for step in _steps(whole.get("pre_tokenizer"), "pretokenizers"))


def _steps(node: Node | None, name: str) -> Iterator[Node]:
    """The steps of a sequence, one after the other."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for inner in node[name]:
            yield from _steps(inner, name)
    else:
        yield node


def _normalizer_is_local(step: Node) -> bool:
    if step["type"] == "Replace":  # runs of spaces become one: no single space is touched
        return step["pattern"] == {"Regex": " {2,}"} and step["content"] == " "
    return step["type"] in _CHARACTERWISE or (step["type"] == "Strip" and not step["strip_left"])


def _cuts_at_spaces(step: Node) -> bool:
    """Whether no piece crosses the place before a single space."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    if step["type"] == "Metaspace":
        return bool(step["split"])
    if step["type"] == "Split":
        return step["behavior"] == "Isolated" and step["pattern"].get("Regex") in _SAFE
    return step["type"] in _PARTS_AT_SPACES


def _keeps_its_space(step: Node) -> bool:
    """Whether this step treats a piece with its leading space as it treats it within the text."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Metaspace":
        return step["prepend_scheme"] in ("first", "never")
    if step["type"] == "Split":
        return step["behavior"] == "Isolated" and step["pattern"].get("Regex") in _SAFE
    return step["type"] in _PARTS_AT_SPACES | {"Punctuation", "Digits"}


def leading_space(tokenizer_json: str) -> str:
    """The letter that stands for the space before a word in its pieces; nothing where pieces carry none."""
    whole = cast("Node", json.loads(tokenizer_json))
    if any(step["type"] == "Metaspace" for step in _steps(whole.get("pre_tokenizer"), "pretokenizers")):
        return META
    vocabulary = whole["model"].get("vocab", ())
    pieces = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
    return next((piece[0] for piece in pieces if len(piece) > 1 and piece[0] in (META, BYTE_SPACE)), "")


def is_byte_level(tokenizer_json: str) -> bool:
    """Whether the letters of its pieces stand for bytes."""
    whole = cast("Node", json.loads(tokenizer_json))
    steps = [*_steps(whole.get("pre_tokenizer"), "pretokenizers"), *_steps(whole.get("decoder"), "decoders")]
    return any(step["type"] == "ByteLevel" for step in steps)


def continuing_prefix(tokenizer_json: str) -> str:
    """What begins a piece that continues a word ("##"); nothing where pieces tell a word's start by its space."""
    model = cast("Node", json.loads(tokenizer_json))["model"]
    return str(model.get("continuing_subword_prefix") or "") if model.get("type") == "WordPiece" else ""


def without_specials(tokenizer_json: str) -> str:
    """The same tokenizer, whose model finds no special piece in letters.

    Unigram looks for every piece of its vocabulary, "<mask>" among them, where nothing cuts the letters before it. Its
    special pieces get names that no text has; the one for what is unknown is never looked for.
    """
    whole = cast("Node", json.loads(tokenizer_json))
    model, added = whole["model"], whole.get("added_tokens", [])
    if model.get("type") != "Unigram" or not all(token["special"] for token in added):
        return tokenizer_json
    special = {token["content"] for token in added}
    for number, entry in enumerate(model["vocab"]):
        if entry[0] in special and number != model.get("unk_id"):
            entry[0] = f"\ue000{number}\ue001"
    return json.dumps({**whole, "added_tokens": []})
