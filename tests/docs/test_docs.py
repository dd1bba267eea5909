"""The commands and the Python in README.md, docs and docs/tutorials run as they stand there, with their budgets cut.

What runs: every command of a ```sh block, every line after `$ ` in a ```console block, every ```python block, page by
page, top to bottom, in a folder of the page's own. What a page speaks of is there: notes.txt and other text files, runs
that another page made. A ```toml or ```python block whose first line is a comment with a file's name (`# mine.toml`,
`# mine.py`) is that file: it is laid on the desk and, if it is Python, run by who imports it.
What doesn't run: `make …`, and what carries a reason at its end: `# not run: needs two GPUs`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
import zstandard
from pyarrow import parquet

import unmask
from unmask.cli import main
from unmask.core.config import resolve_recipe
from unmask.core.keywords import setting_texts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")])]
NOT_RUN = re.compile(r"#\s*not run:\s*\S")
OPERATORS = {"|", "||", "&&", ";", "&"}
QUESTIONS = "The [MASK] sat on the mat.\nA dog ran over the [MASK].\n"
BUDGET, MORE = "4 steps", "+2 steps"
QUICK = {"--samples": "128", "--seconds": "0.01"}  # of an audit and a measurement
PIECES = {"wordpiece": 120, "unigram": 120, "bpe": 280}  # of a vocabulary; the text on the desk gives some more
SMALL = [
    "model.num_hidden_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.intermediate_size=32",
]
ROOMY = ["model.num_hidden_layers=2", "model.hidden_size=64"]


# What stands in a page -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its lines, with the number of the first."""

    language: str
    first: int
    lines: tuple[str, ...]


def blocks(page: str) -> Iterator[Block]:
    fence, language, first, held = "", "", 0, list[str]()
    for number, line in enumerate(page.splitlines(), start=1):
        opened = re.match(r"\s*(```+|~~~+)\s*(\S*)", line)
        if not fence and opened:
            fence, language, first, held = opened[1], opened[2], number + 1, []
        elif fence and line.strip() == fence:
            yield Block(language, first, tuple(held))
            fence = ""
        elif fence:
            held.append(line)
    assert not fence, f"the block that begins before line {first} is not closed"


def title_of(block: Block) -> str:
    """The name of the file that a block is, or nothing."""
    ending = {"toml": "toml", "python": "py"}.get(block.language, "")
    title = re.match(rf"#\s*(\S+\.{ending})\s*$", block.lines[0] if block.lines else "") if ending else None
    return title[1] if title else ""


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """Line number and text of each command; a line that ends with a backslash goes on in the next."""
    prompt = "$ " if block.language == "console" else ""
    pending, began = "", 0
    for number, line in enumerate(block.lines, start=block.first):
        if not pending and not (line.startswith(prompt) and line.strip() and not line.lstrip().startswith("#")):
            continue
        began = began if pending else number
        pending += line.removeprefix(prompt if not pending else "> ")
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        yield began, pending
        pending = ""


# Budgets cut ---------------------------------------------------------------------------------------------------------


def words(command: str) -> list[str]:
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def simple_commands(command: str) -> list[list[str]]:
    """The words of each command of a line, the operators between them as commands of their own."""
    parts: list[list[str]] = [[]]
    for word in words(command):
        if word in OPERATORS:
            parts += [[word], []]
        else:
            parts[-1].append(word)
    return parts


def arguments_of(part: Sequence[str]) -> int | None:
    """Where the arguments of `unmask`, `.venv/bin/unmask` or `python -m unmask` begin; None for another command."""
    for place, word in enumerate(part):
        is_module = word == "unmask" and place > 0 and part[place - 1] == "-m"
        if is_module or (place == 0 and Path(word).name == "unmask"):
            return place + 1
    return None


