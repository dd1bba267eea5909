"""Frozen sentence pairs: the same for every run, masked at 15 %, half of them true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unmask.core.distributed import DistributedContext
from unmask.core.errors import TextError
from unmask.core.types import SPECIAL, Batch
from unmask.data.shards import Shards, open_shards
from unmask.evaluation.masked_lm import MAX_PAIRS, build_pair_eval_set, evaluate_pairs
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

TEXTS = [" ".join(f"sentence {i} of {j}." for i in range(30)) for j in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, CharacterConfig())


def shards_of(texts: list[str], tokenizer: Tokenizer, folder: Path, write_shards: Any) -> Shards:
    passages = [
        (one.ids, one.marks, len(text), 0, True) for text, one in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]
    write_shards(folder, passages, tokenizer.size, tokenizer.fingerprint)
    return open_shards(folder)


class ConstantHead(nn.Module):
    """A head with the same logits for each pair."""

    def __init__(self, logits: tuple[float, float]) -> None:
        super().__init__()
        self._logits = torch.tensor([logits])

    def forward(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        return self._logits.expand(batch.num_samples, 2)


def test_pairs_are_frozen(tokenizer: Tokenizer, tmp_path: Path, write_shards: Any) -> None:
    shards = shards_of(TEXTS, tokenizer, tmp_path / "shards", write_shards)
    frozen, repeated = (build_pair_eval_set(shards, tokenizer, 64, "next-sentence") for _ in range(2))
    assert frozen.pairs == MAX_PAIRS == sum(batch.num_samples for batch in frozen.batches)
    for one, other in zip(frozen.batches, repeated.batches, strict=True):
        assert torch.equal(one.ids_T, other.ids_T) and torch.equal(one.cu_seqlens, other.cu_seqlens)
        assert one.max_seqlen <= 64 and one.token_type_ids_T is not None and one.tokens <= 16_384
        special = (one.token_flags_T & SPECIAL) != 0
        is_masked = one.ids_T == tokenizer.mask_id
        assert not (special & is_masked).any() and special.sum() == 3 * one.num_samples
        assert 0.10 < float(is_masked.sum() / (~special).sum()) < 0.14, "0.8 of 15 %"
    labels = torch.cat([batch.pair_labels_B for batch in frozen.batches if batch.pair_labels_B is not None])
    follows = float((labels == 0).double().mean())
    assert abs(follows - 0.5) < 4 * np.sqrt(0.25 / frozen.pairs)
    world = DistributedContext(torch.device("cpu"), "float32", 1)
    confident = evaluate_pairs(nn.Identity(), ConstantHead((1.0, 0.0)), frozen, world)
    assert confident.accuracy == pytest.approx(follows) and confident.pairs == frozen.pairs and confident.length == 64
    uniform = evaluate_pairs(nn.Identity(), ConstantHead((0.0, 0.0)), frozen, world)
    assert uniform.loss == pytest.approx(np.log(2), abs=1e-6)


def test_too_few_documents_are_refused(tokenizer: Tokenizer, tmp_path: Path, write_shards: Any) -> None:
    shards = shards_of([TEXTS[0], "one sentence"], tokenizer, tmp_path / "shards", write_shards)
    with pytest.raises(TextError, match="not enough held-out text for sentence pairs: only one document") as caught:
        build_pair_eval_set(shards, tokenizer, 64, "next-sentence")
    assert "held_out" in caught.value.hint
    assert build_pair_eval_set(shards, tokenizer, 64, "sentence-order").pairs > 3
