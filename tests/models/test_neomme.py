"""NeoMME against transformers: logits, initial weights, config.json and tensor names in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.errors import ModelError, RecipeError
from unmask.core.types import Batch, Sample, logits_at, pack
from unmask.models import (
    EncoderModule,
    HeadModule,
    build_model,
    flops_per_token,
    non_embedding_parameters,
    num_parameters,
    products,
)
from unmask.models.hf_format import States, from_hf_config, from_hf_tensors, to_hf_config, to_hf_tensors
from unmask.models.neomme import NeoMMEConfig

VOCABULARY = 61
LENGTHS = (1, 9, 40, 200)
SMALL = NeoMMEConfig(
    num_hidden_layers=5, hidden_size=32, embedding_rank=12, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, global_attn_every_n_layers=2, sliding_window=3, long_sliding_window=11,
    max_position_embeddings=512,
)  # fmt: skip
SHAPES = [
    SMALL,
    NeoMMEConfig(  # a factor as wide as the hidden states, a key for each query, windows in all layers but the last
        num_hidden_layers=4, hidden_size=32, embedding_rank=32, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, intermediate_size=40, sliding_window=20, global_rope_theta=5000.0,
    ),
    NeoMMEConfig(  # no windows, heads that are wider in total than the hidden states
        num_hidden_layers=2, hidden_size=24, embedding_rank=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=40, global_attn_every_n_layers=1, local_rope_theta=77.0,
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def enlarge_weights(*modules: nn.Module) -> None:
    """Change the weights, so that an error in any of them shows in the logits."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.2)


def texts() -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    draw = np.random.default_rng(3)
    return [draw.integers(0, VOCABULARY, length) for length in LENGTHS]


def batch() -> Batch:
    return pack([Sample(ids, np.zeros(len(ids), np.uint8)) for ids in texts()])


def logits(encoder: nn.Module, head: nn.Module) -> tuple[torch.Tensor, ...]:
    packed = batch()
    with torch.no_grad():
        return logits_at(encoder, head, packed, torch.arange(packed.tokens)).split(list(LENGTHS))


def hf_logits(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.from_numpy(ids)[None]).logits[0] for ids in texts()]


def hf_tensors(encoder: nn.Module, head: nn.Module, shape: NeoMMEConfig) -> dict[str, torch.Tensor]:
    return to_hf_tensors(States(encoder.state_dict(), head.state_dict()), shape)


def hf_config(shape: NeoMMEConfig) -> dict[str, Any]:
    return json.loads(json.dumps(to_hf_config(shape, VOCABULARY, {"pad": 0, "cls": 2, "sep": 3})))


