"""First weights: read from what an encoder does, not from what they are."""

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
    """How far a slot's output of the first block moves, in the mean, when the token at each distance is another."""
    first_block = encoder_of(replace(settings, num_hidden_layers=1))
    draw = np.random.default_rng(0)
    ids = draw.integers(5, VOCABULARY, 60)
    before_TD = first_block(pack([text(ids)]))
    moved: dict[int, list[float]] = {}
    for changed in range(20, 40):
        other = ids.copy()
        other[changed] = (other[changed] + 1) % VOCABULARY
        difference_T = (first_block(pack([text(other)])) - before_TD).norm(dim=-1)
        for slot in range(10, 50):
            if slot != changed:
                moved.setdefault(changed - slot, []).append(float(difference_T[slot]))
    return {distance: float(np.mean(values)) for distance, values in moved.items() if abs(distance) < 10}


def test_heads_first_see_the_slots_beside_theirs() -> None:
    beside, random = reach(BESIDE), reach(replace(BESIDE, init="normal"))
    nearest = sorted(beside, key=lambda distance: -beside[distance])[:2]
    far = np.mean([beside[distance] for distance in beside if abs(distance) > 3])
    assert set(nearest) == {-1, 1}, "two heads, the slot before and the one after"
    assert beside[-1] > 5 * far and beside[1] > 5 * far
    assert max(random.values()) < 1.5 * min(random.values()), "at random no distance is preferred"


@pytest.mark.parametrize(("width", "heads"), [(32, 2), (128, 2), (96, 6), (768, 12), (8, 4)])
def test_any_shape_can_begin_so(width: int, heads: int) -> None:
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
def test_a_shape_without_room_for_a_wave_is_refused(width: int, heads: int) -> None:
    with pytest.raises(RecipeError, match="too small to begin with heads that look beside") as refused:
        encoder_of(replace(BESIDE, hidden_size=width, num_attention_heads=heads))
    assert "init=normal" in refused.value.hint


def test_no_two_positions_begin_alike_to_the_end_of_the_table() -> None:
    table_PD = encoder_of(replace(BESIDE, max_position_embeddings=512)).position_embedding.detach()
    apart_PP = torch.cdist(table_PD, table_PD) + torch.eye(512)
    assert apart_PP.min() > 0.1 * table_PD.norm(dim=-1).max()


PAIRS = BertConfig(
    num_hidden_layers=3,
    hidden_size=128,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
    init="pair-matching",
)


@torch.no_grad()
def told_by_a_line(settings: BertConfig, count: int = 400) -> float:
    """Share of new pairs, tokens in common or not, that one direction of the first slot's vector tells apart."""
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


def test_what_two_segments_have_in_common_can_be_read_at_birth() -> None:
    """Of 200 pairs: 50 % is chance, with a standard error of 3.5 points."""
    assert told_by_a_line(PAIRS) > 0.8
    assert told_by_a_line(replace(PAIRS, init="neighbor-attention")) < 0.65


@pytest.mark.parametrize(
    "small",
    [{"num_hidden_layers": 1}, {"num_attention_heads": 1}, {"type_vocab_size": 1}, {"hidden_size": 64}],
)
def test_an_encoder_too_small_for_pairs_is_refused(small: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="too small to begin with heads for pairs") as refused:
        encoder_of(replace(PAIRS, **small))  # pyright: ignore[reportArgumentType]
    assert refused.value.hint and "init=neighbor-attention" in refused.value.hint
