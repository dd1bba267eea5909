"""`unmask runs`: state of each run, settings that differ, and no traceback for a damaged run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import stats

from unmask.core import files
from unmask.training.pretrain import launch
from unmask.training.runs import run_lock, t_quantile

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def two_kinds(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, a run that stopped early, and a run with another tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    given = small_run.parent
    shutil.copytree(small_run, folder / "a", symlinks=True)
    early = ["train.early_stopping_patience=1", "train.every.validate=1 steps", "optimizer.lr=1e-12"]
    early += ["optimizer.muon_lr=1e-12", "train.budget=9 steps"]
    launch([given / "cat.txt"], recipe=given / "small.toml", out=folder / "b", settings=early)
    words = ["data.tokenizer={kind = 'wordpiece', vocab_size = 40}"]
    launch([given / "cat.txt"], recipe=given / "small.toml", out=folder / "c", settings=words)
    for age, name in enumerate(("c", "b", "a")):  # a is the newest
        os.utime(folder / name / "log.jsonl", (1e9 + age, 1e9 + age))
    (folder / "no run").mkdir()
    return folder


def listing(unmask: Command, *arguments: str) -> str:
    code, out, err = unmask("runs", *arguments)
    assert code == 0 and not err, err
    return out


def test_runs_are_grouped_by_tokenizer_newest_first_with_the_differing_settings(
    unmask: Command, two_kinds: Path
) -> None:
    out = listing(unmask, str(two_kinds)).splitlines()
    first, second = [number for number, line in enumerate(out) if line.startswith("tokenizer ")]
    assert "(characters)" in out[first] and "(wordpiece)" in out[second]
    rows = {line.split()[0]: line for line in out[first + 2 : first + 4] + out[second + 2 : second + 3]}
    assert list(rows) == ["a", "b", "c"]
    assert "finished" in rows["a"] and " 3/3 " in rows["a"] and "ended early" in rows["b"]
    assert "optimizer.lr" in out[first + 1] and "1e-12" in rows["b"] and "model.hidden_size" not in out[first + 1]
    assert "compare only within one tokenizer" in out[-1]
    assert not any("no run" in line for line in out)


def test_two_kinds_of_model_take_one_line_a_run_at_eighty_columns(
    unmask: Command, two_kinds: Path, small_run: Path, tmp_path: Path
) -> None:
    folder, given = tmp_path / "runs", small_run.parent
    shutil.copytree(two_kinds / "a", folder / "modern", symlinks=True)
    bert = ["model={kind = 'bert', num_hidden_layers = 1, hidden_size = 16, num_attention_heads = 2, "
            "intermediate_size = 16}", "optimizer.lr=1e-4"]  # fmt: skip
    launch([given / "cat.txt"], recipe=given / "small.toml", out=folder / "classic", settings=bert)
    wide = listing(unmask, str(folder)).splitlines()
    assert len(wide) == 5 and "model.kind" in wide[1] and "optimizer.lr" in wide[1]
    assert "mlp_bias" not in wide[1], "a setting that only one kind of model has"
    chosen = listing(unmask, str(folder), "--columns", "run,optimizer.lr, loss").splitlines()
    assert chosen[1].split() == ["run", "optimizer.lr", "loss"] and "0.0001" in "".join(chosen)
    code, _, err = unmask("runs", str(folder), "--columns", "optimizer.lrr")
    assert code == 2 and "did you mean 'optimizer.lr'?" in err
    if pty := pytest.importorskip("pty", reason="this system has no pseudo-terminals"):
        main, terminal = pty.openpty()
        command = [sys.executable, "-m", "unmask", "runs", str(folder)]
        subprocess.run(command, stdout=terminal, env={**os.environ, "COLUMNS": "80", "TERM": "xterm"}, check=True)
        os.close(terminal)
        lines = os.read(main, 100_000).decode().splitlines()
        assert len(lines) == 6 and max(map(len, lines)) <= 80 and "kind" in lines[1]


def test_json_has_the_numbers(unmask: Command, two_kinds: Path) -> None:
    found = json.loads(listing(unmask, str(two_kinds), "--json"))
    assert [run["state"] for run in found] == ["finished", "ended early", "finished"]
    assert found[0]["step"] == found[0]["steps"] == 3 and found[0]["tokens"] > 0 and found[0]["seconds"] > 0
    assert found[0]["best_loss"] <= found[0]["loss"] and found[0]["bits_per_character"] > 0
    assert found[1]["settings"]["train.early_stopping_patience"] == 1
    assert found[0]["tokenizer"] == found[1]["tokenizer"] != found[2]["tokenizer"]


def test_one_run_and_no_run(unmask: Command, two_kinds: Path, place: Path) -> None:
    assert listing(unmask, str(two_kinds / "a")).count("finished") == 1
    assert listing(unmask, ".") == "no runs in .\n"
    code, _, err = unmask("runs", "nowhere")
    assert code == 2 and "folder not found" in err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("recipe.toml", "hidden_size = ["), ("recipe.toml", "plan = 3"), ("recipe.toml", None), ("env.json", "{"),
        ("env.json", '{"text": 5}'), ("log.jsonl", 'nothing\n{"step": 1}\n'),
        ("log.jsonl", '{"step": 1, "validation": 3}\n'),
        ("log.jsonl", '{"step": 1, "tokens": 1e999}\n'),
    ],
)  # fmt: skip
def test_a_damaged_run_is_listed_with_its_problem(unmask: Command, run: Path, file: str, content: str | None) -> None:
    victim = run / file
    victim.unlink() if content is None else victim.write_text(content)
    out = listing(unmask, ".")
    assert out.startswith("run: damaged: ") and "Traceback" not in out
    assert json.loads(listing(unmask, ".", "--json"))[0]["problem"]


def test_killed_crashed_and_running_runs(unmask: Command, run: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with run_lock(run):
        _, host, *_ = (run / "lock").read_text().splitlines()
    (run / "lock").write_text(f"{int(gone.stdout)}\n{host}\n")
    assert json.loads(listing(unmask, ".", "--json"))[0]["state"] == "killed"
    (run / "lock").write_text(f"{os.getpid()}\n{host}\n")
    assert json.loads(listing(unmask, ".", "--json"))[0]["state"] == "running"
    (run / "lock").unlink()
    (run / "crash.txt").write_text("Traceback")
    assert json.loads(listing(unmask, ".", "--json"))[0]["state"] == "crashed"


def test_a_run_in_use_can_t_be_resumed(unmask: Command, run: Path) -> None:
    with run_lock(run):
        code, _, err = unmask("pretrain", "--resume", "run", "--budget", "+1 steps")
    assert code == 2 and f"in use by process {os.getpid()} on {platform.node()}, since 2026" in err
    (run / "lock").write_text(f"{os.getpid()}\nanother\n")
    code, _, err = unmask("pretrain", "--resume", "run", "--budget", "+1 steps")
    assert code == 2 and "if it no longer exists, remove run/lock" in err


def test_the_step_is_printed_if_it_is_not_the_last(unmask: Command, run: Path) -> None:
    best = json.loads((run / "best" / "card.json").read_text())["step"]
    last = 2 if best == 3 else 3
    for place in ("run", "run/latest", f"run/step-{best:07d}"):
        files.write_pointer(run / "latest", f"step-{best:07d}")
        code, _, err = unmask("fill", place, "the cat sat on the [MASK]at")
        assert code == 0 and not err, "the best and the last are one"
    files.write_pointer(run / "latest", f"step-{last:07d}")
    note = f"using step {best}, the best by validation; the last step is {last}\n"
    assert unmask("fill", "run", "the cat sat on the [MASK]at")[2] == note
    assert unmask("evaluate", "run", "--text", "cat.txt", "--json")[2] == note
    assert not unmask("fill", "run/latest", "the cat sat on the [MASK]at")[2]


# Comparing groups -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def seeds(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs base-1, base-2 and low-1, low-2, low-3: two learning rates, seeds by number; and one with another text."""
    folder, given = tmp_path_factory.mktemp("seeds"), small_run.parent
    for name, seed, lr in [("base", 1, 1e-2), ("base", 2, 1e-2), ("low", 1, 1e-4), ("low", 2, 1e-4), ("low", 3, 1e-4)]:
        settings = [f"seed={seed}", f"optimizer.lr={lr}"]
        launch([given / "cat.txt"], recipe=given / "small.toml", out=folder / f"{name}-{seed}", settings=settings)
    (folder / "dog.txt").write_text("The dog sat on the mat and the cat sat on the log. " * 60)
    launch([folder / "dog.txt"], recipe=given / "small.toml", out=folder / "dog")
    return folder


