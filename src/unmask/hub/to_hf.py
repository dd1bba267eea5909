"""Exports a model for transformers, onnxruntime or sentence-transformers, after comparing it with them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from unmask.core import files
from unmask.core.errors import ModelError, RecipeError
from unmask.core.files import RunLayout
from unmask.core.types import ProgressCallback
from unmask.hub import onnx, sentence_transformers
from unmask.hub.from_hf import SentenceFiles, open_model
from unmask.hub.model_card import FormatCard, model_card
from unmask.hub.parity import Parity, compare, sample_texts
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.model import Model, check_output_directory, save_model
from unmask.models.neomme import NeoMMEConfig
from unmask.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exported:
    """Result of an export: the written folder and its comparison with transformers."""

    path: str
    architecture: str
    parity: Parity | None  # None: not compared
    notes: tuple[str, ...]  # conversions and initializations when the model was read
    graph: onnx.OnnxGraph | None = None  # with format="onnx"
    vectors: sentence_transformers.VectorParity | None = None  # with format="sentence-transformers"


Format = Literal["hf", "onnx", "sentence-transformers"]
Part = Literal["all", "encoder"]

_NOT_MASKED_LM: Final = {  # no class of transformers predicts as these models do
    "causal": "its attention is causal, and BERT and ModernBERT of transformers attend to both sides",
    "mntp": "it predicts a masked token one position earlier than transformers",
}


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: Format = "hf",
    force: bool = False,
    unverified: bool = False,
    only: Part = "all",
    int8: bool = False,
    on_progress: ProgressCallback | None = None,
) -> Exported:
    """Write a model in the Hugging Face format if transformers computes the same logits from it.

    The classes are BertForMaskedLM, BertForPreTraining (with a pair head), RobertaForMaskedLM, XLMRobertaForMaskedLM,
    ModernBertForMaskedLM and NeoMMEForMaskedLM; with `only="encoder"` BertModel, RobertaModel, XLMRobertaModel,
    ModernBertModel and NeoMMEModel. A BERT that was trained to detect replaced tokens is written as
    ElectraForPreTraining or ElectraModel, a ModernBERT only as ModernBertModel.

    The format "onnx" adds onnx/model.onnx, a graph for onnxruntime and transformers.js, whose outputs are compared with
    PyTorch. The format "sentence-transformers" writes the encoder with mean pooling and normalization, whose vectors
    are compared with those of `unmask.embed`.

    Args:
        model: Run, step folder, or folder that transformers saved.
        out: Folder to write; it is not overwritten without `force`.
        format: "hf", or what to add to it: "onnx" or "sentence-transformers".
        force: Whether to replace an existing model folder.
        unverified: Whether to skip the comparison; the model card says so. Not with "onnx".
        only: Part to write: "all" for the whole model, "encoder" for the model without heads.
        int8: Whether to add onnx/model_quantized.onnx, with weights of 8 bits.
        on_progress: Function that is called with the name of the task and the fraction done.

    Raises:
        ModelError: a package is not installed, transformers computes other logits or ids or has no class for this
            architecture, or a graph or vectors differ.
        RecipeError: the options exclude each other.
        RunError: `out` exists, or is the folder of the model.
        StoreError: `out` can't be written.
    """
    _check_options(format, unverified=unverified, int8=int8)
    target = check_output_directory(Path(out), Path(model), force=force)
    _require_packages(format, unverified=unverified)
    opened = open_model(model)
    only_encoder = _is_only_encoder(opened, format, only)
    run = _run_of(Path(model), Path(opened.path))
    if run is not None:
        _check_old_ids(run, opened)
    sentence_files = _sentence_files(Path(model), Path(opened.path), format)
    graph = vectors = None
    with files.atomic_directory(target) as folder:
        save_model(folder, opened, only_encoder=only_encoder)
        architecture = str(files.read_json(folder / RunLayout.CONFIG)["architectures"][0])
        for found in sentence_files:
            found.copy(folder)
        texts, source = sample_texts(opened, run)
        parity = None if unverified else compare(folder, opened, texts, source)
        if format == "onnx":
            graph = onnx.write_graph(folder, opened, texts, int8=int8, on_progress=on_progress)
        elif format == "sentence-transformers":
            sentence_transformers.write_modules(folder, opened)
            vectors = None if unverified else sentence_transformers.compare_vectors(folder, opened, texts)
        card = None
        if graph is not None:
            card = FormatCard("transformers.js", onnx.usage(graph, opened), onnx.graph_facts(graph))
        elif format == "sentence-transformers":
            facts = sentence_transformers.vector_facts(vectors)
            card = FormatCard("sentence-transformers", sentence_transformers.USAGE, facts)
        text = model_card(target.name, opened, run, architecture, parity, card)
        files.write_text(folder / RunLayout.README, text)
    return Exported(str(target), architecture, parity, opened.notes, graph, vectors)


def _check_options(format: Format, *, unverified: bool, int8: bool) -> None:
    if int8 and format != "onnx":
        raise RecipeError(
            "int8 is an option of ONNX graphs", location="--int8", hint="add --format onnx, or leave it out"
        )
    if unverified and format == "onnx":
        raise RecipeError(
            "a graph is made by transformers and always compared",
            location="--unverified",
            hint="leave it out, or use --format hf",
        )


def _require_packages(format: Format, *, unverified: bool) -> None:
    if not unverified and importlib.util.find_spec("transformers") is None:
        skip = "" if format == "onnx" else "; or skip the comparison: --unverified (unverified=True)"
        raise ModelError(
            "an export is compared with transformers, which is not installed",
            hint=f'pip install "transformers>=4.57"{skip}',
        )
    if format == "onnx":
        onnx.require_onnx()
    elif format == "sentence-transformers" and not unverified:
        sentence_transformers.require_sentence_transformers()


def _is_only_encoder(model: Model, format: Format, only: Part) -> bool:
    """Return whether the encoder is written without heads.

    Raises:
        ModelError: the model has no class in transformers, or none that this format can use.
    """
    objective = model.card.get("objective", "mlm")
    if isinstance(model.settings, TutorialConfig):
        raise ModelError(
            "the tutorial's architecture (recipe `seed`) has no class in transformers",
            location=model.path,
            hint="train another recipe: unmask pretrain TEXT --recipe tiny",
        )
    if format == "sentence-transformers":
        if isinstance(model.settings, NeoMMEConfig):
            raise ModelError(
                "sentence-transformers opens NeoMME only with an image processor, which a text model has not",
                location=model.path,
                hint="use --format hf, and unmask embed for vectors",
            )
        if objective == "causal":
            raise ModelError(
                "the model was trained last on objective.kind=causal: each token saw only the tokens before it",
                location=model.path,
                hint="train it further on masked tokens",
            )
        return True
    if objective in _NOT_MASKED_LM and only == "all":
        raise ModelError(
            f"the model was trained last on objective.kind={objective}: {_NOT_MASKED_LM[objective]}",
            location=model.path,
            hint="export the encoder alone: --only encoder; or train it further on masked tokens",
        )
    if format == "onnx" and only == "all" and isinstance(model.settings, BertConfig) and model.discriminator:
        raise ModelError(
            "the model detects replaced tokens: it has no logits over the vocabulary",
            location=model.path,
            hint="export the encoder alone: --only encoder",
        )
    return only == "encoder" or (objective == "rtd" and model.discriminator is None)


def _sentence_files(model: Path, opened: Path, format: Format) -> list[SentenceFiles]:
    """Return the files of sentence-transformers beside the model; the transformer may lie in a subfolder.

    Raises:
        ModelError: there are such files, and the format writes its own.
    """
    found = [SentenceFiles.of(source) for source in dict.fromkeys((model, opened))]
    if format == "sentence-transformers" and any(each.modules for each in found):
        raise ModelError(
            "the model has modules of sentence-transformers already",
            location=str(model / "modules.json"),
            hint="use --format hf, which keeps them",
        )
    return found


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
