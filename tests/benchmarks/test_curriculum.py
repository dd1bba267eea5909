"""benchmarks/curriculum.py: variants differ in lengths and mask rates only, and have the same training time."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from unmask.training.recipe import load_recipe

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "curriculum.py"
SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "train.threads=1",
    "stage=[{max_seq_len = 64, batch_size = '128 tokens'}]",
]  # fmt: skip


@pytest.fixture(scope="module")
def curriculum() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("curriculum", PROGRAM)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["curriculum"] = module  # its dataclasses are resolved by the name of their module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["curriculum"]


def test_the_variants_are_curricula_of_one_recipe(curriculum: ModuleType) -> None:
    base = load_recipe("char")
    recipes = {name: variant.apply_to(base, 5) for name, variant in curriculum.VARIANTS.items()}
    lengths = {name: [stage.max_seq_len for stage in recipe.stage] for name, recipe in recipes.items()}
    assert lengths["one-stage"] == [256] and lengths["two-stages"] == [64, 256]
    assert lengths["three-stages"] == lengths["mask-15"] == lengths["mask-30-to-5"] == [32, 64, 256]
    assert {stage.batch_tokens for recipe in recipes.values() for stage in recipe.stage} == {4096}
    rates = [recipes["mask-30-to-5"].objective.rate_at(progress) for progress in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([0.30, 0.175, 0.05])
    parts = curriculum.single_stages(recipes["mask-30-to-5"])
    assert [part.objective.mask_rate for part in parts] == pytest.approx([0.225, 0.1125, 0.0625])
    assert {recipe.seed for recipe in recipes.values()} == {5}


def test_a_comparison_is_printed_and_stored(
    curriculum: ModuleType, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results" / "curriculum.json"
    settings = [argument for setting in SMALL for argument in ("--set", setting)]
    arguments = [str(prose), "--seconds", "0.3", "--seeds", "1", "2", "--only", "one-stage", "--only", "mask-30-to-5"]
    assert curriculum.main([*arguments, *settings, "--results", str(results)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads(results.read_text(encoding="utf-8"))
    assert list(stored["runs"]) == ["one-stage", "mask-30-to-5"] and {"date", "machine", "command"} <= stored.keys()
    assert stored["command"].startswith("python benchmarks/curriculum.py prose.txt --seconds 0.3 --seeds 1 2")
    for name, runs in stored["runs"].items():
        assert [run["seed"] for run in runs] == [1, 2]
        planned = sum(stage["steps"] * stage["seconds_per_step"] for stage in stored["plans"][name])
        assert abs(planned - 0.3) <= sum(stage["seconds_per_step"] for stage in stored["plans"][name])
        for run in runs:
            assert run["steps"] == sum(stage["steps"] for stage in stored["plans"][name])
            assert run["curve"][-1]["step"] == run["steps"] and run["curve"][-1]["loss"] == run["loss"]
        losses = [run["loss"] for run in runs]
        assert stored["summary"][name]["loss"] == pytest.approx(sum(losses) / 2)
        assert f"| {min(losses):.4f} – {max(losses):.4f} |" in printed
    assert stored["summary"]["one-stage"]["difference"] == 0
    masked = {run["masked_tokens"] for runs in stored["runs"].values() for run in runs}
    assert len(masked) == 1, "all runs are evaluated on the same masks"
    assert "\n".join(stored["plot"]) in printed


def test_the_plot_shows_each_curve_where_it_is(curriculum: ModuleType) -> None:
    lines = curriculum.plot({"low": [(1.0, 9.0), (5.0, 1.0), (10.0, 1.0)], "high": [(5.0, 3.0), (10.0, 3.0)]})
    assert lines[0].startswith("   3.000 |") and set(lines[0].partition("|")[2].strip()) == {"b"}
    assert lines[curriculum.PLOT_LINES - 1].startswith("   1.000 |") and lines[curriculum.PLOT_LINES - 1].endswith("a")
    assert lines[-1] == "loss at the full length: a low, b high"
    assert max(map(len, lines)) <= 10 + curriculum.PLOT_COLUMNS


def test_a_missing_text_is_an_error_with_a_hint(curriculum: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert curriculum.main(["missing.txt", "--seconds", "1"]) == 2
    error = capsys.readouterr().err
    assert "error: no such file" in error and "hint: " in error
