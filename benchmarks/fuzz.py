"""Gives random and changed input to every reader, and damages every file of a run, a token cache and a checkpoint.

    python benchmarks/fuzz.py [--cases N] [--damage N] [--target NAME] [--seed N] [--json FILE]

A case is right if the reader accepts it or raises an UnmaskError. Anything else is a finding: another exception (the
command line would show it as an internal error), more than CASE_SECONDS, more than MAX_BYTES of further memory, a file
written outside of the folder of the case, a program started, a connection, or an unpickled object. Cases come from
hypothesis: files that are right, with bytes or values changed, and random text.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import faulthandler
import gzip
import importlib
import inspect
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
import torch
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from unmask.core import files
from unmask.core.distributed import differences, init_distributed
from unmask.core.errors import RunError, UnmaskError
from unmask.data.prepare import prepare
from unmask.data.settings import DataConfig
from unmask.data.shards import open_shards
from unmask.data.sources import open_source
from unmask.evaluation.minimal_pairs import read_pairs
from unmask.hub.from_hf import open_model
from unmask.models.fill_mask import fill
from unmask.models.joint_fill import fill_jointly
from unmask.models.model import find_checkpoint, load
from unmask.serve.app import plain
from unmask.serve.inference import ENDPOINTS, Models
from unmask.serve.requests import build_request
from unmask.tokenization.settings import ByteBpeConfig, CharacterConfig, UnigramConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer
from unmask.training import checkpoint
from unmask.training.environment import determinism_key, load_run_tokenizer, read_environment, reopen_text
from unmask.training.finetuning.examples import read_examples
from unmask.training.finetuning.settings import FieldsConfig
from unmask.training.loggers import read_log
from unmask.training.pretrain import launch
from unmask.training.recipe import check_unchanged, load_recipe, read_recipe
from unmask.training.runs import read_run, require_run_format
from unmask.training.setup import build_components

CASES: Final = 100_000
PLACES: Final = 200  # of each damaged file
CASE_SECONDS: Final = 20.0
MAX_BYTES: Final = 1 << 30
TRACED: Final = 60  # cases of each target whose lines are counted, which makes them slow
SEED: Final = 17
_LONGEST_FINDING: Final = 600  # characters
RECIPE: Final = """\
[data]
document = "line"
held_out = { method = "tail", fraction = "10%" }
tokenizer = { kind = "wordpiece", vocab_size = 66 }
[model]
kind = "bert"
num_hidden_layers = 1
hidden_size = 8
num_attention_heads = 2
intermediate_size = 8
max_position_embeddings = 64
[[stage]]
max_seq_len = 16
batch_size = "200 tokens"
[train]
budget = "2 steps"
every = { log = "1 steps", validate = "2 steps", save = "2 steps" }
threads = 1
device = "cpu"
precision = "float32"
report = false
"""
LINES: Final = (
    "the cat sat on the mat and looked at the moon .",
    "a dog ran over the hill to meet the old man .",
    "고양이가 매트 위에 앉아 달을 보았다 .",
    "Café naïve, it's 3.5 % of the North .",
)
Case = Any
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Target:
    """A reader: how its cases are made, and the function that reads one in a folder of its own."""

    name: str
    share: float  # of all cases
    cases: st.SearchStrategy[Case]
    read: Callable[[Case, Path], object]
    modules: Sequence[str]  # whose lines are counted


@dataclass
class Outcome:
    """What came of the cases of a target."""

    accepted: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lines: tuple[int, int] = (0, 0)  # executed in the traced cases, and all


class Finding(BaseException):
    """A case took too long, or did what no reader may do. No handler of the readers catches it."""


# Changes of input -----------------------------------------------------------------------------------------------------

_BYTES: Final = (
    b"", b"\0", b"\xff", b"\n", b"\r\n", b"{", b"}", b'"', b"[" * 3000, b"\xef\xbb\xbf", b"\xff\xfe", b"../../x",
    b"1e999", b"9" * 5000, b"\xed\xa0\x80", b'"\\ud800"', b"=", b"nan", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1",
    (1 << 20).to_bytes(8, "little"), (1 << 40).to_bytes(8, "little"), b"\xff" * 8, b"[MASK]", b"a" * 5000,
)  # fmt: skip
_VALUES: Final = (
    None, True, False, 0, 1, -1, 3, 64, 2**31 - 1, 2**31, 2**62, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "4", "../../x", "/etc/passwd", "a:b", "[MASK]", "60%", "10 steps", "1e400 s", "9" * 400, "\ud800", "é",
    "\0", [], [1], ["x"], [[]], {}, {"x": 1}, {"kind": "x"}, {"content": 3}, [None] * 40,
)  # fmt: skip
DELETE: Final = object()


def byte_edits() -> st.SearchStrategy[list[tuple[str, float, bytes]]]:
    """Changes of bytes: what is done, where (from 0 to 1), and with which bytes."""
    kinds = st.sampled_from(("flip", "cut", "insert", "remove", "repeat", "overwrite"))
    payloads = st.one_of(st.sampled_from(_BYTES), st.binary(max_size=12))
    return st.lists(st.tuples(kinds, st.floats(0, 1), payloads), min_size=1, max_size=3)


def edited(data: bytes, edits: Sequence[tuple[str, float, bytes]]) -> bytes:
    """Return the bytes with the changes."""
    for kind, place, payload in edits:
        at = min(int(place * len(data)), max(0, len(data) - 1))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << len(payload) % 8)]) + data[at + 1 :]
        elif kind == "remove":
            data = data[:at] + data[at + 1 + len(payload) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 40] * 3 + data[at:]
        elif kind == "overwrite":
            data = data[:at] + payload + data[at + len(payload) :]
        else:
            data = data[:at] + payload + data[at:]
    return data


def paths_of(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every key of a tree; of long lists and tables, the first and last entries."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in items if len(items) <= 40 else [*items[:3], *items[-3:]]:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_of(value, (*path, key))


def value_edits(tree: Any) -> st.SearchStrategy[list[tuple[tuple[str | int, ...], Any]]]:
    """Changes of values: path and new value, DELETE, or a second key."""
    values = st.one_of(
        st.sampled_from((DELETE, *_VALUES)),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
    )
    return st.lists(st.tuples(st.sampled_from([*paths_of(tree), ("new",)]), values), min_size=1, max_size=3)


def changed(tree: Any, edits: Sequence[tuple[tuple[str | int, ...], Any]]) -> Any:
    """Return a copy of a tree with the changes that still have a place in it."""
    tree = copy.deepcopy(tree)
    for path, value in edits:
        node = tree
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for part in path[:-1]:
                node = node[part]
            if value is DELETE:
                del node[path[-1]]
            else:
                node[path[-1]] = copy.deepcopy(value)
    return tree


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder; of a link, that of its target."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def changes_of(content: Files) -> st.SearchStrategy[dict[str, bytes]]:
    """Folders with one file changed: in its bytes, and in its values if it is JSON."""

    def of(name: str) -> st.SearchStrategy[dict[str, bytes]]:
        data = content[name]
        ways = [byte_edits().map(lambda edits: edited(data, edits))]
        if name.endswith(".json"):
            tree = json.loads(data)
            if isinstance(tree, dict | list):
                ways += [value_edits(tree).map(lambda edits: _json_bytes(changed(tree, edits)))] * 3
        elif name.endswith(".safetensors"):
            ways += [_header_edits(data)] * 2
        return st.one_of(ways).map(lambda new: {**content, name: new})

    return st.sampled_from(sorted(content)).flatmap(of)


def _json_bytes(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _header_edits(data: bytes) -> st.SearchStrategy[bytes]:
    """Changes of values in the header of a safetensors file, whose size is corrected."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def packed(edits: Sequence[tuple[tuple[str | int, ...], Any]]) -> bytes:
        new = _json_bytes(changed(header, edits))
        return len(new).to_bytes(8, "little") + new + data[8 + size :]

    return value_edits(header).map(packed)


