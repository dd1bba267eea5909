"""Cross-entropy of a linear decoder: equal to torch's, in value and gradients, for any number of blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.objectives.cross_entropy import linear_cross_entropy


def inputs(rows: int, vocab_size: int, width: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab_size)
    features, weight = (torch.randn(n, width, generator=generator) for n in (rows, vocab_size))
    bias = torch.randn(vocab_size, generator=generator)
    return features, weight, bias, torch.randint(vocab_size, (rows,), generator=generator)


def reference(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


def gradients(loss: Tensor, tensors: list[Tensor], scale: float) -> list[Tensor]:
    return list(torch.autograd.grad(loss * scale, tensors))


@pytest.mark.parametrize(("rows", "vocab_size"), [(0, 11), (1, 1), (7, 2), (300, 5000), (5, 600_000)])
@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_equals_torch_in_float32(rows: int, vocab_size: int, scale: float) -> None:
    features, weight, bias, labels = inputs(rows, vocab_size)
    exact = [tensor.double().requires_grad_() for tensor in (features, weight, bias)]
    expected, expected_correct = reference(*exact, labels)
    tensors = [tensor.requires_grad_() for tensor in (features, weight, bias)]
    nats, nats_M, correct_M = linear_cross_entropy(*tensors, labels)
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nats_M.sum(), nats.detach())
    assert correct_M.sum() == expected_correct
    for own, right in zip(gradients(nats, tensors, scale), gradients(expected, exact, scale), strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-5)


def test_is_more_exact_than_torch_in_bfloat16() -> None:
    features, weight, bias, labels = inputs(200, 3000)
    features = features / 5
    exact = [tensor.double().requires_grad_() for tensor in (features, weight, bias)]
    expected, _ = reference(*exact, labels)
    right = gradients(expected, exact, 1.0)

    def error(loss: Tensor, tensors: list[Tensor]) -> list[float]:
        own = gradients(loss, tensors, 1.0)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(own, right, strict=True)]

    tensors = [tensor.requires_grad_() for tensor in (features, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        own_loss, _, _ = linear_cross_entropy(*tensors, labels)
        torch_loss, _ = reference(*tensors, labels)
    own, theirs = error(own_loss, tensors), error(torch_loss, tensors)
    assert max(own) < 0.01
    assert all(a <= 1.05 * b for a, b in zip(own, theirs, strict=True)), (own, theirs)
    assert abs(own_loss.item() / expected.item() - 1) < 1e-3


def test_the_second_of_equal_logits_counts_as_correct() -> None:
    weight = torch.zeros(3, 4)
    _, _, correct = linear_cross_entropy(torch.ones(2, 4), weight, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 2]))
    assert correct.tolist() == [True, False]


def test_no_masked_token_has_no_gradient() -> None:
    features, weight, bias, labels = inputs(0, 5)
    weight.requires_grad_()
    nats, nats_M, correct_M = linear_cross_entropy(features, weight, bias, labels)
    nats.backward()
    assert nats == 0 and len(nats_M) == len(correct_M) == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(("rows", "vocab_size"), [(7, 2), (300, 5000)])
def test_weights_scale_losses_and_gradients(rows: int, vocab_size: int) -> None:
    features, weight, bias, labels = inputs(rows, vocab_size)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)) * 3
    exact = [tensor.double().requires_grad_() for tensor in (features, weight, bias)]
    each = F.cross_entropy(F.linear(*exact), labels, reduction="none")
    tensors = [tensor.requires_grad_() for tensor in (features, weight, bias)]
    total, nats_M, _ = linear_cross_entropy(*tensors, labels, weights)
    torch.testing.assert_close(nats_M.double(), each.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), (each * weights).sum(), rtol=1e-5, atol=1e-5)
    for own, right in zip(gradients(total, tensors, 1.0), gradients((each * weights).sum(), exact, 1.0), strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-5)
