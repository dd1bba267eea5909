"""Room card: which parameter goes to which optimizer, and one step of both.

Comes in: a Learner with gradients, a factor for all rates. Goes out: changed weights; the state as named tensors.
Called by: loop, checkpoint.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the matrices inside the encoder's blocks
and the head's; AdamW takes the rest: tables that are indexed rather than multiplied (tokens, decoder), norms, biases,
and what an objective adds. Matrices of one shape are stacked and orthogonalised in one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unmask.core.errors import RecipeError, RunError
from unmask.core.quantities import Fraction

# The quintic of Jordan et al.: the steepest at 0 whose iterates stay near 1; singular values end in about [0.7, 1.2].
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_TINY = 1e-7
POSITIONS = "encoder.position_embedding"


@dataclass(frozen=True)
class OptimizerConfig:
    """Rates are peaks; the schedule's factor scales them all."""

    kind: Literal["muon", "adamw", "adam"] = "muon"
    lr: float = 3e-3  # AdamW's and Adam's
    position_embedding_lr_scale: float = 1.0  # × lr for a table of positions: few rows, each with a noisy gradient
    muon_lr: float = 0.02  # Muon's: the spectral norm of a square matrix's step
    weight_decay: float = 0.01  # decoupled, × the rate; none on norms and biases, none at all for "adam"
    momentum: float = 0.95  # Muon's, Nesterov
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    max_grad_norm: float = 1.0  # the gradient's norm over all parameters, at most; inf: never

    def __post_init__(self) -> None:
        for name in ("lr", "position_embedding_lr_scale", "muon_lr", "eps", "max_grad_norm"):
            too_large = name != "max_grad_norm" and math.isinf(getattr(self, name))
            if not getattr(self, name) > 0 or too_large:
                raise RecipeError(f"`{name}` is {getattr(self, name)}", location=name, hint="give a number above 0")
        for name in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(
                    f"`{name}` is {getattr(self, name)}", location=name, hint="give a number from 0 to below 1"
                )
        if not self.weight_decay >= 0:
            raise RecipeError(f"`weight_decay` is {self.weight_decay}", location="weight_decay", hint="give 0 or more")


def goes_to_muon(name: str, parameter: Tensor) -> bool:
    """Whether this parameter of a Learner is a matrix that maps vectors to vectors, apart from the vocabulary's."""
    inside = name.startswith(("encoder.blocks.", "head."))
    return inside and parameter.ndim == 2 and "decoder" not in name.split(".")


def orthogonalize(matrix_NRC: Float[Tensor, "N R C"], *, bf16: bool) -> Float[Tensor, "N R C"]:
    """Each matrix with its singular values brought near 1, by Newton-Schulz iterations of the quintic."""
    a, b, c = QUINTIC
    tall = matrix_NRC.shape[-2] > matrix_NRC.shape[-1]
    x = matrix_NRC.to(torch.bfloat16) if bf16 else matrix_NRC
    x = x.mT if tall else x
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_TINY)).contiguous()
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix_NRC.dtype)


def step_scale(rows: int, columns: int) -> float:
    """What an orthogonal step is multiplied by, so that one rate fits all shapes: √max(1, rows ÷ columns).

    An output of a step then has the same size for unit inputs whatever the shape. The other choice in use, 0.2 ·
    √max(rows, columns), matches AdamW's typical step instead and would tie `muon_lr` to `lr`.
    """
    return math.sqrt(max(1.0, rows / columns))


