"""The order of visits is arithmetic: nothing missing, nothing twice, no state."""

from itertools import islice

import pytest

from train.order import (
    held_out_stretches,
    rank_batches,
    spread,
    training_frames,
    visit,
)

FRAMES = [range(n) for n in (17, 18, 20, 16, 19, 23, 21)]


def visits(first: int, count: int, seed: int = 5):
    return [
        visit(number, frames=FRAMES, num_sources=4, seed=seed)
        for number in range(first, first + count)
    ]


def test_every_video_comes_once_an_epoch_and_epochs_differ() -> None:
    epochs = [[v.video for v in visits(7 * epoch, 7)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_frames_of_a_visit_are_disjoint_and_offered() -> None:
    for v in visits(0, 200):
        drawn = {*v.sources, v.target}
        assert len(drawn) == 5
        assert drawn <= set(FRAMES[v.video])


def test_every_frame_of_a_video_is_drawn_as_target_in_time() -> None:
    assert {v.target for v in visits(0, 7 * 150) if v.video == 2} == set(range(20))


def test_a_visit_depends_on_seed_and_number_alone() -> None:
    assert visits(40, 9) == visits(0, 49)[40:]
    assert visits(0, 9) != visits(0, 9, seed=6)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_is_the_same_visits_on_any_number_of_ranks(world_size: int) -> None:
    ranks = [
        list(islice(rank_batches(start=24, batch_size=8, rank=r, world_size=world_size), 3))
        for r in range(world_size)
    ]
    steps = [[n for rank in ranks for n in rank[step]] for step in range(3)]
    assert steps == [list(range(24 + 8 * step, 32 + 8 * step)) for step in range(3)]


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="6 visits can't be shared by 4 ranks"):
        next(rank_batches(start=0, batch_size=6, rank=0, world_size=4))


@pytest.mark.parametrize("hold_out", [False, True])
def test_stretches_for_judging_are_disjoint(hold_out: bool) -> None:
    sources, targets = held_out_stretches(18, hold_out=hold_out)
    assert set(sources).isdisjoint(targets)
    assert set(sources) | set(targets) == set(range(18))
    if hold_out:
        assert set(training_frames(18, hold_out=True)).isdisjoint(targets)


def test_spread_is_even_and_never_repeats() -> None:
    assert spread(range(10, 20), 5) == (11, 13, 15, 17, 19)
    assert spread(range(3), 8) == (0, 1, 2)
    assert spread(range(7), 1) == (3,)
