"""Spectral norm: singular values, what training and evaluation change, folding."""

import copy

import pytest
import torch
from torch import nn

from model import Discriminator, ModelConfig, fold_spectral_norm
from model.spectral import SpectralConv2d, SpectralLinear

CONFIG = ModelConfig(
    image_px=32,
    min_channels=8,
    max_channels=24,
    bottleneck_px=8,
    attention_down_px=8,
    attention_up_px=16,
)


def conv() -> SpectralConv2d:
    torch.manual_seed(0)
    return SpectralConv2d(5, 7, 3)


def top_singular_value(layer: SpectralConv2d | SpectralLinear) -> float:
    weight = fold_spectral_norm(layer).weight.detach().flatten(1)
    return torch.linalg.matrix_norm(weight, ord=2).item()


@pytest.mark.parametrize(
    "layer", [conv(), SpectralConv2d(6, 4, 1), SpectralLinear(9, 20)], ids=["3x3", "1x1", "linear"]
)
def test_the_top_singular_value_is_one(layer):
    assert top_singular_value(layer) == pytest.approx(1, abs=2e-2)
    picture = torch.randn(2, 9) if isinstance(layer, SpectralLinear) else torch.randn(2, 6, 4, 8)
    if layer.weight.shape[1] == 5:
        picture = picture[:, :5]
    for _ in range(50):
        layer(picture)
    assert top_singular_value(layer) == pytest.approx(1, abs=1e-4)


def test_power_iteration_follows_the_weights():
    layer = conv()
    nn.init.normal_(layer.weight, std=3)
    assert abs(top_singular_value(layer) - 1) > 0.05
    for _ in range(50):
        layer(torch.zeros(1, 5, 4, 6))
    assert top_singular_value(layer) == pytest.approx(1, abs=1e-4)


def test_evaluation_changes_nothing_and_training_does():
    layer = conv().eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 5, 4, 6))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer.train()(torch.randn(2, 5, 4, 6))
    assert not torch.equal(before["u"], layer.u)
    assert torch.equal(before["weight"], layer.weight)


def test_the_gradient_is_that_of_the_quotient():
    """d(W / sigma) with sigma = u^T W v and u, v fixed, as in Miyato et al. 2018."""
    layer = conv().double().eval()
    x, weight = torch.randn(2, 5, 4, 6, dtype=torch.float64), layer.weight.detach().clone()
    matrix = weight.requires_grad_().movedim(1, -1).flatten(1)
    v = nn.functional.normalize(matrix.detach().t() @ layer.u, dim=0)
    sigma = layer.u @ matrix @ v
    expected = nn.functional.conv2d(x, weight / sigma, layer.bias, padding=1)
    expected.square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_several_forwards_before_one_backward():
    """The graph of the first must not hold what the second one overwrites."""
    layer = conv()
    x = torch.randn(2, 5, 4, 6)
    first = layer(x)
    layer.eval()
    frozen = layer(x)
    layer.train()
    (first + frozen + layer(x)).sum().backward()
    assert layer.weight.grad is not None


def test_sigma_keeps_full_precision_under_autocast():
    layer = conv().eval()
    x = torch.randn(2, 5, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), layer(x), rtol=2e-2, atol=2e-2)


def test_copies_are_independent_and_equal():
    layer = conv()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 4, 6)
    for _ in range(3):
        torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=0)
    assert set(layer.state_dict()) == {"weight", "bias", "u", "v"}


def test_folding_keeps_what_the_network_computes():
    torch.manual_seed(0)
    discriminator = Discriminator(CONFIG).eval()
    x, y, w_i = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48), torch.randn(2, 24)
    score, features = discriminator(x, y, w_i)
    folded = fold_spectral_norm(copy.deepcopy(discriminator))
    torch.testing.assert_close(folded(x, y, w_i)[0], score, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(folded(x, y, w_i)[1][-1], features[-1], rtol=1e-6, atol=1e-6)
    assert not any(isinstance(m, SpectralConv2d | SpectralLinear) for m in folded.modules())
    assert not any(name.endswith((".u", ".v")) for name in folded.state_dict())
    assert set(dict(folded.named_parameters())) == set(dict(discriminator.named_parameters()))


def test_rows_are_left_at_their_own_length():
    """Spectral norm on W shrinks each row towards zero; here a longer row scores in proportion."""
    torch.manual_seed(0)
    discriminator = Discriminator(CONFIG).eval()
    assert isinstance(discriminator.w0, nn.Parameter)
    x, row = torch.rand(1, 3, 32, 32), torch.full((1, 24), 5.0)
    zero = discriminator(x, x, torch.zeros(1, 24))[0]
    ratio = (discriminator(x, x, 10 * row)[0] - zero) / (discriminator(x, x, row)[0] - zero)
    assert ratio.item() == pytest.approx(10, rel=1e-4)
