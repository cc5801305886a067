"""A world of several processes, each told of it as torchrun would, for a function to run in."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import TypeVar

from train.world import World, connect

Result = TypeVar("Result")
TIMEOUT_S = 120


def environments(num_ranks: int = 2) -> list[dict[str, str]]:
    """Return what torchrun would add to each rank's environment, for a world on the CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",  # gloo, also beside a GPU
        }
        for rank in range(num_ranks)
    ]


def on_ranks(function: Callable[[World], Result], num_ranks: int = 2) -> list[Result]:
    """Call a module's function on every rank; return the results in rank order."""
    calls = [(function, environment) for environment in environments(num_ranks)]
    with multiprocessing.get_context("spawn").Pool(num_ranks) as pool:
        return pool.starmap_async(_call, calls, chunksize=1).get(TIMEOUT_S)


def _call(function: Callable[[World], Result], environment: dict[str, str]) -> Result:
    os.environ |= environment
    with connect() as world:
        return function(world)