def load(folder: Path) -> tuple[NeoMMEConfig, EncoderModule, HeadModule]:
    shape = from_hf_config(json.loads((folder / "config.json").read_text()))
    assert isinstance(shape, NeoMMEConfig)
    encoder, head = build_model(shape, VOCABULARY)
    states = from_hf_tensors(load_file(folder / "model.safetensors"), shape)
    encoder.load_state_dict(states.encoder)
    head.load_state_dict(states.head)
    return shape, encoder, head


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformers_loads_a_saved_model_with_equal_logits(shape: NeoMMEConfig, tmp_path: Path):
    from transformers import AutoModelForMaskedLM, NeoMMEForMaskedLM

    encoder, head = build_model(shape, VOCABULARY)
    enlarge_weights(encoder, head)
    tensors = hf_tensors(encoder, head, shape)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(shape)))
    model, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, NeoMMEForMaskedLM)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for tensor, expected in zip(logits(encoder, head), hf_logits(model.eval()), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 4},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"] * 3},
        {"num_hidden_layers": 3, "per_layer_config": {0: {"sliding_window": 2}, 2: {"sliding_window": None}}},
    ],
    ids=str,
)
def test_a_model_saved_by_transformers_loads_with_equal_logits(settings: dict[str, Any], tmp_path: Path):
    from transformers import NeoMMEConfig as HfNeoMMEConfig
    from transformers import NeoMMEForMaskedLM

    if types := settings.get("layer_types"):
        settings = {"layer_types": [*types[:-1], "full_attention"][1:], "num_hidden_layers": len(types) - 1}
    hf_settings = HfNeoMMEConfig(
        **{"num_hidden_layers": 13, **settings}, vocab_size=VOCABULARY, hidden_size=32, embedding_rank=12,
        num_attention_heads=4, head_dim=16, intermediate_size=48, sliding_window=8, max_position_embeddings=512,
        patch_size=1,
    )  # fmt: skip
    hf_model = NeoMMEForMaskedLM(hf_settings).eval()
    enlarge_weights(hf_model)
    hf_model.save_pretrained(tmp_path)
    shape, encoder, head = load(tmp_path)
    assert [window is None for window in shape.windows] == [
        kind == "full_attention" for kind in hf_settings.layer_types
    ]
    for tensor, expected in zip(logits(encoder, head), hf_logits(hf_model), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_initial_weights_have_the_distribution_of_transformers(shape: NeoMMEConfig):
    from transformers import NeoMMEConfig as HfNeoMMEConfig
    from transformers import NeoMMEForMaskedLM

    hf_model = NeoMMEForMaskedLM(HfNeoMMEConfig(**hf_config(shape)))
    expected = hf_model.state_dict()
    tensors = hf_tensors(*build_model(shape, VOCABULARY), shape)
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        if "patch_embeddings" in name:
            assert not tensor.any()
        elif (std := float(expected[name].std())) > 0 and tensor.ndim == 2:
            assert float(tensor.std()) == pytest.approx(std, rel=0.2), name
            assert abs(float(tensor.mean())) < std / 4
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_has_the_same_logits_alone(shape: NeoMMEConfig):
    encoder, head = build_model(shape, VOCABULARY)
    enlarge_weights(encoder, head)
    for ids, packed in zip(texts(), logits(encoder, head), strict=True):
        with torch.no_grad():
            alone = logits_at(encoder, head, pack([Sample(ids, np.zeros(len(ids), np.uint8))]), torch.arange(len(ids)))
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_round_trip_changes_nothing(shape: NeoMMEConfig):
    encoder, head = build_model(shape, VOCABULARY)
    loaded = from_hf_tensors(hf_tensors(encoder, head, shape), shape)
    for module, state in zip((encoder, head), loaded, strict=False):
        tensors = module.state_dict()
        assert state is not None and state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert from_hf_config(hf_config(shape)) == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_parameter_has_a_gradient_also_at_first(shape: NeoMMEConfig):
    encoder, head = build_model(shape, VOCABULARY)
    logits_at(encoder, head, batch(), torch.arange(0, 250, 7)).logsumexp(-1).sum().backward()
    for name, parameter in (*encoder.named_parameters(), *head.named_parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name in ("blocks.0.attention.output.weight", "blocks.0.mlp.output.weight", "embedding_projection.weight"):
        gradient = encoder.get_parameter(name).grad
        assert gradient is not None and gradient.any(), name


def test_the_head_of_a_copy_uses_the_projection_of_the_copy():
    """As in the moving average of the weights, which trains a copy of both modules."""
    modules = nn.ModuleList(build_model(SMALL, VOCABULARY))
    encoder, head = copy.deepcopy(modules)
    assert not list(head.parameters())
    before = torch.cat(logits(*modules))
    with torch.no_grad():
        encoder.get_parameter("embedding_projection.weight").mul_(-1)
    # The final hidden states and the projection change their signs, so that the logits are equal.
    torch.testing.assert_close(torch.cat(logits(encoder, head)), before)
    torch.testing.assert_close(torch.cat(logits(encoder, modules[1])), -before)


def test_muon_optimizes_the_matrices_but_not_the_tables():
    for shape, extra in ((SMALL, 1), (SHAPES[1], 1)):
        encoder, head = build_model(shape, VOCABULARY)
        matrices = [*encoder.matrix_parameters(), *head.matrix_parameters()]
        assert len(matrices) == 7 * shape.num_hidden_layers + extra
        assert all(matrix.ndim == 2 and VOCABULARY not in matrix.shape for matrix in matrices)


def test_autocast_is_close_to_float32():
    encoder, head = build_model(SMALL, VOCABULARY)
    full = torch.cat(logits(encoder, head))
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.cat(logits(encoder, head))
    torch.testing.assert_close(half, full, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_and_products_are_counted(shape: NeoMMEConfig):
    encoder, head = build_model(shape, VOCABULARY)
    counted = sum(p.numel() for module in (encoder, head) for p in module.parameters())
    assert num_parameters(shape, VOCABULARY) == counted
    tables = encoder.get_parameter("token_embedding").numel() + encoder.get_parameter("value_embedding").numel()
    assert non_embedding_parameters(shape, VOCABULARY) == counted - tables
    operations = sum(2 * rows * inner * columns for rows, inner, columns in products(shape, 100, 1000, 150))
    assert 3 * operations == pytest.approx(1000 * flops_per_token(shape, 100, 0, 0.15))


def test_flops_of_a_step_equal_those_that_torch_counts():
    """Exactly, forward and backward, for sequences of one length without a window."""
    shape = SHAPES[2]
    encoder, head = build_model(shape, 50)
    ids = np.arange(24)
    packed = pack([Sample(ids, np.zeros(24, np.uint8))] * 3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        head(encoder(packed)[::2], encoder.token_embedding).sum().backward()
    assert 72 * flops_per_token(shape, 50, 24, 0.5) == counter.get_total_flops()


def ropes(**change: Any) -> dict[str, Any]:
    """The rotary settings of a valid config.json, with a change for global attention."""
    valid = hf_config(SMALL)["rope_parameters"]
    return valid | {"full_attention": valid["full_attention"] | change}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patch_size": 32}, "patch_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"residual_multiplier": 0.5}, "residual_multiplier"),
        ({"rope_theta": 5.0}, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": ropes(rope_type="yarn")}, "rope_parameters"),
        ({"rope_parameters": ropes(partial_rotary_factor=0.5)}, "rope_parameters"),
        ({"rope_parameters": ropes(rope_theta="large")}, "rope_parameters"),
        ({"rope_parameters": {}}, "rope_parameters"),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"per_layer_config": {}}, "per_layer_config"),
        ({"per_layer_config": None}, "per_layer_config"),
        ({"per_layer_config": {"-1": {"sliding_window": 3}}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
        ({"per_layer_config": {"0": 8}}, "per_layer_config|config.json"),
        ({"head_dim": 24}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"sliding_window": None}, "sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"embedding_rank": "wide"}, "embedding_rank"),
    ],
    ids=str,
)
def test_unsupported_keys_are_named(change: dict[str, Any], named: str):
    with pytest.raises(ModelError, match=named) as refused:
        from_hf_config(hf_config(SMALL) | change)
    assert refused.value.hint


def test_a_missing_key_is_refused_by_name():
    complete = to_hf_config(SMALL, VOCABULARY, {"pad_token_id": 0})
    for key in ("hidden_size", "head_dim", "layer_types", "patch_size"):
        with pytest.raises(ModelError, match=f"missing {key}"):
            from_hf_config({name: value for name, value in complete.items() if name != key})


@pytest.mark.parametrize(
    ("invalid", "where"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 24}, "head_dim"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
    ],
)
def test_an_invalid_config_is_refused_with_a_hint(invalid: dict[str, Any], where: str):
    with pytest.raises(RecipeError) as refused:
        NeoMMEConfig(**invalid)
    assert refused.value.location == where
    assert refused.value.hint
