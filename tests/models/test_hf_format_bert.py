"""Exchange of BERT models with transformers: equal logits in both directions, unsupported settings refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unmask.core.errors import ModelError
from unmask.core.types import Sample, logits_at, pack
from unmask.models import build_model, build_pair
from unmask.models.bert import BertConfig
from unmask.models.hf_format import States, from_hf_config, from_hf_tensors, to_hf_config, to_hf_tensors

VOCABULARY = 61
IDS = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
LENGTHS = (7, 70, 2, 33)
SHAPES = [
    BertConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=48, max_position_embeddings=70
    ),
    BertConfig(
        num_hidden_layers=2,
        hidden_size=36,
        num_attention_heads=12,
        intermediate_size=40,
        max_position_embeddings=512,
        type_vocab_size=3,
        layer_norm_eps=1e-5,
    ),
]
SHAPE = SHAPES[0]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def enlarge_weights(*modules: nn.Module) -> None:
    """Enlarge the weights, so that an error in any of them shows in the logits."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 2 else 0.3))


def texts(segments: int) -> list[Sample]:
    draw = np.random.default_rng(3)
    return [
        Sample(
            draw.integers(0, VOCABULARY, length),
            np.zeros(length, np.uint8),
            token_type_ids=draw.integers(0, segments, length) if segments else None,
        )
        for length in LENGTHS
    ]


def own_logits(
    encoder: nn.Module, head: nn.Module, pair: nn.Module | None, samples: list[Sample]
) -> list[torch.Tensor]:
    """Logits at every position of each sample, and those of the pair head, if any."""
    batch = pack(samples)
    with torch.no_grad():
        logits = list(logits_at(encoder, head, batch, torch.arange(batch.tokens)).split(list(LENGTHS)))
        return logits if pair is None else [*logits, pair(encoder(batch), batch)]


def hf_logits(model: nn.Module, samples: list[Sample]) -> list[torch.Tensor]:
    """Logits of a transformers model, from one padded batch."""
    wide = max(LENGTHS)
    ids, mask, kinds = (torch.zeros(len(samples), wide, dtype=torch.int64) for _ in range(3))
    for row, text in enumerate(samples):
        n = len(text.ids)
        ids[row, :n], mask[row, :n] = torch.from_numpy(text.ids), 1
        kinds[row, :n] = torch.from_numpy(text.token_type_ids) if text.token_type_ids is not None else 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if samples[0].token_type_ids is not None:
        given["token_type_ids"] = kinds
    with torch.no_grad():
        out = model(**given)
    logits = out.logits if hasattr(out, "logits") else out.prediction_logits
    rows = [logits[row, : len(text.ids)] for row, text in enumerate(samples)]
    return rows if hasattr(out, "logits") else [*rows, out.seq_relationship_logits]


def write(folder: Path, states: States, shape: BertConfig) -> None:
    tensors = to_hf_tensors(states, shape)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    hf_config = to_hf_config(shape, VOCABULARY, IDS, pair=states.pair is not None)
    (folder / "config.json").write_text(json.dumps(hf_config))


