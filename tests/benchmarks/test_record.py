"""benchmarks/record.py: packed runs pass, and whatever is changed afterwards is found."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unmask.core.files import RunLayout
from unmask.training.pretrain import launch

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.document=file", "data.held_out={method = 'tail', fraction = '10%'}", "data.tokenizer.kind=characters",
    "model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=16",
    "stage=[{max_seq_len = 32, batch_size = '256 tokens'}]", "train.threads=1", "train.budget=30 steps",
    "train.every={log = '5 steps', validate = '5 steps', save = '30 steps'}",
]  # fmt: skip


@pytest.fixture(scope="module")
def record() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["record"] = module  # its dataclasses are resolved by the name of their module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["record"]


@pytest.fixture(scope="module")
def runs(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of 30 steps that differ in the seed."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        launch([prose], recipe="char", out=folder / f"run-{seed}", settings=[*SMALL, f"seed={seed}"])
    return [folder / f"run-{seed}" for seed in (1, 2, 3)]


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / RunLayout.LOG).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tracks(record: ModuleType, runs: list[Path], prose: Path) -> Path:
    """A track whose target is the worst last validation of the runs."""
    environment = json.loads((runs[0] / RunLayout.ENVIRONMENT).read_text(encoding="utf-8"))
    facts, results = environment["text"]["facts"], [read_log(run)[-1]["validation"] for run in runs]
    track = {
        "about": "a test", "text": prose.name, "bytes": prose.stat().st_size, "sha256": record.file_sha256(prose),
        "digest": environment["text"]["files"][0][1], "held_out_digest": facts["held_out_digest"],
        "held_out_tokens": facts["held_out_tokens"], "held_out_characters": facts["held_out_characters"],
        "tokenizer": environment["text"]["tokenizer"], "masked_tokens": results[0]["masked_tokens"],
        "unigram_loss": results[0]["unigram_loss"], "device": "cpu", "threads": 2, "ranks": 1, "seeds": [1, 2, 3],
    }  # fmt: skip
    target = max(result["bits_per_character"] for result in results)
    path = runs[0].parent / "tracks.toml"
    opened = {**track, "target_bits_per_character": target}
    path.write_text(record.tomli_w.dumps({"closed": track, "small": opened}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def entry(record: ModuleType, runs: list[Path], tracks: Path) -> Path:
    folder = tracks.parent / "small" / "first"
    arguments = ["make", str(folder), *map(str, runs), "--about", "A test.", "--author", "A", "--tracks", str(tracks)]
    assert record.main(arguments) == 0
    return folder


def change_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Return a function that changes a JSON file of the second run of an entry."""

    def edit(entry: Path) -> None:
        path = entry / "seed-2" / name
        lines = path.read_text(encoding="utf-8")
        values = [json.loads(line) for line in lines.splitlines()] if name == RunLayout.LOG else [json.loads(lines)]
        change(values if name == RunLayout.LOG else values[0])
        path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")

    return edit


