"""Builds the encoder and heads of each model kind, and counts parameters and FLOPs."""

from __future__ import annotations

import torch
from torch import nn

from unmask.core.errors import RecipeError
from unmask.models.annotated import TutorialConfig, TutorialEncoder, TutorialHead
from unmask.models.bert import BertConfig, BertEncoder, BertHead, SentencePairHead
from unmask.models.layers import EncoderModule, HeadModule
from unmask.models.modernbert import ModernBertConfig, ModernBertEncoder, ModernBertHead
from unmask.models.neomme import NeoMMEConfig, NeoMMEEncoder, NeoMMEHead
from unmask.models.structured_init import init_neighbor_attention, init_pair_matching

EncoderConfig = ModernBertConfig | BertConfig | NeoMMEConfig | TutorialConfig


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
    if isinstance(settings, NeoMMEConfig):
        encoder = NeoMMEEncoder(settings, vocab_size)
        return encoder, NeoMMEHead(encoder)
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
    """Count the parameters of encoder and head without the token embedding and, in NeoMME, the value embedding."""
    width = settings.hidden_size
    if isinstance(settings, NeoMMEConfig):
        width = settings.embedding_rank + settings.num_key_value_heads * settings.head_dim
    return num_parameters(settings, vocab_size) - vocab_size * width


Matrix = tuple[int, int]  # inner size and columns of a matrix product, whose rows are tokens


def _layer_matrices(settings: EncoderConfig) -> list[Matrix]:
    """Return the matrices of one layer: queries, keys and values first, then attention's output and the rest."""
    width, inner = settings.hidden_size, settings.intermediate_size
    if isinstance(settings, NeoMMEConfig):
        heads, groups = (n * settings.head_dim for n in (settings.num_attention_heads, settings.num_key_value_heads))
        # the second one of width `heads` is the gate
        attention = [(width, heads), (width, groups), (width, groups), (width, heads), (heads, width)]
        return [*attention, (width, inner), (inner, width)]
    # A GeGLU has two linear maps before its activation.
    columns = (2 if isinstance(settings, ModernBertConfig) else 1) * inner
    return [(width, width)] * 4 + [(width, columns), (inner, width)]


def _every_token(settings: EncoderConfig) -> list[Matrix]:
    """Return the matrices of all layers that are applied to every token."""
    layer = _layer_matrices(settings)
    # In the last layer of BERT and ModernBERT, what follows attention is computed at masked tokens only.
    last = layer[:3] if isinstance(settings, BertConfig | ModernBertConfig) else layer
    return layer * (settings.num_hidden_layers - 1) + last


def _masked_tokens_only(settings: EncoderConfig, vocab_size: int) -> list[Matrix]:
    """Return the matrices that are applied to masked tokens only: the end of the last layer, and the head."""
    last = _layer_matrices(settings)[3:] if isinstance(settings, BertConfig | ModernBertConfig) else []
    return last + _head_matrices(settings, vocab_size)


def _embedding_matrices(settings: EncoderConfig) -> list[Matrix]:
    """Return the matrix that projects the token embedding, if there is one."""
    return [(settings.embedding_rank, settings.hidden_size)] if isinstance(settings, NeoMMEConfig) else []


def _head_matrices(settings: EncoderConfig, vocab_size: int) -> list[Matrix]:
    """Return the matrices of the head. The tutorial's head is a decoder alone."""
    width = settings.hidden_size
    if isinstance(settings, NeoMMEConfig):
        return [(width, settings.embedding_rank), (settings.embedding_rank, vocab_size)]
    dense = [] if isinstance(settings, TutorialConfig) else [(width, width)]
    return [*dense, (width, vocab_size)]


def products(settings: EncoderConfig, vocab_size: int, tokens: int, masked_tokens: int) -> list[tuple[int, int, int]]:
    """Return the matrix products of a forward pass as (rows, inner, columns): projections, feed-forward, head.

    The products of queries, keys and values are left out, because their shapes depend on the sequence lengths.
    """
    every_token = _embedding_matrices(settings) + _every_token(settings)
    masked_only = _masked_tokens_only(settings, vocab_size)
    return [(tokens, *matrix) for matrix in every_token] + [(masked_tokens, *matrix) for matrix in masked_only]


