"""Room card: the verbs on recipes: list, show, check.

Comes in: a recipe's name or file, changes. Goes out: names, the whole recipe with every value, or what is wrong with
it. Called by: door.
"""

from __future__ import annotations

import tomllib
from typing import Annotated

import typer

from unmask.cli.answer import Debug, Json, print_json

SHOW_EXAMPLES = """\
[bold]Examples[/bold]

unmask recipe show tiny
unmask recipe show tiny --set stage.0.length=256 > mine.toml
"""
CHECK_EXAMPLES = """\
[bold]Examples[/bold]

unmask recipe check mine.toml
"""

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated.")
]


def list_recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes that come with unmask."""
    from unmask.recipe import resolve, shipped_recipes

    about = {name: str(resolve(name).get("about", "")) for name in shipped_recipes()}
    if as_json:
        print_json([{"name": name, "about": sentence} for name, sentence in about.items()])
        return
    wide = max(map(len, about), default=0)
    for name, sentence in about.items():
        print(f"{name:<{wide}}  {sentence}".rstrip())


def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe's name or a TOML file.")],
    settings: Settings = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a recipe with every value, defaults filled in."""
    from unmask.blueprint import load_recipe
    from unmask.recipe import dump

    text = dump(load_recipe(name, settings or ()))
    if as_json:
        print_json(tomllib.loads(text))
    else:
        print(text, end="")


def check(
    name: Annotated[str, typer.Argument(metavar="FILE", help="A TOML file, or a shipped recipe's name.")],
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Check a recipe: every key, value and unit."""
    from unmask.blueprint import load_recipe

    whole = load_recipe(name, settings or ())
    print(f"{name} is a recipe: {len(whole.stage)} stage{'s' * (len(whole.stage) > 1)}, budget {whole.train.budget}")
