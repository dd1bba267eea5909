"""Replaced token detection: its two losses are those of transformers' ELECTRA, and its samples those of a softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unmask.checks.plugins.fixtures import ENCODER, objective_fixture, run_checks, sample_tokenizer, text_samples
from unmask.checks.plugins.suites import OBJECTIVE_CHECKS
from unmask.core.errors import RecipeError
from unmask.core.types import SPECIAL, WORD_START, MaskedBatch, Sample, pack
from unmask.models import build_model, electra_flops_per_token, electra_products
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.electra import ElectraModules, build_electra, generator_config
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig
from unmask.objectives.mlm import MaskedLMObjective
from unmask.objectives.rtd import ReplacedTokenConfig, ReplacedTokenObjective, sample_tokens

BERT = BertConfig(
    num_hidden_layers=2, hidden_size=48, num_attention_heads=3, intermediate_size=60, max_position_embeddings=80
)
SETTINGS = ReplacedTokenConfig(mask_rate=0.3)
FAMILIES = {"bert": BERT, "neighbors": replace(BERT, init="neighbor-attention"), "modernbert": ENCODER}


def objective(model: BertConfig | ModernBertConfig, settings: ReplacedTokenConfig = SETTINGS) -> ReplacedTokenObjective:
    tokenizer = sample_tokenizer()
    torch.manual_seed(2)
    modules = build_electra(model, tokenizer.size, settings.generator_width, settings.generator_depth)
    mlm = MaskedLMObjective(settings, tokenizer.mask_id, tokenizer.regular_token_ids)
    return ReplacedTokenObjective(settings, mlm, modules, tokenizer.regular_token_ids, tokenizer.size)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_passes_the_checks_of_plugins(name: str) -> None:
    fixture = objective_fixture(objective(FAMILIES[name]), FAMILIES[name])
    assert [result for result in run_checks(OBJECTIVE_CHECKS, fixture) if not result.passed] == []


# ELECTRA of transformers ----------------------------------------------------------------------------------------------

BLOCK = {
    "attention.self.query": "attention.query", "attention.self.key": "attention.key",
    "attention.self.value": "attention.value", "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "mlp.input", "output.dense": "mlp.output",
    "output.LayerNorm": "mlp_norm",
}  # fmt: skip


def electra_config(model: BertConfig, embedding_size: int) -> transformers.ElectraConfig:
    return transformers.ElectraConfig(
        vocab_size=sample_tokenizer().size, embedding_size=embedding_size, hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers, num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        max_position_embeddings=model.max_position_embeddings,
    )  # fmt: skip


def state_of(encoder: torch.nn.Module, blocks: torch.nn.Module, linears: dict[str, torch.nn.Module]) -> dict[str, Any]:
    """Tensors under the names of transformers."""
    of: Any = encoder
    prefix = "electra.embeddings"
    state = {
        f"{prefix}.word_embeddings.weight": of.token_embedding,
        f"{prefix}.position_embeddings.weight": of.position_embedding,
        f"{prefix}.token_type_embeddings.weight": of.token_type_embedding,
    }
    modules = {f"{prefix}.LayerNorm": of.embedding_norm, **linears}
    for layer, block in enumerate(blocks.children()):
        for hf_name, name in BLOCK.items():
            modules[f"electra.encoder.layer.{layer}.{hf_name}"] = block.get_submodule(name)
    for name, module in modules.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return state


def test_both_losses_are_those_of_transformers() -> None:
    """The generator is ElectraForMaskedLM, encoder and discriminator head are ElectraForPreTraining."""
    rtd = objective(BERT)
    torch.manual_seed(4)
    encoder, head = build_model(BERT, sample_tokenizer().size)
    for parameter in [*encoder.parameters(), *rtd.modules.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)  # biases and norms too
    modules: Any = rtd.modules
    generator = modules.generator
    hf_generator = transformers.ElectraForMaskedLM(electra_config(generator_config(BERT, 0.25, 1.0), 48)).eval()
    linears = {
        "electra.embeddings_project": generator.projection,
        "generator_predictions.dense": generator.dense,
        "generator_predictions.LayerNorm": generator.norm,
    }
    state = state_of(encoder, generator.blocks, linears)
    state |= {"generator_lm_head.bias": generator.bias, "generator_lm_head.weight": encoder.token_embedding}
    hf_generator.load_state_dict(state)
    discriminator = modules.discriminator
    linears = {
        "discriminator_predictions.dense": discriminator.dense,
        "discriminator_predictions.dense_prediction": discriminator.classifier,
    }
    hf_discriminator = transformers.ElectraForPreTraining(electra_config(BERT, 48)).eval()
    hf_discriminator.load_state_dict(state_of(encoder, encoder.blocks, linears))

    masked = rtd.corrupt(pack(text_samples()), seed=7)
    expected: dict[str, float] = dict.fromkeys(("mlm", "rtd", "correct", "replaced", "found"), 0.0)
    with torch.inference_mode():
        loss = rtd.loss(encoder, head, masked)
        for first, last in pairwise(masked.batch.offsets):
            is_here = (masked.positions_M >= first) & (masked.positions_M < last)
            at, labels = masked.positions_M[is_here] - first, masked.labels_M[is_here]
            ids = masked.batch.ids_T[first:last]
            assert (ids[at] == sample_tokenizer().mask_id).all(), "the generator sees [MASK] only"
            logits = hf_generator(ids[None]).logits[0, at]
            expected["mlm"] += float(F.cross_entropy(logits, labels, reduction="sum"))
            assert masked.draws_M is not None
            sampled = by_hand(logits, masked.draws_M[is_here])
            assert sampler_ids().issuperset(sampled.tolist())
            changed = ids.clone()
            changed[at] = sampled
            is_replaced = torch.zeros(len(ids))
            is_replaced[at] = (sampled != labels).float()
            logits_T = hf_discriminator(changed[None]).logits[0]
            is_maskable = (masked.batch.token_flags_T[first:last] & SPECIAL) == 0
            logits_T, is_replaced = logits_T[is_maskable], is_replaced[is_maskable]
            expected["rtd"] += float(F.binary_cross_entropy_with_logits(logits_T, is_replaced, reduction="sum"))
            expected["correct"] += int(((logits_T > 0) == (is_replaced > 0)).sum())
            expected["replaced"] += int(is_replaced.sum())
            expected["found"] += int(((logits_T > 0) & (is_replaced > 0)).sum())
    assert 0 < expected["replaced"] < len(masked.positions_M), "some samples equal the original token"
    assert float(loss.sums["mlm"]) == pytest.approx(expected["mlm"], rel=1e-4)
    assert float(loss.sums["rtd"]) == pytest.approx(expected["rtd"], rel=1e-4)
    for name, key in (("rtd_accuracy", "correct"), ("rtd_replaced", "replaced"), ("rtd_found", "found")):
        assert (int(loss.metrics[name][0]), loss.metrics[name][1]) == (expected[key], masked.num_maskable)
    assert masked.denominators == {"mlm": len(masked.positions_M), "rtd": masked.num_maskable}
    assert rtd.loss_weights == {"mlm": 1.0, "rtd": 50.0}


def sampler_ids() -> set[int]:
    return set(sample_tokenizer().regular_token_ids.tolist())


def by_hand(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first regular token at which the summed probability of the regular tokens exceeds the draw."""
    regular = sorted(sampler_ids())
    tokens: list[int] = []
    for row, draw in zip(logits.double().tolist(), draws.tolist(), strict=True):
        weights = [math.exp(row[token]) for token in regular]
        remaining = draw * sum(weights)
        number = 0
        while remaining >= weights[number]:
            remaining -= weights[number]
            number += 1
        tokens.append(regular[number])
    return torch.tensor(tokens, dtype=torch.int64)


