"""Room card: which pieces a byte-level tokenizer has.

Comes in: a sample of text and settings. Goes out: a model of the tokenizers library, the same in every process, or a
TokenizerError that says how many pieces the text gives. Called by: tokenizer.

The library's trainer is reproducible here: its alphabet is the 256 bytes in a fixed order, its counts are whole
numbers, and ties fall by the numbers of the pieces (0.23.3; a test trains in processes with other hash seeds and thread
counts).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from unmask.text.preparation import normalizer_of, pre_tokenizer_of
from unmask.text.vocabulary import (
    BYTES,
    ByteBpeSettings,
    ByteSettings,
    Progress,
    round_below,
    sample_blocks,
    too_few,
)


def train_bpe(texts: Iterable[str], settings: ByteBpeSettings, progress: Progress | None) -> models.Model:
    """Special pieces, the 256 bytes, then joined pairs, the most frequent first.

    Raises:
        TokenizerError: the text can't give as many pieces as asked.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer_of(settings), pre_tokenizer_of(settings)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab,
        min_frequency=settings.minimum_count,
        show_progress=False,
        special_tokens=list(settings.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(sample_blocks(texts, settings, progress), trainer)
    size = trained.get_vocab_size()
    if size < settings.vocab:
        # A smaller one is the beginning of this one; the special pieces and the bytes are always there.
        raise too_few(settings.vocab, size, max(round_below(size), len(settings.specials) + BYTES))
    model = json.loads(trained.to_str())["model"]
    return models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])


def spell_bytes(settings: ByteSettings) -> models.Model:
    """Special pieces and the 256 bytes, in their order: byte-level BPE that joins nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of().__getitem__)
    return models.BPE({piece: number for number, piece in enumerate([*settings.specials, *letters])}, [])


def _byte_of() -> dict[str, int]:
    """The byte that each letter of byte-level pieces stands for, as GPT-2 chose them."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()
