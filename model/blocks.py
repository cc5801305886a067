"""The residual blocks and the self-attention that the three networks are built from.

Where a block changes the size of the map, the 1x1 convolution of its skip path runs on the smaller
of the two: it commutes with average pooling and with nearest upsampling, and costs a quarter there.
No block writes to its input: the skip path and the feature matching loss read it afterwards.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.config import ModelConfig
from model.instance_norm import NormReLU, norm_relu
from model.spectral import SpectralConv2d


class PlainBlock(nn.Module):
    """Residual block without normalisation: embedder, discriminator, the generator's first."""

    def __init__(self, in_channels: int, out_channels: int, *, first: bool, down: bool):
        """`first`: the input is a picture, so no ReLU before it. `down`: halve the map."""
        super().__init__()
        self.first = first
        self.down = down
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.skip = SpectralConv2d(in_channels, out_channels, 1) if down else nn.Identity()

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        hidden = self.conv1(x if self.first else F.relu(x))
        hidden = self.conv2(F.relu(hidden))
        if self.down:
            return F.avg_pool2d(hidden, 2) + self.skip(F.avg_pool2d(x, 2))
        return hidden + x


class NormDownBlock(nn.Module):
    """Residual block with plain instance norms that halves the map: the generator's way down."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = NormReLU(in_channels)
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3, bias=False)
        self.norm2 = NormReLU(out_channels)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3, bias=False)
        self.skip = SpectralConv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        hidden = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return F.avg_pool2d(hidden, 2) + self.skip(F.avg_pool2d(x, 2))


class AdaptiveBlock(nn.Module):
    """Residual block whose two instance norms take their coefficients from psi.

    `up` doubles the map; without it the number of channels stays.
    """

    def __init__(self, in_channels: int, out_channels: int, *, up: bool):
        super().__init__()
        self.up = up
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3, bias=False)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3, bias=False)
        self.skip = SpectralConv2d(in_channels, out_channels, 1) if up else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        psi1: Float[Tensor, "b p1"],
        psi2: Float[Tensor, "b p2"],
    ) -> Float[Tensor, "b o h2 w2"]:
        hidden = adaptive_norm_relu(x, psi1)
        hidden = self.conv1(double(hidden) if self.up else hidden)
        hidden = self.conv2(adaptive_norm_relu(hidden, psi2))
        skip = self.skip(x)
        return hidden + (double(skip) if self.up else skip)


class SelfAttention(nn.Module):
    """x + gain * attention over all positions (Zhang et al. 2018); the gain starts at 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = SpectralConv2d(channels, channels // 8, 1)
        self.key = SpectralConv2d(channels, channels // 8, 1)
        self.value = SpectralConv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        query, key, value = (
            conv(x).flatten(2).transpose(1, 2) for conv in (self.query, self.key, self.value)
        )
        # In two products: on a CPU in bf16, four times faster than scaled_dot_product_attention,
        # which has no fast kernel for values wider than keys.
        mixed = torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(dim=-1), value)
        return x + self.gain * mixed.transpose(1, 2).reshape(x.shape)


def adaptive_norm_relu(
    x: Float[Tensor, "b c h w"], psi: Float[Tensor, "b 2*c"]
) -> Float[Tensor, "b c h w"]:
    """Normalise with the coefficients [beta, gamma] of this layer's part of psi, then ReLU."""
    beta, gamma = psi.chunk(2, dim=1)
    return norm_relu(x, beta, gamma)


def double(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
    """Upsample twice by the nearest neighbour."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def plain_trunk(in_channels: int, config: ModelConfig) -> nn.ModuleList:
    """Down blocks from the picture to `pool_px`, shared in shape by embedder and discriminator."""
    widths = (in_channels, *config.trunk_widths)
    return nn.ModuleList(
        PlainBlock(narrow, wide, first=level == 0, down=True)
        for level, (narrow, wide) in enumerate(pairwise(widths))
    )


def sum_pool(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    """ReLU, then the sum over space, in at least 32 bits.

    The paper sums and then takes the ReLU. The order here is that of the authors' code: a channel
    with a negative sum still passes a gradient.
    """
    return F.relu(x).sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def require_size(x: Float[Tensor, "*b c h w"], smallest_px: int, config: ModelConfig) -> None:
    """Raise ValueError for a picture that the blocks cannot halve down to the smallest map."""
    multiple = config.image_px // smallest_px
    height, width = x.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(
            f"a picture of {height} x {width} pixels came, expected multiples of {multiple}: "
            f"resize it to {config.image_px} x {config.image_px}"
        )
