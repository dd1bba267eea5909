"""Each made text has one defect, and the doctor finds that one; a clean text has none."""

from __future__ import annotations

import http.server
import json
import math
import random
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from unmask.checks.doctor import Finding
from unmask.checks.doctor.run import examine_run
from unmask.checks.doctor.scan import SHINGLE, SIMILAR, TextScan, _Lines, minhash, near_duplicates, scan_text
from unmask.checks.doctor.text import examine_text
from unmask.core.errors import DamagedError, RecipeError, TextError
from unmask.core.files import read_json, write_json
from unmask.core.plugins import address_marks
from unmask.data.settings import DataConfig
from unmask.data.sources import open_text
from unmask.training.pretrain import launch, resume
from unmask.training.recipe import explicit_keys, load_recipe
from unmask.training.runs import run_lock

WORDS = ["".join(random.Random(number).choices("abdeilmnorstu", k=3 + number % 6)) for number in range(250)]
SMALL = {"amount"}  # the made texts have less than a million characters


def documents(count: int = 200, seed: int = 0, words: list[str] = WORDS) -> list[str]:
    """Documents of 40 to 80 words, each different."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=chance.randrange(40, 80))) for _ in range(count)]


def examine(path: Path, *settings: str) -> dict[str, Finding]:
    recipe, explicit = load_recipe("tiny", settings), explicit_keys("tiny", settings)
    return {found.name: found for found in examine_text([path], recipe, explicit, lambda what, fraction: None)}


def unusual(findings: Mapping[str, Finding]) -> dict[str, str]:
    return {name: found.severity for name, found in findings.items() if found.severity != "ok"}


def changed(document: str) -> str:
    """The document with another word in its middle."""
    words = document.split()
    return " ".join([*words[: len(words) // 2], "unalike", *words[len(words) // 2 + 1 :]])


def with_defect(name: str) -> str | bytes:
    """A text with one defect."""
    clean = documents()
    if name == "exact duplicates":
        clean += clean[:20]
    elif name == "near duplicates":
        clean += [changed(document) for document in documents(30)]
    elif name == "documents":
        clean += [f"note {number}" for number in range(300)]
    elif name == "repeated lines":
        clean = [f"{document}\nall rights in this document are reserved by its owner" for document in clean]
    elif name == "mojibake":
        clean = [document.replace("e", "é").encode().decode("cp1252") for document in clean]
    elif name == "encoding":
        return "\n\n".join(document.replace("e", "é") for document in clean).encode("latin-1")
    elif name == "replacement characters":
        clean[7] = clean[7].replace("a", "\ufffd")
    elif name == "control characters":
        clean[7] = clean[7].replace("a", "\x0b")
    elif name == "scripts":
        clean += documents(40, seed=1, words=[word.translate(CYRILLIC) for word in WORDS])
    elif name == "unknown characters":
        clean += ["".join(random.Random(number).choices("acgt", k=180)) for number in range(20)]
    elif name == "vocabulary":
        chance = random.Random(3)
        clean = documents(words=["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(20_000)])
    return "\n\n".join(clean)


CYRILLIC = {ord(latin): cyrillic for latin, cyrillic in zip("abdeilmnorstu", "абдеилмнорсту", strict=True)}
PROBLEMS = {"exact duplicates", "near duplicates", "documents", "mojibake", "encoding", "unknown characters"}
MENDED = {"mojibake", "encoding", "control characters", "repeated lines"}
DEFECTS = sorted(PROBLEMS | {"repeated lines", "replacement characters", "control characters", "scripts", "vocabulary"})


def test_a_clean_text_has_no_finding(tmp_path: Path) -> None:
    path = tmp_path / "clean.txt"
    path.write_text("\n\n".join(documents(3300)))
    findings = examine(path)
    assert not unusual(findings) and not any(found.command for found in findings.values())
    unigram, vocabulary = findings["unigram line"].values["nats"], findings["vocabulary"].values["tokens"]
    assert 0.9 * np.log(250) < unigram < np.log(vocabulary), "about 250 words, all of them equally frequent"


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path, content = Path("text.txt"), with_defect(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    findings = examine(path)
    found = unusual(findings)
    assert set(found) == {name} | SMALL
    assert found[name] == ("problem" if name in PROBLEMS else "note")
    assert findings[name].why and findings[name].figure and str(path) in findings[name].command
    json.dumps(findings[name].values)
    program, *_ = command = shlex.split(findings[name].command)
    if ">" in command and shutil.which(program):  # it writes a text without the defect
        subprocess.run(findings[name].command, shell=True, check=True, timeout=60)
        (mended,) = (file for file in Path().iterdir() if file != path)
        assert set(unusual(examine(mended))) == SMALL
    else:
        assert name not in MENDED


def test_near_duplicates_are_those_with_a_high_jaccard_similarity() -> None:
    texts = documents(40, seed=5)
    texts += [changed(text) for text in texts[:20]] + [" ".join(text.split()[::-1]) for text in texts[20:]]

    def similarity(one: str, other: str) -> float:
        first, second = ({text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)} for text in (one, other))
        return len(first & second) / len(first | second)

    expected = {
        (one, other) for other in range(80) for one in range(other) if similarity(texts[one], texts[other]) > 0.88
    }
    found = set(near_duplicates(minhash(texts)))
    assert expected and expected <= found
    assert all(similarity(texts[one], texts[other]) > SIMILAR - 0.15 for one, other in found)


def test_text_in_another_encoding_throughout_is_one_finding(tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    path.write_text("\n\n".join(documents(20)), encoding="utf-16")
    (found,) = examine(path).values()
    assert found.name == "encoding" and found.severity == "problem" and "UTF-16" in found.figure
    assert shlex.split(found.command)[:3] == ["iconv", "-f", "UTF-16"]


def test_a_single_document_and_a_vocabulary_that_the_text_can_t_fill(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\n".join(documents(100)))
    assert unusual(examine(path)) == {"documents": "note", "amount": "note"}
    (tmp_path / "tiny.txt").write_text("\n\n".join(documents(3)))
    findings = examine(tmp_path / "tiny.txt", "data.tokenizer.vocab_size=30000")
    assert findings["vocabulary"].severity == "problem" and "30,000" in findings["vocabulary"].figure


def test_a_long_document_is_sampled(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(documents(200)) * 200)
    source = open_text([path], DataConfig(document="file"))
    scan = scan_text(source, lambda what, fraction: None)
    assert scan.documents == 1 and [len(text) for text in scan.sample] == [1_000_000]


def test_long_lines_are_counted_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.checks.doctor.scan._MAX_LINE_CHARACTERS", 20_000)
    shared = "the same long line in every document of this text " * 4
    lines, scan = _Lines(), TextScan()
    for document in documents():
        lines.add("text.txt", f"{shared}\n{document}")
        assert sum(map(len, lines._counts)) <= 20_000
    lines.write_to(scan)
    assert scan.line_characters > 40_000 and scan.most_repeated == (shared.strip(), 200, "text.txt")


def test_the_command_about_a_long_line_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = " ".join(documents(10))
    Path("text.txt").write_text("\n\n".join(f"{document}\n{long}" for document in documents(30)))
    found = examine(Path("text.txt"))["repeated lines"]
    assert found.severity == "problem" and len(found.command) < 500 and len(json.dumps(found.values)) < 500
    subprocess.run(found.command, shell=True, check=True, timeout=60)
    assert examine(Path("text-clean.txt"))["repeated lines"].severity == "ok"


def test_what_is_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no such file"):
        examine(tmp_path / "nothing.txt")
    (tmp_path / "blank.txt").write_text(" \n \n")
    with pytest.raises(TextError, match="blank"):
        examine(tmp_path / "blank.txt")


# Runs -----------------------------------------------------------------------------------------------------------------

Change = Callable[[Path], None]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with ten log lines; read-only."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "text.txt").write_text("\n\n".join(documents(200)))
    return train(folder, folder / "run", "{max_seq_len = 32, batch_size = '256 tokens'}")


def train(folder: Path, run: Path, stages: str) -> Path:
    """Train ten steps on the folder's text."""
    settings = [
        "data.tokenizer.kind=characters", "model.num_hidden_layers=1", "model.hidden_size=16",
        "model.num_attention_heads=2", "model.intermediate_size=16", "train.every.log=1 steps",
        "train.every.validate=2 steps", "train.threads=1", "train.budget=10 steps", "train.report=false",
        f"stage=[{stages}]",
    ]  # fmt: skip
    launch([folder / "text.txt"], recipe="tiny", out=run, settings=settings)
    return run


