"""Continued pretraining: a run that starts with the weights and the tokenizer of a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unmask.core import files
from unmask.core.errors import RecipeError
from unmask.core.files import RunLayout
from unmask.core.remote import UPLOADS, is_remote, require_public, scheme_of
from unmask.core.remote.upload import fetch_model
from unmask.hub.from_hf import open_model
from unmask.models import EncoderModule, HeadModule, build_model
from unmask.models.model import Model
from unmask.objectives.sentence_pairs import BertPretrainingConfig
from unmask.tokenization.extend import origins
from unmask.tokenization.settings import ExtendedTokenizerConfig, FileTokenizerConfig
from unmask.tokenization.tokenizer import Tokenizer
from unmask.training.recipe import Recipe

DECIDED = ("model", "data.tokenizer")  # recipe keys that the model determines

_log = logging.getLogger("unmask")


@dataclass(frozen=True)
class WarmStart:
    """A model to start from and the number of tokens to add to its vocabulary."""

    model: Model
    num_new_tokens: int = 0
    address: str = ""  # of the model, if it was downloaded

    @classmethod
    def open(cls, folder: str | Path, num_new_tokens: int = 0) -> WarmStart:
        """Loads the model in a directory, or at the address of a model or run, which is downloaded to the cache.

        Raises:
            ModelError: the directory contains no model of a supported kind, or there is none at the address.
            RecipeError: the number of new tokens is negative, or the address has credentials.
            StoreError: the cache can't be written.
        """
        if num_new_tokens < 0:
            raise RecipeError(
                f"invalid number of new tokens: got {num_new_tokens}, expected 0 or more",
                location="--extend-vocabulary",
                hint="give 0 or more",
            )
        address = str(folder) if is_remote(folder) else ""
        if address:
            if scheme_of(address) not in UPLOADS:  # a web server lists no folder
                message = f"a model can't be read from {scheme_of(address)}://"
                hint = f"use {', '.join(f'{scheme}://' for scheme in UPLOADS)}, or download its folder"
                raise RecipeError(message, location=f"--from {address}", hint=hint)
            require_public(address, "--from")
        model = open_model(fetch_model(address) if address else folder)
        if model.discriminator is not None:
            note = "initialized the masked-language-modeling head; the discriminator head is not used"
            model = replace(model, discriminator=None, notes=(*model.notes, note))
        return cls(model, num_new_tokens, address)

    @classmethod
    def of_run(cls, run: Path, recipe: Recipe) -> WarmStart | None:
        """Loads the model that a run started from, or returns None if its weights were initialized at random."""
        if not recipe.init.model:
            return None
        tokenizer = recipe.data.tokenizer
        new = tokenizer.num_new_tokens if isinstance(tokenizer, ExtendedTokenizerConfig) else 0
        return cls.open(run / RunLayout.START, new)

    def tokenizer_settings(self, folder: Path) -> FileTokenizerConfig | ExtendedTokenizerConfig:
        """Returns the [data.tokenizer] settings of a run; `folder` contains the model's tokenizer."""
        if self.num_new_tokens:
            return ExtendedTokenizerConfig("extended", folder, self.num_new_tokens)
        return FileTokenizerConfig("file", folder)

    def apply_to(self, recipe: Recipe, cache: Path) -> Recipe:
        """Returns the recipe with the model's encoder and tokenizer.

        Stages that exceed the model's positions are shortened, with a log message.
        """
        settings = self.model.settings
        longest = settings.max_position_embeddings
        folder = cache / RunLayout.START / self.model.tokenizer.fingerprint
        if not folder.is_dir():
            self._save_tokenizer(folder)
        for note in self.model.notes:
            _log.info(note)
        trains_pairs = any(isinstance(objective, BertPretrainingConfig) for objective in recipe.objectives)
        if self.model.pair is not None and not trains_pairs:
            _log.info("pooler and pair head are not trained and not saved: objective.kind is not mlm+pairs")
        for number, stage in enumerate(recipe.stage):
            if stage.max_seq_len > longest:
                _log.info(
                    f"stage.{number}.max_seq_len reduced from {stage.max_seq_len} to {longest}, the model's maximum"
                )
        return replace(
            recipe,
            model=settings,
            stage=tuple(replace(stage, max_seq_len=min(stage.max_seq_len, longest)) for stage in recipe.stage),
            data=replace(recipe.data, tokenizer=self.tokenizer_settings(folder)),
            init=replace(recipe.init, model=self.address or str(Path(self.model.path).absolute())),
        )

    def _save_tokenizer(self, folder: Path) -> None:
        from filelock import FileLock

        with files.wrap_os_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):  # ranks that need the same tokenizer wait for it
                if not folder.is_dir():
                    with files.atomic_directory(folder) as temporary:
                        self.model.tokenizer.save(temporary)

    def vocab_size(self, tokenizer: Tokenizer) -> int:
        """Returns the size of the embedding: at least the model's, which may exceed the number of its tokens."""
        return max(self.model.encoder.vocab_size, tokenizer.size)

    def modules(self, tokenizer: Tokenizer) -> tuple[EncoderModule, HeadModule]:
        """Returns encoder and head with the model's weights, extended by the new tokens of `tokenizer`.

        A new token is initialized with the mean of the tokens that it was split into before. A new character was no
        token before: it is initialized with the mean of all tokens plus noise from torch's generator, because equal
        embeddings would stay equal.
        """
        model = self.model
        old_size = model.encoder.vocab_size
        if tokenizer.size <= old_size and not self.num_new_tokens:
            return model.encoder, model.head
        parts = origins(model.tokenizer.to_json(), tokenizer.to_json())
        encoder, head = build_model(model.settings, self.vocab_size(tokenizer))
        # A larger vocabulary shows which tensors depend on its size. These modules are not built on the meta device,
        # because their initial weights are drawn from the generator before the noise of new characters.
        larger_modules = build_model(model.settings, old_size + 1)
        for new_module, old_module, larger in zip(
            (encoder, head), (model.encoder, model.head), larger_modules, strict=True
        ):
            old = old_module.state_dict()
            larger_shapes = {name: tensor.shape for name, tensor in larger.state_dict().items()}
            for name, tensor in new_module.state_dict().items():  # tensors of the module itself, not copies
                if larger_shapes[name] == old[name].shape:
                    tensor.copy_(old[name])
                else:
                    tensor[:old_size] = old[name]
                    _initialize_new_tokens(tensor, parts, model.tokenizer)
        return encoder, head


def _initialize_new_tokens(table: Tensor, parts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    """Fills the entries of new tokens in an embedding or decoder tensor.

    Args:
        table: one entry per token in its first dimension.
        parts: for each new token, the ids of the old tokens that it was split into; empty for a new character.
        tokenizer: the old tokenizer; new ids follow its own.
    """
    regular = table[torch.from_numpy(tokenizer.regular_token_ids)]
    mean, deviation = regular.mean(0), regular.std(0)
    for number, ids in enumerate(parts, start=tokenizer.size):
        table[number] = table[list(ids)].mean(0) if ids else mean + deviation * torch.randn_like(mean)
