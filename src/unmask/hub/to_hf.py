"""Room card: a model, written for the rest of the world.

Comes in: a run, a step folder or a model's folder; a place to write. Goes out: a folder that `transformers` opens
without code of ours, with a model card; nothing at all where `transformers` would see another model in it. Called by:
unmask.export, `unmask export`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmask.core import files
from unmask.core.errors import ModelError
from unmask.hub.from_hf import open_model
from unmask.hub.model_card import model_card
from unmask.hub.parity import Parity, compare, sample
from unmask.models.annotated import TutorialConfig
from unmask.models.model import CONFIG, free_place, save_model

CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked."""

    path: str
    architecture: str
    parity: Parity | None  # None: unverified
    notes: tuple[str, ...]  # what had to be converted or begun anew in a folder of others


def export(
    model: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    unverified: bool = False,
    only: Literal["all", "encoder"] = "all",
) -> Exported:
    """Write a model as the ecosystem has it, if `transformers` gets the same logits from what is written.

    Classic: BertForPreTraining with a pair head, BertForMaskedLM without, RobertaForMaskedLM and XLMRobertaForMaskedLM
    for what came from such a folder; modern: ModernBertForMaskedLM. `only="encoder"`: BertModel and its like.

    Args:
        model: a run, one of its step folders, or a folder that `transformers` saved.
        out: where it is to stand; not overwritten without `force`.
        force: replace a model folder that stands there.
        unverified: compare nothing, and say so in the model card.
        only: "all" the model has, or the "encoder" without its heads.

    Raises:
        ModelError: `transformers` isn't installed, sees other logits or ids, or has no class for this net.
        RunError: `out` exists, or is what is read.
        StoreError: `out` can't be written.
    """
    place = free_place(Path(out), Path(model), force=force)
    if not unverified and importlib.util.find_spec("transformers") is None:
        raise ModelError(
            "an export is compared with `transformers`, which is not installed",
            hint='pip install "transformers>=4.57"; or write it unchecked: --unverified (unverified=True)',
        )
    opened = open_model(model)
    if isinstance(opened.settings, TutorialConfig):
        raise ModelError(
            "the tutorial's net (recipe `seed`) is no class of `transformers`, so that nobody else could open it",
            location=opened.path,
            hint="train an encoder that is one: unmask pretrain TEXT --recipe char, tiny or bert-tiny",
        )
    run = _run_of(Path(model), Path(opened.path))
    with files.atomic_directory(place) as aside:
        save_model(aside, opened, only_encoder=only == "encoder")
        architecture = str(files.read_json(aside / CONFIG)["architectures"][0])
        parity = None
        if not unverified:
            parity = compare(aside, opened, *sample(opened, run))
        files.write_text(aside / CARD, model_card(place.name, opened, run, architecture, parity))
    return Exported(str(place), architecture, parity, opened.notes)


def _run_of(given: Path, opened: Path) -> Path | None:
    """The run that a model is of, where its folder still stands in it."""
    places = (given, opened, opened.parent)
    return next((place for place in places if (place / "recipe.toml").is_file()), None)
