"""Cost of a run, known before it starts: time, memory, disk, floating-point operations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unmask.core.config import to_toml
from unmask.core.distributed import matmul_rate
from unmask.core.errors import StoreError
from unmask.core.files import wrap_os_errors
from unmask.core.format import size
from unmask.training.estimate.memory import forecast_bytes, stage_flops_per_token, stage_products
from unmask.training.optim import describe_decay
from unmask.training.plan import MeasuredMemory, Plan
from unmask.training.recipe import Recipe
from unmask.training.setup import RunComponents

_DROPOUT = ("embedding_dropout", "mlp_dropout", "hidden_dropout")  # not attention's, which makes attention slower


@dataclass(frozen=True)
class CostEstimate:
    """Expected cost of a run."""

    recipe: str
    parameters: int
    flops_per_token: float  # forward and backward; mean over the planned tokens
    documents: int
    corpus_tokens: int
    plan: Plan
    epochs: tuple[float, ...]  # per stage
    texts_seen: Mapping[str, float]  # epochs over all stages, for each text by its name
    flops_per_second: float  # of matrix products on this device, with the shapes of the model
    memory_bytes: int
    disk_bytes: int
    device: str
    precision: str
    threads: int
    optimizer: str
    patience: int = 0  # validations without gain after which the run ends; 0: never
    decay: str = ""  # description: when the learning rate decays
    ranks: int = 1  # processes; `threads` are those of each
    checkpoint_bytes: int = 0  # disk space of one checkpoint
    dropout_off: tuple[str, ...] = ()  # keys of dropout that are 0 and could be raised
    objectives: tuple[str, ...] = ()  # objective of each stage; empty if all stages have the same


# Computing ------------------------------------------------------------------------------------------------------------


def estimate_cost(
    recipe: Recipe, plan: Plan, components: RunComponents, measured: MeasuredMemory | None = None
) -> CostEstimate:
    """Returns the expected cost of a plan on this device. Without measured memory, the memory is computed."""
    train_corpus, context = components.corpus.train, components.context
    parameters = components.num_parameters
    micro_tokens = round(recipe.train.micro_batch_size.number)
    stage_tokens = [stage.steps * stage.batch_tokens for stage in plan.stages]
    flops = [stage_flops_per_token(recipe, stage, components.vocab_size) for stage in range(len(recipe.stage))]
    longest = stage_tokens.index(max(stage_tokens))  # the stage with the most tokens represents the run
    tokens = min(plan.stages[longest].batch_tokens, micro_tokens)
    shapes = stage_products(recipe, longest, components.vocab_size, tokens)
    has_ema = recipe.train.ema_decay > 0
    return CostEstimate(
        recipe=recipe.name,
        parameters=parameters,
        flops_per_token=sum(n * each for n, each in zip(stage_tokens, flops, strict=True)) / sum(stage_tokens),
        documents=train_corpus.documents,
        corpus_tokens=train_corpus.tokens,
        plan=plan,
        epochs=tuple(n / loader.epoch_tokens for n, loader in zip(stage_tokens, components.loaders, strict=True)),
        texts_seen=_texts_seen(plan, components),
        flops_per_second=matmul_rate(shapes, context, 0.05),
        memory_bytes=forecast_bytes(recipe, plan, components.vocab_size, context, measured),
        disk_bytes=disk_bytes(
            parameters,
            recipe.train.keep_last,
            train_corpus.tokens,
            components.vocab_size,
            has_ema=has_ema,
            keeps_best=recipe.train.keep_best,
            num_kept=len(recipe.train.keep_at),
        ),
        device=context.describe()["device_name"],
        precision=context.precision,
        threads=context.threads,
        optimizer=_describe_optimizer(recipe, components),
        patience=recipe.train.early_stopping_patience,
        decay=describe_decay(recipe.lr_schedule),
        ranks=context.ranks,
        checkpoint_bytes=checkpoint_bytes(parameters, has_ema=has_ema),
        dropout_off=tuple(f"model.{name}" for name in _DROPOUT if getattr(recipe.model, name, 1.0) == 0),
        objectives=describe_objectives(recipe),
    )


def _texts_seen(plan: Plan, components: RunComponents) -> dict[str, float]:
    """Returns the number of epochs of each text over the whole plan, by the name of the text."""
    epochs: dict[str, float] = {}
    for stage, loader in zip(plan.stages, components.loaders, strict=True):
        for name, count in loader.epochs_by_text(stage.steps * stage.batch_tokens).items():
            epochs[name] = epochs.get(name, 0.0) + count
    return epochs


def describe_objectives(recipe: Recipe) -> tuple[str, ...]:
    """Returns the kind of each stage's objective, and the settings in which those of a kind differ; () if all agree."""
    settings = [to_toml(objective) for objective in recipe.objectives]
    if all(each == settings[0] for each in settings):
        return ()
    described: list[str] = []
    for each in settings:
        alike = [other for other in settings if other["kind"] == each["kind"]]
        names = [name for name in each if any(other.get(name) != each[name] for other in alike)]
        described.append(", ".join([each["kind"], *(f"{name} {each[name]}" for name in names)]))
    return tuple(described)


def _describe_optimizer(recipe: Recipe, components: RunComponents) -> str:
    algorithms = list(components.training.optimizer.algorithms().values())
    muon = algorithms.count("muon")
    if not muon:
        return recipe.optimizer.kind
    return f"Muon for {muon} matrices, AdamW for the other {len(algorithms) - muon} tensors"


def disk_bytes(
    parameters: int,
    keep_last: int,
    corpus_tokens: int,
    vocab_size: int,
    *,
    has_ema: bool = False,
    keeps_best: bool = False,
    num_kept: int = 0,
) -> int:
    """Returns the disk space of checkpoints (model, weights, their average, optimizer state), other models and shards.

    A directory is written before an older one is removed, so the estimate has one checkpoint more than is kept and the
    best model twice. `num_kept` further models are kept.
    """
    bytes_per_token = (2 if vocab_size <= 1 << 16 else 4) + 1  # id and flags
    models = (2 * keeps_best + num_kept) * parameters * 4
    return (keep_last + 1) * checkpoint_bytes(parameters, has_ema=has_ema) + models + corpus_tokens * bytes_per_token


def checkpoint_bytes(parameters: int, *, has_ema: bool) -> int:
    """Returns the disk space of one checkpoint: model, weights, their average and optimizer state, in float32."""
    return (4 + has_ema) * parameters * 4


def check_free_space(folder: Path, estimate: CostEstimate) -> str:
    """Returns a warning if the disk of a run has less space than the run needs, else an empty string.

    Raises:
        StoreError: there is no space for one checkpoint.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    with wrap_os_errors(existing):
        free = shutil.disk_usage(existing).free
    if free < estimate.checkpoint_bytes:
        raise StoreError(
            f"not enough disk space: one checkpoint needs about {size(estimate.checkpoint_bytes)}, and "
            f"{size(free)} are free",
            location=str(folder),
            hint="free disk space, choose another directory (--out), or train a smaller model",
        )
    if free < estimate.disk_bytes:
        return (
            f"the disk of {folder} has {size(free)} free, and the run needs about {size(estimate.disk_bytes)}: "
            "free disk space, or lower train.keep_last"
        )
    return ""
