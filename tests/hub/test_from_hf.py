"""Import of folders that transformers wrote: equal logits, equal tensors after a round trip, or a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import unmask
from unmask.core.errors import DamagedError, ModelError, RunError, TokenizerError, UnmaskError
from unmask.core.types import Sample, logits_at, pack
from unmask.hub.from_hf import import_model, open_model
from unmask.hub.parity import compare
from unmask.models.model import Model, load
from unmask.tokenization.settings import WordPieceConfig
from unmask.tokenization.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 130  # of the embedding; the tokenizer has fewer tokens
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
ROBERTA = {"max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
BERT = {"max_position_embeddings": 64, "layer_norm_eps": 1e-7, "hidden_dropout_prob": 0.2}
MODERN = {"local_attention": 8, "pad_token_id": 0}
ENGLISH = (
    "the cat sat on the mat and looked at the moon .", "a dog ran over the hill to meet the old man .",
    "she gave him a book about the birds of the north .", "the ship came home with salt and silver and wine .",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    name: str
    shape: dict[str, Any]

    def build(self, **more: Any) -> Any:
        import transformers

        cls = getattr(transformers, self.name)
        torch.manual_seed(11)
        model = cls(cls.config_class(**{**SHAPE, **self.shape, **more})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 2 else 0.1))
        return model


KINDS = {
    name: Kind(name, shape)
    for shape, names in (
        (BERT, ("BertForPreTraining", "BertForMaskedLM", "BertModel")),
        (ROBERTA, ("RobertaForMaskedLM", "RobertaModel", "XLMRobertaForMaskedLM")),
        (MODERN, ("ModernBertForMaskedLM", "ModernBertModel")),
    )
    for name in names
}
MASKED, PAIRED = KINDS["BertForMaskedLM"], KINDS["BertForPreTraining"]


@pytest.fixture
def tokenizer(tokenizers: dict[tuple[str, str], Tokenizer]) -> Tokenizer:
    return tokenizers["wordpiece", "english"]


@pytest.fixture(scope="module")
def padded_by_1() -> Tokenizer:
    """As in RoBERTa, whose positions are counted from the id of the padding."""
    order = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
    return train_tokenizer(ENGLISH * 20, WordPieceConfig(vocab_size=100, special_tokens=order))


@pytest.fixture
def written(tokenizer: Tokenizer, padded_by_1: Tokenizer, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    def write(kind: Kind, **more: Any) -> tuple[Path, Any]:
        folder = tmp_path / kind.name
        model = kind.build(**more)
        model.save_pretrained(folder)
        (padded_by_1 if kind.shape is ROBERTA else tokenizer).save(folder)
        return folder, model

    return write


def texts() -> list[Sample]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, VOCAB_SIZE, (n,), generator=draw).numpy() for n in (40, 7, 2)]
    return [Sample(ids, ids.astype("uint8") * 0, token_type_ids=(ids > 60).astype("int64")) for ids in rows]


@torch.no_grad()
def assert_equal_outputs(imported: Model, expected: Any) -> None:
    family = type(expected).__name__
    for text in texts():
        batch = pack([text if family.startswith("Bert") else Sample(text.ids, text.token_flags)])
        given = {"input_ids": torch.from_numpy(text.ids)[None]}
        if family.startswith("Bert"):
            given["token_type_ids"] = torch.from_numpy(text.token_type_ids)[None]
        out = expected(**given)
        hidden = imported.encoder(batch)
        if family.endswith("Model"):
            torch.testing.assert_close(hidden, out.last_hidden_state[0], atol=1e-4, rtol=0)
            continue
        logits = out.logits if "logits" in out else out.prediction_logits
        logits_own = logits_at(imported.encoder, imported.head, batch, torch.arange(len(text.ids)))
        torch.testing.assert_close(logits_own, logits[0], atol=1e-4, rtol=0)
        if family == "BertForPreTraining":
            assert imported.pair is not None
            torch.testing.assert_close(imported.pair(hidden, batch), out.seq_relationship_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_logits_are_equal_and_the_round_trip_keeps_every_tensor(
    kind: Kind, written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, expected = written(kind)
    imported = import_model(folder, tmp_path / "mine")
    assert_equal_outputs(imported, expected)
    only = "encoder" if kind.name.endswith("Model") else "all"
    done = unmask.export(tmp_path / "mine", tmp_path / "back", only=only)
    assert done.architecture == kind.name and done.parity is not None and done.parity.logits <= 1e-4
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "back"))
    lost = set(before) - set(after)
    poolers = ("RobertaModel", "BertModel")  # without a sentence pair classifier, the pooler is left out with a note
    assert lost == ({"pooler.dense.weight", "pooler.dense.bias"} if kind.name in poolers else set())
    assert any("pooler" in note for note in imported.notes) is (kind.name in poolers)
    assert set(after) <= set(before)
    assert all(torch.equal(before[name], after[name]) for name in after)
    initialized = [note for note in imported.notes if note.startswith("initialized")]
    assert bool(initialized) is kind.name.endswith("Model"), initialized
    # An export followed by an import changes nothing either.
    reimported = open_model(tmp_path / "back")
    assert reimported.settings == imported.settings
    pairs = zip(imported.encoder.state_dict().items(), reimported.encoder.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    if only == "all":
        assert reimported.notes == () or "embeddings beyond" in reimported.notes[0]
        assert all(
            torch.equal(x, y) for x, y in zip(imported.head.parameters(), reimported.head.parameters(), strict=True)
        )
        assert_equal_outputs(load(tmp_path / "mine"), expected)


@pytest.mark.parametrize("name", ["BertForPreTraining", "RobertaForMaskedLM", "ModernBertForMaskedLM"])
def test_an_untied_decoder_is_kept(name: str, written: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, expected = written(KINDS[name], tie_word_embeddings=False)
    imported = import_model(folder, tmp_path / "mine")
    assert_equal_outputs(imported, expected)
    done = unmask.export(tmp_path / "mine", tmp_path / "back")
    assert (
        done.parity is not None
        and json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    )
    decoder = next(one for one in load_file(folder / "model.safetensors") if one.endswith("decoder.weight"))
    before, after = (load_file(one / "model.safetensors")[decoder] for one in (folder, tmp_path / "back"))
    assert torch.equal(before, after)


def test_the_weights_decide_if_they_and_config_json_disagree_on_tying(
    written: Callable[..., tuple[Path, Any]],
) -> None:
    folder, expected = written(MASKED, tie_word_embeddings=False)
    change_config(folder, tie_word_embeddings=True)
    imported = open_model(folder)
    assert any("kept the decoder untied" in note for note in imported.notes)
    assert_equal_outputs(imported, expected)


def change_config(folder: Path, name: str = "config.json", **more: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    table = renamed["bert.embeddings.word_embeddings.weight"].clone()
    return renamed | {
        "bert.embeddings.position_ids": torch.arange(64)[None], "cls.predictions.decoder.weight": table,
        "cls.predictions.decoder.bias": renamed["cls.predictions.bias"].clone(),
    }  # fmt: skip


def test_older_names_several_files_and_task_heads(written: Callable[..., tuple[Path, Any]]) -> None:
    folder, expected = written(PAIRED)
    change_weights(folder, older)
    imported = open_model(folder)
    assert_equal_outputs(imported, expected)
    assert any("gamma" in note for note in imported.notes)
    # The same in two files.
    tensors = load_file(folder / "model.safetensors") | {"classifier.weight": torch.zeros(2, 32)}
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    imported = open_model(folder)
    assert_equal_outputs(imported, expected)
    assert any("classifier.weight" in note for note in imported.notes)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DamagedError, match="model-00002"):
        open_model(folder)


def test_half_precision(written: Callable[..., tuple[Path, Any]]) -> None:
    folder, expected = written(MASKED)
    change_weights(folder, lambda tensors: {name: t.half() for name, t in tensors.items()})
    imported = open_model(folder)
    assert "float16" in imported.notes[0]
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(parameter.half().float())
    assert_equal_outputs(imported, expected)


def test_a_missing_pair_classifier_is_initialized_from_the_seed(
    written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = written(PAIRED)
    change_weights(folder, lambda ts: {n: t for n, t in ts.items() if "seq_relationship" not in n})
    one, other = (import_model(folder, tmp_path / str(n), seed=n) for n in (1, 2))
    assert any("initialized part of the pair head" in note for note in one.notes)
    assert one.pair is not None and other.pair is not None
    (pooler, relation), (pooler_2, relation_2) = ([*m.pair.state_dict().items()][::2] for m in (one, other))
    assert torch.equal(pooler[1], pooler_2[1]) and not torch.equal(relation[1], relation_2[1])


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "deberta"}, "deberta"),
        ({"model_type": "electra"}, "embedding_size"),
        ({"hidden_size": 48, "num_attention_heads": 3}, "word_embeddings.*got 130 × 32, expected 130 × 48"),
        ({"vocab_size": 140}, "got 130 × 32, expected 140 × 32"),
        ({"vocab_size": 50}, "100 tokens, but the embedding has only 50"),
        ({"num_hidden_layers": 3}, r"missing tensors .* bert\.encoder\.layer\.2"),
        ({"num_hidden_layers": 1}, r"unknown tensors .*: bert\.encoder\.layer\.1"),
    ],
)  # fmt: skip
def test_unsupported_models_are_refused_by_name(
    change: dict[str, Any], culprit: str, written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = written(MASKED)
    change_config(folder, **change)
    with pytest.raises(ModelError, match=culprit) as refused:
        import_model(folder, tmp_path / "mine")
    assert str(folder) in refused.value.location and refused.value.hint
    assert not (tmp_path / "mine").exists()


def test_pickles_and_folders_without_weights_are_refused(written: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = written(MASKED)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*never read") as refused:
        open_model(folder)
    assert "save_pretrained" in refused.value.hint
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights found"):
        open_model(folder)
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DamagedError, match="safetensors"):
        open_model(folder)


def test_an_existing_output_is_left_alone(written: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = written(MASKED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for force, words in ((False, "the output exists already"), (True, "not a model directory")):
        with pytest.raises(RunError, match=words):
            import_model(folder, tmp_path / "mine", force=force)
    with pytest.raises(RunError, match="is or contains the input"):
        import_model(folder, folder, force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


# Tokenizers in older files ---------------------------------------------------------------------------------

SENTENCES = ("The cat sat on the MAT, and it's 3.5 % Café.", "고양이가 매트 위에", "the 北京 moon")


def plain_tokenizer(folder: Path, **config: Any) -> None:
    """Remove tokenizer.json, as in a folder of an old version."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config",
    [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False, "do_lower_case": True}],
    ids=str,
)
def test_vocab_txt_becomes_the_tokenizer_of_transformers(
    config: dict[str, Any], written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    from transformers import BertTokenizer

    folder, _ = written(MASKED)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cat", "cafe", "café", "caf", "##e", "##é"]
    tokens += [
        "mat",
        "MA",
        "##T",
        "it",
        "'",
        "s",
        "3",
        ".",
        "5",
        "%",
        ",",
        "고양이가",
        "매",
        "##트",
        "北",
        "京",
        "北京",
        "moon",
    ]
    plain_tokenizer(folder, tokenizer_class="BertTokenizer", **config)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": len(tokens)}))
    imported = import_model(folder, tmp_path / "mine")
    assert any("made by transformers" in note for note in imported.notes)
    expected = BertTokenizer.from_pretrained(folder)
    for sentence in SENTENCES:
        encoded = imported.tokenizer.encode(sentence)
        assert (
            imported.tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
            == expected(sentence)["input_ids"]
        )
    assert imported.tokenizer.token_to_id("<new>") == len(tokens)
    unmask.export(tmp_path / "mine", tmp_path / "back")  # compares ids with AutoTokenizer too


def test_vocab_json_and_merges_become_a_tokenizer(
    written: Callable[..., tuple[Path, Any]], tokenizers: dict[tuple[str, str], Tokenizer], tmp_path: Path
) -> None:
    from transformers import RobertaTokenizer

    folder, _ = written(KINDS["RobertaForMaskedLM"], vocab_size=400, pad_token_id=0)
    model = json.loads(tokenizers["bpe", "english"].to_json())["model"]
    names = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
    vocabulary = {names.get(token, token): number for token, number in model["vocab"].items()}
    plain_tokenizer(folder, tokenizer_class="RobertaTokenizer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    imported = import_model(folder, tmp_path / "mine")
    expected = RobertaTokenizer.from_pretrained(folder)
    for sentence in SENTENCES:
        encoded = imported.tokenizer.encode(sentence)
        assert (
            imported.tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
            == expected(sentence)["input_ids"]
        )
    added_tokens = json.loads(expected.backend_tokenizer.to_str())["added_tokens"]
    takes_space = next(token["lstrip"] for token in added_tokens if token["content"] == "<mask>")
    assert imported.tokenizer.mask_takes_space is takes_space, "version 5 of transformers makes it without"
    change_config(folder, pad_token_id=0)
    assert any("pads with" in note for note in open_model(folder).notes) is False
    change_config(folder, pad_token_id=3)
    assert any("pads with" in note for note in open_model(folder).notes)
    unmask.export(tmp_path / "mine", tmp_path / "back")
    assert len(unmask.fill(imported, "the [MASK] sat")[0].masks) == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"spiece.model": "x"}, "without regular tokens"),
        ({}, "no tokenizer found"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "b c\n"}, "without regular tokens"),
        ({"vocab.txt": "the\n", "tokenizer_config.json": "{"}, "can't load this tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_converted_is_refused(
    files: dict[str, str], words: str, written: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = written(MASKED)
    plain_tokenizer(folder)
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=words) as refused:
        open_model(folder)
    assert isinstance(refused.value, UnmaskError) and refused.value.hint


