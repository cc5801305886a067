"""W: only visited rows move, repeated rows add up, and one row's Adam is PyTorch's Adam."""

import pytest
import torch

from train.rows import RowConfig, RowTable

ADAM = dict(betas=(0.5, 0.999), eps=1e-5)
CPU = torch.device("cpu")


def make_table(num_rows: int = 7, dim: int = 5, **config) -> RowTable:
    return RowTable(num_rows, dim, RowConfig(**config), **ADAM, seed=3, device=CPU)


def test_visited_rows_move_and_the_others_keep_their_bits():
    table = make_table(start="uniform")
    before = table.values.clone()
    table.update(torch.tensor([4, 1]), torch.randn(2, 5))
    moved = (table.values != before).any(dim=1)
    assert moved.tolist() == [False, True, False, False, True, False, False]


def test_a_row_follows_torch_adam_over_its_own_visits():
    table = make_table(start="uniform", lr=0.03)
    reference = table.values[2].clone().requires_grad_()
    adam = torch.optim.Adam([reference], lr=0.03, **ADAM)
    for step in range(6):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(step))
        table.update(torch.tensor([2]), gradient[None])
        table.update(torch.tensor([5]), torch.ones(1, 5))  # another row's visits change nothing
        reference.grad = gradient
        adam.step()
    torch.testing.assert_close(table.values[2], reference.detach())


def test_gradients_of_a_repeated_row_are_added():
    once, twice = make_table(start="uniform"), make_table(start="uniform")
    a, b = torch.randn(2, 5)
    once.update(torch.tensor([3]), (a + b)[None])
    twice.update(torch.tensor([3, 3]), torch.stack([a, b]))
    assert torch.equal(once.values, twice.values)


def test_a_row_starts_once_at_the_first_embedding_of_its_video():
    table = make_table(start="embedding")
    first, second, later = torch.randn(3, 5)
    table.start(torch.tensor([6, 6]), torch.stack([first, second]))
    table.start(torch.tensor([6]), later[None])
    assert torch.equal(table.values[6], first)
    assert not table.values[:6].any()


def test_gathered_rows_are_a_leaf_that_collects_the_gradient():
    table = make_table(start="uniform")
    rows = torch.tensor([1, 3])
    w = table.gather(rows)
    (w * torch.arange(5.0)).sum().backward()
    assert w.is_leaf
    assert torch.equal(w.grad, torch.arange(5.0).expand(2, 5))
    assert torch.equal(w.detach(), table.values[rows])


def test_state_round_trip_goes_on_bit_for_bit():
    table, restored = make_table(start="uniform"), make_table(start="embedding")
    gradient = torch.randn(2, 5)
    table.update(torch.tensor([0, 6]), gradient)
    restored.load_state_dict({name: t.clone() for name, t in table.state_dict().items()})
    for each in (table, restored):
        each.update(torch.tensor([6, 2]), gradient)
    assert torch.equal(table.values, restored.values)


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match="other shards"):
        make_table(num_rows=7).load_state_dict(make_table(num_rows=8).state_dict())