@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("with_pair", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=["small", "wide"])
def test_transformers_loads_a_saved_model_with_equal_logits(
    shape: BertConfig, with_pair: bool, segments: int, tmp_path: Path
):
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, BertForMaskedLM, BertForPreTraining

    encoder, head = build_model(shape, VOCABULARY)
    pair = build_pair(shape) if with_pair else None
    enlarge_weights(*(module for module in (encoder, head, pair) if module is not None))
    write(tmp_path, States(encoder.state_dict(), head.state_dict(), pair and pair.state_dict()), shape)
    opened = AutoModelForPreTraining if with_pair else AutoModelForMaskedLM
    model, report = opened.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, BertForPreTraining if with_pair else BertForMaskedLM)
    assert model.config.architectures == [type(model).__name__]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.pad_token_id == 0
    samples = texts(segments)
    for mine, other in zip(own_logits(encoder, head, pair, samples), hf_logits(model.eval(), samples), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("with_pair", [False, True])
def test_a_model_saved_by_transformers_loads_with_equal_logits(with_pair: bool, segments: int, tmp_path: Path):
    from transformers import BertConfig as HfBertConfig
    from transformers import BertForMaskedLM, BertForPreTraining

    kind = BertForPreTraining if with_pair else BertForMaskedLM
    model = kind(
        HfBertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=80, hidden_dropout_prob=0.2,
        )
    ).eval()  # fmt: skip
    enlarge_weights(model)
    model.save_pretrained(tmp_path)
    shape = from_hf_config(json.loads((tmp_path / "config.json").read_text()))
    assert shape == BertConfig(
        num_hidden_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=56,
        max_position_embeddings=80,
        hidden_dropout=0.2,
        attention_dropout=0.1,
    )
    encoder, head = build_model(shape, VOCABULARY)
    pair = build_pair(shape) if with_pair else None
    found = from_hf_tensors(load_file(tmp_path / "model.safetensors"), shape)
    for module, state in zip((encoder, head, pair), found, strict=True):
        assert (module is None) == (state is None)
        if module is not None and state is not None:
            module.eval().load_state_dict(state)
    samples = texts(segments)
    for mine, other in zip(own_logits(encoder, head, pair, samples), hf_logits(model, samples), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def tensors_of(with_pair: bool = True) -> dict[str, torch.Tensor]:
    encoder, head = build_model(SHAPE, VOCABULARY)
    return to_hf_tensors(
        States(encoder.state_dict(), head.state_dict(), build_pair(SHAPE).state_dict() if with_pair else None), SHAPE
    )


def test_tied_tensors_are_not_written_and_must_be_equal_if_present():
    tensors = tensors_of()
    decoder, bias = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
    assert decoder not in tensors and bias not in tensors
    table = tensors["bert.embeddings.word_embeddings.weight"]
    older = {
        decoder: table.clone(), bias: torch.zeros(VOCABULARY), "bert.embeddings.position_ids": torch.arange(70)[None]
    }  # fmt: skip
    assert from_hf_tensors(tensors | older, SHAPE).pair is not None
    with pytest.raises(ModelError, match=r"not tied.*decoder\.weight"):
        from_hf_tensors(tensors | {decoder: table + 1}, SHAPE)
    with pytest.raises(ModelError, match=r"not tied.*decoder\.bias"):
        from_hf_tensors(tensors | {bias: torch.ones(VOCABULARY)}, SHAPE)


def test_missing_and_unknown_tensors_are_named():
    tensors = tensors_of()
    with pytest.raises(ModelError, match="crossattention"):
        from_hf_tensors(tensors | {"bert.encoder.layer.0.crossattention.self.key.bias": torch.zeros(3)}, SHAPE)
    del tensors["cls.seq_relationship.bias"]
    with pytest.raises(ModelError, match=r"lacks cls\.seq_relationship\.bias"):
        from_hf_tensors(tensors, SHAPE)
    tensors = tensors_of(with_pair=False)
    del tensors["bert.encoder.layer.2.output.dense.weight"]
    with pytest.raises(ModelError, match=r"lacks bert\.encoder\.layer\.2\.output\.dense\.weight"):
        from_hf_tensors(tensors, SHAPE)


def test_a_bare_encoder_is_refused():
    tensors = {name: tensor for name, tensor in tensors_of().items() if name.startswith("bert.")}
    bare = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}  # as BertModel saves itself
    for found in (tensors, bare):
        with pytest.raises(ModelError, match="no masked language modeling head") as refused:
            from_hf_tensors(found, SHAPE)
        assert "BertForMaskedLM or BertForPreTraining" in refused.value.hint


BASE = {  # as version 4 wrote it for bert-base-uncased
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip


def test_config_of_version_4_and_defaults_of_missing_keys():
    base = BertConfig(
        num_hidden_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    assert from_hf_config(BASE) == from_hf_config({"model_type": "bert"}) == base


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"layer_norm_eps": None}, "config.json"),
    ],
)
def test_unsupported_keys_are_named(change: dict[str, Any], named: str):
    with pytest.raises(ModelError, match=named):
        from_hf_config(BASE | change)
