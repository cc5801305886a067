"""The losses against arithmetic by hand."""

import pytest
import torch

from train.losses import (
    adversarial_loss,
    content_loss,
    feature_matching_loss,
    hinge_loss,
    matching_loss,
)


def layers(*values: float) -> list[torch.Tensor]:
    """One layer a value, each constant and of another shape."""
    return [torch.full((2, i + 1, i + 3, i + 4), value) for i, value in enumerate(values)]


def test_content_sums_weighted_layers():
    # 2 * |1 - 3| + 0.5 * |5 - 1| = 6, whatever the layers' sizes
    loss = content_loss(layers(1.0, 5.0), layers(3.0, 1.0), (2.0, 0.5))
    assert loss.item() == pytest.approx(6)


def test_content_is_a_mean_over_elements():
    fake, real = torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    assert content_loss([fake], [real], (1.0,)).item() == pytest.approx((1 + 3) / 2)


def test_content_wants_a_weight_for_every_layer():
    with pytest.raises(ValueError, match="zip"):
        content_loss(layers(1.0, 2.0), layers(1.0, 2.0), (1.0,))


def test_feature_matching_averages_blocks():
    # (|1 - 3| + |5 - 1|) / 2 = 3
    loss = feature_matching_loss(layers(1.0, 5.0), layers(3.0, 1.0))
    assert loss.item() == pytest.approx(3)


@pytest.mark.parametrize("loss", ["content", "feature matching"])
def test_the_real_side_takes_no_gradient(loss: str):
    fake, real = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    if loss == "content":
        content_loss([fake], [real], (1.0,)).backward()
    else:
        feature_matching_loss([fake], [real]).backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, torch.full((2, 3), -1 / 6))


def test_adversarial_is_the_negated_score():
    assert adversarial_loss(torch.tensor([2.0, -5.0, 0.0])).item() == pytest.approx(1)


def test_hinge_counts_only_what_is_inside_the_margin():
    # real: max(0, 1 - 3) = 0, max(0, 1 - .5) = .5; generated: max(0, 1 - 2) = 0, max(0, 1 + 1) = 2
    loss = hinge_loss(torch.tensor([3.0, 0.5]), torch.tensor([-2.0, 1.0]))
    assert loss.item() == pytest.approx(0.25 + 1)


def test_hinge_reaches_zero_and_starts_at_two():
    assert hinge_loss(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -7.0])).item() == 0
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).item() == 2


def test_hinge_gradient_vanishes_outside_the_margin():
    r = torch.tensor([3.0, 0.5], requires_grad=True)
    r_hat = torch.tensor([-2.0, 1.0], requires_grad=True)
    hinge_loss(r, r_hat).backward()
    torch.testing.assert_close(r.grad, torch.tensor([0.0, -0.5]))
    torch.testing.assert_close(r_hat.grad, torch.tensor([0.0, 0.5]))


def test_matching_is_the_mean_distance_and_moves_both():
    e = torch.tensor([[1.0, -2.0, 0.0]], requires_grad=True)
    w_i = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    loss = matching_loss(e, w_i)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 3 + 0.5) / 3)
    torch.testing.assert_close(e.grad, torch.tensor([[1.0, -1.0, -1.0]]) / 3)
    torch.testing.assert_close(w_i.grad, -e.grad)


def test_losses_of_bf16_tensors_are_fp32():
    layer = torch.ones(2, 3, dtype=torch.bfloat16)
    assert content_loss([layer], [layer], (1.0,)).dtype == torch.float32
    assert feature_matching_loss([layer], [layer]).dtype == torch.float32
    assert hinge_loss(layer[:, 0], layer[:, 0]).dtype == torch.float32
