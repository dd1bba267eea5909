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
    from unmask.hub.from_hf import import_model
    from unmask.hub.to_hf import export
    from unmask.models.fill_mask import fill
    from unmask.models.model import Model, load
    from unmask.tokenization.tokenizer import Tokenizer
    from unmask.training.pretrain import pretrain
    from unmask.training.recipe import Recipe

__all__ = [
    "Model",
    "Recipe",
    "Tokenizer",
    "UnmaskError",
    "__version__",
    "audit",
    "export",
    "fill",
    "import_model",
    "load",
    "pretrain",
]

_MODULES = {
    "Model": "unmask.models.model",
    "Recipe": "unmask.training.recipe",
    "Tokenizer": "unmask.tokenization.tokenizer",
    "audit": "unmask.checks.audit",
    "export": "unmask.hub.to_hf",
    "fill": "unmask.models.fill_mask",
    "import_model": "unmask.hub.from_hf",
    "load": "unmask.models.model",
    "pretrain": "unmask.training.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
