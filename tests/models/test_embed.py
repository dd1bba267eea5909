"""Sentence vectors: pooling, layers, long texts, batches, and nearest neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import unmask
from unmask.core.errors import ModelError, TextError, UnmaskError
from unmask.core.types import SPECIAL, Sample, pack
from unmask.models import BertConfig, EncoderConfig, ModernBertConfig, NeoMMEConfig, TutorialConfig, build_model
from unmask.models.embed import embed, nearest
from unmask.models.model import Model, save_model
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

SHAPE = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES: dict[str, EncoderConfig] = {
    "bert": BertConfig(**SHAPE, max_position_embeddings=64),
    "modernbert": ModernBertConfig(**SHAPE, local_attention=8, max_position_embeddings=64),
    "neomme": NeoMMEConfig(**SHAPE, head_dim=16, embedding_rank=16, sliding_window=4, max_position_embeddings=64),
    "tutorial": TutorialConfig(**SHAPE, max_position_embeddings=64),
}
TEXTS = [
    "the cat sat on the mat and looked at the moon",
    "salt",
    "a dog ran over the hill to meet the old man",
    "she gave him a book about the birds of the north",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 20, WordPieceConfig(vocab_size=60))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Model:
    return made(FAMILIES[request.param], tokenizer)


def made(settings: EncoderConfig, tokenizer: Tokenizer) -> Model:
    torch.manual_seed(1)
    encoder, head = build_model(settings, tokenizer.size)
    with torch.no_grad():
        for parameter in encoder.parameters():  # the initial output matrices of NeoMME are zero
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return Model(encoder.eval(), head.eval(), tokenizer, settings, {"context": 64})


@torch.inference_mode()
def hidden_of(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """Hidden states of ids, special tokens included."""
    framed = np.array([*model.tokenizer.frame.before, *ids, *model.tokenizer.frame.after])
    return model.encoder(pack([Sample(framed, np.full(len(framed), SPECIAL, np.uint8))]))


def unit(vector: torch.Tensor) -> np.ndarray:
    return (vector / vector.norm()).numpy()


def test_a_vector_is_the_mean_or_the_first_hidden_state(model: Model) -> None:
    mean, first = embed(model, TEXTS), embed(model, TEXTS, pooling="cls")
    assert mean.dtype == np.float32 and mean.shape == (4, 32)
    for row, text in enumerate(TEXTS):
        hidden_TD = hidden_of(model, *model.tokenizer.encode_prompts([text]))
        np.testing.assert_allclose(mean[row], unit(hidden_TD.mean(0)), atol=2e-6)
        np.testing.assert_allclose(first[row], unit(hidden_TD[0]), atol=2e-6)
    np.testing.assert_allclose(embed(model, TEXTS[1])[0], mean[1], atol=2e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_last_layers_are_those_of_transformers(family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An inner layer of ModernBERT passes the final norm, as its last layer does."""
    import transformers

    model = made(FAMILIES[family], tokenizer)
    save_model(tmp_path, model, only_encoder=True)
    peer = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    (ids,) = tokenizer.encode_prompts(TEXTS[:1])
    framed = torch.tensor([[*tokenizer.frame.before, *ids, *tokenizer.frame.after]])
    with torch.inference_mode():
        output = peer(framed, output_hidden_states=True)
        inner = output.hidden_states[2][0]
        inner = peer.final_norm(inner) if family == "modernbert" else inner
        expected = (output.last_hidden_state[0] + inner).mean(0)
    np.testing.assert_allclose(embed(model, TEXTS, last_layers=2)[0], unit(expected), atol=2e-6)


def test_all_layers_of_each_family_are_averaged(model: Model) -> None:
    vectors = [embed(model, TEXTS, last_layers=count) for count in (1, 2, 3)]
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3) and not np.allclose(vectors[1], vectors[2], atol=1e-3)
    assert not any(block._forward_hooks for block in model.encoder.blocks), "the encoder is left as it was"


def test_a_long_text_is_pooled_over_windows(tokenizer: Tokenizer) -> None:
    model = replace(made(FAMILIES["bert"], tokenizer), card={"context": 12})
    text = " ".join(TEXTS)
    (ids,) = tokenizer.encode_prompts([text])
    assert len(ids) > 3 * 10
    hidden = [hidden_of(model, part) for part in np.array_split(ids, -(-len(ids) // 10))]
    np.testing.assert_allclose(embed(model, text)[0], unit(torch.cat(hidden).sum(0)), atol=2e-6)


def test_many_texts_keep_their_order_and_show_progress(tokenizer: Tokenizer) -> None:
    model = made(FAMILIES["bert"], tokenizer)
    texts = [" ".join(TEXTS[: 1 + number % 4]) for number in range(1100)]  # more than are encoded together
    done: list[float] = []
    vectors = embed(model, texts, on_progress=lambda _, fraction: done.append(fraction))
    for number in (0, 1, 2, 3, 1023, 1024, 1099):
        np.testing.assert_allclose(vectors[number], vectors[number % 4], atol=2e-6)
    assert done == sorted(done) and done[-1] == 1.0 and len(done) > 2


def test_the_public_function_checks_its_arguments(tokenizer: Tokenizer) -> None:
    model = made(FAMILIES["bert"], tokenizer)
    with pytest.raises(UnmaskError, match="invalid pooling"):
        unmask.embed(model, TEXTS, pooling="max")  # pyright: ignore[reportArgumentType]
    for layers in (0, 4):
        with pytest.raises(ModelError, match=f"got {layers}, expected 1 to 3"):
            unmask.embed(model, TEXTS, last_layers=layers)
    with pytest.raises(TextError, match=r"no tokens(?s:.)*text 2: ''"):
        unmask.embed(model, ["salt", ""])
    with pytest.raises(ModelError, match="only the tokens before it"):
        unmask.embed(replace(model, card={"objective": "causal"}), TEXTS)
    assert unmask.embed(model, []).shape == (0, 32)


def test_cls_needs_a_first_special_token() -> None:
    tokenizer = train_tokenizer(["abc cab bca"], CharacterConfig(min_frequency=1, special_tokens=("[UNK]", "[MASK]")))
    with pytest.raises(ModelError, match=r"adds no \[CLS\]"):
        embed(made(FAMILIES["bert"], tokenizer), "abc", pooling="cls")


def test_the_nearest_come_first() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float32)
    found = nearest(vectors, np.array([1, 0], np.float32), 3)
    assert [(near.number, round(near.cosine, 3)) for near in found] == [(0, 1.0), (2, 0.6), (1, 0.0)]
    assert len(nearest(vectors, vectors[0], 10)) == 4
