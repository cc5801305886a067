"""G and P: a raster and the embedding of a person -> a frame (section 3.1 of the paper)."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import (
    AdaptiveBlock,
    NormDownBlock,
    PlainBlock,
    SelfAttention,
    adaptive_norm_relu,
    require_size,
)
from model.config import ModelConfig
from model.spectral import SpectralConv2d, SpectralLinear


class Generator(nn.Module):
    """Johnson's image-to-image net of residual blocks; psi drives every norm after its bottleneck.

    psi is given to `forward`, so that it may come from an embedding (`psi(e)`) or be a person's
    own. It holds, for each adaptive norm in the order of the flow, its betas and then its gammas.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        down = (3, *config.down_widths)
        up = (down[-1], *config.up_widths)
        self.first = PlainBlock(down[0], down[1], first=True, down=True)
        self.down = nn.ModuleList(map(NormDownBlock, down[1:-1], down[2:]))
        self.middle = nn.ModuleList(
            AdaptiveBlock(down[-1], down[-1], up=False) for _ in range(config.num_middle)
        )
        self.up = nn.ModuleList(
            AdaptiveBlock(wide, narrow, up=True) for wide, narrow in pairwise(up)
        )
        self.last = SpectralConv2d(up[-1], 3, 3)
        self.level_down = config.attention_level_down
        self.level_up = config.attention_level_up
        self.attention_down = SelfAttention(config.down_widths[self.level_down])
        self.attention_up = SelfAttention(config.up_widths[self.level_up])
        self.psi_sizes = tuple(2 * width for width in self._norm_widths())
        self.P = SpectralLinear(config.embedding_dim, sum(self.psi_sizes))
        self._start_as_plain_norms()

    @property
    def psi_dim(self) -> int:
        """Number of coefficients in psi."""
        return sum(self.psi_sizes)

    def psi(self, e: Float[Tensor, "b d"]) -> Float[Tensor, "b p"]:
        """psi = P e, in the precision of P even under autocast: every pixel depends on it."""
        with torch.autocast(e.device.type, enabled=False):
            return self.P(e.to(self.P.weight.dtype))

    def forward(
        self, y: Float[Tensor, "b 3 h w"], psi: Float[Tensor, "b p"]
    ) -> Float[Tensor, "b 3 h w"]:
        """x_hat = G(y; psi), raster and frame in [-1, 1]."""
        require_size(y, self.config.bottleneck_px, self.config)
        coefficients = iter(psi.split(self.psi_sizes, dim=1))
        hidden = self.first(y)
        for level, block in enumerate(self.down, start=1):
            hidden = block(hidden)
            if level == self.level_down:
                hidden = self.attention_down(hidden)
        for block in self.middle:
            hidden = block(hidden, next(coefficients), next(coefficients))
        for level, block in enumerate(self.up):
            hidden = block(hidden, next(coefficients), next(coefficients))
            if level == self.level_up:
                hidden = self.attention_up(hidden)
        hidden = self.last(adaptive_norm_relu(hidden, next(coefficients)))
        return torch.tanh(hidden.to(psi.dtype))

    def _norm_widths(self) -> list[int]:
        """Channels of every adaptive norm, in the order of the flow."""
        down, up = self.config.down_widths, self.config.up_widths
        middle = [down[-1]] * 2 * self.config.num_middle
        rising = [width for pair in pairwise((down[-1], *up)) for width in pair]
        return [*middle, *rising, up[-1]]

    def _start_as_plain_norms(self) -> None:
        """Let psi be beta 0 and gamma 1 where e is 0, so that landmarks pass whatever e is."""
        with torch.no_grad():
            for bias in self.P.bias.split(self.psi_sizes):
                beta, gamma = bias.chunk(2)
                beta.fill_(0)
                gamma.fill_(1)
