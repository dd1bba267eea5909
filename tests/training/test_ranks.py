"""Runs on 1 and 2 ranks: equal weights, resuming on another number of ranks, ranks that differ, fail or are killed.

The runs are made by real processes over gloo. They are forked from one process, so that PyTorch is loaded once.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from unmask.cli.errors import report_error
from unmask.core.distributed import compare_ranks, ending_together, init_distributed
from unmask.core.errors import Stopped
from unmask.models import build_model
from unmask.models.bert import BertConfig
from unmask.models.parallel import compare_weights, share
from unmask.objectives.mlm import MaskedLMConfig, MaskedLMObjective
from unmask.training.checkpoint.shards import KINDS, open_tensors
from unmask.training.display import Display
from unmask.training.loop import TrainModule
from unmask.training.pretrain import launch, resume

pytestmark = pytest.mark.slow

STEPS, MICRO_TOKENS = 8, 300
SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=2", "model.hidden_size=32",
    "model.num_attention_heads=2", "model.intermediate_size=48", "train.ema_decay=0.9", "train.precision=float32",
    "train.every.log=1 steps", "train.every.validate=4 steps", "train.every.save=3 steps", "train.threads=1",
    f"train.micro_batch_size={MICRO_TOKENS} tokens", f"train.budget={STEPS} steps", "optimizer.eps=1e-3",
    "stage=[{until = '50%', max_seq_len = 24, batch_size = '512 tokens'}, "
    "{until = '100%', max_seq_len = 48, batch_size = '512 tokens'}]",
]  # fmt: skip
TOLERANCE = 1e-5  # of weights of size 0.02 to 1 after 8 steps; two runs with other seeds differ by 0.1
KILLER = """
import os, signal

class Killer:
    def __init__(self, settings, context): pass
    def close(self): pass

    def write(self, step, metrics):
        if step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
"""


# Work of a rank -------------------------------------------------------------------------------------------------------


class StopsAt(Display):
    """Sends SIGTERM to this process after a given step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, state: Any) -> None:
        if state.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def pretrain(text: Path, out: Path, *settings: str, stop: int = 0) -> None:
    with contextlib.suppress(Stopped):
        launch([text], recipe="tiny", out=out, settings=[*SMALL, *settings], display=StopsAt(stop))


def go_on(run: Path, stop: int = 0, budget: str | None = None) -> None:
    with contextlib.suppress(Stopped):
        resume(run, budget=budget, display=StopsAt(stop))


def compare_other_weights(rank: int) -> None:
    with ending_together():
        context = init_distributed("float32", 1)
        torch.manual_seed(3)
        settings = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16)
        module = TrainModule(*build_model(settings, 30), torch.nn.Identity())
        objective = MaskedLMObjective(MaskedLMConfig(), 4, np.arange(5, 30))
        if rank == 1:
            module.get_parameter("encoder.embedding_norm.bias").data[3] += 1e-6
        compare_weights(context, share("ddp", context, module, [objective]), module.state_dict())


