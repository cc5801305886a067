"""How fast the reader is, against the limit that storage and JPEG decoding set on one core.

    python tests/bench/reader.py [--shards DIR]

The limit is a bare loop: read each video's bytes, decode the same K + 1 JPEGs, and nothing else.
The reader also checks what it reads, takes the tar apart, parses landmarks and draws rasters;
target: 80 % of the limit. The first time a process reads a video, it checks all of its span.

Other work on the machine empties the caches, which costs the reader more than the limit. So all
take turns, visit by visit, and of each visit the best of several rounds counts.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import tyro
from skimage.data import astronaut

from pipeline.align import NullAligner, template
from pipeline.config import CropConfig
from pipeline.faces import face_spec
from pipeline.rasterize import draw, draw_each, round_points
from pipeline.sample import Sample, decode_picture, read_landmarks
from pipeline.shard import (
    FrameReader,
    Index,
    VideoEntry,
    pack_shard,
    read_span,
    tar_name,
    write_packed,
)
from train.data import Shards, make_loader, start_worker
from train.order import visit

NUM_SOURCES = 8
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the reader against its limit."""

    shards: Path | None = None
    """Folder of shards; without it, 40 videos of 32 frames at 256 px are made from a photo."""
    rounds: int = 60
    """Times each is run."""
    visits: int = 24
    """Visits in a round."""


