"""The work of unmask that is timed: data preparation, masking, training, filling."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from unmask.checks.bench.timing import Work, repeated
from unmask.core.distributed import DistributedContext, init_distributed, matmul_rate
from unmask.core.errors import RecipeError
from unmask.core.types import Batch
from unmask.data.prepare import TokenizedCorpus, prepare
from unmask.data.sources import BaseSource, MemorySource
from unmask.models.fill_mask import MASK, fill
from unmask.models.model import Model
from unmask.objectives.sentence_pairs import BertPretrainingConfig
from unmask.training.estimate.memory import stage_flops_per_token, stage_products
from unmask.training.loop import Callback, TrainState, train
from unmask.training.plan import Plan, StageConfig, StagePlan, always
from unmask.training.pretrain import with_start_and_paths
from unmask.training.recipe import Recipe, explicit_keys, load_recipe
from unmask.training.setup import (
    RunComponents,
    adapt_to_corpus,
    adapt_to_text,
    as_model,
    build_components,
    check_pairs,
)

_MANY_STEPS: Final = 10**9  # the plan is never finished: learning rates stay those of its beginning
_SENTENCE_CHARACTERS: Final = 120
_MIN_WORDS: Final = 3
_VOCAB_SIZE: Final = "data.tokenizer.vocab_size"


@dataclass(frozen=True)
class BenchedRecipe:
    """A recipe, adapted to the text, with the components of its run."""

    recipe: Recipe
    source: BaseSource
    components: RunComponents
    stage: int  # the stage with the largest share of the plan; its steps are timed

    @property
    def context(self) -> DistributedContext:
        """Device, precision and threads."""
        return self.components.context

    @property
    def length(self) -> int:
        """Maximum length of a sequence in tokens."""
        return self.recipe.stage[self.stage].max_seq_len

    @property
    def batch_tokens(self) -> int:
        """Tokens of a timed step: those of the stage, but at most one micro-batch, because steps may take minutes."""
        return min(self.recipe.stage[self.stage].batch_tokens, round(self.recipe.train.micro_batch_size.number))

    @property
    def has_pairs(self) -> bool:
        """Whether samples are sentence pairs."""
        return isinstance(self.recipe.objectives[self.stage], BertPretrainingConfig)

    @property
    def masked_fraction(self) -> float:
        """Mean fraction of the tokens that the head predicts."""
        return self.recipe.objectives[self.stage].masked_fraction

    @property
    def flops_per_token(self) -> float:
        """FLOPs of matrix products per token: forward, backward, and Muon's share of a step."""
        model = stage_flops_per_token(self.recipe, self.stage, self.components.vocab_size)
        return model + self.optimizer_flops / self.batch_tokens

    @property
    def optimizer_flops(self) -> float:
        """FLOPs of the optimizer's matrix products per step."""
        return float(self.components.training.optimizer.flops)

    def batches(self, count: int) -> list[Batch]:
        """Return the batches of the first steps of the stage."""
        loader, batches = self.components.loaders[self.stage], list[Batch]()
        cursor = loader.first_cursor(self.stage)
        for _ in range(count):
            step_batches, cursor = loader.step(cursor, self.batch_tokens, 0, 1)
            batches += step_batches
        return batches

    def model(self) -> Model:
        """Return the model, with the weights that it has now."""
        return as_model(self.recipe, self.components, self.components.training.module, TrainState())


def open_recipe(
    name: str,
    texts: Sequence[str],
    cache: Path,
    *,
    settings: Sequence[str] = (),
    threads: int | None = None,
) -> BenchedRecipe:
    """Load a recipe, adapt it to the text, train its tokenizer and build its model.

    Args:
        name: shipped name or TOML file.
        texts: the documents.
        cache: directory of the token shards.
        settings: changes of the recipe as `key=value`.
        threads: number of CPU threads; None: the recipe's.

    Raises:
        RecipeError: the recipe is unknown or invalid, or needs a model to start from.
        TextError: the text is too short.
        TokenizerError: no tokenizer can be trained on the text.
    """
    overrides = {} if threads is None else {"train.threads": threads}
    recipe = load_new(name, settings, overrides)
    recipe = with_start_and_paths(recipe, None)
    check_pairs(recipe)
    context = init_distributed(recipe.train.precision, recipe.train.threads, recipe.train.device)
    # The text may be the beginning of a longer one, which has enough words for the whole vocabulary.
    explicit = explicit_keys(name, settings, overrides)
    if not any(_VOCAB_SIZE in setting for setting in settings):
        explicit -= {_VOCAB_SIZE}
    recipe, source, shrinks = adapt_to_text(recipe, MemorySource(texts, recipe.data.unicode), explicit)
    corpus = prepare(source, recipe.data, cache, shrinks=shrinks)
    recipe = adapt_to_corpus(recipe, corpus, explicit)
    components = build_components(recipe, source, corpus, context, valid_sources={})
    return BenchedRecipe(recipe, source, components, _longest(recipe.stage))


