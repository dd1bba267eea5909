"""The Python API: keywords equal the options of the commands, errors name keywords, and a cell can run twice."""

from __future__ import annotations

import ast
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

import unmask
from unmask.cli import app, main
from unmask.core.errors import RecipeError, RunError, Stopped, TextError, UnmaskError
from unmask.core.keywords import python_words, setting_texts
from unmask.training.display import Display

SOURCE = Path(unmask.__file__).parent
SMALL: dict[str, Any] = {
    "data": {"tokenizer": {"kind": "characters"}},
    "model.num_hidden_layers": 1,
    "model": {"hidden_size": 32, "num_attention_heads": np.int64(2)},
    "model.intermediate_size": 32,
    "train": {"every": {"validate": "2 steps", "save": "2 steps"}, "threads": 1},
    "stage": ({"until": "100%", "max_seq_len": 24, "batch_size": "256 tokens"},),
}


def train(prose: Path, out: Path, **more: Any) -> unmask.Model:
    return unmask.pretrain(prose, **{"out": out, "budget": "4 steps", "settings": SMALL, "display": None, **more})


@pytest.fixture(scope="module")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "run"
    train(prose, folder)
    return folder


# Keywords and options -------------------------------------------------------------------------------------------------

ONLY_COMMAND = {"as_json", "quiet", "debug", "help", "allow_code"}  # how a command prints; code imports plugins itself
RENAMED = {"folder": "folder", "text": "texts", "set": "settings", "from": "start"}
ONLY_PYTHON = {"display"}


@pytest.mark.parametrize(
    ("command", "functions", "apart"),
    [
        ("pretrain", ("pretrain", "resume"), {"resume", "moved_texts", "run"}),
        ("evaluate", ("evaluate", "evaluate_minimal_pairs"), {"context", "on_progress", "details", "predictions"}),
        ("export", ("export",), {"on_progress"}),
        ("embed", ("embed",), {"file", "out", "force", "document", "field", "errors", "on_progress"}),
        ("import", ("import_model",), set()),
        # A command reads a file or standard input, and prints.
        ("fill", ("fill", "fill_jointly"), {"file", "strict", "text", "texts", "joint", "method", "on_progress"}),
    ],
)
def test_keywords_are_the_options_of_the_command(command: str, functions: tuple[str, ...], apart: set[str]) -> None:
    options = {parameter.name for parameter in typer.main.get_command(app).commands[command].params}  # pyright: ignore
    keywords = {name for function in functions for name in inspect.signature(getattr(unmask, function)).parameters}
    assert options - ONLY_COMMAND - apart == keywords - ONLY_PYTHON - apart


def test_settings_may_be_nested_dotted_or_texts() -> None:
    value = {"a.b": True, "c": {"d": 0.5, "e": {"f": Path("x/y")}}, "g": [{"h": 'say "hi"'}], "i": np.float64(2)}
    assert setting_texts(value) == [
        "a.b=true", "c.d=0.5", 'c.e.f="x/y"', 'g=[{"h" = "say \\"hi\\""}]', "i=2.0",
    ]  # fmt: skip
    assert setting_texts(["a=1"]) == ["a=1"]
    with pytest.raises(RecipeError, match="invalid value of `a`: got None"):
        setting_texts({"a": None})


