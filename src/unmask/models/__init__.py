"""Room card: from an encoder's settings to its modules, its size and its cost.

Comes in: settings and the size of the vocabulary. Goes out: encoder and head, a pair head where the kind has one, the
number of their parameters, the matrix products of a forward pass, the arithmetic of one training token. Called by:
workshop, bundle, `unmask recipe show`.
"""

from __future__ import annotations

from torch import nn

from unmask.core.errors import RecipeError
from unmask.models.annotated import TutorialConfig, TutorialEncoder, TutorialHead
from unmask.models.bert import BertConfig, BertEncoder, BertHead, SentencePairHead
from unmask.models.modernbert import ModernBertConfig, ModernBertEncoder, ModernBertHead
from unmask.models.structured_init import init_neighbor_attention, init_pair_matching

EncoderConfig = ModernBertConfig | BertConfig | TutorialConfig


def build_model(settings: EncoderConfig, vocabulary: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and head with initial weights drawn from torch's generator, which the caller seeds."""
    if isinstance(settings, ModernBertConfig):
        return ModernBertEncoder(settings, vocabulary), ModernBertHead(settings, vocabulary)
    if isinstance(settings, BertConfig):
        encoder = BertEncoder(settings, vocabulary)
        if settings.init != "normal":
            init_neighbor_attention(encoder)
        if settings.init == "pair-matching":
            init_pair_matching(encoder)
        return encoder, BertHead(settings, vocabulary)
    return TutorialEncoder(settings, vocabulary), TutorialHead(settings, vocabulary)


def build_pair(settings: EncoderConfig) -> nn.Module:
    """The head that reads two logits from each text, with initial weights from torch's generator.

    Raises:
        RecipeError: RoBERTa has none, so that its folders have no place for one.
    """
    assert isinstance(settings, BertConfig), "only the classic encoder has a pair head"
    if settings.model_type != "bert":
        raise RecipeError(
            f"a net of the family {settings.model_type!r} has no pair head",
            location="model.model_type",
            hint="train it on masks alone, or take a BERT folder",
        )
    return SentencePairHead(settings)


def _mlp_input_columns(settings: EncoderConfig) -> int:
    """Columns of the products that lead into the feed-forward net: the gated one has two ways in."""
    return (2 if isinstance(settings, ModernBertConfig) else 1) * settings.intermediate_size


def _matrices_per_layer(settings: EncoderConfig) -> int:
    """Weights of one layer that take part in matrix products."""
    return 4 * settings.hidden_size**2 + settings.hidden_size * (
        _mlp_input_columns(settings) + settings.intermediate_size
    )


def _has_dense_head(settings: EncoderConfig) -> bool:
    """Whether the head has a square matrix before its decoder."""
    return not isinstance(settings, TutorialConfig)


def parameters(settings: EncoderConfig, vocabulary: int) -> int:
    """Parameters of encoder and head together, a tied table counted once, a pair head not at all."""
    layers, width = settings.num_hidden_layers, settings.hidden_size
    table = vocabulary * width
    decoder = 0 if isinstance(settings, TutorialConfig) or settings.tie_word_embeddings else table
    matrices = layers * _matrices_per_layer(settings)
    if isinstance(settings, ModernBertConfig):
        norms = 2 * layers - 1 + 2 + 1  # two a block but for block 0; embedding and final; the head's
        return table + decoder + matrices + norms * width + width**2 + vocabulary
    biases_and_norms = layers * (4 * width + settings.intermediate_size + width + 4 * width)
    if isinstance(settings, BertConfig):
        tables = (
            table
            + decoder
            + (settings.position_offset + settings.max_position_embeddings + settings.type_vocab_size) * width
        )
        head = width**2 + 3 * width + vocabulary  # dense with its bias, norm; the decoder's bias
        return tables + 2 * width + matrices + biases_and_norms + head
    return 2 * table + matrices + biases_and_norms + 2 * width + vocabulary


def parameters_beside_the_table(settings: EncoderConfig, vocabulary: int) -> int:
    """Parameters of encoder and head without the token table: what thinks, as it were, and not what is looked up."""
    return parameters(settings, vocabulary) - vocabulary * settings.hidden_size


def products(settings: EncoderConfig, vocabulary: int, tokens: int, asked: int) -> list[tuple[int, int, int]]:
    """The matrix products of one forward pass as (rows, inner, columns): projections, feed-forward, head.

    Attention's own are left out: their shapes hang on the lengths of the texts.
    """
    width, inner = settings.hidden_size, settings.intermediate_size
    layer = [(tokens, width, width)] * 4 + [(tokens, width, _mlp_input_columns(settings)), (tokens, inner, width)]
    dense = [(asked, width, width)] if _has_dense_head(settings) else []
    return layer * settings.num_hidden_layers + dense + [(asked, width, vocabulary)]


def flops_per_token(settings: EncoderConfig, vocabulary: int, length: int, rate: float) -> float:
    """Floating-point operations of the matrix products of one training token: forward, and twice that backward.

    A multiplication and an addition are two. Attention in a layer costs 4 × keys × width, where a global layer has
    `length` keys and a local one min(length, window); only the share `rate` of the tokens meets the head. Norms,
    softmax, activations and the optimizer are left out, as is usual.
    """
    width = settings.hidden_size
    forward = 2.0 * settings.num_hidden_layers * _matrices_per_layer(settings)
    head = 2.0 * width * vocabulary + (2.0 * width**2 if _has_dense_head(settings) else 0.0)
    keys = settings.num_hidden_layers * length
    if isinstance(settings, ModernBertConfig):
        keys = sum(
            length if settings.sees_all(layer) else min(length, settings.local_attention)
            for layer in range(settings.num_hidden_layers)
        )
    return 3.0 * (forward + 4.0 * keys * width + rate * head)


__all__ = [
    "BertConfig",
    "EncoderConfig",
    "ModernBertConfig",
    "TutorialConfig",
    "build_model",
    "build_pair",
    "flops_per_token",
    "parameters",
    "products",
]
