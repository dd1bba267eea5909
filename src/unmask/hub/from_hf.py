"""Imports transformers models: converts their weights and initializes missing heads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unmask.core import files
from unmask.core.errors import DamagedError, ModelError
from unmask.core.files import RunLayout
from unmask.core.format import join_names
from unmask.hub.tokenizer import load_tokenizer
from unmask.models import EncoderConfig, build_model, build_pair, electra
from unmask.models import model as models
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.hf_format import (
    TUTORIAL_TYPE,
    States,
    encoder_prefix,
    has_pair_head,
    hf_tensor_names,
    is_ignored,
    tied_hf_tensors,
    to_hf_tensors,
)
from unmask.models.model import (
    Model,
    Weights,
    as_float32,
    check_output_directory,
    check_size,
    find_checkpoint,
    open_checkpoint,
    save_model,
)
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig

INDEX: Final = "model.safetensors.index.json"
_OTHER_FORMATS: Final = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt*", "*.h5", "*.msgpack")
_OLDER_SUFFIXES: Final = ((".gamma", ".weight"), (".beta", ".bias"))
_ENCODER_ONLY: Final = (  # names in a BertModel file
    "embeddings.", "encoder.", "pooler.", "layers.", "final_norm.", "embed_tokens.", "value_embeddings.",
    "patch_embeddings.",
)  # fmt: skip
_TASK_HEADS: Final = ("classifier.", "qa_outputs.", "score.", "multi_vector_head.", *electra.TASK_HEADS)
_BUFFERS: Final = ("position_ids", "token_type_ids", "inv_freq")  # computed from the settings
LEFT_OUT: Final = "left out, not needed for masked-language modeling"  # begins a note
_NAMES_SHOWN: Final = 5
# torch.compile, DDP and DataParallel, FSDP, activation checkpointing
_WRAPPERS: Final = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTER_PREFIXES: Final = ("model.", "auto_model.", "transformer.")
_INNER_PREFIXES: Final = ("bert.", "roberta.", "model.", "cls.", "lm_head.", "embeddings.word_embeddings.")
SENTENCE_MODULES: Final = "modules.json"
_SENTENCE_FILES: Final = ("config_sentence_transformers.json", "sentence_bert_config.json")
_MODEL_TYPES: Final = (
    ("ModernBert", "modernbert"), ("NeoMME", "neomme"), ("XLMRoberta", "xlm-roberta"), ("Roberta", "roberta"),
    ("Bert", "bert"), ("Electra", electra.MODEL_TYPE),
)  # fmt: skip

Settings = ModernBertConfig | BertConfig | NeoMMEConfig
Tensors = dict[str, Tensor]


def import_model(folder: str | Path, out: str | Path, *, force: bool = False, seed: int = 0) -> Model:
    """Convert a folder of transformers to a folder that unmask and transformers load.

    Args:
        folder: BERT, RoBERTa, XLM-R, ELECTRA, ModernBERT or NeoMME folder.
        out: Folder to write; it is not overwritten without `force`.
        force: Whether to replace an existing model folder.
        seed: Random seed for the weights of heads that the folder lacks.

    Raises:
        RunError: `out` exists.
        ModelError, TokenizerError, DamagedError: as for `open_model`.
        StoreError: `out` can't be written.
    """
    target = check_output_directory(Path(out), Path(folder), force=force)
    sentence_files = SentenceFiles.of(Path(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_model(folder)
    source = Path(model.path).resolve()
    card = model.card or {"imported": {"from": source.name, "notes": list(model.notes)}}
    model = replace(model, card=card, path=str(target))
    with files.atomic_directory(target) as partial:
        save_model(partial, model)
        sentence_files.copy(partial)
        files.write_manifest(partial)
    return model


@dataclass(frozen=True)
class SentenceFiles:
    """Files of sentence-transformers beside a model: modules.json, and the files and folders of the modules.

    The transformer may lie in a subfolder, such as 0_Transformer.
    """

    folder: Path
    modules: tuple[dict[str, Any], ...] = ()  # entries of modules.json; empty: not of sentence-transformers
    transformer: str = ""  # subfolder of the transformer

    @classmethod
    def of(cls, folder: Path) -> SentenceFiles:
        """Return the files in a folder.

        Raises:
            DamagedError: modules.json is not a list of modules, or names a path outside the folder.
        """
        path = folder / SENTENCE_MODULES
        if not os.path.isfile(path):  # Path.is_file raises if a name is too long
            return cls(folder)
        entries: Any = files.read_json(path)
        is_valid = isinstance(entries, list) and all(
            isinstance(entry, dict)
            and isinstance(entry.get("path"), str)
            and isinstance(entry.get("type"), str)
            and _is_inside(entry["path"])
            for entry in cast("list[Any]", entries)
        )
        if not is_valid:
            raise DamagedError(
                "invalid list of modules: expected objects with the strings `path` and `type`",
                location=str(path),
                hint="restore the file from a copy, or remove it to import the transformer alone",
            )
        modules = tuple(cast("list[dict[str, Any]]", entries))
        transformers = [str(entry["path"]) for entry in modules if str(entry["type"]).endswith(".Transformer")]
        return cls(folder, modules, transformers[0] if transformers else "")

    def copy(self, target: Path) -> None:
        """Copy the files to a folder that has the transformer at its top."""
        if not self.modules:
            return
        entries: list[dict[str, Any]] = []
        for entry in self.modules:
            is_transformer = str(entry["type"]).endswith(".Transformer")
            entries.append({**entry, "path": ""} if is_transformer else entry)
            source = self.folder / entry["path"]
            if not is_transformer and entry["path"] and source.is_dir():
                self._check_links(source)
                shutil.copytree(source, target / entry["path"], dirs_exist_ok=True)
        for name in _SENTENCE_FILES:
            source = next((f for f in (self.folder / self.transformer / name, self.folder / name) if f.is_file()), None)
            if source is not None:
                self._check_links(source)
                shutil.copyfile(source, target / name)
        files.write_json(target / SENTENCE_MODULES, entries)

    def _check_links(self, source: Path) -> None:
        """Check that no link leads out of the folder: these files are copied as they are, whatever they contain.

        Raises:
            ModelError: a link does; it is named.
        """
        found = next((path for path in (source, *source.rglob("*")) if files.leaves(self.folder, path)), None)
        if found is not None:
            raise ModelError(
                f"a symbolic link leads out of the folder, to {found.resolve()}",
                location=str(found),
                hint="remove it, or replace it by the file itself",
            )


def _is_inside(path: str) -> bool:
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def load(path: str | Path) -> Model:
    """Load a model from a run, a step folder, or a folder saved by transformers, with the ids of AutoTokenizer.

    Raises:
        ModelError: there is no model, its architecture is not supported, or the tokenizer doesn't match it.
        TokenizerError: the tokenizer can't be read, or AutoTokenizer gives ids that no tokenizer.json gives.
        DamagedError: a file was truncated or changed; it is named.
    """
    return models.load(Path(path) / _transformer_folder(Path(path)), read_tokenizer=load_tokenizer)


def open_model(folder: str | Path) -> Model:
    """Load a model for continued pretraining or for conversion; its `notes` list what was converted or initialized.

    Args:
        folder: Run, step folder, or folder that transformers saved. Missing heads get initial weights from the
            random generator of torch, which the caller seeds.

    Raises:
        ModelError: an unsupported architecture or setting, weights that don't fit it, or no safetensors.
        TokenizerError: there is no tokenizer, or it can't be read.
        DamagedError: a file is missing or damaged.
    """
    path = find_checkpoint(Path(folder) / _transformer_folder(Path(folder)))
    hf_config = _read_config(path)
    if (path / RunLayout.CARD).is_file() and not _is_encoder_only(hf_config):
        return load(folder)
    model = open_checkpoint(path, hf_config, read_tokenizer=load_tokenizer, read_weights=_read_weights)
    return replace(model, notes=(*model.notes, *_tokenizer_notes(model)))


def _transformer_folder(folder: Path) -> str:
    """Return the subfolder of the transformer in a folder of sentence-transformers; "" if there is none."""
    return "" if os.path.isfile(folder / RunLayout.CONFIG) else SentenceFiles.of(folder).transformer


def _read_weights(folder: Path, settings: EncoderConfig, vocab_size: int) -> Weights:
    """Read weights in any supported layout and complete the heads with initial weights."""
    try:
        if isinstance(settings, TutorialConfig):
            raise ModelError(
                f"a model of type {TUTORIAL_TYPE} without {RunLayout.CARD}", hint="restore the file from a copy"
            )
        tensors, notes = read_tensors(folder)
        tensors, rename_notes = rename_tensors(tensors, settings)
        settings, tie_notes = untie_if_different(tensors, settings)
        check_size(settings, vocab_size, tensors, str(folder))
        encoder, head = build_model(settings, vocab_size)
        tensors, pooler_notes = leave_out_pooler(tensors, settings, _architecture(_read_config(folder)))
        pair = build_pair(settings) if has_pair_head(tensors, settings) else None
        initial = States(encoder.state_dict(), head.state_dict(), None if pair is None else pair.state_dict())
        tensors, head_notes = add_missing_heads(tensors, settings, to_hf_tensors(initial, settings))
        return Weights(tensors, settings, [*notes, *rename_notes, *tie_notes, *pooler_notes, *head_notes])
    except ModelError as error:
        raise error.at(location=error.location if "/" in error.location else str(folder)) from error


def _tokenizer_notes(model: Model) -> list[str]:
    """Return notes on differences between tokenizer and model."""
    notes: list[str] = []
    tokenizer, settings = model.tokenizer, model.settings
    num_extra = model.encoder.vocab_size - tokenizer.size
    if num_extra > 0:
        notes.append(f"kept {num_extra} embeddings beyond the tokenizer's {tokenizer.size:,} tokens")
    if isinstance(settings, BertConfig) and settings.model_type != "bert":
        pad_id, expected = tokenizer.role_id("pad_token"), settings.position_offset - 1
        if pad_id != expected:
            notes.append(
                f"positions are counted from pad_token_id {expected} of config.json; the tokenizer pads with {pad_id}"
            )
    return notes


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Return config.json; files of old versions name their architecture but not their model_type."""
    config: Any = files.read_json(folder / RunLayout.CONFIG, files.MAX_CONFIG_BYTES)
    if isinstance(config, dict) and cast("Mapping[str, Any]", config).get("quantization_config") is not None:
        raise ModelError(
            "unsupported quantization_config: quantized weights are not supported",
            location=str(folder / RunLayout.CONFIG),
            hint="use the checkpoint in float32, bfloat16 or float16",
        )
    if isinstance(config, dict) and "model_type" not in config:
        architecture = _architecture(cast("Mapping[str, Any]", config))
        for prefix, model_type in _MODEL_TYPES:
            if architecture.startswith(prefix):
                return {**cast("Mapping[str, Any]", config), "model_type": model_type}
    return cast("Mapping[str, Any]", config)