def change_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(entry: Path) -> None:
        text = (entry / name).read_text(encoding="utf-8")
        assert old in text
        (entry / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


def halve_times(log: list[dict[str, Any]]) -> None:
    """Halves the times of a run that is 100 times as slow, so that they contradict its speed also on a fast machine."""
    for line in log:
        if "tokens_per_second" in line:
            line["tokens_per_second"] /= 100
        line["seconds"] /= 2
        line["training_seconds"] /= 2
        line["phase_seconds"] = {name: value / 2 for name, value in line.get("phase_seconds", {}).items()}


def lower_bits(log: list[dict[str, Any]]) -> None:
    log[-1]["validation"]["bits_per_character"] /= 2


def lower_loss(log: list[dict[str, Any]]) -> None:
    log[1]["validation"]["loss"] /= 2
    log[1]["validation"]["bits_per_character"] /= 2


def drop_last_run(entry: Path) -> None:
    text = (entry / "entry.toml").read_text(encoding="utf-8")
    (entry / "entry.toml").write_text(text[: text.rindex("[[run]]")], encoding="utf-8")


def state_another_time(entry: Path) -> None:
    lines = (entry / "entry.toml").read_text(encoding="utf-8").splitlines()
    changed = ["seconds = 0.001" if line.startswith("seconds = ") else line for line in lines]
    (entry / "entry.toml").write_text("\n".join(changed) + "\n", encoding="utf-8")


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "stated time": ("time", state_another_time),
    "run missing": ("seeds", drop_last_run),
    "another text": ("text", change_json("env.json", lambda env: env["text"].update(files=[["a", "text:0"]]))),
    "another tokenizer": ("text", change_json("env.json", lambda env: env["text"].update(tokenizer="0"))),
    "other held-out text": ("text", change_json("env.json", lambda e: e["text"]["facts"].update(held_out_digest="0"))),
    "further text": ("text", change_json("env.json", lambda env: env["text"].update(valid={"more": {}}))),
    "another machine": ("machine", change_json("env.json", lambda env: env["determinism"].update(device="cuda"))),
    "many threads": ("machine", change_json("env.json", lambda env: env["determinism"].update(threads=9))),
    "another version": ("machine", change_json("env.json", lambda env: env["determinism"].update(torch="1.0"))),
    "a plugin": (
        "recipe",
        change_json("env.json", lambda env: env["plugins"].update(data={"kind": "a:B", "file": "a.py", "digest": "0"})),
    ),
    "changed recipe": ("recipe", change_text("seed-2/recipe.toml", "mask_rate = 0.3", "mask_rate = 0.2")),
    "another shared recipe": ("recipe", change_text("recipe.toml", "mask_rate = 0.3", "mask_rate = 0.2")),
    "another seed": ("seeds", change_text("seed-2/recipe.toml", "seed = 2", "seed = 7")),
    "longer plan": ("recipe", change_text("seed-2/recipe.toml", "\nsteps = 30", "\nsteps = 40")),
    "budget in seconds": ("recipe", change_text("seed-2/recipe.toml", '"30 steps"', '"30 s"')),
    "times halved": ("log", change_json("log.jsonl", halve_times)),
    "falling time": ("log", change_json("log.jsonl", lambda log: log[3].update(seconds=0.0, training_seconds=0.0))),
    "fewer tokens": ("log", change_json("log.jsonl", lambda log: log[-1].update(tokens=log[-1]["tokens"] - 2000))),
    "no validation": ("log", change_json("log.jsonl", lambda log: log.__delitem__(slice(1, None)))),
    "lower bits": ("masks", change_json("log.jsonl", lower_bits)),
    "lower loss": ("time", change_json("log.jsonl", lower_loss)),
    "other masks": ("masks", change_json("log.jsonl", lambda log: log[1]["validation"].update(masked_tokens=3))),
    "another baseline": ("masks", change_json("log.jsonl", lambda log: log[1]["validation"].update(unigram_loss=1.0))),
    "line removed": ("files", change_json("log.jsonl", lambda log: log.pop(0))),
    "no description": ("files", lambda entry: (entry / "README.md").unlink()),
}


def failed(output: str) -> set[str]:
    return {finding["check"] for finding in json.loads(output)["findings"] if finding["problems"]}