def make_photo_shards(folder: Path, *, num_videos: int = 40, px: int = 256) -> None:
    """Write one shard of videos that pan over a photo, in place of footage."""
    photo = cv2.resize(astronaut(), (px + 64, px + 64), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(SEED).integers(0, 12, (px, px, 3), np.uint8)
    videos = []
    for video in range(num_videos):
        samples = []
        for number in range(32):
            points = round_points((0.2 + 0.6 * template() + (0.1 * number / 32, 0)) * px)
            frame = photo[video : video + px, 2 * number : 2 * number + px] // 2 + noise
            samples.append(
                Sample(
                    person=f"p{video:03d}",
                    video="v",
                    number=number,
                    segment="s",
                    pts_s=number / 25,
                    frame=frame,
                    raster=draw(points, px),
                    landmarks=points,
                    box=(0.0, 0.0, 1.0, 1.0),
                    score=1.0,
                    split="train",
                )
            )
        videos.append(samples)
    packed = pack_shard("shard", videos, 95)
    write_packed(str(folder), packed)
    face = face_spec(NullAligner(), CropConfig(image_px=px))
    Index.of([packed.manifest], face, config={}, provenance={}).save(str(folder))


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A visit to measure, and what the parts of reading it alone need."""

    entry: VideoEntry
    numbers: tuple[int, ...]
    path: Path
    places: tuple[tuple[int, int], ...]
    """Where in the video's span the JPEGs start and end."""
    samples: list[dict[str, bytes]]
    landmarks: np.ndarray


Run = Callable[[Turn], object]


def make_turns(shards: Shards, num_visits: int) -> list[Turn]:
    """Find out beforehand what the limit and the single parts are spared."""
    frames = shards.frames_for_training(NUM_SOURCES)
    turns = []
    for number in range(num_visits):
        drawn = visit(number, frames=frames, num_sources=NUM_SOURCES, seed=SEED)
        entry, numbers = shards.train[drawn.video], (*drawn.sources, drawn.target)
        span = read_span(shards.folder, entry)
        samples = shards.frame_reader.read(entry, numbers)
        starts = [span.index(fields["jpg"]) for fields in samples]
        turns.append(
            Turn(
                entry=entry,
                numbers=numbers,
                path=Path(shards.folder) / tar_name(entry.shard),
                places=tuple(
                    (start, start + len(fields["jpg"]))
                    for start, fields in zip(starts, samples, strict=True)
                ),
                samples=samples,
                landmarks=np.stack([read_landmarks("", fields["json"]) for fields in samples]),
            )
        )
    return turns


def limit(turn: Turn) -> None:
    """Read the bytes and decode the JPEGs; where they lie was found out beforehand."""
    descriptor = os.open(turn.path, os.O_RDONLY)
    span = os.pread(descriptor, turn.entry.num_bytes, turn.entry.offset)
    os.close(descriptor)
    for start, end in turn.places:
        cv2.imdecode(np.frombuffer(span[start:end], np.uint8), cv2.IMREAD_COLOR)


def decode(turn: Turn) -> None:
    for fields in turn.samples:
        decode_picture(fields["jpg"], "")


def parse(turn: Turn) -> None:
    for fields in turn.samples:
        read_landmarks("", fields["json"])


def costs_ms(runs: Mapping[str, Run], turns: Sequence[Turn], rounds: int) -> dict[str, float]:
    """Return the CPU time of a visit for each of the runs."""
    best = {name: [math.inf] * len(turns) for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for place, turn in enumerate(turns):
                started = time.thread_time_ns()
                run(turn)
                took = time.thread_time_ns() - started
                best[name][place] = min(best[name][place], took)
    return {name: mean(times) / 1e6 for name, times in best.items()}


def main() -> None:
    settings = tyro.cli(Settings)
    start_worker()
    with TemporaryDirectory() as temporary:
        folder = settings.shards or Path(temporary)
        if settings.shards is None:
            make_photo_shards(folder)
        px = Index.load(str(folder)).face.image_px
        shards = Shards(folder, image_px=px)
        turns = make_turns(shards, settings.visits)
        batches = make_loader(shards, num_sources=NUM_SOURCES, batch_size=1, seed=SEED)
        runs: dict[str, Run] = {
            "limit": limit,
            "reader": lambda turn: shards.read(turn.entry, turn.numbers),
            "decode": decode,
            "frames": lambda turn: shards.frame_reader.read(turn.entry, turn.numbers),
            "landmarks": parse,
            "rasters": lambda turn: draw_each(turn.landmarks, px),
            "first": lambda turn: FrameReader(shards.folder).read(turn.entry, turn.numbers),
            "sha256": lambda turn: read_span(shards.folder, turn.entry),
            "tensors": lambda _: next(batches),
        }
        ms = costs_ms(runs, turns, settings.rounds)
    parts = ("decode", "frames", "landmarks", "rasters")
    rest = ms["reader"] - sum(ms[part] for part in parts)
    first = ms["reader"] - ms["frames"] + ms["first"]
    count = NUM_SOURCES + 1
    print(
        f"CPU time of a visit on one core, best of {settings.rounds}, mean of {len(turns)} visits"
    )
    print(f"{ms['limit']:7.2f} ms  limit: read the span, decode {count} JPEGs")
    print(f"{ms['reader']:7.2f} ms  reader: all of it, to the bytes a worker hands over")
    print(f"{ms['decode']:7.2f} ms    decode {count} JPEGs to RGB")
    print(f"{ms['frames']:7.2f} ms    read {count} frames, crc32, tar")
    print(f"{ms['landmarks']:7.2f} ms    landmarks from json")
    print(f"{ms['rasters']:7.2f} ms    rasters")
    print(f"{rest:7.2f} ms    the rest: pictures into place, caches that the parts share")
    print(f"{first:7.2f} ms  reader, the first time it reads a video")
    print(f"{ms['sha256']:7.2f} ms    read the span, sha256")
    print(f"{ms['first'] - ms['sha256']:7.2f} ms    crc32 of all frames, tar")
    print(f"{ms['tensors']:7.2f} ms  reader in the training process, to floats on the CPU")
    bound = "JPEG decoding" if 2 * ms["decode"] > ms["reader"] else "what is around JPEG decoding"
    print(
        f"reader: {ms['limit'] / ms['reader']:.0%} of the limit "
        f"({ms['limit'] / first:.0%} the first time), bound by {bound}"
    )


if __name__ == "__main__":
    main()
