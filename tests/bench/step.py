"""How much of what this machine can multiply does a training step use?

    python tests/bench/step.py --precision bf16 fp32 --threads 2 --preset paper

The ceiling is the fastest of a few large convolutions here and now, in the same precision and on
the same threads. A step is counted in floating point operations of its matrix products and
convolutions, so norms, optimisers and everything else show as what is missing from the ceiling.
Random pictures and random weights of VGG19 take the time of real ones.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.perceptual import VGG19_MEAN, VGG19_STD, Perceptual, make_perceptual
from model.vgg import VGG, VGG19_CONVS
from train.config import PRESETS, MetaConfig
from train.data import VisitBatch
from train.learner import Learner, make_learner
from train.step import meta_step
from train.world import World

CEILING_SHAPES = ((8, 256, 64), (1, 512, 64), (8, 512, 16))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--perceptual", choices=("vgg", "lite"), default="vgg")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-sources", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="list the operators by time")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("precision  ceiling GFLOP/s  step GFLOP  step s  step GFLOP/s  share of ceiling")
    for precision in args.precision:
        config = replace(PRESETS[args.preset], precision=precision, compile=args.compile)
        learner = make_learner(config, 16, torch.device("cpu"))
        step = make_step(learner, config, args.perceptual, args.batch, args.num_sources)
        ceiling = measure_ceiling(DTYPES[precision], args.repeats)
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        work = counter.get_total_flops() / 1e9
        took = median(seconds(step) for _ in range(args.repeats))
        # Again: what else the machine does may have passed, and a low ceiling flatters the step.
        ceiling = max(ceiling, measure_ceiling(DTYPES[precision], args.repeats))
        print(
            f"{precision:9}  {ceiling:15.0f}  {work:10.0f}  {took:6.2f}  {work / took:12.0f}  "
            f"{work / took / ceiling:16.0%}"
        )
        if args.profile:
            print_profile(step)


def make_step(
    learner: Learner, config: MetaConfig, loss: str, num_visits: int, num_sources: int
) -> Callable[[], object]:
    """Return the whole step on one batch: all turns, updates and averages."""
    if config.compile:
        for network in (learner.embedder, learner.generator, learner.discriminator):
            network.compile()
    perceptual = random_vgg() if loss == "vgg" else make_perceptual("lite")
    perceptual = perceptual.to(memory_format=torch.channels_last)  # pyright: ignore
    batch = random_batch(num_visits, num_sources, config.model.image_px)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    return lambda: meta_step(learner, [batch], config, perceptual=perceptual, world=world)


def random_vgg() -> Perceptual:
    network = VGG(VGG19_CONVS, scale=1.0, mean=VGG19_MEAN, std=VGG19_STD)
    return Perceptual("vgg", [network], (1.0,) * 5, {})


def random_batch(num_visits: int, num_sources: int, image_px: int) -> VisitBatch:
    def pictures(*lead: int) -> torch.Tensor:
        return torch.rand(num_visits, *lead, 3, image_px, image_px) * 2 - 1

    return VisitBatch(
        rows=torch.arange(num_visits),
        sources=pictures(num_sources),
        source_rasters=pictures(num_sources),
        target=pictures(),
        target_raster=pictures(),
        keys=tuple(f"person/{number}" for number in range(num_visits)),
    )


@torch.no_grad()
def measure_ceiling(dtype: torch.dtype, repeats: int) -> float:
    """Return the rate, in GFLOP/s, of the fastest large convolution."""
    best = 0.0
    for batch, channels, side in CEILING_SHAPES:
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(
            dtype=dtype, memory_format=torch.channels_last
        )
        x = torch.randn(batch, channels, side, side).to(
            dtype=dtype, memory_format=torch.channels_last
        )
        conv(x)
        work = 2 * 9 * channels**2 * batch * side**2 / 1e9
        fastest = min(seconds(lambda conv=conv, x=x: conv(x)) for _ in range(2 * repeats))
        best = max(best, work / fastest)
    return best


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def print_profile(step: Callable[[], object]) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    table = profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40
    )
    print(table)


if __name__ == "__main__":
    main()
