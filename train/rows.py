"""W: one embedding a training video, learned row by row.

The matrix is never a parameter of a network. A step gathers the few rows it needs as a leaf tensor,
autograd leaves the gradient there, and the (row, gradient) pairs of all ranks update only those
rows: a step costs the same for a hundred videos and for 145,520, and a row that was not visited
keeps its bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """How the video embeddings W start and learn."""

    lr: float = 1e-3
    """Learning rate of the row-wise Adam; a row is visited only once an epoch."""
    start: Literal["embedding", "uniform"] = "embedding"
    """Where a row starts: at the first embedding of its video, or uniform in +-0.1."""
    device: Literal["same", "cpu"] = "same"
    """Keep W and its moments beside the networks, or on the CPU (1.2 GB at 145,520 videos)."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and isfinite(self.lr)):
            raise ValueError(f"rows.lr is {self.lr}: give a finite learning rate above 0")


class RowTable:
    """W (num_rows x dim, fp32) with row-wise Adam moments and update counts."""

    def __init__(
        self,
        num_rows: int,
        dim: int,
        config: RowConfig,
        *,
        betas: tuple[float, float],
        eps: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._lr, self._betas, self._eps = config.lr, betas, eps
        self._device = torch.device("cpu") if config.device == "cpu" else device
        values = torch.zeros(num_rows, dim)
        if config.start == "uniform":
            values.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(seed))
        self.values = values.to(self._device)
        self._first = torch.zeros_like(self.values)
        self._second = torch.zeros_like(self.values)
        self._updates = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        self._started = torch.full(
            (num_rows,), config.start == "uniform", dtype=torch.bool, device=self._device
        )

    def gather(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Return W_i for each row as a leaf that collects its gradient, on the rows' device."""
        picked = self.values[rows.to(self._device)].to(rows.device)
        return picked.requires_grad_()

    @torch.no_grad()
    def start(self, rows: Int[Tensor, " n"], embeddings: Float[Tensor, "n d"]) -> None:
        """Set each row that has not started to the first of its embeddings given here."""
        rows, embeddings = rows.to(self._device), embeddings.to(self._device, torch.float32)
        unique, inverse = rows.unique(return_inverse=True)
        order = torch.arange(len(rows), device=self._device)
        first = torch.full_like(unique, len(rows)).scatter_reduce_(0, inverse, order, "amin")
        fresh = ~self._started[unique]
        self.values[unique[fresh]] = embeddings[first[fresh]]
        self._started[unique[fresh]] = True

    @torch.no_grad()
    def update(self, rows: Int[Tensor, " n"], gradients: Float[Tensor, "n d"]) -> None:
        """Take one Adam step on the given rows; the gradients of a repeated row are added."""
        rows, gradients = rows.to(self._device), gradients.to(self._device, torch.float32)
        unique, inverse = rows.unique(return_inverse=True)
        gradient = torch.zeros(len(unique), gradients.shape[1], device=self._device)
        gradient.index_add_(0, inverse, gradients)
        beta1, beta2 = self._betas
        first = self._first[unique].lerp_(gradient, 1 - beta1)
        second = self._second[unique].lerp_(gradient.square(), 1 - beta2)
        updates = self._updates[unique] + 1
        unbiased1 = first / (1 - beta1**updates)[:, None]
        unbiased2 = second / (1 - beta2**updates)[:, None]
        self.values[unique] -= self._lr * unbiased1 / (unbiased2.sqrt() + self._eps)
        self._first[unique], self._second[unique], self._updates[unique] = first, second, updates

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "values": self.values,
            "first": self._first,
            "second": self._second,
            "updates": self._updates,
            "started": self._started,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore in place; raises ValueError where a name or shape differs."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"W holds {sorted(own)}, the checkpoint has {sorted(state)}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"W's {name} is {tuple(tensor.shape)}, in the checkpoint it is "
                    f"{tuple(state[name].shape)}, which was trained on other shards"
                )
            tensor.copy_(state[name])
