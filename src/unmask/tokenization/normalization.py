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
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, cast

from tokenizers import Regex, normalizers, pre_tokenizers

from unmask.core.errors import TokenizerError
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


def falls_back_to_bytes(tokenizer_json: str) -> bool:
    """Return whether tokens such as "<0x22>" represent bytes."""
    spec = cast("Node", json.loads(tokenizer_json))
    decoders = _steps(spec.get("decoder"), "decoders")
    return bool(spec["model"].get("byte_fallback")) or any(step["type"] == "ByteFallback" for step in decoders)


def continuing_prefix(tokenizer_json: str) -> str:
    """Return the prefix of tokens that continue a word ("##"); empty for models without one."""
    model = cast("Node", json.loads(tokenizer_json))["model"]
    return str(model.get("continuing_subword_prefix") or "")


def word_end(tokenizer_json: str) -> str:
    """Return the suffix of tokens that end a word ("</w>"); empty for models without one."""
    return str(cast("Node", json.loads(tokenizer_json))["model"].get("end_of_word_suffix") or "")


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


class Frame(NamedTuple):
    """The special tokens around a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    pair: tuple[tuple[int, ...], ...] | None  # before, between and after two texts; None: pairs aren't separated


def frame_of(spec: Node, vocabulary: Mapping[str, int]) -> Frame | None:
    """Return the special tokens that the post-processor adds; None if there is no post-processor.

    Args:
        spec: the content of tokenizer.json.
        vocabulary: the id of each token.

    Raises:
        TokenizerError: it adds tokens that the vocabulary doesn't contain, or repeats or omits the text.
    """
    if spec.get("post_processor") is None:
        return None
    frame = Frame((), (), None)
    for step in _steps(spec["post_processor"], "processors"):
        if step["type"] == "ByteLevel":
            continue
        if frame != Frame((), (), None):
            raise _unsupported_frame("two post-processors add special tokens")
        try:
            frame = _frame_of_step(step, vocabulary)
        except TokenizerError:
            raise
        except (KeyError, ValueError, TypeError, IndexError) as error:  # the library checks no templates
            raise _unsupported_frame(f"the post-processor can't be read: {type(error).__name__} {error}") from error
    return frame


def _frame_of_step(step: Node, vocabulary: Mapping[str, int]) -> Frame:
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        first, last = (_require_token(step[side][0], step[side][1], vocabulary) for side in ("cls", "sep"))
        between = (last, last) if step["type"] == "RobertaProcessing" else (last,)
        return Frame((first,), (last,), ((first,), between, (last,)))
    if step["type"] != "TemplateProcessing":
        raise _unsupported_frame(f"post-processors of type {step['type']} are not supported")
    single, pair = (_split_template(step, name, vocabulary) for name in ("single", "pair"))
    if single is None or len(single) != 2:
        raise _unsupported_frame("the template of the post-processor doesn't contain the text exactly once")
    is_separated = pair is not None and len(pair) == 3 and pair[1]
    return Frame(single[0], single[1], tuple(pair) if pair is not None and is_separated else None)


def _split_template(step: Node, name: str, vocabulary: Mapping[str, int]) -> list[tuple[int, ...]] | None:
    """Return the special tokens before, between and after the texts; None if B precedes A."""
    parts, texts = list[tuple[int, ...]]([()]), ""
    for item in step[name]:
        if "Sequence" in item:
            texts += item["Sequence"]["id"]
            parts.append(())
            continue
        added = step["special_tokens"][item["SpecialToken"]["id"]]
        for id, token in zip(added["ids"], added["tokens"], strict=True):
            parts[-1] += (_require_token(token, id, vocabulary),)
    return parts if texts in ("A", "AB") else None


def _require_token(token: str, id: int, vocabulary: Mapping[str, int]) -> int:
    if vocabulary.get(token) != id:
        has = f"the id {vocabulary[token]}" if token in vocabulary else "no such token"
        raise _unsupported_frame(f"the post-processor adds {token!r} with the id {id}, but the vocabulary has {has}")
    return id


def _unsupported_frame(what: str) -> TokenizerError:
    return TokenizerError(what, hint="correct post_processor in tokenizer.json")


def model_unknown(spec: Node) -> str | None:
    """Return the token that the model gives unknown characters; None if it has none."""
    model = spec["model"]
    if model.get("type") == "Unigram":
        return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


class Letters(NamedTuple):
    """The letters that a model represents; it drops all others."""

    tokens: frozenset[str]  # with prefix and suffix
    prefix: str  # of each letter but the first of a word
    suffix: str  # of the last letter of a word

    def count_dropped(self, word: str) -> int:
        """Return how many letters of a word, as it comes from the pre-tokenizer, the model drops."""
        last = len(word) - 1
        return sum(
            (self.prefix if at else "") + letter + (self.suffix if at == last else "") not in self.tokens
            for at, letter in enumerate(word)
            if letter != META and not letter.isspace()
        )


def kept_letters(spec: Node) -> Letters | None:
    """Return the letters that the model represents if it drops all others; None if it drops none."""
    model = spec["model"]
    if model.get("type") != "BPE" or model.get("unk_token") is not None:
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    steps = [*_steps(spec.get("normalizer"), "normalizers"), *_steps(spec.get("pre_tokenizer"), "pretokenizers")]
    if any(step["type"] == "ByteLevel" for step in steps) and all(
        letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet()
    ):
        return None
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return None
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    longest = 1 + len(prefix) + len(suffix)
    return Letters(frozenset(token for token in vocabulary if len(token) <= longest), prefix, suffix)
