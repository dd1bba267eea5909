"""Room card: which pieces a byte-level tokenizer has.

Comes in: a sample of text and settings. Goes out: a model of the tokenizers library, the same in every process, or a
TokenizerError that says how many pieces the text gives. Called by: tokenizer.

The library's trainer is reproducible here: its alphabet is the 256 bytes in a fixed order, its counts are whole
numbers, and ties fall by the numbers of the pieces (0.23.3; a test trains in processes with other hash seeds and thread
counts).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from unmask.tokenization.normalization import normalizer_of, pre_tokenizer_of
from unmask.tokenization.settings import (
    BYTES,
    LONGEST_WORD,
    PREFIX,
    UNKNOWN,
    ByteBpeConfig,
    ByteConfig,
    CharacterConfig,
    Progress,
    WordPieceConfig,
    round_below,
    sample_blocks,
    too_few,
)
from unmask.tokenization.words import codes


def train_bpe(texts: Iterable[str], settings: ByteBpeConfig, progress: Progress | None) -> models.Model:
    """Special pieces, the 256 bytes, then joined pairs, the most frequent first.

    Raises:
        TokenizerError: the text can't give as many pieces as asked.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        show_progress=False,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(sample_blocks(texts, settings, progress), trainer)
    size = trained.get_vocab_size()
    if size < settings.vocab_size:
        # A smaller one is the beginning of this one; the special pieces and the bytes are always there.
        raise too_few(settings.vocab_size, size, max(round_below(size), len(settings.special_tokens) + BYTES))
    model = json.loads(trained.to_str())["model"]
    return models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])


def spell_bytes(settings: ByteConfig) -> models.Model:
    """Special pieces and the 256 bytes, in their order: byte-level BPE that joins nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of().__getitem__)
    return models.BPE({piece: number for number, piece in enumerate([*settings.special_tokens, *letters])}, [])


def _byte_of() -> dict[str, int]:
    """The byte that each letter of byte-level pieces stands for, as GPT-2 chose them."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()

_COVERAGE: Final = 0.9999  # of the sample's characters; English Wikipedia needs 440 different ones, Korean 6,400
_SPACE: Final = 0x20
_CODES: Final = 0x110000


def choose_wordpieces(texts: Iterable[str], settings: WordPieceConfig, progress: Progress | None = None) -> list[str]:
    """The vocabulary in its order: the special pieces, then by count in the sample, then by text.

    Raises:
        TokenizerError: the text can't give as many pieces as asked.
    """
    normalizer = normalizer_of(settings)
    blocks = [normalizer.normalize_str(block) for block in sample_blocks(texts, settings, progress)]
    pieces = _wordpieces(blocks, settings)
    if len(pieces) < settings.vocab_size:
        # With a smaller vocabulary fewer characters may have a place: so a round number is looked for that does fit.
        fits = round_below(len(pieces))
        while (
            fits > len(settings.special_tokens) and len(_wordpieces(blocks, replace(settings, vocab_size=fits))) < fits
        ):
            fits = round_below(fits - 1)
        raise too_few(settings.vocab_size, len(pieces), fits if fits > len(settings.special_tokens) else 0)
    return pieces


def choose_characters(texts: Iterable[str], settings: CharacterConfig) -> list[str]:
    """The special pieces, then characters by count, then code point."""
    counts_C = np.zeros(_CODES, dtype=np.int64)
    normalizer = normalizer_of(settings)
    for text in texts:
        seen_N, times_N = np.unique(codes(normalizer.normalize_str(text)), return_counts=True)
        counts_C[seen_N] += times_N
    return [*settings.special_tokens, *(chr(code) for code in _by_count(counts_C, settings.min_frequency))]


def _by_count(counts_C: NDArray[np.int64], minimum: int) -> list[int]:
    """Code points that occur often enough, the most frequent first, then by number."""
    found_N = np.flatnonzero(counts_C >= max(1, minimum))
    return found_N[np.argsort(-counts_C[found_N], kind="stable")].tolist()


