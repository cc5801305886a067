"""A meta-learned model that was never trained, small enough to make in a moment."""

from dataclasses import asdict
from pathlib import Path

import torch

from model.config import ModelConfig
from model.discriminator import Discriminator
from model.embedder import Embedder
from model.generator import Generator
from model.perceptual import make_perceptual
from pipeline.config import FaceSpec
from pipeline.crop import crop_id
from pipeline.rasterize import palette_id
from train.checkpoint import save_step
from train.config import LossWeights

MODEL = ModelConfig(
    image_px=32,
    min_channels=8,
    max_channels=24,
    bottleneck_px=8,
    attention_down_px=8,
    attention_up_px=16,
)


def face_spec(image_px: int = 48, backend: str = "null") -> FaceSpec:
    return FaceSpec(
        image_px=image_px,
        crop_margin=0.4,
        crop_rules=crop_id(),
        palette=palette_id(),
        backend=backend,
        detector="none",
        align_rules="",
        weights_sha256="",
    )


def make_base(run: Path, face: FaceSpec, *, seed: int = 0, model: ModelConfig = MODEL) -> Path:
    """Write a run folder with one checkpoint, and return it."""
    torch.manual_seed(seed)
    networks = {
        "embedder": Embedder(model),
        "generator": Generator(model),
        "discriminator": Discriminator(model),
    }
    state = {name: network.state_dict() for name, network in networks.items()}
    save_step(
        run,
        7,
        model={
            **state,
            "model": asdict(model),
            "face": face.to_dict(),
            "perceptual": {
                "name": "lite",
                "weights_sha256": make_perceptual("lite").weights_sha256,
            },
            "loss": asdict(LossWeights(l1=5.0)),
        },
        resume={},
        rows={},
        keys=[],
    )
    return run
