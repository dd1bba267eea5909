"""Interfaces that scripts depend on: precedence of options, the folder of a run, output as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import unmask as front
from unmask.objectives.mlm import MaskedLMObjective

Command = Callable[..., tuple[int, str, str]]


def shown(unmask: Command, *settings: str, recipe: str = "tiny") -> dict[str, object]:
    code, out, err = unmask("recipe", "show", recipe, "--json", *(f"--set={setting}" for setting in settings))
    assert code == 0, err
    return json.loads(out)


def at(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]  # type: ignore[index]
    return tree


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("stage.1.max_seq_len=256", "stage.1.max_seq_len", 256),  # a TOML number; entries are counted from 0
        ("objective.mask_rate=0.3", "objective.mask_rate", 0.3),
        ("train.every.save=20 steps", "train.every.save", "20 steps"),  # no TOML, so a string
        ('train.every.save="20 steps"', "train.every.save", "20 steps"),
        ("data.tokenizer={kind = 'wordpiece', vocab_size = 900}", "data.tokenizer.vocab_size", 900),
        ("objective.mask_unit=whole-word", "objective.mask_unit", "whole-word"),
        ("preview.prompts=['a b', 'c']", "preview.prompts.1", "c"),
        ("seed = 5", "seed", 5),
    ],
)
def test_the_right_side_of_set(unmask: Command, setting: str, key: str, value: object) -> None:
    assert at(shown(unmask, setting), key) == value


def test_extends_merges_tables_and_replaces_lists(unmask: Command) -> None:
    Path("mine.toml").write_text('extends = "./small.toml"\n[model]\nhidden_size = 32\n[[stage]]\nmax_seq_len = 24\n')
    mine, small = shown(unmask, recipe="mine.toml"), shown(unmask, recipe="small.toml")
    assert at(mine, "model.hidden_size") == 32 and at(mine, "model.num_hidden_layers") == 1
    assert (
        at(mine, "stage.0.max_seq_len") == 24
        and at(mine, "stage.0.batch_size") != at(small, "stage.0.batch_size") == "8 texts"
    )


def test_options_take_precedence_over_set_and_set_over_the_file(unmask: Command) -> None:
    def planned(*more: str) -> tuple[int, int]:
        code, out, err = unmask("pretrain", "cat.txt", "--recipe", "small.toml", "--dry-run", "--json", *more)
        assert code == 0, err
        forecast = json.loads(out)["forecast"]
        return sum(stage["steps"] for stage in forecast["plan"]["stages"]), forecast["parameters"]

    assert planned() == planned("--set", "train.budget=3 steps")
    assert planned("--set", "train.budget=5 steps")[0] == 5
    assert planned("--budget", "7 steps", "--set", "train.budget=5 steps")[0] == 7
    assert planned("--set", "model.hidden_size=32")[1] > planned()[1]


def test_a_run_on_disk(unmask: Command) -> None:
    where = ("--recipe", "small.toml", "--out", "runs/new", "--quiet")
    code, out, err = unmask("pretrain", "cat.txt", *where, "--seed", "5", "--set", "seed=4")
    assert (code, out) == (0, "runs/new\n"), err
    run = Path("runs/new")
    assert {path.name for path in run.iterdir()} == {
        "recipe.toml", "env.json", "log.jsonl", "latest", "best", "step-0000002", "step-0000003", "tokenizer",
        "report.html",
    }  # fmt: skip
    assert (run / "latest").is_symlink() and str((run / "latest").readlink()) == "step-0000003"
    assert {"config.json", "model.safetensors", "tokenizer.json", "card.json"} <= {
        path.name for path in (run / "latest").iterdir()
    }
    code, out, _ = unmask("recipe", "show", "small.toml", "--plain", "--set", "seed=5")
    kept = (run / "recipe.toml").read_text().partition("\n")[2]  # the first line is a digest
    values = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("#"))
    assert code == 0 and kept.startswith(values.partition("[")[0]), "every value, defaults filled in"
    assert "seed = 5\n" in kept and "\n[plan]\n" in kept
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in training] == [1, 2, 3]
    for line in training:
        assert {
            "step", "tokens", "seconds", "loss", "accuracy", "tokens_per_second", "learning_rate",
        } <= set(line)  # fmt: skip
    validations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validations] == [2, 3]
    assert {"loss", "accuracy", "bits_per_character", "unigram_loss"} <= set(validations[0]["validation"])


def test_a_run_a_step_and_a_plain_folder_are_one_model(unmask: Command, run: Path) -> None:
    plain = Path("plain")
    plain.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((run / "latest" / name).read_bytes())
    answers = [unmask("fill", str(folder), "a [MASK]", "--json") for folder in (run, run / "step-0000003", plain)]
    assert answers[0][0] == 0 and answers[0] == answers[1] == answers[2]


def test_predictions_as_json(unmask: Command, run: Path) -> None:
    text = "The [MASK]at s[MASK]t."
    code, out, _ = unmask("fill", "run", text, "another [MASK]", "--json", "--top", "3")
    answers = json.loads(out)
    assert code == 0 and [answer["text"] for answer in answers] == [text, "another [MASK]"]
    assert all(set(answer) == {"text", "masks"} for answer in answers)
    tokenizer = front.load(run).tokenizer
    first, second = answers[0]["masks"]
    assert (first["position"], second["position"]) == (1 + 4, 1 + 9), "positions in the ids of the model, after [CLS]"
    for mask, parts in ((first, ("The ", "at s[MASK]t.")), (second, ("The [MASK]at s", "t."))):
        assert set(mask) == {"position", "candidates"} and len(mask["candidates"]) == 3
        probabilities = [candidate["score"] for candidate in mask["candidates"]]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1
        for candidate in mask["candidates"]:
            assert set(candidate) == {"token_str", "id", "score", "sequence", "shown"}
            assert tokenizer.id_to_token(candidate["id"]) == candidate["token_str"]
            assert candidate["sequence"] == candidate["token_str"].join(parts)


def test_batch_files_and_standard_input(unmask: Command, run: Path) -> None:
    prompts = "The c[MASK]t\r\n\n[MASK]og\n"
    strange = "one[MASK]\u2028the \x85same\x0ctext"  # none of these ends a line
    Path("prompts.txt").write_bytes((prompts + strange).encode("utf-8-sig"))
    code, out, _ = unmask("fill", "run", "first [MASK]", "--file", "prompts.txt", "--json")
    assert code == 0
    assert [one["text"] for one in json.loads(out)] == ["first [MASK]", "The c[MASK]t", "", "[MASK]og", strange]
    piped = subprocess.run(
        [sys.executable, "-m", "unmask", "fill", "run", "--json"],
        input=prompts, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert piped.returncode == 0, piped.stderr
    assert [one["text"] for one in json.loads(piped.stdout)] == ["The c[MASK]t", "", "[MASK]og"]


def test_text_in_a_locale_without_unicode(unmask: Command, run: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "unmask", "fill", "run", "한국 [MASK]".encode(), "--json", "--top", "1"],
        env={**os.environ, **locale}, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("ascii"))[0]["text"] == "한국 [MASK]"


def test_a_line_that_can_not_be_filled_costs_no_other_answer(unmask: Command, run: Path) -> None:
    Path("prompts.txt").write_bytes(b"The c[MASK]t\n\nno mask\nab\xff[MASK]\n" + b"a[MASK]\n" * 70)
    code, out, err = unmask("fill", "run", "--file", "prompts.txt", "--json")
    answers = json.loads(out)
    assert (code, err, len(answers)) == (2, "", 74)
    assert [len(answer["masks"]) for answer in answers] == [1, 0, 0, 0] + [1] * 70
    errors = {number: answer["error"] for number, answer in enumerate(answers, start=1) if "error" in answer}
    assert errors == {3: "there is no [MASK] in the text", 4: "text is not UTF-8"}
    assert answers[2]["location"] == "prompts.txt, line 3: 'no mask'" and answers[2]["hint"]

    code, out, err = unmask("fill", "run", "--file", "prompts.txt", "--top", "1")
    assert code == 2 and out.count("%") == 71 and err.count("error: ") == 2
    with subprocess.Popen(
        [sys.executable, "-m", "unmask", "fill", "run", "--top", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:  # a line is answered before the next one is written
        assert process.stdin is not None and process.stdout is not None
        for text in (b"The c[MASK]t\n", b"a[MASK]\n"):
            process.stdin.write(text)
            process.stdin.flush()
            assert process.stdout.readline() == text and b"%" in process.stdout.readline()
            process.stdout.readline()
        process.stdin.close()
    assert process.returncode == 0
    code, out, err = unmask("fill", "run", "--file", "prompts.txt", "--strict")
    assert (code, out) == (2, "") and "line 3" in err


def test_evaluation_as_json(unmask: Command, run: Path) -> None:
    code, out, _ = unmask("evaluate", "run", "--text", "cat.txt", "--json")
    result = json.loads(out)
    assert code == 0 and {"loss", "accuracy", "bits_per_character", "masked_tokens"} <= set(result)
    assert 0 <= result["accuracy"] <= 1 and result["masked_tokens"] > 0
    repeated = json.loads(unmask("evaluate", "run", "--text", "cat.txt", "--json")[1])
    assert repeated == result, "the masks never change"
    assert result["unknown_character_share"] == 0
    Path("other.txt").write_text("the cat sat ☃☃ " * 40)
    code, out, err = unmask("evaluate", "run", "--text", "other.txt", "--json")
    assert code == 0 and json.loads(out)["unknown_character_share"] == pytest.approx(2 / 15, abs=0.01)
    assert "warning: the tokenizer can't spell 13." in err
    code, _, err = unmask("evaluate", "run", "--text", "cat.txt", "--field", "text")
    assert code == 2 and "field `text` is not used" in err
    first = json.loads(unmask("evaluate", "run/step-0000002", "--text", "cat.txt", "--json")[1])
    assert first["masked_tokens"] == result["masked_tokens"] and first["loss"] != result["loss"]


def test_a_finished_run_is_reported_and_can_be_prolonged(unmask: Command, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, _ = unmask("pretrain", "--resume", "run")
    assert code == 0 and "finished" in out and "+1 epoch" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    code, out, err = unmask("pretrain", "--resume", "run", "--budget", "+1 epoch", "--json")
    assert code == 0, err
    # 2,754 characters in windows of 30 make 92 samples of 32 tokens; a step has eight.
    assert json.loads(out)["summary"]["steps"] == 3 + 12
    code, out, _ = unmask("pretrain", "--resume", "run", "--json")
    assert code == 0 and json.loads(out)["finished_before"]


def test_an_internal_error(unmask: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1; the traceback is written to a file, and printed with --debug."""
    whole = MaskedLMObjective.loss

    def faulty(self: MaskedLMObjective, encoder, head, masked):
        if Path("runs").exists():  # after the cost estimate
            raise ZeroDivisionError("a planted fault")
        return whole(self, encoder, head, masked)

    monkeypatch.setattr(MaskedLMObjective, "loss", faulty)
    code, _, err = unmask("pretrain", "cat.txt", "--recipe", "small.toml", "--out", "runs/new")
    assert code == 1 and "ZeroDivisionError: a planted fault" in err and "runs/new/crash.txt" in err
    assert "Traceback" not in err
    kept = Path("runs/new/crash.txt").read_text()
    assert kept.startswith("Traceback") and "a planted fault" in kept
    assert "Traceback" in unmask("pretrain", "--resume", "runs/new", "--debug")[2]
    monkeypatch.setattr(MaskedLMObjective, "loss", whole)
    code, _, err = unmask("pretrain", "--resume", "runs/new")
    assert code == 0, err


