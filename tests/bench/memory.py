"""What a training step holds in memory, for each preset and for as many visits as go at once.

    python tests/bench/memory.py [--precision bf16]

`--accumulate` decides how many visits of a batch go through the networks at once. Each row is a
process of its own on the CPU: what lasts from step to step is counted from the tensors (weights of
E, G and D, their averages, Adam's moments, gradients), the step's own is what the peak of resident
memory adds to that (activations above all), and the peak is the whole process's, libraries and the
frozen perceptual network with it. Pictures are random, and so are VGG19's weights.
"""

import argparse
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from step import make_step

from train.config import PRESETS
from train.learner import make_learner

ROWS = (
    *(("paper", visits) for visits in (1, 2, 4)),
    *(("small", visits) for visits in (1, 8)),
    *(("tiny", visits) for visits in (1, 6)),
)
STEPS = 2  # Adam's moments are made in the first
MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Megabytes of a process that trains."""

    lasting: float
    own: float
    peak: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    print(f"{args.precision}    visits at once    lasting MB    step's own MB    peak MB")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for preset, visits in ROWS:
            seen = pool.apply(measure, (preset, args.precision, visits))
            print(
                f"{preset:5}{visits:17}{seen.lasting:14.0f}{seen.own:17.0f}{seen.peak:11.0f}",
                flush=True,
            )


def measure(preset: str, precision: str, visits: int) -> Memory:
    """Train for a few steps, and look at the memory of this process."""
    config = replace(PRESETS[preset], precision=precision)
    learner = make_learner(config, 16, torch.device("cpu"))
    step = make_step(learner, config, config.perceptual.name, visits, config.data.num_sources)
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for _ in range(STEPS):
        step()
    peak = resident_mb("VmHWM")
    trained = (learner.embedder, learner.generator, learner.discriminator)
    weights, averages = (
        sum(p.numel() * p.element_size() for network in networks for p in network.parameters()) / MB
        for networks in (trained, (learner.ema_embedder, learner.ema_generator))
    )
    of_training = 3 * weights  # a gradient and two moments
    return Memory(
        lasting=weights + averages + of_training, own=peak - before - of_training, peak=peak
    )


def resident_mb(field: str) -> float:
    """Read a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
