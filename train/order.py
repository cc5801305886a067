"""The order of training: a visit's number alone says which video and which of its frames it reads.

Visits are numbered 0, 1, 2, ... over the whole run. With N videos, visit v is in epoch v // N,
where every video comes once in an order permuted by (seed, epoch); its frames are drawn from
(seed, v).
Global step s with global batch B takes visits [s B, (s + 1) B), and rank r its contiguous part. So
nothing depends on workers or ranks, and a resume needs only the number of visits seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from pipeline.faces import evenly

_ORDER, _FRAMES, AUGMENT = range(3)  # independent random streams of one seed


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One reading of one video; `sources` and `target` are disjoint frame numbers."""

    number: int
    video: int
    sources: tuple[int, ...]
    target: int


def random_bits(seed: int, position: int, stream: int) -> np.random.Philox:
    """Return the counter-based bits of one (seed, position): the same on every machine."""
    return np.random.Philox(key=[seed, position], counter=[0, 0, 0, stream])


def visit(number: int, *, frames: Sequence[range], num_sources: int, seed: int) -> Visit:
    """Return visit `number` over videos that offer `frames`, with K = num_sources."""
    epoch, place = divmod(number, len(frames))
    video = int(_epoch_order(seed, epoch, len(frames))[place])
    offered = frames[video]
    bits = random_bits(seed, number, _FRAMES).random_raw(len(offered))
    drawn = [offered[i] for i in np.argsort(bits, kind="stable")[: num_sources + 1]]
    return Visit(number=number, video=video, sources=tuple(drawn[:-1]), target=drawn[-1])


def rank_batches(*, start: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Yield this rank's visit numbers for every step from visit `start` on, without end."""
    if batch_size % world_size:
        raise ValueError(
            f"a global batch of {batch_size} visits can't be shared by {world_size} ranks: "
            f"set a batch size that is a multiple of {world_size}"
        )
    share = batch_size // world_size
    first = start + rank * share
    while True:
        yield list(range(first, first + share))
        first += batch_size


def spread(offered: range, count: int) -> tuple[int, ...]:
    """Return up to `count` frame numbers evenly spread over the offered ones, in order."""
    return tuple(offered[i] for i in evenly(len(offered), count))


def training_frames(num_frames: int, *, hold_out: bool) -> range:
    """Return the frames training may draw; `hold_out` keeps the last quarter back as val."""
    return range(num_frames - num_frames // 4) if hold_out else range(num_frames)


def held_out_stretches(num_frames: int, *, hold_out: bool) -> tuple[range, range]:
    """Return disjoint stretches of a clip for sources and for targets, in that order.

    A held-out person's clip is cut in the middle; a clip whose end is held out is cut there.
    """
    cut = len(training_frames(num_frames, hold_out=True)) if hold_out else num_frames // 2
    return range(cut), range(cut, num_frames)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_videos: int) -> Int64[np.ndarray, " n"]:
    return np.argsort(random_bits(seed, epoch, _ORDER).random_raw(num_videos), kind="stable")
