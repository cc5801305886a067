"""Shards -> a meta-learned model.

    torchrun train/meta_train.py                                # data/shards -> runs/meta
    torchrun --nproc-per-node 8 train/meta_train.py --shards s3://bucket/shards --run-dir runs/vox
    torchrun train/meta_train.py --preset tiny --max-minutes 2         # a first look on a CPU

Stopped by Ctrl-C, SIGTERM or --max-minutes, it leaves a checkpoint, from which the same command
goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import tyro

from pipeline.storage import hold
from train.config import PRESETS, MetaConfig
from train.entry import said_plainly
from train.loop import primitives, train
from train.world import connect


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, train, and say where the model is."""
    with said_plainly("meta_train"), connect() as world:
        config = parse(sys.argv[1:] if argv is None else argv)
        if world.is_main:
            print(json.dumps(primitives(config), indent=2), flush=True)
        with hold(str(config.run), "--run-dir") if world.is_main else nullcontext():
            folder = train(config, world)
        if world.is_main:
            print(f"model      {folder / 'model.pt'}")
            print(f"pictures   {config.run / 'panel-train.png'}  {config.run / 'panel-val.png'}")
            print(f"log        {config.run / 'log.jsonl'}  tensorboard --logdir {config.run}")


def parse(argv: Sequence[str]) -> MetaConfig:
    """Read the flags over the preset that they name."""
    chosen, _ = _preset_parser().parse_known_args(list(argv))
    return tyro.cli(
        MetaConfig,
        args=list(argv),
        default=PRESETS[chosen.preset],
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )


def _preset_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(PRESETS), default="paper")
    return parser


if __name__ == "__main__":
    main()
