from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unmask.core.config import shipped_recipes
from unmask.core.errors import RecipeError, RunError
from unmask.models import EncoderConfig, build_model, build_pair
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.models.neomme import NeoMMEConfig
from unmask.objectives.sentence_pairs import BertPretrainingConfig
from unmask.training.optim import Optimizer, OptimizerConfig, orthogonalize, update_scale
from unmask.training.recipe import load_recipe


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MODERN = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
NEOMME = NeoMMEConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, head_dim=16, intermediate_size=48)
TUTORIAL = TutorialConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)


def build_module(shape: EncoderConfig = MODERN, vocabulary: int = 40) -> nn.Module:
    torch.manual_seed(0)
    encoder, head = build_model(shape, vocabulary)
    return nn.ModuleDict({"encoder": encoder, "head": head})


def give_gradients(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("shape", [(6, 32, 32), (3, 48, 32), (3, 32, 48), (1, 8, 64)])
@pytest.mark.parametrize("bf16", [False, True])
def test_singular_values_end_near_one(shape: tuple[int, int, int], bf16: bool):
    torch.manual_seed(0)
    update = orthogonalize(torch.randn(shape), bf16=bf16)
    values = torch.linalg.svdvals(update)
    assert update.dtype == torch.float32
    assert values.min() > 0.3  # the quintic leaves small ones a little below, by design
    assert values.max() < 1.3


def test_a_zero_gradient_gives_a_zero_step():
    assert not orthogonalize(torch.zeros(2, 8, 8), bf16=False).any()


@pytest.mark.parametrize("per_head", [False, True])
def test_muon_matches_torch(per_head: bool):
    """Per head, torch optimizes views of the rows of each head, which share memory with the matrix."""
    module, reference_module = build_module(), build_module()
    config = OptimizerConfig(weight_decay=0.1, muon_per_head=per_head)
    optimizer = Optimizer(module, config, bf16=True)
    names = [name for name, kind in optimizer.algorithms().items() if kind == "muon"]
    matrices = {name: p for name, p in reference_module.named_parameters() if name in names}
    heads = {
        name: MODERN.num_attention_heads
        if per_head and any(f"attention.{kind}." in name for kind in ("query", "key", "value"))
        else 1
        for name in matrices
    }
    parts = {
        name: [nn.Parameter(rows) for rows in matrix.detach().chunk(heads[name])] for name, matrix in matrices.items()
    }
    reference = torch.optim.Muon(
        [part for rows in parts.values() for part in rows],
        lr=config.muon_lr * 0.5,
        weight_decay=0.1,
        momentum=config.momentum,
        adjust_lr_fn="original",
    )
    for seed in range(3):
        give_gradients(module, seed)
        give_gradients(reference_module, seed)
        for name, matrix in matrices.items():
            assert matrix.grad is not None
            for part, rows in zip(parts[name], matrix.grad.chunk(heads[name]), strict=True):
                part.grad = rows
        optimizer.step(0.5)
        reference.step()
    before, after, expected = weights(build_module()), weights(module), weights(reference_module)
    for name in names:
        update, expected_update = after[name] - before[name], expected[name] - before[name]
        # bfloat16, summed in another order
        assert (update - expected_update).norm() <= 0.02 * expected_update.norm(), name
        assert expected_update.norm() > 0.01


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shape", [MODERN, TUTORIAL, NEOMME], ids=["modernbert", "tutorial", "neomme"])
def test_flops_are_those_that_torch_counts(shape: EncoderConfig, per_head: bool):
    module = build_module(shape)
    give_gradients(module, 0)
    optimizer = Optimizer(module, OptimizerConfig(muon_per_head=per_head))
    with FlopCounterMode(display=False) as counter:
        optimizer.step(1.0)
    assert counter.get_total_flops() == optimizer.flops > 0
    assert Optimizer(module, OptimizerConfig(kind="adamw")).flops == 0


def test_orthogonalizing_per_head_costs_less():
    def flops(per_head: bool) -> int:
        return Optimizer(build_module(), OptimizerConfig(muon_per_head=per_head)).flops

    assert flops(per_head=True) < 0.8 * flops(per_head=False)


def test_one_rate_fits_all_shapes():
    assert update_scale(32, 32) == update_scale(32, 64) == 1
    assert update_scale(64, 16) == 2


@pytest.mark.parametrize("shape", [MODERN, TUTORIAL], ids=["modernbert", "tutorial"])
def test_matrices_go_to_muon_and_the_rest_to_adam(shape: EncoderConfig):
    module = build_module(shape)
    taken = Optimizer(module, OptimizerConfig()).algorithms()
    shapes = {name: p.shape for name, p in module.named_parameters()}
    assert taken.keys() == shapes.keys()
    inner = [name for name, kind in taken.items() if kind == "muon"]
    assert all(len(shapes[name]) == 2 and 40 not in shapes[name] for name in inner)
    assert taken["encoder.token_embedding"] == "adam"
    assert all(taken[name] == "adam" for name, size in shapes.items() if len(size) < 2)
    if shape is MODERN:
        assert len(inner) == 2 * 7 + 1
        assert taken["head.dense.weight"] == "muon"
    else:
        assert len(inner) == 2 * 6
        assert taken["head.decoder.weight"] == "adam"
    for kind in ("adam", "adamw"):
        assert set(Optimizer(module, OptimizerConfig(kind=kind)).algorithms().values()) == {"adam"}


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not load_recipe(name).init.required])
def test_each_parameter_of_a_recipe_has_its_optimizer_rate_and_decay(name: str):
    """A change here changes the numbers of every run with this recipe."""
    recipe = load_recipe(name)
    config = recipe.optimizer
    with torch.device("meta"):
        shape = dataclasses.replace(
            recipe.model, **({"init": "normal"} if isinstance(recipe.model, BertConfig) else {})
        )
        encoder, head = build_model(shape, 1000)
        parts = build_pair(shape) if isinstance(recipe.objective, BertPretrainingConfig) else nn.Module()
        module = nn.ModuleDict({"encoder": encoder, "head": head, "parts": parts})
        optimizer = Optimizer(module, config)
    expected: dict[str, tuple[str, float, float]] = {}
    for parameter_name, parameter in module.named_parameters():
        is_inner = parameter_name.startswith(("encoder.blocks.", "head.")) and "decoder" not in parameter_name.split(
            "."
        )
        scale = config.position_embedding_lr_scale if parameter_name == "encoder.position_embedding" else 1.0
        decay = config.weight_decay if parameter.ndim >= 2 and config.kind != "adam" else 0.0
        by_muon = config.kind == "muon" and is_inner and parameter.ndim == 2
        expected[parameter_name] = ("muon", 1.0, config.weight_decay) if by_muon else ("adam", scale, decay)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {name: (kind, 1.0, config.weight_decay) for name, kind in optimizer.algorithms().items()}
    for group in optimizer._adam.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = ("adam", group["lr_scale"], group["weight_decay"])
    assert found == expected


