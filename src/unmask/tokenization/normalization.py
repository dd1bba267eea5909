"""Normalizers and pre-tokenizers of all kinds, and properties of a tokenizer.json.

Pre-tokens are the words of `words.py`, so no token contains the end of one word and the start of another. A run of
letters, marks and numbers is one pre-token. Every other visible character is a pre-token, with its combining marks.
GPT-2's pattern is not used: it separates letters from their combining marks, and joins "..." or "'s", which are
several words.
In byte-level BPE and Unigram a token includes the space before its word, so decoding restores the text. WordPiece
drops white space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, cast

from tokenizers import Regex, normalizers, pre_tokenizers

from unmask.tokenization.settings import CharacterConfig, TrainedConfig, UnigramConfig, WordPieceConfig

META: Final = "▁"  # U+2581, a space in the tokens of Unigram
_RUN: Final = r"[^\p{P}\p{S}\p{Z}\p{Cc}]+"
_ALONE: Final = r"[\p{P}\p{S}][\p{M}\p{Cf}]*"
_WHITE: Final = r"[\p{Z}\p{Cc}]"
# The last space before a word belongs to the word. Other white space is a separate pre-token.
_SPACED_WORDS: Final = rf" ?{_RUN}| ?{_ALONE}|{_WHITE}+(?= [^\p{{Z}}\p{{Cc}}])|{_WHITE}+"
_META_WORDS: Final = rf"{META}?{_RUN}|{META}?(?!{META}){_ALONE}|{META}"
_CHARACTERS: Final = r"[\s\S]"  # the library's regex engine rejects "(?s)."
SPLIT_PATTERNS: Final = (_SPACED_WORDS, _META_WORDS, _CHARACTERS)  # no match continues across a single space


def normalizer_of(settings: TrainedConfig) -> normalizers.Normalizer:
    """Return NFC, followed by the steps of BERT's normalizer that the settings enable."""
    chinese = isinstance(settings, WordPieceConfig) and settings.handle_chinese_chars
    steps: list[normalizers.Normalizer] = [normalizers.NFC()]
    if settings.clean_text or chinese or settings.strip_accents or settings.lowercase:
        # BERT strips accents whenever it lowercases. Here the two settings are independent.
        steps.append(
            normalizers.BertNormalizer(
                clean_text=settings.clean_text,
                handle_chinese_chars=chinese,
                strip_accents=settings.strip_accents,
                lowercase=settings.lowercase,
            )
        )
    if settings.strip_accents:
        steps.append(normalizers.NFC())  # stripping decomposes Hangul into jamo: 한 would be three letters
    if isinstance(settings, UnigramConfig) and settings.clean_text:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False, right=True)]
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def pre_tokenizer_of(settings: TrainedConfig) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of a kind: no token crosses a pre-token."""
    if isinstance(settings, WordPieceConfig):
        return pre_tokenizers.BertPreTokenizer()
    if isinstance(settings, CharacterConfig):
        return pre_tokenizers.Split(Regex(_CHARACTERS), "isolated")
    if isinstance(settings, UnigramConfig):
        # "first": no space is added to a text that continues a word, as after [MASK].
        spaces = pre_tokenizers.Metaspace(replacement=META, prepend_scheme="first", split=False)
        return pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(_META_WORDS), "isolated")])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPACED_WORDS), "isolated"), byte_level])


Node = dict[str, Any]
_CHARACTERWISE: Final = frozenset({"NFC", "NFD", "Lowercase", "StripAccents", "BertNormalizer"})
_SPACE_SPLITTERS: Final = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
BYTE_SPACE: Final = "Ġ"
_SAFE: Final = frozenset(SPLIT_PATTERNS)


def splits_at_spaces(tokenizer_json: str) -> bool:
    """Return whether a text may be encoded in parts, split before single spaces between two visible characters."""
    spec = cast("Node", json.loads(tokenizer_json))
    if not all(_normalizer_is_local(step) for step in _steps(spec.get("normalizer"), "normalizers")):
        return False
    for token in spec.get("added_tokens", ()):
        # Special tokens in a text are encoded as plain text. Others are matched, and may contain or absorb a space.
        if not token["special"] and (token["lstrip"] or token["rstrip"] or " " in token["content"]):
            return False
    steps = list(_steps(spec.get("pre_tokenizer"), "pretokenizers"))
    return bool(steps) and all(map(_keeps_space, steps)) and any(map(_splits_at_spaces, steps))


def splits_at_lines(tokenizer_json: str) -> bool:
    """Return whether a text may also be split before single line feeds between two visible characters."""
    if not splits_at_spaces(tokenizer_json):
        return False
    spec = cast("Node", json.loads(tokenizer_json))
    first = next(_steps(spec["pre_tokenizer"], "pretokenizers"))
    return lines_are_spaces(tokenizer_json) or first["type"] in ("ByteLevel", "Split")


def lines_are_spaces(tokenizer_json: str) -> bool:
    """Return whether the tokenizer treats a line feed like a space."""
    spec = cast("Node", json.loads(tokenizer_json))
    if any(step.get("clean_text", False) for step in _steps(spec.get("normalizer"), "normalizers")):
        return True
    return any(step["type"] in _SPACE_SPLITTERS for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"))


def _steps(node: Node | None, name: str) -> Iterator[Node]:
    """Yield the steps of a (nested) sequence."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for inner in node[name]:
            yield from _steps(inner, name)
    else:
        yield node


