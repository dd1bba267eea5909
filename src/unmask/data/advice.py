"""Settings that follow from the text: one function from facts about a text to settings, each with its reason.

Settings that the user set are kept. The facts come from a bounded sample, so they cost the same for any size of
text, and they depend on nothing but the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, cast

import numpy as np

from unmask.core.types import ProgressCallback
from unmask.data.inputs import has_code_ending
from unmask.data.settings import DataConfig
from unmask.data.sources import BaseSource, FileSource, kind_of, open_source
from unmask.tokenization.settings import (
    LONGEST_WORD,
    ByteBpeConfig,
    CharacterConfig,
    SampledConfig,
    TokenizerConfig,
    UnigramConfig,
    VocabSizeError,
    WordPieceConfig,
)
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.tokenization.words import codes

_SAMPLE_CHARACTERS: Final = 1_000_000
_SAMPLE_PARTS: Final = 40
_CODE_LINE: Final = re.compile(r"[;{}():,\[\]>]\s*$")
# A text of one kind has at least this fraction of it.
_MOSTLY: Final = 0.5
_CODE_LINES: Final = 0.4  # of the nonblank lines end like code
_INDENTED_LINES: Final = 0.3
_UNSPACED: Final = frozenset(["THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"])
_UNSPACED_SHARE: Final = 0.3
_KANA_SHARE: Final = 0.2
_ASCII_SHARE: Final = 0.99
_FEW_CHARACTERS: Final = 48  # SMILES has about 40, proteins 25, DNA 5
_COVERAGE: Final = 0.999
LONG_RUN: Final = 12.0  # characters between white space; English has 5, German 6, Finnish 8
MANY_UNKNOWN: Final = 0.01  # fraction of unknown characters that is warned about


@dataclass(frozen=True)
class TextFacts:
    """Facts about a sample of a text."""

    characters: int  # of the sample
    code_share: float  # fraction of the characters in files or lines of code
    scripts: Mapping[str, float]  # fraction of each script among the letters
    ascii_share: float  # fraction of the visible characters
    frequent: int  # number of different characters that make up 99.9 % of the visible ones
    mean_run: float  # mean number of characters between white space
    long_runs: float  # fraction of the visible characters in runs that WordPiece reads as [UNK]


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen because of the text."""

    what: str
    reason: str
    overrule: str  # `key=value` of the setting that was not chosen

    def __str__(self) -> str:
        return f"{self.what}, because {self.reason} (overrule: --set {self.overrule})"


def is_set(explicit: Collection[str], key: str) -> bool:
    """Return whether a key, or a list that contains it, is among the keys that were set by the user."""
    return any(key == one or key.startswith(f"{one}.") for one in explicit)


# Facts ----------------------------------------------------------------------------------------------------------------


def script_of(character: str) -> str:
    """Return the script of a letter: the first word of its Unicode name; empty for other characters."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    script = name.partition(" ")[0].partition("-")[0]
    return "HAN" if script in ("CJK", "IDEOGRAPHIC") else script


def text_facts(source: BaseSource) -> TextFacts:
    """Read a sample, spread over the parts of the source, and return its facts."""
    code = total = 0
    texts: list[str] = []
    for path, text in _sample(source):
        texts.append(text)
        total += len(text)
        code += len(text) * (has_code_ending(path) or _looks_like_code(text))
    words = [len(word) for text in texts for word in text.split()]
    code_points = codes("".join(texts))
    counts = np.bincount(code_points, minlength=0x80) if len(code_points) else np.zeros(0x80, np.int64)
    visible = {number: int(counts[number]) for number in np.flatnonzero(counts).tolist() if not chr(number).isspace()}
    every = max(1, sum(visible.values()))
    scripts: Counter[str] = Counter()
    for number, count in visible.items():
        if script := script_of(chr(number)):
            scripts[script] += count
    covered = np.cumsum(sorted(visible.values(), reverse=True))
    return TextFacts(
        characters=total,
        code_share=code / max(1, total),
        scripts={script: count / max(1, scripts.total()) for script, count in scripts.most_common()},
        ascii_share=sum(count for number, count in visible.items() if number < 0x80) / every,
        frequent=int(np.searchsorted(covered, _COVERAGE * every)) + 1,
        mean_run=sum(words) / max(1, len(words)),
        long_runs=sum(length for length in words if length > LONGEST_WORD) / every,
    )


def _sample(source: BaseSource) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the beginnings of some parts."""
    parts = source.parts()
    chosen = sorted({round(at) for at in np.linspace(0, len(parts) - 1, min(len(parts), _SAMPLE_PARTS)).tolist()})
    for number in chosen:
        left = _SAMPLE_CHARACTERS // len(chosen)
        beginning: list[str] = []
        for chunk in source.documents(parts[number]):
            beginning.append(chunk.text[:left])
            left -= len(beginning[-1])
            if left <= 0:
                break
        yield parts[number].path, "\n".join(beginning)