def test_groups_are_compared_over_their_seeds(unmask: Command, seeds: Path) -> None:
    code, out, err = unmask("runs", str(seeds), "--compare", "base-1", "low-3", "--json")
    assert code == 0 and not err
    found = json.loads(out)
    assert [[run["seed"] for run in group] for group in found["groups"].values()] == [[1, 2], [1, 2, 3]]
    assert found["settings"] == {"optimizer.lr": {"A": 0.01, "B": 0.0001}} and not found["is_paired"]
    loss = next(row for row in found["differences"] if row["measure"] == "loss")
    runs = {run["run"]: run["loss"] for run in json.loads(listing(unmask, str(seeds), "--json"))}
    assert loss["first"] == [runs[str(seeds / f"base-{seed}")] for seed in (1, 2)]
    assert loss["difference"] == pytest.approx(statistics.fmean(loss["second"]) - statistics.fmean(loss["first"]))
    expected = stats.ttest_ind(loss["second"], loss["first"], equal_var=False)
    # Degrees of freedom are rounded down, so the interval is at least as long as Welch's.
    low, high = expected.confidence_interval()
    assert loss["interval"][0] <= low + 1e-6 and loss["interval"][1] >= high - 1e-6
    assert loss["differs"] == (abs(loss["difference"]) > 2 * loss["noise"])