def _is_encoder_only(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes an encoder without heads."""
    return isinstance(config, dict) and _architecture(config).endswith("Model")


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the first class that a config.json names; "" if it names none."""
    names: Any = config.get("architectures")
    return str(cast("list[Any]", names)[0]) if isinstance(names, list) and names else ""


# Tensors ------------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> tuple[Tensors, list[str]]:
    """Return every tensor of a folder in float32 under its name, and notes.

    Raises:
        ModelError: there are no safetensors; the error names files of other formats.
        DamagedError: a file is missing or can't be read.
    """
    tensors: Tensors = {}
    dtypes: set[torch.dtype] = set()
    for file in _weight_files(folder):
        files.check_tensor_header(file)
        try:
            loaded = load_file(file)
        except (SafetensorError, OSError) as error:
            raise DamagedError(
                f"can't read safetensors: {error}",
                location=str(file),
                hint="restore the file from a copy, or download it again",
            ) from error
        dtypes |= {tensor.dtype for tensor in loaded.values() if tensor.is_floating_point()}
        tensors |= {name: as_float32(tensor, name, file) for name, tensor in loaded.items() if not _is_buffer(name)}
    formats = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    notes = [f"converted weights from {', '.join(formats)} to float32"] if formats not in ([], ["float32"]) else []
    tensors, prefix_notes = remove_wrapper_prefixes(tensors)
    return tensors, [*notes, *prefix_notes]


def remove_wrapper_prefixes(tensors: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """Return the tensors without the prefixes of torch.compile, DistributedDataParallel and similar, and notes.

    Raises:
        ModelError: two tensors have the same name without the prefixes.
    """
    removed: set[str] = set()
    renamed: dict[str, str] = {}
    for name in tensors:
        parts = name.split(".")
        kept = [part for part in parts if part not in _WRAPPERS]
        removed |= set(parts) & set(_WRAPPERS)
        renamed[name] = ".".join(kept)
    # A wrapper of Lightning or of sentence-transformers: ModernBERT's own names begin with `model.` too.
    for outer in _OUTER_PREFIXES:
        if renamed and all(name.startswith(outer) for name in renamed.values()):
            inner = [name.removeprefix(outer) for name in renamed.values()]
            if any(name.startswith(_INNER_PREFIXES) for name in inner):
                renamed = dict(zip(renamed, inner, strict=True))
                removed.add(outer.rstrip("."))
    if len(set(renamed.values())) < len(renamed):
        raise ModelError(
            f"two tensors have the same name without the prefixes {', '.join(sorted(removed))}",
            hint="save the model again, without its wrapper",
        )
    notes = [f"removed the prefixes {', '.join(sorted(removed))} of the tensors' names"] if removed else []
    return {renamed[name]: tensor for name, tensor in tensors.items()}, notes


def leave_out_pooler(tensors: Mapping[str, Tensor], settings: Settings, architecture: str) -> tuple[Tensors, list[str]]:
    """Return the tensors without a pooler that no sentence pair classifier uses, and notes."""
    prefix = f"{encoder_prefix(settings)}pooler."
    is_used = architecture == "BertForPreTraining" or any(name.startswith("cls.seq_relationship.") for name in tensors)
    if is_used or not any(name.startswith(prefix) for name in tensors):
        return dict(tensors), []
    note = "left out the pooler, because there is no sentence pair classifier (cls.seq_relationship)"
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}, [note]


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in _BUFFERS


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: one, or those that an index names."""
    if (folder / RunLayout.WEIGHTS).is_file():
        return [folder / RunLayout.WEIGHTS]
    if (folder / INDEX).is_file():
        index: Any = files.read_json(folder / INDEX)
        weight_map: Any = cast("Mapping[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
        entries = cast("Mapping[str, Any]", weight_map) if isinstance(weight_map, dict) else {}
        if not entries or not all(isinstance(name, str) and name for name in entries.values()):
            raise DamagedError(
                "invalid index of weights: expected file names in weight_map",
                location=str(folder / INDEX),
                hint="download it again",
            )
        names = sorted({str(name) for name in entries.values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise DamagedError(
                    f"a file named in {INDEX} is missing",
                    location=str(folder / name),
                    hint="download it into the same folder",
                )
        return [folder / name for name in names]
    others = sorted(file.name for pattern in _OTHER_FORMATS for file in folder.glob(pattern))
    if others:
        raise ModelError(
            f"the weights are not in safetensors ({', '.join(others[:_NAMES_SHOWN])}); pickles can run code and are "
            "never read",
            location=str(folder),
            hint="if you trust the author, run AutoModelForMaskedLM.from_pretrained(FOLDER).save_pretrained(OTHER) in "
            "transformers, copy the tokenizer's files to OTHER, and import OTHER",
        )
    raise ModelError(
        f"no weights found: neither {RunLayout.WEIGHTS} nor {INDEX}",
        location=str(folder),
        hint="give a folder that `save_pretrained` of transformers wrote",
    )


def rename_tensors(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[Tensors, list[str]]:
    """Return the tensors under the names of a model with heads, and notes; buffers and task heads are left out."""
    prefix = encoder_prefix(settings)
    if isinstance(settings, BertConfig) and any(name.startswith(electra.PREFIX) for name in tensors):
        tensors = {
            prefix + name.removeprefix(electra.PREFIX) if name.startswith(electra.PREFIX) else name: tensor
            for name, tensor in tensors.items()
        }
    is_encoder_only = not any(name.startswith(prefix) for name in tensors)
    renamed: Tensors = {}
    left_out: list[str] = []
    has_older_names = has_image_weights = False
    for name, tensor in tensors.items():
        current = name
        for older, suffix in _OLDER_SUFFIXES:
            if current.endswith(older):
                current, has_older_names = current.removesuffix(older) + suffix, True
        if is_encoder_only and current.startswith(_ENCODER_ONLY):
            current = prefix + current
        if is_ignored(current, settings):
            has_image_weights |= bool(tensor.any())  # unmask writes zeros
        elif _is_of_task_head(current, settings):
            left_out.append(name)
        else:
            renamed[current] = tensor
    notes = ["renamed tensors from gamma and beta to weight and bias"] if has_older_names else []
    if has_image_weights:
        notes.append("left out the patch embedding, which only images use")
    if left_out:
        notes.append(f"{LEFT_OUT}: {join_names(left_out, _NAMES_SHOWN)}")
    return renamed, notes


def _is_of_task_head(name: str, settings: Settings) -> bool:
    """Return whether a tensor belongs to a head for another task; RoBERTa's pooler counts as one."""
    if name.startswith(_TASK_HEADS):
        return True
    return isinstance(settings, BertConfig) and settings.model_type != "bert" and name.startswith("roberta.pooler.")


def untie_if_different(tensors: Mapping[str, Tensor], settings: Settings) -> tuple[Settings, list[str]]:
    """Return settings with an untied decoder if the file's decoder differs from its embedding, as transformers does."""
    different = [
        name
        for name, other in tied_hf_tensors(settings).items()
        if name.endswith(".weight") and {name, other} <= set(tensors) and not torch.equal(tensors[name], tensors[other])
    ]
    if not different:
        return settings, []
    if isinstance(settings, NeoMMEConfig):
        raise ModelError(
            f"{different[0]} differs from the embedding: NeoMME is supported with tied embeddings only",
            location="model.safetensors",
            hint="use a NeoMME model without it, or a model of `unmask pretrain`",
        )
    note = f"kept the decoder untied: {different[0]} differs from the embedding, although config.json ties them"
    return replace(settings, tie_word_embeddings=False), [note]


def add_missing_heads(
    tensors: Mapping[str, Tensor], settings: Settings, initial: Mapping[str, Tensor]
) -> tuple[Tensors, list[str]]:
    """Return the tensors with the missing heads taken from `initial`, which has every tensor, and notes.

    Raises:
        ModelError: a tensor of the encoder is missing, a tensor is unknown, or has another shape; the error names it.
    """
    complete, tied, notes = dict(tensors), tied_hf_tensors(settings), list[str]()
    own_names = hf_tensor_names(settings, pair=has_pair_head(tensors, settings))
    biases = [name for name, own in own_names.items() if own == ("head.bias",)]
    biases += [name for name, other in tied.items() if other in biases]
    if present := [name for name in reversed(biases) if name in complete]:  # transformers 5 reads the decoder's bias
        if any(not torch.equal(complete[name], complete[present[0]]) for name in present):
            notes.append(f"used {present[0]} of two different decoder biases, as transformers does")
        complete |= dict.fromkeys(biases, complete[present[0]])
    for name, other in tied.items():  # the embedding may be stored only under the name of the decoder
        if other not in complete and name in complete:
            complete[other] = complete[name]
    missing = [name for name in own_names if name not in complete]
    _check_none(
        "missing tensors of the encoder:",
        [name for name in missing if own_names[name][0].startswith("encoder.")],
        "download the folder again, or check config.json",
    )
    _check_none(
        "unknown tensors for this architecture:",
        sorted(set(complete) - set(own_names) - set(tied)),
        "give a BERT, RoBERTa, ELECTRA, ModernBERT or NeoMME folder written by transformers",
    )
    for name in own_names:
        if name in complete and complete[name].shape != initial[name].shape:
            shape, expected = (" × ".join(map(str, t.shape)) for t in (complete[name], initial[name]))
            raise ModelError(
                f"invalid shape of `{name}`: got {shape}, expected {expected} by config.json",
                location=name,
                hint="use the config.json of these weights",
            )
    complete |= {name: initial[name] for name in missing}
    for head, prefix in {"masked-language-modeling head": "head.", "pair head": "pair."}.items():
        names = [name for name, own in own_names.items() if own[0].startswith(prefix)]
        initialized = [name for name in names if name in missing]
        if initialized:
            part = "" if len(initialized) == len(names) else "part of "
            notes.append(f"initialized {part}the {head}: {join_names(initialized, _NAMES_SHOWN)}")
    return complete, notes


def _check_none(message: str, names: Sequence[str], hint: str) -> None:
    if names:
        raise ModelError(f"{message} {join_names(names, _NAMES_SHOWN)}", hint=hint)