def _looks_like_code(text: str) -> bool:
    """Return whether many lines are indented and many end like statements."""
    lines = [line for line in text.split("\n") if line.strip()]
    indented = sum(line.startswith(("  ", "\t")) for line in lines)
    ends = sum(_CODE_LINE.search(line) is not None for line in lines)
    return indented > _INDENTED_LINES * len(lines) and ends > _CODE_LINES * len(lines)


# Choices --------------------------------------------------------------------------------------------------------------


def fitting_kind(facts: TextFacts, present: str) -> tuple[str, str]:
    """Return the kind of tokenizer that fits a text, and the reason; the present kind and "" if it fits."""
    hangul = facts.scripts.get("HANGUL", 0.0)
    kana = facts.scripts.get("HIRAGANA", 0.0) + facts.scripts.get("KATAKANA", 0.0)
    unspaced = {script: share for script, share in facts.scripts.items() if script in _UNSPACED}
    if facts.code_share >= _MOSTLY:
        reason = f"{facts.code_share:.0%} of the text is code, whose indentation and line ends this kind keeps"
        return ("bpe", reason) if present in ("wordpiece", "unigram") else (present, "")
    is_sequence = facts.ascii_share >= _ASCII_SHARE and facts.mean_run >= LONG_RUN
    if is_sequence and facts.frequent <= _FEW_CHARACTERS:
        reason = f"the text has {facts.frequent} frequent characters, in runs of {facts.mean_run:,.0f} without a space"
        return ("characters", reason) if present in ("wordpiece", "bpe", "unigram") else (present, "")
    if sum(unspaced.values()) >= _UNSPACED_SHARE and present == "wordpiece":
        name = next(iter(unspaced)).capitalize()
        return "unigram", f"{sum(unspaced.values()):.0%} of the letters are {name}, which has no spaces between words"
    if kana >= _KANA_SHARE and present == "wordpiece":
        return "unigram", f"{kana:.0%} of the letters are kana, and Japanese has no spaces between words"
    if hangul >= _MOSTLY and present in ("wordpiece", "bpe"):
        return "unigram", f"{hangul:.0%} of the letters are Hangul, for which this kind measured best"
    return present, ""


def advise(facts: TextFacts, settings: DataConfig, explicit: Collection[str]) -> tuple[DataConfig, list[Choice]]:
    """Return the settings that fit a text, and the choices; keys of `explicit` keep their values."""
    choices: list[Choice] = []
    present = settings.tokenizer.kind
    kind, reason = fitting_kind(facts, present)
    own = {key.removeprefix("data.tokenizer.") for key in explicit if key.startswith("data.tokenizer")}
    if reason and _may_replace(own, kind):
        what = f"tokenizer: {kind} instead of {present}"
        choices.append(Choice(what, reason, f"data.tokenizer.kind={present}"))
        settings = replace(settings, tokenizer=_as_kind(settings.tokenizer, kind, own))
    is_code = facts.code_share >= _MOSTLY
    if is_code and settings.document == "auto" and isinstance(settings.tokenizer, ByteBpeConfig | CharacterConfig):
        reason = f"{facts.code_share:.0%} of the text is code"
        choices.append(Choice("a document is a whole file", reason, "data.document=blank-line"))
        settings = replace(settings, document="file")
    return settings, choices


_CONFIGS: Final[Mapping[str, Callable[..., TokenizerConfig]]] = {
    "bpe": ByteBpeConfig,
    "unigram": UnigramConfig,
    "characters": CharacterConfig,
    "wordpiece": WordPieceConfig,
}


