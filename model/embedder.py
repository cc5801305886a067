"""E: frames of a person and their rasters -> the embedding e (section 3.1 of the paper)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.blocks import SelfAttention, plain_trunk, require_size, sum_pool
from model.config import ModelConfig


class Embedder(nn.Module):
    """Down blocks without normalisation, self-attention on the way, sum over space."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.blocks = plain_trunk(6, config)
        self.attention_level = config.attention_level_down
        self.attention = SelfAttention(config.trunk_widths[self.attention_level])

    def forward(
        self, x: Float[Tensor, "b k 3 h w"], y: Float[Tensor, "b k 3 h w"]
    ) -> Float[Tensor, "b d"]:
        """e = mean over k of E(x_k, y_k); frames and rasters in [-1, 1]."""
        require_size(x, self.config.pool_px, self.config)
        hidden = torch.cat((y, x), dim=2).flatten(0, 1)
        for level, block in enumerate(self.blocks):
            hidden = block(hidden)
            if level == self.attention_level:
                hidden = self.attention(hidden)
        return sum_pool(hidden).unflatten(0, x.shape[:2]).mean(dim=1)