def test_texts_in_memory_and_a_notebook_s_thread(place: Path, unmask: Command) -> None:
    """Signals reach only the main thread; training works in other threads too."""
    texts = [f"The cat number {number} sat on the mat, and the dog sat on the log." for number in range(60)]
    models: list[object] = []

    def work() -> None:
        models.append(front.pretrain(texts, recipe="small.toml", budget="2 steps", out="runs/memory", seed=3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (model,) = models
    assert isinstance(model, front.Model) and model.card["step"] == 2 and model.card["seed"] == 3
    (answer,) = front.fill(model, "The c[MASK]t")
    assert [one.token_str for one in answer.masks[0].candidates] == [
        one.token_str for one in front.fill(front.load("runs/memory"), "The c[MASK]t")[0].masks[0].candidates
    ]
    code, _, err = unmask("pretrain", "--resume", "runs/memory", "--budget", "+1 steps")
    assert code == 0, err


def test_texts_and_paths(place: Path) -> None:
    def documents(texts: list[str | Path]) -> int:
        out = place / "runs" / str(len(list(place.glob("runs/*"))))
        front.pretrain(texts, recipe="small.toml", budget="1 steps", out=out)
        return json.loads((out / "env.json").read_text())["text"]["facts"]["documents"]

    (place / "a name with spaces.txt").write_text("The cat sat on the mat. " * 60)
    assert documents(["a name with spaces.txt"]) == 1
    assert documents([place / "cat.txt", "small.toml"]) == 2
    assert documents(["The cat sat on the mat."] * 70) == 70
    with pytest.raises(front.UnmaskError, match=r"nothing\.txt"):
        front.pretrain("nothing.txt", recipe="small.toml", out="runs/none")
    with pytest.raises(front.UnmaskError, match="no such file"):
        front.pretrain("nothing", recipe="small.toml", out="runs/none")
    with pytest.raises(front.UnmaskError, match="file names and texts are mixed") as refusal:
        front.pretrain(["cat.txt", "The cat sat."], recipe="small.toml", out="runs/none")
    assert "cat.txt" in str(refusal.value)
    for blank in ("", ["", " \n"]):
        with pytest.raises(front.UnmaskError, match="empty or blank"):
            front.pretrain(blank, recipe="small.toml", out="runs/none")
    assert not (place / "runs" / "none").exists()
