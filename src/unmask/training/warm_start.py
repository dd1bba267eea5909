"""Room card: a run that goes on from a model that exists.

Comes in: the folder of a model (ours, or any that `unmask import` takes), how many pieces to add to its vocabulary.
Goes out: a recipe in which the model decides encoder and tokenizer; its modules, with rows for the new pieces. Called
by: workshop, pretrain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from unmask.core import files
from unmask.core.errors import RecipeError
from unmask.hub.from_hf import open_model
from unmask.models import build
from unmask.models.model import Model
from unmask.tokenization.extend import origins
from unmask.tokenization.settings import ExtendedTokenizerSettings, FileTokenizerSettings
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.recipe import Recipe

DECIDED = ("encoder", "text.tokenizer")  # keys of a recipe that the model decides
START = "start"  # the folder of a run that holds the model it started with


def beginning_of(run: Path, recipe: Recipe) -> Recipe:
    """The recipe of a run, with the tokenizer that it started with read from the run: the model may be gone by now."""
    tokenizer = recipe.text.tokenizer
    if not recipe.start.model or not isinstance(tokenizer, FileTokenizerSettings | ExtendedTokenizerSettings):
        return recipe
    return replace(recipe, text=replace(recipe.text, tokenizer=replace(tokenizer, path=(run / START).absolute())))


@dataclass(frozen=True)
class Start:
    """A model to go on from, and what its vocabulary gets beside its own."""

    model: Model
    pieces: int = 0

    @classmethod
    def open(cls, folder: str | Path, pieces: int = 0) -> Start:
        """The model in a folder.

        Raises:
            ModelError: no model there, or one that can't be held here.
            RecipeError: a number of new pieces that is none.
        """
        if pieces < 0:
            raise RecipeError(f"{pieces} new pieces", where="--extend-vocabulary", next="give 0 or more")
        return cls(open_model(folder), pieces)

    def tokenizer_settings(self, folder: Path) -> FileTokenizerSettings | ExtendedTokenizerSettings:
        """The [text.tokenizer] of a run whose first tokenizer lies in this folder."""
        if self.pieces:
            return ExtendedTokenizerSettings("extended", folder, self.pieces)
        return FileTokenizerSettings("file", folder)

    def adopted(self, recipe: Recipe, cache: Path) -> tuple[Recipe, list[str]]:
        """The recipe with the model's encoder and tokenizer, stages cut to what it holds; and what there is to say."""
        settings, said = self.model.settings, list(self.model.said)
        folder = cache / START / self.model.tokenizer.fingerprint
        if not folder.is_dir():
            with files.new_folder(folder) as aside:
                self.model.tokenizer.save(aside)
        stages = tuple(replace(stage, length=min(stage.length, settings.longest)) for stage in recipe.stage)
        said += [
            f"the stage of length {asked.length} is cut to {settings.longest}: the model holds no longer texts"
            for asked, stage in zip(recipe.stage, stages, strict=True)
            if asked != stage
        ]
        adopted = replace(
            recipe,
            encoder=settings,
            stage=stages,
            text=replace(recipe.text, tokenizer=self.tokenizer_settings(folder)),
            start=replace(recipe.start, model=str(Path(self.model.path).absolute())),
        )
        return adopted, said

    def modules(self, tokenizer: Tokenizer) -> tuple[nn.Module, nn.Module]:
        """Encoder and head with the model's weights, and rows for the pieces that this tokenizer has beyond its own.

        A new piece begins as the mean of the older pieces in it. A new character has none: it begins near the mean of
        all, with noise drawn from torch's generator, or no two of them could be told apart.
        """
        model = self.model
        rows = int(model.encoder.vocabulary)  # type: ignore[arg-type]
        if tokenizer.size <= rows and not self.pieces:
            return model.encoder, model.head
        parts = origins(model.tokenizer.to_json(), tokenizer.to_json())
        encoder, head = build(model.settings, max(rows, tokenizer.size))
        with torch.device("meta"):  # shapes alone
            other = build(model.settings, rows + 1)
        for grown, module, longer in zip((encoder, head), (model.encoder, model.head), other, strict=True):
            old, shapes = module.state_dict(), {name: t.shape for name, t in longer.state_dict().items()}
            for name, new in grown.state_dict().items():  # the very tensors, not copies
                if shapes[name] == old[name].shape:
                    new.copy_(old[name])
                else:
                    new[:rows] = old[name]
                    _begin(new, parts, model.tokenizer)
        return encoder, head


def _begin(table: Tensor, parts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    """Fill the rows of new pieces in a tensor that has a row for each, given the older pieces in each of them."""
    ordinary = table[torch.from_numpy(tokenizer.ordinary_N)]
    mean, deviation = ordinary.mean(0), ordinary.std(0)
    for number, pieces in enumerate(parts, start=tokenizer.size):
        table[number] = table[list(pieces)].mean(0) if pieces else mean + deviation * torch.randn_like(mean)


def started_from(run: Path, recipe: Recipe) -> Start | None:
    """What a run began with, of which no step was saved yet; None where its weights were drawn."""
    if not recipe.start.model:
        return None
    tokenizer = recipe.text.tokenizer
    return Start.open(run / START, tokenizer.pieces if isinstance(tokenizer, ExtendedTokenizerSettings) else 0)
