"""Room card: where what can be made again is kept.

Comes in: the environment. Goes out: the folder of the cache. Called by: corpus, opening.
"""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$UNMASK_CACHE, else $XDG_CACHE_HOME/unmask, else ~/.cache/unmask."""
    if own := os.environ.get("UNMASK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
