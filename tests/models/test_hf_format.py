from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unmask.core.errors import ModelError
from unmask.core.types import Sample, logits_at, pack
from unmask.models import EncoderConfig, build_model, build_pair
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.hf_format import States, from_hf_config, from_hf_tensors, to_hf_config, to_hf_tensors
from unmask.models.modernbert import ModernBertConfig

VOCABULARY = 61
IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
LENGTHS = (7, 70, 200)
SHAPES = [
    ModernBertConfig(
        num_hidden_layers=4, hidden_size=32, num_attention_heads=2, intermediate_size=48, global_attn_every_n_layers=3
    ),
    ModernBertConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=40,
        global_attn_every_n_layers=1,
        global_rope_theta=5000.0,
    ),
    ModernBertConfig(
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=2,
        intermediate_size=40,
        global_attn_every_n_layers=5,
        local_attention=32,
        local_rope_theta=77.0,
    ),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def enlarge_weights(*modules: nn.Module) -> None:
    """Enlarge the weights, so that an error in any of them shows in the logits."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 2 else 0.3))


def texts() -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    draw = np.random.default_rng(3)
    for length in LENGTHS:
        yield draw.integers(0, VOCABULARY, length)


def logits(encoder: nn.Module, head: nn.Module) -> list[torch.Tensor]:
    batch = pack([Sample(ids, np.zeros(len(ids), np.uint8)) for ids in texts()])
    with torch.no_grad():
        return list(logits_at(encoder, head, batch, torch.arange(batch.tokens)).split(list(LENGTHS)))


def hf_logits(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in texts()]


def states(encoder: nn.Module, head: nn.Module, pair: nn.Module | None = None) -> States:
    return States(encoder.state_dict(), head.state_dict(), None if pair is None else pair.state_dict())


def write(folder: Path, encoder: nn.Module, head: nn.Module, shape: EncoderConfig) -> None:
    tensors = to_hf_tensors(states(encoder, head), shape)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(shape, VOCABULARY, IDS)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_loads_a_saved_model_with_equal_logits(shape: ModernBertConfig, tmp_path: Path):
    from transformers import AutoModelForMaskedLM, ModernBertForMaskedLM

    encoder, head = build_model(shape, VOCABULARY)
    enlarge_weights(encoder, head)
    write(tmp_path, encoder, head, shape)
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, ModernBertForMaskedLM)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.config.pad_token_id == 0
    for tensor, hf_model in zip(logits(encoder, head), hf_logits(model.eval()), strict=True):
        torch.testing.assert_close(tensor, hf_model, atol=1e-4, rtol=0)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_model_saved_by_transformers_loads_with_equal_logits(every: int, tmp_path: Path):
    from transformers import ModernBertConfig as HfModernBertConfig
    from transformers import ModernBertForMaskedLM

    hf_model = ModernBertForMaskedLM(
        HfModernBertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
            global_attn_every_n_layers=every, local_attention=64, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    hf_model.save_pretrained(tmp_path)
    shape = from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    assert isinstance(shape, ModernBertConfig)
    assert (shape.global_attn_every_n_layers, shape.local_attention, shape.max_position_embeddings) == (every, 64, 512)
    encoder, head = build_model(shape, VOCABULARY)
    loaded = from_hf_tensors(load_file(tmp_path / "model.safetensors"), shape)
    encoder.load_state_dict(loaded.encoder)
    head.load_state_dict(loaded.head)
    assert loaded.pair is None
    for tensor, other in zip(logits(encoder, head), hf_logits(hf_model), strict=True):
        torch.testing.assert_close(tensor, other, atol=1e-4, rtol=0)


CLASSIC = BertConfig(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=70,
    type_vocab_size=3,
    hidden_dropout=0.2,
)
OTHERS = [TutorialConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=40), CLASSIC]


@pytest.mark.parametrize(
    ("shape", "pair"), [*((shape, False) for shape in (*SHAPES, *OTHERS)), (CLASSIC, True)], ids=str
)
def test_a_round_trip_changes_nothing(shape: EncoderConfig, pair: bool):
    modules = (*build_model(shape, VOCABULARY), build_pair(shape) if pair else None)
    loaded = from_hf_tensors(to_hf_tensors(states(*modules), shape), shape)
    assert (loaded.pair is None) is not pair
    for module, state in zip(modules, loaded, strict=True):
        tensor = {} if module is None else module.state_dict()
        assert (state or {}).keys() == tensor.keys()
        assert all(torch.equal((state or {})[name], tensor[name]) for name in tensor)
    written = json.loads(json.dumps(to_hf_config(shape, VOCABULARY, IDS, pair=pair)))
    assert from_hf_config(written) == shape


def test_a_tied_decoder_is_not_written_and_an_untied_one_is_refused():
    encoder, head = build_model(SHAPES[0], VOCABULARY)
    tensors = to_hf_tensors(states(encoder, head), SHAPES[0])
    assert "decoder.weight" not in tensors
    table = tensors["model.embeddings.tok_embeddings.weight"]
    from_hf_tensors(tensors | {"decoder.weight": table.clone()}, SHAPES[0])
    with pytest.raises(ModelError, match="not tied"):
        from_hf_tensors(tensors | {"decoder.weight": table + 1}, SHAPES[0])


def test_missing_and_unknown_tensors_are_named():
    encoder, head = build_model(SHAPES[0], VOCABULARY)
    tensors = to_hf_tensors(states(encoder, head), SHAPES[0])
    with pytest.raises(ModelError, match=r"model\.layers\.0\.attn\.Wqkv\.bias"):
        from_hf_tensors(tensors | {"model.layers.0.attn.Wqkv.bias": torch.zeros(3)}, SHAPES[0])
    del tensors["head.dense.weight"]
    with pytest.raises(ModelError, match=r"head\.dense\.weight"):
        from_hf_tensors(tensors, SHAPES[0])


VERSION_4 = {  # as version 4.57 writes it, shortened
    "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768,
    "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12, "hidden_activation": "gelu",
    "max_position_embeddings": 8192, "norm_eps": 1e-05, "norm_bias": False, "global_rope_theta": 160000.0,
    "attention_bias": False, "attention_dropout": 0.0, "global_attn_every_n_layers": 3, "local_attention": 128,
    "local_rope_theta": 10000.0, "decoder_bias": True, "classifier_bias": False, "tie_word_embeddings": True,
}  # fmt: skip


def test_config_of_version_4():
    shape = from_hf_config(VERSION_4)
    assert shape == ModernBertConfig(
        num_hidden_layers=22, hidden_size=768, num_attention_heads=12, intermediate_size=1152
    )
    low = from_hf_config(VERSION_4 | {"local_rope_theta": None})
    assert isinstance(low, ModernBertConfig)
    assert low.local_rope_theta == 160_000.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "deberta"}, "deberta"),
        ({"model_type": None}, "None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"norm_bias": True}, "norm_bias"),
        ({"decoder_bias": False}, "decoder_bias"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"classifier_activation": "relu"}, "classifier_activation"),
        ({"layer_types": ["sliding_attention"] * 22}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}}}, "rope_parameters"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_unsupported_keys_are_named(change: dict[str, Any], named: str):
    with pytest.raises(ModelError, match=named):
        from_hf_config(VERSION_4 | change)


def test_transformers_rejects_the_tutorials_model(tmp_path: Path):
    from transformers import AutoModel

    shape = TutorialConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=40)
    encoder, head = build_model(shape, VOCABULARY)
    write(tmp_path, encoder, head, shape)
    with pytest.raises(ValueError, match="unmask-seed"):
        AutoModel.from_pretrained(tmp_path)
