"""Residual blocks, norms and self-attention, each against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.blocks import (
    AdaptiveBlock,
    NormDownBlock,
    PlainBlock,
    SelfAttention,
    adaptive_norm_relu,
    double,
    sum_pool,
)
from model.instance_norm import (
    EPS,
    NormReLU,
    norm_relu_by_sample,
    norm_relu_fusible,
)

B, C, H, W = 2, 5, 6, 8

both_ways = pytest.mark.parametrize("norm_relu", [norm_relu_by_sample, norm_relu_fusible])


def maps(channels: int = C, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, channels, H, W, generator=generator, dtype=dtype) * 3 + 1


def reference(x: torch.Tensor, beta: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    normed = F.instance_norm(x, eps=EPS)
    return F.relu(normed * gamma[:, :, None, None] + beta[:, :, None, None])


@both_ways
def test_norm_relu_is_instance_norm_affine_relu(norm_relu):
    x = maps()
    beta, gamma = torch.randn(B, C), torch.randn(B, C)
    torch.testing.assert_close(norm_relu(x, beta, gamma), reference(x, beta, gamma))


@both_ways
def test_norm_relu_keeps_its_precision_far_from_zero(norm_relu):
    x = maps() + 300
    beta, gamma = torch.randn(B, C), torch.randn(B, C)
    expected = reference(x.double(), beta.double(), gamma.double()).float()
    torch.testing.assert_close(norm_relu(x, beta, gamma), expected, rtol=1e-2, atol=1e-2)


@both_ways
def test_norm_relu_of_a_constant_map_is_beta(norm_relu):
    beta = torch.tensor([[0.5, -0.5]])
    out = norm_relu(torch.full((1, 2, H, W), 7.0), beta, torch.ones(1, 2))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.5, 0.0]), atol=1e-2, rtol=0)


@both_ways
@pytest.mark.parametrize("rows", [1, B], ids=["shared", "adaptive"])
def test_norm_relu_has_the_right_gradients(norm_relu, rows: int):
    x = maps(dtype=torch.float64).requires_grad_()
    beta = torch.randn(rows, C, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(rows, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm_relu, (x, beta, gamma))


@both_ways
def test_norm_relu_measures_bf16_maps_in_fp32(norm_relu):
    x = (maps() * 4).bfloat16()
    beta, gamma = torch.randn(B, C), torch.randn(B, C)
    out = norm_relu(x, beta, gamma)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference(x.float(), beta, gamma), rtol=1e-2, atol=2e-2)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_relu_keeps_the_memory_format(norm_relu, dtype: torch.dtype):
    x = maps().to(dtype, memory_format=torch.channels_last).requires_grad_()
    out = norm_relu(x, torch.zeros(1, C), torch.ones(1, C))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_adaptive_norm_has_the_statistics_that_psi_asks_for():
    beta, gamma = torch.full((B, C), 20.0), torch.arange(1.0, C + 1).expand(B, C)
    out = adaptive_norm_relu(maps(), torch.cat((beta, gamma), dim=1))
    # Beta is large enough that the ReLU cuts nothing.
    torch.testing.assert_close(out.mean((2, 3)), beta)
    torch.testing.assert_close(out.std((2, 3), correction=0), gamma, rtol=1e-3, atol=0)


def test_plain_norm_starts_as_a_plain_norm():
    torch.testing.assert_close(
        NormReLU(C)(maps()), reference(maps(), torch.zeros(B, C), torch.ones(B, C))
    )


def test_blocks_halve_keep_and_double():
    assert PlainBlock(C, 7, first=True, down=True)(maps()).shape == (B, 7, H // 2, W // 2)
    assert PlainBlock(C, C, first=False, down=False)(maps()).shape == (B, C, H, W)
    assert NormDownBlock(C, 7)(maps()).shape == (B, 7, H // 2, W // 2)
    psi = torch.randn(B, 2 * C)
    assert AdaptiveBlock(C, C, up=False)(maps(), psi, psi).shape == (B, C, H, W)
    up = AdaptiveBlock(C, 7, up=True)(maps(), psi, torch.randn(B, 14))
    assert up.shape == (B, 7, 2 * H, 2 * W)


@pytest.mark.parametrize("first", [True, False])
def test_plain_block_is_its_equation(first: bool):
    block, x = PlainBlock(C, 7, first=first, down=True).eval(), maps()
    hidden = block.conv2(F.relu(block.conv1(x if first else F.relu(x))))
    expected = F.avg_pool2d(hidden, 2) + F.avg_pool2d(block.skip(x), 2)
    torch.testing.assert_close(block(x), expected)


def test_adaptive_block_is_its_equation():
    block, x = AdaptiveBlock(C, 7, up=True).eval(), maps()
    psi1, psi2 = torch.randn(B, 2 * C), torch.randn(B, 14)
    hidden = block.conv1(double(reference(x, psi1[:, :C], psi1[:, C:])))
    expected = block.conv2(reference(hidden, psi2[:, :7], psi2[:, 7:])) + block.skip(double(x))
    torch.testing.assert_close(block(x, psi1, psi2), expected)


def test_no_block_writes_to_its_input():
    """An in-place ReLU at a block's start would clip the skip path and the features of D."""
    psi = torch.randn(B, 2 * C)
    for run in (
        PlainBlock(C, 7, first=False, down=True),
        PlainBlock(C, C, first=False, down=False),
        NormDownBlock(C, 7),
        SelfAttention(16),
        lambda x: AdaptiveBlock(C, C, up=False)(x, psi, psi),
        lambda x: AdaptiveBlock(C, C, up=True)(x, psi, psi),
        sum_pool,
    ):
        x = maps(16 if isinstance(run, SelfAttention) else C)
        before = x.clone()
        run(x)
        assert torch.equal(x, before)


def test_attention_starts_closed():
    x = maps(16)
    torch.testing.assert_close(SelfAttention(16)(x), x)


def test_attention_is_its_equation():
    attention, x = SelfAttention(16).eval(), maps(16)
    nn.init.constant_(attention.gain, 0.7)
    query, key, value = (
        layer(x).flatten(2) for layer in (attention.query, attention.key, attention.value)
    )
    share = torch.einsum("bcq,bck->bqk", query, key).softmax(dim=-1)
    mixed = torch.einsum("bqk,bck->bcq", share, value).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + 0.7 * mixed)


def test_sum_pool_sums_what_is_positive():
    x = torch.tensor([[[[1.0, -2.0, 3.0]], [[-1.0, -1.0, 0.5]]]])
    torch.testing.assert_close(sum_pool(x), torch.tensor([[4.0, 0.5]]))


def test_sum_pool_of_bf16_sums_in_fp32():
    assert sum_pool(torch.full((1, 1, 32, 32), 1.0, dtype=torch.bfloat16)).item() == 1024
    assert sum_pool(torch.full((1, 1, 31, 33), 1.0, dtype=torch.bfloat16)).item() == 1023
