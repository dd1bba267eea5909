"""The settings that follow from a budget in seconds: vocabulary, size of the model, batch sizes, sequence lengths.

All of them depend on how many tokens the budget is enough for, on this device. Learning rates stay those of the recipe:
larger batches would allow higher ones (by the root of their size), longer training needs lower ones, and both change
together here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import replace

from unmask.core.distributed import DistributedContext, matmul_rate
from unmask.core.errors import RecipeError
from unmask.core.format import count, duration
from unmask.core.quantities import Quantity
from unmask.data.advice import Choice, is_set, may_shrink
from unmask.data.prepare import TokenizedCorpus
from unmask.models import non_embedding_parameters
from unmask.models.modernbert import ModernBertConfig
from unmask.training.estimate.memory import stage_flops_per_token, stage_products
from unmask.training.estimate.probe import measure_token_seconds
from unmask.training.plan import StageConfig
from unmask.training.recipe import Recipe

_log = logging.getLogger("unmask")

_TRAINING = 0.85  # fraction of a budget that is left for training steps

_VOCABULARIES = ((0.0, 8_192), (3e8, 16_384), (3e9, 32_768))
"""Size of the vocabulary from a number of tokens on, which a model of the size of `tiny` would see."""
_SHARE_OF_RATE = 0.25  # of the rate of matrix products alone, which a training step reaches on a CPU

_HEAD_WIDTH = 64
_SIZES = ((2, 128), (3, 128), (3, 192), (4, 256), (4, 320), (6, 320), (6, 384), (8, 512), (12, 768))
"""Layers and width, in the order of their parameters."""
_FIRST = (3, 128)  # is measured first
# At equal seconds, smaller models have a lower loss until larger ones see about this many tokens per parameter outside
# the embedding: 3 × 192 loses with 7 and wins with 24 (10 and 30 minutes, one seed; docs/diary.md, 2026-11-29).
_TOKENS_PER_PARAMETER = 20.0
_FIXED_FLOPS = 8e6  # a token costs as many seconds as so many FLOPs, for work that isn't a matrix product
_MAX_MEASUREMENTS = 3

# The best batch grows with the planned tokens to this power (arXiv 2505.13738). The batches of recipe `tiny` are those
# for about this many tokens; smaller ones were no better in 100 s (docs/diary.md, 2026-11-29).
_BATCH_EXPONENT = 0.383
_BATCH_TOKENS = 14e6
_MAX_BATCH = 1 << 20
_LENGTHS = ((0.0, 1), (3e7, 2), (3e9, 4))
"""Factor on the sequence lengths from a number of planned tokens on."""


def choose_vocabulary(recipe: Recipe, context: DistributedContext, explicit: Collection[str] | None) -> Recipe:
    """Returns the recipe with a vocabulary whose size fits the budget, and logs why; before a tokenizer is trained.

    Raises:
        RecipeError: the user set no model, and the budget is not in seconds or the model is not a ModernBERT.
    """
    if not recipe.train.choose_model_size:
        return recipe
    if recipe.train.budget.unit != "seconds" or not isinstance(recipe.model, ModernBertConfig):
        if _sets_model(explicit or ()):
            return recipe
        raise RecipeError(
            "settings are chosen for a budget in seconds and for model.kind=modernbert only",
            location="train.choose_model_size",
            hint='set a budget such as --budget "30 min", or choose a recipe: unmask recipe list',
        )
    size = getattr(recipe.data.tokenizer, "vocab_size", 0)
    if not size or not may_shrink(recipe.data, explicit):
        return recipe
    shapes = stage_products(recipe, 0, size, recipe.stage[0].batch_tokens)
    rate = context.sum([matmul_rate(shapes, context)])[0]  # of all ranks
    tokens = _TRAINING * recipe.train.budget.number * _SHARE_OF_RATE * rate / _flops(recipe, size)
    chosen = _from(_VOCABULARIES, tokens)
    if chosen == size:
        return recipe
    budget = duration(recipe.train.budget.number)
    reason = f"{budget} are enough for about {count(_rounded(tokens))} tokens with the smallest models here"
    _log.info(str(Choice(f"a vocabulary of at most {chosen:,} tokens", reason, f"data.tokenizer.vocab_size={size}")))
    tokenizer = replace(recipe.data.tokenizer, vocab_size=chosen)  # pyright: ignore[reportCallIssue]
    return replace(recipe, data=replace(recipe.data, tokenizer=tokenizer))


def fit_to_budget(
    recipe: Recipe, corpus: TokenizedCorpus, context: DistributedContext, explicit: Collection[str] | None
) -> Recipe:
    """Returns an ordinary recipe whose model, batches and sequence lengths fit the budget in seconds, and logs why.

    Settings whose keys are in `explicit` are kept.
    """
    if not recipe.train.choose_model_size:
        return recipe
    recipe = replace(recipe, train=replace(recipe.train, choose_model_size=False))
    explicit = explicit or ()
    if recipe.train.budget.unit != "seconds":
        return recipe
    if _sets_model(explicit):
        tokens = _TRAINING * recipe.train.budget.number / measure_token_seconds(recipe, corpus, context)
    else:
        recipe, tokens = _with_chosen_size(recipe, corpus, context)
    return _with_stages(recipe, tokens, explicit)


def _sets_model(explicit: Collection[str]) -> bool:
    return any(key == "model" or key.startswith("model.") for key in explicit)


def _with_chosen_size(recipe: Recipe, corpus: TokenizedCorpus, context: DistributedContext) -> tuple[Recipe, float]:
    """Returns the recipe with the largest model that sees enough tokens, and the number of these tokens.

    The speed of one size is measured, and that of the others is computed from their FLOPs, until the chosen size is one
    that was measured.
    """
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
    return sized, tokens[chosen]


def _with_stages(recipe: Recipe, tokens: float, explicit: Collection[str]) -> Recipe:
    """Returns the recipe with batch sizes and sequence lengths for a number of planned tokens."""
    doublings = max(0, round(_BATCH_EXPONENT * math.log2(tokens / _BATCH_TOKENS)))
    longer = _from(_LENGTHS, tokens)
    stages: list[StageConfig] = []
    for number, stage in enumerate(recipe.stage):
        if not is_set(explicit, f"stage.{number}.batch_size"):
            size = min(_MAX_BATCH, max(stage.max_seq_len, stage.batch_tokens << doublings))
            stage = replace(stage, batch_size=Quantity(size, "tokens"))
        if not is_set(explicit, f"stage.{number}.max_seq_len"):
            length = min(stage.max_seq_len * longer, recipe.model.max_position_embeddings)
            stage = replace(stage, max_seq_len=length)
        stages.append(stage)
    if tuple(stages) == recipe.stage:
        return recipe
    what = "; ".join(
        f"stage {n}: {s.batch_tokens:,} tokens per step, sequences of {s.max_seq_len}" for n, s in enumerate(stages)
    )
    reason = f"about {count(_rounded(tokens))} tokens are planned; learning rates stay"
    before = recipe.stage[0].batch_tokens
    _log.info(str(Choice(what, reason, f'stage.0.batch_size="{before} tokens"')))
    return replace(recipe, stage=tuple(stages))


def _from(steps: tuple[tuple[float, int], ...], tokens: float) -> int:
    """Returns the value of the last step that begins at or below a number of tokens."""
    return [value for begin, value in steps if begin <= tokens][-1]


def _rounded(number: float) -> int:
    """Rounds to one digit: the number is an estimate."""
    unit = 10 ** math.floor(math.log10(max(1.0, number)))
    return round(number / unit) * unit


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
    return stage_flops_per_token(recipe, 0, vocab_size)
