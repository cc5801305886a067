"""What a meta-training run is made of, as one frozen value, and the three presets."""

from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.config import SMALL, TINY, ModelConfig
from train.rows import RowConfig

Turn = Literal["generator", "discriminator"]
Preset = Literal["paper", "small", "tiny"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a step reads."""

    num_sources: int = 8
    """K: frames that the embedder sees of a video; one more is the target."""
    batch_size: int = 8
    """Visits of all ranks in one optimiser step."""
    num_workers: int = 1
    """Processes that read ahead, on each rank; 0 reads in the training process."""
    augment: bool = False
    """Shift, turn, scale, mirror and recolour a visit's frames, all in the same way."""

    def __post_init__(self) -> None:
        for name in ("num_sources", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}: give at least 1")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The frozen network whose activations the content loss compares."""

    name: Literal["vgg", "lite"] = "vgg"
    """vgg: VGG19, and VGGFace where its file is given. lite: EfficientNet-Lite0, from a package."""
    weights_dir: str | None = None
    """Folder with torchvision's VGG19 file; torch hub's cache where not given."""
    vggface: str | None = None
    """File with the state dict of VGGFace (VGG16), which the paper adds to VGG19."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factors of the generator's terms; the perceptual network brings those of its layers."""

    content: float = 1.0
    """L_CNT, perceptual."""
    l1: float = 0.0
    """Mean |x - x_hat| of pixels in [-1, 1]; not in the paper."""
    adversarial: float = 1.0
    """-r_hat."""
    feature_matching: float = 10.0
    """L_FM, the mean over the discriminator's blocks."""
    matching: float = 10.0
    """L_MCH = |e - W_i|."""

    def __post_init__(self) -> None:
        for term, weight in vars(self).items():
            if not (weight >= 0 and isfinite(weight)):
                raise ValueError(f"loss.{term} is {weight}: give a finite weight of 0 or more")


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """Adam for both sides."""

    lr_generator: float = 5e-5
    """Learning rate of embedder and generator."""
    lr_discriminator: float = 2e-4
    """Learning rate of the discriminator."""
    beta1: float = 0.0
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-5
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        for name in ("lr_generator", "lr_discriminator", "eps"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"optimiser.{name} is {value}: give a finite number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimiser.{name} is {getattr(self, name)}: give a decay from 0 to below 1"
                )


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """Meta-train embedder, generator and discriminator on the shards of many people.

    The same command goes on where a stopped run left off.
    """

    shards: str = "data/shards"
    """Folder of shards with its index.json, from pipeline/build_shards.py."""
    # torchrun before Python 3.12 takes --run for the beginning of its own --run-path.
    run: Annotated[Path, tyro.conf.arg(name="run-dir", aliases=("--run",))] = Path("runs/meta")
    """Folder of this run: config, log, pictures, checkpoints."""
    preset: Preset = "paper"
    """Where the other settings start from: paper (256 px), small (128 px) or tiny (64 px)."""
    seed: int = 0
    """Decides the weights at the start, the order of videos and the frames drawn."""
    max_epochs: int = 75
    """Stop after so many visits of every video."""
    max_minutes: float | None = None
    """Stop, with a checkpoint, after so many minutes of this start."""
    max_steps: int | None = None
    """Stop, with a checkpoint, at this step of the whole run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    rows: RowConfig = field(default_factory=RowConfig)
    turns: tuple[Turn, ...] = ("generator", "discriminator", "discriminator")
    """The turns of one step, in order. Discriminators judge the last generator turn's picture."""
    accumulate: int = 1
    """Parts that a rank's share of a step is computed in, to save memory."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the networks; weights, losses and optimisers stay fp32."""
    channels_last: bool = True
    """Keep convolution weights and pictures in channels-last order, the faster one."""
    compile: bool = False
    """torch.compile the networks: minutes at the start, then faster steps."""
    ema: float = 0.999
    """Decay of the averaged embedder and generator that a user takes away."""
    report_every: int = 50
    """Steps between two lines of the log."""
    panel_every: int = 500
    """Steps between two panels of pictures."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; stopping makes one too."""
    keep: int = 3
    """Checkpoints that stay."""

    def __post_init__(self) -> None:
        if not self.turns or self.turns[0] != "generator":
            raise ValueError(
                f"turns are {self.turns}: begin with a generator turn, whose picture the "
                "discriminator judges"
            )
        for name in (
            "max_epochs",
            "accumulate",
            "report_every",
            "panel_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in ("max_minutes", "max_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: give more than 0, or leave it out")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: give a number from 0 to 2^63 - 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}: give a decay from 0 to below 1")


_PAPER = MetaConfig()
_SMALL = replace(
    _PAPER,
    preset="small",
    model=SMALL,
    data=DataConfig(num_sources=8, batch_size=8, augment=True),
    optimiser=OptimiserConfig(lr_generator=2e-4, lr_discriminator=4e-4, beta1=0.5),
)
_TINY = replace(
    _PAPER,
    preset="tiny",
    model=TINY,
    data=DataConfig(num_sources=4, batch_size=6, num_workers=1, augment=True),
    perceptual=PerceptualConfig(name="lite"),
    loss=LossWeights(l1=5.0, adversarial=0.2, feature_matching=20.0, matching=5.0),
    optimiser=OptimiserConfig(lr_generator=4e-4, lr_discriminator=1.6e-3, beta1=0.5),
    rows=RowConfig(lr=1e-2),
    max_epochs=100_000,
    report_every=20,
    panel_every=100,
    checkpoint_every=200,
)
PRESETS: dict[Preset, MetaConfig] = {"paper": _PAPER, "small": _SMALL, "tiny": _TINY}
