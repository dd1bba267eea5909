"""The settings that follow from a budget in seconds: they grow with it, and those of the user are kept."""

from __future__ import annotations

import logging

import pytest

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import RecipeError
from unmask.data.prepare import TokenizedCorpus
from unmask.data.sources import open_source
from unmask.models import non_embedding_parameters
from unmask.training.estimate.from_budget import choose_vocabulary, fit_to_budget
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
    """Returns the chosen recipe; the stage is not one of the user's own settings."""
    recipe = load_recipe("auto", [STAGE, f"train.budget={budget}", *settings])
    return fit_to_budget(recipe, corpus, context, [setting.partition("=")[0] for setting in settings])


def parameters(recipe: Recipe) -> int:
    return non_embedding_parameters(recipe.model, 200)


def test_a_much_longer_budget_gives_a_larger_model(corpus: TokenizedCorpus, context: DistributedContext) -> None:
    # So different that the order holds on any machine, also on a busy one.
    assert parameters(choose(corpus, context, "1 s")) < parameters(choose(corpus, context, "10 h"))


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
    assert fit_to_budget(recipe, corpus, context, []) is recipe


@pytest.mark.parametrize("settings", [("train.budget=100 steps",), ("train.budget=9 s", "model.kind=bert")])
def test_another_budget_or_model_is_refused(context: DistributedContext, settings: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="for a budget in seconds"):
        choose_vocabulary(load_recipe("auto", settings), context, [])


def test_a_much_longer_budget_gives_larger_batches_and_longer_sequences(
    corpus: TokenizedCorpus, context: DistributedContext
) -> None:
    short, long = (choose(corpus, context, budget, "model.num_hidden_layers=1") for budget in ("1 s", "3000 h"))
    assert short.stage[0].batch_tokens < long.stage[0].batch_tokens
    assert short.stage[0].max_seq_len < long.stage[0].max_seq_len <= long.model.max_position_embeddings
    assert short.optimizer == long.optimizer


def test_stages_that_the_user_set_are_kept(corpus: TokenizedCorpus, context: DistributedContext) -> None:
    recipe = load_recipe("auto", [STAGE, "train.budget=3000 h"])
    assert fit_to_budget(recipe, corpus, context, ["stage", "model.kind"]).stage == recipe.stage


def test_the_vocabulary_follows_the_budget_unless_the_user_set_it(
    context: DistributedContext, caplog: pytest.LogCaptureFixture
) -> None:
    def size(budget: str, *settings: str) -> int:
        recipe = load_recipe("auto", [f"train.budget={budget}", *settings])
        chosen = choose_vocabulary(recipe, context, [setting.partition("=")[0] for setting in settings])
        return getattr(chosen.data.tokenizer, "vocab_size", 0)

    assert size("1 s") < size("30000 h") == 32_768
    assert size("30000 h", "data.tokenizer.vocab_size=5000") == 5000
    assert size("30000 h", "data.tokenizer.kind=bytes") == 0
    with caplog.at_level(logging.INFO, logger="unmask"):
        size("30000 h")
    assert "a vocabulary of at most 32,768 tokens, because" in caplog.text
