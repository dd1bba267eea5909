"""Export: its files, its comparison with transformers, and its errors."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import unmask
from unmask.cli import main
from unmask.core.errors import ModelError, RunError
from unmask.hub.from_hf import open_model
from unmask.hub.parity import compare, tolerance
from unmask.models import build_model, build_pair
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.model import Model, load, save_model
from unmask.models.modernbert import ModernBertConfig
from unmask.tokenization.settings import CharacterConfig, WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

BERT = BertConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=64
)
MODERN = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
SMALL = [
    "model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=32",
    "train.threads=1", "data.tokenizer.vocab_size=120", "stage.0.batch_size=500 tokens",
    "stage.1.batch_size=500 tokens",
]  # fmt: skip


@pytest.fixture(scope="session")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "notes"
    unmask.pretrain(prose, recipe="tiny", budget="4 steps", settings=SMALL, out=out)
    return out


def test_an_extended_vocabulary_is_compared_with_the_first_one(prose: Path, tmp_path: Path) -> None:
    """Added tokens with accents, which are normalized, count as the same tokens; a moved id is refused."""
    inner = tokenizers.Tokenizer.from_str(
        train_tokenizer(prose.read_text().split("\n"), WordPieceConfig(vocab_size=120, lowercase=True)).to_json()
    )
    inner.add_tokens([tokenizers.AddedToken("\u00c5ngstr\u00f6m", normalized=True), "covid"])
    folder_of(small(Tokenizer(inner)), tmp_path / "first")
    run, settings = tmp_path / "run", ["train.threads=1", "stage.0.batch_size=256 tokens"]
    unmask.pretrain(
        prose, start=tmp_path / "first", extend_vocabulary=5, out=run, budget="1 steps", settings=settings, display=None
    )
    exported = unmask.export(run, tmp_path / "out")
    assert exported.parity is not None and exported.parity.logits < 1e-5
    assert load(tmp_path / "out").tokenizer.size == inner.get_vocab_size() + 5
    file = run / "start" / "tokenizer.json"
    spec = json.loads(file.read_text())
    vocabulary = spec["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="2 tokens of the first model have other ids"):
        unmask.export(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def folder_of(model: Model, folder: Path) -> Path:
    save_model(folder, model)
    return folder


def small(tokenizer: Tokenizer, *, pair: bool = False) -> Model:
    torch.manual_seed(3)
    encoder, head = build_model(BERT, tokenizer.size)
    return Model(encoder.eval(), head.eval(), tokenizer, BERT, pair=build_pair(BERT).eval() if pair else None)


def run_command(*arguments: object) -> tuple[int, str]:
    """The command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), ""


def test_a_run_becomes_a_folder_with_a_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "notes-bert"
    assert run_command("export", run, out, "--json")[0] == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parity"]["source"] == "held-out texts of the run" and result["parity"]["logits"] < 1e-4
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    card = (out / "README.md").read_text(encoding="utf-8")
    written = json.loads((out / "card.json").read_text())
    for words in (
        written["text_fingerprint"], "`ModernBertForMaskedLM`", "4 steps", 'pipeline("fill-mask"', "[MASK]",
        "SentenceTransformer", f"{written['validation']['loss']:.4f}", "largest difference", "Not stated.",
        "[model]", "torch", 'pipeline_tag: fill-mask\nmask_token: "[MASK]"',
    ):  # fmt: skip
        assert words in card, words
    assert card.startswith("---\n") and str(tmp_path.parent) not in card and "Unverified" not in card
    model, exported = load(run), load(out)
    assert all(
        torch.equal(a, b) for a, b in zip(model.encoder.parameters(), exported.encoder.parameters(), strict=True)
    )
    assert exported.context == model.context and exported.words == model.words
    assert run_command("export", run, out)[0] == 2
    assert "--force" in capsys.readouterr().err
    assert run_command("export", run, out, "--force", "--unverified")[0] == 0
    assert "**Unverified**" in (out / "README.md").read_text(encoding="utf-8")
    assert run_command("import", out, tmp_path / "mine")[0] == 0
    assert "modernbert, 1 layers, hidden size 32" in capsys.readouterr().out