def _wordpieces(blocks: Sequence[str], settings: WordPieceConfig) -> list[str]:
    """At most `vocab_size` pieces in their order; fewer where the text gives no more.

    First come the most frequent characters, each with the piece that continues a word where it can, until they cover
    99.99 % of the sample or fill half of the vocabulary. The rest goes to what the trainer joins and to characters that
    stand apart (Han, punctuation) and found no place before, whichever the sample has more of: so Chinese keeps its
    characters and Korean its words. Where there is still room, the other characters follow.
    """
    counts_C = np.zeros(_CODES, dtype=np.int64)
    for block in blocks:
        counts_C += np.bincount(codes(block), minlength=_CODES)
    counts_C[[code for code in np.flatnonzero(counts_C).tolist() if chr(code).isspace()]] = 0
    spelled, left, spare = _alphabet(counts_C, settings)
    if not spelled:
        return list(settings.special_tokens)
    keeps_C = np.zeros(_CODES, dtype=bool)
    keeps_C[[ord(piece) for piece in spelled if len(piece) == 1]] = True
    cleaned = [_only(block, keeps_C) for block in blocks]
    joined = _train(cleaned, spelled, settings)
    counts = _count_pieces(cleaned, spelled + joined)
    counts |= {piece: int(counts_C[ord(piece)]) if len(piece) == 1 else 0 for piece in left + spare}
    further = sorted(set(joined) | set(left), key=lambda piece: (-counts[piece], piece))
    chosen = [*spelled, *further, *spare][: settings.vocab_size - len(settings.special_tokens)]
    return [*settings.special_tokens, *sorted(chosen, key=lambda piece: (-counts[piece], piece))]


def _alphabet(counts_C: NDArray[np.int64], settings: WordPieceConfig) -> tuple[list[str], list[str], list[str]]:
    """Pieces that words are spelled with, further characters that stand apart, pieces of all other characters."""
    spelled, left, spare = list[str](), list[str](), list[str]()
    pre_tokenizer, normalizer = pre_tokenizers.BertPreTokenizer(), normalizer_of(settings)
    is_full, covered, enough = False, 0, _COVERAGE * int(counts_C.sum())
    for code in _by_count(counts_C, settings.min_frequency):
        character = chr(code)
        is_apart = len(pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(f"a{character}a"))) > 1
        pieces = [character] if is_apart else [character, PREFIX + character]
        is_full = is_full or covered >= enough or len(spelled) + len(pieces) > settings.vocab_size // 2
        covered += int(counts_C[code])
        if not is_full:
            spelled += pieces
        elif is_apart:
            left += pieces
        else:
            spare += pieces
    return spelled, left, spare


def _only(block: str, keeps_C: NDArray[np.bool_]) -> str:
    """The text with a space for every character outside the alphabet."""
    codes_N = codes(block)
    return np.where(keeps_C[codes_N], codes_N, np.uint32(_SPACE)).tobytes().decode("utf-32-le")


def _train(cleaned: Sequence[str], spelled: Sequence[str], settings: WordPieceConfig) -> list[str]:
    """The pieces that the trainer makes by joining those that it is given."""
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size - len(settings.special_tokens),
        min_frequency=settings.min_frequency,
        show_progress=False,
        special_tokens=list(spelled),  # so they are numbered in this order, and ties fall the same way
        continuing_subword_prefix=PREFIX,
    )
    trained.train_from_iterator(cleaned, trainer)
    known = set(spelled) | set(settings.special_tokens)
    return [piece for piece in trained.get_vocab() if piece not in known]


def _count_pieces(cleaned: Sequence[str], pieces: Sequence[str]) -> dict[str, int]:
    """How often each piece occurs in the sample."""
    vocabulary = {piece: number for number, piece in enumerate((UNKNOWN, *pieces))}
    counting = tokenizers.Tokenizer(
        models.WordPiece(
            vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=PREFIX, max_input_chars_per_word=LONGEST_WORD
        )
    )
    counting.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts_V = np.zeros(len(vocabulary), dtype=np.int64)
    for first in range(0, len(cleaned), 8):  # a few at a time: what an encoding holds is many times its text
        for encoding in counting.encode_batch_fast(list(cleaned[first : first + 8])):
            counts_V += np.bincount(np.array(encoding.ids, dtype=np.int64), minlength=len(vocabulary))
    return {piece: int(counts_V[number]) for piece, number in vocabulary.items()}
