"""Instance normalisation and the ReLU after it, which all but meet the cost of the convolutions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-4


def norm_relu(
    x: Float[Tensor, "b c h w"], beta: Float[Tensor, "#b c"], gamma: Float[Tensor, "#b c"]
) -> Float[Tensor, "b c h w"]:
    """relu(gamma * (x - mean) / sqrt(var + eps) + beta), mean and var over space."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean((2, 3))
    var = (wide.square().mean((2, 3)) - mean.square()).clamp_min(0)
    scale = gamma * torch.rsqrt(var + EPS)
    shift = beta - mean * scale
    return F.relu(wide * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


class NormReLU(nn.Module):
    """Instance norm with coefficients of its own, and ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(channels))
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return norm_relu(x, self.beta[None], self.gamma[None])