def _normalizer_is_local(step: Node) -> bool:
    if step["type"] == "Replace":  # runs of spaces become one; single spaces stay
        return step["pattern"] == {"Regex": " {2,}"} and step["content"] == " "
    return step["type"] in _CHARACTERWISE or (step["type"] == "Strip" and not step["strip_left"])


def _splits_at_spaces(step: Node) -> bool:
    """Return whether the step splits before every single space."""
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    if step["type"] == "Metaspace":
        return bool(step["split"])
    if step["type"] == "Split":
        return step["behavior"] == "Isolated" and step["pattern"].get("Regex") in _SAFE
    return step["type"] in _SPACE_SPLITTERS


def _keeps_space(step: Node) -> bool:
    """Return whether the step gives the same result for a part with its leading space as within the text."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    if step["type"] == "Metaspace":
        return step["prepend_scheme"] in ("first", "never")
    if step["type"] == "Split":
        return step["behavior"] == "Isolated" and step["pattern"].get("Regex") in _SAFE
    return step["type"] in _SPACE_SPLITTERS | {"Punctuation", "Digits"}


def leading_space(tokenizer_json: str) -> str:
    """Return the character of the space before a word in tokens; empty if tokens don't include the space."""
    spec = cast("Node", json.loads(tokenizer_json))
    if any(step["type"] == "Metaspace" for step in _steps(spec.get("pre_tokenizer"), "pretokenizers")):
        return META
    vocabulary = spec["model"].get("vocab", ())
    tokens = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
    return next((token[0] for token in tokens if len(token) > 1 and token[0] in (META, BYTE_SPACE)), "")


def is_byte_level(tokenizer_json: str) -> bool:
    """Return whether the characters of the tokens represent bytes."""
    spec = cast("Node", json.loads(tokenizer_json))
    steps = [*_steps(spec.get("pre_tokenizer"), "pretokenizers"), *_steps(spec.get("decoder"), "decoders")]
    return any(step["type"] == "ByteLevel" for step in steps)


def continuing_prefix(tokenizer_json: str) -> str:
    """Return the prefix of tokens that continue a word ("##"); empty for models other than WordPiece."""
    model = cast("Node", json.loads(tokenizer_json))["model"]
    return str(model.get("continuing_subword_prefix") or "") if model.get("type") == "WordPiece" else ""


def without_specials(tokenizer_json: str) -> str:
    """Return the tokenizer without special tokens, so that "<mask>" in a text is encoded as plain text.

    A Unigram model also matches the special tokens in its vocabulary, unless the pre-tokenizer splits them. They get
    names that occur in no text. The unknown token keeps its name, because the model never matches it.
    """
    spec = cast("Node", json.loads(tokenizer_json))
    model, added = spec["model"], spec.get("added_tokens", [])
    if model.get("type") != "Unigram" or not all(token["special"] for token in added):
        return tokenizer_json
    special = {token["content"] for token in added}
    for number, entry in enumerate(model["vocab"]):
        if entry[0] in special and number != model.get("unk_id"):
            entry[0] = f"\ue000{number}\ue001"
    return json.dumps({**spec, "added_tokens": []})