def test_adam_matches_torch_without_decay():
    module, reference_module = build_module(TUTORIAL), build_module(TUTORIAL)
    config = OptimizerConfig(kind="adam", lr=1e-2, beta2=0.999, weight_decay=0.5)
    optimizer = Optimizer(module, config)
    reference = torch.optim.Adam(reference_module.parameters(), lr=5e-3, betas=(0.9, 0.999))
    for seed in range(3):
        give_gradients(module, seed)
        give_gradients(reference_module, seed)
        optimizer.step(0.5)
        reference.step()
    for value, expected in zip(weights(module).values(), weights(reference_module).values(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_norms_and_biases_do_not_decay(kind: str):
    module = build_module()
    before = weights(module)
    settings = OptimizerConfig(kind=kind, weight_decay=0.5, lr=0.1, muon_lr=0.1)  # pyright: ignore[reportArgumentType]
    optimizer = Optimizer(module, settings)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    for name, after in weights(module).items():
        torch.testing.assert_close(after, before[name] * (1.0 if after.ndim < 2 else 0.95))


@pytest.mark.parametrize("kind", ["muon", "adamw", "adam"])
def test_position_embeddings_have_a_learning_rate_of_their_own(kind: str):
    shape = BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    whole, tenth = build_module(shape), build_module(shape)
    for module, factor in ((whole, 1.0), (tenth, 0.1)):
        settings = OptimizerConfig(kind=kind, position_embedding_lr_scale=factor, weight_decay=0.0)  # pyright: ignore[reportArgumentType]
        give_gradients(module, 1)
        Optimizer(module, settings).step(1.0)
    before, full, small = weights(build_module(shape)), weights(whole), weights(tenth)
    for name in before:
        factor = 0.1 if name == "encoder.position_embedding" else 1.0
        torch.testing.assert_close(
            small[name] - before[name], factor * (full[name] - before[name]), atol=1e-7, rtol=1e-3
        )


@pytest.mark.parametrize("kind", ["muon", "adamw", "adam"])
def test_two_steps_equal_one_step_a_saved_state_and_another_step(kind: str):
    config = OptimizerConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    module, interrupted = build_module(), build_module()
    optimizer, first = Optimizer(module, config), Optimizer(interrupted, config)
    for each, parameters in ((optimizer, module), (first, interrupted)):
        give_gradients(parameters, 1)
        each.step(1.0)
    saved = save(first.state_tensors())
    resumed = build_module()
    resumed.load_state_dict(interrupted.state_dict())
    second = Optimizer(resumed, config)
    assert second.state_tensors().keys() == optimizer.state_tensors().keys()
    second.load_state_tensors(load(saved))
    for each, parameters in ((optimizer, module), (second, resumed)):
        give_gradients(parameters, 2)
        each.step(0.3)
    assert all(torch.equal(a, b) for a, b in zip(weights(module).values(), weights(resumed).values(), strict=True))
    expected, state = optimizer.state_tensors(), second.state_tensors()
    assert all(torch.equal(expected[name], state[name]) for name in expected)


@pytest.mark.parametrize("kind", ["muon", "adamw", "adam"])
def test_the_state_before_the_first_step_is_the_state_that_torch_starts_with(kind: str):
    """A step from an explicit state equals a step in which AdamW creates its state itself."""
    config = OptimizerConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    module, lazy_module = build_module(), build_module()
    optimizer, lazy = Optimizer(module, config), Optimizer(lazy_module, config)
    lazy._adam.state.clear()
    for each, parameters in ((optimizer, module), (lazy, lazy_module)):
        give_gradients(parameters, 1)
        each.step(1.0)
    expected, state = lazy.state_tensors(), optimizer.state_tensors()
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    assert all(expected[name].dtype == state[name].dtype for name in expected)


def test_the_state_of_another_module_is_refused_by_name():
    optimizer = Optimizer(build_module(), OptimizerConfig())
    state = optimizer.state_tensors()
    with pytest.raises(RunError, match=r"encoder\.token_embedding"):
        optimizer.load_state_tensors({k: v for k, v in state.items() if "token_embedding" not in k})
    with pytest.raises(RunError, match="unexpected"):
        optimizer.load_state_tensors(state | {"other.momentum": torch.zeros(1)})
    with pytest.raises(RunError, match="shape"):
        optimizer.load_state_tensors(Optimizer(build_module(vocabulary=41), OptimizerConfig()).state_tensors())


def test_clipping_limits_the_common_norm():
    module = build_module()
    optimizer = Optimizer(module, OptimizerConfig(max_grad_norm=0.5))
    give_gradients(module, 0)
    norm = optimizer.clip()
    assert norm == pytest.approx(sum(p.numel() for p in module.parameters()) ** 0.5, rel=0.05)
    assert optimizer.clip() == pytest.approx(0.5, rel=1e-3)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_parameter_without_a_gradient_stays_as_it_is():
    """A stage may not train all parameters: momentum and weight decay must not move the others."""
    module = build_module()
    optimizer = Optimizer(module, OptimizerConfig(weight_decay=0.1))
    give_gradients(module, 0)
    optimizer.step(1.0)
    before, state = weights(module), {name: t.clone() for name, t in optimizer.state_tensors().items()}
    give_gradients(module, 1)
    untrained = {name for name, _ in module.named_parameters() if name.startswith(("head.", "encoder.blocks.0."))}
    for name, parameter in module.named_parameters():
        parameter.grad = None if name in untrained else parameter.grad
    optimizer.step(1.0)
    assert {name for name, tensor in weights(module).items() if torch.equal(tensor, before[name])} == untrained
    unchanged = {name for name, tensor in optimizer.state_tensors().items() if torch.equal(tensor, state[name])}
    assert unchanged == {name for name in state if name.rpartition(".")[0] in untrained}


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"beta2": 1.0},
        {"max_grad_norm": -1.0},
        {"weight_decay": -0.1},
        {"position_embedding_lr_scale": 0.0},
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, float]):
    with pytest.raises(RecipeError) as refused:
        dataclasses.replace(OptimizerConfig(), **wrong)
    assert refused.value.location in wrong
