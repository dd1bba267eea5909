"""Room card: where a model may be written.

Comes in: the place that a person named, and what the model is read from. Goes out: that place, if nothing is lost by
writing there. Called by: exporting, importing.
"""

from __future__ import annotations

import os
from pathlib import Path

from unmask import store
from unmask.bundle import CONFIG
from unmask.errors import RunError


def free_place(out: Path, source: Path, *, force: bool) -> Path:
    """The place to write, which is free, or holds a model that `force` lets go.

    Raises:
        RunError: something stands there, or the source would be overwritten.
        StoreError: nothing can be written there.
    """
    target, read = out.absolute(), source.absolute()
    if target.resolve() == read.resolve() or target.resolve() in read.resolve().parents:
        raise RunError("what is read stands there itself", where=str(out), next="name another folder to write")
    if os.path.lexists(target):
        if not force:
            raise RunError(
                "something stands here already, and nothing was written",
                where=str(out),
                next="name another folder, or replace this one with --force (force=True)",
            )
        if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG).is_file()):
            raise RunError(
                "what stands here is no model folder, and is not replaced",
                where=str(out),
                next="name another folder, or remove this one yourself",
            )
    else:
        store.check_writable(target)
    return out