def write(content: Files, folder: Path) -> Path:
    """Write files into a folder and return it."""
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_with_manifests(content: Files, folder: Path) -> Path:
    """Write files, with manifests that fit them: the reader of each file must detect what is wrong with it."""
    write(content, folder)
    for manifest in sorted(folder.rglob(files.RunLayout.DIGESTS)):
        manifest.unlink()
        files.write_manifest(manifest.parent)
    return folder


# Targets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixtures:
    """A small run with its text, its cache, and the parts that a resume restores into."""

    folder: Path
    run: Path
    step: Path
    cache: Path  # of this text
    training: Any
    recipe: Any
    context: Any
    source: Any


def make_fixtures(folder: Path) -> Fixtures:
    """Train the small run. UNMASK_CACHE must name a folder below `folder`."""
    (folder / "small.toml").write_text(RECIPE)
    (folder / "text.txt").write_text("\n".join(LINES[:2] * 60) + "\n", encoding="utf-8")
    run = folder / "run"
    launch([folder / "text.txt"], recipe=folder / "small.toml", out=run)
    recipe, _ = read_recipe(run)
    source = open_source([folder / "text.txt"], recipe.data)
    tokenizer = load_run_tokenizer(run, read_environment(run))
    corpus = prepare(source, recipe.data, files.default_cache(), tokenizer=tokenizer)
    context = init_distributed("float32", 1, "cpu")
    components = build_components(recipe, source, corpus, context, valid_sources={})
    return Fixtures(folder, run, find_step(run), corpus.folder, components.training, recipe, context, source)