def electra_products(
    settings: EncoderConfig, generator: EncoderConfig, vocab_size: int, tokens: int, masked_tokens: int
) -> list[tuple[int, int, int]]:
    """Return the matrix products of ELECTRA's forward pass, as `products` does: of the generator and of the encoder."""
    every_token, masked_only = _electra_matrices(settings, generator, vocab_size)
    return [(tokens, *matrix) for matrix in every_token] + [(masked_tokens, *matrix) for matrix in masked_only]


def _electra_matrices(
    settings: EncoderConfig, generator: EncoderConfig, vocab_size: int
) -> tuple[list[Matrix], list[Matrix]]:
    """Return the matrices of ELECTRA that are applied to every token, and those that are applied to masked tokens."""
    width, narrow = settings.hidden_size, generator.hidden_size
    discriminator = _layer_matrices(settings) * settings.num_hidden_layers + [(width, width), (width, 1)]
    head = [(narrow, width), (width, vocab_size)]
    return (
        [*discriminator, (width, narrow), *_every_token(generator)],
        _layer_matrices(generator)[3:] + head,
    )


def _num_weights(matrices: list[Matrix]) -> int:
    return sum(inner * columns for inner, columns in matrices)


def least_weights(settings: EncoderConfig, vocab_size: int) -> int:
    """Return the number of weights in the embeddings and the layers' matrices of an encoder, without building it."""
    width = settings.embedding_rank if isinstance(settings, NeoMMEConfig) else settings.hidden_size
    rows = vocab_size
    if isinstance(settings, BertConfig):
        rows += settings.max_position_embeddings + settings.type_vocab_size
    return rows * width + settings.num_hidden_layers * _num_weights(_layer_matrices(settings))


def _attended_tokens(settings: EncoderConfig, length: int) -> int:
    """Return the number of tokens that a token attends to, summed over the layers."""
    if isinstance(settings, ModernBertConfig):
        return sum(
            length if settings.has_global_attention(layer) else min(length, settings.local_attention)
            for layer in range(settings.num_hidden_layers)
        )
    if isinstance(settings, NeoMMEConfig):
        return sum(length if window is None else min(length, 2 * window) for window in settings.windows)
    return settings.num_hidden_layers * length


def flops_per_token(settings: EncoderConfig, vocab_size: int, length: int, mask_rate: float) -> float:
    """Return the FLOPs of the matrix products per training token. The backward pass costs twice the forward pass.

    A multiplication and an addition count as two FLOPs. Attention costs 4 x keys x width per layer, where keys is
    `length` with global attention and min(length, window) with local attention, and width is that of all heads. The end
    of the last layer and the head process only the masked tokens. Norms, softmax, activations and the optimizer are not
    counted, as usual.
    """
    every_token = _num_weights(_embedding_matrices(settings) + _every_token(settings))
    masked_only = mask_rate * _num_weights(_masked_tokens_only(settings, vocab_size))
    return 3.0 * (2.0 * every_token + _attention_flops(settings, length) + 2.0 * masked_only)


def electra_flops_per_token(
    settings: EncoderConfig, generator: EncoderConfig, vocab_size: int, length: int, mask_rate: float
) -> float:
    """Return the FLOPs per training token as `flops_per_token` does: of the generator, its samples and the encoder.

    Sampling computes the generator's logits once more, without a backward pass.
    """
    every_token, masked_only = map(_num_weights, _electra_matrices(settings, generator, vocab_size))
    attention = _attention_flops(settings, length) + _attention_flops(generator, length)
    sampling = 2.0 * mask_rate * settings.hidden_size * vocab_size
    return 3.0 * (2.0 * every_token + attention + 2.0 * mask_rate * masked_only) + sampling


def _attention_flops(settings: EncoderConfig, length: int) -> float:
    """Return the FLOPs per token of the products of queries, keys and values in a forward pass."""
    return 4.0 * _attended_tokens(settings, length) * settings.num_attention_heads * settings.head_width


__all__ = [
    "BertConfig",
    "EncoderConfig",
    "EncoderModule",
    "HeadModule",
    "ModernBertConfig",
    "NeoMMEConfig",
    "TutorialConfig",
    "build_model",
    "build_pair",
    "electra_flops_per_token",
    "electra_products",
    "flops_per_token",
    "non_embedding_parameters",
    "num_parameters",
    "products",
]
