"""Studies: every shipped one is complete, a run is stored, continued and judged, and invalid ones are refused."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unmask.checks.studies import PLOT, RESULT, TABLE, load_study, run_study, shipped_studies
from unmask.checks.studies.measures import CURVES, MEASURES, task_examples, tokens_until, with_masks
from unmask.checks.studies.results import by_variant, compared, judge, summarize, table, write_plot
from unmask.checks.studies.run import read_text, steps_of_seconds
from unmask.checks.studies.settings import ExpectedConfig, Study
from unmask.cli import main
from unmask.core.config import dump_config
from unmask.core.distributed import init_distributed
from unmask.core.errors import ModelError, RecipeError, RunError, StoreError, TextError
from unmask.training.display import Display

SMALL = [
    "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
    "model.num_attention_heads=2", "model.intermediate_size=16", "data.held_out.max_size='500 characters'",
    "stage=[{max_seq_len = 32, batch_size = '128 tokens'}]",
]  # fmt: skip
STUDY = """\
question = "Is a mask rate of 80 % too high?"
source = "a test"
recipe = "char"
settings = ["train.threads=1", "train.every={log = '1 steps', validate = '2 steps', save = '2 steps'}"]
budget = "4 steps"
seeds = 2
measures = ["loss", "mask_accuracy", "prompt"]
probe = { train_examples = 20, test_examples = 20, epochs = 1 }
[prompt]
text = "the c[MASK]t"
answer = "a"
[quick]
budget = "2 steps"
[[variant]]
name = "30 %"
[[variant]]
name = "80 %"
settings = ["objective.mask_rate=0.8"]
[[expected]]
measure = "loss"
variant = "80 %"
against = "30 %"
at_least = -100.0
basis = "a bound that always holds"
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A study of two variants, with a model for tests."""
    path = tmp_path / "small" / "study.toml"
    path.parent.mkdir()
    path.write_text(STUDY)
    return path


# Shipped studies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_is_complete(name: str) -> None:
    study = load_study(name)
    config = study.config
    recipes = {variant.name: dump_config(study.recipe(variant, 1)) for variant in config.variant}
    assert len(set(recipes.values())) == len(recipes), "two variants are the same run"
    assert set(config.measures) <= set(MEASURES) and config.plot.y in CURVES
    assert len(study.seeds) >= 3 and config.source
    for expected in config.expected:
        assert expected.measure in config.measures and expected.basis
    quick = load_study(name, quick=True)
    for variant in config.variant:
        recipe = quick.recipe(variant, 1)
        assert recipe.train.threads == 1, "processor time is that of an idle machine with one thread only"
        assert not recipe.train.keep_best, "the last model is measured"
        assert quick.budget_of(variant).unit == study.budget_of(variant).unit
        assert quick.budget_of(variant).number < study.budget_of(variant).number


def test_there_is_a_study_for_each_claim() -> None:
    assert shipped_studies() == [
        "causal-signal", "mask-rate", "mask-replacement", "objectives", "plateau", "sentence-pairs", "short-first",
    ]  # fmt: skip


def test_variants_differ_in_what_the_study_is_about() -> None:
    study = load_study("short-first")
    recipes = {variant.name: study.recipe(variant, 5) for variant in study.config.variant}
    lengths = {name: [stage.max_seq_len for stage in recipe.stage] for name, recipe in recipes.items()}
    assert lengths["one stage"] == [256] and lengths["two stages"] == [64, 256]
    assert {tuple(lengths[name]) for name in lengths if name.startswith("three")} == {(32, 64, 256)}
    assert {stage.batch_tokens for recipe in recipes.values() for stage in recipe.stage} == {4096}
    falling: Any = recipes["three stages, 30 to 5 %"].objective
    assert [falling.rate_at(progress) for progress in (0.0, 1.0)] == pytest.approx([0.30, 0.05])
    signal = load_study("causal-signal", quick=True)
    budgets = {variant.name: signal.budget_of(variant).number for variant in signal.config.variant}
    assert budgets["causal, 15 % of the tokens"] == pytest.approx(0.15 * budgets["causal"])


# Running --------------------------------------------------------------------------------------------------------------


def test_a_study_is_run_stored_and_continued(small: Path, prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study = load_study(str(small), seeds=1, settings=SMALL)
    first = run_study(study, [prose], out=out)
    assert {path.name for path in out.iterdir()} - {PLOT} == {RESULT, TABLE}
    assert json.loads((out / RESULT).read_text()) == first
    assert [(run["variant"], run["seed"], run["steps"]) for run in first["runs"]] == [("30 %", 1, 4), ("80 %", 1, 4)]
    for run in first["runs"]:
        curve = run["curve"]
        assert [point["step"] for point in curve] == [2, 4] and run["measures"]["loss"] == curve[-1]["loss"]
        assert 0 < run["measures"]["prompt"] < 1 and run["measures"]["prompt"] == curve[-1]["prompt"]
        assert 0 <= run["measures"]["mask_accuracy"] <= 1
    predicted = [run["curve"][-1]["predicted"] for run in first["runs"]]
    assert predicted[1] / predicted[0] == pytest.approx(0.8 / 0.3, rel=0.1)
    assert first["expected"][0]["verdict"] == "not judged", "one seed has no noise"

    more = run_study(load_study(str(small), settings=SMALL), [prose], out=out)
    assert more["runs"][0] == first["runs"][0], "a run that is done is not repeated"
    assert [(run["variant"], run["seed"]) for run in more["runs"]] == [
        ("30 %", 1), ("30 %", 2), ("80 %", 1), ("80 %", 2),
    ]  # fmt: skip
    assert more["expected"][0]["verdict"] == "holds"
    written = (out / TABLE).read_text()
    assert "## loss" in written and f"{more['summary']['loss']['80 %']['mean']:.4f}" in written
    fewer = run_study(study, [prose], out=out)
    assert fewer["runs"] == more["runs"], "runs of further seeds are kept"


class Kept(Display):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, message: str) -> None:
        self.messages.append(message)


def test_a_changed_setting_repeats_the_runs(small: Path, prose: Path, tmp_path: Path) -> None:
    first = run_study(load_study(str(small), seeds=1, settings=SMALL), [prose], out=tmp_path / "out")
    changed = load_study(str(small), seeds=1, settings=[*SMALL, "optimizer.lr=1e-9"])
    display = Kept()
    second = run_study(changed, [prose], out=tmp_path / "out", display=display)
    assert any("2 earlier runs have another recipe, text or version" in message for message in display.messages)
    keys = [{run["key"] for run in result["runs"]} for result in (first, second)]
    assert not keys[0] & keys[1] and len(second["runs"]) == 2


@pytest.mark.parametrize("quick", [False, True])
def test_the_budget_of_the_user_replaces_that_of_the_study(small: Path, quick: bool) -> None:
    study = load_study(str(small), quick=quick, budget="3 steps")
    recipe = study.recipe(study.config.variant[0], 1)
    assert str(study.budget) == str(recipe.train.budget) == "3 steps"


class Interrupting(Display):
    """Sends Ctrl-C to this process when the result of a run is shown."""

    def message(self, message: str) -> None:
        if ": loss " in message:
            signal.raise_signal(signal.SIGINT)


def test_a_signal_after_a_run_does_not_lose_its_result(small: Path, prose: Path, tmp_path: Path) -> None:
    study = load_study(str(small), seeds=1, budget="2 steps", settings=SMALL)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs that ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(study, [prose], out=tmp_path / "out", display=Interrupting())
    finally:
        signal.signal(signal.SIGINT, before)
    kept = json.loads((tmp_path / "out" / RESULT).read_text())["runs"]
    assert [run["variant"] for run in kept] == ["30 %"]
    result = run_study(study, [prose], out=tmp_path / "out")
    assert len(result["runs"]) == 2 and result["runs"][0] == kept[0], "seconds included: it was not repeated"


def test_a_stopped_study_keeps_the_runs_that_are_done(small: Path, prose: Path, tmp_path: Path) -> None:
    out, study = tmp_path / "out", load_study(str(small), seeds=1, settings=SMALL)
    first = run_study(study, [prose], out=out)
    stopped = {**first, "runs": first["runs"][:1]}
    (out / RESULT).write_text(json.dumps(stopped))
    again = run_study(study, [prose], out=out)
    assert again["runs"][0] == first["runs"][0]
    for name in ("key", "measures", "tokens"):
        assert again["runs"][1][name] == first["runs"][1][name], "a repeated run gives the same numbers"


def test_a_shipped_study_runs_on_the_documentation_of_python(tmp_path: Path) -> None:
    once = "train.every={log = '1 steps', validate = '8 steps', save = '8 steps'}"
    study = load_study("causal-signal", quick=True, budget="8 steps", settings=[*SMALL, once])
    result = run_study(study, out=tmp_path / "out")
    assert result["text"]["name"] == "documentation of Python"
    steps = {run["variant"]: run["steps"] for run in result["runs"]}
    assert steps == {"causal": 8, "causal, 15 % predicted": 8, "causal, 15 % of the tokens": 1, "mlm": 8}
    predicted = {run["variant"]: run["curve"][-1]["predicted"] for run in result["runs"]}
    assert predicted["causal, 15 % predicted"] / predicted["causal"] == pytest.approx(0.15, rel=0.1)
    assert predicted["mlm"] / predicted["causal"] == pytest.approx(0.15, rel=0.1)
    assert all(0 <= run["measures"]["shift_accuracy"] <= 1 for run in result["runs"])


def test_budgets_in_seconds_become_steps(prose: Path) -> None:
    study = load_study("short-first", quick=True, budget="1 s", settings=SMALL[:-1])
    variants = {variant.name: variant for variant in study.config.variant[:2]}
    recipes = {
        name: study.recipe(variant, 1) for name, variant in variants.items()
    }  # fmt: skip
    context = init_distributed("float32", 1)
    timed = steps_of_seconds(recipes, prose, context, True, lambda task, fraction: None)
    assert [len(timed["step_seconds"][name]) for name in recipes] == [1, 2]
    for name, steps in timed["steps"].items():
        longest = max(timed["step_seconds"][name])
        assert steps >= 1 and steps * min(timed["step_seconds"][name]) <= 1 + longest


def test_the_command_prints_what_it_wrote(
    small: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unmask", "study", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    settings = [part for setting in SMALL for part in ("--set", setting)]
    arguments = ["run", str(small.parent), "--quick", "--text", str(prose), "--out", str(tmp_path / "out"), *settings]
    code, printed, progress = command(*arguments)
    assert code == 0 and "80 %, seed 1 (2 of 2): loss" in progress
    result = json.loads((tmp_path / "out" / RESULT).read_text())
    assert f"{result['summary']['loss']['30 %']['mean']:.4f}" in printed and "nothing is judged" in printed
    assert result["quick"] and result["command"].startswith("unmask study run small --quick --text prose.txt")
    code, printed, _ = command(*arguments, "--json")
    assert code == 0 and json.loads(printed)["runs"] == result["runs"]
    code, printed, _ = command("list", "--json")
    assert [each["name"] for each in json.loads(printed)] == shipped_studies()
    code, printed, _ = command("show", "mask-replacement")
    assert code == 0 and "0/100/0   objective.mask_token_rate=0.0" in printed
    code, _, error = command("run", "mask-rat", "--text", str(prose))
    assert code == 2 and "did you mean `mask-rate`?" in error and "hint: " in error


# Results --------------------------------------------------------------------------------------------------------------

Losses = dict[str, list[Any]]
LOSSES = st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=2, max_size=6)


def runs_of(losses: Losses, curve: Callable[[float], list[dict[str, float]]] = lambda loss: []) -> list[dict[str, Any]]:
    return [
        {"variant": name, "seed": seed, "measures": {"loss": loss}, "curve": curve(loss)}
        for name, values in losses.items()
        for seed, loss in enumerate(values, start=1)
    ]


def study_of(small: Path, **bounds: float) -> Study:
    study = load_study(str(small))
    expected = ExpectedConfig("loss", "80 %", "30 %", "a test", **bounds)
    return replace(study, config=replace(study.config, expected=(expected,)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LOSSES)
def test_differences_are_taken_seed_by_seed(pairs: list[tuple[float, float]]) -> None:
    runs = {"a": runs_of({"a": [one for one, _ in pairs]}), "b": runs_of({"b": [two for _, two in pairs]})}
    differences = [two - one for one, two in pairs]
    row = summarize(runs, ["loss"])["loss"]["b"]
    assert row["difference"] == pytest.approx(statistics.fmean(differences))
    assert row["noise"] == pytest.approx(statistics.stdev(differences))
    assert compared(runs, "loss", "b", "a", "ratio") == pytest.approx([two / one for one, two in pairs])


def test_a_missing_seed_or_figure_is_not_compared() -> None:
    runs = {"a": runs_of({"a": [1.0, 2.0]}), "b": runs_of({"b": [1.5]})}
    assert compared(runs, "loss", "b", "a") == [0.5]
    runs["b"][0]["measures"]["loss"] = None
    assert compared(runs, "loss", "b", "a") == [] and "b" not in summarize(runs, ["loss"])["loss"]


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"at_least": 0.4, "at_most": 0.6}, "holds"),
        ({"at_least": 0.6}, "within noise"),  # the mean is 0.5, its noise 0.1
        ({"at_least": 0.4}, "within noise"),
        ({"at_least": 0.29}, "holds"),
        ({"at_least": 0.71}, "fails"),
        ({"at_most": 0.29}, "fails"),
    ],
)
def test_an_expected_figure_is_judged_by_the_noise(small: Path, bounds: dict[str, float], verdict: str) -> None:
    study = study_of(small, **bounds)
    runs = by_variant(study, runs_of({"30 %": [1.0, 1.0, 1.0], "80 %": [1.4, 1.5, 1.6]}))
    judged = judge(study, runs)[0]
    assert judged["verdict"] == verdict
    assert judged["mean"] == pytest.approx(0.5) and judged["noise"] == pytest.approx(0.1)
    assert judge(replace(study, quick=True), runs)[0]["verdict"] == "not judged"


def test_the_table_marks_differences_beyond_the_noise(small: Path) -> None:
    study = study_of(small, at_least=0.0)

    def rows(losses: Losses) -> str:
        runs = runs_of(losses)
        groups = by_variant(study, runs)
        facts: dict[str, Any] = {
            "runs": runs, "summary": summarize(groups, ["loss"]), "expected": judge(study, groups), "seeds": [1, 2],
            "variants": losses, "budget": "4 steps", "date": "2026-01-01", "versions": {"unmask": "0", "torch": "0"},
            "text": {"name": "prose", "characters": 1000}, "machine": {"processor": "a CPU", "threads": 1},
        }  # fmt: skip
        return table(study, facts)

    assert "| 80 % | 2.0500 | 2.0000 – 2.1000 | +1.0500 | 0.1414 | differs |" in rows(
        {"30 %": [1.0, 1.0], "80 %": [2.0, 2.1]}
    )
    assert "| 80 % | 1.5000 | 1.0000 – 2.0000 | +0.5000 | 1.4142 |  |" in rows({"30 %": [1.0, 1.0], "80 %": [1.0, 2.0]})
    missing = rows({"30 %": [None, None], "80 %": [1.0, 2.0]})
    assert "against 30 %" in missing and "| 80 % | 1.5000 | 1.0000 – 2.0000 |  |  |  |" in missing
    assert "| 30 % | – |" in missing


def test_the_plot_has_a_curve_for_each_variant(small: Path, tmp_path: Path) -> None:
    study = load_study(str(small))

    def curve(loss: float) -> list[dict[str, float]]:
        return [{"tokens": tokens, "loss": loss / tokens, "unigram_loss": 3.0} for tokens in (1, 2, 3)]

    runs = by_variant(study, runs_of({"30 %": [1.0, 1.2], "80 %": [2.0, 2.2]}, curve))
    written = write_plot(tmp_path / PLOT, runs, study.config.plot)
    if importlib.util.find_spec("matplotlib") is None:
        assert not written and not (tmp_path / PLOT).exists()
        pytest.skip("matplotlib is not installed (extra `studies`)")
    svg = (tmp_path / PLOT).read_text()
    assert "30 %" in svg and "80 %" in svg and "unigram" in svg
    write_plot(tmp_path / "again.svg", runs, study.config.plot)
    assert (tmp_path / "again.svg").read_text() == svg, "equal results give equal files"
    write_plot(tmp_path / "one.svg", runs, replace(study.config.plot, variants=("80 %",)))
    assert "30 %" not in (tmp_path / "one.svg").read_text()


def test_tokens_until_a_loss_are_interpolated() -> None:
    curve = [{"tokens": 1e6, "loss": 4.0}, {"tokens": 2e6, "loss": 2.0}, {"tokens": 3e6, "loss": 2.5}]
    assert tokens_until(curve, 3.0) == 1.5 and tokens_until(curve, 5.0) == 1.0 and tokens_until(curve, 1.0) is None


# Texts and tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", ["file", "blank-line"])
def test_unseen_text_is_in_no_run(document: str, prose: Path, small: Path) -> None:
    study = load_study(str(small), settings=[f"data.document={document}"])
    text = read_text([prose], study.recipe(study.config.variant[0], 1), 10**6)
    share = sum(map(len, text.test)) / sum(map(len, [*text.train, *text.test]))
    assert 0.02 < share < 0.1
    if document == "file":
        assert "".join([*text.train, *text.test]).split() == prose.read_text().split()
    else:
        documents = [part.strip() for part in prose.read_text().split("\n\n")]
        assert len(text.train) + len(text.test) == len(documents) and documents[19] in map(str.strip, text.test)


@pytest.mark.parametrize("content", ["ACGT" * 2000, "第 " + "一二三四" * 2000], ids=["DNA", "Chinese"])
def test_text_without_spaces_is_divided_too(content: str, tmp_path: Path, small: Path) -> None:
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    study = load_study(str(small))
    text = read_text([tmp_path / "text.txt"], study.recipe(study.config.variant[0], 1), 10**6)
    (train,), (test,) = text.train, text.test
    assert train + test == content and len(test) == len(content) // 20


def test_masks_hide_words_of_an_example() -> None:
    rows = [{"text": " ".join(f"w{number}" for number in range(20)), "label": "kept"} for _ in range(200)]
    masked = with_masks(rows, seed=1)
    assert masked == with_masks(rows, seed=1) != with_masks(rows, seed=2)
    words = [one for row in masked for one in zip(row["text"].split(), rows[0]["text"].split(), strict=True)]
    assert {shown for shown, word in words if shown != word} == {"[MASK]"} and masked[0]["label"] == "kept"
    assert sum(shown == "[MASK]" for shown, _ in words) / len(words) == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("task", ["shift", "next", "order"])
def test_task_examples_are_balanced_and_true(task: Any, prose: Path) -> None:
    documents = [" ".join(f"w{number}" for number in range(k, k + 100)) for k in range(0, 5000, 100)]
    rows = task_examples(task, documents, 100, seed=3)
    assert rows == task_examples(task, documents, 100, seed=3) and len(rows) == 100
    labels = [row["label"] for row in rows]
    assert labels.count(labels[0]) == 50
    for row in rows:
        numbers = [int(word[1:]) for word in row["text"].split()]
        if task == "shift":
            assert (numbers == sorted(numbers)) == (row["label"] == "kept")
            assert sum(a > b for a, b in pairwise(numbers)) == (row["label"] == "shifted")
        else:
            second = [int(word[1:]) for word in row["text2"].split()]
            assert (second[0] == numbers[-1] + 1) == (row["label"] == "true")
            if task == "order" and row["label"] == "false":
                assert numbers[0] == second[-1] + 1
    with pytest.raises(TextError, match="expected at least 20"):
        task_examples(task, documents[:1], 100, seed=3)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('measures = ["loss"', 'measures = ["los"', "unknown name `los`: did you mean `loss`?"),
        ('variant = "80 %"', 'variant = "90 %"', "unknown name `90 %`"),
        ("[prompt]", '[plot]\nvariants = ["90 %"]\n[prompt]', "unknown name `90 %`"),
        ('name = "80 %"', 'name = "30 %"', "invalid variants"),
        ("at_least = -100.0", "at_least = 2.0\nat_most = 1.0", "invalid bounds"),
        ("at_least = -100.0", "", "invalid bounds"),
        ('budget = "4 steps"', 'budget = "4 texts"', "invalid budget"),
        ('budget = "4 steps"', 'budget = "0 steps"', "invalid budget: got 0 steps"),
        ("objective.mask_rate=0.8", "objective.mask_rte=0.8", "mask_rte"),
        ('[prompt]\ntext = "the c[MASK]t"\nanswer = "a"\n', "", "needs a prompt"),
    ],
)
def test_an_invalid_study_is_refused(small: Path, before: str, after: str, says: str) -> None:
    text = small.read_text()
    assert before in text
    small.write_text(text.replace(before, after))
    with pytest.raises(RecipeError, match=re.escape(says)) as refused:
        load_study(str(small))
    assert "hint: " in str(refused.value)


def test_other_files_are_not_overwritten(small: Path, prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("keep")
    study = load_study(str(small), seeds=1, settings=SMALL)
    with pytest.raises(RunError, match="has no results of a study"):
        run_study(study, [prose], out=out)
    (out / RESULT).write_text(json.dumps({"study": "mask-rate", "quick": False}))
    with pytest.raises(RunError, match="results of the study `mask-rate`"):
        run_study(study, [prose], out=out)
    (out / RESULT).write_text(json.dumps({"study": study.name, "quick": False, "runs": [{}]}))
    with pytest.raises(RunError, match="this file has no results of a study"):
        run_study(study, [prose], out=out)
    assert {path.name for path in out.iterdir()} == {"notes.txt", RESULT}
    other = tmp_path / "other" / "work"  # a folder of the user
    other.mkdir(parents=True)
    (other / "train.jsonl").write_text("keep")
    with pytest.raises(RunError, match="has no results of a study"):
        run_study(study, [prose], out=other.parent)
    assert (other / "train.jsonl").read_text() == "keep"


def test_a_refused_study_leaves_nothing(small: Path, prose: Path, tmp_path: Path) -> None:
    study = load_study(str(small), seeds=1, settings=SMALL)
    with pytest.raises(TextError):
        run_study(study, [tmp_path / "missing.txt"], out=tmp_path / "new")
    (tmp_path / "empty").mkdir()
    small.write_text(small.read_text().replace('answer = "a"', 'answer = "☃"'))
    for out in (tmp_path / "new" / "study", tmp_path / "empty"):
        with pytest.raises(ModelError, match="no token"):
            run_study(load_study(str(small), seeds=1, settings=SMALL), [prose], out=out)
    with pytest.raises(StoreError):
        run_study(study, [prose], out=small / "study")  # below a file
    assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())
