"""`torchrun … -m unmask …` with ranks that are forked from the launcher: PyTorch is loaded once instead of three times.

    python torchrun.py --nproc-per-node 2 -m unmask pretrain …

Options, rendezvous, environment and exit code are those of torchrun. What differs is how a rank starts.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

from unmask.cli import main


def forked(config: Any, entrypoint: str) -> Callable[..., Any]:
    """Return what starts the ranks, as `elastic_launch` does."""

    def start(*command: str) -> Any:
        place = command.index("-m")
        assert command[place + 1] == "unmask", command
        sys.argv = ["unmask", *command[place + 2 :]]
        config.start_method = "fork"
        return elastic_launch(config, main)()

    return start


if __name__ == "__main__":
    for name in ("unmask.training.pretrain", "unmask.report.write"):  # what a run loads, before the ranks are forked
        importlib.import_module(name)
    with patch.object(run, "elastic_launch", forked):
        run.main()
