"""Memory of a run, and matrix products of a training step: what a recipe needs, and what is available."""

from __future__ import annotations

import ctypes
import math
import platform
import sys
from pathlib import Path

import torch

from unmask.core.config import shipped_recipes
from unmask.core.distributed import DistributedContext
from unmask.core.errors import RecipeError
from unmask.core.format import size
from unmask.models import (
    EncoderConfig,
    electra_flops_per_token,
    electra_products,
    flops_per_token,
    non_embedding_parameters,
    num_parameters,
    products,
)
from unmask.models.electra import build_electra, generator_config, require_electra_encoder
from unmask.models.modernbert import ModernBertConfig
from unmask.objectives.rtd import ReplacedTokenConfig
from unmask.training.loop import TrainState
from unmask.training.plan import MeasuredMemory, Plan, StageConfig
from unmask.training.recipe import Recipe, load_recipe

_MIN_RATIO = 1.25  # of the limit to the memory in use
_STATUS, _MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")  # of Linux


# Measured -------------------------------------------------------------------------------------------------------------


def peak_bytes(context: DistributedContext) -> int:
    """Returns the largest memory so far: of this process, or of its tensors on CUDA; 0 if the system doesn't tell."""
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated(context.device)
    return _field(_STATUS, "VmHWM") or _max_resident_bytes()


def available_bytes(context: DistributedContext) -> int:
    """Returns the memory that this process may still allocate; 0 if the system doesn't tell.

    In a container with a limit on memory, this is what the limit leaves.
    """
    if context.device.type == "cuda":
        return torch.cuda.mem_get_info(context.device)[0]
    return _host_bytes()


def _host_bytes() -> int:
    """Returns the memory of this machine that may still be allocated; 0 if the system doesn't tell."""
    system = _field(_MEMORY, "MemAvailable") + _field(_MEMORY, "SwapFree")
    limit = _left_by_limit()
    return min(system, limit) if limit else system


class MemoryLimit:
    """Returns freed memory to the system once a process exceeds its forecast; on a CPU with glibc, else does nothing.

    malloc keeps freed memory, which makes steps faster, but blocks of many sizes add up.
    Without a limit, the peak of `bert-mini` would be a third larger after 140 steps, and would still grow.
    """

    def __init__(self, limit_bytes: int, context: DistributedContext) -> None:
        self._limit = limit_bytes
        self._is_active = context.device.type == "cpu" and platform.libc_ver()[0] == "glibc" and _STATUS.is_file()

    def check(self, state: TrainState) -> None:
        """Compares the memory after a step with the limit. It takes less than 0.1 ms."""
        if not self._is_active or _field(_STATUS, "VmRSS") <= self._limit:
            return
        ctypes.CDLL(None).malloc_trim(0)
        # If the memory in use is near the limit, the forecast was too low: mapping pages again in each step costs time.
        self._limit = max(self._limit, round(_MIN_RATIO * _field(_STATUS, "VmRSS")))


