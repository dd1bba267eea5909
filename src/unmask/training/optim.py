"""Optimizers and learning-rate schedules.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) optimizes the matrices of the encoder's blocks, of
the head and of a generator. AdamW optimizes everything else: embeddings, the decoder, norms, biases and all other
parameters of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.config import require
from unmask.core.errors import RecipeError, RunError
from unmask.core.quantities import Fraction
from unmask.models.parallel import (
    MatrixOwners,
    held,
    held_parameter,
    is_sharded,
    like_parameter,
    norm_over_shards,
)

# Coefficients of the Newton-Schulz iteration of Jordan et al.: among quintic polynomials whose iterates stay near 1,
# the one with the steepest slope at 0. The singular values end in about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_MIN_NORM = 1e-7

WARMUP_START = 0.05  # factor on the peak learning rates in the first step; 0 would waste that step


# Settings -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer settings. Learning rates are peak values; the schedule scales all of them by one factor."""

    # Optimizer; muon: Muon for matrices, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    kind: Literal["muon", "adamw", "adam"] = "muon"
    lr: float = 3e-3  # Peak learning rate of AdamW and Adam.
    # Factor on `lr` for learned position embeddings, whose gradients are noisy.
    position_embedding_lr_scale: float = 1.0
    muon_lr: float = 0.014  # Peak learning rate of Muon: the spectral norm of a square matrix's update.
    # Whether Muon orthogonalizes the queries, keys and values of each head separately (arXiv 2602.15763).
    muon_per_head: bool = True
    # Decoupled weight decay, multiplied by the learning rate. Not for norms and biases, and not with adam.
    weight_decay: float = 0.01
    momentum: float = 0.95  # Nesterov momentum of Muon.
    beta1: float = 0.9  # Decay of the mean of gradients in AdamW and Adam.
    beta2: float = 0.98  # Decay of the mean of squared gradients in AdamW and Adam.
    eps: float = 1e-8  # Constant in the denominator of AdamW and Adam.
    max_grad_norm: float = 1.0  # Limit of the norm over all gradients; inf: no clipping.

    def __post_init__(self) -> None:
        require(self, "lr", "position_embedding_lr_scale", "muon_lr", "eps", above=0, below=math.inf)
        require(self, "max_grad_norm", above=0)
        require(self, "momentum", "beta1", "beta2", min=0, below=1)
        require(self, "weight_decay", min=0)

    def scaled_rates(self, factor: float) -> list[str]:
        """Returns the learning rates times a factor, as settings: "optimizer.lr=0.0015"."""
        names = ["lr", *(["muon_lr"] if self.kind == "muon" else [])]
        return [f"optimizer.{name}={getattr(self, name) * factor:g}" for name in names]


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule. Fractions are of the planned tokens.

    - wsd: warm-up, stable, decay (arXiv 2404.06395): the peak until the last `decay`, then linear decay.
    - linear, cosine: decay directly after the warm-up.
    - noam: hidden_size^-0.5 * min(step^-0.5, step * warmup_steps^-1.5) (arXiv 1706.03762, section 5.3), times `lr`.
    """

    kind: Literal["wsd", "linear", "cosine", "noam"] = "wsd"  # Form of the schedule.
    warmup: Fraction = Fraction(0.02)  # [fraction of the planned tokens] Length of the linear warm-up; not with noam.
    decay: Fraction = Fraction(0.40)  # [fraction of the planned tokens] Length of the decay at the end; with wsd only.
    min_lr_ratio: float = 0.0  # Final learning rate / peak learning rate; not with noam.
    warmup_steps: int = 2000  # [steps] Length of the warm-up; with noam only.

    def __post_init__(self) -> None:
        if self.kind == "wsd" and self.warmup.fraction + self.decay.fraction > 1:
            raise RecipeError(
                f"warmup ({self.warmup}) and decay ({self.decay}) exceed the whole run",
                location="decay",
                hint="lower one of them",
            )
        require(self, "min_lr_ratio", min=0, max=1)
        require(self, "warmup_steps", min=1)


# Schedule -------------------------------------------------------------------------------------------------------------


def lr_factor_at(config: ScheduleConfig, progress: float, step: int, hidden_size: int) -> float:
    """Returns the factor on all peak learning rates in a step.

    The factor is continuous, rises during warm-up only, and reaches `min_lr_ratio` at progress 1.

    Args:
        config: The schedule.
        progress: Fraction of the planned tokens before this step; "noam" ignores it.
        step: Number of the step, from 0; only "noam" uses it.
        hidden_size: Hidden size of the encoder; only "noam" uses it.
    """
    if config.kind == "noam":
        return hidden_size**-0.5 * min((step + 1) ** -0.5, (step + 1) * config.warmup_steps**-1.5)
    warmup = config.warmup.fraction
    if progress < warmup:
        return WARMUP_START + (1 - WARMUP_START) * progress / warmup
    decay = config.decay.fraction if config.kind == "wsd" else 1 - warmup
    remaining = 1.0 if decay == 0 else min(1.0, max(0.0, (1 - progress) / decay))
    if config.kind == "cosine":
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining


def describe_decay(config: ScheduleConfig) -> str:
    """Returns when the learning rate decays, such as "over the last 40% of the plan"; an empty string if it doesn't."""
    if config.min_lr_ratio == 1 or config.kind == "noam":
        return ""
    if config.kind == "wsd":
        return f"over the last {config.decay} of the plan" if config.decay.fraction else ""
    return "until the end of the plan"