class Counter:
    """Forwards connections to the store of a launch and counts the requests."""

    def __init__(self, port: int) -> None:
        self._target, self.requests = port, 0
        self._listener = socket.create_server(("localhost", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            above = socket.create_connection(("localhost", self._target))
            threading.Thread(target=self._copy, args=(client, above, 1), daemon=True).start()
            threading.Thread(target=self._copy, args=(above, client, 0), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, count: int) -> None:
        while data := source.recv(1 << 16):
            self.requests += count
            target.sendall(data)


def compare_late(rank: int) -> None:
    """Rank 1 comes four seconds later; rank 0 counts what it asks meanwhile."""
    counter = Counter(int(os.environ["MASTER_PORT"]))
    os.environ["MASTER_PORT"] = str(counter.port)
    context = init_distributed("float32", 1)
    before, begin = counter.requests, time.monotonic()
    if rank == 1:
        time.sleep(4)
    compare_ranks(context, {"text": {"fingerprint": "equal"}})
    print(json.dumps({"requests": counter.requests - before, "seconds": time.monotonic() - begin}))


def fail_unexpectedly(rank: int) -> None:
    """An error that is none of the user's ends rank 1 while rank 0 waits for it in a sum."""
    with ending_together():
        context = init_distributed("float32", 1)
        if rank == 1:
            raise MemoryError("can't allocate 7 tensors\nsecond line")
        context.sum([1.0])


def run_rank(work: Callable[[int], None], rank: int, ranks: int, port: int, output: Path) -> None:
    """Do the work of a rank as the command line does: errors become messages and exit codes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            work(rank)
        except Exception as error:
            code = report_error(error)
            if code == 1:
                traceback.print_exc()
            sys.exit(code)


def run_ranks(
    folder: Path, name: str, ranks: int, work: Callable[[int], None], started: int = 0, first: int = 0
) -> list[int]:
    """Run the work on all ranks, or on `first` to `started` - 1 only, and return the exit codes."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    forked = multiprocessing.get_context("fork")
    processes = [
        forked.Process(target=run_rank, args=(work, rank, ranks, store.port, folder / f"{name}-{rank}.txt"))
        for rank in range(first, started or ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    return [-999 if process in hung else process.exitcode or 0 for process in processes]


def main(folder: Path, text: Path) -> None:
    """Make all runs and write the exit codes to codes.json."""
    codes: dict[str, list[int]] = {}

    def run(name: str, ranks: int, work: Callable[[int], None], started: int = 0, first: int = 0) -> None:
        codes[name] = run_ranks(folder, name, ranks, work, started, first)

    run("one", 1, lambda rank: pretrain(text, folder / "one"))
    for parallel in ("ddp", "fsdp"):
        run(parallel, 2, lambda rank, kind=parallel: pretrain(text, folder / kind, f"train.parallel={kind}"))
    elastic = folder / "elastic"
    run("elastic 1", 1, lambda rank: pretrain(text, elastic, "train.parallel=fsdp", stop=2))
    run("elastic 2", 2, lambda rank: go_on(elastic, 4))
    run("elastic 3", 1, lambda rank: go_on(elastic, 6))
    run("elastic 4", 2, lambda rank: go_on(elastic))
    other = folder / "other" / text.name
    other.parent.mkdir()
    other.write_text(text.read_text() + "\n\none more document\n")
    run("other seed", 2, lambda rank: pretrain(text, folder / "no", f"seed={5 + rank}"))
    run("other text", 2, lambda rank: pretrain([text, other][rank], folder / "no"))
    run("no text", 2, lambda rank: pretrain([text, folder / "none.txt"][rank], folder / "no"))
    run("no run", 2, lambda rank: go_on([folder / "ddp", folder / "none"][rank], budget="+1 steps"))
    run("no rank", 2, lambda rank: pretrain(text, folder / "no", "train.join_timeout=1 s"), started=1)
    run("no rank 0", 3, lambda rank: pretrain(text, folder / "no", "train.join_timeout=1 s"), first=1)
    run("other weights", 2, compare_other_weights)
    run("late rank", 2, compare_late)
    run("unexpected", 2, fail_unexpectedly)
    (folder / "codes.json").write_text(json.dumps(codes))


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(prose)], check=False, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def codes(runs: Path, name: str) -> list[int]:
    return json.loads((runs / "codes.json").read_text())[name]


def messages(runs: Path, name: str) -> list[str]:
    found = [path.read_text() for path in sorted(runs.glob(f"{name}-*.txt"))]
    assert not any("Traceback" in text for text in found), found
    return found


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for kind in KINDS:
        with open_tensors(run / "latest" / "resume", kind) as saved:
            found |= {f"{kind} {name}": saved.whole(name) for name in saved}
    return found


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in log if key in line]


def assert_close(run: Path, expected: Path) -> None:
    """The same samples and masks, and equal weights, optimizer states and validations up to rounding."""
    first, second = tensors(run), tensors(expected)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=TOLERANCE, msg=lambda text, n=name: n + text)
    for key in ("masked_tokens", "tokens"):
        assert [line[key] for line in lines(run, "loss")] == [line[key] for line in lines(expected, "loss")]
    losses = [[line["validation"]["loss"] for line in lines(each, "validation")] for each in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one_process(runs: Path, parallel: str) -> None:
    assert codes(runs, parallel) == [0, 0], messages(runs, parallel)
    assert_close(runs / parallel, runs / "one")
    log = lines(runs / parallel, "loss")
    assert [line["step"] for line in log] == list(range(1, STEPS + 1)), "one rank writes"


def test_a_run_changes_the_number_of_its_ranks(runs: Path) -> None:
    for number in (1, 2, 3, 4):
        assert codes(runs, f"elastic {number}") == [0] * (2 - number % 2), messages(runs, f"elastic {number}")
    assert_close(runs / "elastic", runs / "one")
    changes = json.loads((runs / "elastic" / "env.json").read_text())["resumed_in_different_environment"]
    assert [change for change in changes if change.startswith("ranks")] == [
        "ranks: 1 at the start, 2 now", "ranks: 2 at the start, 1 now", "ranks: 1 at the start, 2 now"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("other seed", "rank 1 differs from rank 0 in the recipe: `seed` is 5 on rank 0 and 6 on rank 1"),
        ("other text", "rank 1 differs from rank 0 in the text: `prose.txt` is"),
        ("other weights", "rank 1 differs from rank 0 in the weights: `encoder.embedding_norm.bias` is"),
    ],
)
def test_ranks_that_differ_end_with_the_difference(runs: Path, name: str, expected: str) -> None:
    assert codes(runs, name) == [2, 2], messages(runs, name)
    assert all(expected in text and "hint: start all ranks with the same" in text for text in messages(runs, name))
    assert not (runs / "no").exists()


@pytest.mark.parametrize(
    ("name", "problem"), [("no text", "none.txt"), ("no run", "not a run: recipe.toml is missing")]
)
def test_an_error_of_one_rank_ends_all(runs: Path, name: str, problem: str) -> None:
    assert codes(runs, name) == [2, 2], messages(runs, name)
    first, second = messages(runs, name)
    assert f"rank 1 on {socket.gethostname()} stopped: " in first and problem in first and problem in second


def test_an_unexpected_error_of_one_rank_ends_all_at_once(runs: Path) -> None:
    assert codes(runs, "unexpected") == [2, 1]
    first, second = ((runs / f"unexpected-{rank}.txt").read_text() for rank in (0, 1))
    reason = (
        f"rank 1 on {socket.gethostname()} stopped: MemoryError: can't allocate 7 tensors; the connection ended with"
    )
    assert reason in first and "Traceback" not in first
    assert re.search(r"ended with \w+: .+", first), "the error that this rank saw is named too"
    assert "Traceback" in second and "second line" in second


def test_a_rank_that_waits_asks_the_store_rarely(runs: Path) -> None:
    assert codes(runs, "late rank") == [0, 0], messages(runs, "late rank")
    waiting = json.loads(messages(runs, "late rank")[0].splitlines()[-1])
    assert 4 <= waiting["seconds"] < 6, "it notices soon"
    assert waiting["requests"] < 60, "with a request every 0.05 s, there would be 80 and more"


def test_a_number_of_machines_that_changes_is_refused(prose: Path, tmp_path: Path) -> None:
    launcher = Path(__file__).parents[1] / "docs" / "torchrun.py"
    command = [
        sys.executable, str(launcher), "--nnodes", "1:2", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "--rdzv-conf", "last_call_timeout=1",
        "-m", "unmask", "pretrain", str(prose), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "a number of machines that changes is not supported: --nnodes 1:2" in done.stdout + done.stderr


def test_a_missing_rank_0_is_named_by_the_others(runs: Path) -> None:
    assert codes(runs, "no rank 0") == [2, 2], messages(runs, "no rank 0")
    assert all("the 3 ranks did not meet within 1 s: 0 did not come" in text for text in messages(runs, "no rank 0"))


def test_a_missing_rank_is_named(runs: Path) -> None:
    assert codes(runs, "no rank") == [2], messages(runs, "no rank")
    assert "the 2 ranks did not meet within 1 s: 1 did not come" in messages(runs, "no rank")[0]


@pytest.fixture(scope="module")
def restarted(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of which torchrun restarted the ranks after one was killed, and what was printed."""
    folder = tmp_path_factory.mktemp("restarted")
    (folder / "killing.py").write_text(KILLER)
    launcher = Path(__file__).parents[1] / "docs" / "torchrun.py"
    options = [option for setting in SMALL for option in ("--set", setting)]
    command = [
        sys.executable, str(launcher), "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", "unmask", "pretrain", str(prose), "--out", str(folder / "run"),
        *options, "--set", 'train.loggers=["killing:Killer"]',
        "--set", "train.background_save=false",  # the kill comes two steps after a save
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "run", done.stdout + done.stderr


def test_a_killed_rank_loses_only_what_was_not_saved(runs: Path, restarted: tuple[Path, str]) -> None:
    run, printed = restarted
    assert "resuming at step 3 of 8" in printed
    assert [line["step"] for line in lines(run, "loss")] == list(range(1, STEPS + 1)), "no step twice"
    lost = [json.loads(line) for line in (run / "discarded.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lost} == {4, 5}
    assert not (run / "crash.txt").exists()
    uninterrupted = tensors(runs / "ddp")
    assert all(torch.equal(tensor, uninterrupted[name]) for name, tensor in tensors(run).items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