def _field(path: Path, name: str) -> int:
    """Returns a field in kB of a file of /proc, as bytes; 0 if there is none."""
    if not path.is_file():
        return 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _max_resident_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource  # missing on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _left_by_limit() -> int:
    """Returns what the control group of this process (version 2) may still allocate; 0 without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        if not limit.isdigit():
            return 0
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(1, int(limit) - used + int(statistics.get("inactive_file", 0)))
    except OSError:
        return 0


# Computed -------------------------------------------------------------------------------------------------------------

_EAGER_KEYS = 512  # up to this length, attention in bfloat16 on a CPU keeps its probabilities
_EVAL_TOKENS, _EVAL_MASKED = 16_384, 0.15  # of a batch of validation

# On a CPU, the memory of a process grows during the first steps of each stage: malloc keeps freed blocks that don't fit
# the sizes of the next step, and oneDNN keeps kernels for each shape. The growth is proportional to the activations of
# a micro-batch. The numbers are fitted to the peaks of `tiny`, `demo` and `char` after 140 steps (torch 2.13, bfloat16
# with AMX, one thread). `MemoryLimit` keeps the growth of other recipes within this forecast.
_GROWTH_STEPS = 45.0  # of an exponential saturation
_GROWTH, _GROWTH_EQUAL_SIZES = 3.0, 1.0  # growth / activations; steps of equal sizes repeat their shapes


def training_bytes(parameters: int, *, has_ema: bool) -> int:
    """Returns the bytes of weights, their average, their gradients and the optimizer state, in float32."""
    return parameters * 4 * (4 + has_ema)


def forecast_bytes(
    recipe: Recipe, plan: Plan, vocab_size: int, context: DistributedContext, measured: MeasuredMemory | None
) -> int:
    """Returns the expected peak of a run: of its process, or of its tensors on CUDA.

    Without a measurement, the memory of libraries and text is the present peak, and all else is computed.
    """
    peak = measured.peak_bytes if measured else peak_bytes(context) + required_bytes(recipe, vocab_size, context)
    if context.device.type != "cpu":
        return peak
    peak += _copied_bytes(recipe, vocab_size, context)
    peak += _joined_bytes(recipe, vocab_size, context) if context.is_main_process else 0
    factor = _GROWTH if measured is None or measured.sizes_vary else _GROWTH_EQUAL_SIZES
    done = measured.steps if measured else (0,) * len(plan.stages)
    for stage, planned, before in zip(recipe.stage, plan.stages, done, strict=True):
        rest = math.exp(-before / _GROWTH_STEPS) - math.exp(-(before + planned.steps) / _GROWTH_STEPS)
        peak += round(factor * rest * _activation_bytes(recipe, stage, vocab_size, context))
    return peak


def _copied_bytes(recipe: Recipe, vocab_size: int, context: DistributedContext) -> int:
    """Returns the bytes of the copy from which a checkpoint is written in the background; 0 without one.

    It has the weights, their average, and the two numbers per parameter that Adam keeps; Muon keeps one.
    """
    if not recipe.train.background_save:
        return 0
    copied = 3 + (recipe.train.ema_decay > 0)
    return 4 * copied * _all_parameters(recipe, vocab_size) // num_shards(recipe, context)


def _joined_bytes(recipe: Recipe, vocab_size: int, context: DistributedContext) -> int:
    """Returns the bytes of the whole model that rank 0 reads from the shards of a checkpoint; 0 without shards.

    Without a copy in the background, training waits meanwhile, and the memory is that of a validation.
    """
    is_joined = recipe.train.background_save and num_shards(recipe, context) > 1
    return 4 * _all_parameters(recipe, vocab_size) if is_joined else 0


def _all_parameters(recipe: Recipe, vocab_size: int) -> int:
    return num_parameters(recipe.model, vocab_size) + _generator_parameters(recipe, vocab_size)


def required_bytes(recipe: Recipe, vocab_size: int, context: DistributedContext, micro_tokens: int = 0) -> int:
    """Returns the memory that each rank needs at least, in addition to that of the libraries and the text.

    It counts weights, gradients, optimizer state, and the activations and logits of one micro-batch of training or,
    without gradients, of validation. With shards, a rank has a part of weights, gradients and state. In addition, it
    has what is gathered: in a step embeddings and one block, in a validation all weights.
    `micro_tokens` replaces the recipe's size of a micro-batch.
    """
    parameters = _all_parameters(recipe, vocab_size)
    validated = max(_layer_bytes(recipe.model, stage.max_seq_len, context) for stage in recipe.stage)
    validated += _EVAL_MASKED * vocab_size * (_width(context) + 8)
    shards = num_shards(recipe, context)
    weights = 4 * parameters if shards > 1 else 0
    trained = max(
        _activation_bytes(recipe, stage, vocab_size, context, micro_tokens)
        + (_gathered_bytes(recipe, stage, vocab_size, context, micro_tokens) if shards > 1 else 0)
        for stage in recipe.stage
    )
    states = -(-training_bytes(parameters, has_ema=recipe.train.ema_decay > 0) // shards)
    return states + round(max(trained, weights + _EVAL_TOKENS * validated))


def num_shards(recipe: Recipe, context: DistributedContext) -> int:
    """Returns in how many parts weights, gradients and optimizer state are divided among the ranks."""
    return context.ranks if recipe.train.parallel == "fsdp" else 1


def _gathered_bytes(
    recipe: Recipe, stage: StageConfig, vocab_size: int, context: DistributedContext, micro_tokens: int
) -> int:
    """Returns the bytes that a rank gathers in a step with shards: embeddings and one block, and their gradients.

    With several micro-batches, all gradients are whole until they are added over the ranks in the last one.
    """
    parameters = num_parameters(recipe.model, vocab_size)
    blocks = non_embedding_parameters(recipe.model, vocab_size)
    gathered = parameters - blocks + blocks // recipe.model.num_hidden_layers
    micro = micro_tokens or round(recipe.train.micro_batch_size.number)
    has_several = stage.batch_tokens > micro * context.ranks
    return 4 * (gathered + (parameters if has_several else gathered))


def _generator_parameters(recipe: Recipe, vocab_size: int) -> int:
    """Returns the number of parameters of ELECTRA's generator and discriminator head; 0 without them."""
    with torch.device("meta"):
        modules = [
            build_electra(recipe.model, vocab_size, objective.generator_width, objective.generator_depth)
            for objective in recipe.objectives
            if isinstance(objective, ReplacedTokenConfig)
        ]
    return max((sum(p.numel() for p in each.parameters()) for each in modules), default=0)


def _width(context: DistributedContext) -> int:
    """Returns the bytes of most activations."""
    return 2 if context.precision == "bfloat16" else 4


def _activation_bytes(
    recipe: Recipe, stage: StageConfig, vocab_size: int, context: DistributedContext, micro_tokens: int = 0
) -> float:
    """Returns the bytes that a micro-batch of a stage keeps for the backward pass, logits included."""
    micro = micro_tokens or round(recipe.train.micro_batch_size.number)
    tokens = max(stage.max_seq_len, min(micro, stage.batch_tokens))
    models = [recipe.model, generator_of(recipe, recipe.stage.index(stage))]
    layers = sum(model.num_hidden_layers * _layer_bytes(model, stage.max_seq_len, context) for model in models if model)
    # The logits become their gradients in place.
    masked_fraction = (stage.objective or recipe.objective).masked_fraction
    return tokens * (layers + masked_fraction * vocab_size * _width(context))


