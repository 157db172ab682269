"""A base model that does not fit one device, spread over the processes that train together (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn

from polyprag.world import World


def shard(model: nn.Module, world: World) -> None:
    """Leave each process a part of every parameter, on its own device; one process keeps the model whole.

    A block is put together while it computes, and taken apart again. Layers that are attached afterwards,
    such as experts, stay whole. There is no way back: a model that is in parts already is left as it is.
    """
    if world.size == 1 or is_sharded(model):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second of importing, for these runs only

    kind = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (world.size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if kind == "cuda":
        model.to(torch.device(kind, torch.cuda.current_device()))  # buffers; parameters are there


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "unshard")  # of FSDPModule, without importing it


def whole(parameter: Tensor) -> Tensor:
    """A parameter put together from its parts, by all processes at once; one that is whole as it is."""
    gather = getattr(parameter, "full_tensor", None)  # of DTensor, without importing it
    return parameter if gather is None else gather()


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)
