"""Make the reference curve: every weighted loss over 20 steps of a small model on synthetic shards.

    python -m tests.golden.make_curve

Writes curve.txt beside itself. A refactor leaves it unchanged; a change of behaviour makes it again
and says so.
"""

import json
import tempfile
from pathlib import Path

import torch

from tests.train.bases import MODEL
from tests.train.shards import make_shards
from train.config import DataConfig, LossWeights, MetaConfig, OptimiserConfig, PerceptualConfig
from train.loop import train
from train.world import World

CURVE = Path(__file__).with_name("curve.txt")
TERMS = ("content", "l1", "adversarial", "feature_matching", "matching", "hinge")


def run(folder: Path) -> list[list[float]]:
    """Train 20 steps in a folder and return a row of weighted losses for each."""
    make_shards(folder / "shards")
    config = MetaConfig(
        shards=str(folder / "shards"),
        run=folder / "run",
        model=MODEL,
        data=DataConfig(num_sources=3, batch_size=4, num_workers=0, augment=True),
        perceptual=PerceptualConfig(name="lite"),
        loss=LossWeights(l1=2.0, matching=0.2),
        optimiser=OptimiserConfig(lr_generator=2e-4, lr_discriminator=2e-4, beta1=0.5),
        precision="fp32",
        max_steps=20,
        report_every=1,
    )
    train(config, World(rank=0, size=1, device=torch.device("cpu")))
    lines = map(json.loads, (config.run / "log.jsonl").read_text().splitlines())
    reports = [line for line in lines if "loss/content" in line]  # not the looks at held-out people
    return [[line[f"loss/{term}"] for term in TERMS] for line in reports]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder))
    lines = [" ".join(TERMS), *(" ".join(f"{value:.4g}" for value in row) for row in rows)]
    CURVE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