def set_losses(training: list[float], validation: list[float], **more: Any) -> Change:
    """A change of the losses in a log: its lines keep their form."""

    def change(run: Path) -> None:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        train, valid = iter(training), iter(validation)
        for line in lines:
            if "validation" in line:
                line["validation"]["loss"] = next(valid)
                line["validation"] |= {"unigram_loss": 2.5, "masked_tokens": 10_000}
            else:
                line |= {"loss": next(train), "masked_tokens": 10_000, **more}
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return change


def set_facts(**facts: int) -> Change:
    def change(run: Path) -> None:
        environment = read_json(run / "env.json")
        environment["text"]["facts"] |= facts
        write_json(run / "env.json", environment)

    return change


def set_plan(seconds: float) -> Change:
    def change(run: Path) -> None:
        text = (run / "recipe.toml").read_text().replace('budget = "10 steps"', 'budget = "1 s"')
        recipe = text.splitlines()
        recipe = [f"seconds_per_step = {seconds}" if line.startswith("seconds_per_step") else line for line in recipe]
        (run / "recipe.toml").write_text("\n".join(recipe))

    return change


def move_text(run: Path) -> None:
    environment = read_json(run / "env.json")
    environment["text"]["paths"] = [str(run.parent / "gone.txt")]
    write_json(run / "env.json", environment)


