"""Pretrains BERT and ModernBERT encoders from raw text.

    import unmask

    unmask.pretrain("notes.txt", recipe="tiny", budget="10 min", out="runs/notes")
    model = unmask.load("runs/notes")
    unmask.fill(model, "The cat sat on the [MASK].")

The public names are imported when they are first used, so that `import unmask` doesn't import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from unmask.core.errors import UnmaskError
from unmask.core.version import __version__

if TYPE_CHECKING:
    from unmask.checks.audit import audit
    from unmask.evaluation.details import evaluate_details
    from unmask.evaluation.minimal_pairs import evaluate_minimal_pairs
    from unmask.evaluation.scoring import score
    from unmask.evaluation.validation import evaluate_text as evaluate
    from unmask.hub.from_hf import import_model, load
    from unmask.hub.to_hf import export
    from unmask.models.embed import embed
    from unmask.models.fill_mask import fill
    from unmask.models.generate import generate
    from unmask.models.joint_fill import fill_jointly
    from unmask.models.model import Model
    from unmask.report.write import write_report
    from unmask.tokenization.tokenizer import Tokenizer
    from unmask.training.api import Run, pretrain, resume
    from unmask.training.finetuning.api import finetune
    from unmask.training.recipe import Recipe

__all__ = [
    "Model",
    "Recipe",
    "Run",
    "Tokenizer",
    "UnmaskError",
    "__version__",
    "audit",
    "embed",
    "evaluate",
    "evaluate_details",
    "evaluate_minimal_pairs",
    "export",
    "fill",
    "fill_jointly",
    "finetune",
    "generate",
    "import_model",
    "load",
    "pretrain",
    "resume",
    "score",
    "write_report",
]

_OBJECTS = {
    "Model": "unmask.models.model.Model",
    "Recipe": "unmask.training.recipe.Recipe",
    "Run": "unmask.training.api.Run",
    "Tokenizer": "unmask.tokenization.tokenizer.Tokenizer",
    "audit": "unmask.checks.audit.audit",
    "embed": "unmask.models.embed.embed",
    "evaluate": "unmask.evaluation.validation.evaluate_text",
    "evaluate_details": "unmask.evaluation.details.evaluate_details",
    "evaluate_minimal_pairs": "unmask.evaluation.minimal_pairs.evaluate_minimal_pairs",
    "export": "unmask.hub.to_hf.export",
    "fill": "unmask.models.fill_mask.fill",
    "fill_jointly": "unmask.models.joint_fill.fill_jointly",
    "finetune": "unmask.training.finetuning.api.finetune",
    "generate": "unmask.models.generate.generate",
    "import_model": "unmask.hub.from_hf.import_model",
    "load": "unmask.hub.from_hf.load",
    "pretrain": "unmask.report.write.pretrain",  # those of unmask.training.api, followed by a report
    "resume": "unmask.report.write.resume",
    "score": "unmask.evaluation.scoring.score",
    "write_report": "unmask.report.write.write_report",
}


def __getattr__(name: str) -> Any:
    if name not in _OBJECTS:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    module, _, attribute = _OBJECTS[name].rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if not isinstance(value, type):
        value = importlib.import_module("unmask.core.keywords").public(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