def test_groups_with_the_same_seeds_are_compared_seed_by_seed(unmask: Command, seeds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "paired"
    shutil.copytree(seeds, folder, symlinks=True, ignore=shutil.ignore_patterns("low-3"))
    found = json.loads(unmask("runs", str(folder), "--compare", "base-*", "low-*", "--json")[1])
    loss = next(row for row in found["differences"] if row["measure"] == "loss")
    differences = [two - one for one, two in zip(loss["first"], loss["second"], strict=True)]
    assert found["is_paired"] and loss["noise"] == pytest.approx(statistics.stdev(differences))
    interval = stats.ttest_rel(loss["second"], loss["first"]).confidence_interval()
    assert loss["interval"] == pytest.approx(list(interval), abs=1e-3)
    out = listing(unmask, str(folder), "--compare", "base-*", "low-*")
    assert out.startswith("A  base-1 and base-2  (2 runs, seeds 1, 2)\nB  low-1")
    assert "optimizer.lr: 0.01 in A, 0.0001 in B" in out and "seed by seed" in out
    row = next(line for line in out.splitlines() if line.startswith("loss "))
    assert f"{loss['difference']:+.4f}" in row and ("differs" in row) == loss["differs"]
    single = tmp_path / "single"
    for name in ("base-1", "low-1"):
        shutil.copytree(seeds / name, single / name, symlinks=True)
    assert "one seed: no noise known" in listing(unmask, str(single), "--compare", "base-1", "low-1")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("base-1", "base-2"), "name the same run"),
        (("base-1", "lo"), "no run matches `lo`"),
        (("*-1", "low-3"), "differ in more than their seed: optimizer.lr"),
        (("base-1", "dog"), "losses of different"),
        (("base-1", "low-1", "--columns", "run"), "--columns can't be combined with --compare"),
    ],
)
def test_groups_that_don_t_compare_are_refused(
    refused: Refused, seeds: Path, names: tuple[str, ...], says: str
) -> None:
    refused("runs", str(seeds), "--compare", *names, says=says)


def test_a_run_that_has_not_ended_is_left_out(unmask: Command, seeds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(seeds, folder, symlinks=True)
    (folder / "low-3" / "crash.txt").write_text("Traceback")
    found = json.loads(unmask("runs", str(folder), "--compare", "base-1", "low-1", "--json")[1])
    assert [run["state"] for run in found["left_out"]] == ["crashed"] and len(found["groups"]["B"]) == 2


def test_names_patterns_and_equal_seeds(unmask: Command, seeds: Path, tmp_path: Path) -> None:
    """A name with brackets is no pattern, a pattern stands for what it matches, and equal runs give no noise."""
    folder = tmp_path / "runs"
    for source, name in [("base-1", "base[1]"), ("base-1", "base-copy"), ("base-2", "base-2"), ("low-1", "low-1")]:
        shutil.copytree(seeds / source, folder / name, symlinks=True)
    found = json.loads(unmask("runs", str(folder), "--compare", str(folder / "base[1]"), "low-1", "--json")[1])
    assert [run["seed"] for run in found["groups"]["A"]] == [1, 1, 2]
    found = json.loads(unmask("runs", str(folder), "--compare", "base-2*", "low-*", "--json")[1])
    assert [[run["seed"] for run in group] for group in found["groups"].values()] == [[2], [1]]
    shutil.rmtree(folder / "base-2")
    shutil.copytree(folder / "low-1", folder / "low-copy", symlinks=True)
    found = json.loads(unmask("runs", str(folder), "--compare", "base-copy", "low-1", "--json")[1])
    assert [len(group) for group in found["groups"].values()] == [2, 2]
    assert all(row["noise"] is None and row["differs"] is None for row in found["differences"])


def test_quantiles_are_those_of_student() -> None:
    for degrees in (1, 2, 7, 30, 31, 60, 400):
        assert t_quantile(degrees + 0.5) == pytest.approx(stats.t.ppf(0.975, degrees), abs=2e-3)
