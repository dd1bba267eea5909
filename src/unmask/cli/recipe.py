"""Room card: the verbs on recipes: list, show, check.

Comes in: a recipe's name or file, changes. Goes out: names, the whole recipe with every value and the size of its
model, or what is wrong with it. Called by: door.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.options import Debug, Json, Settings, print_json

if TYPE_CHECKING:
    from unmask.training.recipe import Recipe


SHOW_RECIPE_EXAMPLES = """\
[bold]Examples[/bold]

unmask recipe show tiny
unmask recipe show tiny --set stage.0.max_seq_len=256 > mine.toml
"""
CHECK_RECIPE_EXAMPLES = """\
[bold]Examples[/bold]

unmask recipe check mine.toml
"""

ASSUMED = {"characters": 100, "file": 30_000}  # pieces, of kinds whose number only the text or a file decides


def list_recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come with unmask."""
    from unmask.core.config import resolve_recipe, shipped_recipes

    about = {name: str(resolve_recipe(name).get("about", "")) for name in shipped_recipes()}
    if as_json:
        print_json([{"name": name, "about": sentence} for name, sentence in about.items()])
        return
    wide = max(map(len, about), default=0)
    for name, sentence in about.items():
        print(f"{name:<{wide}}  {sentence}".rstrip())


def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe's name or a TOML file.")],
    settings: Settings = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a recipe with every value, defaults filled in, and the size of its model."""
    from unmask.core.config import dump_config
    from unmask.core.plugins import describe
    from unmask.training.recipe import load_recipe

    recipe = load_recipe(name, settings or ())
    text, size = dump_config(recipe), _size(recipe)
    if as_json:
        print_json(tomllib.loads(text) | {"size": size})
    else:
        told = [*map(describe, recipe.outside), *_in_words(size)]
        comments = (f"# {' '.join(line.split())}\n" for line in told)  # so that it stays a recipe
        print("".join(comments) + text, end="")


def _pieces(recipe: Recipe) -> tuple[int, str]:
    """How many pieces the recipe's tokenizer has, and where the number is from."""
    from unmask.core.errors import TokenizerError
    from unmask.tokenization.settings import BYTES
    from unmask.tokenization.tokenizer import Tokenizer

    tokenizer = recipe.data.tokenizer
    if tokenizer.kind == "characters":
        return ASSUMED["characters"], "assumed: the text decides"
    if tokenizer.kind == "bytes":
        return BYTES + len(tokenizer.special_tokens), "bytes and special pieces"
    if tokenizer.kind == "file" or tokenizer.kind == "extended":
        more = tokenizer.num_new_tokens if tokenizer.kind == "extended" else 0
        try:
            return Tokenizer.load(tokenizer.path).size + more, str(tokenizer.path)
        except TokenizerError:
            return ASSUMED["file"], f"assumed: {tokenizer.path} can't be read here"
    return tokenizer.vocab_size, "data.tokenizer.vocab_size"


def _size(recipe: Recipe) -> dict[str, Any]:
    """Parameters and arithmetic of a recipe's model."""
    from unmask.models import flops_per_token, parameters, parameters_beside_the_table

    (pieces, source), encoder, rate = _pieces(recipe), recipe.model, recipe.objective.masked_fraction
    return {
        "vocabulary": pieces,
        "vocabulary_from": source,
        "parameters": parameters(encoder, pieces),
        "parameters_beside_the_table": parameters_beside_the_table(encoder, pieces),
        "parameters_per_piece": parameters(encoder, pieces + 1) - parameters(encoder, pieces),
        "stage": [
            {"length": stage.max_seq_len, "flops_per_token": flops_per_token(encoder, pieces, stage.max_seq_len, rate)}
            for stage in recipe.stage
        ],
    }


def _in_words(size: dict[str, Any]) -> list[str]:
    from unmask.core.format import count

    said = f"{size['parameters']:,} parameters with {size['vocabulary']:,} pieces ({size['vocabulary_from']})"
    if size["vocabulary_from"].startswith("assumed"):
        said += f", {size['parameters_per_piece']:,} for each one more"
    lines = [f"{said}; {size['parameters_beside_the_table']:,} without the token table"]
    for number, stage in enumerate(size["stage"]):
        flops = count(stage["flops_per_token"])
        lines.append(f"stage {number}, texts of {stage['length']:,}: {flops} FLOPs per training token")
    return lines


def check_recipe(
    name: Annotated[str, typer.Argument(metavar="FILE", help="A TOML file, or a shipped recipe's name.")],
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Check a recipe: every key, value and unit. A module of your own that it names is imported, which runs it."""
    from unmask.core.plugins import describe
    from unmask.training.recipe import load_recipe

    whole = load_recipe(name, settings or ())
    for kind in whole.outside:
        print(describe(kind))
    print(f"{name} is a recipe: {len(whole.stage)} stage{'s' * (len(whole.stage) > 1)}, budget {whole.train.budget}")
