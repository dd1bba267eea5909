"""A step is the same however its samples are assigned to micro-batches and ranks, and with or without prefetching."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.core.distributed import DistributedContext, init_distributed
from unmask.core.errors import RecipeError, TextError
from unmask.core.types import WORD_START, Batch, Sample, pack
from unmask.data.loader import assign_microbatches
from unmask.models import build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.models.electra import build_electra
from unmask.models.modernbert import ModernBertConfig
from unmask.models.parallel import Parallel, gather, share
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.objectives.rtd import ReplacedTokenConfig, ReplacedTokenObjective
from unmask.objectives.sentence_pairs import BertPretrainingConfig, BertPretrainingObjective
from unmask.training.loop import (
    PREFETCH_THREAD,
    Callback,
    LogCallback,
    MetricAccumulator,
    StopReason,
    TrainLoopInputs,
    TrainModule,
    TrainState,
    train,
)
from unmask.training.optim import Optimizer, OptimizerConfig
from unmask.training.plan import Plan, StagePlan, always

VOCABULARY, TOKENS = 60, 1600


class RandomLoader:
    """A loader of random samples of very different lengths, which are assigned to micro-batches as in a real run."""

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
    micro_tokens: int,
    context: DistributedContext,
    *,
    kind: str = "masks",
    prefetch: bool = True,
    compiled: bool = False,
    parallel: Parallel = "ddp",
) -> tuple[dict[str, torch.Tensor], TrainState, RandomLoader]:
    torch.manual_seed(3)
    texts = 1 if kind == "single" else 34
    shape = (ModernBertConfig if kind in ("masks", "single", "muon") else BertConfig)(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48
    )
    encoder, head = build_model(shape, VOCABULARY)
    if compiled:
        encoder.compile_blocks()
    objective = masks = MaskedLMObjective(MaskedLMConfig(mask_rate=0.2), 4, np.arange(5, VOCABULARY))
    if kind in ("pairs", "stages"):
        objective = BertPretrainingObjective(BertPretrainingConfig(), objective, build_pair(shape))
    elif kind == "rtd":
        modules = build_electra(shape, VOCABULARY, 0.5, 1.0)
        settings, regular_ids = ReplacedTokenConfig(mask_rate=0.2), np.arange(5, VOCABULARY)
        masked_lm = MaskedLMObjective(settings, 4, regular_ids)
        objective = ReplacedTokenObjective(settings, masked_lm, modules, regular_ids, VOCABULARY)
    module = TrainModule(encoder, head, objective.modules)
    parallelism = share(parallel, context, module, [objective, masks])
    # AdamW divides by the root of the second moments: where they are tiny, rounding would become a full step. With a
    # large eps the differences of the weights are those of the gradients.
    algorithm: Any = "muon" if kind == "muon" else "adam"
    optimizer = Optimizer(module, OptimizerConfig(kind=algorithm, lr=1e-3, eps=1e-2), bf16=False)
    loader = RandomLoader(micro_tokens, texts, pairs=kind in ("pairs", "stages"))
    plan, objectives = Plan((StagePlan(90, TOKENS, 0, 3, 0.0),)), [objective]
    if kind == "stages":  # the second of three steps trains the pair head
        plan = Plan(tuple(StagePlan(90, TOKENS, step, 1, 0.0) for step in range(3)))
        objectives = [masks, objective, masks]
    state = TrainState()
    loaders = [loader] * len(objectives)
    inputs = TrainLoopInputs(
        module, objectives, loaders, optimizer, lambda p, s: 1.0, context, seed=5, parallelism=parallelism
    )
    train(inputs, plan, state, prefetch=prefetch)
    return {name: gather(tensor) for name, tensor in module.state_dict().items()}, state, loader


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, torch.Tensor], TrainState, RandomLoader]:
    return after_three_steps(10**6, init_distributed("float32", 1))


@pytest.mark.parametrize("micro_tokens", [800, 400, 200])
def test_accumulation_is_one_step(whole, micro_tokens: int) -> None:
    tensors, state, loader = after_three_steps(micro_tokens, init_distributed("float32", 1))
    assert sorted(loader.used) == sorted(whole[2].used), "the same samples in each step"
    assert state.metrics.sums["loss"] == pytest.approx(whole[1].metrics.sums["loss"], rel=1e-5)
    assert state.metrics.counts == whole[1].metrics.counts
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, whole[0][name], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile itself warns of deprecated functions of torch
def test_compiled_blocks_compute_the_same_steps(whole) -> None:
    try:
        tensors, state, _ = after_three_steps(400, init_distributed("float32", 1), compiled=True)
    except RecipeError as error:
        pytest.skip(str(error))
    assert state.metrics.sums["loss"] == pytest.approx(whole[1].metrics.sums["loss"], rel=1e-5)
    assert tensors.keys() == whole[0].keys(), "compiled modules keep the names of their weights"
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, whole[0][name], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_compilation_without_a_compiler_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    command = [sys.executable, "-m", "unmask", "pretrain", str(text), "--out", str(tmp_path / "run"), "--budget",
               "2 steps", "--set", "train.compile=true"]  # fmt: skip
    environment = {
        **os.environ,
        "CXX": "/no/compiler",
        "PATH": "",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == RecipeError.exit_code, done.stderr
    assert "torch.compile doesn't work here" in done.stderr and "train.compile=false" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the weights of 2 and of 4 real processes over gloo, for each kind of objective and of sharing."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_equal_on(folder: Path, kind: str, expected: dict[str, torch.Tensor], ranks: int = 2) -> None:
    """Compare the weights of each rank, of replicas and of shards, with those of one process."""
    for parallel in ("ddp", "fsdp"):
        first, *others = (load_file(folder / f"{kind}-{parallel}-{ranks}-{rank}.safetensors") for rank in range(ranks))
        assert first.keys() == expected.keys(), "sharing a module keeps the names of its weights"
        for name, tensor in expected.items():
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=2e-6)
            assert all(torch.equal(first[name], other[name]) for other in others), f"all ranks have one {name}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_step(whole, on_ranks: Path, ranks: int) -> None:
    assert_equal_on(on_ranks, "masks", whole[0], ranks)
    samples = [np.loadtxt(on_ranks / f"masks-ddp-{ranks}-{rank}.txt", dtype=int).tolist() for rank in range(ranks)]
    assert sorted(tuple(sample) for of_rank in samples for sample in of_rank) == sorted(whole[2].used)


@pytest.mark.parametrize("ranks", [2, 4])
def test_matrices_of_shards_are_orthogonalized_as_a_whole(on_ranks: Path, ranks: int) -> None:
    """Muon on rows of 1 to 4 ranks; some biases have fewer rows than there are ranks."""
    expected, _, _ = after_three_steps(10**6, init_distributed("float32", 1), kind="muon")
    assert_equal_on(on_ranks, "muon", expected, ranks)


def test_a_rank_without_samples_takes_part(on_ranks: Path) -> None:
    """Steps of one sample."""
    expected, _, _ = after_three_steps(10**6, init_distributed("float32", 1), kind="single")
    assert_equal_on(on_ranks, "single", expected)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("pairs", {"parts.pooler.weight", "parts.classifier.weight"}),
        ("rtd", {"parts.generator.projection.weight", "parts.discriminator.classifier.weight"}),
        ("stages", {"parts.pooler.weight"}),
    ],
)
def test_two_loss_terms_are_one_step(kind: str, weights: set[str], on_ranks: Path) -> None:
    """Two loss terms, each with its own count, or only in one stage: in micro-batches and on two ranks."""
    whole, state, _ = after_three_steps(10**6, init_distributed("float32", 1), kind=kind)
    assert weights <= whole.keys()
    split, other, _ = after_three_steps(200, init_distributed("float32", 1), kind=kind)
    assert state.metrics.counts == other.metrics.counts
    for name, sum_ in state.metrics.sums.items():
        assert other.metrics.sums[name] == pytest.approx(sum_, rel=1e-5), name
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=2e-6)
    assert_equal_on(on_ranks, kind, whole)


# Prefetching ----------------------------------------------------------------------------------------------------------


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(PREFETCH_THREAD)]


def small_inputs(loader: Any = None) -> tuple[TrainLoopInputs, Plan]:
    """A small model with dropout, a falling mask rate and two stages of three steps."""
    torch.manual_seed(3)
    settings = ModernBertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16, mlp_dropout=0.1
    )
    objective = MaskedLMObjective(MaskedLMConfig(mask_rate=0.2, final_mask_rate=0.1), 4, np.arange(5, VOCABULARY))
    module = TrainModule(*build_model(settings, VOCABULARY), objective.modules)
    optimizer = Optimizer(module, OptimizerConfig(), bf16=False)
    loaders = [loader or RandomLoader(300, 8, pairs=False), RandomLoader(300, 12, pairs=False)]
    context = init_distributed("float32", 1)
    plan = Plan((StagePlan(90, 300, 0, 3, 0.0), StagePlan(90, 500, 3, 3, 0.0)))
    return TrainLoopInputs(module, [objective] * 2, loaders, optimizer, lambda p, s: 1.0, context, seed=5), plan


def small_run(
    callbacks: Sequence[Callback] = (), *, state: TrainState | None = None, loader: Any = None, **options: Any
) -> tuple[StopReason, TrainModule, TrainState]:
    inputs, plan = small_inputs(loader)
    state = state or TrainState()
    return train(inputs, plan, state, callbacks, **options), inputs.module, state


def test_prefetching_does_not_change_a_bit() -> None:
    """Weights and state are equal after every step, across a change of stage, and the main thread keeps its threads."""
    histories: list[list[tuple[int, int, int, dict[str, float]]]] = []
    weights: list[dict[str, torch.Tensor]] = []
    for prefetch in (False, True):
        history: list[tuple[int, int, int, dict[str, float]]] = []

        def record(state: TrainState, history: list[Any] = history) -> None:
            history.append((state.step, state.cursor, state.tokens, dict(state.metrics.sums)))

        reason, module, _ = small_run([Callback(always, record)], prefetch=prefetch)
        assert reason is StopReason.PLAN_DONE and torch.get_num_threads() == 1 and not prefetch_threads()
        histories.append(history)
        weights.append(dict(module.state_dict()))
    assert histories[0] == histories[1] and len(histories[0]) == 6
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_batches_are_prepared_in_one_thread_at_most_one_step_ahead() -> None:
    names: set[str] = set()
    prepared: list[int] = []

    class Recorder(RandomLoader):
        def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
            names.add(threading.current_thread().name)
            prepared.append(cursor)
            return super().step(cursor, tokens, rank, ranks)

    ahead: list[int] = []
    small_run([Callback(always, lambda state: ahead.append(len(prepared) - state.step))],
              loader=Recorder(300, 8, pairs=False))  # fmt: skip
    assert len(names) == 1 and names.pop().startswith(PREFETCH_THREAD)
    assert prepared == [0, 1, 2] and max(ahead[:3]) <= 1, "each step once"


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_the_state_is_that_of_the_finished_step(stop_at: int) -> None:
    """After a stop, with a step prepared that is thrown away, training continues as if there had been no stop."""
    whole = small_run()[1].state_dict()
    inputs, plan = small_inputs()
    state = TrainState()
    assert train(inputs, plan, state, has_enough=lambda state: state.step == stop_at) is StopReason.EARLY
    assert state.step == stop_at and not prefetch_threads()
    restored = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state
    assert train(inputs, plan, restored) is StopReason.PLAN_DONE
    assert all(torch.equal(tensor, whole[name]) for name, tensor in inputs.module.state_dict().items())


class BrokenLoader(RandomLoader):
    """Fails in its third step."""

    def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
        if cursor == 2:
            raise TextError("the third step can't be read")
        return super().step(cursor, tokens, rank, ranks)


def test_an_error_of_the_thread_is_raised_by_train() -> None:
    state = TrainState()
    with pytest.raises(TextError, match="third step"):
        small_run(loader=BrokenLoader(300, 8, pairs=False), state=state)
    assert state.step == 2, "the steps before are done"
    assert not prefetch_threads()


def test_the_thread_ends_with_a_stop_and_with_an_error_of_a_callback() -> None:
    assert small_run(stop_requested=lambda: StopReason.TERMINATED)[0] is StopReason.TERMINATED
    assert not prefetch_threads()

    def fail(state: TrainState) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        small_run([Callback(always, fail)])
    assert not prefetch_threads()


def test_the_time_of_a_callback_is_not_part_of_its_interval() -> None:
    """Else a validation that takes longer than its interval would run after each step."""
    intervals: list[float] = []

    def is_due(step: int, seconds: float) -> bool:
        intervals.append(seconds)
        return step == 2

    small_run([Callback(is_due, lambda state: time.sleep(1.0))])
    assert intervals[2] < 0.9 and intervals[2] <= intervals[3] < 0.9


def test_waiting_for_data_is_counted() -> None:
    class SlowLoader(RandomLoader):
        def step(self, cursor: int, tokens: int, rank: int, ranks: int) -> tuple[list[Batch], int]:
            time.sleep(0.05)
            return super().step(cursor, tokens, rank, ranks)

    logged: list[MetricAccumulator] = []
    log = LogCallback(lambda step, since: step == 3, lambda state, metrics: logged.append(metrics))
    _, _, state = small_run(loader=SlowLoader(300, 8, pairs=False), log=log)
    (metrics,) = logged
    assert 0.05 < metrics.data_wait_seconds <= metrics.seconds
    assert metrics.data_wait_seconds <= state.phase_seconds["data"] + 1e-3
    assert state.metrics.tokens == state.tokens - metrics.tokens, "the loop started new sums"


def run_rank(folder: Path, rank: int, ranks: int, port: int) -> None:
    """Train as one of several ranks and save the weights."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    context = init_distributed("float32", 1)
    for kind in ("masks", "muon", "single", "pairs", "rtd", "stages")[: 6 if ranks == 2 else 2]:
        for parallel in ("ddp", "fsdp"):
            final, _, loader = after_three_steps(800, context, kind=kind, parallel=parallel)
            name = f"{kind}-{parallel}-{ranks}-{rank}"
            save_file({key: tensor.contiguous() for key, tensor in final.items()}, folder / f"{name}.safetensors")
            np.savetxt(folder / f"{name}.txt", loader.used, fmt="%d")
    context.barrier()


if __name__ == "__main__":  # ranks are forked, so that PyTorch is loaded once
    for ranks in (2, 4):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        forked = multiprocessing.get_context("fork")
        processes = [forked.Process(target=run_rank, args=(Path(sys.argv[1]), n, ranks, port)) for n in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
