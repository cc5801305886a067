"""Small shards of synthetic samples: five persons, two videos each, unequal counts of frames."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from pipeline.config import FaceSpec
from pipeline.rasterize import draw, round_points
from pipeline.sample import Sample
from pipeline.shard import Index
from tests.pipeline.samples import write_shard
from tests.train.bases import face_spec

PERSONS = ("ada", "bob", "cyd", "dan", "eve")
NUM_FRAMES = (17, 19, 16, 18, 21, 16, 18, 20, 24, 26)
HELD_OUT = "eve"


def face_points(image_px: int, shift: float = 0.0) -> Float32[np.ndarray, "68 2"]:
    """Return 68 points in the rough places of a face, moved right by `shift` of the picture."""
    parts = [
        (17, 0.50, 0.45, 0.30, 0.38, 0.0, np.pi),  # jaw
        (5, 0.36, 0.36, 0.10, 0.03, np.pi, 2 * np.pi),
        (5, 0.64, 0.36, 0.10, 0.03, np.pi, 2 * np.pi),
        (4, 0.50, 0.48, 0.01, 0.09, -np.pi / 2, np.pi / 2),
        (5, 0.50, 0.57, 0.07, 0.02, np.pi, 0.0),
        (6, 0.38, 0.43, 0.06, 0.03, np.pi, -np.pi * 2 / 3),
        (6, 0.62, 0.43, 0.06, 0.03, np.pi, -np.pi * 2 / 3),
        (12, 0.50, 0.70, 0.12, 0.05, np.pi, -np.pi * 5 / 6),
        (8, 0.50, 0.70, 0.08, 0.02, np.pi, -np.pi * 3 / 4),
    ]
    rows = [
        np.stack([x + w * np.cos(t), y + h * np.sin(t)], axis=1)
        for n, x, y, w, h, first, last in parts
        for t in [np.linspace(first, last, n)]
    ]
    return round_points((np.concatenate(rows) + np.array([shift, 0])) * image_px)


def face_frame(
    points: Float32[np.ndarray, "68 2"], image_px: int, colour: Sequence[int]
) -> UInt8[np.ndarray, "p p 3"]:
    """Paint a flat face of a colour under the points."""
    frame = np.full((image_px, image_px, 3), 255 - np.array(colour), np.uint8)
    hull = cv2.convexHull(points.round().astype(np.int32))
    cv2.fillConvexPoly(frame, hull, [int(c) for c in colour])
    return cv2.addWeighted(frame, 0.8, draw(points, image_px), 0.2, 0)


def make_samples(person: str, video: str, split: str, num_frames: int, px: int) -> list[Sample]:
    """Make a video whose face moves to the right, in a colour of the person's own."""
    place = PERSONS.index(person) if person in PERSONS else 7
    shade = 40 * int(video.endswith("2"))
    colour = (30 + 40 * place, 200 - 35 * place, 60 + shade)
    samples = []
    for number in range(num_frames):
        points = face_points(px, shift=0.12 * (number / num_frames - 0.5))
        frame = face_frame(points, px, colour)
        frame[:4, :4] = 8 * number  # a mark that says which frame this is
        samples.append(
            Sample(
                person=person,
                video=video,
                number=number,
                segment="a",
                pts_s=number / 25,
                frame=frame,
                raster=draw(points, px),
                landmarks=points,
                box=(1.0, 2.0, px - 1.0, px - 2.0),
                score=0.5,
                split=split,
            )
        )
    return samples


def make_shards(
    folder: Path,
    *,
    persons: Sequence[str] = PERSONS,
    held_out: str = HELD_OUT,
    face: FaceSpec | None = None,
) -> Index:
    """Write the shards of these persons, two persons a shard, with their index."""
    face = face or face_spec()
    counts = iter(NUM_FRAMES)
    by_person = {
        person: [
            make_samples(
                person,
                f"v{n}",
                "val" if person == held_out else "train",
                next(counts),
                face.image_px,
            )
            for n in (1, 2)
        ]
        for person in persons
    }
    manifests = [
        write_shard(
            str(folder),
            f"shard-{start // 2:04d}",
            [video for person in persons[start : start + 2] for video in by_person[person]],
            95,
        )
        for start in range(0, len(persons), 2)
    ]
    index = Index.of(manifests, face, config={}, provenance={})
    index.save(str(folder))
    return index