def _may_replace(own: Collection[str], kind: str) -> bool:
    """Return whether the user's own keys of [data.tokenizer] leave the kind open."""
    kept = {"special_tokens", "lowercase", "strip_accents", *(() if kind == "characters" else ("vocab_size",))}
    return set(own) <= kept


def _as_kind(settings: TokenizerConfig, kind: str, own: Collection[str]) -> TokenizerConfig:
    """Return settings of another kind, with special tokens, vocabulary size and the user's own keys."""
    known = {field.name for field in fields(_CONFIGS[kind]) if field.name != "kind"}  # pyright: ignore[reportArgumentType]
    kept: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("special_tokens", "vocab_size", *sorted(own))
        if name in known and hasattr(settings, name)
    }
    return _CONFIGS[kind](**kept)


def adapt(
    source: BaseSource, settings: DataConfig, explicit: Collection[str] | None
) -> tuple[BaseSource, DataConfig, list[Choice]]:
    """Return source and settings that fit the text, with the choices.

    Args:
        source: the text, opened with these settings.
        settings: how the text is read, and which tokenizer is trained.
        explicit: keys that the user set; None: all of them.

    Raises:
        TextError: the text can't be read.
    """
    if explicit is None or not isinstance(settings.tokenizer, WordPieceConfig | ByteBpeConfig | UnigramConfig):
        return source, settings, []
    source.check()
    adapted, choices = advise(text_facts(source), settings, explicit)
    if adapted.document != settings.document:
        if isinstance(source, FileSource) and any(kind_of(part.path) == "text" for part in source.parts()):
            return open_source(source.names, adapted), adapted, choices
        # Rows and texts in memory are documents whatever the rule.
        return source, replace(adapted, document=settings.document), choices[:-1]
    return source, adapted, choices


# Vocabulary -----------------------------------------------------------------------------------------------------------


def may_shrink(settings: DataConfig, explicit: Collection[str] | None) -> bool:
    """Return whether the vocabulary size may become smaller than the recipe's."""
    is_sized = isinstance(settings.tokenizer, WordPieceConfig | ByteBpeConfig | UnigramConfig)
    return is_sized and explicit is not None and not is_set(explicit, "data.tokenizer.vocab_size")


def train_fitting(
    read: Callable[[], Iterator[str]],
    settings: TokenizerConfig,
    progress: ProgressCallback | None = None,
    *,
    shrinks: bool,
) -> Tokenizer:
    """Train a tokenizer; if it `shrinks`, with the largest vocabulary that the text gives.

    Raises:
        TokenizerError: the text gives fewer tokens than the vocabulary size, or none.
    """
    try:
        return train_tokenizer(read(), settings, progress)
    except VocabSizeError as error:
        if not shrinks or not error.largest:
            raise
        fits = error.largest
    return train_tokenizer(read(), replace(cast("SampledConfig", settings), vocab_size=fits), progress)


def vocabulary_choice(settings: DataConfig, size: int) -> Choice | None:
    """Return the choice of a smaller vocabulary, if a tokenizer has one."""
    wanted = getattr(settings.tokenizer, "vocab_size", 0)
    if size >= wanted:
        return None
    what = f"vocabulary: {size:,} tokens instead of {wanted:,}"
    return Choice(what, "this text gives no more", f"data.tokenizer.vocab_size={max(size // 2, 1)}")


# Unknown characters ---------------------------------------------------------------------------------------------------


def unknown_warning(share: float, kind: str, facts: TextFacts) -> str:
    """Return the message about a share of unknown characters: the cause in words."""
    if kind == "wordpiece" and facts.long_runs > share / 2:
        cause = f"WordPiece reads a run of more than {LONGEST_WORD} characters without a space as [UNK]"
    else:
        script = next(iter(facts.scripts), "").capitalize()
        cause = f"the tokenizer's vocabulary lacks characters of this text ({script or 'no letters'} mostly)"
    return f"{share:.1%} of the characters are unknown to the tokenizer ([UNK], never learned): {cause}"


def spelling_kind(facts: TextFacts, present: str) -> str:
    """Return a kind of tokenizer that spells a text: the fitting one, else byte-level BPE."""
    kind, _ = fitting_kind(facts, "wordpiece")
    return "bpe" if kind in ("wordpiece", present) else kind
