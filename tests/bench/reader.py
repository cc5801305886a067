"""How fast the reader is, against the limit that storage and JPEG decoding set on one core.

    python tests/bench/reader.py [--shards DIR]

The limit is a bare loop: read each video's bytes, decode the same K + 1 JPEGs, and nothing else.
The reader also checks the sha256, takes the tar apart, parses landmarks and draws rasters. All run
on one core and the best of several rounds counts; target: 80 % of the limit.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import tyro
from skimage.data import astronaut

from pipeline.rasterize import draw
from pipeline.sample import Sample
from pipeline.shard import Index, read_span, samples_in_span
from tests.pipeline.samples import write_shard
from tests.train.bases import face_spec
from tests.train.shards import face_points
from train.data import Shards, make_loader, start_worker
from train.order import visit

Loop = Callable[[Shards, int], None]
NUM_SOURCES = 8
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the reader against its limit."""

    shards: Path | None = None
    """Folder of shards; without it, 40 videos of 32 frames at 256 px are made from a photo."""
    rounds: int = 7
    """Times each loop is run."""
    visits: int = 64
    """Visits in a run."""


def make_photo_shards(folder: Path, *, num_videos: int = 40, px: int = 256) -> None:
    """Write one shard of videos that pan over a photo, in place of footage."""
    photo = cv2.resize(astronaut(), (px + 64, px + 64), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(SEED).integers(0, 12, (px, px, 3), np.uint8)
    videos = []
    for video in range(num_videos):
        samples = []
        for number in range(32):
            points = face_points(px, shift=0.1 * number / 32)
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
    manifest = write_shard(str(folder), "shard", videos, 95)
    Index.of([manifest], face_spec(px), config={}, provenance={}).save(str(folder))


def limit(shards: Shards, num_visits: int) -> None:
    """Read the bytes and decode the JPEGs; where they lie was found out beforehand."""
    for path, offset, num_bytes, pictures in _places(shards, num_visits):
        descriptor = os.open(path, os.O_RDONLY)
        span = os.pread(descriptor, num_bytes, offset)
        os.close(descriptor)
        for start, end in pictures:
            cv2.imdecode(np.frombuffer(span[start:end], np.uint8), cv2.IMREAD_COLOR)


def reader(shards: Shards, num_visits: int) -> None:
    """Read visits as a worker does, up to the bytes that it hands over."""
    frames = shards.frames_for_training(NUM_SOURCES)
    for number in range(num_visits):
        drawn = visit(number, frames=frames, num_sources=NUM_SOURCES, seed=SEED)
        shards.read(shards.train[drawn.video], [*drawn.sources, drawn.target])


def tensors(shards: Shards, num_visits: int) -> None:
    """Read whole batches in the training process, tensors on the CPU and all."""
    loader = make_loader(shards, num_sources=NUM_SOURCES, batch_size=8, seed=SEED)
    for _ in islice(loader, num_visits // 8):
        pass


def checks(shards: Shards, num_visits: int) -> None:
    """Read the bytes and check their sha256, nothing else."""
    frames = shards.frames_for_training(NUM_SOURCES)
    for number in range(num_visits):
        drawn = visit(number, frames=frames, num_sources=NUM_SOURCES, seed=SEED)
        read_span(shards.folder, shards.train[drawn.video])


Place = tuple[Path, int, int, list[tuple[int, int]]]
_known: dict[int, list[Place]] = {}


def _places(shards: Shards, num_visits: int) -> list[Place]:
    """Find the spans of each visit's JPEGs inside its video's bytes."""
    if num_visits not in _known:
        frames = shards.frames_for_training(NUM_SOURCES)
        places = []
        for number in range(num_visits):
            drawn = visit(number, frames=frames, num_sources=NUM_SOURCES, seed=SEED)
            entry = shards.train[drawn.video]
            span = read_span(shards.folder, entry)
            samples = samples_in_span(span)
            pictures = []
            for n in (*drawn.sources, drawn.target):
                start = span.index(samples[n]["jpg"])
                pictures.append((start, start + len(samples[n]["jpg"])))
            path = Path(shards.folder) / f"{entry.shard}.tar"
            places.append((path, entry.offset, entry.num_bytes, pictures))
        _known[num_visits] = places
    return _known[num_visits]


def cost_ms(run: Loop, shards: Shards, num_visits: int) -> float:
    """Return the CPU time of one visit: other work on the machine doesn't count."""
    started = time.process_time()
    run(shards, num_visits)
    return 1000 * (time.process_time() - started) / num_visits


def main() -> None:
    settings = tyro.cli(Settings)
    start_worker()
    with TemporaryDirectory() as temporary:
        folder = settings.shards or Path(temporary)
        if settings.shards is None:
            make_photo_shards(folder)
        shards = Shards(folder, image_px=Index.load(str(folder)).face.image_px)
        loops: dict[str, Loop] = {
            "limit": limit,
            "checks": checks,
            "reader": reader,
            "tensors": tensors,
        }
        costs = {
            name: min(cost_ms(loop, shards, settings.visits) for _ in range(settings.rounds))
            for name, loop in loops.items()
        }
    share = costs["limit"] / costs["reader"]
    print("CPU time of a visit on one core, best of", settings.rounds)
    print(f"  limit   {costs['limit']:6.2f} ms  read the span, decode {NUM_SOURCES + 1} JPEGs")
    print(f"  checks  {costs['checks']:6.2f} ms  read the span, sha256")
    print(f"  reader  {costs['reader']:6.2f} ms  all of it, to the bytes a worker hands over")
    print(f"  tensors {costs['tensors']:6.2f} ms  the same in one process, to floats on the CPU")
    bound = "JPEG decoding" if share > 0.5 else "what is around JPEG decoding"
    print(f"reader: {share:.0%} of the limit, bound by {bound}")


if __name__ == "__main__":
    main()
