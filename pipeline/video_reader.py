"""A video file as a player would show it: opened, sought, its frames in order, and their pixels.

A frame is named by its pts, in seconds from the start of the picture track. The frame shown at a
time t is the last one whose pts is not after t: the same one whether it was reached by decoding
from the start or by seeking. Rotation and the shape of pixels, which the decoder leaves to the
player, are applied.
"""

import contextlib
import errno
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from pipeline.storage import TRANSIENT, StorageError, is_remote, open_file, store_errors

SEEK_GAP_S = 12.0
"""Seek when the next wanted frame is further away than this. Encoders put a key frame every 10 s or
sooner, so a nearer one is reached sooner by decoding on."""

SEEK_STEPS_S = (0.0, 1.0, 15.0)
"""How much earlier to try when a seek landed behind its target, as loose indices make it do."""

UNINDEXED = frozenset(["mpeg", "mpegts", "mpegvideo", "h264", "hevc", "m4v"])
"""Formats that are a stream of packets: what they say of their length is a guess."""

MIN_LENGTH_S = 1e-3
"""A file with a single picture may have no length."""

# Flags for the same bytes with and without SIMD, where swscale's own choice differs.
SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

Timed = tuple[VideoFrame, float]
"""A frame as the decoder gave it, and its pts in seconds."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file says about its picture track, and whether it has sound."""

    fps: float
    duration_s: float
    has_audio: bool


class UnreadableError(ValueError):
    """A file can't be used as a video, for a reason that another try won't change."""


def video_info(path: str | Path) -> VideoInfo:
    """Read rate, duration and whether there is sound; raises ValueError for what isn't a video."""
    with open_video(str(path)) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        return VideoInfo(
            fps=float(rate),
            duration_s=_duration_s(container, stream),
            has_audio=bool(container.streams.audio),
        )


