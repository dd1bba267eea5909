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
from unmask.models import build_model
from unmask.models.model import Model
from unmask.tokenization.extend import origins
from unmask.tokenization.settings import ExtendedTokenizerConfig, FileTokenizerConfig
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.recipe import Recipe

DECIDED = ("model", "data.tokenizer")  # keys of a recipe that the model decides
START = "start"  # the folder of a run that holds the model it started with


def with_run_tokenizer(run: Path, recipe: Recipe) -> Recipe:
    """The recipe of a run, with the tokenizer that it started with read from the run: the model may be gone by now."""
    tokenizer = recipe.data.tokenizer
    if not recipe.init.model or not isinstance(tokenizer, FileTokenizerConfig | ExtendedTokenizerConfig):
        return recipe
    return replace(recipe, data=replace(recipe.data, tokenizer=replace(tokenizer, path=(run / START).absolute())))


@dataclass(frozen=True)
class WarmStart:
    """A model to go on from, and what its vocabulary gets beside its own."""

    model: Model
    pieces: int = 0

    @classmethod
    def open(cls, folder: str | Path, pieces: int = 0) -> WarmStart:
        """The model in a folder.

        Raises:
            ModelError: no model there, or one that can't be held here.
            RecipeError: a number of new pieces that is none.
        """
        if pieces < 0:
            raise RecipeError(f"{pieces} new pieces", location="--extend-vocabulary", hint="give 0 or more")
        return cls(open_model(folder), pieces)

    def tokenizer_settings(self, folder: Path) -> FileTokenizerConfig | ExtendedTokenizerConfig:
        """The [data.tokenizer] of a run whose first tokenizer lies in this folder."""
        if self.pieces:
            return ExtendedTokenizerConfig("extended", folder, self.pieces)
        return FileTokenizerConfig("file", folder)

    def apply_to(self, recipe: Recipe, cache: Path) -> tuple[Recipe, list[str]]:
        """The recipe with the model's encoder and tokenizer, stages cut to what it holds; and what there is to say."""
        settings, said = self.model.settings, list(self.model.notes)
        folder = cache / START / self.model.tokenizer.fingerprint
        if not folder.is_dir():
            with files.atomic_directory(folder) as aside:
                self.model.tokenizer.save(aside)
        stages = tuple(
            replace(stage, max_seq_len=min(stage.max_seq_len, settings.max_position_embeddings))
            for stage in recipe.stage
        )
        said += [
            f"the stage of length {asked.max_seq_len} is cut to {settings.max_position_embeddings}: the model holds no longer texts"
            for asked, stage in zip(recipe.stage, stages, strict=True)
            if asked != stage
        ]
        adopted = replace(
            recipe,
            model=settings,
            stage=stages,
            data=replace(recipe.data, tokenizer=self.tokenizer_settings(folder)),
            init=replace(recipe.init, model=str(Path(self.model.path).absolute())),
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
        encoder, head = build_model(model.settings, max(rows, tokenizer.size))
        with torch.device("meta"):  # shapes alone
            other = build_model(model.settings, rows + 1)
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
    ordinary = table[torch.from_numpy(tokenizer.regular_token_ids)]
    mean, deviation = ordinary.mean(0), ordinary.std(0)
    for number, pieces in enumerate(parts, start=tokenizer.size):
        table[number] = table[list(pieces)].mean(0) if pieces else mean + deviation * torch.randn_like(mean)


def started_from(run: Path, recipe: Recipe) -> WarmStart | None:
    """What a run began with, of which no step was saved yet; None where its weights were drawn."""
    if not recipe.init.model:
        return None
    tokenizer = recipe.data.tokenizer
    return WarmStart.open(
        run / START, tokenizer.num_new_tokens if isinstance(tokenizer, ExtendedTokenizerConfig) else 0
    )