# Samples --------------------------------------------------------------------------------------------------------------


def samples(logits_V: torch.Tensor, draws: torch.Tensor, excluded_V: torch.Tensor | None = None) -> torch.Tensor:
    """Samples from logits: features of width 1 and a decoder that multiplies them."""
    vocabulary = len(logits_V)
    excluded_V = torch.zeros(vocabulary, dtype=torch.bool) if excluded_V is None else excluded_V
    return sample_tokens(torch.ones(len(draws), 1), logits_V[:, None], torch.zeros(vocabulary), draws, excluded_V)


def test_evenly_spread_draws_give_every_token_its_probability() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(50) * 2
    count = 100_000
    draws = (torch.arange(count) + 0.5) / count
    tokens = samples(logits_V, draws)
    assert (tokens.diff() >= 0).all(), "a larger draw never gives an earlier token"
    torch.testing.assert_close(
        torch.bincount(tokens, minlength=50) / count, logits_V.softmax(0), rtol=0, atol=2.0 / count + 1e-5
    )


@given(
    st.lists(st.floats(-60, 60), min_size=2, max_size=30),
    st.lists(st.booleans(), min_size=2, max_size=30),
    st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1 - 2**-24]),
)
def test_an_excluded_token_is_never_drawn(logits: list[float], excluded: list[bool], draw: float) -> None:
    """Also for the extreme draws, which rounding could move past the last token."""
    size = min(len(logits), len(excluded))
    excluded_V = torch.tensor(excluded[:size])
    excluded_V[size // 2] = False
    (token,) = samples(torch.tensor(logits[:size]), torch.tensor([draw]), excluded_V).tolist()
    assert 0 <= token < size and not excluded_V[token]


def test_draws_are_uniform_and_below_one() -> None:
    batch = pack(text_samples())
    draws = torch.cat([draws_of(objective(BERT).corrupt(batch, seed)) for seed in range(60)])
    assert draws.dtype == torch.float32 and float(draws.min()) >= 0 and float(draws.max()) < 1
    counts = np.histogram(draws.numpy(), 10, (0, 1))[0]
    assert (abs(counts - len(draws) / 10) < 5 * math.sqrt(len(draws) / 10)).all(), counts


def test_draws_do_not_depend_on_the_batch() -> None:
    """Those of a sample are the same alone and among others; another seed, epoch or sample gives others."""
    rtd, samples_ = objective(BERT), text_samples()
    masked = rtd.corrupt(pack(samples_), seed=5)
    for number, (first, last) in enumerate(pairwise(masked.batch.offsets)):
        is_here = (masked.positions_M >= first) & (masked.positions_M < last)
        assert torch.equal(draws_of(rtd.corrupt(pack([samples_[number]]), seed=5)), draws_of(masked)[is_here])
    longest = samples_[-1]
    others = [longest, replace(longest, epoch=longest.epoch + 1), replace(longest, number=longest.number + 1)]
    found = [set(draws_of(rtd.corrupt(pack([sample]), seed)).tolist()) for sample in others for seed in (5, 6)]
    assert len(set.union(*found)) == sum(map(len, found)) > 50


def draws_of(masked: MaskedBatch) -> torch.Tensor:
    assert masked.draws_M is not None
    return masked.draws_M


def test_a_sample_that_equals_the_original_is_original() -> None:
    """A generator that predicts only one token replaces all others by it, and leaves that token."""
    rtd = objective(BERT)
    encoder, head = build_model(BERT, sample_tokenizer().size)
    masked = rtd.corrupt(pack(text_samples()), seed=3)
    token = int(masked.labels_M.mode().values)
    modules: Any = rtd.modules
    with torch.no_grad():
        modules.generator.bias[token] = 1000.0
        loss = rtd.loss(encoder, head, masked)
    assert int(loss.metrics["rtd_replaced"][0]) == int((masked.labels_M != token).sum()) < len(masked.labels_M)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_discriminator_does_not_train_the_generator(name: str) -> None:
    """Each loss has the gradients of its own modules; both train the shared embedding."""
    rtd = objective(FAMILIES[name])
    encoder, head = build_model(FAMILIES[name], sample_tokenizer().size)
    masked = rtd.corrupt(pack(text_samples()), seed=3)
    modules = rtd.modules
    assert isinstance(modules, ElectraModules)
    generator, discriminator = list(modules.generator.parameters()), list(modules.discriminator.parameters())
    blocks = list(encoder.blocks.parameters())
    for term, trained, untouched in (
        ("mlm", generator, [*discriminator, *blocks]),
        ("rtd", [*discriminator, *blocks], generator),
    ):
        for module in (encoder, modules):
            module.zero_grad(set_to_none=True)
        rtd.loss(encoder, head, masked).sums[term].backward()
        assert all(parameter.grad is not None for parameter in trained)
        assert all(parameter.grad is None for parameter in untouched)
        assert encoder.token_embedding.grad is not None and encoder.token_embedding.grad.any()
    assert all(parameter.grad is None for parameter in head.parameters())


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "depth", "expected"),
    [
        (0.25, 1.0, (4, 64, 1, 256)),
        (0.5, 0.5, (2, 128, 2, 512)),
        (1.0, 0.01, (1, 256, 4, 1024)),
        (0.01, 1.0, (4, 64, 1, 256)),
    ],
)
def test_the_size_of_the_generator(width: float, depth: float, expected: tuple[int, ...]) -> None:
    """A whole number of heads as wide as those of the encoder."""
    generator = generator_config(BertConfig(), width, depth)
    assert generator.head_width == BertConfig().head_width
    assert expected == (
        generator.num_hidden_layers, generator.hidden_size, generator.num_attention_heads, generator.intermediate_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    "invalid",
    [
        {"generator_width": 0.0}, {"generator_width": 1.5}, {"generator_depth": math.nan},
        {"discriminator_loss_weight": 0.0}, {"mask_token_rate": 0.5},
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(invalid: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(invalid))):
        ReplacedTokenConfig(**invalid)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "model", [NeoMMEConfig(), TutorialConfig(), BertConfig(model_type="roberta", position_offset=2)]
)
def test_an_encoder_that_it_cannot_train_is_refused(model: Any) -> None:
    with pytest.raises(RecipeError, match="needs an encoder of kind bert or modernbert, got") as raised:
        build_electra(model, 50, 0.25, 1.0)
    assert "--recipe electra-mini" in str(raised.value.hint)