def load_new(name: str, settings: Sequence[str] = (), overrides: Mapping[str, int] | None = None) -> Recipe:
    """Load a recipe that trains a new model.

    Raises:
        RecipeError: the recipe is unknown or invalid, or needs a model to start from.
    """
    recipe = load_recipe(name, settings, overrides)
    if recipe.init.required:
        raise RecipeError(
            f"the recipe `{recipe.name}` needs a model to start from, and bench measures new models only",
            hint="choose another recipe: unmask recipe list",
        )
    return recipe


def _longest(stages: Sequence[StageConfig]) -> int:
    """Return the number of the stage with the largest share of the plan."""
    ends = [0.0, *(stage.until.fraction for stage in stages)]
    shares = [end - begin for begin, end in itertools.pairwise(ends)]
    return shares.index(max(shares))


# Work -----------------------------------------------------------------------------------------------------------------


def matmul_work(shapes: Sequence[tuple[int, int, int]], context: DistributedContext) -> Work:
    """Return matrix products of these shapes (rows, inner, columns); the unit is a FLOP."""
    return lambda seconds: [1.0 / matmul_rate(shapes, context, seconds)]


def ceiling_work(benched: BenchedRecipe) -> Work:
    """Return the matrix products of a forward pass alone; the unit is a FLOP."""
    tokens = benched.batch_tokens
    shapes = stage_products(benched.recipe, benched.stage, benched.components.vocab_size, tokens)
    return matmul_work(shapes, benched.context)


def training_work(benched: BenchedRecipe) -> Work:
    """Return training steps, data loading and optimizer included; the unit is a token.

    The steps of all calls continue one training. The first step of a call is not timed.
    """
    training = benched.components.training
    inputs = replace(training, loaders=[training.loaders[benched.stage]])
    plan = Plan((StagePlan(benched.length, benched.batch_tokens, 0, _MANY_STEPS, 0.0),))
    state = TrainState()

    def run(seconds: float) -> list[float]:
        times: list[float] = []
        first: float | None = None
        last, tokens = 0.0, 0

        def record(state: TrainState) -> None:
            nonlocal first, last, tokens
            now = time.perf_counter()
            if first is None:
                first = now
            else:
                times.append((now - last) / (state.tokens - tokens))
            last, tokens = now, state.tokens

        def has_enough(state: TrainState) -> bool:
            return first is not None and bool(times) and last - first >= seconds

        train(inputs, plan, state, [Callback(always, record)], has_enough=has_enough)
        return times

    return run


def preparation_work(benched: BenchedRecipe, folder: Path) -> Work:
    """Return the preparation of the text with the trained tokenizer, from strings to shards; the unit is a token."""
    corpus, numbers = benched.components.corpus, itertools.count()

    def run() -> TokenizedCorpus:
        return prepare(
            benched.source, benched.recipe.data, folder / f"copy-{next(numbers)}", tokenizer=corpus.tokenizer
        )

    timed = repeated(run, corpus.train.tokens + corpus.held_out.tokens)

    def run_and_delete(seconds: float) -> list[float]:
        times = timed(seconds)
        shutil.rmtree(folder, ignore_errors=True)
        return times

    return run_and_delete


def masking_work(benched: BenchedRecipe) -> Work:
    """Return reading, packing and masking of batches; the unit is a row, which is a sequence."""
    loader = benched.components.loaders[benched.stage]
    objective = benched.components.training.objectives[benched.stage]
    cursor = loader.first_cursor(benched.stage)

    def run(seconds: float) -> list[float]:
        nonlocal cursor
        times: list[float] = []
        begin = last = time.perf_counter()
        while not times or last - begin < seconds:
            batches, cursor = loader.step(cursor, benched.batch_tokens, 0, 1)
            for batch in batches:
                objective.corrupt(batch, benched.recipe.seed)
            now = time.perf_counter()
            times.append((now - last) / sum(batch.num_samples for batch in batches))
            last = now
        return times

    return run


def fill_work(model: Model, sentences: Sequence[str]) -> Work:
    """Return the prediction of masked tokens, all sentences in one call; the unit is a sentence."""
    return repeated(lambda: fill(model, sentences), len(sentences))


def masked_sentences(texts: Sequence[str], count: int) -> list[str]:
    """Return beginnings of documents, each with one [MASK] in place of its middle word."""
    sentences: list[str] = []
    for text in itertools.islice(itertools.cycle(texts), count):
        beginning = text[:_SENTENCE_CHARACTERS].replace(MASK, " ")
        words = beginning.split()
        if len(words) >= _MIN_WORDS:
            words[len(words) // 2] = MASK
            sentences.append(" ".join(words))
        else:
            middle = len(beginning) // 2
            sentences.append(f"{beginning[:middle]}{MASK}{beginning[middle + 1 :]}")
    return sentences


def native_precisions(context: DistributedContext) -> list[DistributedContext]:
    """Return the context in float32 and, where matrix products in bfloat16 are native, in bfloat16."""
    precisions = [replace(context, precision="float32")]
    return [*precisions, context] if context.precision == "bfloat16" else precisions