def option(arguments: Sequence[str], name: str, default: str) -> str:
    for place, word in enumerate(arguments):
        if word == name and place + 1 < len(arguments):
            return arguments[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return default


def kind_of_tokenizer(arguments: Sequence[str], default: str) -> str:
    """The kind that a command names, by --kind or --set."""
    found = re.search(r"(?:^|\s)data\.tokenizer\.kind=\"?(\w+)|--kind[= ](\w+)", " ".join(arguments))
    return (found[1] or found[2]) if found else default


def cut_numbers(arguments: Sequence[str], kind: str) -> list[str]:
    """Budgets and vocabularies of a size that the text on the desk allows."""
    cut = [
        re.sub(r"((?:data\.tokenizer\.vocab_size|--vocab-size)=)[\d_]+", rf"\g<1>{PIECES.get(kind, 120)}", word)
        for word in arguments
    ]
    for place, word in enumerate(cut):
        if word == "--vocab-size" and place + 1 < len(cut):
            cut[place + 1] = str(PIECES.get(kind, 120))
        if word == "--extend-vocabulary" and place + 1 < len(cut):
            cut[place + 1] = "4"
        if word in QUICK and place + 1 < len(cut):
            cut[place + 1] = QUICK[word]
        if word == "--budget" and place + 1 < len(cut):
            cut[place + 1] = MORE if cut[place + 1].startswith("+") else BUDGET
        elif word.startswith("--budget="):
            cut[place] = f"--budget={MORE if word.startswith('--budget=+') else BUDGET}"
    return cut


def small_settings(recipe: str, arguments: Sequence[str] = ()) -> list[str]:
    tree = resolve_recipe(recipe)
    kind = kind_of_tokenizer(arguments, tree["data"]["tokenizer"]["kind"])
    stages = [f"stage.{number}.batch_size=500 tokens" for number in range(len(tree["stage"]))]
    pieces = [f"data.tokenizer.vocab_size={PIECES[kind]}"] if kind in PIECES else []
    roomy = tree["model"].get("init") == "pair-matching"  # whose heads begin with tasks
    return [*SMALL, *(ROOMY if roomy else ()), *stages, *pieces, "train.threads=1"]


def cut_down(arguments: Sequence[str]) -> list[str]:
    """The arguments of a verb that trains, made small; what the page itself sets comes later and wins."""
    verb, *rest = arguments
    if verb == "tokenizer":
        return [verb, *cut_numbers(rest, kind_of_tokenizer(rest, "wordpiece"))]
    if verb in ("audit", "bench"):
        return [verb, *cut_numbers(rest, "wordpiece")]
    is_dry_run = verb == "doctor" and "--budget" in rest
    if not (verb in ("pretrain", "demo") or is_dry_run) or "--help" in rest:
        return list(arguments)
    if "--from" in rest:  # the model decides all but the stages
        begin = ["--set=stage.0.batch_size=500 tokens", "--set=train.threads=1"]
        return [verb, *begin, *([] if "--budget" in rest else ["--budget", BUDGET]), *cut_numbers(rest, "wordpiece")]
    recipe = option(rest, "--recipe", "tiny")
    rest = cut_numbers(rest, kind_of_tokenizer(rest, resolve_recipe(recipe)["data"]["tokenizer"]["kind"]))
    if verb == "demo":
        return [verb, *([] if "--budget" in rest else ["--budget", BUDGET]), "--threads", "1", *rest]
    if "--resume" in rest:
        return [verb, *rest]
    small = [f"--set={setting}" for setting in small_settings(recipe, rest)]
    return [verb, *small, *([] if any(word.startswith("--budget") for word in rest) else ["--budget", BUDGET]), *rest]


# A folder where a page's commands find what they speak of ------------------------------------------------------------


def fields_named(text: str) -> list[str]:
    """The columns that a page's commands ask for; "text" is always one."""
    return sorted({"text", *re.findall(r"(?:--field[ =]|data\.field=)[\"']?([\w.]+)", text)})


def in_the_form_of(name: str, prose: str, fields: Sequence[str]) -> bytes:
    """Prose as a file of this name holds it: plain or as a table with these fields, packed or not."""
    documents = [" ".join(document.split()) for document in prose.split("\n\n")]
    plain = name.removesuffix(".gz").removesuffix(".zst")
    rows = [dict.fromkeys(fields, document) for document in documents]
    if plain.endswith(".parquet"):
        held = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), held)
        content = held.getvalue()
    elif plain.endswith(".jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif plain.endswith((".csv", ".tsv")):
        table = io.StringIO()
        writer = csv.DictWriter(table, fields, delimiter="\t" if plain.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
        content = table.getvalue().encode()
    else:
        content = prose.encode()
    if name.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.compress(content) if name.endswith(".zst") else content


class Desk:
    """A working folder in which a page is carried out."""

    def __init__(self, folder: Path, prose: str) -> None:
        self._folder, self._prose = folder, prose
        self._names: dict[str, Any] = {}

    def lay_out(self, page: str) -> None:
        """Files that the page's blocks name: texts, folders of texts, questions, recipes."""
        code = [block for block in blocks(page) if block.language in ("sh", "console", "python", "toml")]
        for block in code:
            if title := title_of(block):
                self._write(title, "\n".join([*block.lines, ""]))
        text = "\n".join(line for block in code if block.language != "toml" for line in block.lines)
        for name in re.findall(r"[\w./-]+\.(?:txt|jsonl|csv|tsv|parquet)\b(?:\.gz|\.zst)?", text):
            if not name.startswith("runs/"):  # what a run writes is not what it reads
                self._write(name, in_the_form_of(name, self._prose, fields_named(text)))
        for name in re.findall(r"(?:--file|<|cat)[ =]([\w./-]+\.txt)(?=[^\n]*)", text):
            asks = re.search(
                rf"fill [^\n]*--file[ =]{re.escape(name)}|{re.escape(name)} *\| *unmask fill|fill [^\n]*< *{name}", text
            )
            if asks:
                self._write(name, QUESTIONS)
        for name in re.findall(r"pretrain ([\w-]+)/(?=\s|$)", text):
            self._write(f"{name}/part.txt", self._prose)

    def _write(self, name: str, content: str | bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def _make_runs(self, text: str, but: str) -> None:
        """Runs that a command speaks of, though this page has made none of that name."""
        for name in re.findall(r"runs/[\w.-]+", text):
            if name != but and not (self._folder / name).exists():
                self._write("text-of-runs.txt", self._prose)
                self._unmask(["pretrain", "text-of-runs.txt", "--out", name])

    def run(self, command: str) -> None:
        """Run a line of a shell; an exit code other than 0 is a failure."""
        parts = simple_commands(command)
        for part in parts:
            self._make_runs(" ".join(part), option(part, "--out", "runs/demo" if "demo" in part else ""))
        begins = arguments_of(parts[0])
        is_launched = parts[0][0] == "torchrun"  # in processes of its own
        if len(parts) == 1 and begins is not None and not is_launched and not {"<", ">", ">>"} & set(parts[0]):
            self._unmask(parts[0][begins:])
            return
        line: list[str] = []
        for part in parts:
            begins = arguments_of(part)
            line += part if begins is None else [*part[:begins], *cut_down(part[begins:])]
        python = shlex.quote(sys.executable)
        ours = f'unmask() {{ {python} -m unmask "$@"; }}\nset -o pipefail\n'
        if sys.platform == "linux":  # elsewhere, PyTorch can't be forked safely
            launcher = shlex.quote(str(Path(__file__).with_name("torchrun.py")))
            ours += f'torchrun() {{ {python} {launcher} "$@"; }}\n'
        shell = ours + " ".join(word if word in OPERATORS | {"<", ">", ">>"} else shlex.quote(word) for word in line)
        done = subprocess.run(["bash", "-c", shell], cwd=self._folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
        if is_launched:
            facts = json.loads((self._folder / option(parts[0], "--out", "") / "env.json").read_text())
            assert str(facts["determinism"]["ranks"]) == option(parts[0], "--nproc-per-node", "1")

    def _unmask(self, arguments: Sequence[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["unmask", *cut_down(arguments)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(QUESTIONS.encode())))
            err = io.StringIO()
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                main()
        assert not ended.value.code, f"exit code {ended.value.code}\n{err.getvalue()}"

    def execute(self, program: str, where: str) -> None:
        """Run a block of Python; blocks of a page share their names, as the cells of a notebook do."""
        whole: Callable[..., Any] = unmask.pretrain
        out = re.search(r"out=\"([^\"]+)\"", program)
        self._make_runs(program, out[1] if out else "runs/model")

        def small(texts: Any, **more: Any) -> Any:
            given = setting_texts(more.pop("settings", None))
            if "start" in more:
                return whole(texts, settings=["train.threads=1", *given], **{**more, "budget": BUDGET})
            settings = [*small_settings(str(more.get("recipe", "tiny")), given), *given]
            return whole(texts, settings=settings, **{**more, "budget": BUDGET})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unmask, "pretrain", small)
            exec(compile(program, where, "exec"), self._names)


def carry_out(page: str, name: str, folder: Path, prose: str) -> None:
    desk = Desk(folder, prose)
    desk.lay_out(page)
    for block in blocks(page):
        if title_of(block):
            continue
        if block.language == "python" and not NOT_RUN.search(block.lines[0]):
            # Blank lines before it, so that a traceback names the page's own line.
            desk.execute("\n" * (block.first - 1) + "\n".join(block.lines), name)
        elif block.language in ("sh", "console"):
            for line, command in commands(block):
                if not (command.startswith("make ") or NOT_RUN.search(command)):
                    try:
                        desk.run(command)
                    except AssertionError as error:
                        raise AssertionError(f"{name}, line {line}: {command}\n{error}") from error


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_runs(page: Path, folder: Path, prose: Path) -> None:
    carry_out(page.read_text(encoding="utf-8"), page.name, folder, prose.read_text())


# That this test finds what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("```sh\nunmask recipe shew tiny\n```", "line 4: unmask recipe shew tiny"),
        ("```console\n$ unmask pretrain notes.txt --bugdet 3\nsaved\n```", "--bugdet"),
        ("```sh\nunmask recipe list && unmaks demo\n```", "unmaks"),
        ("```sh\nunmask recipe list | false\n```", "exit code 1"),
        ("```sh\nunmask pretrain notes.txt \\\n  --recipe tinny\n```", "tinny"),
    ],
)
def test_a_wrong_command_is_found(folder: Path, prose: Path, block: str, says: str) -> None:
    with pytest.raises(Exception, match=r"tinny|exit code") as caught:
        carry_out(f"# A page\n\n{block}\n", "page.md", folder, prose.read_text())
    assert says in str(caught.value)


def test_wrong_python_is_found(folder: Path, prose: Path) -> None:
    with pytest.raises(AttributeError, match="lode"):
        carry_out("```python\nimport unmask\nunmask.lode('runs/a')\n```\n", "page.md", folder, prose.read_text())


def test_what_carries_a_reason_does_not_run(folder: Path, prose: Path) -> None:
    page = """
```sh
make nothing
git clone nowhere  # not run: needs a network
# a comment
unmask recipe show tiny > mine.toml   # a remark
```
```python
# not run: needs a GPU
1 / 0
```
```
unmask nothing
```
"""
    carry_out(page, "page.md", folder, prose.read_text())
    assert "\nname = " in (folder / "mine.toml").read_text()


def test_budgets_are_cut_and_what_a_page_sets_wins() -> None:
    cut = cut_down(["pretrain", "notes.txt", "--budget", "10 min", "--set", "model.num_hidden_layers=2"])
    assert cut[cut.index("--budget") + 1] == BUDGET
    assert cut.index("--set=model.num_hidden_layers=1") < cut.index("model.num_hidden_layers=2")
    assert cut_down(["pretrain", "--resume", "runs/a", "--budget=+1 epoch"])[-1] == f"--budget={MORE}"
    assert not any("vocab" in word for word in cut_down(["pretrain", "play.txt", "--recipe", "char"]))
    assert (
        cut_down(["pretrain", "a.txt", "--set", "data.tokenizer.vocab_size=30000"])[-1]
        == "data.tokenizer.vocab_size=120"
    )
    assert cut_down(["tokenizer", "train", "a.txt", "--kind", "bpe", "--vocab-size", "30000"])[-1] == "280"
    examined = cut_down(["doctor", "notes.txt", "--budget", "10 min"])
    assert examined[-1] == BUDGET and "--set=model.hidden_size=32" in examined
    assert cut_down(["doctor", "runs/notes"]) == ["doctor", "runs/notes"]
    for chosen in (["--set", "data.tokenizer.kind=bpe"], ["--recipe", "modern-tiny"]):
        assert "--set=data.tokenizer.vocab_size=280" in cut_down(["pretrain", "a.txt", *chosen])
    (part,) = simple_commands('python -m unmask fill runs/a "The [MASK] | sat."  # a remark')
    assert part == ["python", "-m", "unmask", "fill", "runs/a", "The [MASK] | sat."] and arguments_of(part) == 3


def test_job_files_for_clusters_are_well_formed() -> None:
    """They can't run here: YAML is read, and a script for Slurm is checked by bash."""
    found = [(page.name, block) for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    kinds = {
        (name, each["apiVersion"], each["kind"])
        for name, block in found
        if block.language == "yaml"
        for each in yaml.safe_load_all("\n".join(block.lines))
    }
    assert kinds == {("scale.md", "batch/v1", "Job"), ("scale.md", "v1", "Service")}
    scripts = ["\n".join(block.lines) for _, block in found if any(line.startswith("#SBATCH") for line in block.lines)]
    assert scripts
    for script in scripts:
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0, script
