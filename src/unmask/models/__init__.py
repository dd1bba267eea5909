"""Builds the encoder and heads of each model kind, and counts parameters and FLOPs."""

from __future__ import annotations

import torch
from torch import nn

from unmask.core.errors import RecipeError
from unmask.models.annotated import TutorialConfig, TutorialEncoder, TutorialHead
from unmask.models.bert import BertConfig, BertEncoder, BertHead, SentencePairHead
from unmask.models.layers import EncoderModule, HeadModule
from unmask.models.modernbert import ModernBertConfig, ModernBertEncoder, ModernBertHead
from unmask.models.structured_init import init_neighbor_attention, init_pair_matching

EncoderConfig = ModernBertConfig | BertConfig | TutorialConfig


def build_model(settings: EncoderConfig, vocab_size: int) -> tuple[EncoderModule, HeadModule]:
    """Return encoder and head with initial weights from torch's default generator, which the caller seeds.

    Raises:
        RecipeError: the encoder is too small for its structured initialization.
    """
    if isinstance(settings, ModernBertConfig):
        return ModernBertEncoder(settings, vocab_size), ModernBertHead(settings, vocab_size)
    if isinstance(settings, BertConfig):
        encoder = BertEncoder(settings, vocab_size)
        if settings.init != "normal" and not encoder.token_embedding.is_meta:
            init_neighbor_attention(encoder)
            if settings.init == "pair-matching":
                init_pair_matching(encoder)
        return encoder, BertHead(settings, vocab_size)
    return TutorialEncoder(settings, vocab_size), TutorialHead(settings, vocab_size)


def build_pair(settings: EncoderConfig) -> nn.Module:
    """Return the sentence pair head with initial weights from torch's default generator.

    Raises:
        RecipeError: the model type is RoBERTa or XLM-R, which have no such head.
    """
    assert isinstance(settings, BertConfig), "only BERT has a sentence pair head"
    if settings.model_type != "bert":
        raise RecipeError(
            f"a model of type {settings.model_type!r} has no sentence pair head",
            location="model.model_type",
            hint="train it with objective.kind=mlm, or use a BERT model",
        )
    return SentencePairHead(settings)


def num_parameters(settings: EncoderConfig, vocab_size: int) -> int:
    """Count the parameters of encoder and head, without a sentence pair head. A tied decoder counts once."""
    with torch.device("meta"):
        modules = build_model(settings, vocab_size)
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def non_embedding_parameters(settings: EncoderConfig, vocab_size: int) -> int:
    """Count the parameters of encoder and head without the token embedding."""
    return num_parameters(settings, vocab_size) - vocab_size * settings.hidden_size


def _mlp_input_columns(settings: EncoderConfig) -> int:
    """Return the total output width of the first linear maps of the feed-forward network. A GeGLU has two."""
    return (2 if isinstance(settings, ModernBertConfig) else 1) * settings.intermediate_size


def _matrix_weights_per_layer(settings: EncoderConfig) -> int:
    """Return the number of weights in the matrices of one layer."""
    return 4 * settings.hidden_size**2 + settings.hidden_size * (
        _mlp_input_columns(settings) + settings.intermediate_size
    )


def _has_dense_head(settings: EncoderConfig) -> bool:
    """Whether the head has a square matrix before its decoder."""
    return not isinstance(settings, TutorialConfig)


def products(settings: EncoderConfig, vocab_size: int, tokens: int, masked_tokens: int) -> list[tuple[int, int, int]]:
    """Return the matrix products of a forward pass as (rows, inner, columns): projections, feed-forward, head.

    The products of queries, keys and values are left out, because their shapes depend on the sequence lengths.
    """
    width, inner = settings.hidden_size, settings.intermediate_size
    layer = [(tokens, width, width)] * 4 + [(tokens, width, _mlp_input_columns(settings)), (tokens, inner, width)]
    dense = [(masked_tokens, width, width)] if _has_dense_head(settings) else []
    return layer * settings.num_hidden_layers + dense + [(masked_tokens, width, vocab_size)]


def flops_per_token(settings: EncoderConfig, vocab_size: int, length: int, mask_rate: float) -> float:
    """Return the FLOPs of the matrix products per training token. The backward pass costs twice the forward pass.

    A multiplication and an addition count as two FLOPs. Attention costs 4 x keys x width per layer, where keys is
    `length` with global attention and min(length, window) with local attention. The head processes only the masked
    tokens. Norms, softmax, activations and the optimizer are left out, as usual.
    """
    width = settings.hidden_size
    forward = 2.0 * settings.num_hidden_layers * _matrix_weights_per_layer(settings)
    head = 2.0 * width * vocab_size + (2.0 * width**2 if _has_dense_head(settings) else 0.0)
    keys = settings.num_hidden_layers * length
    if isinstance(settings, ModernBertConfig):
        keys = sum(
            length if settings.has_global_attention(layer) else min(length, settings.local_attention)
            for layer in range(settings.num_hidden_layers)
        )
    return 3.0 * (forward + 4.0 * keys * width + mask_rate * head)


__all__ = [
    "BertConfig",
    "EncoderConfig",
    "EncoderModule",
    "HeadModule",
    "ModernBertConfig",
    "TutorialConfig",
    "build_model",
    "build_pair",
    "flops_per_token",
    "non_embedding_parameters",
    "num_parameters",
    "products",
]