def test_a_packed_entry_passes(
    record: ModuleType, entry: Path, runs: list[Path], tracks: Path, prose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record.main(["check", str(entry), "--tracks", str(tracks), "--text", str(prose), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    target = report["target_bits_per_character"]
    times = []
    for run in runs:
        reached = [
            line for line in read_log(run)
            if "validation" in line and line["validation"]["bits_per_character"] <= target
        ]  # fmt: skip
        times.append(reached[0]["seconds"])
    assert report["passes"] and report["seconds"] == report["stated_seconds"] == sorted(times)[1]
    assert all(run.reevaluated for run in record.read_entry(entry).run)
    assert record.main(["check", str(entry), "--tracks", str(tracks)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 8 + 1 and lines[-1].startswith("time, median: ")


def test_an_entry_holds_no_folder_of_the_machine(entry: Path, runs: list[Path]) -> None:
    for path in entry.rglob("*.*"):
        assert str(runs[0].parent.parent) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(
    name: str, record: ModuleType, entry: Path, tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(entry, tmp_path / "copy")
    check, change = CHANGES[name]
    change(copy)
    assert record.main(["check", str(copy), "--tracks", str(tracks), "--json"]) == record.FAILED
    assert check in failed(capsys.readouterr().out)


def test_another_text_is_refused(
    record: ModuleType, entry: Path, tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text\n", encoding="utf-8")
    assert record.main(["check", str(entry), "--tracks", str(tracks), "--text", str(other), "--json"]) == record.FAILED
    assert failed(capsys.readouterr().out) == {"text"}


def test_a_log_that_contradicts_its_checkpoint_is_not_packed(
    record: ModuleType, runs: list[Path], tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = shutil.copytree(runs[1], tmp_path / "forged", symlinks=True)
    log = read_log(forged)
    for name in ("loss", "bits_per_character"):
        log[-1]["validation"][name] *= 0.9
    (forged / RunLayout.LOG).write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    folder = tmp_path / "small" / "forged"
    chosen = [str(runs[0]), str(forged), str(runs[2])]
    arguments = ["make", str(folder), *chosen, "--about", "A test.", "--author", "A", "--tracks", str(tracks)]
    assert record.main(arguments) == 2
    assert "its log says" in capsys.readouterr().err and not folder.exists()


def test_what_a_user_can_fix_is_an_error_with_a_hint(
    record: ModuleType, entry: Path, runs: list[Path], tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ["--about", "A test.", "--author", "A", "--tracks", str(tracks)]
    damaged = shutil.copytree(entry, tmp_path / "damaged")
    (damaged / "seed-1" / "env.json").write_text('{"determinism": {"threads": "x"}, "text": []}', encoding="utf-8")
    truncated = shutil.copytree(entry, tmp_path / "truncated")
    change_json("log.jsonl", lambda log: log[0].update(seconds=None))(truncated)
    for arguments, says in [
        (["check", str(tmp_path / "nothing")], "entry.toml is missing"),
        (["check", str(damaged), "--tracks", str(tracks)], "env.json"),
        (["check", str(truncated), "--tracks", str(tracks)], "log.jsonl, line 1"),
        (["make", str(tmp_path / "small" / "x"), str(damaged / "seed-1"), *shown], "env.json"),
        (["make", str(entry), *map(str, runs), *shown], "exists already"),
        (["make", str(tmp_path / "smal" / "x"), *map(str, runs), *shown], "did you mean 'small'"),
        (["make", str(tmp_path / "closed" / "x"), *map(str, runs), *shown], "has no target yet"),
        (["make", str(tmp_path / "small" / "x"), str(runs[0]), str(runs[0]), *shown], "two runs have the same seed"),
    ]:
        assert record.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and "hint: " in error


def test_runs_that_break_a_rule_are_not_packed(
    record: ModuleType, runs: list[Path], tracks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small" / "two"
    arguments = ["make", str(folder), str(runs[0]), str(runs[1]), "--about", "A test.", "--author", "A", "--json"]
    assert record.main([*arguments, "--tracks", str(tracks)]) == record.FAILED
    assert failed(capsys.readouterr().out) == {"seeds"} and not folder.exists()


def test_the_tracks_and_entries_of_the_repository_are_valid(record: ModuleType) -> None:
    tracks = record.read_tracks(record.TRACKS)
    folders = {path.name for path in record.TRACKS.parent.iterdir() if path.is_dir()}
    assert set(tracks) == folders == {"cpu-2core", "gpu-1"}
    assert all(len(track.sha256) == 64 and len(track.seeds) == 3 for track in tracks.values())
    for path in record.TRACKS.parent.glob("*/*/entry.toml"):
        assert record.check(path.parent).passes, path.parent
