"""Imports folders with one changed key each, and compares ids and logits with those of transformers.

    python benchmarks/fuzz_import.py [--sample N] [--folder NAME] [--json FILE]

Four small folders (BERT, ModernBERT, RoBERTa, and XLM-R with Unigram) are written. Every key of config.json,
tokenizer_config.json and tokenizer.json is changed on its own: removed, or set to values of other types and sizes.
Each changed folder is either imported with the ids and logits of transformers, or refused with an UnmaskError.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from unmask.core.errors import UnmaskError
from unmask.core.types import Sample, logits_at, pack
from unmask.hub.from_hf import import_model, open_model
from unmask.tokenization.settings import ByteBpeConfig, UnigramConfig, WordPieceConfig
from unmask.tokenization.tokenizer import train_tokenizer

RESULT: Final = Path(__file__).parent / "results" / "fuzz_import.json"
FILES: Final = ("config.json", "tokenizer_config.json", "tokenizer.json")
TEXTS: Final = (
    "the cat sat on the mat .",
    "The CAT, naïve Café; it's 3.5 %",
    "고양이가 매트 위에 北京",
    "a [MASK] b <mask> c  d\t\n",
    "",
)
LINES: Final = (
    "the cat sat on the mat and looked at the moon .",
    "a dog ran over the hill to meet the old man .",
    "고양이가 매트 위에 앉아서 달을 바라보았다 .",
    "Café naïve, it's 3.5 % of the North .",
)
DELETE: Final = object()
VALUES: Final = (
    None, True, False, 0, 1, -1, 3, 64, 10**30, 0.5, 4.0, float("nan"), "", "x", "4", "[MASK]", [], [1], ["x"], {},
    {"x": 1}, {"content": 3},
)  # fmt: skip
# Outcomes; the first three are right.
EQUAL, REFUSED, NOTED = "equal", "refused", "equal, with a note"
OWN_READING = "transformers refuses it, unmask reads it"
OTHER_IDS, OTHER_LOGITS, CRASHED = "OTHER IDS", "OTHER LOGITS", "CRASHED"
WRONG: Final = (OTHER_IDS, OTHER_LOGITS, CRASHED)


@dataclass(frozen=True)
class Case:
    """One change of one file: the path of the key and its new value, or DELETE."""

    folder: str
    file: str
    path: tuple[str | int, ...]
    value: Any

    def __str__(self) -> str:
        value = "deleted" if self.value is DELETE else f"= {self.value!r}"
        return f"{self.folder}/{self.file}: {'.'.join(map(str, self.path))} {value}"


def write_folders(root: Path) -> dict[str, Path]:
    """Write the four folders, with random weights and small trained tokenizers."""
    order = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bert": (transformers.BertForMaskedLM, WordPieceConfig(vocab_size=110), {"max_position_embeddings": 64}),
        "modernbert": (
            transformers.ModernBertForMaskedLM, ByteBpeConfig(vocab_size=300),
            {"local_attention": 8, "pad_token_id": 0, "max_position_embeddings": 64},
        ),
        "roberta": (
            transformers.RobertaForMaskedLM, ByteBpeConfig(vocab_size=300, special_tokens=order),
            {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
        ),
        "unigram": (
            transformers.XLMRobertaForMaskedLM, UnigramConfig(vocab_size=110, special_tokens=order),
            {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
        ),
    }  # fmt: skip
    folders: dict[str, Path] = {}
    for number, (name, (model_class, tokenizer_settings, more)) in enumerate(kinds.items()):
        folder = folders[name] = root / name
        tokenizer = train_tokenizer(LINES * 20, tokenizer_settings)
        torch.manual_seed(number)
        config = model_class.config_class(vocab_size=tokenizer.size, **shape, **more)
        model_class(config).save_pretrained(folder)
        tokenizer.save(folder, longest=64)
        rewrite_tokenizer(folder, name)
    return folders


def rewrite_tokenizer(folder: Path, name: str) -> None:
    """Write the tokenizer's files as folders on the Hub have them: by class, with the keys of the class."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if name == "bert":
        more = {
            "do_lower_case": False,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "do_basic_tokenize": True,
        }
        config |= {"tokenizer_class": "BertTokenizer", "never_split": None, **more}
    elif name == "modernbert":
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif name == "roberta":
        config |= {"bos_token": "[CLS]", "eos_token": "[SEP]", "add_prefix_space": False, "trim_offsets": True}
    else:
        config |= {"bos_token": "[CLS]", "eos_token": "[SEP]", "sp_model_kwargs": {}}
    mask = {"content": "[MASK]", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    path.write_text(json.dumps({**config, "mask_token": {**mask, "__type": "AddedToken"}, "added_tokens_decoder": {}}))


def cases_of(name: str, folder: Path) -> Iterator[Case]:
    """Yield every change of every key; of long lists and tables only the first and last entries."""
    for file in FILES:
        tree = json.loads((folder / file).read_text())
        extra = {
            "config.json": ("quantization_config", "rope_scaling", "is_decoder", "torch_dtype", "tokenizer_class",
                            "chunk_size_feed_forward", "position_embedding_type", "output_hidden_states"),
            "tokenizer_config.json": ("do_lower_case", "add_prefix_space", "additional_special_tokens", "add_bos_token",
                                      "extra_special_tokens", "unk_token", "padding_side", "truncation_side",
                                      "auto_map", "split_special_tokens", "strip_accents", "tokenizer_file",
                                      "bos_token"),
        }.get(file, ())  # fmt: skip
        for path in [*paths_of(tree), *((key,) for key in extra if key not in tree)]:
            for value in (DELETE, *VALUES):
                if value is DELETE and path[-1] in extra and path[-1] not in tree:
                    continue
                yield Case(name, file, path, value)


def paths_of(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every key below a value."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    if (len(items) > 20 and path) or (isinstance(tree, list) and len(items) > 3):
        items = [items[0], items[-1]]
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list) and value:
            yield from paths_of(value, (*path, key))


def changed(tree: Any, case: Case) -> Any:
    """Return a copy of a file's content with the change of a case."""
    tree = copy.deepcopy(tree)
    node = tree
    for part in case.path[:-1]:
        node = node[part]
    if case.value is DELETE:
        del node[case.path[-1]]
    else:
        node[case.path[-1]] = copy.deepcopy(case.value)
    return tree


@torch.inference_mode()
def outcome(folder: Path, out: Path) -> tuple[str, str]:
    """Import a folder and compare it with transformers; return the outcome and a detail."""
    try:
        model = open_model(folder)
    except UnmaskError as error:
        return REFUSED, error.message
    except BaseException as error:  # a panic of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return CRASHED, f"{type(error).__name__}: {error}"
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        hf_model: Any = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        hf_ids = [tokenizer(text)["input_ids"] for text in TEXTS]
        sample = [
            number % model.encoder.vocab_size
            for number in range(5, 5 + min(20, model.settings.max_position_embeddings))
        ]
        hf_output = hf_model.eval()(input_ids=torch.tensor([sample]), attention_mask=torch.ones(1, len(sample)).long())
        hf_logits = hf_output[0] if isinstance(hf_output, tuple) else hf_output.logits
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return OWN_READING, f"{type(error).__name__}: {error}"
    try:
        import_model(folder, out, force=True)
        for text, expected in zip(TEXTS, hf_ids, strict=True):
            encoded = model.tokenizer.encode(text, specials_in_text=True)
            ids = model.tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
            if ids != list(expected):
                noted = any("special tokens" in note for note in model.notes)
                return (NOTED if noted else OTHER_IDS), f"{text!r}: {ids[:12]}, transformers {list(expected)[:12]}"
        ids_T = torch.tensor(sample)
        batch = pack([Sample(ids_T.numpy(), ids_T.numpy().astype("uint8") * 0)])
        logits = logits_at(model.encoder, model.head, batch, torch.arange(len(sample)))
    except UnmaskError as error:
        return REFUSED, error.message
    except BaseException as error:  # a panic of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return CRASHED, f"{type(error).__name__}: {error}"
    difference = float((logits - hf_logits[0]).abs().max())
    if not difference <= 1e-4:
        initialized = next((note for note in model.notes if note.startswith("initialized")), "")
        return (NOTED, initialized) if initialized else (OTHER_LOGITS, f"{difference}")
    return (NOTED if any("AutoTokenizer" in note for note in model.notes) else EQUAL), ""


def run(folders: dict[str, Path], cases: list[Case], report: bool = False) -> list[tuple[Case, str, str]]:
    """Return the outcome of each case. The folders are as before afterwards."""
    results: list[tuple[Case, str, str]] = []
    with tempfile.TemporaryDirectory() as out:
        for number, case in enumerate(cases):
            path = folders[case.folder] / case.file
            before = path.read_text()
            path.write_text(json.dumps(changed(json.loads(before), case), ensure_ascii=False))
            try:
                results.append((case, *outcome(folders[case.folder], Path(out) / "model")))
            finally:
                path.write_text(before)
            if report and results[-1][1] in (*WRONG,):
                print(f"{results[-1][1]}  {case}  {results[-1][2][:160]}", flush=True)
            if report and number % 500 == 499:
                print(f"{number + 1} of {len(cases)}", file=sys.stderr, flush=True)
    return results


def all_cases(folders: dict[str, Path], sample: int = 0) -> list[Case]:
    """Return the cases of all folders, or about `sample` of them at equal distances."""
    cases = [case for name, folder in folders.items() for case in cases_of(name, folder)]
    return cases[:: max(1, len(cases) // sample)] if sample else cases


def main() -> int:
    """Run the cases, print a table by file and outcome, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=0, help="number of cases; by default all")
    parser.add_argument("--folder", help="only this folder")
    parser.add_argument("--json", type=Path, help="file of the result")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.monotonic()
    root = Path(tempfile.mkdtemp())
    try:
        folders = write_folders(root)
        if arguments.folder:
            folders = {arguments.folder: folders[arguments.folder]}
        results = run(folders, all_cases(folders, arguments.sample), report=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    seconds = time.monotonic() - start
    counts = Counter((f"{case.folder}/{case.file}", kind) for case, kind, _ in results)
    kinds = [EQUAL, NOTED, REFUSED, OWN_READING, *WRONG]
    print(
        "file".ljust(34), *(kind.rjust(8) for kind in ("equal", "noted", "refused", "own", "ids", "logits", "crashed"))
    )
    table = {name: {kind: counts[name, kind] for kind in kinds} for name in sorted({name for name, _ in counts})}
    for name, row in table.items():
        print(name.ljust(34), *(str(row[kind]).rjust(8) for kind in kinds))
    for case, kind, detail in results:
        if kind == OWN_READING:
            print(f"{kind}: {case}  {detail[:120]!r}")
    print(f"{len(results):,} cases in {seconds:.0f} s")
    if arguments.json:
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "command": "make fuzz-import",
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "seconds": round(seconds),
            "cases": len(results),
            "outcomes": table,
            "wrong": [f"{kind}: {case}" for case, kind, _ in results if kind in WRONG],
            "own reading": [str(case) for case, kind, _ in results if kind == OWN_READING],
        }
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any(kind in WRONG for _, kind, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
