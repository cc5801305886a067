"""Frames that nobody filmed, and faces in them."""

from pathlib import Path

import cv2
import numpy as np
from skimage.data import astronaut

from pipeline.align import Landmarks, template
from pipeline.decode import SegmentFrames, iter_frames

TALKER = Path(__file__).parents[2] / "data/demo/videos/single_face/single_face.mp4"


def scene(seed: int, num_frames: int, height: int = 90, width: int = 120) -> np.ndarray:
    """A blurred random backdrop that gets a little lighter from frame to frame."""
    rng = np.random.default_rng(seed)
    backdrop = cv2.resize(rng.integers(0, 200, (6, 8, 3), np.uint8), (width, height))
    return np.stack([backdrop + np.uint8(4 * i) for i in range(num_frames)])


def face_at(num_frames: int, left: float = 35, top: float = 20, side: float = 50) -> Landmarks:
    """The same face in the same place in each frame."""
    points = template() * side + np.array([left, top])
    box = np.array([left, top, left + side, top + side])
    return Landmarks(
        points=np.repeat(points[None], num_frames, axis=0).astype(np.float32),
        boxes=np.repeat(box[None], num_frames, axis=0).astype(np.float32),
        scores=np.linspace(0.5, 1, num_frames).astype(np.float32),
        found=np.ones(num_frames, np.bool_),
    )


def segment(pixels: np.ndarray, name: str = "s", fps: float = 4.0) -> SegmentFrames:
    return SegmentFrames(
        segment=name, pixels=pixels, pts_s=np.arange(len(pixels)) / fps, original=f"{name}.mp4"
    )


def astronaut_sways(num_frames: int) -> list[np.ndarray]:
    """Head and shoulders of one person, h 210, w 240, moved about by a few pixels."""
    tops = [round(6 + 5 * np.sin(i / 3)) for i in range(num_frames)]
    lefts = [round(105 + 8 * np.cos(i / 5)) for i in range(num_frames)]
    return [astronaut()[y : y + 210, x : x + 240] for y, x in zip(tops, lefts, strict=True)]


def other_talks(num_frames: int) -> list[np.ndarray]:
    """Head and shoulders of another, just as large, forwards and backwards in turn."""
    frames = [pixels[4:214, 55:295] for pixels, _ in iter_frames(TALKER, 380)]
    loop = frames + frames[-2:0:-1]
    return [loop[3 * i % len(loop)] for i in range(num_frames)]