def test_python_blocks_of_the_card_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "FOLDER"
    unmask.export(run, out)
    card = (out / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_encoder_without_heads_and_the_pair_head(
    tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path
) -> None:
    from transformers import AutoModel

    source = folder_of(small(tokenizers["wordpiece", "korean"], pair=True), tmp_path / "source")
    whole = unmask.export(source, tmp_path / "whole")
    assert whole.architecture == "BertForPreTraining"
    assert whole.parity is not None and whole.parity.pair is not None and whole.parity.pair < 1e-4
    alone = unmask.export(source, tmp_path / "alone", only="encoder")
    assert alone.architecture == "BertModel" and alone.parity is not None and alone.parity.pair is not None
    _, report = AutoModel.from_pretrained(tmp_path / "alone", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert "feature-extraction" in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")
    before, after = open_model(tmp_path / "whole"), open_model(tmp_path / "alone")
    pairs = zip(before.encoder.parameters(), after.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert before.notes == () and len(after.notes) == 2, "the two heads are initialized, one of them in part"
    with pytest.raises(ModelError, match="no masked language modeling head"):
        load(tmp_path / "alone")


def test_an_export_that_transformers_reads_differently_is_refused(
    tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path
) -> None:
    model = small(tokenizers["bpe", "english"], pair=True)
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    folder = folder_of(model, tmp_path / "one")
    assert compare(folder, model, texts, "these").logits < 1e-4
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name, words in (
        ("bert.encoder.layer.1.output.dense.weight", r"^logits differ .* BertForPreTraining"),
        ("cls.seq_relationship.bias", "logits of the pair head differ"),
    ):
        save_file({**tensors, name: tensors[name] * 1.1 + 0.01}, weights, {"format": "pt"})
        with pytest.raises(ModelError, match=f"(?s){words}"):
            compare(folder, model, texts, "these")
    save_file({name.replace("cls.", "other."): t for name, t in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="doesn't find its tensors"):
        compare(folder, model, texts, "these")
    tokenizers["bpe", "korean"].save(folder)
    with pytest.raises(ModelError, match="AutoTokenizer gives other ids"):
        compare(folder, model, texts, "these")


def test_the_limit_of_a_difference_grows_with_the_largest_logit(
    tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path
) -> None:
    model, name = small(tokenizers["bpe", "english"]), "cls.predictions.bias"
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    weights = folder_of(model, tmp_path / "one") / "model.safetensors"
    tensors = load_file(weights)
    first = torch.arange(len(tensors[name])) == 0
    save_file({**tensors, name: tensors[name] + 30 * first}, weights, {"format": "pt"})
    model = load(tmp_path / "one")
    for change in (2e-4, 1e-3, math.inf):
        save_file({**tensors, name: tensors[name] + 30 * first + change * ~first}, weights, {"format": "pt"})
        if change == 2e-4:
            parity = compare(tmp_path / "one", model, texts, "these")
            assert 1e-4 < parity.logits < parity.limit == pytest.approx(3e-4, rel=0.1)
            continue
        with pytest.raises(ModelError, match=r"logits differ .* more than 0\.0003"):
            compare(tmp_path / "one", model, texts, "these")
    assert tolerance(math.inf) == tolerance(0.0) == 1e-4


def test_a_tokenizer_without_the_characters_of_the_sentences(tmp_path: Path) -> None:
    model = small(train_tokenizer(["0123456789" * 9], CharacterConfig()))
    done = unmask.export(folder_of(model, tmp_path / "digits"), tmp_path / "out")
    assert done.parity is not None and done.parity.source == "texts made of tokens of the vocabulary"


def test_the_tutorial_encoder_is_refused(tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["character", "english"]
    shape = TutorialConfig()
    encoder, head = build_model(shape, tokenizer.size)
    source = folder_of(Model(encoder, head, tokenizer, shape), tmp_path / "seed")
    with pytest.raises(ModelError, match="no class in transformers"):
        unmask.export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_that_is_read_is_never_overwritten(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    for out in (copy, copy / "best", tmp_path):
        with pytest.raises(RunError, match=r"contains the input|output exists"):
            unmask.export(copy / "best", out, force=out != copy / "best")
    assert load(copy).settings == load(run).settings


WITHOUT_TRANSFORMERS = """
import importlib.util
import sys
sys.modules["transformers"] = None  # as if it were not installed
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "transformers" else find(name, *more)
from unmask.cli import main
run, out = sys.argv[1:]
for more in ([], ["--format", "onnx"], ["--unverified"]):
    sys.argv = ["unmask", "export", run, out, *more]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code or 0, flush=True)
"""


def test_without_transformers_it_stops_with_the_command_that_installs_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(run), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    stopped, refused, wrote = done.stdout.split("ended with")[:3]
    assert stopped == "" and refused == " 2\n" and wrote.startswith(" 2\n"), "nothing was written at first"
    assert done.stderr.count('pip install "transformers') == 2 and done.stderr.count("or skip the comparison") == 1
    assert "unverified: not compared" in wrote
    assert done.stdout.endswith("ended with 0\n"), done.stderr
    assert "**Unverified**" in (out / "README.md").read_text(encoding="utf-8")
