from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from unmask.core.errors import RecipeError
from unmask.core.types import Sample, pack
from unmask.models import EncoderModule, HeadModule, build_model, num_parameters
from unmask.models.annotated import TutorialConfig, sinusoids

SMALL = TutorialConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48)


def test_number_of_parameters_is_the_tutorials():
    encoder, head = build_model(TutorialConfig(), 67)
    counted = sum(p.numel() for module in (encoder, head) for p in module.parameters())
    assert counted == num_parameters(TutorialConfig(), 67) == 812_355
    assert isinstance(encoder, EncoderModule)
    assert isinstance(head, HeadModule)


def test_all_blocks_are_initialized_as_copies_of_one():
    torch.manual_seed(0)
    encoder, _ = build_model(SMALL, 20)
    first, second = (block.state_dict() for block in encoder.blocks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert 0.9 < encoder.token_embedding.std() < 1.1


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_outputs_equal_those_of_torch_transformer_layers():
    torch.manual_seed(0)
    encoder, head = build_model(SMALL, 20)
    encoder.eval()
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.1, activation="relu", batch_first=True, norm_first=True)
    reference = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32)).eval()
    state = encoder.state_dict()
    table = {}
    for i in range(2):
        ours, other = f"blocks.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            stacked = [state[f"{ours}.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            table[f"{other}.self_attn.in_proj_{kind}"] = torch.cat(stacked)
            table[f"{other}.self_attn.out_proj.{kind}"] = state[f"{ours}.attention.output.{kind}"]
            table[f"{other}.linear1.{kind}"] = state[f"{ours}.mlp.input.{kind}"]
            table[f"{other}.linear2.{kind}"] = state[f"{ours}.mlp.output.{kind}"]
            table[f"{other}.norm1.{kind}"] = state[f"{ours}.attention_norm.{kind}"]
            table[f"{other}.norm2.{kind}"] = state[f"{ours}.mlp_norm.{kind}"]
            table[f"norm.{kind}"] = state[f"final_norm.{kind}"]
    reference.load_state_dict(table)
    ids_BS = torch.randint(0, 20, (3, 32))
    batch = pack([Sample(ids_S.numpy(), np.zeros(32, np.uint8)) for ids_S in ids_BS])
    with torch.no_grad():
        embedded = encoder.token_embedding[ids_BS] * 32**0.5 + sinusoids(32, 32)
        torch.testing.assert_close(encoder(batch).view(3, 32, 32), reference(embedded), atol=1e-5, rtol=1e-5)
        assert head(encoder(batch)[:5], encoder.token_embedding).shape == (5, 20)


def test_sinusoids():
    table = sinusoids(4, 6)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(table[3, :2], torch.tensor([np.sin(3.0), np.cos(3.0)], dtype=torch.float32))


def test_dropout_is_active_only_in_training():
    torch.manual_seed(0)
    encoder, _ = build_model(SMALL, 20)
    batch = pack([Sample(np.arange(20), np.zeros(20, np.uint8))])
    assert not torch.equal(encoder(batch), encoder(batch))
    encoder.eval()
    assert torch.equal(encoder(batch), encoder(batch))


def test_an_invalid_config_is_refused():
    with pytest.raises(RecipeError):
        TutorialConfig(hidden_size=130, num_attention_heads=8)
