"""Frozen pairs: the same for every run, hidden at 15 %, half of them true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unmask.core.distributed import DistributedContext
from unmask.core.errors import TextError
from unmask.core.types import SPECIAL, Batch
from unmask.data.shards import EncodedPassage, Shards, open_shards, write_shards
from unmask.evaluation.sentence_pairs import PAIRS_AT_MOST, build_pair_eval_set, evaluate_pairs
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

TEXTS = [" ".join(f"sentence {i} of {j}." for i in range(30)) for j in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, CharacterConfig())


def shards_of(texts: list[str], tokenizer: Tokenizer, folder: Path) -> Shards:
    passages = [
        EncodedPassage(one.ids, one.marks, len(text), 0, last=True)
        for text, one in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]
    write_shards(folder, passages, tokenizer.size, tokenizer.fingerprint)
    return open_shards(folder)


class Says(nn.Module):
    """A head that gives each pair the same answer."""

    def __init__(self, logits: tuple[float, float]) -> None:
        super().__init__()
        self._logits = torch.tensor([logits])

    def forward(self, hidden_TD: Tensor, batch: Batch) -> Tensor:
        return self._logits.expand(batch.num_samples, 2)


def test_they_never_change(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = shards_of(TEXTS, tokenizer, tmp_path / "shards")
    frozen, again = (build_pair_eval_set(shards, tokenizer, 64, "next-sentence") for _ in range(2))
    assert frozen.pairs == PAIRS_AT_MOST == sum(batch.num_samples for batch in frozen.batches)
    for one, other in zip(frozen.batches, again.batches, strict=True):
        assert torch.equal(one.ids_T, other.ids_T) and torch.equal(one.cu_seqlens, other.cu_seqlens)
        assert one.max_seqlen <= 64 and one.token_type_ids_T is not None and one.tokens <= 16_384
        special = (one.token_flags_T & SPECIAL) != 0
        hidden = one.ids_T == tokenizer.mask_id
        assert not (special & hidden).any() and special.sum() == 3 * one.num_samples
        assert 0.10 < float(hidden.sum() / (~special).sum()) < 0.14, "0.8 of 15 %"
    labels = torch.cat([batch.pair_labels_B for batch in frozen.batches if batch.pair_labels_B is not None])
    follows = float((labels == 0).double().mean())
    assert abs(follows - 0.5) < 4 * np.sqrt(0.25 / frozen.pairs)
    world = DistributedContext(torch.device("cpu"), "float32", 1)
    sure = evaluate_pairs(nn.Identity(), Says((1.0, 0.0)), frozen, world)
    assert sure.accuracy == pytest.approx(follows) and sure.pairs == frozen.pairs and sure.length == 64
    guess = evaluate_pairs(nn.Identity(), Says((0.0, 0.0)), frozen, world)
    assert guess.loss == pytest.approx(np.log(2), abs=1e-6)


def test_too_few_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = shards_of([TEXTS[0], "one sentence"], tokenizer, tmp_path / "shards")
    with pytest.raises(TextError, match="of the held-out text, only one document") as caught:
        build_pair_eval_set(shards, tokenizer, 64, "next-sentence")
    assert "held_out" in caught.value.hint
    assert build_pair_eval_set(shards, tokenizer, 64, "sentence-order").pairs > 3
