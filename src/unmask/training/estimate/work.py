"""Matrix products of a training step, by the recipe's model and objectives."""

from __future__ import annotations

from unmask.models import EncoderConfig, electra_flops_per_token, electra_products, flops_per_token, products
from unmask.models.electra import generator_config, require_electra_encoder
from unmask.objectives.rtd import ReplacedTokenConfig
from unmask.training.recipe import Recipe


def generator_of(recipe: Recipe, stage: int) -> EncoderConfig | None:
    """Returns the architecture of the generator that a stage trains besides the model; None if it trains none.

    Raises:
        RecipeError: replaced token detection can't train this model.
    """
    objective = recipe.objectives[stage]
    if not isinstance(objective, ReplacedTokenConfig):
        return None
    encoder = require_electra_encoder(recipe.model)
    return generator_config(encoder, objective.generator_width, objective.generator_depth)


def stage_flops_per_token(recipe: Recipe, stage: int, vocab_size: int) -> float:
    """Returns the FLOPs per token of the matrix products in the steps of a stage, forward and backward."""
    length, fraction = recipe.stage[stage].max_seq_len, recipe.objectives[stage].masked_fraction
    if generator := generator_of(recipe, stage):
        return electra_flops_per_token(recipe.model, generator, vocab_size, length, fraction)
    return flops_per_token(recipe.model, vocab_size, length, fraction)


def stage_products(recipe: Recipe, stage: int, vocab_size: int, tokens: int) -> list[tuple[int, int, int]]:
    """Returns the matrix products of a forward pass of a stage over `tokens` tokens, as (rows, inner, columns)."""
    masked_tokens = max(1, round(tokens * recipe.objectives[stage].masked_fraction))
    if generator := generator_of(recipe, stage):
        return electra_products(recipe.model, generator, vocab_size, tokens, masked_tokens)
    return products(recipe.model, vocab_size, tokens, masked_tokens)
