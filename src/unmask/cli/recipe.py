"""Commands on recipes: list, show and check."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import Json, Settings, complete_recipe, print_json

if TYPE_CHECKING:
    from unmask.training.recipe import Recipe


SHOW_RECIPE_EXAMPLES = """\
[bold]Examples[/bold]

unmask recipe show tiny
unmask recipe show tiny --plain                           without comments
unmask recipe show tiny --set stage.0.max_seq_len=256 > mine.toml
"""
CHECK_RECIPE_EXAMPLES = """\
[bold]Examples[/bold]

unmask recipe check mine.toml
"""

# Vocabulary sizes for kinds of tokenizers whose size depends on the text or on a file.
ASSUMED_VOCAB_SIZES = {"characters": 100, "file": 30_000}

REFERENCE_INTRODUCTION = """\
# Recipe keys

A recipe is a TOML file. A key that it lacks has its default. `extends = "tiny"` takes the keys of another recipe, by
shipped name or path. `unmask recipe show NAME` prints the values of a recipe, with these meanings as comments.
`unmask pretrain --set model.hidden_size=512` sets one key; `--set stage.0.max_seq_len=64` sets one of the first stage.

- A percentage is a string such as `"60%"`.
- A quantity is a string with a number and a unit: `"10 min"`, `"300 steps"`, `"64k tokens"`, `"2 epochs"`, `"8 texts"`.
- A plugin is a class of your own: `kind = "package.module:Name"`; its other keys are its settings
  ([plugins](extending.md)).

This page is generated from the config classes: `unmask recipe reference > docs/recipes.md`.
"""

Plain = Annotated[bool, typer.Option("--plain", help="Print the values without comments.")]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="Recipe: a shipped name or a TOML file.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]


def list_recipes(as_json: Json = False) -> None:
    """List the recipes that are shipped with unmask."""
    from unmask.core.config import resolve_recipe, shipped_recipes

    about = {name: str(resolve_recipe(name).get("about", "")) for name in shipped_recipes()}
    if as_json:
        print_json([{"name": name, "about": sentence} for name, sentence in about.items()])
        return
    width = max(map(len, about), default=0)
    for name, sentence in about.items():
        print(f"{name:<{width}}  {sentence}".rstrip())


def show_recipe(name: RecipeArgument, settings: Settings = None, plain: Plain = False, as_json: Json = False) -> None:
    """Show a recipe with all values, defaults included, the meaning of each key and the size of its model."""
    from unmask.core.config import dump_config
    from unmask.core.plugins import describe
    from unmask.core.reference import dump_commented
    from unmask.training.recipe import load_recipe

    recipe = load_recipe(name, settings or ())
    text, size = dump_config(recipe), _model_size(recipe)
    if as_json:
        print_json(tomllib.loads(text) | {"size": size})
        return
    if plain:
        print(text, end="")
        return
    lines = [*map(describe, recipe.plugins), *_describe_size(size)]
    comments = (f"# {' '.join(line.split())}\n" for line in lines)  # comments, so that the output is a valid recipe
    print("".join(comments) + "\n" + dump_commented(recipe), end="")


def show_reference() -> None:
    """Print the reference of all recipe keys: docs/recipes.md."""
    from unmask.core.reference import reference
    from unmask.training.recipe import Recipe

    print(REFERENCE_INTRODUCTION + "\n" + reference(Recipe), end="")


def check_recipe(name: RecipeArgument, settings: Settings = None) -> None:
    """Check the keys, values and units of a recipe. Modules of plugins that it names are imported."""
    from unmask.core.plugins import describe
    from unmask.training.recipe import load_recipe

    recipe = load_recipe(name, settings or ())
    for plugin in recipe.plugins:
        print(describe(plugin))
    stages = f"{len(recipe.stage)} stage{'s' * (len(recipe.stage) > 1)}"
    print(f"{name} is valid: {stages}, budget {recipe.train.budget}")


def _vocab_size(recipe: Recipe) -> tuple[int, str]:
    """Return the vocabulary size of a recipe, and where the number comes from."""
    from unmask.core.errors import TokenizerError
    from unmask.tokenization.settings import BYTES
    from unmask.tokenization.tokenizer import Tokenizer

    tokenizer = recipe.data.tokenizer
    if tokenizer.kind == "characters":
        return ASSUMED_VOCAB_SIZES["characters"], "assumed: it depends on the text"
    if tokenizer.kind == "bytes":
        return BYTES + len(tokenizer.special_tokens), "bytes and special tokens"
    if tokenizer.kind == "file" or tokenizer.kind == "extended":
        num_new_tokens = tokenizer.num_new_tokens if tokenizer.kind == "extended" else 0
        try:
            return Tokenizer.load(tokenizer.path).size + num_new_tokens, str(tokenizer.path)
        except TokenizerError:
            return ASSUMED_VOCAB_SIZES["file"], f"assumed: can't read {tokenizer.path}"
    return tokenizer.vocab_size, "data.tokenizer.vocab_size"


def _model_size(recipe: Recipe) -> dict[str, Any]:
    """Return the number of parameters and of FLOPs per token of a recipe's model."""
    from unmask.models import non_embedding_parameters, num_parameters
    from unmask.training.estimate.memory import stage_flops_per_token

    (vocab_size, source), model = _vocab_size(recipe), recipe.model
    return {
        "vocab_size": vocab_size,
        "vocab_size_from": source,
        "parameters": num_parameters(model, vocab_size),
        "non_embedding_parameters": non_embedding_parameters(model, vocab_size),
        "parameters_per_token": num_parameters(model, vocab_size + 1) - num_parameters(model, vocab_size),
        "stage": [
            {
                "max_seq_len": stage.max_seq_len,
                "flops_per_token": stage_flops_per_token(recipe, number, vocab_size),
            }
            for number, stage in enumerate(recipe.stage)
        ],
    }


def _describe_size(size: dict[str, Any]) -> list[str]:
    from unmask.core.format import count

    summary = f"{size['parameters']:,} parameters for {size['vocab_size']:,} tokens ({size['vocab_size_from']})"
    if size["vocab_size_from"].startswith("assumed"):
        summary += f", {size['parameters_per_token']:,} for each further token"
    lines = [f"{summary}; {size['non_embedding_parameters']:,} without the token embedding"]
    for number, stage in enumerate(size["stage"]):
        flops = count(stage["flops_per_token"])
        lines.append(f"stage {number}, sequences of {stage['max_seq_len']:,}: {flops} FLOPs per training token")
    return lines
