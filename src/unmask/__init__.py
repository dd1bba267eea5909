"""Room card: the front door of `unmask`: raw text in, a pretrained masked-language-model encoder out.

Comes in: a name. Goes out: what it stands for, imported when it is first asked for, so that `import unmask` costs no
torch. Called by: people, notebooks, `python -m unmask`.

    import unmask

    unmask.pretrain("notes.txt", recipe="tiny", budget="10 min", out="runs/notes")
    model = unmask.load("runs/notes")
    unmask.fill(model, "The cat sat on the [MASK].")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unmask.errors import UnmaskError

if TYPE_CHECKING:
    from unmask.audit.judge import audit
    from unmask.blueprint import Recipe
    from unmask.bundle import Model, load
    from unmask.hf.exporting import export
    from unmask.hf.importing import import_model
    from unmask.pretrain import pretrain
    from unmask.text.tokenizer import Tokenizer
    from unmask.use.fill import fill

__version__ = "0.1.0"
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

_ROOMS = {
    "Model": "unmask.bundle",
    "Recipe": "unmask.blueprint",
    "Tokenizer": "unmask.text.tokenizer",
    "audit": "unmask.audit.judge",
    "export": "unmask.hf.exporting",
    "fill": "unmask.use.fill",
    "import_model": "unmask.hf.importing",
    "load": "unmask.bundle",
    "pretrain": "unmask.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Door(ModuleType):
    """A package whose function `pretrain` is not hidden by its module `pretrain`.

    Importing a submodule binds it as an attribute of the package, which would make `unmask.pretrain(...)` work or fail
    by what was imported before. `from unmask.pretrain import ...` doesn't look at the attribute and works as ever.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _ROOMS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