def _layer_bytes(model: EncoderConfig, length: int, context: DistributedContext) -> float:
    """Returns the bytes per token that one layer keeps for the backward pass: its norms' inputs stay in float32."""
    width = _width(context)
    columns = 4 if isinstance(model, ModernBertConfig) else 2  # a GeGLU keeps both halves, their product and the GELU
    is_eager = context.device.type == "cpu" and width == 2 and length <= _EAGER_KEYS
    probabilities = model.num_attention_heads * length if is_eager else 0
    return 8.0 * model.hidden_size + width * (
        12 * model.hidden_size + columns * model.intermediate_size + probabilities
    )


# Checked --------------------------------------------------------------------------------------------------------------


def check_memory(recipe: Recipe, vocab_size: int, context: DistributedContext) -> None:
    """Checks, before the model is built, that a run and the copies for its checkpoints fit into the available memory.

    Raises:
        RecipeError: the run doesn't fit: the hint names the largest micro-batch that does, else the largest shipped
            recipe. Or the copies don't fit into the memory of the machine, which its ranks share.
    """
    is_cpu = context.device.type == "cpu"
    available = available_bytes(context) // (context.local_ranks if is_cpu else 1)
    needed = required_bytes(recipe, vocab_size, context)
    if available and needed > available:
        raise RecipeError(
            f"the recipe `{recipe.name}` needs about {size(needed)} of memory, and {size(available)} are available",
            location="train.micro_batch_size",
            hint=_what_fits(recipe, vocab_size, context, available),
        )
    # Without shards, rank 0 alone copies. With shards, it may be on this machine.
    copying = context.local_ranks if num_shards(recipe, context) > 1 else 1
    copied = copying * _copied_bytes(recipe, vocab_size, context) + _joined_bytes(recipe, vocab_size, context)
    host = _host_bytes()
    left = max(0, host - context.local_ranks * needed * is_cpu)
    if host and copied > left:
        raise RecipeError(
            f"checkpoints of the recipe `{recipe.name}` are written from a copy in memory of about {size(copied)}, and "
            f"{size(left)} are left for it",
            location="train.background_save",
            hint="let training wait for each checkpoint: --set train.background_save=false",
        )


def _what_fits(recipe: Recipe, vocab_size: int, context: DistributedContext, available: int) -> str:
    tokens = min(round(recipe.train.micro_batch_size.number), max(stage.batch_tokens for stage in recipe.stage))
    longest = max(stage.max_seq_len for stage in recipe.stage)
    while tokens // 2 >= longest:
        tokens //= 2
        if required_bytes(recipe, vocab_size, context, tokens) <= available:
            setting = f'--set "train.micro_batch_size={tokens} tokens"'
            return f"use smaller micro-batches, which give the same results up to rounding: {setting}"
    fitting = [
        (num_parameters(other.model, vocab_size), other.name)
        for other in map(load_recipe, shipped_recipes())
        if not other.init.required and required_bytes(other, vocab_size, context) <= available
    ]
    if fitting and not recipe.init.model:
        return f"choose a smaller model; the largest shipped recipe that fits is --recipe {max(fitting)[1]}"
    return "free memory, or use a machine with more"


# Matrix products ------------------------------------------------------------------------------------------------------


def generator_of(recipe: Recipe, stage: int) -> EncoderConfig | None:
    """Returns the architecture of the generator that a stage trains besides the model; None if it trains none.

    Raises:
        RecipeError: replaced token detection can't train this model.
    """
    objective = recipe.objectives[stage]
    if not isinstance(objective, ReplacedTokenConfig):
        return None
    encoder = require_electra_encoder(recipe.model)
    return generator_config(encoder, objective.generator_width, objective.generator_depth)


def stage_flops_per_token(recipe: Recipe, stage: int, vocab_size: int) -> float:
    """Returns the FLOPs per token of the matrix products in the steps of a stage, forward and backward."""
    length, fraction = recipe.stage[stage].max_seq_len, recipe.objectives[stage].masked_fraction
    if generator := generator_of(recipe, stage):
        return electra_flops_per_token(recipe.model, generator, vocab_size, length, fraction)
    return flops_per_token(recipe.model, vocab_size, length, fraction)


def stage_products(recipe: Recipe, stage: int, vocab_size: int, tokens: int) -> list[tuple[int, int, int]]:
    """Returns the matrix products of a forward pass of a stage over `tokens` tokens, as (rows, inner, columns)."""
    masked_tokens = max(1, round(tokens * recipe.objectives[stage].masked_fraction))
    if generator := generator_of(recipe, stage):
        return electra_products(recipe.model, generator, vocab_size, tokens, masked_tokens)
    return products(recipe.model, vocab_size, tokens, masked_tokens)
