"""VGG up to relu5_1, for the content loss (Simonyan and Zisserman 2015)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Convolutions in each stage; the last is cut after its first, as relu5_1 is the last compared.
VGG19_CONVS = (2, 2, 4, 4, 1)
VGG16_CONVS = (2, 2, 3, 3, 1)
WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Frames in [-1, 1] -> relu1_1, relu2_1, relu3_1, relu4_1, relu5_1.

    `scale`, `mean` and `std` are the input the weights were trained for: frames in 0..scale, less
    the mean, over the deviation, channels in RGB order.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        convs: tuple[int, ...],
        *,
        scale: float,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ):
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.convs = nn.ModuleDict(
            {
                name: nn.Conv2d(*channels, 3, padding=1)
                for name, channels in conv_channels(convs).items()
            }
        )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        hidden = ((x + 1) * (self.scale / 2) - self.mean) / self.std
        layers = []
        for name, conv in self.convs.items():
            starts_stage = name.endswith("_1")
            if starts_stage and layers:
                hidden = F.max_pool2d(hidden, 2)
            hidden = F.relu(conv(hidden))
            if starts_stage:
                layers.append(hidden)
        return tuple(layers)


def conv_channels(convs: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Channels in and out of every convolution, by its name in the VGG paper's notation."""
    channels = {}
    last = 3
    for stage, (num_convs, width) in enumerate(zip(convs, WIDTHS, strict=True), start=1):
        for number in range(1, num_convs + 1):
            channels[f"conv{stage}_{number}"] = (last, width)
            last = width
    return channels


def vgg_state(state: Mapping[str, Tensor], convs: tuple[int, ...]) -> dict[str, Tensor]:
    """Pick this network's tensors out of the state dict of a whole VGG.

    Both usual namings are read: torchvision's (`features.0.weight`, where ReLU and pooling count)
    and the paper's (`conv1_1.weight`). What is missing is left to a strict load to name.
    """
    picked = {}
    index = 0
    for name in conv_channels(convs):
        if name.endswith("_1") and name != "conv1_1":
            index += 1
        for kind in ("weight", "bias"):
            for key in (f"features.{index}.{kind}", f"{name}.{kind}"):
                if key in state:
                    picked[f"convs.{name}.{kind}"] = state[key]
        index += 2
    return picked
