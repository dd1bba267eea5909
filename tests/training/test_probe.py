"""The probe: its limits, its steps, the memory that it forecasts, and what can't be trained."""

from __future__ import annotations

import io
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unmask
from unmask.core.distributed import init_distributed
from unmask.core.errors import RecipeError
from unmask.core.quantities import Quantity
from unmask.data.sources import open_source
from unmask.models import num_parameters
from unmask.training.callbacks import PreparedRun, run_training
from unmask.training.display import show_log
from unmask.training.display.plain import PlainDisplay
from unmask.training.estimate import estimate_cost
from unmask.training.estimate.memory import (
    MemoryLimit,
    available_bytes,
    check_memory,
    forecast_bytes,
    required_bytes,
)
from unmask.training.estimate.probe import measure, probe_limits
from unmask.training.loop import Signals, TrainState
from unmask.training.plan import Measured, MeasuredMemory, make_plan, tenth
from unmask.training.recipe import Recipe, load_recipe, read_recipe
from unmask.training.setup import RunComponents, build_components, prepare_corpus

SMALL = (
    "data.tokenizer.vocab_size=200", "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.intermediate_size=48", "stage.0.batch_size=256 tokens", "stage.1.batch_size=512 tokens",
    "stage.0.max_seq_len=32", "stage.1.max_seq_len=64", "train.threads=1", "data.held_out.fraction=10%",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    letters = "etaoinshrdlu"
    words = [letters[i % 12] + letters[i * 7 % 11] + letters[i // 12 % 12] * (i % 3) for i in range(400)]
    lines = [" ".join(words[(i * 31 + j * j) % 400] for j in range(50 + i % 97)) for i in range(300)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def build(text: Path, *settings: str) -> tuple[Recipe, RunComponents]:
    recipe = load_recipe("tiny", [*SMALL, *settings])
    context = init_distributed(recipe.train.precision, recipe.train.threads)
    source = open_source([text], recipe.data)
    corpus = prepare_corpus(recipe, source, lambda stage, fraction: None)
    return recipe, build_components(recipe, source, corpus, context, valid_sources={})


@pytest.mark.parametrize("seconds", [1, 40, 90, 600, 86_400])
def test_the_probe_takes_at_most_a_tenth_of_a_budget_in_seconds(seconds: int) -> None:
    limits = probe_limits(Quantity(seconds, "seconds"))
    assert limits.seconds <= 0.1 * seconds and limits.seconds <= 12
    assert probe_limits(Quantity(10, "steps")).steps == 3


@pytest.mark.parametrize("budget", ["8 s", "50 steps"])
def test_a_probe_measures_everything_and_changes_nothing(text: Path, tmp_path: Path, budget: str) -> None:
    recipe, components = build(
        text, f"train.budget={budget}", "train.ema_decay=0.99", "train.micro_batch_size=128 tokens"
    )
    before = {name: tensor.clone() for name, tensor in components.training.module.state_dict().items()}
    fractions: list[float] = []
    for hours in (1, 25):  # since other probes were killed, or began
        (tmp_path / f".unmask-probe-{hours}" / "best").mkdir(parents=True)
        changed = tmp_path.stat().st_mtime - 3600 * hours
        os.utime(tmp_path / f".unmask-probe-{hours}", (changed, changed))
    measured = measure(
        recipe, components, on_probe=lambda fraction, seconds: fractions.append(fraction), folder=tmp_path
    )
    assert len(measured.step_seconds) == 2 and min(measured.step_seconds) > 0
    assert measured.validate_seconds > 0 and measured.save_seconds > 0
    if measured.memory:  # None if a busy machine left no time for whole steps
        assert measured.memory.peak_bytes > 10**8 and min(measured.memory.steps) >= 1
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and max(fractions[:-1]) < 1.0
    assert [path.name for path in tmp_path.iterdir()] == [".unmask-probe-1"], "its own checkpoint is deleted"
    after = components.training.module.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_steps_that_exceed_the_probe_are_computed_from_smaller_ones(text: Path) -> None:
    recipe, components = build(text, "train.budget=1 s", "stage.1.batch_size=1M tokens")
    measured = measure(recipe, components)
    assert measured.memory is None, "not measured with smaller micro-batches"
    first, second = measured.step_seconds
    assert second > 1 and second / first > 10, "4,000 times as many tokens as in a step of the first stage"


def test_the_forecast_of_memory_is_near_the_peak(text: Path, tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from unmask.training.pretrain import launch
result = launch([sys.argv[1]], recipe="tiny", out=sys.argv[2], settings=sys.argv[3:])
status = Path("/proc/self/status").read_text() if Path("/proc/self/status").is_file() else ""
peak = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
print(result.forecast.memory_bytes, peak)
"""
    settings = [*SMALL, "train.budget=20 steps", "stage.0.batch_size=2k tokens", "stage.1.batch_size=4k tokens"]
    command = [sys.executable, "-c", script, str(text), str(tmp_path / "run"), *settings]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    forecast, peak = map(int, output.split())
    if peak:  # on Linux
        assert forecast == pytest.approx(peak, rel=0.15)


def test_a_model_that_does_not_fit_is_refused_with_the_largest_recipe_that_does(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"the recipe `tiny` needs about [\d.,]+ GB of memory, and .* are available"
    ) as caught:
        unmask.pretrain(
            str(text), recipe="tiny", out=tmp_path / "run", display=None,
            settings=[*SMALL, "model.hidden_size=32768", "model.num_hidden_layers=64", "model.num_attention_heads=64"],
        )  # fmt: skip
    found = re.search(r"the largest shipped recipe that fits is .*?([a-z]+-?[a-z]*)\W*$", caught.value.hint)
    assert found, caught.value.hint
    context = init_distributed("auto", 1)
    assert required_bytes(load_recipe(found[1]), 300, context) <= available_bytes(context)
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    context = init_distributed("auto", 1)
    settings = ["train.micro_batch_size=1B tokens", "stage.0.batch_size=1B tokens"]
    with pytest.raises(RecipeError, match="needs about") as caught:
        check_memory(load_recipe("tiny", settings), 8192, context)
    found = re.search(r"train.micro_batch_size=(\d+) tokens", caught.value.hint)
    assert found, caught.value.hint
    tokens, available = int(found[1]), available_bytes(context)
    fitting = load_recipe("tiny", [*settings[1:], f"train.micro_batch_size={tokens} tokens"])
    assert required_bytes(fitting, 8192, context) <= 1.1 * available
    assert required_bytes(fitting, 8192, context, 3 * tokens) > 0.9 * available, "twice as many don't fit"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc returns memory on request")
def test_beyond_the_forecast_freed_memory_is_returned() -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    context = init_distributed("float32", 1)
    blocks = [torch.ones(50_000) for _ in range(1000)]  # 200 MB
    kept = blocks[::10]
    del blocks
    before = resident()
    MemoryLimit(10 * before, context).check(TrainState())
    assert resident() > before - 10**7, "within the limit nothing is returned"
    MemoryLimit(before // 2, context).check(TrainState())
    assert resident() < before - 10**8, "most of 180 MB between the kept blocks"
    assert len(kept) == 100


def test_a_copy_for_checkpoints_that_does_not_fit_is_refused() -> None:
    context = init_distributed("float32", 1)
    settings = ["model.hidden_size=4096", "model.num_hidden_layers=1", "train.micro_batch_size=64 tokens"]
    recipe = load_recipe("tiny", [*settings, "stage=[{max_seq_len = 32, batch_size = '64 tokens'}]"])
    fixed, more = (required_bytes(recipe, size, context) for size in (8192, 16384))
    free = 0.8 * available_bytes(context) - fixed
    vocabulary = 8192 + round(8192 * free / (more - fixed))  # so large that half as much again doesn't fit
    with pytest.raises(RecipeError, match="from a copy in memory of about") as caught:
        check_memory(recipe, vocabulary, context)
    assert caught.value.hint.endswith("--set train.background_save=false")
    check_memory(replace(recipe, train=replace(recipe.train, background_save=False)), vocabulary, context)


def test_rank_0_joins_the_shards_of_a_checkpoint_in_memory() -> None:
    """With many ranks, the shards need little memory, and a validation gathers all weights once."""
    context = replace(init_distributed("float32", 1), ranks=1024)
    settings = ["model.hidden_size=4096", "model.num_hidden_layers=1", "train.micro_batch_size=64 tokens"]
    settings += ["stage=[{max_seq_len = 32, batch_size = '64 tokens'}]", "train.parallel=fsdp"]
    recipe = load_recipe("tiny", settings)
    at_once = load_recipe("tiny", [*settings, "train.background_save=false"])
    plan = make_plan(recipe.stage, Quantity(9, "steps"), recipe.train.every, [1000], Measured((0.0,)))
    memory = MeasuredMemory(10**9, (9,), False)
    parameters = num_parameters(recipe.model, 8192)
    peaks = [forecast_bytes(recipe, plan, 8192, replace(context, rank=rank), memory) for rank in (0, 1)]
    assert peaks[0] - peaks[1] == 4 * parameters
    one = forecast_bytes(at_once, plan, 8192, context, memory)
    assert peaks[1] - one == 12 * parameters // 1024
    fixed, more = (required_bytes(recipe, size, context) for size in (8192, 16384))
    vocabulary = 8192 + round(8192 * (0.85 * available_bytes(context) - fixed) / (more - fixed))
    with pytest.raises(RecipeError, match="from a copy in memory of about"):
        check_memory(recipe, vocabulary, context)
    check_memory(at_once, vocabulary, context)


def test_more_parameters_tokens_and_layers_need_more_memory() -> None:
    context = init_distributed("float32", 1)
    least = required_bytes(load_recipe("tiny"), 8192, context)
    for setting in ("model.num_hidden_layers=8", "train.ema_decay=0.9", "stage.1.batch_size=64k tokens"):
        changed = load_recipe("tiny", [setting, "data.held_out.max_size=1k characters"])
        assert required_bytes(changed, 8192, context) > least, setting


def test_shards_divide_what_a_rank_keeps_and_not_what_it_gathers() -> None:
    """A large model and small batches: weights, gradients and state are most of the memory."""
    context = init_distributed("float32", 1)
    settings = ["model.num_hidden_layers=24", "model.hidden_size=512", "train.ema_decay=0.9"]
    settings += ["stage=[{max_seq_len = 32, batch_size = '4k tokens'}]", "train.micro_batch_size=64 tokens"]
    replicas, shards = (load_recipe("tiny", [*settings, f"train.parallel={kind}"]) for kind in ("ddp", "fsdp"))
    parameters = num_parameters(replicas.model, 8192)
    one = required_bytes(replicas, 8192, context)
    assert required_bytes(shards, 8192, context) == one, "one process shares nothing"
    needed = {ranks: required_bytes(shards, 8192, replace(context, ranks=ranks)) for ranks in (2, 4, 8)}
    assert [required_bytes(replicas, 8192, replace(context, ranks=ranks)) for ranks in needed] == [one] * 3
    for ranks in (2, 4):  # 20 bytes for each parameter: weight, average, gradient, state
        saved = needed[ranks] - needed[2 * ranks]
        assert saved == pytest.approx(20 * parameters * (1 / ranks - 1 / (2 * ranks)), rel=1e-3)
    assert 20 / 2 * parameters < needed[2] < one
    many = replace(context, ranks=1024)
    assert needed[8] > required_bytes(shards, 8192, many) > 4 * parameters, "a validation gathers the weights"


def test_only_the_ranks_of_a_machine_share_its_memory() -> None:
    context = init_distributed("auto", 1)
    recipe = load_recipe("tiny")
    ranks = available_bytes(context) // required_bytes(recipe, 8192, context) + 2  # too many for one machine
    check_memory(recipe, 8192, replace(context, ranks=ranks, local_ranks=1))
    with pytest.raises(RecipeError, match="needs about"):
        check_memory(recipe, 8192, replace(context, ranks=ranks, local_ranks=ranks))


def test_a_run_that_is_faster_than_its_plan_names_the_command_that_prolongs_it(text: Path, tmp_path: Path) -> None:
    recipe, components = build(text, "train.budget=60 s", "train.every.validate=100%")
    measured = Measured((2.0, 2.0), validate_seconds=1.0, save_seconds=1.0)  # seconds instead of milliseconds
    epoch_tokens = [loader.epoch_tokens for loader in components.loaders]
    plan = make_plan(recipe.stage, recipe.train.budget, recipe.train.every, epoch_tokens, measured)
    (tmp_path / "run").mkdir()
    run = PreparedRun(tmp_path / "run", recipe, plan, components, estimate_cost(recipe, plan, components))
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with show_log(display), Signals() as signals:
        run_training(run, TrainState(), display, signals)
    lines = stream.getvalue().splitlines()
    (message,) = [line for line in lines if line.startswith("warning: the run is faster than its plan")]
    assert f'unmask pretrain --resume {tmp_path / "run"} --budget "+' in message
    (first,) = [line for line in lines if line.startswith(f"step {tenth(plan):>2}/{plan.steps}")]
    assert lines.index(first) < lines.index(message) <= lines.index(first) + 2, "after a tenth of the steps"


def test_a_pipe_gets_one_line_of_the_probe_and_a_note_if_a_step_exceeds_the_text(prose: Path, tmp_path: Path) -> None:
    short, stream = tmp_path / "short.txt", io.StringIO()
    short.write_text("\n\n".join(prose.read_text(encoding="utf-8").split("\n\n")[:20]), encoding="utf-8")
    settings = [
        *SMALL,
        "data.tokenizer.vocab_size=120",
        "stage.0.batch_size=2k tokens",
        "stage.1.batch_size=2k tokens",
    ]
    unmask.pretrain(
        str(short), recipe="tiny", out=tmp_path / "run", budget="10 steps", display=PlainDisplay(stream),
        settings=settings, dry_run=True,
    )  # fmt: skip
    shown = stream.getvalue()
    assert shown.count("probe: ") == 1 and "at most 5.0 s" in shown
    assert re.search(
        r"note: a step of stage 0 has 2,000 tokens, more than the text with [\d.,k]+, so it repeats", shown
    )


FAILING = """
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective


class Failing(MaskedLMObjective):
    def __init__(self, settings, tools):
        super().__init__(MaskedLMConfig(), tools.vocabulary.mask_id, tools.vocabulary.regular_token_ids)

    def loss(self, encoder, head, masked):
        raise ZeroDivisionError
"""


def test_a_run_of_few_steps_is_tried_and_not_probed(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_objective.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    settings, stream = [*SMALL, "data.tokenizer.vocab_size=120"], io.StringIO()
    unmask.pretrain(
        str(prose),
        recipe="tiny",
        out=tmp_path / "run",
        budget="9 steps",
        display=PlainDisplay(stream),
        settings=settings,
    )
    assert "probe: " not in stream.getvalue()
    assert re.search(r"^time +not measured$", stream.getvalue(), re.MULTILINE)
    unmask.resume(tmp_path / "run", budget="+0.5 s", display=None)
    _, plan = read_recipe(tmp_path / "run")
    assert plan.steps > 9 and plan.seconds > 0.3, "the probe that was left out precedes a budget in seconds"
    failing = [*settings, "objective.kind=failing_objective:Failing"]
    with pytest.raises(ZeroDivisionError):
        unmask.pretrain(str(prose), out=tmp_path / "other", budget="9 steps", display=None, settings=failing)
    assert not (tmp_path / "other").exists(), "the step that is tried comes before anything is written"