def find_step(run: Path) -> Path:
    """Return the last step folder of a run."""
    return (run / files.RunLayout.LATEST).resolve()


def targets_of(made: Fixtures) -> list[Target]:
    """Return all targets."""
    return [
        _recipes(made), *_texts(), _tables(), _tokenizers(), _shards(made), _models(made), _checkpoints(made),
        _runs(made), _imports(made), _fill(made), _serve(made),
    ]  # fmt: skip


def _recipes(made: Fixtures) -> Target:
    trees = [tomllib.loads(RECIPE), tomllib.loads((made.run / "recipe.toml").read_text())]
    texts = [tomli_w.dumps(tree).encode() for tree in trees]
    keys = [".".join(map(str, path)) for path in paths_of(trees[1]) if path[0] != "plan"]

    def toml(number: int) -> st.SearchStrategy[bytes]:
        return st.one_of(
            byte_edits().map(lambda edits: edited(texts[number], edits)),
            *[value_edits(trees[number]).map(lambda edits: _toml_bytes(changed(trees[number], edits)))] * 3,
        )

    values = st.sampled_from([str(value) for value in _VALUES]) | st.text(max_size=12)
    option = st.tuples(st.sampled_from(keys) | st.text(max_size=8), values).map("=".join) | st.text(max_size=12)
    cases = st.tuples(st.sampled_from((0, 1)).flatmap(toml), st.just([]) | st.lists(option, max_size=2))

    def read(case: tuple[bytes, list[str]], folder: Path) -> object:
        data, options = case
        (folder / "recipe.toml").write_bytes(data)
        with contextlib.suppress(UnmaskError):
            read_recipe(folder)
        return load_recipe(folder / "recipe.toml", options)

    modules = ("unmask.core.config", "unmask.core.quantities", "unmask.training.recipe", "unmask.training.plan")
    return Target("recipe", 0.15, cases, read, modules)


def _toml_bytes(tree: Any) -> bytes:
    """Return TOML; of values that TOML lacks, Python's text."""
    try:
        return tomli_w.dumps(tree).encode(errors="surrogatepass")
    except (TypeError, ValueError):
        return repr(tree).encode(errors="surrogatepass")


_ERRORS: Final = ("strict", "replace", "skip")
_QUOTING: Final = ("csv", "none")


def _text_files() -> dict[str, bytes]:
    plain_text = "\n\n".join(LINES * 2).encode()
    rows = "".join(json.dumps({"text": line, "n": 1}, ensure_ascii=False) + "\n" for line in LINES).encode()
    values = json.dumps([{"text": line} for line in LINES]).encode()
    csv = ("text,n\n" + "".join(f'"{line}",1\n' for line in LINES)).encode()
    tsv = ("text\tn\n" + "".join(f"{line}\t1\n" for line in LINES)).encode()
    table = io.BytesIO()
    pq.write_table(pa.table({"text": LINES, "n": [1, 2, 3, 4]}), table)
    return {
        "a.txt": plain_text, "a.md": plain_text.replace(b"\n", b"\r\n"), "a.txt.gz": gzip.compress(plain_text),
        "a.txt.zst": zstandard.compress(plain_text), "a.jsonl": rows, "a.jsonl.gz": gzip.compress(rows),
        "a.json": values, "a.csv": csv, "a.tsv": tsv, "a.parquet": table.getvalue(),
    }  # fmt: skip


