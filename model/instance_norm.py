"""Instance normalisation and the ReLU after it, which all but meet the cost of the convolutions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-4


def norm_relu(
    x: Float[Tensor, "b c h w"], beta: Float[Tensor, "#b c"], gamma: Float[Tensor, "#b c"]
) -> Float[Tensor, "b c h w"]:
    """relu(gamma * (x - mean) / sqrt(var + eps) + beta), mean and var over space, in fp32."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return norm_relu_by_sample(x, beta, gamma)
    return norm_relu_fusible(x, beta, gamma)


def norm_relu_fusible(
    x: Float[Tensor, "b c h w"], beta: Float[Tensor, "#b c"], gamma: Float[Tensor, "#b c"]
) -> Float[Tensor, "b c h w"]:
    """Compute `norm_relu` as its formula, which a compiler fuses into two passes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (2, 3), correction=0)
    scale = gamma * torch.rsqrt(var + EPS)
    shift = beta - mean * scale
    return F.relu(wide * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)


def norm_relu_by_sample(
    x: Float[Tensor, "b c h w"], beta: Float[Tensor, "#b c"], gamma: Float[Tensor, "#b c"]
) -> Float[Tensor, "b c h w"]:
    """Compute `norm_relu` with the batch norm kernel on one sample at a time.

    On a CPU that kernel is up to eight times faster than the formula and ten times faster than
    `F.instance_norm`: it reads channels-last bf16 maps as they are, and keeps statistics in fp32.
    """
    rows = len(x)
    normed = [
        F.batch_norm(sample, None, None, scale, shift, training=True, eps=EPS)
        for sample, scale, shift in zip(
            x.split(1), gamma.expand(rows, -1), beta.expand(rows, -1), strict=True
        )
    ]
    return (normed[0] if rows == 1 else torch.cat(normed)).relu_()


class NormReLU(nn.Module):
    """Instance norm with coefficients of its own, and ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(channels))
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return norm_relu(x, self.beta[None], self.gamma[None])
