"""Exports a model in the Hugging Face format, after comparing it with transformers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from unmask.core import files
from unmask.core.errors import ModelError
from unmask.core.files import RunLayout
from unmask.hub.from_hf import SentenceFiles, open_model
from unmask.hub.model_card import model_card
from unmask.hub.parity import Parity, compare, sample_texts
from unmask.models.annotated import TutorialConfig
from unmask.models.model import Model, check_output_directory, save_model
from unmask.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exported:
    """Result of an export: the written folder and its comparison with transformers."""

    path: str
    architecture: str
    parity: Parity | None  # None: not compared
    notes: tuple[str, ...]  # conversions and initializations when the model was read


_NOT_MASKED_LM: Final = {  # no class of transformers predicts as these models do
    "causal": "its attention is causal, and BERT and ModernBERT of transformers attend to both sides",
    "mntp": "it predicts a masked token one position earlier than transformers",
}


def export(
    model: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    unverified: bool = False,
    only: Literal["all", "encoder"] = "all",
) -> Exported:
    """Write a model in the Hugging Face format if transformers computes the same logits from it.

    The classes are BertForMaskedLM, BertForPreTraining (with a pair head), RobertaForMaskedLM, XLMRobertaForMaskedLM,
    ModernBertForMaskedLM and NeoMMEForMaskedLM; with `only="encoder"` BertModel, RobertaModel, XLMRobertaModel,
    ModernBertModel and NeoMMEModel. A BERT that was trained to detect replaced tokens is written as
    ElectraForPreTraining or ElectraModel, a ModernBERT only as ModernBertModel.

    Args:
        model: Run, step folder, or folder that transformers saved.
        out: Folder to write; it is not overwritten without `force`.
        force: Whether to replace an existing model folder.
        unverified: Whether to skip the comparison; the model card says so.
        only: Part to write: "all" for the whole model, "encoder" for the model without heads.

    Raises:
        ModelError: transformers isn't installed, computes other logits or ids, or has no class for this architecture.
        RunError: `out` exists, or is the folder of the model.
        StoreError: `out` can't be written.
    """
    target = check_output_directory(Path(out), Path(model), force=force)
    if not unverified and importlib.util.find_spec("transformers") is None:
        raise ModelError(
            "an export is compared with transformers, which is not installed",
            hint='pip install "transformers>=4.57"; or skip the comparison: --unverified (unverified=True)',
        )
    opened = open_model(model)
    if isinstance(opened.settings, TutorialConfig):
        raise ModelError(
            "the tutorial's architecture (recipe `seed`) has no class in transformers",
            location=opened.path,
            hint="train another recipe: unmask pretrain TEXT --recipe tiny",
        )
    objective = opened.card.get("objective", "mlm")
    if objective in _NOT_MASKED_LM and only == "all":
        raise ModelError(
            f"the model was trained last on objective.kind={objective}: {_NOT_MASKED_LM[objective]}",
            location=opened.path,
            hint="export the encoder alone: --only encoder; or train it further on masked tokens",
        )
    only_encoder = only == "encoder" or (opened.card.get("objective") == "rtd" and opened.discriminator is None)
    run = _run_of(Path(model), Path(opened.path))
    if run is not None:
        _check_old_ids(run, opened)
    with files.atomic_directory(target) as folder:
        save_model(folder, opened, only_encoder=only_encoder)
        architecture = str(files.read_json(folder / RunLayout.CONFIG)["architectures"][0])
        for source in dict.fromkeys((Path(model), Path(opened.path))):  # the transformer may lie in a subfolder
            SentenceFiles.of(source).copy(folder)
        parity = None if unverified else compare(folder, opened, *sample_texts(opened, run))
        files.write_text(folder / RunLayout.README, model_card(target.name, opened, run, architecture, parity))
    return Exported(str(target), architecture, parity, opened.notes)


def _check_old_ids(run: Path, model: Model) -> None:
    """Raise ModelError if a token of the model that a run was started from has another id after training."""
    start = run / RunLayout.START
    if not (start / RunLayout.TOKENIZER).is_file():
        return
    # By the vocabularies: for an added token that is normalized, id_to_token gives the normalized text.
    old, new = Tokenizer.load(start).vocabulary(), model.tokenizer.vocabulary()
    moved = [token for token, number in old.items() if new.get(token) != number]
    if moved:
        raise ModelError(
            f"{len(moved):,} tokens of the first model have other ids: {moved[0]!r} had {old[moved[0]]}, and has "
            f"{new.get(moved[0])}",
            location=str(run),
            hint="import the first model again, then train again from the imported folder",
        )


def _run_of(path: Path, model: Path) -> Path | None:
    """Return the run that contains a model, if there is one."""
    candidates = (path, model, model.parent)
    return next((folder for folder in candidates if (folder / RunLayout.RECIPE).is_file()), None)