def _texts() -> list[Target]:
    content = _text_files()

    def cases(names: Sequence[str]) -> st.SearchStrategy[Case]:
        data = st.sampled_from(names).flatmap(
            lambda name: st.tuples(
                st.just(name), byte_edits().map(lambda edits: edited(content[name], edits)) | st.binary(max_size=60)
            )
        )
        return st.tuples(data, st.sampled_from(_ERRORS), st.sampled_from(("text", "n", "a.b", "")),
                         st.sampled_from(_QUOTING), st.sampled_from(("auto", "line", "file")))  # fmt: skip

    def read(case: Case, folder: Path) -> object:
        (name, data), errors, key, quoting, document = case
        (folder / name).write_bytes(data)
        source = open_source([folder / name], DataConfig(document=document, errors=errors, field=key, quoting=quoting))
        source.check()
        return [chunk.text for part in source.parts() for chunk in source.documents(part)]

    readers = ("unmask.data.readers.bytes", "unmask.data.readers.documents", "unmask.data.readers.tables")
    binary = [name for name in content if name.endswith(".parquet")]
    return [
        Target("text", 0.3, cases([name for name in content if name not in binary]), read, readers),
        Target("parquet", 0.05, cases(binary), read, readers[2:]),
    ]


def _tables() -> Target:
    rows = {
        "pairs.jsonl": b'{"sentence_good": "a cat sits", "sentence_bad": "a cat sit", "UID": "x"}\n' * 3,
        "pairs.tsv": b"a cat sits\ta cat sit\n" * 3,
        "labels.jsonl": b'{"text": "a cat", "label": "x", "text2": "b"}\n{"text": "b", "label": "y", "text2": "c"}\n',
        "labels.csv": b"text,label\na cat,x\nb,y\n",
    }
    cases = st.sampled_from(sorted(rows)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            byte_edits().map(lambda edits: edited(rows[name], edits)),
            st.sampled_from(("text", "pair", "tokens")),
        )
    )

    def read(case: tuple[str, bytes, Any], folder: Path) -> object:
        name, data, task = case
        (folder / name).write_bytes(data)
        if name.startswith("pairs"):
            return read_pairs(folder / name)
        return read_examples(folder / name, task, FieldsConfig())

    modules = ("unmask.evaluation.minimal_pairs", "unmask.training.finetuning.examples")
    return Target("pairs and labels", 0.05, cases, read, modules)


def _tokenizers() -> Target:
    kinds = [
        train_tokenizer(LINES * 20, kind)
        for kind in (WordPieceConfig(vocab_size=90), ByteBpeConfig(vocab_size=280), UnigramConfig(vocab_size=90),
                     CharacterConfig())
    ]  # fmt: skip
    contents: list[Files] = []
    for tokenizer in kinds:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            contents.append(files_of(Path(folder)))

    def read(case: Files, folder: Path) -> object:
        tokenizer = Tokenizer.load(write(case, folder))
        encoded = [tokenizer.encode(text, specials_in_text=True) for text in (*LINES, "[MASK] \0\U0001f600", "")]
        return [tokenizer.add_special_tokens(each.ids, each.marks) for each in encoded]

    modules = ("unmask.tokenization.tokenizer", "unmask.tokenization.normalization", "unmask.tokenization.extend")
    return Target("tokenizer", 0.1, st.one_of([changes_of(content) for content in contents]), read, modules)


def _shards(made: Fixtures) -> Target:
    content = files_of(made.cache / "held-out")

    def read(case: Files, folder: Path) -> object:
        shards = open_shards(write_with_manifests(case, folder), verify=True)
        return [
            (shards.ids(number, 0, int(length)).sum(), shards.token_flags(number, 0, int(length)).sum())
            for number, length in enumerate(shards.lengths[:100])
        ]

    return Target("shards", 0.1, changes_of(content), read, ("unmask.data.shards", "unmask.core.files"))