def test_a_tokenizer_without_a_post_processor_gets_one(
    written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = written(MASKED)
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**whole, "post_processor": None}))
    imported = import_model(folder, tmp_path / "mine")
    assert any("adds CLS and SEP" in note for note in imported.notes)
    unmask.export(tmp_path / "mine", tmp_path / "back")


def test_all_modules_are_in_evaluation_mode(written: Callable[..., tuple[Path, Any]]) -> None:
    imported = open_model(written(PAIRED)[0])
    modules: list[nn.Module] = [imported.encoder, imported.head, *([imported.pair] if imported.pair else [])]
    assert not any(module.training for module in modules)


# Faults of foreign folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(
    value: float, name: str, written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = written(MASKED)

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[3] = value
        return tensors

    change_weights(folder, damage)
    for read in (unmask.load, lambda path: import_model(path, tmp_path / "mine")):
        with pytest.raises(ModelError, match=f"`{name}` has 1 numbers of .* NaN or infinite"):
            read(folder)
    assert not (tmp_path / "mine").exists()


def test_weights_that_overflow_float32_and_quantized_weights_are_refused(
    written: Callable[..., tuple[Path, Any]],
) -> None:
    folder, _ = written(MASKED)
    name = "cls.predictions.bias"
    change_weights(folder, lambda ts: {**ts, name: ts[name].double() + 1e300})
    with pytest.raises(ModelError, match=f"`{name}` has .* NaN or infinite in float32"):
        open_model(folder)
    change_weights(folder, lambda ts: {**ts, name: torch.zeros(VOCAB_SIZE, dtype=torch.int8)})
    with pytest.raises(ModelError, match=f"`{name}` has the format int8: quantized"):
        open_model(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM", "RobertaForMaskedLM"])
def test_prefixes_of_wrappers_are_removed(prefix: str, name: str, written: Callable[..., tuple[Path, Any]]) -> None:
    folder, expected = written(KINDS[name])
    change_weights(folder, lambda tensors: {f"{prefix}{key}": tensor for key, tensor in tensors.items()})
    if name != "ModernBertForMaskedLM":
        wrapped = ".layer.0._checkpoint_wrapped_module."
        change_weights(folder, lambda tensors: {key.replace(".layer.0.", wrapped): tensors[key] for key in tensors})
    imported = open_model(folder)
    assert any("removed the prefix" in note for note in imported.notes)
    assert not any("initialized" in note for note in imported.notes)
    assert_equal_outputs(imported, expected)


def test_an_imported_encoder_says_that_its_head_is_untrained(
    written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = written(KINDS["BertModel"])
    imported = import_model(folder, tmp_path / "mine")
    assert imported.pair is None
    assert json.loads((tmp_path / "mine/config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert any(note.startswith("initialized the masked-language") for note in load(tmp_path / "mine").notes)
    unmask.export(tmp_path / "mine", tmp_path / "out")
    assert any(note.startswith("initialized the masked-language") for note in load(tmp_path / "out").notes)


def test_new_files_have_the_permissions_of_the_umask(written: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = written(MASKED)
    import_model(folder, tmp_path / "mine")
    assert len({file.stat().st_mode for file in (tmp_path / "mine").iterdir()}) == 1


@pytest.mark.parametrize("subfolder", ["", "0_Transformer"])
def test_files_of_sentence_transformers_survive(
    subfolder: str, written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = written(KINDS["BertModel"])
    source = tmp_path / "sentences"
    inner = source / subfolder
    inner.parent.mkdir(exist_ok=True)
    folder.rename(inner)
    kinds = {"Transformer": subfolder, "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(kinds.items())
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    (source / "1_Pooling/config.json").write_text(pooling)
    (source / "2_Normalize").mkdir()
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    (source / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine"}')
    import_model(source, tmp_path / "mine")
    unmask.export(tmp_path / "mine", tmp_path / "out", only="encoder")
    unmask.export(source, tmp_path / "directly", only="encoder")
    with pytest.raises(ModelError, match="no masked language modeling head"):
        unmask.load(source)
    for one in (tmp_path / "mine", tmp_path / "out", tmp_path / "directly"):
        assert [module["path"] for module in json.loads((one / "modules.json").read_text())] == [
            "", "1_Pooling", "2_Normalize",
        ]  # fmt: skip
        assert (one / "1_Pooling/config.json").read_text() == pooling
        assert json.loads((one / "sentence_bert_config.json").read_text()) == {"max_seq_length": 40}
        assert (one / "config_sentence_transformers.json").is_file()
    load(tmp_path / "mine")
    (source / "modules.json").write_text(json.dumps([{**modules[1], "path": "../elsewhere"}]))
    with pytest.raises(DamagedError, match="invalid list of modules"):
        import_model(source, tmp_path / "other")


@pytest.mark.parametrize("lower", [True, False])
def test_ids_are_those_of_auto_tokenizer_if_the_files_disagree(
    lower: bool, written: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder, _ = written(MASKED)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "tokenizer_class": "BertTokenizer", "do_lower_case": lower}))
    expected = AutoTokenizer.from_pretrained(folder)
    imported = import_model(folder, tmp_path / "mine")
    for model in (imported, unmask.load(folder), unmask.load(tmp_path / "mine")):
        for text in ("the CAT sat on the Mat", "a [MASK] b"):
            encoded = model.tokenizer.encode(text, specials_in_text=True)
            ids = model.tokenizer.add_special_tokens(encoded.ids, encoded.marks)[0].tolist()
            assert ids == expected(text)["input_ids"]


@pytest.mark.parametrize(
    ("tokenizer_class", "words"),
    [
        ("BertJapaneseTokenizer", "splits text in Python|can't load"),
        ("XLMRobertaTokenizer", "there is neither"),
        ("KoBertTokenizer", "can't load this tokenizer"),
        ("PhobertTokenizer", "can't load this tokenizer"),
        (None, "the vocabulary is of SentencePiece, not of WordPiece"),
    ],
)
def test_vocab_txt_of_another_kind_is_refused(
    tokenizer_class: str | None, words: str, written: Callable[..., tuple[Path, Any]]
) -> None:
    folder, _ = written(MASKED)
    plain_tokenizer(folder, **({"tokenizer_class": tokenizer_class} if tokenizer_class else {}))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁the", "▁cat", "s", "▁mat", "▁on"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=words):
        open_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 32.0}, {"hidden_size": True}, {"num_hidden_layers": float("nan")}, {"layer_norm_eps": "x"},
        {"tie_word_embeddings": None}, {"vocab_size": True}, {"model_type": ["bert"]}, {"is_decoder": 0},
        {"max_position_embeddings": 10**40}, {"quantization_config": {"bits": 4}},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_in_config_json_are_named(change: dict[str, Any], written: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = written(MASKED)
    change_config(folder, **change)
    with pytest.raises(ModelError, match=next(iter(change)) if "model_type" not in change else "type"):
        open_model(folder)


def test_a_byte_order_mark_in_the_vocabulary(written: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = written(MASKED)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "."]
    plain_tokenizer(folder, tokenizer_class="BertTokenizer")
    for encoding in ("utf-8", "utf-8-sig"):
        for name, text in (("vocab.txt", "\n".join(tokens) + "\n"), ("tokenizer_config.json", "{}")):
            (folder / name).write_text(text, encoding=encoding)
        model = open_model(folder)
        assert model.tokenizer.role_id("pad_token") == 0 and model.tokenizer.size == len(tokens)
        assert model.tokenizer.encode("The cats sat.").ids.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("keeps_json", [True, False])
@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_have_the_ids_of_their_file(
    file: str, keeps_json: bool, written: Callable[..., tuple[Path, Any]]
) -> None:
    """Each file has added tokens above a hole of the ids, to which transformers gives other ids without a word."""
    folder, _ = written(MASKED)
    old = Tokenizer.load(folder)
    tokens = [old.id_to_token(id) for id in range(old.size)]
    if not keeps_json:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
        change_config(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=False)
    for id, is_right in ((len(tokens), True), (len(tokens) + 7, False), (3, False)):
        if file == "added_tokens.json":
            (folder / file).write_text(json.dumps({"covid19": id}))
        else:
            change_config(folder, file, added_tokens_decoder={str(id): {"content": "covid19", "special": False}})
        if is_right:
            assert open_model(folder).tokenizer.token_to_id("covid19") == id
        else:
            with pytest.raises(TokenizerError, match=f"'covid19' has the id {id} in {file}, but the tokenizer"):
                open_model(folder)


def test_parity_is_not_satisfied_by_nan(written: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = written(MASKED)
    model = open_model(folder)
    with torch.no_grad():
        next(model.head.parameters())[0] = float("nan")  # after the model was checked
    with pytest.raises(ModelError, match="logits differ from those of transformers by nan"):
        compare(folder, model, ["the cat sat on the mat ."], "a test")


def test_a_byte_order_mark_and_no_padding_id_are_accepted(written: Callable[..., tuple[Path, Any]]) -> None:
    folder, expected = written(MASKED)
    change_config(folder, pad_token_id=None)
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert_equal_outputs(load(folder), expected)
