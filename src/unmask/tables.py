"""Room card: trees of TOML values, laid one on another.

Comes in: what recipes say, from the lowest that is extended to the one that was asked for, and what a person sets by
hand. Goes out: one tree, which knows how high each key was laid. Called by: recipe (which hands merge and apply_set
on), blueprint.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any, Final, cast

from unmask.errors import RecipeError

Tree = dict[str, Any]  # what TOML reads as: tables, lists, texts, numbers, true and false
_TOP: Final = 1 << 30  # the layer of all that is set by hand, above every recipe


class _Laid(Tree):
    """A table that remembers in which layer each key was given: `build` leaves out what lies below another kind."""

    def __init__(self, table: Tree) -> None:
        super().__init__(table)
        self.layers: dict[str, int] = {key: layer_of(table, key) for key in table}

    def lay(self, key: str, value: Any, layer: int) -> None:
        if key != "kind" or self.get(key) != value:  # who repeats the kind chooses none
            self.layers[key] = layer
        self[key] = value


def layer_of(table: Tree, key: str) -> int:
    """In which layer a key was given; 0 in a table that nothing was laid on, and for a key that isn't there."""
    return table.layers.get(key, 0) if isinstance(table, _Laid) else 0


def merge(base: Tree, over: Tree, layer: int = 0) -> Tree:
    """`over` laid on `base`: tables key by key, all else replaced, lists whole.

    `layer` is the layer that `over` is; without one, the next above all of `base`.
    """
    merged = _Laid(base)
    layer = layer or 1 + max(merged.layers.values(), default=0)
    for key, value in over.items():
        below = base.get(key)
        both_tables = isinstance(below, dict) and isinstance(value, dict)
        laid = merge(cast("Tree", below), cast("Tree", value), layer) if both_tables else value
        merged.lay(key, laid, layer)
    return merged


def apply_set(tree: Tree, text: str) -> Tree:
    """The tree with one `key=value` laid on it; the right side is read as TOML and, where that fails, as a string.

    Keys are dotted; a whole number is an entry of a list, counted from 0: `stage.1.length=256` is the second stage.

    Raises:
        RecipeError: no "=", no key, a list entry that isn't there, or a key below something that is no table.
    """
    key, equals, right = text.partition("=")
    where = f"--set {text}"
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(
            "a setting is a dotted key, = and a value", where=where, next='--set "train.every.save=20 steps"'
        )
    right = right.strip()
    try:
        read = tomllib.loads(f"value = {right}")
    except tomllib.TOMLDecodeError:
        read = {}
    value: Any = read["value"] if set(read) == {"value"} else right
    return assign(tree, key, value, where)


def assign(tree: Tree, key: str, value: Any, where: str) -> Tree:
    """The tree with a value at a dotted key; `where` is what a person wrote to say so.

    Raises:
        RecipeError: a list entry that isn't there, or a key below something that is no table.
    """
    return cast("Tree", _assigned(tree, [part.strip() for part in key.split(".")], 0, value, where))


def _assigned(below: Any, path: Sequence[str], depth: int, value: Any, where: str) -> Any:
    """What `below`, found after `depth` parts of the path, becomes once the value stands at the end of the path."""
    done = ".".join(path[:depth])
    if depth == len(path):
        both_tables = isinstance(below, dict) and isinstance(value, dict)
        return merge(cast("Tree", below), cast("Tree", value), _TOP) if both_tables else value
    part = path[depth]
    if isinstance(below, list):
        entries = cast("list[Any]", below)
        if not part.isdecimal() or int(part) >= len(entries):
            have, mend = f"{len(entries)} entries, counted from 0", f"one of {done}.0 to {done}.{len(entries) - 1}"
            if len(entries) < 2:
                have = "one entry, which is number 0" if entries else "no entry"
                mend = f"{done}.0, or the whole list: {done}=[...]" if entries else f"the whole list: {done}=[...]"
            raise RecipeError(f"there is no `{done}.{part}`: `{done}` has {have}", where=where, next=f"set {mend}")
        at = int(part)
        return [*entries[:at], _assigned(entries[at], path, depth + 1, value, where), *entries[at + 1 :]]
    if not isinstance(below, dict):
        raise RecipeError(f"`{done}` is a single value: it has no `{part}`", where=where, next=f"set `{done}` itself")
    table = cast("Tree", below)
    if part not in table and depth + 1 < len(path) and path[depth + 1].isdecimal():
        listed = ".".join(path[: depth + 1])
        raise RecipeError(
            f"there is no list `{listed}` in this recipe", where=where, next=f"set it whole: {listed}=[...]"
        )
    assigned = _Laid(table)
    assigned.lay(part, _assigned(table.get(part, {}), path, depth + 1, value, where), _TOP)
    return assigned
