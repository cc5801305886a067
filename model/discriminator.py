"""D: a frame, its raster and a person's direction -> a realism score (section 3.1, equation 8)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import PlainBlock, SelfAttention, plain_trunk, require_size, sum_pool
from model.config import ModelConfig
from model.spectral import start_orthogonal


class Discriminator(nn.Module):
    """The embedder's trunk with one more block at its end, and a linear score without squashing.

    The rows of W live with whoever trains them: the row of the video is given to `forward`.
    Neither it nor w0 is under spectral norm, which would shrink every row of W to next to nothing.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.embedding_dim
        self.blocks = plain_trunk(6, config)
        self.blocks.append(PlainBlock(width, width, first=False, down=False))
        self.attention_level = config.attention_level_down
        self.attention = SelfAttention(config.trunk_widths[self.attention_level])
        if config.discriminator_init == "orthogonal":
            start_orthogonal(self)
        self.w0 = nn.Parameter(torch.empty(width).uniform_(-(width**-0.5), width**-0.5))
        self.b = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        x: Float[Tensor, "b 3 h w"],
        y: Float[Tensor, "b 3 h w"],
        w_i: Float[Tensor, "b d"],
    ) -> tuple[Float[Tensor, " b"], tuple[Float[Tensor, "b _ _ _"], ...]]:
        """r = v . (w_i + w0) + b, and the output of every residual block, before any ReLU."""
        require_size(x, self.config.pool_px, self.config)
        hidden = torch.cat((y, x), dim=1)
        features = []
        for level, block in enumerate(self.blocks):
            hidden = block(hidden)
            features.append(hidden)
            if level == self.attention_level:
                hidden = self.attention(hidden)
        score = (sum_pool(hidden) * (w_i + self.w0)).sum(dim=1)
        return self.config.score_gain * score + self.b, tuple(features)