def _models(made: Fixtures) -> Target:
    content = {name: data for name, data in files_of(made.step).items() if "/" not in name}

    def read(case: Files, folder: Path) -> object:
        return load(write_with_manifests(case, folder))

    return Target("model", 0.07, changes_of(content), read, ("unmask.models.model", "unmask.models.hf_format"))


def _checkpoints(made: Fixtures) -> Target:
    content = {name: data for name, data in files_of(made.step).items() if name.startswith("resume/")}
    others = {name: data for name, data in files_of(made.step).items() if name not in content}

    def read(case: Files, folder: Path) -> object:
        step = write_with_manifests({**others, **case}, folder / made.step.name)
        files.write_pointer(folder / files.RunLayout.LATEST, step.name)
        return checkpoint.load(folder, made.training)

    return Target("checkpoint", 0.05, changes_of(content), read, ("unmask.training.checkpoint", "unmask.core.files"))


def _runs(made: Fixtures) -> Target:
    names = ("env.json", "log.jsonl", "recipe.toml")
    content = {name: (made.run / name).read_bytes() for name in names}
    content["latest"] = made.step.name.encode()

    def read(case: Files, folder: Path) -> object:
        write(case, folder)
        (folder / made.step.name).mkdir()
        read_run(folder)  # reports every problem in its summary
        with contextlib.suppress(UnmaskError):
            find_checkpoint(folder)
        require_run_format(folder)
        read_recipe(folder)
        check_unchanged(folder)
        return read_environment(folder), list(read_log(folder / "log.jsonl"))

    modules = ("unmask.training.environment", "unmask.training.runs", "unmask.training.loggers")
    return Target("run", 0.05, changes_of(content), read, modules)


