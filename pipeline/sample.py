"""One stored frame, and its three files in a shard: the contract between building and training.

    segment -> frames -> landmarks -> raster -> [sample] -> shard

A sample is one frame of one video. Its key is "{person}/{video}/{number:03d}" and its fields are
"jpg" (the frame), "png" (its raster) and "json" (everything else). Nothing is pickled. Keys begin
with the person and contain no dot: webdataset ends a key at the first one, and skips keys like
"__x__".
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

SCHEMA = 1
"""Version of the fields. A reader refuses any other."""

_SCHEMA_FIRST = b'{"schema":%d,' % SCHEMA

FIELDS = ("jpg", "json", "png")
"""The fields of a sample, in their order in the tar."""

THUMBNAIL_PX = 96
"""Longest side of the picture that a rejected video leaves."""

PNG_FLAGS = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
)
"""Rasters are a few flat colours: more compression hardly saves a byte, and filters add some, at
four times the cost of writing and more of reading."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An input that gave nothing: what it was, the stage that gave it up, and why."""

    id: str
    stage: str
    reason: str
    thumbnail: str = ""
    """Where frames were seen, one of them as a JPEG of about 2 kB, in base64: it travels in the
    manifest and the index, whole or not at all like everything there."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One frame of a person, cropped, with its raster.

    landmarks and box (left, top, right, bottom) are in pixels of the stored frame, landmarks in
    multiples of 1/8 px: the raster is drawn from exactly these. score is the backend's own scale.
    person, video and segment are safe ids; original is the input's file that they stand for.
    """

    person: str
    video: str
    number: int
    segment: str
    pts_s: float
    frame: UInt8[np.ndarray, "p p 3"]
    raster: UInt8[np.ndarray, "p p 3"]
    landmarks: Float32[np.ndarray, "68 2"]
    box: tuple[float, float, float, float]
    score: float
    split: str
    original: str = ""
    """The file the frame came from, relative to the input folder."""

    @property
    def key(self) -> str:
        """Name the sample as the shard does."""
        return key_of(self.person, self.video, self.number)


def key_of(person: str, video: str, number: int) -> str:
    """Name frame `number` of a video as the shard does."""
    return f"{person}/{video}/{number:03d}"


def to_fields(sample: Sample, jpeg_quality: int) -> dict[str, bytes]:
    """Encode a sample: field name -> bytes. The same sample gives the same bytes."""
    facts = {
        "schema": SCHEMA,
        "person": sample.person,
        "video": sample.video,
        "segment": sample.segment,
        "original": sample.original,
        "split": sample.split,
        "pts_s": round(sample.pts_s, 6),
        "score": round(sample.score, 4),
        "box": [round(float(v), 2) for v in sample.box],
        "landmarks": sample.landmarks.tolist(),
    }
    return {
        "jpg": _encode(sample.frame, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]),
        "json": json.dumps(facts, separators=(",", ":")).encode(),
        "png": _encode(sample.raster, ".png", PNG_FLAGS),
    }


def from_fields(key: str, fields: Mapping[str, bytes]) -> Sample:
    """Decode what `to_fields` wrote, by name. Raises ValueError naming the sample and what is
    wrong."""
    if set(fields) != set(FIELDS):
        raise ValueError(f"Sample {key} has the fields {sorted(fields)}, expected {list(FIELDS)}.")
    facts = read_facts(key, fields["json"])
    return Sample(
        person=facts["person"],
        video=facts["video"],
        number=int(key.rsplit("/", 1)[1]),
        segment=facts["segment"],
        pts_s=facts["pts_s"],
        frame=decode_picture(fields["jpg"], f"{key}.jpg"),
        raster=decode_picture(fields["png"], f"{key}.png"),
        landmarks=np.array(facts["landmarks"], np.float32),
        box=tuple(facts["box"]),
        score=facts["score"],
        split=facts["split"],
        original=facts["original"],
    )


def read_facts(key: str, data: bytes) -> dict[str, Any]:
    """Read a sample's json field and check its schema."""
    facts = json.loads(data)
    if facts.get("schema") != SCHEMA:
        raise ValueError(
            f"Sample {key} has schema {facts.get('schema')}, and this program reads {SCHEMA}. "
            "Build the shards again with this version."
        )
    return facts


def read_landmarks(key: str, data: bytes) -> Float32[np.ndarray, "68 2"]:
    """Read a sample's landmarks alone, as `read_facts` does, in half the time or less.

    As `to_fields` writes it, the json begins with the schema and ends with the landmarks, whose
    numbers then need not become Python objects.
    """
    numbers, _, rest = data.partition(b'"landmarks":[[')[2].partition(b"]]")
    if rest == b"}" and data.startswith(_SCHEMA_FIRST):
        flat = numbers.replace(b"],[", b",")
        return np.fromstring(flat, np.float32, sep=",").reshape(68, 2)
    return np.array(read_facts(key, data)["landmarks"], np.float32)


def decode_picture(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG or PNG to RGB; raises ValueError with its name when it can't be."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        raise ValueError(f"{name} holds {len(data)} bytes that are not a picture.")
    return pixels


def thumbnail_of(frame: UInt8[np.ndarray, "h w 3"]) -> str:
    """Shrink a frame for a Reject. The same frame gives the same text."""
    scale = min(1.0, THUMBNAIL_PX / max(frame.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in frame.shape[:2])
    small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    data = _encode(small.astype(np.uint8, copy=False), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 75])
    return base64.b64encode(data).decode()


def _encode(pixels: UInt8[np.ndarray, "h w 3"], suffix: str, how: Sequence[int]) -> bytes:
    """Encode an RGB picture in the format of the suffix."""
    done, data = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), how)
    assert done, f"OpenCV can't write {suffix}"
    return data.tobytes()