# Wrong types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run: unmask.pretrain(123), "invalid texts: got 123 (int)"),
        (lambda run: unmask.pretrain(None), "invalid texts: got None"),
        (lambda run: unmask.pretrain(b"text"), "invalid texts: got b'text'"),
        (lambda run: unmask.pretrain({"a": 1}), "invalid texts"),
        (lambda run: unmask.pretrain(iter([1])), "invalid text: got 1 (int)"),
        (lambda run: unmask.pretrain([]), "no text was given"),
        (lambda run: unmask.pretrain("a", budget=10), 'budget="10 min"'),
        (lambda run: unmask.pretrain("a", settings=3), "invalid settings: got 3"),
        (lambda run: unmask.pretrain("a", settings="a=1"), "invalid settings: got 'a=1'"),
        (lambda run: unmask.pretrain("a", recipe=3), "invalid recipe"),
        (lambda run: unmask.pretrain("a", seed=True), "invalid seed"),
        (lambda run: unmask.pretrain("a", valid=["a"]), "invalid valid"),
        (lambda run: unmask.pretrain("a", document="page"), "'blank-line' or 'line' or 'file'"),
        (lambda run: unmask.pretrain("a", exist_ok=True), "'resume' or 'new'"),
        (lambda run: unmask.pretrain("a", bugdet="3 steps"), "did you mean `budget`?"),
        (lambda run: unmask.resume(None), "invalid run: got None"),
        (lambda run: unmask.load(5), "invalid path: got 5"),
        (lambda run: unmask.fill(unmask.load(run), 123), "invalid text"),
        (lambda run: unmask.fill(str(run), "a [MASK]"), 'unmask.load("runs/notes")'),
        (lambda run: unmask.evaluate(unmask.load(run), 7), "invalid texts: got 7"),
        (lambda run: unmask.evaluate(unmask.load(run), "a", max_size="3 tokens"), 'max_size="3 tokens"'),
        (lambda run: unmask.evaluate_minimal_pairs(unmask.load(run), 3), "give a path, or a list of pairs"),
        (lambda run: unmask.evaluate_minimal_pairs(unmask.load(run), []), "there are no minimal pairs"),
        (lambda run: unmask.evaluate_minimal_pairs(unmask.load(run), [("a", "b"), ("a", "a")]), "location: pair 2"),
        (lambda run: unmask.evaluate_minimal_pairs(unmask.load(run), [("a", "b")], subset=0), "subset=0"),
        (lambda run: unmask.export(None, "a"), "invalid model"),
        (lambda run: unmask.import_model(3, "a"), "invalid folder"),
        (lambda run: unmask.audit(len, 3, "a"), "invalid texts"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_keyword(run: Path, call: Callable[[Path], Any], says: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        call(run)
    assert says in str(caught.value)


def test_rows_of_a_dataset_and_generators_are_texts(tmp_path: Path) -> None:
    rows = [{"body": f"the cat sat on mat {number} and slept\nuntil noon"} for number in range(200)]
    by_row = train(rows, tmp_path / "a", field="body")  # pyright: ignore[reportArgumentType]
    by_text = train((row["body"] for row in rows), tmp_path / "b")  # pyright: ignore[reportArgumentType]
    assert by_row.card["text_fingerprint"] == by_text.card["text_fingerprint"]
    with pytest.raises(TextError, match="invalid text in the field `text`"):
        train(rows, tmp_path / "c")  # pyright: ignore[reportArgumentType]


def test_evaluate_takes_the_same_texts_as_pretrain(run: Path) -> None:
    model, texts = unmask.load(run), ["the cat sat on the mat\nand slept", "until noon"]
    expected = unmask.evaluate(model, texts)
    assert unmask.evaluate(model, (text for text in texts)) == expected
    assert unmask.evaluate(model, [{"body": text} for text in texts], field="body") == expected
    with pytest.raises(TextError, match="invalid text in the field `text`"):
        unmask.evaluate(model, [{"body": text} for text in texts])


def test_a_dry_run_returns_nothing_and_writes_nothing(prose: Path, tmp_path: Path) -> None:
    assert train(prose, tmp_path / "run", dry_run=True) is None
    assert not (tmp_path / "run").exists()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("replace this one with --force (force=True)", "replace this one with force=True"),
        ("name it: --from MODEL; or another", "name it: start=MODEL; or another"),
        ("resume it: unmask pretrain --resume runs/a", 'resume it: unmask.resume("runs/a")'),
        ('a total such as --budget "+1 epoch"', 'a total such as budget="+1 epoch"'),
        ("less: --set data.held_out.fraction=5%", 'less: settings={"data.held_out.fraction": "5%"}'),
        ('as in --set "train.every.save=20 steps"', 'as in settings={"train.every.save": "20 steps"}'),
        ("with --set data.drop_duplicates=true.", 'with settings={"data.drop_duplicates": True}.'),
        ("remove --extend-vocabulary to keep", "remove extend_vocabulary to keep"),
        ("by U+FFFD (--errors replace), or", 'by U+FFFD (errors="replace"), or'),
        ("as in --valid news=valid_news.txt", 'as in valid={"news": "valid_news.txt"}'),
        ("a--b and x --", "a--b and x --"),
    ],
)
def test_options_become_keywords(text: str, python: str) -> None:
    assert python_words(text) == python


def texts_with_options() -> list[str]:
    """The texts of errors outside the command line that name an option, with 1 for each inserted value."""
    found: list[str] = []
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                for part in ast.walk(node):
                    if isinstance(part, ast.JoinedStr):
                        text = "".join(str(p.value) if isinstance(p, ast.Constant) else "1" for p in part.values)
                    elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                        text = part.value
                    else:
                        continue
                    if re.search(r"(?<![\w-])--[a-z]", text):
                        found.append(text)
    return found


def test_no_error_names_an_option_in_python() -> None:
    texts = texts_with_options()
    assert len(texts) > 20
    for text in texts:
        assert not re.search(r"(?<![\w-])--[a-z]", python_words(text)), text


def test_an_existing_output_names_the_keyword(run: Path, prose: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(RunError) as caught:
        unmask.export(run, tmp_path / "model", unverified=True)
    assert "force=True" in str(caught.value) and "--" not in str(caught.value)
    with pytest.raises(RunError) as caught:
        train(prose, run)
    assert f'unmask.resume("{run}")' in str(caught.value) and 'exist_ok="new"' in str(caught.value)
    with pytest.raises(RecipeError, match=r'location: budget="10"'):
        train(prose, tmp_path / "new", budget="10")
    with pytest.raises(RecipeError, match=r'location: settings={"train.thread": 1}: train.thread\n'):
        train(prose, tmp_path / "new", settings={"train": {"thread": 1}})


# A cell that runs twice -----------------------------------------------------------------------------------------------


def test_resume_of_a_finished_run_returns_its_model(run: Path, prose: Path) -> None:
    before = (run / "log.jsonl").read_bytes()
    assert train(prose, run, exist_ok="resume").card["step"] == unmask.load(run).card["step"]
    assert (run / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 5}, "`seed` is 17 there and 5 here"),
        ({"budget": "6 steps"}, "`train.budget` is '4 steps' there and '6 steps' here"),
        ({"document": "line"}, "`data.document` is 'auto' there and 'line' here"),
    ],
)
def test_another_run_is_not_resumed(run: Path, prose: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError) as caught:
        train(prose, run, exist_ok="resume", **change)
    assert says in str(caught.value) and 'exist_ok="new"' in str(caught.value)


