"""The page of a report: what it shows of one run and of several, and that text can't become code."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import unmask
from unmask.cli import main
from unmask.core.errors import Stopped
from unmask.report.page import words
from unmask.report.write import report_at_end, write_report
from unmask.training.estimate.memory import stage_flops_per_token
from unmask.training.loggers import read_log
from unmask.training.pretrain import launch
from unmask.training.runs import run_lock

MAX_BYTES = 3_000_000
WITHOUT_SCRIPTS = re.compile(r"<script.*?</script>|<style.*?</style>", re.DOTALL)


def data_of(page: str) -> Mapping[str, Any]:
    found = re.search(r'<script id="report-data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def text_of(page: str) -> str:
    """The words of a page as a browser shows them."""
    plain = re.sub(r"<[^>]+>", " ", WITHOUT_SCRIPTS.sub(" ", page))
    return " ".join(plain.split())


@pytest.fixture(scope="session")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(runs / "first", tmp_path_factory.mktemp("report") / "report.html")
    assert path.stat().st_size < MAX_BYTES
    return path.read_text(encoding="utf-8")


def test_the_points_are_those_of_the_log(page: str, runs: Path) -> None:
    log = list(read_log(runs / "first" / "log.jsonl"))
    data = data_of(page)
    training = [line for line in log if "learning_rate" in line]
    assert [row["step"] for row in data["tables"]["training"]] == [1, 2, 3, 4, 5, 6]
    for row, line in zip(data["tables"]["training"], training, strict=True):
        assert row["tokens"] == line["tokens"] and row["loss"] == pytest.approx(line["loss"], rel=1e-4)
    (border,) = data["tables"]["borders"]
    run = unmask.Run(runs / "first")
    assert border["step"] == run.plan.stages[1].first_step and border["label"] == "64 → 256"
    vocabulary = json.loads((runs / "first" / "env.json").read_text())["text"]["facts"]["vocabulary"]
    for row in data["tables"]["training"]:
        if row["step"] <= border["step"]:
            expected = row["tokens"] * stage_flops_per_token(run.recipe, 0, vocabulary)
            assert row["flops"] == pytest.approx(expected, rel=1e-4)
    assert [row["step"] for row in data["tables"]["validation"]] == [2, 4, 6]
    (unigram,) = data["tables"]["unigram"]
    assert unigram["loss"] == pytest.approx(log[-1]["validation"]["unigram_loss"], rel=1e-4)


def test_the_details_are_those_of_the_best_model_on_the_held_out_text(page: str, runs: Path) -> None:
    best = unmask.Run(runs / "first").summary
    found = re.search(
        r"The model of step (\d+) on ([\d,]+) masked tokens of held-out text: loss ([\d.]+)", text_of(page)
    )
    assert found and int(found[1]) == best.best_step and float(found[3]) == pytest.approx(best.best_loss, abs=1e-3)
    tables = data_of(page)["tables"]
    places = {row["name"] for row in tables["groups-by_place_in_word-0"]}
    assert places == {"@w:whole word", "@w:first token of a word", "@w:inner token of a word"}
    assert sum(row["masked_tokens"] for row in tables["calibration-0"]) == int(found[2].replace(",", ""))


def test_the_page_says_what_is_needed_to_repeat_the_run(page: str, runs: Path) -> None:
    text = text_of(page)
    environment = json.loads((runs / "first" / "env.json").read_text())
    assert environment["text"]["fingerprint"] in text and environment["determinism"]["torch"] in text
    assert "hidden_size = 32" in text and "unmask pretrain prose.txt --recipe first/recipe.toml" in text
    digests = json.loads((runs / "first" / "best" / "digests.json").read_text())
    assert digests["model.safetensors"]["digest"] in text
    assert "None were evaluated" in text and "None was found" in text, "what is missing takes one line"


def test_text_can_t_become_code(page: str, hostile: str) -> None:
    assert "alert(1)</script>" not in page and "<b>the cat" not in page
    spans = data_of(page)["sentences"][0]["steps"][-1]["lines"][0]
    assert "".join(text if state == "plain" else truth for text, state, truth in spans) == hostile
    assert len(data_of(page)["sentences"][0]["steps"]) == 3, "one for each validation"


def test_nothing_is_loaded(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#)[^\"']*", WITHOUT_SCRIPTS.sub("", page))


def test_every_word_is_used_and_has_the_same_values_in_both_languages(page: str) -> None:
    source = Path(sys.modules["unmask.report.page"].__file__ or "").parent
    code = "".join(path.read_text(encoding="utf-8") for name in ("*.py", "page.js") for path in source.glob(name))
    computed = re.compile(
        r"(state|axis|axis_time|theme)_|letters|digits|punctuation|other|.* token|.* word|.mask.|unchanged"
    )
    for key, (english, korean) in words().items():
        assert english and korean and sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", korean))
        assert computed.match(key.lower()) or re.search(rf"""["':]{key}["']""", code), f"no code names {key}"
    assert set(re.findall(r'data-t="([^"]+)"', page)) <= set(words())


def test_several_runs_are_compared_within_a_tokenizer(runs: Path, tmp_path: Path) -> None:
    names = ("first", "second", "letters")
    path = write_report([runs / name for name in names], tmp_path / "compare.html")
    page = path.read_text(encoding="utf-8")
    data, text = data_of(page), text_of(page)
    assert path.stat().st_size < MAX_BYTES
    assert {(row["run"], row["group"]) for row in data["tables"]["validation"]} == {
        ("first", 0), ("second", 0), ("letters", 1),
    }  # fmt: skip
    assert {"loss-0", "loss-1"} <= set(data["charts"]) and "loss-2" not in data["charts"]
    assert "These runs have 2 tokenizers" in text
    assert "optimizer.lr" in text and "0.0001" in text, "a setting that differs, and its value"
    alone = write_report([runs / "first", runs / "second"], tmp_path / "two.html").read_text(encoding="utf-8")
    assert "tokenizers. Losses" not in text_of(alone)


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of the first run that a test may damage."""
    return Path(shutil.copytree(runs / "first", tmp_path / "run", symlinks=True))


def test_a_run_that_trains_or_was_killed_is_reported(run: Path) -> None:
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(log[:4]) + log[4][:40])
    with run_lock(run):
        page = write_report(run).read_text(encoding="utf-8")
    assert "This run is still training" in text_of(page)
    assert len(data_of(page)["tables"]["training"]) < 6, "without the line that was half written"
    (run / "log.jsonl").write_text(log[0])
    shutil.rmtree(run / "best")
    (run / "latest").unlink()
    text = text_of(write_report(run).read_text(encoding="utf-8"))
    assert "No validation yet." in text and "Not available: they need" in text


def test_a_log_that_was_changed_can_t_become_code(run: Path) -> None:
    state = '"><img src=x onerror=alert(1)>'
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for spans in (spans for line in lines for spans in line.get("preview", ())):
        spans[0]["state"] = state
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(run).read_text(encoding="utf-8")
    assert data_of(page)["sentences"][0]["steps"][-1]["lines"][0][0][1] == state
    assert "<img" not in WITHOUT_SCRIPTS.sub("", page)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_not_utf_8_is_reported(run: Path) -> None:
    named = run.rename(run.with_name(os.fsdecode(b"caf\xe9")))
    assert "<h1>caf?</h1>" in write_report(named).read_text(encoding="utf-8")


Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """`unmask report` that ends with a user error and writes nothing: its message."""

    def report(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["unmask", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        err = " ".join(capfd.readouterr().err.split())
        assert ended.value.code == 2 and "Traceback" not in err and " hint: " in err, err
        return err

    return report


def test_what_can_t_be_reported_is_refused(refused: Refused, run: Path, tmp_path: Path) -> None:
    assert "recipe.toml is missing" in refused(tmp_path)
    assert "a run is named twice" in refused(run, run)
    assert "expected 1 to 24" in refused(*[run] * 25)
    assert "the report is an HTML file" in refused(run, "--out", run / "report.txt")
    assert "can't read this file" in refused(run, "--finetuned", tmp_path / "no")
    (tmp_path / "scores").mkdir()
    for damaged in ('{"model": "run"}', "[]", '{"main_metric": 1, "rows": 2, "model": "a\\u0000"}'):
        (tmp_path / "scores" / "finetune.json").write_text(damaged)
        assert "this is not a result of `unmask finetune`" in refused(run, "--finetuned", tmp_path / "scores")
    environment = (run / "env.json").read_text()
    cases = (("platform", 1, "platform is not a string"), ("text", {"paths": "a"}, "text.paths is not"))
    for key, value, says in cases:
        (run / "env.json").write_text(json.dumps(json.loads(environment) | {key: value}))
        assert f"invalid env.json: {says}" in refused(run)
    (run / "env.json").write_text(environment)
    (run / "log.jsonl").rename(run / "log")
    assert "nothing to report" in refused(run)
    (run / "log.jsonl").write_text("")
    assert "nothing to report" in refused(run)
    (run / "log.jsonl").write_text('nothing\n{"step": 1}\n')
    assert "log.jsonl, line 1" in refused(run)
    (run / "log.jsonl").write_text('{"step": 1, "tokens": 1}\n')
    assert "invalid log line of step 1: got no number 'seconds'" in refused(run)
    assert not (run / "report.html").exists()


def test_the_package_that_is_missing_is_named(refused: Refused, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # as if it were not installed
    assert 'pip install "unmask[report]"' in refused(run)
    lines: list[str] = []
    with report_at_end(lines.append) as ended:
        ended(run)
    assert len(lines) == 1 and 'pip install "unmask[report]"' in lines[0] and not (run / "report.html").exists()


# At the end of a run --------------------------------------------------------------------------------------------------


def test_pretrain_and_resume_write_it(
    prose: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [word for setting in small for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["unmask", "pretrain", str(prose), "--out", "run", "--budget", "2 steps", *common])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "report: run/report.html\n" in capfd.readouterr().out
    assert "Finished after 2 steps." in text_of(Path("run/report.html").read_text(encoding="utf-8"))
    unmask.resume("run", budget="+1 steps")
    assert "report: run/report.html\n" in capfd.readouterr().out
    assert "Finished after 3 steps." in text_of(Path("run/report.html").read_text(encoding="utf-8"))
    before = os.stat("run/report.html").st_mtime_ns
    unmask.resume("run")  # which is finished
    unmask.resume("run", budget="+1 steps", settings={"train.report": False}, display=None)
    assert os.stat("run/report.html").st_mtime_ns == before and not capfd.readouterr().out.count("report: ")


def test_a_run_that_a_signal_stopped_has_one(run: Path) -> None:
    lines: list[str] = []
    with pytest.raises(Stopped), report_at_end(lines.append):
        raise Stopped(130, str(run), 6)
    assert lines == [f"report: {run / 'report.html'}"] and (run / "report.html").is_file()


def test_a_report_that_fails_does_not_fail_the_run(run: Path) -> None:
    environment = json.loads((run / "env.json").read_text())
    del environment["platform"]
    (run / "env.json").write_text(json.dumps(environment))
    lines: list[str] = []
    with report_at_end(lines.append) as ended:
        ended(run)
    assert lines == ["report: not written: invalid env.json: platform is missing"]


def test_other_ranks_write_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with report_at_end(pytest.fail) as ended:
        ended(run)
    assert not (run / "report.html").exists()


# Further results ------------------------------------------------------------------------------------------------------


def test_pairs_and_fine_tuning(prose: Path, small: list[str], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("the cat sat on the mat\tthe cat sat the on mat\na dog ran\tran a dog\n")
    settings = [*small, "train.budget=2 steps", f"train.evaluate.pairs='{pairs}'", "train.evaluate.every=1 steps"]
    run = tmp_path / "run"
    launch([prose], recipe="tiny", out=run, settings=settings)
    score = {"accuracy": {"mean": 0.81, "standard_error": 0.01}}
    result = {
        "task": "classify", "model": str(run / "best"), "main_metric": "accuracy", "seeds": [{}, {}],
        "rows": [{"name": "fine-tuned", "runs": 2, "valid": score, "test": {}}], "best_seed": 1,
        "confusion": {"split": "valid", "labels": ["<bad>", "good"], "counts": [[1234, 7], [8, 9]]},
    }  # fmt: skip
    for name, model in (("reviews", run / "best"), ("others", tmp_path / "another")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "finetune.json").write_text(json.dumps({**result, "model": str(model)}))
    page = write_report(run).read_text(encoding="utf-8")
    steps = [row["step"] for row in data_of(page)["tables"]["pairs-0"] if row["method"] == "original"]
    assert steps == [1, 2] and "2 pairs of" in text_of(page)
    assert "reviews: task classify" in text_of(page) and "81.00 % ± 1.00" in text_of(page)
    assert "of seed 1" in text_of(page) and '<td>&lt;bad&gt;</td><td class="n">1,234</td>' in page
    assert "others: task" not in text_of(page)
    (tmp_path / "others" / "finetune.json").write_text(json.dumps({"model": str(run)}))
    assert "others" not in text_of(write_report(run).read_text(encoding="utf-8")), "a damaged one is left out"
    (tmp_path / "others" / "finetune.json").write_text(json.dumps({**result, "model": str(tmp_path / "another")}))
    with pytest.raises(unmask.UnmaskError, match="not the result of a fine-tuning of these runs"):
        write_report(run, finetuned=[tmp_path / "others"])
