"""Room card: from an encoder's settings to its modules, its size and its cost.

Comes in: settings and the size of the vocabulary. Goes out: encoder and head, the number of their parameters, the
arithmetic of one training token. Called by: pretrain, bundle, plan.
"""

from __future__ import annotations

from torch import nn

from unmask.nn.modern import ModernEncoder, ModernHead, ModernSettings
from unmask.nn.tutorial import TutorialEncoder, TutorialHead, TutorialSettings

EncoderSettings = ModernSettings | TutorialSettings


def build(settings: EncoderSettings, vocabulary: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and head with initial weights drawn from torch's generator, which the caller seeds."""
    if isinstance(settings, ModernSettings):
        return ModernEncoder(settings, vocabulary), ModernHead(settings, vocabulary)
    return TutorialEncoder(settings, vocabulary), TutorialHead(settings, vocabulary)


def _matrices_per_layer(settings: EncoderSettings) -> int:
    """Weights of one layer that take part in matrix products."""
    into_feed_forward = 3 if isinstance(settings, ModernSettings) else 2  # the gated net has two ways in
    return 4 * settings.width**2 + into_feed_forward * settings.width * settings.feed_forward


def parameters(settings: EncoderSettings, vocabulary: int) -> int:
    """Parameters of encoder and head together, a tied table counted once."""
    layers, width = settings.layers, settings.width
    table = vocabulary * width
    if isinstance(settings, ModernSettings):
        norms = 2 * layers - 1 + 2 + 1  # two a block but for block 0; embedding and final; the head's
        return table + layers * _matrices_per_layer(settings) + norms * width + width**2 + vocabulary
    biases_and_norms = layers * (4 * width + settings.feed_forward + width + 4 * width)
    return 2 * table + layers * _matrices_per_layer(settings) + biases_and_norms + 2 * width + vocabulary


def flops_per_token(settings: EncoderSettings, vocabulary: int, length: int, rate: float) -> float:
    """Floating-point operations of the matrix products of one training token: forward, and twice that backward.

    A multiplication and an addition are two. Attention in a layer costs 4 × keys × width, where a global layer has
    `length` keys and a local one min(length, window); only the share `rate` of the tokens meets the head. Norms,
    softmax, activations and the optimiser are left out, as is usual.
    """
    width = settings.width
    forward = 2.0 * settings.layers * _matrices_per_layer(settings)
    head = 2.0 * width * vocabulary
    keys = settings.layers * length
    if isinstance(settings, ModernSettings):
        head += 2.0 * width**2
        keys = sum(
            length if settings.sees_all(layer) else min(length, settings.local_window)
            for layer in range(settings.layers)
        )
    return 3.0 * (forward + 4.0 * keys * width + rate * head)