# Cost -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_flops_of_a_step_equal_those_that_torch_counts(name: str) -> None:
    """Exactly, for sequences of one length without special tokens and without a local window."""
    model = FAMILIES[name]
    if isinstance(model, ModernBertConfig):
        model = replace(model, global_attn_every_n_layers=1)
    rtd = objective(model, ReplacedTokenConfig(mask_rate=0.5))
    vocab_size = sample_tokenizer().size
    encoder, head = build_model(model, vocab_size)
    ids = sample_tokenizer().regular_token_ids[:24]
    batch = pack([Sample(ids, np.full(24, WORD_START, np.uint8), 0, number) for number in range(3)])
    masked = rtd.corrupt(batch, seed=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = rtd.loss(encoder, head, masked)
        (loss.sums["mlm"] + loss.sums["rtd"]).backward()
    generator = generator_config(model, 0.25, 1.0)
    assert len(masked.positions_M) == 36
    assert 72 * electra_flops_per_token(model, generator, vocab_size, 24, 0.5) == counter.get_total_flops()
    products = electra_products(model, generator, vocab_size, 72, 36)
    without_attention = electra_flops_per_token(model, generator, vocab_size, 0, 0.5)
    sampling = 2 * 36 * model.hidden_size * vocab_size
    assert 3 * sum(2 * rows * inner * columns for rows, inner, columns in products) + sampling == pytest.approx(
        72 * without_attention
    )
