"""The sizes of the three networks, and the presets they come in."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and widths of embedder, generator and discriminator; the defaults are the paper's."""

    image_px: int = 256
    """Side of the pictures, a power of two."""
    min_channels: int = 64
    """Channels after the first block; they double with every halving of the picture."""
    max_channels: int = 512
    """Channels at most."""
    pool_px: int = 4
    """Side of the map that embedder and discriminator sum over."""
    bottleneck_px: int = 16
    """Side of the map in the generator's middle blocks."""
    num_middle: int = 4
    """Residual blocks in the middle of the generator."""
    attention_down_px: int = 32
    """Side of the map with self-attention on every way down."""
    attention_up_px: int = 64
    """Side of the map with self-attention on the generator's way up."""
    discriminator_init: Literal["default", "orthogonal"] = "orthogonal"
    """Start of the discriminator: orthogonal with biases at zero, or PyTorch's own, under which
    the biases drown what spectral norm leaves of the picture and it does not learn to tell."""
    score_gain: float = 0.1
    """Factor on v . (w_i + w0) in the discriminator's score; the paper has none, and starts w_i
    near zero. A row that starts at its video's embedding would else throw the first scores to 300,
    far off the hinge."""

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in (
                "image_px",
                "pool_px",
                "bottleneck_px",
                "attention_down_px",
                "attention_up_px",
            )
        }
        for name, size in sizes.items():
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name} is {size}, expected a power of two")
        _require(self.pool_px < self.image_px, "pool_px", self.pool_px, "below image_px")
        _require(
            self.bottleneck_px < self.image_px,
            "bottleneck_px",
            self.bottleneck_px,
            "below image_px",
        )
        lowest = max(self.pool_px, self.bottleneck_px)
        _require(
            lowest <= self.attention_down_px <= self.image_px // 4,
            "attention_down_px",
            self.attention_down_px,
            f"at least {lowest} and at most a quarter of image_px",
        )
        _require(
            self.bottleneck_px < self.attention_up_px <= self.image_px,
            "attention_up_px",
            self.attention_up_px,
            f"above bottleneck_px ({self.bottleneck_px}) and at most image_px",
        )
        _require(
            self.min_channels >= 8 and self.min_channels % 8 == 0,
            "min_channels",
            self.min_channels,
            "a multiple of 8 (attention divides channels by 8)",
        )
        _require(
            self.max_channels >= self.min_channels and self.max_channels % 8 == 0,
            "max_channels",
            self.max_channels,
            "a multiple of 8, not below min_channels",
        )
        _require(self.num_middle >= 1, "num_middle", self.num_middle, "at least 1")
        _require(self.score_gain > 0, "score_gain", self.score_gain, "above 0")

    @property
    def trunk_widths(self) -> tuple[int, ...]:
        """Channels after each down block of embedder and discriminator."""
        return self._widths(self.pool_px)

    @property
    def down_widths(self) -> tuple[int, ...]:
        """Channels after each down block of the generator."""
        return self._widths(self.bottleneck_px)

    @property
    def up_widths(self) -> tuple[int, ...]:
        """Channels after each up block of the generator: the way down mirrored."""
        return tuple(reversed(self.down_widths))

    @property
    def embedding_dim(self) -> int:
        """Length of e, w_i and w0: what the sum over space leaves of the trunk."""
        return self.trunk_widths[-1]

    @property
    def attention_level_down(self) -> int:
        """Index of the down block after which self-attention stands."""
        return (self.image_px // self.attention_down_px).bit_length() - 2

    @property
    def attention_level_up(self) -> int:
        """Index of the up block after which self-attention stands."""
        return (self.attention_up_px // self.bottleneck_px).bit_length() - 2

    def _widths(self, lowest_px: int) -> tuple[int, ...]:
        num_blocks = (self.image_px // lowest_px).bit_length() - 1
        return tuple(
            min(self.min_channels * 2**level, self.max_channels) for level in range(num_blocks)
        )


def _require(holds: bool, name: str, value: float, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, expected {expected}")


PAPER = ModelConfig()
SMALL = ModelConfig(
    image_px=128,
    min_channels=32,
    max_channels=256,
    bottleneck_px=8,
    attention_down_px=16,
    attention_up_px=32,
)
TINY = ModelConfig(
    image_px=64,
    min_channels=16,
    max_channels=128,
    bottleneck_px=8,
    attention_down_px=8,
    attention_up_px=16,
)
PRESETS = {"paper": PAPER, "small": SMALL, "tiny": TINY}
