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

from typing import Final

from tokenizers import Regex, normalizers, pre_tokenizers

from unmask.text.vocabulary import CharacterSettings, TrainedSettings, UnigramSettings, WordPieceSettings

META: Final = "▁"  # U+2581, which stands for a space in Unigram's pieces
_RUN: Final = r"[^\p{P}\p{S}\p{Z}\p{Cc}]+"
_ALONE: Final = r"[\p{P}\p{S}][\p{M}\p{Cf}]*"
_WHITE: Final = r"[\p{Z}\p{Cc}]"
# The last space before a word goes with the word, other white space is apart.
_SPACED_WORDS: Final = rf" ?{_RUN}| ?{_ALONE}|{_WHITE}+(?= [^\p{{Z}}\p{{Cc}}])|{_WHITE}+"
_META_WORDS: Final = rf"{META}?{_RUN}|{META}?(?!{META}){_ALONE}|{META}"
_CHARACTERS: Final = r"[\s\S]"  # "(?s)." would say the same and is refused by the library's regex engine
CUTTING_PATTERNS: Final = (_SPACED_WORDS, _META_WORDS, _CHARACTERS)  # no match goes on over a single space


def normalizer_of(settings: TrainedSettings) -> normalizers.Normalizer:
    """NFC, then BERT's steps as far as they are asked for."""
    chinese = isinstance(settings, WordPieceSettings) and settings.handle_chinese_chars
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
    if isinstance(settings, UnigramSettings) and settings.clean_text:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False, right=True)]
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def pre_tokenizer_of(settings: TrainedSettings) -> pre_tokenizers.PreTokenizer:
    """The borders that no piece crosses."""
    if isinstance(settings, WordPieceSettings):
        return pre_tokenizers.BertPreTokenizer()
    if isinstance(settings, CharacterSettings):
        return pre_tokenizers.Split(Regex(_CHARACTERS), "isolated")
    if isinstance(settings, UnigramSettings):
        # "first": a text that begins within a word, as after [MASK], gets no space put before it.
        spaces = pre_tokenizers.Metaspace(replacement=META, prepend_scheme="first", split=False)
        return pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(_META_WORDS), "isolated")])
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPACED_WORDS), "isolated"), spelled])
