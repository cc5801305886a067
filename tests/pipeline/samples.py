"""Made-up samples, the same ones each time; and shards of such."""

from collections.abc import Iterable

import numpy as np

from pipeline.config import FaceSpec
from pipeline.sample import Sample
from pipeline.shard import Manifest, Outcome, pack_shard, write_packed

SPEC = FaceSpec(
    image_px=48,
    crop_margin=0.4,
    crop_rules="c",
    palette="p",
    backend="null",
    detector="none",
    align_rules="",
    weights_sha256="",
)


def make_sample(person: str = "ann", video: str = "talk", number: int = 0, px: int = 48) -> Sample:
    """Make one sample whose content follows from its name and number."""
    rng = np.random.default_rng([*person.encode(), *video.encode(), number])
    return Sample(
        person=person,
        video=video,
        number=number,
        segment="00001",
        pts_s=number / 25,
        frame=np.full((px, px, 3), rng.integers(40, 200, 3), np.uint8),
        raster=rng.integers(0, 2, (px, px, 3), np.uint8) * np.uint8(255),
        landmarks=(rng.integers(0, 8 * px, (68, 2)) / 8).astype(np.float32),
        box=(1.25, 2.5, 40.0, 41.0),
        score=0.75,
        split="train",
        original=f"{person}/{video}/00001.mp4",
    )


def make_video(person: str, video: str, num_frames: int) -> list[Sample]:
    """Make a video's samples."""
    return [make_sample(person, video, number) for number in range(num_frames)]


def write_shard(folder: str, name: str, videos: Iterable[Outcome], jpeg_quality: int) -> Manifest:
    """Make a shard of samples and write it."""
    packed = pack_shard(name, videos, jpeg_quality)
    write_packed(folder, packed)
    return packed.manifest
