"""Room card: from an encoder's settings to its modules, its size and its cost.

Comes in: settings and the size of the vocabulary. Goes out: encoder and head, a pair head where the kind has one, the
number of their parameters, the matrix products of a forward pass, the arithmetic of one training token. Called by:
workshop, bundle, `unmask recipe show`.
"""

from __future__ import annotations

from torch import nn

from unmask.core.errors import RecipeError
from unmask.models.annotated import TutorialEncoder, TutorialHead, TutorialSettings
from unmask.models.bert import ClassicEncoder, ClassicHead, ClassicSettings, PairHead
from unmask.models.modernbert import ModernEncoder, ModernHead, ModernSettings
from unmask.models.structured_init import look_across, look_beside

EncoderSettings = ModernSettings | ClassicSettings | TutorialSettings


def build(settings: EncoderSettings, vocabulary: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and head with initial weights drawn from torch's generator, which the caller seeds."""
    if isinstance(settings, ModernSettings):
        return ModernEncoder(settings, vocabulary), ModernHead(settings, vocabulary)
    if isinstance(settings, ClassicSettings):
        encoder = ClassicEncoder(settings, vocabulary)
        if settings.beginning != "random":
            look_beside(encoder)
        if settings.beginning == "pairs":
            look_across(encoder)
        return encoder, ClassicHead(settings, vocabulary)
    return TutorialEncoder(settings, vocabulary), TutorialHead(settings, vocabulary)


def build_pair(settings: EncoderSettings) -> nn.Module:
    """The head that reads two logits from each text, with initial weights from torch's generator.

    Raises:
        RecipeError: RoBERTa has none, so that its folders have no place for one.
    """
    assert isinstance(settings, ClassicSettings), "only the classic encoder has a pair head"
    if settings.family != "bert":
        raise RecipeError(
            f"a net of the family {settings.family!r} has no pair head",
            where="encoder.family",
            next="train it on masks alone, or take a BERT folder",
        )
    return PairHead(settings)


def _into_feed_forward(settings: EncoderSettings) -> int:
    """Columns of the products that lead into the feed-forward net: the gated one has two ways in."""
    return (2 if isinstance(settings, ModernSettings) else 1) * settings.feed_forward


def _matrices_per_layer(settings: EncoderSettings) -> int:
    """Weights of one layer that take part in matrix products."""
    return 4 * settings.width**2 + settings.width * (_into_feed_forward(settings) + settings.feed_forward)


def _has_dense_head(settings: EncoderSettings) -> bool:
    """Whether the head has a square matrix before its decoder."""
    return not isinstance(settings, TutorialSettings)


def parameters(settings: EncoderSettings, vocabulary: int) -> int:
    """Parameters of encoder and head together, a tied table counted once, a pair head not at all."""
    layers, width = settings.layers, settings.width
    table = vocabulary * width
    decoder = 0 if isinstance(settings, TutorialSettings) or settings.tied else table
    matrices = layers * _matrices_per_layer(settings)
    if isinstance(settings, ModernSettings):
        norms = 2 * layers - 1 + 2 + 1  # two a block but for block 0; embedding and final; the head's
        return table + decoder + matrices + norms * width + width**2 + vocabulary
    biases_and_norms = layers * (4 * width + settings.feed_forward + width + 4 * width)
    if isinstance(settings, ClassicSettings):
        tables = table + decoder + (settings.first_position + settings.longest + settings.segments) * width
        head = width**2 + 3 * width + vocabulary  # dense with its bias, norm; the decoder's bias
        return tables + 2 * width + matrices + biases_and_norms + head
    return 2 * table + matrices + biases_and_norms + 2 * width + vocabulary


def parameters_beside_the_table(settings: EncoderSettings, vocabulary: int) -> int:
    """Parameters of encoder and head without the token table: what thinks, as it were, and not what is looked up."""
    return parameters(settings, vocabulary) - vocabulary * settings.width


def products(settings: EncoderSettings, vocabulary: int, tokens: int, asked: int) -> list[tuple[int, int, int]]:
    """The matrix products of one forward pass as (rows, inner, columns): projections, feed-forward, head.

    Attention's own are left out: their shapes hang on the lengths of the texts.
    """
    width, inner = settings.width, settings.feed_forward
    layer = [(tokens, width, width)] * 4 + [(tokens, width, _into_feed_forward(settings)), (tokens, inner, width)]
    dense = [(asked, width, width)] if _has_dense_head(settings) else []
    return layer * settings.layers + dense + [(asked, width, vocabulary)]


def flops_per_token(settings: EncoderSettings, vocabulary: int, length: int, rate: float) -> float:
    """Floating-point operations of the matrix products of one training token: forward, and twice that backward.

    A multiplication and an addition are two. Attention in a layer costs 4 × keys × width, where a global layer has
    `length` keys and a local one min(length, window); only the share `rate` of the tokens meets the head. Norms,
    softmax, activations and the optimiser are left out, as is usual.
    """
    width = settings.width
    forward = 2.0 * settings.layers * _matrices_per_layer(settings)
    head = 2.0 * width * vocabulary + (2.0 * width**2 if _has_dense_head(settings) else 0.0)
    keys = settings.layers * length
    if isinstance(settings, ModernSettings):
        keys = sum(
            length if settings.sees_all(layer) else min(length, settings.local_window)
            for layer in range(settings.layers)
        )
    return 3.0 * (forward + 4.0 * keys * width + rate * head)


__all__ = [
    "ClassicSettings",
    "EncoderSettings",
    "ModernSettings",
    "TutorialSettings",
    "build",
    "build_pair",
    "flops_per_token",
    "parameters",
    "products",
]