def _imports(made: Fixtures) -> Target:
    content = {name: (made.step / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json",
                                                                  "tokenizer_config.json")}  # fmt: skip
    sharded = {name: data for name, data in content.items() if name != "model.safetensors"}
    size = int.from_bytes(content["model.safetensors"][:8], "little")
    tensors = [name for name in json.loads(content["model.safetensors"][8 : 8 + size]) if name != "__metadata__"]
    sharded["part.safetensors"] = content["model.safetensors"]
    sharded["model.safetensors.index.json"] = _json_bytes({
        "metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors[:5], "part.safetensors"),
    })  # fmt: skip
    nested = {f"0_Transformer/{name}": data for name, data in content.items()}
    nested["modules.json"] = _json_bytes(
        [
            {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
    )

    def read(case: Files, folder: Path) -> object:
        return open_model(write(case, folder))

    modules = ("unmask.hub.from_hf", "unmask.hub.tokenizer", "unmask.models.hf_format", "unmask.models.bert")
    return Target("import", 0.03, st.one_of([changes_of(each) for each in (content, sharded, nested)]), read, modules)


def _prompts() -> st.SearchStrategy[str]:
    known = (
        "[MASK]", "[MASK]*3", "[MASK]*0", "[MASK]*999", "the cat", " ", "\n", "[CLS]", "[SEP]", "고", "\ud800", "\0",
        "\u200d", "É", "##a",
    )  # fmt: skip
    words = st.sampled_from(known) | st.text(max_size=6)
    return st.lists(words, max_size=8).map("".join)


def _fill(made: Fixtures) -> Target:
    model = load(made.step)
    number = st.integers(-1, 70)
    cases = st.tuples(
        st.lists(_prompts(), max_size=2), number, st.sampled_from((None, "beam", "greedy")), number,
        st.sampled_from((None, 0, 1, 2)),
    )  # fmt: skip

    def read(case: Case, folder: Path) -> object:
        texts, top, method, beam_size, words = case
        if method is None:
            return fill(model, texts, top)
        return fill_jointly(model, texts, top, beam_size=min(beam_size, 4), words=words)

    return Target("fill", 0.03, cases, read, ("unmask.models.fill_mask", "unmask.models.joint_fill"))


def _serve(made: Fixtures) -> Target:
    models = Models([made.run])
    prompt = "the cat [MASK] on the mat"
    requests = {
        endpoint.path: {
            each.name: [prompt] if each.name == "texts" else prompt if each.name in ("text", "prefix") else each.default
            for each in endpoint.request.__dataclass_fields__.values()
        }
        for endpoint in ENDPOINTS
    }

    def of(number: int) -> st.SearchStrategy[tuple[int, Any]]:
        tree = requests[ENDPOINTS[number].path]
        values = value_edits(tree).map(lambda edits: changed(tree, edits))
        prompts = _prompts().map(lambda text: {**tree, **({"texts": [text]} if "texts" in tree else {"text": text})})
        return st.tuples(st.just(number), values | prompts)

    def read(case: tuple[int, Any], folder: Path) -> object:
        number, values = case
        endpoint = ENDPOINTS[number]
        request: Any = build_request(endpoint.request, values)
        found = endpoint.run(models.get(request.model), request)
        answers = list(found) if endpoint.is_stream else [found]
        return [json.dumps(plain(answer), allow_nan=False).encode() for answer in answers]

    cases = st.integers(0, len(ENDPOINTS) - 1).flatmap(of)
    return Target("serve", 0.02, cases, read, ("unmask.serve.requests", "unmask.serve.inference"))


# Running --------------------------------------------------------------------------------------------------------------

_WATCHED: Final = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
_TWO_PATHS: Final = ("os.rename", "os.link", "os.symlink")  # the second one is written
_IN_FOLDER: Final = ("os.mkdir", "os.remove", "os.rmdir")
_FORBIDDEN: Final = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class",
)  # fmt: skip
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_allowed: list[Path] = []  # folders that a case may write to; empty while no case is read
_seen: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a case does that no reader may do. An audit hook can't be removed."""
    if not _allowed:
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {arguments!r}"[:200])
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    written = arguments[1] if event in _TWO_PATHS else arguments[0] if arguments else None
    if (is_write or event in _WATCHED) and isinstance(written, str | os.PathLike):
        has_folder = event in _IN_FOLDER and arguments[-1] not in (-1, None)  # a path relative to an open folder
        base = f"/proc/self/fd/{arguments[-1]}" if has_folder else ""
        path = Path(os.path.realpath(os.path.join(base, written)))
        if not any(path.is_relative_to(folder) for folder in _allowed) and path != Path(os.devnull):
            _seen.append(f"{event} {path}")


sys.addaudithook(_watch)


@contextlib.contextmanager
def limits(*allowed: Path) -> Iterator[None]:
    """Limit time and memory of a case, and the folders that it may write to."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Finding(f"it took more than {CASE_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _allowed[:], _seen[:] = [Path(os.path.realpath(folder)) for folder in allowed], []
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
        _allowed.clear()
    if _seen:
        raise Finding(_seen[0])


def run_target(target: Target, num_cases: int, seed: int, allowed: Sequence[Path], num_traced: int = TRACED) -> Outcome:
    """Read cases of a target. The search ends at the first finding, which is made smaller first.

    Args:
        target: The target.
        num_cases: Number of cases.
        seed: Seed of hypothesis.
        allowed: Folders that a case may write to; cases lie in the first one.
        num_traced: Number of cases whose executed lines are counted.
    """
    outcome, start = Outcome(), time.monotonic()
    executed: set[tuple[str, int]] = set()
    sources = {str(inspect.getsourcefile(importlib.import_module(name))) for name in target.modules}

    @hypothesis.seed(seed)
    @settings(max_examples=num_cases, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
              suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))  # fmt: skip
    @given(target.cases)
    def check(case: Case) -> None:
        (allowed[0] / _LAST_CASE).write_text(
            repr(case), encoding="utf-8", errors="replace"
        )  # should it end the process
        is_traced = outcome.accepted + outcome.refused < num_traced
        with tempfile.TemporaryDirectory(dir=allowed[0]) as folder:
            try:
                with limits(*allowed), _traced(executed, sources) if is_traced else contextlib.nullcontext():
                    target.read(case, Path(folder))
                outcome.accepted += 1
            except UnmaskError:
                outcome.refused += 1

    faulthandler.dump_traceback_later(max(600.0, num_cases), exit=True)  # a library that never returns
    try:
        check()
    except BaseException as error:  # a panic of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        notes = " ".join(getattr(error, "__notes__", []))
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f"src{os.sep}unmask" in f.filename]
        place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "?"
        outcome.findings.append(f"{type(error).__name__} at {place}: {error} | {notes}"[:_LONGEST_FINDING])
    finally:
        faulthandler.cancel_dump_traceback_later()
    outcome.seconds = time.monotonic() - start
    outcome.lines = (len(executed), sum(map(_count_lines, sources)))
    return outcome


_LAST_CASE: Final = "last-case.txt"


def run_apart(target: Target, num_cases: int, seed: int, allowed: Sequence[Path]) -> Outcome:
    """Read cases of a target in a process of its own: a library that aborts it is a finding, too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(run_target(target, num_cases, seed, allowed)))
    process.start()
    sender.close()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        process.join()
        case = (allowed[0] / _LAST_CASE).read_text(encoding="utf-8", errors="replace")
        outcome = Outcome(findings=[f"the process ended with code {process.exitcode}: {case}"[:_LONGEST_FINDING]])
    process.join()
    return outcome


