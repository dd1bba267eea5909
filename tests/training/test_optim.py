from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from unmask.core.errors import RecipeError, RunError
from unmask.models import EncoderConfig, build_model
from unmask.models.annotated import TutorialConfig
from unmask.models.bert import BertConfig
from unmask.models.modernbert import ModernBertConfig
from unmask.training.optim import OptimizerConfig, build_optimizer, orthogonalize, step_scale


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MODERN = ModernBertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
TUTORIAL = TutorialConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)


def learner(shape: EncoderConfig = MODERN, vocabulary: int = 40) -> nn.Module:
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


def test_muon_equals_torchs():
    mine, other = learner(), learner()
    settings = OptimizerConfig(weight_decay=0.1)
    ours = build_optimizer(mine, settings, bf16=True)
    names = [name for name, kind in ours.taken_by().items() if kind == "muon"]
    theirs = torch.optim.Muon(
        [p for name, p in other.named_parameters() if name in names],
        lr=settings.muon_lr * 0.5,
        weight_decay=0.1,
        momentum=settings.momentum,
        adjust_lr_fn="original",
    )
    for seed in range(3):
        give_gradients(mine, seed)
        give_gradients(other, seed)
        ours.step(0.5)
        theirs.step()
    begun, got, want = weights(learner()), weights(mine), weights(other)
    for name in names:
        step, theirs_step = got[name] - begun[name], want[name] - begun[name]
        assert (step - theirs_step).norm() <= 0.02 * theirs_step.norm(), name  # bfloat16, summed in another order
        assert theirs_step.norm() > 0.01


def test_one_rate_fits_all_shapes():
    assert step_scale(32, 32) == step_scale(32, 64) == 1
    assert step_scale(64, 16) == 2


@pytest.mark.parametrize("shape", [MODERN, TUTORIAL], ids=["modernbert", "tutorial"])
def test_matrices_go_to_muon_and_the_rest_to_adam(shape: EncoderConfig):
    module = learner(shape)
    taken = build_optimizer(module, OptimizerConfig()).taken_by()
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
        assert set(build_optimizer(module, OptimizerConfig(kind=kind)).taken_by().values()) == {"adam"}


def test_adam_is_torchs_adam_without_decay():
    mine, other = learner(TUTORIAL), learner(TUTORIAL)
    settings = OptimizerConfig(kind="adam", lr=1e-2, beta2=0.999, weight_decay=0.5)
    ours = build_optimizer(mine, settings)
    theirs = torch.optim.Adam(other.parameters(), lr=5e-3, betas=(0.9, 0.999))
    for seed in range(3):
        give_gradients(mine, seed)
        give_gradients(other, seed)
        ours.step(0.5)
        theirs.step()
    for mine_w, other_w in zip(weights(mine).values(), weights(other).values(), strict=True):
        torch.testing.assert_close(mine_w, other_w, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_decay_spares_norms_and_biases(kind: str):
    module = learner()
    before = weights(module)
    settings = OptimizerConfig(kind=kind, weight_decay=0.5, lr=0.1, muon_lr=0.1)  # pyright: ignore[reportArgumentType]
    optimizer = build_optimizer(module, settings)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    for name, after in weights(module).items():
        torch.testing.assert_close(after, before[name] * (1.0 if after.ndim < 2 else 0.95))


@pytest.mark.parametrize("kind", ["muon", "adamw", "adam"])
def test_a_table_of_positions_has_its_own_share_of_the_rate(kind: str):
    shape = BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    whole, tenth = learner(shape), learner(shape)
    for module, factor in ((whole, 1.0), (tenth, 0.1)):
        settings = OptimizerConfig(kind=kind, position_embedding_lr_scale=factor, weight_decay=0.0)  # pyright: ignore[reportArgumentType]
        give_gradients(module, 1)
        build_optimizer(module, settings).step(1.0)
    before, full, small = weights(learner(shape)), weights(whole), weights(tenth)
    for name in before:
        factor = 0.1 if name == "encoder.position_embedding" else 1.0
        torch.testing.assert_close(
            small[name] - before[name], factor * (full[name] - before[name]), atol=1e-7, rtol=1e-3
        )


@pytest.mark.parametrize("kind", ["muon", "adamw", "adam"])
def test_two_steps_are_one_step_a_saved_state_and_another(kind: str):
    settings = OptimizerConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    whole, broken = learner(), learner()
    one, two = build_optimizer(whole, settings), build_optimizer(broken, settings)
    for optimizer, module in ((one, whole), (two, broken)):
        give_gradients(module, 1)
        optimizer.step(1.0)
    on_disk = save(two.state_tensors())
    resumed = learner()
    resumed.load_state_dict(broken.state_dict())
    three = build_optimizer(resumed, settings)
    assert three.state_tensors().keys() == one.state_tensors().keys()
    three.load_state_tensors(load(on_disk))
    for optimizer, module in ((one, whole), (three, resumed)):
        give_gradients(module, 2)
        optimizer.step(0.3)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    ours, theirs = one.state_tensors(), three.state_tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_state_of_another_learner_is_refused_by_name():
    optimizer = build_optimizer(learner(), OptimizerConfig())
    state = optimizer.state_tensors()
    with pytest.raises(RunError, match=r"encoder\.token_embedding"):
        optimizer.load_state_tensors({k: v for k, v in state.items() if "token_embedding" not in k})
    with pytest.raises(RunError, match="unknown"):
        optimizer.load_state_tensors(state | {"other.momentum": torch.zeros(1)})
    with pytest.raises(RunError, match="shape"):
        optimizer.load_state_tensors(build_optimizer(learner(vocabulary=41), OptimizerConfig()).state_tensors())


def test_clipping_bounds_the_common_norm():
    module = learner()
    optimizer = build_optimizer(module, OptimizerConfig(max_grad_norm=0.5))
    give_gradients(module, 0)
    norm = optimizer.clip()
    assert norm == pytest.approx(sum(p.numel() for p in module.parameters()) ** 0.5, rel=0.05)
    assert optimizer.clip() == pytest.approx(0.5, rel=1e-3)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


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
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, float]):
    with pytest.raises(RecipeError) as refused:
        dataclasses.replace(OptimizerConfig(), **wrong)
    assert refused.value.location in wrong
