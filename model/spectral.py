"""Convolution and linear layer under spectral norm: weights divided by their top singular value."""

from typing import Any, TypeVar, cast

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
        return self._conv_forward(input, normalised_weight(self), self.bias)


class SpectralLinear(nn.Linear):
    """A linear layer whose weight has top singular value 1, as in `SpectralConv2d`."""

    u: Tensor
    v: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        _add_singular_vectors(self)

    def forward(self, input: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        return F.linear(input, normalised_weight(self), self.bias)


def normalised_weight(layer: SpectralConv2d | SpectralLinear) -> Tensor:
    """Return the weight in effect; in training, after one step of power iteration."""
    # Singular values need the full precision of the weights: autocast would take them in bf16.
    with torch.autocast(layer.weight.device.type, enabled=False):
        matrix = _matrix(layer.weight)
        u = _iterate(matrix, layer.u, layer.v) if layer.training else layer.u.clone()
        normalised = cast(Tensor, _Normalise.apply(matrix, u))
    if isinstance(layer, SpectralLinear):
        return normalised
    return normalised.unflatten(1, (*layer.weight.shape[2:], -1)).movedim(-1, 1)


def start_orthogonal(module: nn.Module) -> None:
    """Start every layer with all its singular values 1, and with biases at zero.

    Spectral norm divides by the largest singular value: of PyTorch's start it leaves so little that
    a few layers on the biases are all there is. Through the paper's discriminator at 256 px, the
    difference that a blurred frame makes is 45 times larger at the end of the trunk with this one.
    """
    for layer in module.modules():
        if isinstance(layer, SpectralConv2d | SpectralLinear):
            nn.init.orthogonal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            _settle(layer)


@torch.no_grad()
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
    was_training = layer.training
    plain.weight.copy_(normalised_weight(layer.eval()))
    layer.train(was_training)
    if layer.bias is not None and plain.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain.requires_grad_(layer.weight.requires_grad)


def _add_singular_vectors(layer: SpectralConv2d | SpectralLinear) -> None:
    rows, columns = _matrix(layer.weight).shape
    layer.register_buffer("u", F.normalize(torch.randn(rows), dim=0))
    layer.register_buffer("v", F.normalize(torch.randn(columns), dim=0))
    _settle(layer)


def _settle(layer: SpectralConv2d | SpectralLinear) -> None:
    """Bring `u` and `v` to the weight as it now is."""
    matrix = _matrix(layer.weight)
    for _ in range(WARM_UP_ITERATIONS):
        _iterate(matrix, layer.u, layer.v)


def _matrix(weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o i"]:
    """Lay the weight out as output x the rest, channels last: no copy for the faster layout."""
    return weight.movedim(1, -1).flatten(1)


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


class _Normalise(torch.autograd.Function):
    """W / sigma with sigma = u^T W v, where v = W^T u / |W^T u| makes that |W^T u|.

    The gradient, with u and v held fixed, is (g - <g, W / sigma> u v^T) / sigma. Autograd's own
    takes five passes over the weights for it, this takes two.
    """

    @staticmethod
    def forward(
        ctx: Any, matrix: Float[Tensor, "o i"], u: Float[Tensor, " o"]
    ) -> Float[Tensor, "o i"]:
        image = torch.mv(matrix.t(), u)
        sigma = image.norm().clamp_min(EPS)
        normalised = matrix / sigma
        ctx.save_for_backward(normalised, u, image / sigma, sigma)
        return normalised

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Float[Tensor, "o i"]
    ) -> tuple[Float[Tensor, "o i"], None]:
        normalised, u, v, sigma = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient.flatten(), normalised.flatten())
        return torch.addr(gradient / sigma, u * (-along / sigma), v), None
