"""Room card: the main job on text that every Python carries.

Comes in: a folder, a budget. Goes out: a run, and five sentences with their masks filled. Called by: `unmask demo`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from unmask.blueprint import RECIPE, load_recipe
from unmask.bundle import load
from unmask.errors import RunError
from unmask.pretrain import Result, launch
from unmask.text.library import english_of_python
from unmask.train.lock import refuse_in_use
from unmask.train.show import Display
from unmask.use.fill import Filled, fill

MARK: Final = "demonstration"  # the name of a demo's recipe: a person's own run of the recipe `demo` is not replaced
SENTENCES: Final[tuple[tuple[str, str], ...]] = (
    ("If the argument is omitted, the [MASK] value is used.", "default"),
    ("Return the number of [MASK] in the list.", "items"),
    ("A TypeError is [MASK] if the argument is not a string.", "raised"),
    ("Open the file and [MASK] its contents.", "read"),
    ("Return True if the object is an [MASK] of the class.", "instance"),
)
"""Fixed sentences and the word that belongs in each; none of them stands in the training text as it is."""


@dataclass(frozen=True)
class Demo:
    """What the demonstration made: the run, the answers, and how many of the right words were among the first five."""

    result: Result
    filled: tuple[Filled, ...]
    right: int


def demo(
    out: str | Path = "runs/demo", *, display: Display | None = None, overrides: Mapping[str, Any] | None = None
) -> Demo:
    """Pretrain on the standard library's English, then fill five masks. An earlier demo in `out` is replaced.

    Raises:
        RunError: `out` holds something that no demo made, or one is at work there.
    """
    folder = Path(out)
    recipe = replace(load_recipe("demo", (), overrides), name=MARK)
    with _earlier_set_aside(folder):
        result = launch(list(english_of_python()), recipe=recipe, out=folder, display=display)
    filled = tuple(fill(load(folder), [sentence for sentence, _ in SENTENCES], top=5))
    right = sum(
        word in {candidate.token for candidate in one.masks[0].candidates}
        for one, (_, word) in zip(filled, SENTENCES, strict=True)
    )
    return Demo(result, filled, right)


@contextmanager
def _earlier_set_aside(folder: Path) -> Generator[None]:
    """An earlier demo goes when the new one has begun to be written; until then it comes back, whatever happens."""
    aside = folder.with_name(f".{folder.name}.earlier")
    if aside.exists() and not os.path.lexists(folder):  # a kill came before the new one had begun
        aside.rename(folder)
    if not os.path.lexists(folder):
        yield
        return
    recipe = folder / RECIPE
    if not (recipe.is_file() and f'name = "{MARK}"' in recipe.read_text(encoding="utf-8")):
        raise RunError("this folder was not made by a demo", where=str(folder), next="choose another --out")
    refuse_in_use(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    try:
        yield
    finally:
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
