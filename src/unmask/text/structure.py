"""Room card: what can be told of a tokenizer from its parts.

Comes in: a tokenizer.json's text. Goes out: whether text may be cut at spaces before it is encoded, whether its pieces
carry the space before their word. Called by: tokenizer.

What is not known to be safe counts as unsafe: the answer costs time then, never other ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, cast

from unmask.text.preparation import CUTTING_PATTERNS, META

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
