"""Frozen validation: the same characters at every length, whatever the seed; sums that agree with a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import ModelError, TextError
from unmask.core.types import SPECIAL, WORD_START
from unmask.evaluation.masked_lm import Document, EvalSet, build_eval_set, evaluate
from unmask.evaluation.validation import evaluate_text
from unmask.models import build_model
from unmask.models.model import Model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

TEXT = "".join(f"line {i} of a play, where kings {'sleep' if i % 3 else 'wake'}.\n" for i in range(60))


@pytest.fixture(scope="module", params=[("[UNK]", "[MASK]"), ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer([TEXT], CharacterConfig(special_tokens=request.param))


@pytest.fixture(scope="module")
def world() -> DistributedContext:
    return init_distributed("float32", 1)


def document(tokenizer: Tokenizer, text: str = TEXT) -> Document:
    encoded = tokenizer.encode(text, "spaces")
    return Document(encoded.ids, encoded.marks, len(text), encoded.characters_unknown)


def asked_of(held: EvalSet, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """What is asked, as (what is shown in its place, the answer), in an order that does not depend on the cut."""
    pairs = [
        (int(one.batch.ids_T[at]), int(answer))
        for one in held.puzzles
        for at, answer in zip(one.positions_M.tolist(), one.labels_M.tolist(), strict=True)
    ]
    return sorted((tokenizer.id_to_token(shown), answer) for shown, answer in pairs)


def test_the_same_characters_at_every_length(tokenizer: Tokenizer) -> None:
    counts = np.ones(tokenizer.size, np.int64)
    held = [build_eval_set([document(tokenizer)], tokenizer, length, counts) for length in (16, 33, 64, 4000)]
    assert len({one.masked_tokens for one in held}) == 1 and held[0].masked_tokens == pytest.approx(
        0.15 * len(TEXT), abs=1
    )
    assert len({tuple(asked_of(one, tokenizer)) for one in held}) == 1
    assert max(one.batch.max_seqlen for one in held[0].puzzles) <= 16
    again = build_eval_set([document(tokenizer)], tokenizer, 33, counts)
    for one, other in zip(held[1].puzzles, again.puzzles, strict=True):
        assert torch.equal(one.batch.ids_T, other.batch.ids_T) and torch.equal(one.positions_M, other.positions_M)


def test_loss_is_that_of_a_plain_loop(tokenizer: Tokenizer, world: DistributedContext) -> None:
    torch.manual_seed(0)
    encoder, head = build_model(
        ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48),
        tokenizer.size,
    )
    held = build_eval_set([document(tokenizer)], tokenizer, 40, np.ones(tokenizer.size, np.int64))
    found = evaluate(encoder, head, held, world)
    model = Model(encoder, head, tokenizer, encoder.settings)
    nats, right, asked = 0.0, 0, 0
    for one in held.puzzles:
        for b in range(one.batch.num_samples):
            first, last = one.batch.offsets[b], one.batch.offsets[b + 1]
            inside = [(at - first, answer) for at, answer in zip(one.positions_M.tolist(), one.labels_M.tolist(), strict=True)
                      if first <= at < last]  # fmt: skip
            rows = model.log_probabilities([one.batch.ids_T[first:last].tolist()], [[at for at, _ in inside]])[0]
            answers = torch.tensor([answer for _, answer in inside])
            nats += float(F.nll_loss(rows, answers, reduction="sum"))
            right += int((rows.argmax(-1) == answers).sum())
            asked += len(inside)
    assert found.masked_tokens == asked and found.accuracy == pytest.approx(right / asked)
    assert found.loss == pytest.approx(nats / asked, rel=1e-5)
    assert found.bits_per_character == pytest.approx(found.loss * len(TEXT) / len(TEXT) / math.log(2))


def test_unknown_characters_are_on_neither_side(tokenizer: Tokenizer) -> None:
    counts = np.ones(tokenizer.size, np.int64)
    clean = build_eval_set([document(tokenizer)], tokenizer, 64, counts)
    dirty = build_eval_set([document(tokenizer, TEXT + "☃" * 200)], tokenizer, 64, counts)
    assert dirty.unknown_share == pytest.approx(200 / (200 + len(TEXT))) and clean.unknown_share == 0
    assert dirty.tokens == clean.tokens and dirty.characters == clean.characters
    for one in dirty.puzzles:
        assert (one.labels_M != tokenizer.unknown_id).all()


def test_unigram_loss_is_cross_entropy_with_the_training_counts(tokenizer: Tokenizer) -> None:
    one = document(tokenizer)
    counts = np.bincount(one.ids, minlength=tokenizer.size)
    held = build_eval_set([one], tokenizer, 64, counts)
    shares = (counts[tokenizer.regular_token_ids] + 1) / (counts[tokenizer.regular_token_ids] + 1).sum()
    entropy = -(shares * np.log(shares)).sum()
    assert held.unigram_loss == pytest.approx(entropy, abs=0.15)


def test_nothing_to_ask() -> None:
    tokenizer = train_tokenizer(["abc"], CharacterConfig())
    special = Document(np.array([tokenizer.unknown_id]), np.array([SPECIAL | WORD_START], np.uint8), 1, 1)
    with pytest.raises(TextError, match="nothing to ask"):
        build_eval_set([special], tokenizer, 16, np.ones(tokenizer.size, np.int64))


def test_evaluating_a_file_counts_every_character_of_it(
    tmp_path: Path, tokenizer: Tokenizer, world: DistributedContext
) -> None:
    """Bits per character = nats × tokens ÷ characters of the whole file, blank lines between documents included."""
    text = "line 1 of a play,\nwhere kings sleep.\n\n\nline 2\n\n" * 30
    (tmp_path / "a.txt").write_text(text)
    encoder, head = build_model(
        ModernBertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48),
        tokenizer.size,
    )
    model = Model(encoder, head, tokenizer, encoder.settings, {"context": 48})
    found = evaluate_text(model, [tmp_path / "a.txt"], world=world)
    tokens = 30 * (len("line 1 of a play,\nwhere kings sleep.") + len("line 2"))
    assert found.masked_tokens == pytest.approx(0.15 * tokens, rel=0.1)
    assert found.bits_per_character == pytest.approx(found.loss * tokens / len(text) / math.log(2), rel=1e-6)
    with pytest.raises(ModelError, match="length"):
        evaluate_text(model, [tmp_path / "a.txt"], world=world, length=100_000)
