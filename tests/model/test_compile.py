"""The networks under torch.compile compute what they compute without."""

import copy

import pytest
import torch

from model import Generator, ModelConfig

CONFIG = ModelConfig(
    image_px=32,
    min_channels=8,
    max_channels=24,
    bottleneck_px=8,
    num_middle=1,
    attention_down_px=8,
    attention_up_px=16,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_generator_is_the_same_generator():
    """Spectral norm's buffers included, which every forward in training moves."""
    torch.manual_seed(0)
    plain = Generator(CONFIG)
    compiled = copy.deepcopy(plain)
    compiled.compile()
    y, e = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 24)
    for _ in range(2):
        pictures = [network(y, network.psi(e)) for network in (plain, compiled)]
        torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-5)
        for network, picture in zip((plain, compiled), pictures, strict=True):
            network.zero_grad()
            picture.square().mean().backward()
    compiled_parameters = dict(compiled.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            compiled_parameters[name].grad, parameter.grad, rtol=1e-3, atol=1e-6
        )
    for ours, theirs in zip(plain.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
