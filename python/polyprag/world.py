"""Training in several processes: what torch.distributed says, and the three things asked of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from polyprag.errors import InvalidInput


@dataclass(frozen=True)
class World:
    """The processes that train together; ``World(0, 1)`` is one alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The processes of the default group of torch.distributed, if one was set up."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes have come this far."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The first process goes through the block alone, the others after it: they find what it left."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes, in place; one message for all of them."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        distributed.all_reduce(flat)
        totals = torch.split(flat, [t.numel() for t in tensors])
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return here
        said = torch.tensor(int(here), device=_device())
        distributed.all_reduce(said, op=distributed.ReduceOp.MAX)
        return bool(said)


@contextmanager
def launched(device: str = "auto", *, shard: bool = False) -> Iterator[World]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started; one alone without them.

    Args:
        device: where the base model is, as in :func:`polyprag.models.load_base_model`: each process computes
            there, on a GPU of its own if it is one.
        shard: the base model goes from there in parts to the GPUs, if there are any.

    Raises:
        InvalidInput: a process without a GPU of its own, or one GPU named for all.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized()
    if alone:
        yield World.current()
        return
    own = _own_gpu("auto" if shard else device)
    if own is not None:
        torch.cuda.set_device(own)
    # One process augments while the others wait, which may take days.
    distributed.init_process_group(
        "gloo" if own is None else "nccl", timeout=timedelta(days=30), device_id=own
    )
    try:
        yield World.current()
    finally:
        distributed.destroy_process_group()


def _own_gpu(device: str) -> torch.device | None:
    """The GPU of this process, if it computes on one."""
    from polyprag.models import resolve_device  # which imports this module

    if resolve_device(device).type != "cuda":
        return None
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if ":" in device:
        raise InvalidInput(f"device {device!r} is one GPU for all processes: say 'cuda', one for each")
    if number >= there:
        raise InvalidInput(
            f"process {number + 1} of this machine has no GPU of its own: there are {there}. "
            f"Start no more (--nproc-per-node={there}), or compute on processors (--device cpu)"
        )
    return torch.device("cuda", number)


def _device() -> torch.device:
    """Where messages have to be for the backend at hand."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
