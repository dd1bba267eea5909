"""How the ranks of a launch share a model: replicas (DDP) or shards (FSDP2).

Every rank has divided its loss by the counts of all ranks, so gradients are added, never averaged. Optimizers work on
the tensors that a rank holds: whole ones, or the rows of its shard.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from unmask.core.distributed import DistributedContext, compare_ranks
from unmask.core.files import digest
from unmask.core.types import LossSums, MaskedBatch, Objective

Parallel = Literal["ddp", "fsdp"]
Module = TypeVar("Module", bound=nn.Module)
Objectives = Sequence[Objective]


# Tensors of a rank ----------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether each rank holds some rows of a tensor only: a `DTensor`, which needs no import here."""
    return hasattr(tensor, "to_local")


def held(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this rank holds, which shares its memory: all of it, or some rows."""
    return cast("Any", tensor).to_local() if is_sharded(tensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """Returns a whole tensor. If it is sharded, all ranks must call this for the same tensors in the same order."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor


def held_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Returns what an optimizer updates: the parameter, or a parameter on the memory of this rank's rows."""
    return nn.Parameter(held(parameter.detach())) if is_sharded(parameter) else parameter


def like_parameter(rows: Tensor, parameter: Tensor) -> Tensor:
    """Returns a tensor of this rank's rows as a sharded tensor if the parameter is one with these rows."""
    if not is_sharded(parameter) or rows.shape != held(parameter).shape:
        return rows
    from torch.distributed.tensor import DTensor

    like = cast("DTensor", parameter)
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def held_rows(tensor: Tensor) -> tuple[int, int]:
    """Returns which rows of a tensor this rank holds: the number of the first one, and of the one after the last."""
    if not is_sharded(tensor):
        return 0, len(tensor) if tensor.ndim else 1
    mesh = cast("Any", tensor).device_mesh
    count = -(-len(tensor) // mesh.size())  # fully_shard divides the rows like this; the last ranks may have fewer
    first = min(mesh.get_local_rank() * count, len(tensor))
    return first, min(first + count, len(tensor))


def to_cpu(tensor: Tensor, *, copies: bool) -> Tensor:
    """Returns what this rank holds of a tensor, on the CPU. With `copies`, it never shares the tensor's memory."""
    return held(tensor.detach()).to("cpu", copy=copies).contiguous()


def norm_over_shards(norm: Tensor, parameter: Tensor) -> Tensor:
    """Returns the norm over all ranks of tensors like `parameter`, from the norm of what this rank holds."""
    if not is_sharded(parameter):
        return norm
    squared = norm.square()
    distributed.all_reduce(squared, group=cast("Any", parameter).device_mesh.get_group())
    return squared.sqrt()


class MatrixOwners:
    """Applies functions to whole matrices whose rows are sharded; each matrix is assembled on one rank, its owner."""

    def __init__(self, parameter: Tensor) -> None:
        """Creates it for matrices that are sharded like a parameter."""
        mesh = cast("Any", parameter).device_mesh
        self._group, self._ranks, self._rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

    def apply(self, rows_NRC: Tensor, all_rows: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns this rank's rows of the results for N matrices of `all_rows` rows, of which it holds `rows_NRC`.

        `function` maps one matrix, of shape (1, rows, columns). All ranks call this alike.
        """
        count, held_rows, columns = rows_NRC.shape
        padded = -(-all_rows // self._ranks)  # rows of a shard; the last shards may have fewer
        result_NRC = torch.empty_like(rows_NRC)
        for first in range(0, count, self._ranks):
            part_NRC = rows_NRC[first : first + self._ranks]
            sent = rows_NRC.new_zeros(self._ranks, padded, columns)
            sent[: len(part_NRC), :held_rows] = part_NRC
            own = self._exchange(sent).view(-1, columns)  # all rows of one matrix, in order
            if self._rank < len(part_NRC):
                own[:all_rows] = function(own[None, :all_rows])[0]
            result_NRC[first : first + self._ranks] = self._exchange(own.view_as(sent))[: len(part_NRC), :held_rows]
        return result_NRC

    def _exchange(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent, group=self._group)
        return received


# Sharing a model ------------------------------------------------------------------------------------------------------


class Parallelism:
    """A model on one process, which shares nothing; the base class of `Replicas` and `Shards`."""

    is_sharded: ClassVar[bool] = False  # whether each rank holds some rows of every tensor only

    def passes(self, own: int) -> int:
        """Returns how many forward and backward passes this rank runs in a step with `own` micro-batches."""
        return own

    def forward(self, module: nn.Module, objective: Objective, masked: MaskedBatch) -> LossSums:
        """Returns the loss sums of one micro-batch."""
        return module(objective, masked)

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for a forward and backward pass; in the last one, gradients are added over the ranks."""
        return contextlib.nullcontext()

    def copy(self, module: Module) -> Module:
        """Returns a copy of a module like the trained one, for an average of its weights."""
        return copy.deepcopy(module)

    def whole(self, module: Module, *, main_only: bool = False) -> contextlib.AbstractContextManager[Module]:
        """Returns a context with a module whose weights are whole; all ranks enter it together.

        Args:
            module: the trained module, or an average of its weights.
            main_only: whether only rank 0 uses the weights, to save them. If they are sharded, it gets them on the CPU.
        """
        return contextlib.nullcontext(module)

    def snapshot(self, module: Module) -> Module:
        """Returns a copy on the CPU of a module like the trained one; of a sharded one, without weights."""
        copies: dict[int, Any] = {
            id(parameter): nn.Parameter(to_cpu(parameter, copies=True), parameter.requires_grad)
            for parameter in module.parameters()
        }
        copies |= {id(buffer): to_cpu(buffer, copies=True) for buffer in module.buffers()}
        return copy.deepcopy(module, copies)

    def trial(self, module: Module, objectives: Objectives) -> tuple[Parallelism, Module, Objectives]:
        """Returns a copy of module and objectives, which may share modules, and how the ranks share it."""
        module, objectives = copy.deepcopy((module, objectives))
        return self, module, objectives

    def facts(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Returns a digest of each tensor that must be equal on all ranks."""
        return {name: _digest(tensor) for name, tensor in tensors.items()}


class Replicas(Parallelism):
    """A model on each rank: PyTorch's DistributedDataParallel adds gradients in buckets during the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is missing in torch 2.11
        root = _Root(module)
        if next(module.parameters()).device.type == "cpu":
            # PyTorch warns if no parameter is ever unused. On a GPU, an unused one would make each step wait.
            root.unused = nn.Parameter(torch.zeros(1))
        # Stages may train different parts, and a parameter without a gradient on any rank must stay without one.
        self._replica = nn.parallel.DistributedDataParallel(
            root,
            broadcast_buffers=False,
            init_sync=False,  # the ranks compare their weights; a broadcast would hide a difference
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        self._replica.register_comm_hook(None, _add)

    def passes(self, own: int) -> int:
        """Returns the own micro-batches; a rank without samples runs one pass that counts nothing."""
        return max(own, 1)

    def forward(self, module: nn.Module, objective: Objective, masked: MaskedBatch) -> LossSums:
        """Returns the loss sums of one micro-batch."""
        return LossSums(*self._replica(objective, masked))

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which gradients stay on this rank, except in the last pass."""
        return contextlib.nullcontext() if is_last else self._replica.no_sync()

    def trial(self, module: Module, objectives: Objectives) -> tuple[Parallelism, Module, Objectives]:
        """Returns a copy with buckets of its own."""
        module, objectives = copy.deepcopy((module, objectives))
        return Replicas(module), module, objectives


def _add(state, bucket):  # pyright: ignore  # torch accepts its own types as annotations only, which are not exported
    """Adds a bucket of gradients over all ranks, where DistributedDataParallel would average."""
    gradients: Tensor = cast("Any", bucket).buffer()
    work: Any = distributed.all_reduce(gradients, async_op=True)
    return work.get_future().then(_first)


def _first(future: Any) -> Tensor:
    return future.value()[0]


class Shards(Parallelism):
    """A model of which each rank holds some rows of every tensor: PyTorch's `fully_shard`, block by block.

    Weights, gradients and optimizer state are float32; autocast computes in the run's precision. A block's weights are
    gathered for its forward and backward pass. All passes are run by all ranks together.
    """

    is_sharded = True

    def __init__(self, context: DistributedContext, module: nn.Module, objectives: Objectives) -> None:
        """Shards a module in place. Its objectives share modules with it."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self._context = context
        self._digests = {name: _digest(tensor) for name, tensor in module.state_dict().items()}
        self._skeleton = _without_weights(module, objectives)
        mesh = init_device_mesh(context.device.type, (context.ranks,))
        stacks = [getattr(part, "blocks", None) for part in module.modules()]
        for block in [block for stack in stacks if isinstance(stack, nn.ModuleList) for block in stack]:
            fully_shard(block, mesh=mesh)
        self._root: Any = fully_shard(_Root(module), mesh=mesh)
        for part in self._root.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # a sum
                part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    def passes(self, own: int) -> int:
        """Returns the largest number of any rank: gathering weights needs all of them."""
        return self._context.largest(max(own, 1))

    def forward(self, module: nn.Module, objective: Objective, masked: MaskedBatch) -> LossSums:
        """Returns the loss sums of one micro-batch."""
        return LossSums(*self._root(objective, masked))

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Generator[None]:
        """Keeps gradients whole and on this rank, except in the last pass, which adds and shards them."""
        self._root.set_requires_gradient_sync(is_last)
        yield

    def copy(self, module: Module) -> Module:
        """Returns a copy, sharded like the module."""
        copied, _ = copy.deepcopy(self._skeleton)
        for name, parameter in module.named_parameters():
            set_parameter(copied, name, parameter.detach().clone())
        return cast("Module", copied)

    @contextmanager
    def whole(self, module: Module, *, main_only: bool = False) -> Generator[Module]:
        """Gathers one tensor after the other into a module that is not sharded: on all ranks, or on rank 0's CPU."""
        gathered, _ = copy.deepcopy(self._skeleton)
        keeps = not main_only or self._context.is_main_process
        for name, parameter in module.named_parameters():
            tensor = gather(parameter.detach())
            if keeps:  # rank 0 alone only saves the weights, which needs no memory of its GPU
                set_parameter(gathered, name, tensor.cpu() if main_only else tensor)
        if keeps:
            for buffer, values in zip(gathered.buffers(), module.buffers(), strict=True):
                buffer.copy_(values)
        yield cast("Module", gathered)

    def snapshot(self, module: Module) -> Module:
        """Returns a module that is not sharded, with the buffers of a module, and without memory for its weights."""
        copied, _ = copy.deepcopy(self._skeleton)
        for buffer, values in zip(copied.buffers(), module.buffers(), strict=True):
            buffer.copy_(values)
        return cast("Module", copied)

    def trial(self, module: Module, objectives: Objectives) -> tuple[Parallelism, Module, Objectives]:
        """Returns a copy, sharded like the module."""
        copied, copied_objectives = copy.deepcopy(self._skeleton)
        required = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters():
            set_parameter(copied, name, gather(parameter.detach()), requires_grad=required[name])
        return Shards(self._context, copied, copied_objectives), cast("Module", copied), copied_objectives

    def facts(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Returns the digests of the weights before they were sharded."""
        return self._digests


class _Root(nn.Module):
    """The module that is replicated or sharded: its outputs are tuples and dictionaries, which both can search."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, objective: Objective, masked: MaskedBatch) -> tuple[Any, ...]:
        """Returns the fields of the loss sums."""
        loss: LossSums = self.module(objective, masked)
        return dict(loss.sums), dict(loss.metrics), dict(loss.statistics)


def _without_weights(module: nn.Module, objectives: Objectives) -> tuple[nn.Module, Objectives]:
    """Returns a copy whose parameters take no memory."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy((module, objectives), memo)


def set_parameter(module: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = False) -> None:
    """Replaces a parameter of a module."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(tensor, requires_grad))


def share(kind: Parallel, context: DistributedContext, module: nn.Module, objectives: Objectives) -> Parallelism:
    """Returns how the ranks share a module; `fsdp` shards it in place. One process shares nothing."""
    if context.ranks == 1:
        return Parallelism()
    return Replicas(module) if kind == "ddp" else Shards(context, module, objectives)


def compare_weights(context: DistributedContext, parallelism: Parallelism, tensors: Mapping[str, Tensor]) -> None:
    """Compares the tensors of all ranks, before their first step together.

    Raises:
        RunError: on every rank: the first tensor and the rank that differ from rank 0.
    """
    if context.ranks > 1:
        compare_ranks(context, {"weights": parallelism.facts(tensors)})


def _digest(tensor: Tensor) -> str:
    return digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
