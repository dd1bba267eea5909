"""The size of the model for a time budget: the largest one that sees enough tokens."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

from unmask.core.distributed import DistributedContext
from unmask.core.errors import RecipeError
from unmask.core.format import count, duration
from unmask.data.advice import Choice
from unmask.data.prepare import TokenizedCorpus
from unmask.models import flops_per_token, non_embedding_parameters
from unmask.models.modernbert import ModernBertConfig
from unmask.training.estimate.probe import measure_token_seconds
from unmask.training.recipe import Recipe

_log = logging.getLogger("unmask")

_HEAD_WIDTH = 64
_SIZES = ((2, 128), (3, 128), (3, 192), (4, 256), (4, 320), (6, 320), (6, 384), (8, 512), (12, 768))
"""Layers and width, in the order of their parameters."""
_FIRST = (3, 128)  # is measured first

# At equal seconds, smaller models have a lower loss until larger ones see about this many tokens per parameter outside
# the embedding. Extrapolated from runs of 100 and 410 s on one CPU thread (docs/diary.md, 2026-11-29).
_TOKENS_PER_PARAMETER = 25.0
_TRAINING = 0.85  # fraction of a budget that is left for training steps
_FIXED_FLOPS = 8e6  # a token costs as many seconds as so many FLOPs, for work that isn't a matrix product
_MAX_MEASUREMENTS = 3


def choose_model_size(
    recipe: Recipe, corpus: TokenizedCorpus, context: DistributedContext, explicit: Collection[str] | None
) -> Recipe:
    """Returns the recipe with a model whose size fits the budget in seconds, and logs why.

    The speed of one size is measured, and that of the others is computed from their FLOPs, until the chosen size is one
    that was measured. A model whose architecture the user set is kept.

    Raises:
        RecipeError: the budget is not in seconds, or the model is not a ModernBERT.
    """
    if not recipe.train.choose_model_size:
        return recipe
    recipe = replace(recipe, train=replace(recipe.train, choose_model_size=False))  # from here on an ordinary recipe
    if any(key == "model" or key.startswith("model.") for key in explicit or ()):
        return recipe
    if recipe.train.budget.unit != "seconds" or not isinstance(recipe.model, ModernBertConfig):
        raise RecipeError(
            "the size of the model is chosen for a budget in seconds and for model.kind=modernbert only",
            location="train.choose_model_size",
            hint='set a budget such as --budget "30 min", or choose a recipe: unmask recipe list',
        )
    seconds, vocab_size = _TRAINING * recipe.train.budget.number, corpus.tokenizer.size
    measured, tokens = dict[tuple[int, int], float](), dict[tuple[int, int], float]()
    chosen = _FIRST
    while chosen not in measured and len(measured) < _MAX_MEASUREMENTS:
        trial = _with_size(recipe, *chosen)
        measured[chosen] = measure_token_seconds(trial, corpus, context)
        fixed = measured[chosen] / (_FIXED_FLOPS + _flops(trial, vocab_size))
        tokens = {
            size: seconds / measured.get(size, fixed * (_FIXED_FLOPS + _flops(_with_size(recipe, *size), vocab_size)))
            for size in _SIZES
        }
        enough = [
            size
            for size in _SIZES
            if tokens[size] >= _TOKENS_PER_PARAMETER * _parameters(_with_size(recipe, *size), vocab_size)
        ]
        chosen = enough[-1] if enough else _SIZES[0]
    sized = _with_size(recipe, *chosen)
    parameters = _parameters(sized, vocab_size)
    layers, width = chosen
    reason = (
        f"{duration(recipe.train.budget.number)} are about {count(round(tokens[chosen]))} tokens here, "
        f"{tokens[chosen] / parameters:.1f} for each of its {count(parameters)} parameters outside the embedding; "
        f"a larger one needs {_TOKENS_PER_PARAMETER:.0f} for each"
    )
    _log.info(str(Choice(f"{layers} layers of width {width}", reason, "model.hidden_size=256")))
    return sized


def _with_size(recipe: Recipe, layers: int, width: int) -> Recipe:
    model = replace(
        recipe.model,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // _HEAD_WIDTH,
        intermediate_size=2 * width,
    )
    return replace(recipe, model=model)


def _parameters(recipe: Recipe, vocab_size: int) -> int:
    return non_embedding_parameters(recipe.model, vocab_size)


def _flops(recipe: Recipe, vocab_size: int) -> float:
    return flops_per_token(recipe.model, vocab_size, recipe.stage[0].max_seq_len, recipe.objective.masked_fraction)