class Muon:
    """Nesterov momentum, orthogonalised; the momentum is kept in float32, stacked by shape."""

    def __init__(self, named: Mapping[str, nn.Parameter], settings: OptimizerConfig, *, bf16: bool) -> None:
        self._settings = settings
        self._bf16 = bf16
        self._stacks: dict[torch.Size, dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            self._stacks.setdefault(parameter.shape, {})[name] = parameter
        self._momentum = {
            shape: torch.stack([torch.zeros_like(parameter, dtype=torch.float32) for parameter in stack.values()])
            for shape, stack in self._stacks.items()
        }

    @torch.no_grad()
    def step(self, rate_factor: float) -> None:
        """One step at muon_lr × rate_factor; a matrix without a gradient counts as one with a gradient of zero."""
        settings = self._settings
        rate = settings.muon_lr * rate_factor
        for shape, stack in self._stacks.items():
            parameters = list(stack.values())
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            gradient_NRC = torch.stack(grads).float()
            momentum_NRC = self._momentum[shape]
            momentum_NRC.lerp_(gradient_NRC, 1 - settings.momentum)
            ahead_NRC = gradient_NRC.lerp_(momentum_NRC, settings.momentum)
            update_NRC = orthogonalize(ahead_NRC, bf16=self._bf16)
            for parameter, update_RC in zip(parameters, update_NRC, strict=True):
                parameter.mul_(1 - rate * settings.weight_decay).add_(update_RC, alpha=-rate * step_scale(*shape))

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and momentum of each matrix, as views."""
        for shape, stack in self._stacks.items():
            for name, momentum in zip(stack, self._momentum[shape].unbind(), strict=True):
                yield f"{name}.momentum", momentum


class Optimizer:
    """All parameters of a Learner that have a gradient, each with the optimizer it belongs to."""

    def __init__(self, learner: nn.Module, settings: OptimizerConfig, *, bf16: bool) -> None:
        self.settings = settings
        named = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
        to_muon = {n: p for n, p in named.items() if settings.kind == "muon" and goes_to_muon(n, p)}
        self._muon = Muon(to_muon, settings, bf16=bf16)
        self._parameters = list(named.values())
        self._rest = {name: parameter for name, parameter in named.items() if name not in to_muon}
        assert self._rest, "a learner without tables, norms or biases"
        decay = 0.0 if settings.kind == "adam" else settings.weight_decay
        positions = [p for n, p in self._rest.items() if n == POSITIONS]
        tables = [p for n, p in self._rest.items() if p.ndim >= 2 and n != POSITIONS]
        groups = [
            {"params": positions, "weight_decay": decay, "factor": settings.position_embedding_lr_scale},
            {"params": tables, "weight_decay": decay, "factor": 1.0},
            {"params": [p for p in self._rest.values() if p.ndim < 2], "weight_decay": 0.0, "factor": 1.0},
        ]
        # AdamW without weight decay is Adam; fused is 3 times as fast as a loop on a CPU, 6 times as foreach.
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        # Made now and not in the first step, so that the state has the same names from the start.
        for parameter in self._rest.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def clip(self) -> float:
        """Scale all gradients so that their common norm is at most settings.max_grad_norm; the norm before that."""
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if math.isfinite(self.settings.max_grad_norm):
            nn.utils.clip_grads_with_norm_(self._parameters, self.settings.max_grad_norm, norm)
        return float(norm)

    def step(self, rate_factor: float) -> None:
        """Change the weights by their gradients, at peak rates × rate_factor."""
        self._muon.step(rate_factor)
        for group in self._adam.param_groups:
            group["lr"] = self.settings.lr * rate_factor * group["factor"]
        self._adam.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def taken_by(self) -> dict[str, Literal["muon", "adam"]]:
        """Which optimizer takes which parameter, by name."""
        muon = {name.removesuffix(".momentum"): "muon" for name, _ in self._muon.state()}
        return muon | dict.fromkeys(self._rest, "adam")  # pyright: ignore[reportReturnType]

    def state_tensors(self) -> dict[str, Tensor]:
        """The state, named after the parameters; live tensors, not copies."""
        tensors = dict(self._muon.state())
        for name, parameter in self._rest.items():
            tensors |= {f"{name}.{key}": value for key, value in self._adam.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a state back, bit for bit.

        Raises:
            RunError: its tensors are not those of this learner and these settings; the first that differs is named.
        """
        mine = self.state_tensors()
        for name in sorted(set(mine) ^ set(tensors)):
            side = "is missing from" if name in mine else "is unknown here, but stands in"
            raise RunError(f"`{name}` {side} the optimizer's state", hint="resume with the recipe that saved it")
        for name, tensor in mine.items():
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise RunError(
                    f"`{name}` of the optimizer's state has another shape or number format",
                    hint="resume with the recipe that saved it",
                )
            tensor.copy_(tensors[name])


def build_optimizer(learner: nn.Module, settings: OptimizerConfig, *, bf16: bool = False) -> Optimizer:
    """The optimizer of a Learner; with `bf16` Muon orthogonalises in bfloat16: the caller decides from facts."""
    return Optimizer(learner, settings, bf16=bf16)


START = 0.05  # of the peak: where the warm-up begins, so that the first step is not wasted on a rate of zero


@dataclass(frozen=True)
class ScheduleConfig:
    """How rates rise and fall; shares are of planned tokens.

    - wsd: warm-up, then the peak, then a straight line to the floor over the last `decay` (warm-up, stable, decay).
    - linear, cosine: warm-up, then to the floor all the way.
    - noam: width^−½ · min(step^−½, step · warmup_steps^−1½) (arXiv 1706.03762, section 5.3); the rate is its factor.
    """

    kind: Literal["wsd", "linear", "cosine", "noam"] = "wsd"
    warmup: Fraction = Fraction(0.02)
    decay: Fraction = Fraction(0.40)  # of "wsd" alone
    min_lr_ratio: float = 0.0  # part of the peak that is left at the end
    warmup_steps: int = 2000  # of "noam" alone

    def __post_init__(self) -> None:
        if self.kind == "wsd" and self.warmup.fraction + self.decay.fraction > 1:
            raise RecipeError(
                f"warm-up ({self.warmup}) and decay ({self.decay}) are more than the whole run",
                location="decay",
                hint="lower one of them",
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise RecipeError(
                f"`min_lr_ratio` is {self.min_lr_ratio}",
                location="min_lr_ratio",
                hint="give a part of the peak, from 0 to 1",
            )
        if self.warmup_steps < 1:
            raise RecipeError(f"`warmup_steps` is {self.warmup_steps}", location="warmup_steps", hint="give at least 1")


def decay_in_words(settings: ScheduleConfig) -> str:
    """When the rates come down, for a person; empty where they don't, or have no end to come down to."""
    if settings.min_lr_ratio == 1 or settings.kind == "noam":
        return ""
    if settings.kind == "wsd":
        return f"over the last {settings.decay} of the plan" if settings.decay.fraction else ""
    return "until the end of the plan"


def rate_factor(settings: ScheduleConfig, progress: float, step: int, width: int) -> float:
    """The factor on all peak rates of step `step` (from 0), begun when the share `progress` of planned tokens was done.

    Continuous; it rises during warm-up, never after it, and reaches the floor at progress 1. "noam" looks at step and
    at the encoder's width alone, the others at progress alone.
    """
    if settings.kind == "noam":
        return width**-0.5 * min((step + 1) ** -0.5, (step + 1) * settings.warmup_steps**-1.5)
    warmup = settings.warmup.fraction
    if progress < warmup:
        return START + (1 - START) * progress / warmup
    fall = settings.decay.fraction if settings.kind == "wsd" else 1 - warmup
    left = 1.0 if fall == 0 else min(1.0, max(0.0, (1 - progress) / fall))
    if settings.kind == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left
