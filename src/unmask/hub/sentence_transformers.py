"""Writes the module files of sentence-transformers beside an exported encoder, and compares its vectors.

The modules are Transformer, Pooling (mean over all tokens) and Normalize: those of `models/embed.py`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from unmask.core import files
from unmask.core.errors import ModelError
from unmask.hub.parity import quiet_transformers
from unmask.models.embed import embed
from unmask.models.model import Model

PACKAGE: Final = "sentence_transformers"
VECTOR_TOLERANCE: Final = 1e-5  # of a number in a vector of length 1

_POOLING: Final = "1_Pooling"
_NORMALIZE: Final = "2_Normalize"
# These names are read by all versions up to 6; later versions map them to the modules' new places.
_MODULES: Final = (("", "Transformer"), (_POOLING, "Pooling"), (_NORMALIZE, "Normalize"))


@dataclass(frozen=True)
class VectorParity:
    """Result of the comparison with sentence-transformers."""

    texts: int
    difference: float  # largest difference of a number in the vectors, which have length 1
    sentence_transformers: str  # version


def require_sentence_transformers() -> None:
    """Check that sentence-transformers is installed.

    Raises:
        ModelError: it isn't; the hint is the line that installs it.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError(
            "this export is compared with sentence-transformers, which is not installed",
            hint='pip install "sentence-transformers>=5"; or skip the comparison: --unverified (unverified=True)',
        )


def write_modules(folder: Path, model: Model) -> None:
    """Write modules.json and the settings of the modules beside an encoder in the format of transformers."""
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(_MODULES)
    ]
    files.write_json(folder / "modules.json", entries)
    files.write_json(folder / "sentence_bert_config.json", {"max_seq_length": model.context, "do_lower_case": False})
    files.write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    pooling = {"word_embedding_dimension": model.settings.hidden_size, "pooling_mode_mean_tokens": True}
    others = ("cls_token", "max_tokens", "mean_sqrt_len_tokens")
    files.write_json(
        folder / _POOLING / "config.json", {**pooling, **{f"pooling_mode_{name}": False for name in others}}
    )
    files.write_json(folder / _NORMALIZE / "config.json", {})


def compare_vectors(folder: Path, model: Model, texts: Sequence[str]) -> VectorParity:
    """Open a folder with sentence-transformers and compare its vectors with those of `embed`.

    Texts longer than the context are cut before, because sentence-transformers cuts them and `embed` doesn't.

    Raises:
        ModelError: the vectors differ.
    """
    import sentence_transformers

    longest = model.context - model.tokenizer.num_special_tokens()
    encoded = model.tokenizer.encode_prompts(texts)
    parts = [
        text if len(ids) <= longest else model.tokenizer.decode(ids[: longest // 2])
        for text, ids in zip(texts, encoded, strict=True)
    ]
    with quiet_transformers():
        peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        found: Any = peer.encode(parts, show_progress_bar=False, convert_to_numpy=True)
    difference = float(np.abs(np.asarray(found) - embed(model, parts)).max())
    if not difference <= VECTOR_TOLERANCE:
        raise ModelError(
            f"vectors differ from those of sentence-transformers by {difference:.2g}, more than {VECTOR_TOLERANCE:g}",
            hint="report this message; --unverified writes the folder without the comparison",
        )
    return VectorParity(len(parts), difference, str(sentence_transformers.__version__))


def vector_facts(parity: VectorParity | None) -> Mapping[str, str]:
    """Return the rows of the model card on the vectors."""
    if parity is None:
        return {"vectors": "not compared with `sentence-transformers`"}
    return {
        "largest difference of vectors": f"{parity.difference:.1e} (limit {VECTOR_TOLERANCE:g}), "
        f"`sentence-transformers` {parity.sentence_transformers}, {parity.texts} texts"
    }


USAGE: Final = (
    "```python\n"
    "from sentence_transformers import SentenceTransformer\n\n"
    'model = SentenceTransformer("FOLDER")\n'
    f"vectors = model.encode({json.dumps(['a text', 'another'])})\n"
    "similarities = model.similarity(vectors, vectors)\n"
    "```\n\n"
    "The vectors are means over the tokens, of length 1. The model was pretrained on masked tokens and **has not been "
    "trained for sentence similarity**: train it with sentence-transformers on pairs of texts before you rely on them."
)
