"""User errors: exit code 2, a message with location and hint, and no file changed.

The fixture `refused` in conftest.py checks these rules for each command.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import unmask as front
from unmask.core.errors import ModelError
from unmask.core.files import default_cache

Command = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

PRETRAIN = ("pretrain", "--recipe", "small.toml", "--out", "runs/new")
UTF_8 = "Ein Märchen von einem König und einer Königin. " * 100


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("own-cache")
    monkeypatch.setenv("UNMASK_CACHE", str(folder))
    return folder


# Text that can't be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [PRETRAIN, ("evaluate", "run", "--text"), ("fill", "run", "--file")])
def test_a_missing_path(refused: Refused, run: Path, arguments: tuple[str, ...]) -> None:
    refused(*arguments, "nothing.txt", says="nothing.txt")


def test_a_name_that_is_too_long(refused: Refused) -> None:
    refused(*PRETRAIN, "x" * 300, says="no such file or directory")
    refused("pretrain", "cat.txt", "--recipe", "x" * 300, says="unknown recipe")
    refused("fill", "x" * 300, "a [MASK]", says="the path doesn't exist")
    refused("pretrain", "cat.txt", "--recipe", "small.toml", "--out", "x" * 300, says="can't write")


@pytest.mark.parametrize("content", [b"", b" \n\n\t\r\n"])
def test_an_empty_file(refused: Refused, run: Path, content: bytes) -> None:
    Path("empty.txt").write_bytes(content)
    refused(*PRETRAIN, "empty.txt", says=("empty.txt", "empty"))
    refused(*PRETRAIN, "cat.txt", "empty.txt", says=("empty.txt", "remove it"))
    refused("evaluate", "run", "--text", "empty.txt", says=("empty.txt", "empty"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"some text\0and more", "byte 9 is zero"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (gzip.compress(b"text " * 100, mtime=0), "gzip"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_binary_file(refused: Refused, run: Path, content: bytes, says: str) -> None:
    Path("blob.txt").write_bytes(content)
    refused(*PRETRAIN, "blob.txt", says=("blob.txt", says))
    refused("evaluate", "run", "--text", "blob.txt", says=("blob.txt", says))


@pytest.mark.parametrize("before", [100, 2_000_000])
def test_bytes_that_are_not_utf_8(refused: Refused, run: Path, before: int) -> None:
    """In the first bytes, and after the first MiB, which is not checked before reading starts."""
    at = before // 2 * 2
    Path("broken.txt").write_bytes(b"a " * (at // 2) + b"\xe9t\xe9 " + b"a " * 50)
    for command in (PRETRAIN, ("evaluate", "run", "--text")):
        refused(*command, "broken.txt", says=(f"broken.txt, byte {at}", "0xe9", "--errors replace"))


def test_such_bytes_can_be_replaced(unmask: Command, run: Path) -> None:
    Path("broken.txt").write_bytes(UTF_8.encode("latin-1"))
    code, _, err = unmask(*PRETRAIN, "broken.txt", "--errors", "replace")
    assert code == 0, err
    assert front.load("runs/new").tokenizer.token_to_id("\ufffd") is not None
    assert unmask("evaluate", "run", "--text", "broken.txt", "--errors", "replace")[0] == 0


def test_a_prompt_that_is_not_utf_8(refused: Refused, run: Path) -> None:
    Path("broken.txt").write_bytes(b"ab\xff[MASK]\n")
    refused("fill", "run", "--file", "broken.txt", says=("broken.txt, line 1, byte 2", "UTF-8"))
    refused("fill", "run", "ab\udcff[MASK]", says="UTF-8")


# Tables, patterns, data sets -----------------------------------------------------------------------------------------


ROW = '{"body": "The cat sat on the mat and the dog sat on the log."}\n'


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"body": "half\n', ("not JSON", "--errors skip")),
        ('["a list"]\n', ("is a list, expected an object",)),
        ('{"bodies": "a", "id": 3}\n', ("there is no field `body`", "did you mean `bodies`?", "`id`", "--field")),
        ('{"body": null}\n', ("`body` is null, expected text", "--errors skip")),
        ('{"body": "caf\udce9"}\n', ("not UTF-8", "0xe9", "--errors replace", "--errors skip")),
    ],
)
def test_a_malformed_line(refused: Refused, run: Path, bad: str, says: tuple[str, ...]) -> None:
    Path("rows.jsonl").write_bytes((ROW * 30 + bad + ROW * 30).encode("utf-8", "surrogateescape"))
    for command in (PRETRAIN, ("evaluate", "run", "--text")):
        refused(*command, "rows.jsonl", "--field", "body", says=("rows.jsonl, line 31", *says))


def test_such_lines_can_be_skipped(unmask: Command, run: Path) -> None:
    Path("rows.jsonl").write_text(ROW * 30 + '{"body": "half\n{"body": null}\n' + ROW * 30)
    options = ("rows.jsonl", "--field", "body", "--errors", "skip")
    code, out, err = unmask(*PRETRAIN, *options, "--dry-run")
    assert code == 0, err
    assert "60 documents" in out
    assert unmask("evaluate", "run", "--text", *options)[0] == 0


def test_a_missing_column(refused: Refused, run: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [1], "sentence": ["The cat sat."]}), "rows.parquet")
    Path("rows.csv").write_text("id,sentence\n1,The cat sat.\n")
    Path("rows.tsv").write_text("id\tsentence\n1\tThe cat sat.\n")
    for name in ("rows.parquet", "rows.csv", "rows.tsv"):
        says = (name, "there is no column `text`", "`id` and `sentence`", "--field")
        refused(*PRETRAIN, name, says=says)
        refused("evaluate", "run", "--text", name, says=says)
    refused(*PRETRAIN, "rows.parquet", "--field", "id", says=("`id` has type int64", "`sentence`"))
    Path("torn.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-9])
    refused(*PRETRAIN, "torn.parquet", says=("torn.parquet", "not a Parquet file", "truncated"))


def test_a_broken_row(refused: Refused) -> None:
    Path("rows.csv").write_text("id,text\n1,The cat sat.\n2\n")
    refused(*PRETRAIN, "rows.csv", says=("rows.csv, line 3", "1 columns", "--errors skip"))
    Path("rows.csv").write_text('id,text\n1,The cat sat.\n2,"and\nnever ends\n')
    refused(*PRETRAIN, "rows.csv", says=("rows.csv, line 3", "never closed"))


@pytest.mark.parametrize("name", ["text.txt.gz", "text.txt.zst", "rows.jsonl.zst", "rows.csv.gz"])
def test_a_compressed_file_that_is_cut_short(refused: Refused, run: Path, name: str) -> None:
    import zstandard

    data = {"txt": "a cat\n", "jsonl": '{"text": "a cat"}\n', "csv": "text\n"}[name.split(".")[1]] * 5000
    packed = gzip.compress(data.encode()) if name.endswith(".gz") else zstandard.compress(data.encode())
    Path(name).write_bytes(packed[:-8])
    says = (name, "damaged or truncated", "download or compress the file again")
    refused(*PRETRAIN, name, says=says)
    refused("evaluate", "run", "--text", name, says=says)


def test_cp1252_in_the_middle_of_utf_8(refused: Refused, unmask: Command) -> None:
    Path("mixed.txt").write_bytes(UTF_8.encode() + b"\nw\xe4hrend\n" + UTF_8.encode())
    byte = len(UTF_8.encode()) + 2
    refused(
        *PRETRAIN,
        "mixed.txt",
        says=(
            f"mixed.txt, byte {byte} (line 2)",
            "0xe4",
            "save every line as UTF-8",
            "--errors replace",
            "--errors skip",
        ),
    )
    code, _, err = unmask(*PRETRAIN, "mixed.txt", "--errors", "skip", "--dry-run")
    assert code == 0, err


def test_a_field_of_plain_text(refused: Refused) -> None:
    refused(*PRETRAIN, "cat.txt", "--field", "body", says=("field `body` is not used", "remove --field"))
    refused(*PRETRAIN, "cat.txt", "--field", "text", says="field `text` is not used")
    refused("data", "inspect", "cat.txt", "--field", "body", says="field `body` is not used")


def test_what_a_directory_leaves_out_is_said(unmask: Command) -> None:
    Path("notes").mkdir()
    shutil.copy("cat.txt", "notes/cat.txt")
    Path("notes/paper.pdf").write_bytes(b"%PDF-1.7")
    Path("notes/dead.txt").symlink_to("nowhere")
    Path("notes/loop").symlink_to("loop")
    Path("notes/blank.txt").write_text(" \n\n")
    for command in ((*PRETRAIN, "--dry-run"), ("data", "inspect", "--recipe", "small.toml")):
        code, out, err = unmask(*command, "notes")
        assert code == 0, err
        assert "left out of notes: 1 empty or blank, 1 .pdf" in out + err
        assert "links without a target: notes/dead.txt and notes/loop" in out + err


def test_invalid_names(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    refused(*PRETRAIN, "notes/*.txt", says=("notes/*.txt", "no file matches this pattern"))
    refused(*PRETRAIN, "cat.txt:0", says=("cat.txt:0", "above 0"))
    refused(*PRETRAIN, "cat.txt:0.7", "small.toml", says=("small.toml", "no weight", "small.toml:1"))
    refused(*PRETRAIN, "dataset:@train", says=("dataset:@train", "dataset:NAME#CONFIG@SPLIT"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(
        *PRETRAIN,
        "dataset:noone/nothing",
        says=("`noone/nothing`", "not in the local cache", "can't be reached", "save_to_disk"),
    )


# Too little text -----------------------------------------------------------------------------------------------------


def set_options(message: str) -> list[str]:
    """The option `--set key=value` of a hint."""
    found = re.search(r"hint:.*?--set (\S+=[^\s,]+)", message)
    assert found, message
    return ["--set", found[1]]


def test_a_corpus_shorter_than_one_text(refused: Refused, unmask: Command) -> None:
    Path("short.txt").write_text("A cat sat on a mat.")  # 17 of its 19 characters are left for training
    message = refused(*PRETRAIN, "short.txt", says=("short.txt", "not enough training text: 17 tokens", "at least 30"))
    assert set_options(message) == ["--set", "stage.0.max_seq_len=19"]
    Path("single.txt").write_text("a")
    refused(*PRETRAIN, "single.txt", says=("single.txt", "add text"))
    code, _, err = unmask(*PRETRAIN, "short.txt", *set_options(message))
    assert code == 0, err


def test_a_vocabulary_that_the_text_cannot_give(refused: Refused, unmask: Command) -> None:
    words = ["--set", "data.tokenizer.kind=wordpiece", "--set", "data.tokenizer.vocab_size=8192"]
    message = refused(
        *PRETRAIN, "cat.txt", *words, says=("vocabulary size 8,192 is too large", "data.tokenizer.vocab_size")
    )
    code, _, err = unmask(*PRETRAIN, "cat.txt", *words, *set_options(message))
    assert code == 0, err


def test_no_text_at_all(refused: Refused) -> None:
    refused(*PRETRAIN, says="no text was given")
    Path("folder").mkdir()
    refused(*PRETRAIN, "folder", says=("folder", "no text"))


# Prompts and ids that a model doesn't accept -------------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "says"), [([1, 10**6], "1000000"), ([-1, 2], "-1")])
def test_ids_beyond_the_vocabulary(small_run: Path, ids: list[int], says: str) -> None:
    with pytest.raises(ModelError, match=f"invalid id: got {says}, expected 0 to 19") as refusal:
        front.load(small_run).log_probabilities([[1], ids], [[0], [0]])
    assert refusal.value.location == "sequence 1" and refusal.value.hint


def test_a_tokenizer_with_more_tokens_than_the_embedding(refused: Refused, run: Path) -> None:
    step = run / "best"
    tokenizer = json.loads((step / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Ж"] = len(tokenizer["model"]["vocab"])
    (step / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("fill", "run", "a [MASK]", says="tokenizer.json")  # its digest differs
    (step / "digests.json").unlink()
    refused("fill", "run", "a [MASK]", says=("tokenizer has 21 tokens", "embedding has only 20"))
    refused("evaluate", "run", "--text", "cat.txt", says=("21 tokens", "embedding has only 20"))


def test_a_text_without_a_mask(refused: Refused, run: Path) -> None:
    refused("fill", "run", "The cat sat.", says=("no [MASK]", "The cat sat."))
    refused("fill", "run", "", says="no [MASK]")
    Path("prompts.txt").write_text("a [MASK]\nnothing here\n")
    refused(
        "fill", "run", "--file", "prompts.txt", "--strict", says=("no [MASK]", "prompts.txt, line 2: 'nothing here'")
    )


@pytest.mark.parametrize("top", ["0", "-3", "1000"])
def test_an_invalid_number_of_predictions(refused: Refused, run: Path, top: str) -> None:
    refused("fill", "run", "a [MASK]", "--top", top, says=f"invalid top: got {top}")


def test_a_folder_without_a_model(refused: Refused, run: Path) -> None:
    Path("folder").mkdir()
    for folder in ("folder", "nowhere"):
        refused("fill", folder, "a [MASK]", says=folder)
        refused("evaluate", folder, "--text", "cat.txt", says=folder)
    config = run / "best" / "config.json"
    config.write_text(config.read_text().replace('"modernbert"', '"gpt2"'))
    (run / "best" / "digests.json").unlink()
    refused("fill", "run", "a [MASK]", says=("'gpt2'", "config.json"))
    config.write_text("{}")
    refused("fill", "run", "a [MASK]", says="config.json")


def test_text_longer_than_the_context_is_windowed(unmask: Command, run: Path) -> None:
    long = "The cat sat on the mat. " * 20 + "The d[MASK]g sat." + " The cat sat on the mat." * 20
    code, out, err = unmask("fill", "run", long, "--json", "--top", "2")
    assert code == 0, err
    ((mask,),) = [one["masks"] for one in json.loads(out)]
    assert mask["position"] > 400, "the position in the whole text"
    assert all(candidate["sequence"].count("cat") == 40 for candidate in mask["candidates"])
    code, out, _ = unmask("evaluate", "run", "--text", "cat.txt", "--json")
    assert code == 0
    assert json.loads(out)["masked_tokens"] == pytest.approx(0.15 * 3059, rel=0.05), (
        "all of the text, not its first window"
    )


# Recipes, keys, values, budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--recipe", "tinny"), ("`tinny`", "did you mean `tiny`?")),
        (("--recipe", "nothing.toml"), ("nothing.toml", "char")),
        (("--set", "train.bugdet=3 steps"), ("`bugdet`", "did you mean `budget`?", "--set train.bugdet=3 steps")),
        (("--set", "stag.0.length=16"), ("stag",)),
        (("--set", "model.kind=modernbrt"), ("did you mean", "modernbert")),
        (("--set", "objective.mask_unit=whole-words"), ("did you mean", "whole-word")),
        (("--set", "model.hidden_size=wide"), ("model.hidden_size", "an integer")),
        (("--set", "model.num_attention_heads=3"), ("model.num_attention_heads", "multiple")),
        (("--set", "objective.mask_rate=1.5"), ("invalid mask_rate: got 1.5", "above 0 and at most 1")),
        (("--set", "seed"), ("--set seed", "key")),
        (("--set", "stage.0.max_seq_len=100000"), ("100000", "model.max_position_embeddings")),
        (("--set", "stage.3.max_seq_len=16"), ("stage.3",)),
        (("--set", "train.every.save=20 tokens"), ("train.every.save", "steps or seconds")),
        (("--set", "train.micro_batch_size=0 tokens"), ("train.micro_batch_size", "16k tokens")),
        (("--set", "data.tokenizer.min_frequency=0"), ("data.tokenizer.min_frequency", "at least 1")),
        (("--set", "optimizer.lr=inf"), ("optimizer.lr", "above 0")),
        (("--set", "preview.num_samples=-1"), ("preview.num_samples", "at least 0")),
        (("--set", "data.held_out.fraction=100%"), ("100%", "less than 100%")),
        (("--set", "train.threads=4096"), ("got 4096", "train.threads")),
        (("--budget", "20"), ("`20` needs a unit", "120 steps", "location: --budget 20 hint:")),
        (("--budget", "20", "--set", "train.budget=3 steps"), ("location: --budget 20 hint:",)),
        (("--budget", "20 stps"), ("`stps`", "did you mean `steps`?", 'location: --budget "20 stps" hint:')),
        (("--budget", "twenty"), ("`twenty`", "300 s")),
        (("--budget", ""), ("not a quantity", "300 s")),
        (("--budget", "0 steps"), ("0 steps", "increase the budget")),
        (("--budget", "5 characters"), ("--budget", "characters", "seconds, steps, tokens or epochs")),
        (("--set", "train.budget=5 texts"), ("--set train.budget=5 texts", "seconds, steps, tokens or epochs")),
        (
            ("--set", "data.tokenizer.kind=wordpiece", "--set", "data.tokenizer.vocab_sise=9"),
            ("`vocab_sise`", "did you mean `vocab_size`?"),
        ),
        (
            ("--recipe", "tiny", "--set", "data.tokenizer.kind=characters", "--set", "data.tokenizer.vocab_size=5"),
            ("unknown key `vocab_size` of kind `characters`", "--set data.tokenizer.vocab_size=5"),
        ),
        (("--budget", "+1 epoch"), ("+1 epoch", "--resume")),
        (("--set", "train.budget=20"), ("`20` needs a unit",)),
    ],
)
def test_invalid_settings(refused: Refused, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    refused(*PRETRAIN, "cat.txt", *arguments, says=says)


def test_an_invalid_recipe_file(refused: Refused) -> None:
    good = Path("small.toml").read_text()
    for bad, says in (
        (
            good.replace("num_hidden_layers", "num_hidden_leyers"),
            ("bad.toml", "model.num_hidden_leyers", "did you mean `num_hidden_layers`?"),
        ),
        (good.replace('"8 texts"', "8"), ("bad.toml", "stage.0.batch_size", "needs a unit")),
        (good.replace("[data]", "[data"), ("bad.toml, line 2",)),
        ("seed = " + "9" * 5000, ("bad.toml", "too many digits")),
        ("seed = " + "[" * 5000, ("bad.toml", "nested too deeply")),
        ('extends = "tinny"\n', ("did you mean `tiny`?",)),
        ('extends = "./bad.toml"\n', ("extend each other",)),
    ):
        Path("bad.toml").write_text(bad)
        refused("pretrain", "cat.txt", "--recipe", "bad.toml", says=says)
    Path("bad.toml").write_bytes(b"\xff\xfe\x00")
    refused("recipe", "check", "bad.toml", says=("bad.toml", "UTF-8"))


# Damage --------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (flip, "train/shard-00000.safetensors"),
        (cut, "train/shard-00000.safetensors"),
        (Path.unlink, "held-out/shard-00000.safetensors"),
        (flip, "held-out/arrays.safetensors"),
        (cut, "meta/tokenizer.json"),
    ],
)
def test_a_damaged_shard(
    refused: Refused, unmask: Command, own_cache: Path, harm: Callable[[Path], None], name: str
) -> None:
    assert unmask(*PRETRAIN, "cat.txt", "--dry-run")[0] == 0
    (victim,) = own_cache.glob(f"*/*/{name}")
    harm(victim)
    refused(*PRETRAIN, "cat.txt", says=(str(victim), "delete its directory"))
    shutil.rmtree(victim.parent)  # as the message says
    assert unmask(*PRETRAIN, "cat.txt", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("harm", "name"),
    [(flip, "model.safetensors"), (cut, "resume/optimizer.safetensors"), (Path.unlink, "tokenizer.json")],
)
def test_a_damaged_checkpoint(
    refused: Refused, unmask: Command, run: Path, harm: Callable[[Path], None], name: str
) -> None:
    victim = run / "latest" / name
    harm(victim)
    assert unmask("fill", "run", "a [MASK]")[0] == 0, "the best model is undamaged"
    if not name.startswith("resume/"):
        refused("fill", "run/latest", "a [MASK]", says=Path(name).name)
    message = refused("pretrain", "--resume", "run", "--budget", "+1 steps", says=(Path(name).name, "latest"))
    command = re.search(r"ln -sfn (\S+) (\S+)", message)  # go on from the step before, as the message says
    assert command and (run / command[1]).is_dir() and Path(command[2]).is_symlink()
    Path(command[2]).unlink()
    Path(command[2]).symlink_to(command[1])
    code, out, err = unmask("pretrain", "--resume", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["summary"]["steps"] == 3


@pytest.mark.parametrize("name", ["env.json", "recipe.toml", "log.jsonl"])
def test_a_damaged_run(refused: Refused, run: Path, name: str) -> None:
    (run / name).write_text('{"half\n')
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says=name)


def test_a_run_without_its_steps(refused: Refused, run: Path) -> None:
    shutil.rmtree(run / (run / "latest").readlink())
    shutil.rmtree(run / "best")
    for command in (("fill", "run", "a [MASK]"), ("pretrain", "--resume", "run")):
        refused(*command, says=("step-0000003", "doesn't exist"))
    (run / "latest").unlink()
    refused("fill", "run", "a [MASK]", says="not saved a step yet")


# Changes between start and resume ------------------------------------------------------------------------------------


def test_a_changed_corpus(refused: Refused, small_run: Path, run: Path) -> None:
    text = Path("changed.txt")
    text.write_text("The cat sat on the mat and the dog sat on the dog. " * 60)
    environment = json.loads((run / "env.json").read_text())
    environment["text"]["paths"] = [str(text.absolute())]
    (run / "env.json").write_text(json.dumps(environment))
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says=("changed.txt", "the text has changed"))
    text.unlink()
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says="changed.txt")


def test_a_changed_tokenizer(refused: Refused, unmask: Command, run: Path) -> None:
    """A run owns its tokenizer: settings that would train another one change nothing, another file is refused."""
    first, _, recipe = (run / "recipe.toml").read_text().partition("\n")
    recipe = recipe.replace("min_frequency = 1", "min_frequency = 100")
    (run / "recipe.toml").write_text(f"{first}\n{recipe}")
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says=("recipe.toml", "have changed since"))
    (run / "recipe.toml").write_text(recipe)
    assert unmask("pretrain", "--resume", "run", "--budget", "+1 steps")[0] == 0
    file = run / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    file.write_text(json.dumps(tokenizer))
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says=("run/tokenizer", "have changed since"))


def test_a_recipe_of_another_shape(refused: Refused, run: Path) -> None:
    recipe = (run / "recipe.toml").read_text().partition("\n")[2]  # without the digest
    (run / "recipe.toml").write_text(recipe.replace("hidden_size = 16", "hidden_size = 32"))
    refused("pretrain", "--resume", "run", "--budget", "+1 steps", says=("weights", "recipe.toml"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget", "5"), ("`5` needs a unit",)),
        (("--budget", "+5 texts"), ("invalid budget: got +5 texts", "seconds, steps, tokens or epochs")),
        (("--budget", "2 steps"), ("2 steps does not exceed", "+1 epoch")),
        (
            ("--set", "objective.mask_rate=0.3"),
            ("objective.mask_rate", "train.every, train.keep_last, train.report, train.upload, preview"),
        ),
        (("--set", "train.every.save=5 tokens"), ("train.every.save",)),
        (("--out", "elsewhere"), ("--out",)),
        (("--recipe", "small.toml"), ("--recipe",)),
    ],
)
def test_settings_that_must_not_change(
    refused: Refused, run: Path, arguments: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("pretrain", "--resume", "run", *arguments, says=says)


def test_a_folder_without_a_run(refused: Refused, run: Path) -> None:
    refused("pretrain", "--resume", "nowhere", says=("nowhere", "not a run"))
    refused("pretrain", "--resume", "run/latest", says=("run/latest", "not a run"))


# Files and folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["cat.txt/run", "/proc/nowhere/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written(refused: Refused, out: str) -> None:
    refused("pretrain", "cat.txt", "--recipe", "small.toml", "--out", out, says=("can't write", out[:9], "--out"))


def test_a_folder_in_new_folders_that_cannot_be_written(refused: Refused) -> None:
    """The check removes the folders that it created."""
    out = f"a/b/{'x' * 300}"
    refused("pretrain", "cat.txt", "--recipe", "small.toml", "--out", out, says=("can't write", "--out"))


def test_a_cache_that_cannot_be_written(refused: Refused, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(place / "cat.txt" / "cache"))
    assert default_cache() == place / "cat.txt" / "cache"
    refused(*PRETRAIN, "cat.txt", says=("can't write", "UNMASK_CACHE"))


def test_an_earlier_demo_is_kept_if_the_next_cannot_start(
    refused: Refused, unmask: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (run / "recipe.toml").read_text()
    refused("demo", "--out", "run", says="is not the run of a demo")
    (run / "recipe.toml").write_text(recipe.replace('name = "small"', 'name = "demonstration"'))
    refused("demo", "--out", "run", "--budget", "20", says="needs a unit")

    def stopped_while_reading() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.training.demo.python_documentation", stopped_while_reading)
    before = sorted(run.rglob("*"))
    assert unmask("demo", "--out", "run")[0] == 130
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("out", ["run", "cat.txt", "dangling"])
def test_an_out_that_exists(refused: Refused, run: Path, out: str) -> None:
    Path("dangling").symlink_to("nowhere")
    message = refused("pretrain", "cat.txt", "--recipe", "small.toml", "--out", out, says=(out, "--resume"))
    assert f"unmask pretrain --resume {out}" in message