# Muon -----------------------------------------------------------------------------------------------------------------


def orthogonalize(matrix_NRC: Float[Tensor, "N R C"], *, bf16: bool) -> Float[Tensor, "N R C"]:
    """Returns the matrices with all singular values moved near 1 by Newton-Schulz iterations."""
    a, b, c = QUINTIC
    is_tall = matrix_NRC.shape[-2] > matrix_NRC.shape[-1]
    x = matrix_NRC.to(torch.bfloat16) if bf16 else matrix_NRC
    x = x.mT if is_tall else x
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_MIN_NORM)).contiguous()
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrix_NRC.dtype)


def update_scale(rows: int, columns: int) -> float:
    """Returns the factor on an orthogonalized update: sqrt(max(1, rows / columns)).

    With it, one learning rate fits all shapes: an update changes the output for unit inputs equally. The other common
    choice, 0.2 * sqrt(max(rows, columns)), matches the typical update of AdamW and would tie `muon_lr` to `lr`.
    """
    return math.sqrt(max(1.0, rows / columns))


class Muon:
    """Orthogonalized Nesterov momentum, kept in float32.

    Matrices of the same shape are stacked and orthogonalized together by batched matrix products. A matrix whose rows
    are divided into heads is orthogonalized head by head, which costs less: a product of K x D matrices of one head
    has D / K times fewer operations.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Mapping[str, int],
        config: OptimizerConfig,
        *,
        bf16: bool,
        sharded: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Creates the state of matrices.

        Args:
            parameters: Matrices by name, or the rows of them that this rank holds.
            rows: Rows of each matrix that are orthogonalized together.
            config: Optimizer settings.
            bf16: Whether matrices are orthogonalized in bfloat16.
            sharded: The sharded matrices, if `parameters` are rows of them.
        """
        self._config = config
        self._bf16 = bf16
        self._owners = MatrixOwners(next(iter(sharded.values()))) if sharded else None
        self._stacks: dict[tuple[int, int, int], dict[str, nn.Parameter]] = {}  # by shape and rows of a block
        for name, parameter in parameters.items():
            shape = (sharded[name] if sharded else parameter).shape
            key = (*cast("tuple[int, int]", tuple(shape)), rows[name])
            self._stacks.setdefault(key, {})[name] = parameter
        self._momentum = {
            key: torch.stack([torch.zeros_like(parameter, dtype=torch.float32) for parameter in stack.values()])
            for key, stack in self._stacks.items()
        }

    @torch.no_grad()
    def step(self, lr_factor: float, applies: Tensor | None = None) -> None:
        """Updates the matrices that have a gradient with the learning rate muon_lr * lr_factor.

        If `applies`, a boolean on the device, is false, nothing changes. It is not read by the host.
        """
        config = self._config
        lr = config.muon_lr * lr_factor
        for key, stack in self._stacks.items():
            all_rows, columns, rows = key
            # Without a gradient, the momentum alone would move a matrix: orthogonalized, it never becomes small.
            trained = [(n, p, p.grad) for n, p in enumerate(stack.values()) if p.grad is not None]
            if not trained:
                continue
            numbers, parameters, grads = zip(*trained, strict=True)
            gradient_NRC = torch.stack(grads).float()
            momentum_NRC = self._momentum[key]
            if len(numbers) < len(stack):
                momentum_NRC = momentum_NRC[list(numbers)]  # a copy
            if applies is not None:  # the average of the momentum with itself is the same momentum, bit for bit
                gradient_NRC = torch.where(applies, gradient_NRC, momentum_NRC)
            momentum_NRC.lerp_(gradient_NRC, 1 - config.momentum)
            if len(numbers) < len(stack):
                self._momentum[key][list(numbers)] = momentum_NRC
            nesterov_NRC = gradient_NRC.lerp_(momentum_NRC, config.momentum)
            orthogonalize_all = partial(self._orthogonalize, rows=rows)
            update_NRC = (
                self._owners.apply(nesterov_NRC, all_rows, orthogonalize_all)
                if self._owners
                else orthogonalize_all(nesterov_NRC)
            )
            decay = 1 - lr * config.weight_decay
            if applies is not None:
                decay, update_NRC = torch.where(applies, decay, 1.0), update_NRC * applies
            for parameter, update_RC in zip(parameters, update_NRC, strict=True):
                parameter.mul_(decay).add_(update_RC, alpha=-lr * update_scale(rows, columns))

    def _orthogonalize(self, matrix_NRC: Tensor, rows: int) -> Tensor:
        """Returns the matrices with each block of `rows` rows orthogonalized."""
        return orthogonalize(matrix_NRC.reshape(-1, rows, matrix_NRC.shape[-1]), bf16=self._bf16).view_as(matrix_NRC)

    @property
    def flops(self) -> int:
        """FLOPs of the Newton-Schulz iterations in one step: products of r x c, r x r and r x r by r x c, r <= c."""
        total = 0
        for (all_rows, columns, rows), stack in self._stacks.items():
            r, c = sorted((rows, columns))
            total += len(stack) * (all_rows // rows) * ITERATIONS * (4 * r * r * c + 2 * r**3)
        return total

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and momentum of each matrix; the tensors are views."""
        for key, stack in self._stacks.items():
            for name, momentum in zip(stack, self._momentum[key].unbind(), strict=True):
                yield f"{name}.momentum", momentum


# Optimizer ------------------------------------------------------------------------------------------------------------


class Optimizer:
    """Optimizes all parameters of a module that require a gradient: matrices by Muon, everything else by AdamW."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, bf16: bool = False) -> None:
        """Creates the optimizer.

        Args:
            module: Module with an `encoder` and a `head`. Muon optimizes their `matrix_parameters()`, and those of
                its `parts` if they have any.
            config: Optimizer settings.
            bf16: Whether Muon orthogonalizes in bfloat16.
        """
        self.config = config
        encoder, head = cast("Any", module).encoder, cast("Any", module).head
        parts: list[Any] = [encoder, head]
        if hasattr(own := getattr(module, "parts", None), "matrix_parameters"):  # of the objective: a generator's
            parts.append(own)
        matrices = {id(parameter) for part in parts for parameter in part.matrix_parameters()}
        position_embeddings = {id(parameter) for parameter in encoder.position_parameters()}
        named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        muon_parameters = {name: p for name, p in named.items() if config.kind == "muon" and id(p) in matrices}
        with_heads = [part for part in parts if part is not head] if config.muon_per_head else []
        head_matrices = {id(parameter) for part in with_heads for parameter in part.head_matrices()}
        rows = {
            name: encoder.settings.head_width if id(parameter) in head_matrices else len(parameter)
            for name, parameter in muon_parameters.items()
        }
        # What is updated are the tensors that this rank holds: `parameters`, or their rows if they are sharded.
        self._named = named
        self._held = {name: held_parameter(parameter) for name, parameter in named.items()}
        self._muon = Muon(
            {name: self._held[name] for name in muon_parameters},
            rows,
            config,
            bf16=bf16,
            sharded={name: p for name, p in muon_parameters.items() if is_sharded(p)},
        )
        self._adam_parameters = {name: p for name, p in self._held.items() if name not in muon_parameters}
        assert self._adam_parameters, "a model has embeddings, norms or biases"

        decay = 0.0 if config.kind == "adam" else config.weight_decay
        position_scale = config.position_embedding_lr_scale
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._adam_parameters.items():
            scale = position_scale if id(named[name]) in position_embeddings else 1.0
            groups.setdefault((scale, decay if parameter.ndim >= 2 else 0.0), []).append(parameter)
        # AdamW without weight decay is Adam. On a CPU, fused is 3 times as fast as a loop, 6 times as fast as foreach.
        self._adam = torch.optim.AdamW(
            [{"params": group, "lr_scale": scale, "weight_decay": wd} for (scale, wd), group in groups.items()],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        # The state exists before the first step, so that a checkpoint has the same tensors whenever it is written.
        for parameter in self._adam_parameters.values():
            self._adam.state[parameter] = _initial_adam_state(parameter)

    def clip(self) -> Tensor:
        """Scales all gradients so that their common norm is at most `max_grad_norm`; returns the original norm."""
        for name, parameter in self._named.items():
            if is_sharded(parameter):
                self._held[name].grad = None if parameter.grad is None else held(parameter.grad)
        grads = [parameter.grad for parameter in self._held.values() if parameter.grad is not None]
        norm = norm_over_shards(nn.utils.get_total_norm(grads), next(iter(self._named.values())))
        if math.isfinite(self.config.max_grad_norm):
            nn.utils.clip_grads_with_norm_(self._held.values(), self.config.max_grad_norm, norm)
        return norm

    def step(self, lr_factor: float, applies: Tensor | None = None) -> None:
        """Updates the parameters with the peak learning rates times `lr_factor`.

        Args:
            lr_factor: Factor on all learning rates.
            applies: A boolean on the device, which the host doesn't wait for: if it is false, neither parameters nor
                state change. None: the parameters are updated.
        """
        self._muon.step(lr_factor, applies)
        for group in self._adam.param_groups:
            group["lr"] = self.config.lr * lr_factor * group["lr_scale"]
        # As torch.amp.GradScaler passes it to fused optimizers: 1 means that the step is skipped.
        cast("Any", self._adam).found_inf = None if applies is None else (~applies).float()
        self._adam.step()

    def zero_grad(self) -> None:
        """Deletes all gradients."""
        for name, parameter in self._named.items():
            parameter.grad = self._held[name].grad = None

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products in one step: those of Muon."""
        return self._muon.flops

    def algorithms(self) -> dict[str, Literal["muon", "adam"]]:
        """Returns the algorithm that optimizes each parameter, by parameter name."""
        muon = {name.removesuffix(".momentum"): "muon" for name, _ in self._muon.state()}
        return muon | dict.fromkeys(self._adam_parameters, "adam")  # pyright: ignore[reportReturnType]

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the state, named after the parameters and sharded like them. The tensors are live, not copies."""
        tensors = {
            name: like_parameter(momentum, self._named[name.removesuffix(".momentum")])
            for name, momentum in self._muon.state()
        }
        for name, parameter in self._adam_parameters.items():
            state = self._adam.state[parameter].items()
            tensors |= {f"{name}.{key}": like_parameter(value, self._named[name]) for key, value in state}
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a state, bit for bit. The tensors are sharded if the parameters are.

        Raises:
            RunError: the tensors don't match the module and the settings; the error names the first mismatch.
        """
        current = self.state_tensors()
        hint = "resume with the recipe that the checkpoint was trained with"
        for name in sorted(set(current) ^ set(tensors)):
            problem = "missing from" if name in current else "unexpected in"
            raise RunError(f"`{name}` is {problem} the optimizer state", hint=hint)
        for name, tensor in current.items():
            saved = tensors[name]
            if (tensor.shape, tensor.dtype) != (saved.shape, saved.dtype):
                actual, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (saved, tensor))
                raise RunError(
                    f"invalid shape or dtype of `{name}` in the optimizer state: got {actual}, expected {expected}",
                    hint=hint,
                )
            held(tensor).copy_(held(saved))


def _initial_adam_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Returns the state of AdamW for a parameter before the first step: all zeros.

    A step on a scalar parameter provides names and dtypes, because torch does not document its state.
    """
    number = nn.Parameter(torch.zeros(1, device="cpu"))
    number.grad = torch.zeros_like(number)
    adam = torch.optim.AdamW([number], fused=True)
    adam.step()
    return {
        key: torch.zeros_like(parameter if value.shape == number.shape else value, device=parameter.device)
        for key, value in adam.state[number].items()
    }
