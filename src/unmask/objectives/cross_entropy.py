"""Cross-entropy of a linear decoder, without float32 logits in memory.

`F.cross_entropy(F.linear(x, weight, bias), labels)` writes tensors of shape M x V seven times: the logits, their
float32 copy, their logarithms, and the gradients of each. Here the logits are turned into their gradient in place, in
blocks that stay in the processor's cache. For 614 masked tokens, a vocabulary of 8,192 and width 256 in bfloat16, one
thread of an Intel Xeon needs 18 instead of 71 ms for forward and backward pass, of which the matrix products take 10.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_LOGITS = 1 << 19  # 2 MB in float32: about the second-level cache of one core
_GPU_BLOCK_LOGITS = 1 << 26  # few and large kernels


def linear_cross_entropy(
    features_MD: Float[Tensor, "M D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, "V"],
    labels_M: Int[Tensor, "M"],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the summed cross-entropy in nats, and the number of labels with the highest logit.

    Matrix products are computed in autocast's dtype if it is enabled, everything else in float32. The gradient is that
    of the sum, so the caller can scale it. A label that shares the highest logit counts as correct.
    """
    device_type = features_MD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else features_MD.dtype
    with torch.autocast(device_type, enabled=False):
        result = _LinearCrossEntropy.apply(features_MD.to(dtype), weight_VD.to(dtype), bias_V, labels_M)
    return cast("tuple[Tensor, Tensor]", result)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradient with respect to the logits in the forward pass: softmax minus one at the label."""

    @staticmethod
    def forward(
        ctx: Any, features_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the number of correct predictions."""
        logits_MV = features_MD @ weight_VD.T
        nats = torch.zeros((), device=features_MD.device)
        correct = torch.zeros((), dtype=torch.int64, device=features_MD.device)
        block_logits = _GPU_BLOCK_LOGITS if features_MD.is_cuda else _BLOCK_LOGITS
        rows = max(1, block_logits // len(weight_VD))
        for block_RV, labels_R in zip(logits_MV.split(rows), labels_M.split(rows), strict=True):
            x_RV = block_RV.float().add_(bias_V)  # in float32 this is the block itself, otherwise a copy
            label_R1 = x_RV.gather(1, labels_R[:, None])
            highest_R1 = x_RV.amax(1, keepdim=True)
            total_R1 = x_RV.sub_(highest_R1).exp_().sum(1, keepdim=True)
            nats += (total_R1.log() + highest_R1 - label_R1).sum()
            correct += (label_R1 == highest_R1).sum()
            x_RV.div_(total_R1).scatter_add_(1, labels_R[:, None], torch.full_like(label_R1, -1.0))
            if x_RV.dtype != block_RV.dtype:
                block_RV.copy_(x_RV)
        ctx.save_for_backward(features_MD, weight_VD, logits_MV)  # the logits are their gradient by now
        ctx.mark_non_differentiable(correct)
        return nats, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of features, weight and bias."""
        scale = grad_outputs[0]
        features_MD, weight_VD, gradient_MV = ctx.saved_tensors
        return (
            (gradient_MV @ weight_VD).mul_(scale),
            gradient_MV.T @ (features_MD * scale).to(features_MD.dtype),
            gradient_MV.sum(0, dtype=torch.float32) * scale,
            None,
        )
