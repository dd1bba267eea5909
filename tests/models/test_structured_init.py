"""Structured initialization: tested by the behavior of the encoder, not by its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from unmask.core.errors import RecipeError
from unmask.core.types import Sample, pack
from unmask.models import build_model
from unmask.models.bert import BertConfig, BertEncoder

VOCABULARY = 400
BESIDE = BertConfig(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    init="neighbor-attention",
)


def encoder_of(settings: BertConfig) -> BertEncoder:
    torch.manual_seed(3)
    encoder = build_model(settings, VOCABULARY)[0]
    assert isinstance(encoder, BertEncoder)
    return encoder.eval()


def text(ids: np.ndarray, segment: np.ndarray | None = None) -> Sample:
    return Sample(ids.astype(np.int64), np.zeros(len(ids), np.uint8), number=0, token_type_ids=segment)


@torch.no_grad()
def reach(settings: BertConfig) -> dict[int, float]:
    """Mean change of the first block's output when the token at each distance is replaced."""
    first_block = encoder_of(replace(settings, num_hidden_layers=1))
    draw = np.random.default_rng(0)
    ids = draw.integers(5, VOCABULARY, 60)
    before_TD = first_block(pack([text(ids)]))
    changes: dict[int, list[float]] = {}
    for changed in range(20, 40):
        other = ids.copy()
        other[changed] = (other[changed] + 1) % VOCABULARY
        difference_T = (first_block(pack([text(other)])) - before_TD).norm(dim=-1)
        for position in range(10, 50):
            if position != changed:
                changes.setdefault(changed - position, []).append(float(difference_T[position]))
    return {distance: float(np.mean(values)) for distance, values in changes.items() if abs(distance) < 10}


def test_heads_attend_to_neighboring_tokens() -> None:
    beside, random = reach(BESIDE), reach(replace(BESIDE, init="normal"))
    nearest = sorted(beside, key=lambda distance: -beside[distance])[:2]
    far = np.mean([beside[distance] for distance in beside if abs(distance) > 3])
    assert set(nearest) == {-1, 1}, "two heads: the token before and the one after"
    assert beside[-1] > 5 * far and beside[1] > 5 * far
    assert max(random.values()) < 1.5 * min(random.values()), "with random weights, no distance is preferred"


@pytest.mark.parametrize(("width", "heads"), [(32, 2), (128, 2), (96, 6), (768, 12), (8, 4)])
def test_any_shape_can_be_initialized(width: int, heads: int) -> None:
    shape = BertConfig(
        num_hidden_layers=1,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=8,
        max_position_embeddings=70,
        init="neighbor-attention",
    )
    hidden_TD = encoder_of(shape)(pack([text(np.arange(5, 60))]))
    assert torch.isfinite(hidden_TD).all()


@pytest.mark.parametrize(("width", "heads"), [(8, 8), (4, 1)])
def test_a_shape_without_dimensions_for_a_wave_is_refused(width: int, heads: int) -> None:
    with pytest.raises(RecipeError, match="too small for init=neighbor-attention") as refused:
        encoder_of(replace(BESIDE, hidden_size=width, num_attention_heads=heads))
    assert "init=normal" in refused.value.hint


def test_all_position_embeddings_differ() -> None:
    table_PD = encoder_of(replace(BESIDE, max_position_embeddings=512)).position_embedding.detach()
    distance_PP = torch.cdist(table_PD, table_PD) + torch.eye(512)
    assert distance_PP.min() > 0.1 * table_PD.norm(dim=-1).max()


PAIRS = BertConfig(
    num_hidden_layers=3,
    hidden_size=128,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
    init="pair-matching",
)


@torch.no_grad()
def linear_separability(settings: BertConfig, count: int = 400) -> float:
    """Fraction of new pairs (with or without common tokens) that a linear classifier of the first vector gets right."""
    encoder = encoder_of(settings)
    draw = np.random.default_rng(5)
    texts: list[Sample] = []
    for number in range(count):
        a, b = draw.choice(np.arange(5, VOCABULARY), 48, replace=False).reshape(2, 24)
        if number % 2 == 0:
            b[:6] = draw.permutation(a)[:6]
            b = draw.permutation(b)
        segment = np.repeat([0, 1], [26, 25])
        texts.append(text(np.concatenate([[2], a, [3], b, [3]]), segment))
    batch = pack(texts)
    first_BD = encoder(batch).index_select(0, batch.cu_seqlens[:count])
    common_D, apart_D = (first_BD[start : count // 2 : 2].mean(0) for start in (0, 1))
    along_D = (common_D - apart_D) / first_BD[: count // 2].var(0)
    score_B = first_BD @ along_D
    threshold = score_B[: count // 2].median()
    return float(((score_B > threshold) == (torch.arange(count) % 2 == 0))[count // 2 :].float().mean())


def test_common_tokens_of_two_segments_are_linearly_separable() -> None:
    """Of 200 pairs: 50 % is chance, with a standard error of 3.5 points."""
    assert linear_separability(PAIRS) > 0.8
    assert linear_separability(replace(PAIRS, init="neighbor-attention")) < 0.65


@pytest.mark.parametrize(
    "small",
    [{"num_hidden_layers": 1}, {"num_attention_heads": 1}, {"type_vocab_size": 1}, {"hidden_size": 64}],
)
def test_an_encoder_too_small_for_pairs_is_refused(small: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="too small for init=pair-matching") as refused:
        encoder_of(replace(PAIRS, **small))  # pyright: ignore[reportArgumentType]
    assert refused.value.hint and "init=neighbor-attention" in refused.value.hint
