"""The world: what one rank says, all ranks hear; alone, everything is as it was given."""

import torch

from tests.train.ranks import on_ranks
from train.world import World


def talk(world: World) -> tuple[list[bool], list[list[float]], list[list[float]]]:
    """Return what a rank hears where both speak."""
    flags = [world.any(world.rank == speaker) for speaker in (0, 1)] + [world.any(False)]
    flags += [world.all_equal(7), world.all_equal(7 + world.rank)]
    numbers = [
        torch.tensor([1.0, 5.0]) + 10 * world.rank,
        torch.tensor([[7.0]], dtype=torch.float64) + 10 * world.rank,
    ]
    world.average_(numbers)
    rows, values = world.gather_pairs(
        torch.tensor([4, world.rank]), torch.full((2, 1), float(world.rank))
    )
    return (
        flags,
        [n.flatten().tolist() for n in numbers],
        [rows.tolist(), values.flatten().tolist()],
    )


def test_what_one_rank_says_all_ranks_hear() -> None:
    flags = [True, True, False, True, False]
    means = [[6.0, 10.0], [12.0]]
    pairs = [[4, 0, 4, 1], [0.0, 0.0, 1.0, 1.0]]
    assert on_ranks(talk) == [(flags, means, pairs)] * 2


def test_alone_everything_is_as_it_was_given() -> None:
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    flags, means, pairs = talk(alone)
    assert flags == [True, False, False, True, True]
    assert means == [[1.0, 5.0], [7.0]]
    assert pairs == [[4, 0], [0.0, 0.0]]
