"""Small finished runs: with sentences, and with another tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.training.pretrain import launch

SMALL = [
    "model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=32",
    "stage.0.batch_size=500 tokens", "stage.1.batch_size=500 tokens", "train.threads=1", "train.precision=float32",
    "train.every.log=1 steps",
    "train.every.validate=2 steps",
]  # fmt: skip
HOSTILE = "</script><script>alert(1)</script> & <b>the cat</b> sat on the mat"


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Settings of a run that takes less than a second."""
    return SMALL


@pytest.fixture(scope="session")
def hostile() -> str:
    """The sentence of the first run."""
    return HOSTILE


@pytest.fixture(scope="session")
def runs(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of one tokenizer, the first with hostile sentences, and one of another; read-only."""
    folder = tmp_path_factory.mktemp("runs")
    first = [*SMALL, f"preview.prompts=['{HOSTILE}']", "train.budget=6 steps", "data.tokenizer.vocab_size=120"]
    launch([prose], recipe="tiny", out=folder / "first", settings=first)
    launch([prose], recipe="tiny", out=folder / "second", settings=[*first, "optimizer.lr=1e-4", "seed=3"])
    letters = [*SMALL, "train.budget=4 steps", "data.tokenizer={kind='characters'}"]
    launch([prose], recipe="tiny", out=folder / "letters", settings=letters)
    return folder