@contextlib.contextmanager
def _traced(executed: set[tuple[str, int]], sources: set[str]) -> Iterator[None]:
    """Add the lines of these files that the block executes."""

    def trace_line(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            executed.add((frame.f_code.co_filename, frame.f_lineno))
        return trace_line

    def trace_call(frame: FrameType, event: str, argument: object) -> Any:
        return trace_line if frame.f_code.co_filename in sources else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        yield
    finally:
        sys.settrace(before)


def _count_lines(source: str) -> int:
    """Return the number of lines of a file's functions that can be executed."""
    codes = [compile(Path(source).read_text(encoding="utf-8"), source, "exec")]
    lines: set[int] = set()
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        if code.co_flags & inspect.CO_NEWLOCALS:  # a function, not the module or a class
            lines |= {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return len(lines)


# Damage ---------------------------------------------------------------------------------------------------------------

DETECTED, EQUAL, SHOWN, MISSED = "detected, file named", "equal results", "shown only", "NOT DETECTED"
KINDS: Final = (DETECTED, EQUAL, SHOWN, MISSED)


def _opened_run(made: Fixtures, folder: Path) -> dict[str, Any]:
    """Read what a resume reads, and return what it computes with, and what is only shown."""
    require_run_format(folder)
    recipe, plan = read_recipe(folder)
    check_unchanged(folder)
    environment = read_environment(folder)
    if changes := differences(determinism_key(made.context, recipe), environment["determinism"]):
        raise RunError("; ".join(changes), location=str(folder / "env.json"))
    reopen_text(folder, environment, recipe.data, verify=True)
    tokenizer = load_run_tokenizer(folder, environment)
    state = checkpoint.load(folder, made.training)
    model = load(folder)
    tensors = {**made.training.module.state_dict(), **made.training.optimizer.state_tensors()}
    return {
        "recipe": repr(recipe), "plan": repr(plan), "tokenizer": tokenizer.fingerprint, "state": repr(state.to_json()),
        "tensors": _digest(tensors), "model": _digest(model.encoder.state_dict()), "card": repr(model.card),
        "shown": repr((environment, list(read_log(folder / "log.jsonl")))),
    }  # fmt: skip


def _opened_cache(made: Fixtures, folder: Path) -> dict[str, Any]:
    """Open the token cache as a resume with --verify does, and return digests of its tokens."""
    tokenizer = load_run_tokenizer(made.run, read_environment(made.run))
    corpus = prepare(made.source, made.recipe.data, folder, tokenizer=tokenizer, verify=True)
    names = ("train", "held-out")
    shards = [open_shards(corpus.folder / name, verify=True) for name in names]
    tokens = [
        files.digest(*(each.ids(n, 0, int(size)).tobytes() for n, size in enumerate(each.lengths))) for each in shards
    ]
    return {"tokens": tokens, "facts": repr(corpus.facts), "shown": ""}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    return files.digest(*(part for name, t in sorted(tensors.items()) for part in (name, t.detach().numpy().tobytes())))


def _damaged(data: bytes, number: int, places: int) -> bytes:
    """Return the data cut short (even numbers) or with one bit flipped (odd ones), at places at equal distances."""
    at = (number // 2) * len(data) // places
    if number % 2 == 0:
        return data[:at]
    return data[:at] + bytes([data[at] ^ (1 << number // 2 % 8)]) + data[at + 1 :]


def run_damage(made: Fixtures, places: int) -> dict[str, dict[str, Any]]:
    """Damage every file of the run, with its checkpoint, and of its token cache; return the outcomes of each file."""
    outcomes: dict[str, dict[str, Any]] = {}
    root = files.default_cache()
    for kind, source, opened in (("run", made.run, _opened_run), ("cache", root, _opened_cache)):
        with tempfile.TemporaryDirectory(dir=made.folder) as name:
            folder = Path(name) / kind
            shutil.copytree(source, folder, symlinks=True)
            expected = opened(made, folder)
            part = folder / made.cache.relative_to(root) if kind == "cache" else folder
            for path in sorted(path for path in part.rglob("*") if path.is_file() and not path.is_symlink()):
                data = path.read_bytes()
                counts, examples = Counter[str](), list[str]()
                for number in range(2 * min(places, len(data))):
                    path.write_bytes(_damaged(data, number, min(places, len(data))))
                    found, detail = _damage_outcome(partial(opened, made, folder), expected, path)
                    counts[found] += 1
                    examples += [f"{number}: {detail}"[:300]] if found == MISSED else []
                    path.write_bytes(data)
                outcomes[f"{kind}/{path.relative_to(part)}"] = {**counts, "missed": examples[:3]}
    return outcomes


def _damage_outcome(read: Callable[[], dict[str, Any]], expected: Mapping[str, Any], path: Path) -> tuple[str, str]:
    try:
        found = read()
    except UnmaskError as error:
        return (DETECTED, "") if path.name in str(error) or path.parent.name in error.location else (MISSED, str(error))
    except Exception as error:  # a traceback is a finding
        return MISSED, f"{type(error).__name__}: {error}"
    differing = [key for key in expected if found[key] != expected[key]]
    return (EQUAL, "") if not differing else (SHOWN, "") if differing == ["shown"] else (MISSED, f"{differing}")


# Program --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_run() -> Iterator[Fixtures]:
    """Yield the fixtures in a temporary folder, in memory if the system has one, with a cache of their own."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        os.environ["UNMASK_CACHE"] = str(Path(folder) / "cache")
        tempfile.tempdir = folder  # readers may write temporary files
        yield make_fixtures(Path(folder))


def main() -> int:
    """Run all targets and the damage, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=CASES, help="number of cases of all targets together")
    parser.add_argument("--damage", type=int, default=PLACES, help="places of each file; 0: no damage")
    parser.add_argument("--target", help="only this target")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", type=Path, help="file of the result")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    start = time.monotonic()
    with small_run() as made:
        outcomes: dict[str, Outcome] = {}
        for target in targets_of(made):
            if arguments.target in (None, target.name):
                number = max(1, round(arguments.cases * target.share))
                outcome = outcomes[target.name] = run_apart(target, number, arguments.seed, [made.folder])
                lines = f"{outcome.lines[0]:,} of {outcome.lines[1]:,} lines"
                print(f"{target.name:18} {outcome.accepted:7,} accepted {outcome.refused:7,} refused  "
                      f"{lines:22} {outcome.seconds:6.0f} s", *outcome.findings, sep="\n  ", flush=True)  # fmt: skip
        damage = run_damage(made, arguments.damage) if arguments.damage and arguments.target is None else {}
    for name, row in damage.items():
        print(f"{name:60}", *(f"{kind}: {row.get(kind, 0)}" for kind in KINDS), *row["missed"])
    cases = sum(each.accepted + each.refused for each in outcomes.values())
    print(f"{cases:,} cases in {time.monotonic() - start:.0f} s")
    if arguments.json:
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "command": f"python benchmarks/fuzz.py --cases {arguments.cases} --damage {arguments.damage}",
            "seed": arguments.seed,
            "cases": cases,
            "seconds": round(time.monotonic() - start),
            "targets": {
                name: {
                    "cases": each.accepted + each.refused, "accepted": each.accepted, "refused": each.refused,
                    "lines executed in traced cases": each.lines[0], "lines": each.lines[1],
                    "seconds": round(each.seconds), "findings": each.findings,
                }
                for name, each in outcomes.items()
            },
            "damage": {"places of each file": arguments.damage, "files": damage},
        }  # fmt: skip
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    missed = any(row.get(MISSED) for row in damage.values())
    return 1 if missed or any(each.findings for each in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
