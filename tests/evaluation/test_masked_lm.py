"""Frozen evaluation sets: the same masked tokens at every length; results equal those of a plain loop."""

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


def asked_of(eval_set: EvalSet, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """Masked tokens as (input, label), in an order that does not depend on the sequence length."""
    pairs = [
        (int(one.batch.ids_T[at]), int(label))
        for one in eval_set.batches
        for at, label in zip(one.positions_M.tolist(), one.labels_M.tolist(), strict=True)
    ]
    return sorted((tokenizer.id_to_token(shown), label) for shown, label in pairs)


def test_the_masked_tokens_are_the_same_at_every_length(tokenizer: Tokenizer) -> None:
    counts = np.ones(tokenizer.size, np.int64)
    eval_set = [build_eval_set([document(tokenizer)], tokenizer, length, counts) for length in (16, 33, 64, 4000)]
    assert len({one.masked_tokens for one in eval_set}) == 1 and eval_set[0].masked_tokens == pytest.approx(
        0.15 * len(TEXT), abs=1
    )
    assert len({tuple(asked_of(one, tokenizer)) for one in eval_set}) == 1
    assert max(one.batch.max_seqlen for one in eval_set[0].batches) <= 16
    again = build_eval_set([document(tokenizer)], tokenizer, 33, counts)
    for one, other in zip(eval_set[1].batches, again.batches, strict=True):
        assert torch.equal(one.batch.ids_T, other.batch.ids_T) and torch.equal(one.positions_M, other.positions_M)


def test_results_equal_those_of_a_plain_loop(tokenizer: Tokenizer, world: DistributedContext) -> None:
    torch.manual_seed(0)
    encoder, head = build_model(
        ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48),
        tokenizer.size,
    )
    eval_set = build_eval_set([document(tokenizer)], tokenizer, 40, np.ones(tokenizer.size, np.int64))
    result = evaluate(encoder, head, eval_set, world)
    model = Model(encoder, head, tokenizer, encoder.settings)
    nats, correct, count = 0.0, 0, 0
    for one in eval_set.batches:
        for b in range(one.batch.num_samples):
            first, last = one.batch.offsets[b], one.batch.offsets[b + 1]
            pairs = zip(one.positions_M.tolist(), one.labels_M.tolist(), strict=True)
            inside = [(at - first, label) for at, label in pairs if first <= at < last]
            rows = model.log_probabilities([one.batch.ids_T[first:last].tolist()], [[at for at, _ in inside]])[0]
            labels = torch.tensor([label for _, label in inside])
            nats += float(F.nll_loss(rows, labels, reduction="sum"))
            correct += int((rows.argmax(-1) == labels).sum())
            count += len(inside)
    assert result.masked_tokens == count and result.accuracy == pytest.approx(correct / count)
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.bits_per_character == pytest.approx(result.loss * len(TEXT) / len(TEXT) / math.log(2))


def test_unknown_tokens_do_not_count(tokenizer: Tokenizer) -> None:
    counts = np.ones(tokenizer.size, np.int64)
    clean = build_eval_set([document(tokenizer)], tokenizer, 64, counts)
    dirty = build_eval_set([document(tokenizer, TEXT + "☃" * 200)], tokenizer, 64, counts)
    assert dirty.unknown_share == pytest.approx(200 / (200 + len(TEXT))) and clean.unknown_share == 0
    assert dirty.tokens == clean.tokens and dirty.characters == clean.characters
    for one in dirty.batches:
        assert (one.labels_M != tokenizer.unknown_id).all()


def test_unigram_loss_is_the_cross_entropy_with_training_counts(tokenizer: Tokenizer) -> None:
    one = document(tokenizer)
    counts = np.bincount(one.ids, minlength=tokenizer.size)
    eval_set = build_eval_set([one], tokenizer, 64, counts)
    shares = (counts[tokenizer.regular_token_ids] + 1) / (counts[tokenizer.regular_token_ids] + 1).sum()
    entropy = -(shares * np.log(shares)).sum()
    assert eval_set.unigram_loss == pytest.approx(entropy, abs=0.15)


def test_text_without_maskable_tokens_is_refused() -> None:
    tokenizer = train_tokenizer(["abc"], CharacterConfig())
    special = Document(np.array([tokenizer.unknown_id]), np.array([SPECIAL | WORD_START], np.uint8), 1, 1)
    with pytest.raises(TextError, match="no token of the evaluation text can be masked"):
        build_eval_set([special], tokenizer, 16, np.ones(tokenizer.size, np.int64))


def test_every_character_of_a_file_counts(tmp_path: Path, tokenizer: Tokenizer, world: DistributedContext) -> None:
    """Bits per character = nats × tokens ÷ characters of the whole file, blank lines between documents included."""
    text = "line 1 of a play,\nwhere kings sleep.\n\n\nline 2\n\n" * 30
    (tmp_path / "a.txt").write_text(text)
    encoder, head = build_model(
        ModernBertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48),
        tokenizer.size,
    )
    model = Model(encoder, head, tokenizer, encoder.settings, {"context": 48})
    result = evaluate_text(model, [tmp_path / "a.txt"], context=world)
    tokens = 30 * (len("line 1 of a play,\nwhere kings sleep.") + len("line 2"))
    assert result.masked_tokens == pytest.approx(0.15 * tokens, rel=0.1)
    assert result.bits_per_character == pytest.approx(result.loss * tokens / len(text) / math.log(2), rel=1e-6)
    with pytest.raises(ModelError, match="length"):
        evaluate_text(model, [tmp_path / "a.txt"], context=world, length=100_000)
