"""The processes of one training run: who we are, and what crosses between us.

The only file that knows `torch.distributed` or reads torchrun's environment. Everything here is the
identity for one process, so the loop is written once.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in one message a data type."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            flat /= self.size
            parts = flat.split([tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather_pairs(
        self, rows: Int[Tensor, " b"], values: Float[Tensor, "b d"]
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
        """Join every rank's (row, value) pairs, in rank order; each rank brings equally many."""
        if self.size == 1:
            return rows, values
        all_rows = [torch.empty_like(rows) for _ in range(self.size)]
        all_values = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(all_rows, rows.contiguous())
        dist.all_gather(all_values, values.contiguous())
        return torch.cat(all_rows), torch.cat(all_values)

    def any(self, flag: bool) -> bool:
        """Say whether the flag is up on any rank; the same answer everywhere."""
        if self.size == 1:
            return flag
        raised = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def all_equal(self, number: int) -> bool:
        """Say whether every rank brings the same number; the same answer everywhere."""
        if self.size == 1:
            return True
        ends = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return ends[0].item() == -ends[1].item()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def own_rank() -> int:
    """Return this process's rank, also where no world was joined yet."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def connect() -> Iterator[World]:
    """Join the world that torchrun describes: NCCL on GPUs, gloo on CPUs, alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = own_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        if size > 1:
            dist.destroy_process_group()
