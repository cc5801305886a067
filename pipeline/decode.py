"""Video files -> frames: those chosen of a video's files, or all of one file.

    segment -> [frames] -> landmarks -> raster -> sample -> shard

Chosen are the frames shown at times that lie evenly over all of a video's files; only these are
converted. The same files, settings and libavcodec give the same bytes. `isolate.py` runs it in a
child.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8

from pipeline.config import DecodeConfig, rules_id
from pipeline.plan import Segment, Video, cut
from pipeline.sample import Reject
from pipeline.storage import join
from pipeline.video_reader import (
    MIN_LENGTH_S,
    SCALING,
    SEEK_GAP_S,
    SEEK_STEPS_S,
    UNINDEXED,
    Converter,
    Flow,
    UnreadableError,
    flow_at,
    open_video,
    shown_at,
    video_info,
)

MIN_READABLE = 0.5
"""A damaged file that shows less than this share of its wanted times is lost as a whole."""


@dataclass(frozen=True, kw_only=True)
class SegmentFrames:
    """Frames of one segment, RGB, in order of time. original is the file's path in the input."""

    segment: str
    pixels: UInt8[np.ndarray, "n h w 3"]
    pts_s: Float64[np.ndarray, "n"]
    original: str = ""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What became of a video: its segments that gave frames, or the reason that there are none.

    damaged says what is wrong with single files, of accepted videos too.
    """

    segments: tuple[SegmentFrames, ...] | Reject
    damaged: tuple[Reject, ...] = ()


def decode_id() -> str:
    """Name the rules by which frames are taken: a short hash that changes whenever one does."""
    return rules_id(
        *(SEEK_GAP_S, SEEK_STEPS_S, sorted(UNINDEXED), MIN_LENGTH_S, MIN_READABLE, SCALING.value),
        "evenly over a video's files",
    )


def iter_frames(
    path: str | Path, max_px: int | None = None
) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], float]]:
    """Yield every frame of a video or photo with its pts in seconds; ValueError for anything else.

    max_px bounds the longest side. Frames that are damaged are left out.
    """
    with open_video(str(path)) as (container, stream):
        convert = Converter(stream, max_px)
        for item in Flow(container, stream):
            if item is not None:
                yield convert(item[0]), item[1]


def decode_video(video: Video, wanted: int, config: DecodeConfig, root: str = "") -> Decoded:
    """Take `wanted` frames, spread evenly over the length of all of a video's files.

    Fewer where the video has fewer. root is the folder that the segments' paths are relative to.
    Raises StorageError when reading failed for the storage's sake.
    """
    lengths, damaged = _lengths(video, root)
    segments: list[SegmentFrames] = []
    for whole, times_s in zip(lengths, place_times(list(lengths.values()), wanted), strict=True):
        if not times_s:
            continue
        frames, fault = _take(_address(root, whole.path), times_s, config.decode_px)
        if fault:
            damaged.append(_damage(video, whole, fault))
        segments += _part(frames, cut(whole, lengths[whole], config.segment_s))
    outcome = tuple(segments) or _nothing(video, damaged)
    return Decoded(segments=outcome, damaged=tuple(damaged))


def _lengths(video: Video, root: str) -> tuple[dict[Segment, float], list[Reject]]:
    """Ask each file for its length in seconds; those that can't tell are damaged."""
    lengths, damaged = {}, []
    for whole in video.segments:
        try:
            lengths[whole] = video_info(_address(root, whole.path)).duration_s
        except UnreadableError as error:
            damaged.append(_damage(video, whole, str(error)))
    return lengths, damaged


def _damage(video: Video, whole: Segment, reason: str) -> Reject:
    return Reject(id=f"{video.key}/{whole.name}", stage="decode", reason=reason)


def _nothing(video: Video, damaged: Sequence[Reject]) -> Reject:
    """Say why a video gave no frame."""
    reason = damaged[0].reason if damaged else "no frame in the file"
    more = f" (so are {len(damaged) - 1} other files)" if len(damaged) > 1 else ""
    return Reject(id=video.key, stage="decode", reason=reason + more)


def _address(root: str, path: str) -> str:
    return join(root, path) if root else path


def place_times(lengths_s: Sequence[float], wanted: int) -> list[list[float]]:
    """Place `wanted` times evenly over files laid end to end: for each file, its times in
    seconds."""
    total_s, start_s = sum(lengths_s), 0.0
    times_s = [(i + 0.5) * total_s / wanted for i in range(wanted)]
    placed: list[list[float]] = []
    for length_s in lengths_s:
        end_s = start_s + length_s
        placed.append([t - start_s for t in times_s if start_s <= t < end_s])
        start_s = end_s
    return placed


def _take(
    address: str, times_s: Sequence[float], decode_px: int
) -> tuple[list[tuple[UInt8[np.ndarray, "h w 3"], float]], str]:
    """Take the frames shown at times_s, in order, each once; and the first fault of the file."""
    taken: dict[float, np.ndarray] = {}
    shown = 0
    fault = ""
    try:
        for run_s in _runs(times_s):
            with flow_at(address, run_s[0]) as (flow, stream):
                convert = Converter(stream, decode_px)
                for frame, pts_s in shown_at(flow, run_s):
                    shown += 1
                    if pts_s not in taken:
                        taken[pts_s] = convert(frame)
                fault = fault or flow.fault
    except UnreadableError as error:
        return [], str(error)
    if fault and shown < MIN_READABLE * len(times_s):
        return [], f"{fault}; {shown} of {len(times_s)} wanted frames could be read"
    return [(pixels, pts_s) for pts_s, pixels in sorted(taken.items())], fault


def _runs(times_s: Sequence[float]) -> list[list[float]]:
    """Group sorted times so that each group is decoded in one go, and the next one sought."""
    runs: list[list[float]] = [[]]
    last_s = 0.0
    for time_s in times_s:
        if time_s - last_s > SEEK_GAP_S:
            runs.append([])
        runs[-1].append(time_s)
        last_s = time_s
    return [run for run in runs if run]


def _part(
    frames: Sequence[tuple[UInt8[np.ndarray, "h w 3"], float]], parts: Sequence[Segment]
) -> list[SegmentFrames]:
    """Deal a file's frames to its segments by their pts."""
    dealt = []
    for part in parts:
        end_s = math.inf if part.end_s is None else part.end_s
        inside = [f for f in frames if part.start_s <= f[1] < end_s]
        if inside:
            dealt.append(
                SegmentFrames(
                    segment=part.name,
                    pixels=np.stack([pixels for pixels, _ in inside]),
                    pts_s=np.array([pts_s for _, pts_s in inside], np.float64),
                    original=part.path,
                )
            )
    return dealt