@contextlib.contextmanager
def open_video(address: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file at its picture track; raises UnreadableError for what has none."""
    with contextlib.ExitStack() as stack:
        with _as_unreadable(address):
            source = address
            if is_remote(address):
                source = stack.enter_context(open_file(address))
            elif not stat.S_ISREG((facts := Path(address).stat()).st_mode):
                raise UnreadableError("not a file, but a folder, pipe or device")
            elif facts.st_size == 0:
                raise UnreadableError("the file is empty (0 bytes)")
            container = stack.enter_context(av.open(source, "r"))
        tracks = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not tracks:
            raise UnreadableError("no picture track in the file, only sound or data")
        tracks[0].thread_type = "NONE"  # one thread: a node runs one decoder a core
        try:
            yield container, tracks[0]
        except store_errors() as error:
            # What isn't libav's own comes from reading an object store.
            if isinstance(error, av.error.FFmpegError):
                raise
            raise StorageError(f"Can't read {address}: {error}") from error


@contextlib.contextmanager
def _as_unreadable(address: str) -> Iterator[None]:
    """Turn the errors of opening a file into UnreadableError, or StorageError where it is to
    blame."""
    try:
        yield
    except av.error.InvalidDataError:
        raise UnreadableError("not a video, or its header is cut off or damaged") from None
    except av.error.FFmpegError as error:
        _blame_storage(address, error)
        raise UnreadableError(f"can't be opened: {error.strerror}") from None
    except store_errors() as error:
        if is_remote(address):
            raise StorageError(f"Can't read {address}: {error}") from error
        _blame_storage(address, error)
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"can't be opened: {reason}") from None


def _blame_storage(address: str, error: Exception) -> None:
    """Raise StorageError if the file's bytes can't be read; damaged files give the same errors."""
    if is_remote(address):
        return
    number = getattr(error, "errno", None)
    if number == errno.ENOENT and not os.path.lexists(address):
        raise StorageError(
            f"{address} was there when the job was planned, and is not: is its folder mounted here?"
        ) from error
    if number not in TRANSIENT:
        return
    try:
        with Path(address).open("rb") as file:
            while file.read(1 << 22):
                pass
    except OSError as failure:
        raise StorageError(f"Can't read {address}: {failure.strerror}.") from failure


@contextlib.contextmanager
def flow_at(address: str, time_s: float) -> Iterator[tuple["Flow", VideoStream]]:
    """Open a file where the frame shown at time_s will come by: sought, or from the start."""
    steps = SEEK_STEPS_S if time_s > SEEK_GAP_S else ()
    for step_s in (*steps, None):
        with open_video(address) as (container, stream):
            if step_s is not None and stream.time_base:
                ticks = int(max(0.0, time_s - step_s) / stream.time_base)
                with _as_unreadable(address):
                    container.seek(ticks + (stream.start_time or 0), stream=stream)
            flow = Flow(container, stream)
            if step_s is None or flow.peek_s() <= time_s:
                yield flow, stream
                return


def shown_at(flow: "Flow", times_s: Sequence[float]) -> Iterator[Timed]:
    """Yield the frame on screen at each of the sorted times; nothing for times inside a hole."""
    waiting = list(reversed(times_s))
    on_screen: Timed | None = None
    hole = False
    for item in flow:
        if item is None:
            on_screen, hole = None, True
            continue
        while waiting and waiting[-1] < item[1]:
            waiting.pop()
            if on_screen or not hole:
                yield on_screen or item
        if not waiting:
            return
        on_screen, hole = item, False
    if on_screen:
        yield from [on_screen] * len(waiting)


class Flow:
    """The frames of a stream from where it stands, in order of time; None stands for a hole.

    A hole is what could not be decoded and everything after it up to the next key frame, since that
    refers to it. fault says what was wrong first.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.fault = ""
        self._container = container
        self._stream = stream
        self._start_s = _seconds(stream.start_time, stream)
        self._step_s = float(1 / (stream.average_rate or Fraction(25)))
        self._last_s = -math.inf
        self._items = self._decode()
        self._ahead: list[Timed | None] = []

    def __iter__(self) -> Iterator[Timed | None]:
        yield from self._ahead
        self._ahead = []
        yield from self._items

    def peek_s(self) -> float:
        """Tell the pts of the first frame, which stays in the flow; infinite when there is none."""
        for item in self._items:
            self._ahead.append(item)
            if item is not None:
                return item[1]
        return math.inf

    def _decode(self) -> Iterator[Timed | None]:
        broken = False
        for frame in self._frames():
            if frame is None or frame.is_corrupt:
                broken = True
                self.fault = self.fault or f"damaged after {max(0.0, self._last_s):.2f} s"
                yield None
                continue
            if broken and not frame.key_frame:
                continue
            broken = False
            pts_s = self._pts_s(frame)
            if pts_s > self._last_s:
                self._last_s = pts_s
                yield frame, pts_s

    def _frames(self) -> Iterator[VideoFrame | None]:
        """Yield what the decoder gives, None where it fails; ends where the file can't be read."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.error.EOFError):
                return
            except av.error.FFmpegError as error:
                _blame_storage(self._container.name, error)
                self.fault = self.fault or f"cut off after {max(0.0, self._last_s):.2f} s"
                yield None
                return
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                yield None

    def _pts_s(self, frame: VideoFrame) -> float:
        """Name the frame; by counting in the few formats that don't."""
        if frame.pts is None:
            return max(self._last_s, -self._step_s) + self._step_s
        return frame.time - self._start_s if frame.time is not None else 0.0


class Converter:
    """Makes pixels of a file's frames, all of the size that its first one has on a screen."""

    def __init__(self, stream: VideoStream, max_px: int | None) -> None:
        self._shape = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
        self._max_px = max_px
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Scale to square pixels within max_px, convert to RGB and turn upright."""
        self._size = self._size or screen_size(
            frame.width, frame.height, self._shape or Fraction(1), self._max_px
        )
        width, height = self._size
        # One thread: a node runs one decoder a core.
        rgb = self._reformatter.reformat(
            frame, width, height, "rgb24", interpolation=SCALING, threads=1
        )
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), round(frame.rotation / 90)))


def screen_size(
    width: int, height: int, pixel_shape: Fraction, max_px: int | None
) -> tuple[int, int]:
    """Find width and height of a frame in square pixels, with no side above max_px.

    pixel_shape is a pixel's width over its height. Frames are never enlarged: those with other than
    square pixels lose width or height.
    """
    wide, high = width * min(1, pixel_shape), height * min(1, 1 / pixel_shape)
    scale = min(Fraction(1), Fraction(max_px) / max(wide, high)) if max_px else Fraction(1)
    return max(1, round(wide * scale)), max(1, round(high * scale))


def _seconds(ticks: int | None, stream: VideoStream) -> float:
    return float(ticks * stream.time_base) if ticks is not None and stream.time_base else 0.0


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    """Tell how long the picture track is, in seconds, above 0; by its packets if no header can."""
    length_s = _seconds(stream.duration, stream) or _tagged_length_s(stream)
    if length_s <= 0 and container.duration and len(container.streams) == 1:
        length_s = container.duration / av.time_base
    if length_s <= 0 or container.format.name in UNINDEXED:
        with contextlib.suppress(av.error.FFmpegError):
            ends_s = [
                _seconds(packet.pts + (packet.duration or 0), stream)
                for packet in container.demux(stream)
                if packet.pts is not None
            ]
            length_s = max(ends_s, default=0.0) - _seconds(stream.start_time, stream)
    return max(length_s, MIN_LENGTH_S)


def _tagged_length_s(stream: VideoStream) -> float:
    """Read when the track ends from Matroska's tag, "00:01:02.880000000"; 0 without it."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if not tag:
        return 0.0
    hours, minutes, seconds = map(float, tag.groups())
    return 3600 * hours + 60 * minutes + seconds - _seconds(stream.start_time, stream)