def test_a_run_on_another_text_is_not_resumed(run: Path, prose: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(prose.read_text(encoding="utf-8") + "\n\nmore text\n", encoding="utf-8")
    with pytest.raises(RunError, match="not the text of the run"):
        train(tmp_path / "other.txt", run, exist_ok="resume")


def test_new_takes_a_folder_beside_it(prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(prose, tmp_path / "run")
    model = train(prose, tmp_path / "run", exist_ok="new", display="auto")
    assert model.path.startswith(str(tmp_path / "run-2"))
    assert "the new run is written to" in capsys.readouterr().out


class StopsAt(Display):
    def step(self, state: Any) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupted_cell_continues(prose: Path, tmp_path: Path) -> None:
    handler, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with pytest.raises(Stopped, match=r"resume the run with unmask.resume\("):
        train(prose, tmp_path / "run", display=StopsAt())
    assert signal.getsignal(signal.SIGINT) is handler
    assert threading.active_count() == threads
    assert unmask.Run(tmp_path / "run").status == "stopped"
    train(prose, tmp_path / "run", exist_ok="resume")
    assert unmask.Run(tmp_path / "run").status == "finished"


def test_a_run_works_outside_the_main_thread(prose: Path, tmp_path: Path) -> None:
    models: list[unmask.Model] = []
    worker = threading.Thread(target=lambda: models.append(train(prose, tmp_path / "run")))
    worker.start()
    worker.join()
    assert models[0].card["step"] > 0


# What is shown --------------------------------------------------------------------------------------------------------


def test_run_and_model_are_readable(run: Path) -> None:
    opened = unmask.Run(run)
    assert (opened.status, opened.step, opened.steps, opened.recipe.name) == ("finished", 4, 4, "tiny")
    assert [line["step"] for line in opened.log() if "validation" in line][-1] == 4
    assert opened.model("last").card["step"] == 4
    assert re.fullmatch(r"Run\('.*': recipe tiny, finished, step 4 of 4, best validation loss .*\)", repr(opened))
    shown = repr(opened.model())
    assert "1 layers, hidden size 32" in shown and "validation loss: " in shown and len(shown.splitlines()) == 3
    with pytest.raises(RunError, match="not a run"):
        unmask.Run(run.parent)
    result = unmask.evaluate(opened.model(), ["the cat sat on the mat\nand slept"])
    assert re.match(r"EvalResult\(loss \d\.\d{3} nats .* accuracy .*%\n  bits per character: ", repr(result))
    filled = repr(unmask.fill(opened.model(), "the c[MASK]t", top=2)[0])
    assert re.fullmatch(r"FillMaskResult\('the c\[MASK]t':\n  '.' \d+\.\d%, '.' \d+\.\d%\)", filled)


def test_a_script_shows_its_progress_in_a_pipe(prose: Path, tmp_path: Path) -> None:
    script = f"""
import unmask
settings = {{"data.tokenizer.kind": "characters", "model.num_hidden_layers": 1, "train.threads": 1}}
settings |= {{"stage.0.batch_size": "300 tokens", "stage.1.batch_size": "300 tokens"}}
unmask.pretrain({str(prose)!r}, budget="9000 steps", out="notes", settings=settings, dry_run=True)
unmask.pretrain({str(prose)!r}, budget="2 steps", out="shown", settings=settings)
print("between")
unmask.pretrain({str(prose)!r}, budget="2 steps", out="silent", settings=settings, display=None)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=True
    )
    shown, _, silent = result.stdout.partition("between\n")
    assert "validation at step 2" in shown and "\x1b" not in shown
    assert 'settings={"train.early_stopping_patience": 3} stops' in shown and "--set" not in shown
    assert silent == ""


def test_the_command_continues_or_takes_a_new_folder(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*options: str) -> tuple[object, str, str]:
        settings = [f"--set={text}" for text in setting_texts(SMALL)]
        words = ["unmask", "pretrain", str(prose), "--budget", "2 steps", "--out", "run"]
        monkeypatch.setattr(sys, "argv", [*words, *settings, *options, "--quiet"])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code, *capfd.readouterr())

    assert command()[0] == 0
    code, _, err = command()
    assert code == 2 and "--exist-ok new" in err
    assert command("--exist-ok", "resume")[1] == "run\n"
    code, _, err = command("--exist-ok", "resume", "--seed", "5")
    assert code == 2 and "`seed` is 17 there and 5 here" in err
    assert command("--exist-ok", "new")[1] == "run-2\n"
