"""Sums, not means: however a step is dealt, it is the same step."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.types import WORD_START, Batch, Sample, pack
from unmask.data.loader import assign_microbatches
from unmask.models import build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective
from unmask.training.loop import TrainLoopInputs, TrainModule, TrainState, train
from unmask.training.optim import OptimizerConfig, build_optimizer
from unmask.training.plan import Plan, StagePlan

VOCABULARY, TOKENS = 60, 1600


class Numbers:
    """A feed of made-up texts of very different lengths, dealt by the real dealer."""

    def __init__(self, micro_tokens: int, texts: int, pairs: bool) -> None:
        self._micro_tokens = micro_tokens
        self._texts = texts
        self._pairs = pairs
        self.used: list[tuple[int, int]] = []

    def first_cursor(self, stage: int) -> int:
        return 0

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        rng = np.random.default_rng(cursor)
        sizes = rng.integers(3, 90, self._texts).tolist()
        texts = [
            Sample(rng.integers(5, VOCABULARY, n), np.full(n, WORD_START, np.uint8), cursor, i)
            for i, n in enumerate(sizes)
        ]
        if self._pairs:
            halves = [(np.arange(n) >= n // 2).astype(np.int64) for n in sizes]
            texts = [
                replace(text, token_type_ids=half, pair_label=i % 2)
                for i, (text, half) in enumerate(zip(texts, halves, strict=True))
            ]
        dealt = assign_microbatches(sizes, ranks, self._micro_tokens)[rank]
        self.used += [(cursor, index) for micro in dealt for index in micro]
        return [pack([texts[index] for index in micro]) for micro in dealt if micro], cursor + 1


def after_three_steps(
    micro_tokens: int, world: DistributedContext, texts: int = 34, *, pairs: bool = False
) -> tuple[dict[str, torch.Tensor], TrainState, Numbers]:
    torch.manual_seed(3)
    shape = (BertConfig if pairs else ModernBertConfig)(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48
    )
    encoder, head = build_model(shape, VOCABULARY)
    objective = MaskedLMObjective(MaskedLMConfig(mask_rate=0.2), 4, np.arange(5, VOCABULARY))
    if pairs:
        objective = BertPretrainingObjective(BertPretrainingConfig(), objective, build_pair(shape))
    learner = TrainModule(encoder, head, objective)
    # AdamW's division by the root of tiny second moments would turn rounding into steps of full size; SGD-like momentum
    # on every parameter shows the gradients themselves.
    optimizer = build_optimizer(learner, OptimizerConfig(kind="adam", lr=1e-3, eps=1e-2), bf16=False)
    feed = Numbers(micro_tokens, texts, pairs)
    plan = Plan((StagePlan(90, TOKENS, 0, 3, 0.0),))
    state = TrainState()
    train(
        TrainLoopInputs(learner, objective, [feed], optimizer, lambda p, s: 1.0, plan, world, seed=5),
        state,
        [],
        lambda: 0,
    )
    return dict(learner.state_dict()), state, feed


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, torch.Tensor], TrainState, Numbers]:
    return after_three_steps(10**6, init_distributed("float32", 1))


@pytest.mark.parametrize("micro_tokens", [800, 400, 200])
def test_accumulation_is_one_step(whole, micro_tokens: int) -> None:
    tensors, state, feed = after_three_steps(micro_tokens, init_distributed("float32", 1))
    assert sorted(feed.used) == sorted(whole[2].used), "the same samples in each step"
    assert state.window.sums["loss"] == pytest.approx(whole[1].window.sums["loss"], rel=1e-5)
    assert state.window.counts == whole[1].window.counts
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, whole[0][name], rtol=0, atol=2e-6)


def on_two_ranks(folder: Path, what: str) -> list[dict[str, torch.Tensor]]:
    """The weights of two real processes over gloo, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", __file__, str(folder), what]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def test_two_ranks_are_one_step(whole, tmp_path: Path) -> None:
    ranks = on_two_ranks(tmp_path, "masks")
    for name, tensor in whole[0].items():
        assert torch.equal(ranks[0][name], ranks[1][name]), "both ranks hold the same weights"
        torch.testing.assert_close(ranks[0][name], tensor, rtol=0, atol=2e-6)
    alone, _, _ = after_three_steps(10**6, init_distributed("float32", 1), texts=1)
    for name, tensor in alone.items():  # steps of one text: a rank has nothing to do, and waits with the other
        torch.testing.assert_close(load_file(tmp_path / "1-alone.safetensors")[name], tensor, rtol=0, atol=2e-6)
    samples = [np.loadtxt(tmp_path / f"{rank}.txt", dtype=int).tolist() for rank in (0, 1)]
    assert sorted(map(tuple, samples[0] + samples[1])) == sorted(whole[2].used)


def test_pairs_are_one_step_too(tmp_path: Path) -> None:
    """Two terms, each with a count of its own: in micro-batches, and dealt to two ranks."""
    whole, state, _ = after_three_steps(10**6, init_distributed("float32", 1), pairs=True)
    assert {"parts.pooler.weight", "parts.classifier.weight"} <= whole.keys()
    split, other, _ = after_three_steps(200, init_distributed("float32", 1), pairs=True)
    assert state.window.counts == other.window.counts
    for name, sum_ in state.window.sums.items():
        assert other.window.sums[name] == pytest.approx(sum_, rel=1e-5), name
    ranks = on_two_ranks(tmp_path, "pairs")
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=2e-6)
        assert torch.equal(ranks[0][name], ranks[1][name]), "both ranks hold the same weights"
        torch.testing.assert_close(ranks[0][name], tensor, rtol=0, atol=2e-6)


if __name__ == "__main__":
    here = init_distributed("float32", 1)
    folder, asked = Path(sys.argv[1]), sys.argv[2]
    final, _, numbers = after_three_steps(800, here, pairs=asked == "pairs")
    save_file({name: tensor.contiguous() for name, tensor in final.items()}, folder / f"{here.rank}.safetensors")
    np.savetxt(folder / f"{here.rank}.txt", numbers.used, fmt="%d")
    if asked == "masks":
        final, _, _ = after_three_steps(800, here, texts=1)
        save_file(
            {name: tensor.contiguous() for name, tensor in final.items()}, folder / f"{here.rank}-alone.safetensors"
        )
