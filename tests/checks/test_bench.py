"""`unmask bench`: both libraries are measured in turns, on the same rows, and every number has its facts beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask.checks.bench import BenchedModel, BenchReport, Row, bench, first_characters
from unmask.checks.bench.peer import NOT_INSTALLED, Peer, PeerError, blocks_of, rows_of
from unmask.checks.bench.timing import ROUNDS, in_turns, repeated
from unmask.checks.bench.work import BenchedRecipe, masked_sentences, open_recipe
from unmask.cli import main
from unmask.core.errors import RecipeError, TextError

pytestmark = pytest.mark.slow

SMALL = """\
[data]
tokenizer = {{ kind = "wordpiece", vocab_size = 200 }}
[model]
kind = "{kind}"
num_hidden_layers = 1
hidden_size = 32
num_attention_heads = 2
intermediate_size = 32
[[stage]]
until = "20%"
max_seq_len = 16
batch_size = "128 tokens"
[[stage]]
until = "100%"
max_seq_len = 32
batch_size = "256 tokens"
[train]
threads = 1
"""
MEASUREMENTS = [
    "training",
    "data preparation",
    "masking and packing",
    "filling one sentence",
    "filling 32 sentences",
]


@pytest.fixture(scope="module")
def texts(prose: Path) -> list[str]:
    return prose.read_text(encoding="utf-8").split("\n\n")


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    """Writes a small recipe of a model kind and returns its path."""

    def write(kind: str) -> str:
        path = tmp_path / f"small-{kind}.toml"
        path.write_text(SMALL.format(kind=kind), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def small(recipe: Callable[[str], str], texts: list[str], tmp_path: Path) -> BenchedRecipe:
    return open_recipe(recipe("bert"), texts, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_both_libraries_are_measured(recipe: Callable[[str], str], texts: list[str], kind: str) -> None:
    name, lines = recipe(kind), list[str]()
    report = bench(texts, [name], seconds=0.01, threads=1, message=lines.append)
    rows = [row for row in report.rows if row.recipe]
    assert [row.measurement for row in rows] == MEASUREMENTS
    for row in rows:
        assert row.unmask > 0 and row.rounds >= 3
        assert any(row.measurement in line and row.value in line for line in lines)
        if row.measurement == "data preparation":
            assert row.transformers is row.ratio is None and row.peer == ""
            continue
        assert row.transformers is not None and row.transformers > 0 and row.missing == ""
        assert row.ratio is not None and row.ratio_range is not None
        assert row.ratio_range[0] <= row.ratio <= row.ratio_range[1]
    assert rows[0].share is not None and rows[0].ceiling is not None and rows[0].share > 0
    (model,) = report.models
    assert (model.kind, model.max_seq_len, model.batch_tokens, model.threads) == (kind, 32, 256, 1)
    assert torch.are_deterministic_algorithms_enabled(), "as before transformers was measured"
    assert all(entry.unmask > 0 for entry in report.rows)


def test_without_transformers(recipe: Callable[[str], str], prose: Path) -> None:
    """A process in which `import transformers` raises ImportError prints complete JSON, and "not installed"."""
    script = "import sys; sys.modules['transformers'] = None; from unmask.cli import main; main()"
    command = ["bench", str(prose), "--recipe", recipe("bert"), "--seconds", "0.01", "--threads", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() == {field.name for field in fields(BenchReport)}
    assert report["models"][0].keys() == {field.name for field in fields(BenchedModel)}
    assert report["transformers"] == NOT_INSTALLED and report["threads"] == 1
    for row in report["rows"]:
        assert row.keys() == {field.name for field in fields(Row)}
        assert row["unmask"] > 0 and row["transformers"] is row["ratio"] is None
        compared = row["recipe"] and row["measurement"] != "data preparation"
        assert row["missing"] == (NOT_INSTALLED if compared else "")
    assert "training" in done.stderr, "a line per measurement"


def test_the_table_in_a_pipe(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2"]
    command = ["bench", str(prose), "--recipe=seed", "--seconds=0.01", "--threads=1"]
    monkeypatch.setattr(sys, "argv", ["unmask", *command, *(f"--set={setting}" for setting in settings)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    lines = [line.split("  ") for line in out.splitlines()]
    assert [line[0] for line in lines if line[0] == "seed"] == ["seed"] * len(MEASUREMENTS)
    assert "no such class" in out, "transformers has no class for the tutorial's model"
    assert f"torch {torch.__version__}" in out and "1 thread," in out and "seed: " in out


# The process of transformers ------------------------------------------------------------------------------------------


def test_a_process_that_fails_or_ends_says_why(small: BenchedRecipe, tmp_path: Path) -> None:
    with Peer(small, tmp_path / "model") as peer:
        work = peer.masking_work(small.batches(1))
        assert work(0.0)[0] > 0
        (tmp_path / "model" / "model.safetensors").unlink()
        with pytest.raises(PeerError, match=r"failed: OSError: .*model\.safetensors"):
            peer.fill_work(["A [MASK]."])
        assert peer.masking_work(small.batches(1))(0.0)[0] > 0, "a failure doesn't end the process"
        os.kill(peer.pid, signal.SIGKILL)
        with pytest.raises(PeerError, match=f"killed by signal {int(signal.SIGKILL)}"):
            work(0.0)


def test_the_process_has_the_defaults_of_torch_and_ends_with_its_input() -> None:
    script = (
        "import sys, torch, unmask.checks.bench.peer_process as peer\n"
        "print(torch.are_deterministic_algorithms_enabled(), flush=True)\n"
        "peer.serve()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"False\n"
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# Errors -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(recipe: Callable[[str], str], texts: list[str]) -> None:
    with pytest.raises(RecipeError, match="tinny"):
        bench(texts, ["tinny"], seconds=0.01)
    lines: list[str] = []
    with pytest.raises(RecipeError, match="needs a model to start from"):
        bench(texts, [recipe("bert"), "continue"], seconds=0.01, message=lines.append)
    assert not lines, "nothing is measured before the error"
    with pytest.raises(RecipeError, match="invalid seconds: got 0"):
        bench(texts, [recipe("bert")], seconds=0.0)
    with pytest.raises(TextError, match="hint:"):
        bench(["one", "two", "three words here"], [recipe("bert")], seconds=0.01)


def test_a_text_that_is_too_short_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("hello world\n\nfoo\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["unmask", "bench", str(short), "--recipe=bert-tiny", "--threads=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "not enough training text" in err and "short.txt" in err and "  hint: " in err
    assert "tokens/s" not in err and "FLOP/s" not in err, "nothing is measured before the error"


# Counting -----------------------------------------------------------------------------------------------------------


def test_flops_per_token_count_model_and_optimizer(small: BenchedRecipe) -> None:
    algorithms = small.components.training.optimizer.algorithms()
    assert "muon" in algorithms.values() and small.optimizer_flops > 0
    assert small.flops_per_token > small.optimizer_flops / small.batch_tokens > 0


# Rows and turns -----------------------------------------------------------------------------------------------------


def test_the_trainer_gets_the_same_tokens_in_full_rows(small: BenchedRecipe) -> None:
    blocks, batch_rows = blocks_of(small)
    assert {len(block) for block in blocks} == {small.length}
    assert batch_rows * small.length == small.batch_tokens and len(blocks) >= batch_rows
    (first,) = small.batches(1)
    assert list(chain.from_iterable(blocks))[: first.tokens] == first.ids_T.tolist()
    assert list(chain.from_iterable(rows_of(first))) == first.ids_T.tolist()
    assert len(rows_of(first)) == first.num_samples


def test_work_alternates() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[[float], list[float]]:
        def run(seconds: float) -> list[float]:
            calls.append(name)
            return [1.0]

        return run

    rounds = in_turns({"a": named("a"), "b": named("b")}, seconds=1.0)
    assert calls == ["a", "b"] * (ROUNDS + 1), "one repetition of each to warm up, then A B A B"
    assert len(rounds.seconds["a"]) == len(rounds.ratios("a", "b")) == ROUNDS


def test_work_is_repeated_at_least_once() -> None:
    calls: list[int] = []
    times = repeated(lambda: calls.append(1), units=10)(0.0)
    assert len(times) == len(calls) == 1 and times[0] >= 0


def test_ratios_are_taken_within_a_round() -> None:
    """The machine gets slower by a factor of 8, and the ratio stays 2."""
    slowness = iter([1.0, 1.0, 2.0, 4.0, 8.0, 8.0] * 2)
    current = [1.0]

    def fast(seconds: float) -> list[float]:
        current[0] = next(slowness)
        return [current[0]]

    rounds = in_turns({"fast": fast, "slow": lambda seconds: [2 * current[0]]}, seconds=1.0)
    assert rounds.ratios("fast", "slow") == [2.0] * ROUNDS
    assert rounds.rate("fast") == 1 / 4


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.integers(1, 9))
def test_each_sentence_has_one_mask(documents: list[str], count: int) -> None:
    sentences = masked_sentences(documents, count)
    assert len(sentences) == count and all(sentence.count("[MASK]") == 1 for sentence in sentences)


@given(st.lists(st.text()), st.integers(0, 50))
def test_the_first_characters(documents: list[str], limit: int) -> None:
    kept = first_characters(documents, limit)
    assert "".join(kept) == "".join(documents)[:limit]


def test_a_row_as_text() -> None:
    row = Row("tiny", "filling one sentence", "ms", 3.14159, missing=NOT_INSTALLED)
    assert (row.value, row.peer) == ("3.14 ms", "not installed")
    assert Row("", "matrix products, float32", "FLOP/s", 2e11).value == "200 GFLOP/s"
    assert Row("tiny", "training", "tokens/s", 12_345.0, transformers=9.5).peer == "9.5 tokens/s"
    assert asdict(row)["rounds"] == 0
