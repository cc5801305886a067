"""Convolution and linear layer under spectral norm: weights divided by their top singular value."""

from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-4
WARM_UP_ITERATIONS = 15

Module = TypeVar("Module", bound=nn.Module)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix of output x the rest, has top singular value 1.

    Each forward in training takes one step of power iteration; evaluation leaves `u` and `v` alone.
    """

    u: Tensor
    v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_px: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_px, padding=kernel_px // 2, bias=bias)
        _add_singular_vectors(self)

    def forward(self, input: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self._conv_forward(input, _normalised_weight(self), self.bias)


class SpectralLinear(nn.Linear):
    """A linear layer whose weight has top singular value 1, as in `SpectralConv2d`."""

    u: Tensor
    v: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        _add_singular_vectors(self)

    def forward(self, input: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        return F.linear(input, _normalised_weight(self), self.bias)


def settle(module: nn.Module) -> None:
    """Bring `u` and `v` of every layer to the weights as they now are, after an initialisation."""
    for layer in module.modules():
        if isinstance(layer, SpectralConv2d | SpectralLinear):
            with torch.no_grad():
                for _ in range(WARM_UP_ITERATIONS):
                    _iterate(layer.weight.flatten(1), layer.u, layer.v)


def fold_spectral_norm(module: Module) -> Module:
    """Replace every normalised layer, in place, by a plain one with the weights it has in effect.

    Returns the module (or, where the module itself is such a layer, its plain counterpart). The
    result computes exactly what the module computes in evaluation.
    """
    if isinstance(module, SpectralConv2d | SpectralLinear):
        return cast(Module, _plain(module))
    for name, child in module.named_children():
        setattr(module, name, fold_spectral_norm(child))
    return module


def _plain(layer: SpectralConv2d | SpectralLinear) -> nn.Conv2d | nn.Linear:
    has_bias = layer.bias is not None
    if isinstance(layer, SpectralConv2d):
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            cast(tuple[int, int], layer.kernel_size),
            padding=cast(tuple[int, int], layer.padding),
            bias=has_bias,
        )
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=has_bias)
    plain = plain.to(layer.weight).train(layer.training)
    with torch.no_grad():
        plain.weight.copy_(layer.weight / _sigma(layer.weight.flatten(1), layer.u))
        if layer.bias is not None and plain.bias is not None:
            plain.bias.copy_(layer.bias)
    plain.weight.requires_grad_(layer.weight.requires_grad)
    return plain


def _add_singular_vectors(layer: SpectralConv2d | SpectralLinear) -> None:
    matrix = layer.weight.flatten(1)
    layer.register_buffer("u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
    layer.register_buffer("v", F.normalize(torch.randn(matrix.shape[1]), dim=0))
    settle(layer)


def _normalised_weight(layer: SpectralConv2d | SpectralLinear) -> Tensor:
    # Singular values need the full precision of the weights: autocast would take them in bf16.
    with torch.autocast(layer.weight.device.type, enabled=False):
        matrix = layer.weight.flatten(1)
        u = _iterate(matrix, layer.u, layer.v) if layer.training else layer.u.clone()
        return layer.weight / _sigma(matrix, u)


def _sigma(matrix: Float[Tensor, "o i"], u: Float[Tensor, " o"]) -> Float[Tensor, ""]:
    """|W^T u|, which is u^T W v for v = W^T u / |W^T u|, and has its gradient u v^T."""
    return torch.mv(matrix.t(), u).norm().clamp_min(EPS)


@torch.no_grad()
def _iterate(
    matrix: Float[Tensor, "o i"], u: Float[Tensor, " o"], v: Float[Tensor, " i"]
) -> Float[Tensor, " o"]:
    """Take one step of power iteration into `u` and `v`; return the new u as a tensor of its own.

    Of its own, because the graph of an earlier forward may still hold the stored one.
    """
    new_u = F.normalize(torch.mv(matrix, v), dim=0, eps=EPS)
    v.copy_(F.normalize(torch.mv(matrix.t(), new_u), dim=0, eps=EPS))
    u.copy_(new_u)
    return new_u
