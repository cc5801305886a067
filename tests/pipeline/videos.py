"""Small test videos of every kind that the pipeline meets, made with PyAV."""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 96, 64


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Draw frame `number`: a bright square that moves right, over a red-left, blue-bottom gradient.

    The column of the square's left edge is 2 * number, modulo the width less the square's side.
    """
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(160, 20, width).astype(np.uint8)
    pixels[..., 2] = np.linspace(20, 160, height).astype(np.uint8)[:, None]
    side = height // 4
    left = 2 * number % (width - side)
    pixels[side : 2 * side, left : left + side] = 255
    return pixels


def noisy(seed: int, num_frames: int = 25, width: int = 96, height: int = 80) -> list[np.ndarray]:
    """Draw pictures no two of which are the same, with no jump between them."""
    rng = np.random.default_rng(seed)
    drawn = [picture(i // 6, width, height).astype(int) for i in range(num_frames)]
    shapes = [p + rng.integers(-40, 40, (height, width, 3)) for p in drawn]
    return [np.clip(p, 0, 255).astype(np.uint8) for p in shapes]


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray] | None = None,
    *,
    num_frames: int = 30,
    rate: int = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts_ms: Sequence[int] | None = None,
    key_every: int = 12,
    pixel_shape: Fraction | None = None,
    sound: bool = False,
    faststart: bool = False,
) -> Path:
    """Write a video; pts_ms gives each frame its time, for a rate that varies."""
    pictures = [picture(i) for i in range(num_frames)] if pictures is None else pictures
    options = {"movflags": "faststart"} if faststart else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with usual_priority(), av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=1000 if pts_ms else rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.gop_size = key_every
        stream.codec_context.thread_count = 1  # with more, the bytes depend on their timing
        if pixel_shape is not None:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        tone = container.add_stream("aac", rate=16000) if sound else None
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = pts_ms[number] if pts_ms else number
            frame.time_base = Fraction(1, 1000 if pts_ms else rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if tone is not None:
            _write_sound(container, tone)
    return path


@contextlib.contextmanager
def usual_priority() -> Iterator[None]:
    """Undo what SVT-AV1's encoder does to the thread of a root user: real time, before all else.

    Processes that it starts would inherit that, and those that wait for each other never end.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def write_sound(path: Path) -> Path:
    """Write a file with sound and no picture."""
    with av.open(str(path), "w") as container:
        _write_sound(container, container.add_stream("aac", rate=16000))
    return path


def _write_sound(container, stream) -> None:
    for block in range(16):
        samples = np.sin(np.arange(1024) * 0.1).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, block * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def rotate(path: Path, degrees: int) -> Path:
    """Mark an mp4 as to be turned clockwise by 0, 90, 180 or 270 degrees when shown."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    data = bytearray(path.read_bytes())
    track = data.index(b"tkhd")
    matrix = data.index(plain, track)
    data[matrix : matrix + len(turned)] = turned
    path.write_bytes(data)
    return path


def truncate(path: Path, share: float) -> Path:
    """Cut a file off after a share of its bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def flip_bits(path: Path, start: float, end: float, every: int = 7) -> Path:
    """Invert every so many bytes of an mp4's media data between two shares of it."""
    data = bytearray(path.read_bytes())
    first = data.index(b"mdat") + 4
    length = int.from_bytes(data[first - 8 : first - 4], "big") - 8
    for i in range(first + int(length * start), first + int(length * end), every):
        data[i] ^= 0xFF
    path.write_bytes(data)
    return path
