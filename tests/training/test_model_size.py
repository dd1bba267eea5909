"""The size of the model for a budget in seconds: a longer budget never gives a smaller one, and settings are kept."""

from __future__ import annotations

import logging

import pytest

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import RecipeError
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sources import open_source
from unmask.models import non_embedding_parameters
from unmask.training.estimate.model_size import choose_model_size
from unmask.training.recipe import Recipe, load_recipe
from unmask.training.setup import prepare_corpus

STAGE = "stage=[{max_seq_len = 32, batch_size = '64 tokens'}]"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The number {n} follows {n - 1} and precedes {n + 1}.\n\n" for n in range(400)))
    recipe = load_recipe("auto", ["data.tokenizer.vocab_size=200"])
    return prepare_corpus(recipe, open_source([path], recipe.data), lambda stage, fraction: None)


@pytest.fixture(scope="module")
def context() -> DistributedContext:
    return init_distributed("float32", 1)


def choose(corpus: TokenizedCorpus, context: DistributedContext, budget: str, *settings: str) -> Recipe:
    recipe = load_recipe("auto", [STAGE, f"train.budget={budget}", *settings])
    return choose_model_size(recipe, corpus, context, [setting.partition("=")[0] for setting in settings])


def parameters(recipe: Recipe) -> int:
    return non_embedding_parameters(recipe.model, 200)


def test_a_much_longer_budget_gives_a_larger_model(corpus: TokenizedCorpus, context: DistributedContext) -> None:
    # So different that the order holds on any machine, also on a busy one.
    assert parameters(choose(corpus, context, "1 s")) < parameters(choose(corpus, context, "300 h"))


def test_the_choice_is_logged_and_makes_an_ordinary_recipe(
    corpus: TokenizedCorpus, context: DistributedContext, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="unmask"):
        recipe = choose(corpus, context, "30 s")
    assert not recipe.train.choose_model_size
    assert recipe.model.hidden_size % recipe.model.num_attention_heads == 0
    assert (
        f"{recipe.model.num_hidden_layers} layers of width {recipe.model.hidden_size}, because 30 s are" in caplog.text
    )


def test_a_model_that_the_user_set_is_kept(corpus: TokenizedCorpus, context: DistributedContext) -> None:
    recipe = choose(corpus, context, "1 h", "model.hidden_size=96", "model.num_attention_heads=3")
    assert recipe.model.hidden_size == 96 and not recipe.train.choose_model_size


def test_other_recipes_are_not_changed(corpus: TokenizedCorpus, context: DistributedContext) -> None:
    recipe = load_recipe("tiny")
    assert choose_model_size(recipe, corpus, context, []) is recipe


def test_a_budget_in_steps_is_refused(corpus: TokenizedCorpus, context: DistributedContext) -> None:
    with pytest.raises(RecipeError, match="for a budget in seconds"):
        choose(corpus, context, "100 steps")
