"""Steps from an order: the same samples however they are dealt, with weights and without; a run on weighted texts."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from unmask.core.errors import Stopped, TextError
from unmask.data.loader import StageLoader, build_sampler
from unmask.data.prepare import CorpusGroup
from unmask.data.shards import Shards, open_shards
from unmask.tokenization.settings import CharacterConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.training.display import Display
from unmask.training.loop import TrainState
from unmask.training.pretrain import LaunchOptions, launch, resume

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["abcdefgh ij"], CharacterConfig())


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, write_shards: Any) -> Shards:
    """60 documents: 20 short ones of a's and b's, 40 longer ones of other letters."""
    texts = ["abba" * (1 + i % 3) for i in range(20)] + ["cdefgh" * (2 + i % 5) for i in range(40)]
    folder = tmp_path_factory.mktemp("loader") / "shards"
    passages = [
        (one.ids, one.marks, len(text), 0, True) for text, one in zip(texts, tokenizer.encode_batch(texts), strict=True)
    ]
    write_shards(folder, passages, tokenizer.size, tokenizer.fingerprint)
    return open_shards(folder)


def groups(small: float, large: float) -> list[CorpusGroup]:
    return [CorpusGroup("small", small, 0, 20), CorpusGroup("large", large, 20, 60)]


def loader(shards: Shards, tokenizer: Tokenizer, groups: Sequence[CorpusGroup] = ()) -> StageLoader:
    sampler = build_sampler(shards, tokenizer, LENGTH, 7, groups=groups)
    return StageLoader(shards, tokenizer, sampler, 64, [group.name for group in groups])


def samples(loader: StageLoader, cursor: int, tokens: int, ranks: int) -> Counter[tuple[int, int]]:
    batches = [batch for rank in range(ranks) for batch in loader.step(cursor, tokens, rank, ranks)[0]]
    return Counter((int(epoch), int(number)) for batch in batches for epoch, number in batch.sample_keys_B2)


def test_without_weights_names_change_nothing(shards: Shards, tokenizer: Tokenizer) -> None:
    plain, named = loader(shards, tokenizer), loader(shards, tokenizer, groups(0.0, 0.0))
    assert plain.epoch_tokens == named.epoch_tokens == shards.tokens + 2 * plain.samples
    for cursor in (0, 5, plain.first_cursor(1)):
        assert samples(plain, cursor, 200, 1) == samples(named, cursor, 200, 1)
    assert (
        named.epochs_by_text(2 * named.epoch_tokens) == {"small": 2.0, "large": 2.0} and plain.epochs_by_text(100) == {}
    )


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.7, 0.3), (1.0, 20.0)])
def test_ranks_share_one_step(shards: Shards, tokenizer: Tokenizer, weights: tuple[float, float]) -> None:
    """Two ranks read what one reads, no sample twice, and the stages share none."""
    stage_loader = loader(shards, tokenizer, groups(*weights))
    before: set[tuple[int, int]] = set()
    for stage in (0, 1):
        cursor = stage_loader.first_cursor(stage)
        seen: Counter[tuple[int, int]] = Counter()
        for _ in range(6):
            one = samples(stage_loader, cursor, 150, 1)
            assert (
                one
                == samples(stage_loader, cursor, 150, 2)
                == samples(loader(shards, tokenizer, groups(*weights)), cursor, 150, 3)
            )
            seen += one
            cursor = stage_loader.step(cursor, 150, 0, 1)[1]
        assert max(seen.values()) == 1
        assert not set(seen) & before
        before |= set(seen)


def test_the_tokens_of_a_run_are_shared_by_weight(shards: Shards, tokenizer: Tokenizer) -> None:
    """Within 2 % over twenty steps; the forecast says how often each text was seen."""
    stage_loader = loader(shards, tokenizer, groups(0.6, 0.4))
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    tokens, cursor, windows = Counter[str](), 0, Counter[str]()
    for _ in range(20):
        batches, cursor = stage_loader.step(cursor, 300, 0, 1)
        for batch in batches:
            for first, last in zip(batch.offsets, batch.offsets[1:], strict=False):
                ids = set(batch.ids_T[first:last].tolist())
                name = "small" if ids & {a, b} else "large"
                tokens[name] += last - first
                windows[name] += 1
    assert tokens["small"] / tokens.total() == pytest.approx(0.6, abs=0.02)
    seen = stage_loader.epochs_by_text(tokens.total())
    own = {"small": 20, "large": stage_loader.samples - 20}
    for name, times in seen.items():
        assert times == pytest.approx(windows[name] / own[name], rel=0.05)
    assert stage_loader.epoch_tokens == pytest.approx(tokens.total() * stage_loader.samples / cursor, rel=0.03)


SMALL = [
    "data.document=line", "data.tokenizer={kind = 'characters'}", "data.held_out={method = 'tail', fraction = '20%'}",
    "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=16",
    "stage=[{until = '50%', max_seq_len = 16, batch_size = '20 texts'},"
    "{until = '100%', max_seq_len = 32, batch_size = '20 texts'}]",
    "train.every.log=1 steps", "train.budget=12 steps", "train.every.save=6 steps", "train.threads=1",
]  # fmt: skip


class StopsAt(Display):
    """Sends this process a signal after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: TrainState) -> None:
        if state.step == self._step:
            signal.raise_signal(signal.SIGINT)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_on_weighted_texts(tmp_path: Path) -> None:
    """Its forecast says how often each is seen, and it is resumed bit for bit."""
    little, much = tmp_path / "little.txt", tmp_path / "much.txt"
    little.write_text("\n".join(f"a little text, line {i}" for i in range(20)))
    much.write_text("\n".join(f"much more text of which this is line {i}" for i in range(400)))
    texts = [Path(f"{little}:3"), Path(f"{much}:1")]
    forecast = launch(texts, out=tmp_path / "none", settings=SMALL, options=LaunchOptions(dry_run=True)).forecast
    assert forecast is not None
    seen = {Path(name).name: times for name, times in forecast.texts_seen.items()}
    assert seen["little.txt"] > 5 and seen["much.txt"] < 1
    launch(texts, out=tmp_path / "whole", settings=SMALL)
    with pytest.raises(Stopped):
        launch(texts, out=tmp_path / "short", settings=SMALL, display=StopsAt(8))
    resume(tmp_path / "short")
    assert losses(tmp_path / "short") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12


def test_a_weighted_text_that_is_all_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "much.txt").write_text("\n".join(f"much more text, this is line {i}" for i in range(99)))
    with pytest.raises(TextError, match="nothing to train on"):
        launch(
            [Path(f"{tmp_path / 'one.txt'}:0.5"), Path(f"{tmp_path / 'much.txt'}:0.5")],
            out=tmp_path / "run",
            settings=SMALL,
        )