def cut_log(run: Path) -> None:
    path = run / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "los')


FALLING = [3.0 - 0.1 * number for number in range(10)]
HELD = [2.3, 2.1, 2.0, 1.9, 1.8]
RISING = [2.3, 1.9, 1.95, 2.0, 2.2]
FLAT = [2.52, 2.51, 2.5, 2.49, 2.49]
BACK = [3.0, 2.9, 2.8, 4.1, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2]
GONE = [3.0, 2.9, 2.8, 2.7, 2.7, 2.6, 3.9, 4.5, 4.6, 4.6]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_losses(FALLING, HELD), {}),
        (set_losses(FALLING, FLAT), {"unigram line": "problem"}),
        (set_losses(FALLING, RISING), {"overfitting": "problem"}),
        (set_losses(BACK, HELD), {"divergence": "note"}),
        (set_losses(GONE, HELD), {"divergence": "problem"}),
        (set_losses([*FALLING[:-1], float("nan")], HELD), {"divergence": "problem"}),
        (set_facts(train_unknown_characters=10**5), {"unknown characters": "problem"}),
        (set_facts(train_tokens=30), {"repetition": "note"}),
        (set_losses(FALLING, HELD, training_seconds=90.0), {"plan": "note"}),
        (set_losses(FALLING, HELD, training_seconds=0.5), {"plan": "note"}),
        (cut_log, {"log": "note"}),
        (lambda run: (run / "log.jsonl").unlink(), {"log": "problem"}),
        (lambda run: (run / "crash.txt").write_text("Traceback\nOSError: full"), {"state": "problem"}),
    ],
    ids=["healthy", "plateau", "overfitting", "jump", "diverged", "nan", "unknown", "epochs", "slow", "fast",
         "half-written", "no log", "crash"],
)  # fmt: skip
def test_a_run_is_examined_by_its_files(
    trained: Path, tmp_path: Path, change: Change, expected: Mapping[str, str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    set_losses(FALLING, HELD, training_seconds=1.0)(run)
    set_plan(0.1)(run)
    change(run)
    if expected:  # the audit of the masks, which takes longest, is that of the healthy run
        move_text(run)
    findings = {found.name: found for found in examine_run(run, lambda what, fraction: None)}
    masking = findings.pop("masking")
    assert unusual(findings) == expected
    for name in expected:
        assert str(run) in findings[name].command and findings[name].why
    if expected:
        assert masking.severity == "note" and "no such file" in masking.figure and "--text NEW" in masking.command
    else:
        assert masking.severity == "ok" and masking.figure.startswith("15 checks passed")


class Asked(http.server.BaseHTTPRequestHandler):
    """Has no object, and counts the requests."""

    requests: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.requests.append(self.path)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


def test_addresses_of_a_run_from_elsewhere_are_not_opened(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/latest/meta-data"

    def masking(**marks: str) -> Finding:
        environment = read_json(run / "env.json")
        environment["text"]["paths"] = [str(trained.parent / "text.txt"), address]
        write_json(run / "env.json", {**environment, "code": marks})
        findings = {found.name: found for found in examine_run(run, lambda what, fraction: None)}
        return findings["masking"]

    try:
        for marks in ({}, {address: "0" * 64}):
            found = masking(**marks)
            assert (
                found.severity == "note"
                and "you have not given this address" in found.figure
                and address in found.figure
            )
            assert found.command.endswith(" --text ADDRESS") and Asked.requests == []
        found = masking(**address_marks([address]))
        assert "no such object" in found.figure and Asked.requests, "an address of this user is opened"
    finally:
        server.shutdown()
        server.server_close()


def test_a_dataset_of_a_run_from_elsewhere_is_not_downloaded(trained: Path, tmp_path: Path) -> None:
    text = "dataset:evil/dataset@train"
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    environment = read_json(run / "env.json")
    environment["text"]["paths"] = [text]
    (run / "env.json").write_text(json.dumps({**environment, "code": {text: "0" * 64}}))
    found = {found.name: found for found in examine_run(run, lambda what, fraction: None)}["masking"]
    assert "you have not given this address" in found.figure and found.command.endswith(" --text ADDRESS")
    with pytest.raises(RecipeError, match="an address that this user has not given"):
        resume(run, budget="+1 steps")
    environment["text"]["valid"] = {"news": {"path": text}}
    (run / "env.json").write_text(json.dumps({**environment, "code": {}}))
    with pytest.raises(RecipeError, match="an address that this user has not given"):
        resume(run, budget="+1 steps", texts=[trained.parent / "text.txt"])


def test_only_the_end_of_a_large_crash_file_is_read(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    with (run / "crash.txt").open("wb") as file:
        file.truncate(1 << 40)  # no bytes are written
        file.seek(0, 2)
        file.write(b"\nOSError: full\n")
    found = examine_run(run, lambda what, fraction: None)[0]
    assert found.name == "state" and "OSError: full" in found.figure
    with (run / "log.jsonl").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedError, match="this log is too large"):
        examine_run(run, lambda what, fraction: None)


def test_a_command_quotes_the_folder(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "my run", symlinks=True))
    set_losses(FALLING, FLAT, training_seconds=90.0)(run)
    set_plan(0.1)(run)
    move_text(run)
    findings = {found.name: found for found in examine_run(run, lambda what, fraction: None)}
    assert shlex.split(findings["plan"].command) == ["unmask", "bench", "--recipe", str(run / "recipe.toml")]
    for found in findings.values():
        assert not found.command or any(str(run) in word for word in shlex.split(found.command))


def test_a_run_that_has_not_done_its_steps_is_not_prolonged(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("\nsteps = 10\n", "\nsteps = 900\n"))
    set_losses(FALLING, FLAT)(run)
    move_text(run)
    stopped = {found.name: found for found in examine_run(run, lambda what, fraction: None)}["unigram line"]
    assert stopped.severity == "problem" and stopped.command == f"unmask pretrain --resume {run}"
    with run_lock(run):
        running = {found.name: found for found in examine_run(run, lambda what, fraction: None)}["unigram line"]
    assert running.severity == "note" and "the run goes on" in running.figure and "--resume" not in running.command


LINE = {"masked_tokens": 3, "training_seconds": 1.0, "data_wait_fraction": 0.0, "loss": 2.0, "grad_norm": 1.0}


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("log.jsonl", {"step": 10, "masked_tokens": 3}, "training_seconds of step 10"),
        ("log.jsonl", {"step": 10, "validation": {"loss": None, "masked_tokens": 9}}, "unigram_loss of step 10"),
        ("log.jsonl", {"step": 10, "validation": None}, "masked_tokens of step 10"),
        ("log.jsonl", {"step": 10, **LINE, "training_seconds": math.nan}, "training_seconds of step 10"),
        ("log.jsonl", {"step": 10, **LINE, "data_wait_fraction": 10**400}, "data_wait_fraction of step 10"),
        ("log.jsonl", {"step": 10, **LINE, "masked_tokens": -1}, "masked_tokens of step 10"),
        ("log.jsonl", {"step": 10, **LINE, "loss": 10**400}, "loss of step 10"),
        ("log.jsonl", {"step": 10, "validation": {**LINE, "unigram_loss": math.inf}}, "unigram_loss of step 10"),
        ("env.json", {"train_tokens": None}, "text.facts.train_tokens is missing"),
        ("env.json", {"vocabulary": 10**400}, "text.facts.vocabulary is not a count"),
        ("env.json", {"words_by": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_damaged_file_is_named(trained: Path, tmp_path: Path, file: str, change: dict[str, Any], says: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    if file == "env.json":
        environment = read_json(run / file)
        environment["text"]["facts"] |= change
        (run / file).write_text(json.dumps(environment))
    else:
        (run / file).write_text((run / file).read_text() + json.dumps(change) + "\n")
    with pytest.raises(DamagedError, match=says) as caught:
        examine_run(run, lambda what, fraction: None)
    assert file in caught.value.location


def test_losses_are_compared_within_the_last_stages_of_one_objective(trained: Path, tmp_path: Path) -> None:
    """The first and the last stage have the same objective; a validation of the first one is not compared."""
    stage = "max_seq_len = 32, batch_size = '256 tokens'"
    middle = "until = '60%', objective = {kind = 'mlm', mask_rate = 0.8}"
    run = train(trained.parent, tmp_path / "run", f"{{{stage}, until = '40%'}}, {{{stage}, {middle}}}, {{{stage}}}")
    set_losses(FALLING, [1.0, 1.0, 1.0, 2.3, 2.2])(run)
    move_text(run)
    findings = {found.name: found for found in examine_run(run, lambda what, fraction: None)}
    assert findings["overfitting"].values == {"best": 2.2, "best_step": 10, "last": 2.2}
