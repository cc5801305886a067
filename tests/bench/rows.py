"""What W costs a step: 100 videos against VoxCeleb2's 145,520, and a dense Adam beside them.

    python tests/bench/rows.py

Prints median milliseconds for a step's gather and update of 8 rows of 512 numbers, and the ratio
of the large table to the small one.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch

from train.rows import RowConfig, RowTable

ROWS, DIM, BATCH, REPEATS = (100, 145_520), 512, 8, 200
ADAM = {"betas": (0.0, 0.999), "eps": 1e-5}


def median_ms(step: Callable[[], None], repeats: int = REPEATS) -> float:
    """Return the median time of a call after three to warm up."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


def sparse_step(num_rows: int) -> Callable[[], None]:
    """Return one step on a RowTable."""
    device = torch.device("cpu")
    table = RowTable(num_rows, DIM, RowConfig(start="uniform"), **ADAM, seed=0, device=device)
    rows = torch.randperm(num_rows)[:BATCH]

    def step() -> None:
        w = table.gather(rows)
        w.square().sum().backward()
        assert w.grad is not None
        table.update(rows, w.grad)

    return step


def dense_step(num_rows: int) -> Callable[[], None]:
    """Return one step on an embedding with dense gradients and Adam, as it is often done."""
    table = torch.nn.Embedding(num_rows, DIM)
    adam = torch.optim.Adam(table.parameters(), **ADAM, fused=True)
    rows = torch.randperm(num_rows)[:BATCH]

    def step() -> None:
        adam.zero_grad()
        table(rows).square().sum().backward()
        adam.step()

    return step


def main() -> None:
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, medians of a step in ms")
    print(f"{'':24}" + "".join(f"{n:>12,}" for n in ROWS) + "       ratio")
    for name, make, repeats in (
        ("rows, ours", sparse_step, REPEATS),
        ("dense Adam", dense_step, 7),
    ):
        small, large = (median_ms(make(n), repeats) for n in ROWS)
        print(f"{name:24}{small:12.3f}{large:12.3f}{large / small:12.1f}")


if __name__ == "__main__":
    main()
