"""Which frames of a video are good: one face, large enough, in one shot, and not frozen.

    segment -> frames -> landmarks -> [judge] -> crop -> raster -> sample -> shard

Verdicts are of frames and landmarks alone; nothing here knows a backend or a file.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from pipeline.align import SAME_FACE_IOU, Landmarks, overlap
from pipeline.config import rules_id
from pipeline.crop import Square, crop, square_of
from pipeline.decode import SegmentFrames

MIN_FACE_PX = 32
"""Landmarks that span less than this in the decoded frame are a face too small to learn from."""

THUMB_PX = 32
"""Pictures are compared as grey thumbnails of this size."""

COUNTED_PX = 128
"""Colours are counted over so many rows and columns of a picture: enough, and few to be quick."""

FROZEN_LEVELS = 2
"""Faces whose thumbnails nowhere differ by more levels than this are the same picture again."""

CUT_COLOURS = 0.5
"""Successive pictures with less of their colours in common than this are on two sides of a cut."""

DOUBTFUL_COLOURS = 0.83
"""With less of them in common than this, it is a cut if the faces differ as well."""

DOUBTFUL_FACE_COLOURS = 0.74
"""So it is with less than this of the colours around the face in common: before a wide wall, a
person is a small part of the picture."""

CUT_FACES = 0.7
"""Faces whose thumbnails correlate less than this differ. Turning the head does it too, but leaves
the colours. Of cuts between people in one studio these rules see most, elsewhere nearly all."""

FACE_MARGIN = 0.4
"""Room around the face where two are compared, so that hair and collar count."""

GOOD = "good"
NO_FACE = "no face"
TOO_SMALL = "face too small"
FROZEN = "frozen picture"
CUT = "cut or jump"


class View(NamedTuple):
    """What of a frame is compared with others to tell a cut."""

    frame: UInt8[np.ndarray, "h w 3"]
    square: Square
    colours: Float32[np.ndarray, "216"]
    face: Float32[np.ndarray, "t t"]


def judge_id() -> str:
    """Name the rules by which frames are judged: a hash that changes whenever one does."""
    return rules_id(
        *(MIN_FACE_PX, THUMB_PX, COUNTED_PX, FROZEN_LEVELS, SAME_FACE_IOU),
        *(CUT_COLOURS, DOUBTFUL_COLOURS, DOUBTFUL_FACE_COLOURS, CUT_FACES, FACE_MARGIN),
        "shots of a file",
    )


def judge_files(
    segments: Sequence[SegmentFrames], landmarks: Sequence[Landmarks]
) -> list[Shaped[np.ndarray, "_"]]:
    """Judge the frames of each segment, those of one original file together.

    A cut may fall anywhere in a file: its segments, which come in order of time, are one film.
    """
    verdicts: dict[int, np.ndarray] = {}
    for original in dict.fromkeys(segment.original for segment in segments):
        places = [i for i, segment in enumerate(segments) if segment.original == original]
        verdict = judge(
            [frame for i in places for frame in segments[i].pixels],
            Landmarks.joined([landmarks[i] for i in places]),
        )
        ends = np.cumsum([len(segments[i].pixels) for i in places])
        verdicts.update(zip(places, np.split(verdict, ends[:-1]), strict=True))
    return [verdicts[i] for i in range(len(segments))]


def judge(
    frames: Sequence[UInt8[np.ndarray, "h w 3"]], found: Landmarks
) -> Shaped[np.ndarray, "n"]:
    """Name each frame of a file, in order of time, GOOD or what is wrong with it."""
    verdict = np.where(found.found, GOOD, NO_FACE).astype(object)
    verdict[(verdict == GOOD) & (face_sizes(found.points) < MIN_FACE_PX)] = TOO_SMALL
    for flaw, is_flawed in ((CUT, outside_longest_shot), (FROZEN, repeated)):
        seen = np.flatnonzero(verdict == GOOD)
        verdict[seen[is_flawed([frames[i] for i in seen.tolist()], found.points[seen])]] = flaw
    return verdict


def face_sizes(points: Float32[np.ndarray, "n 68 2"]) -> Float32[np.ndarray, "n"]:
    """Measure the longer side of the box around each frame's landmarks, in pixels."""
    return (points.max(axis=1) - points.min(axis=1)).max(axis=1)


def outside_longest_shot(
    frames: Sequence[UInt8[np.ndarray, "h w 3"]], points: Float32[np.ndarray, "n 68 2"]
) -> Bool[np.ndarray, "n"]:
    """Mark the frames outside the longest run in which one face is seen from one camera.

    A run ends where the face's box leaves the one before it, or where the picture changes: see
    `_is_cut`. Of equally long runs the first is kept.
    """
    corners = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    boxes = [tuple(box) for box in corners.tolist()]
    views = [_view(frame, points[i : i + 1]) for i, frame in enumerate(frames)]
    breaks = [
        i
        for i in range(1, len(frames))
        if overlap(boxes[i - 1], boxes[i]) < SAME_FACE_IOU or _is_cut(views[i - 1], views[i])
    ]
    edges = [0, *breaks, len(frames)]
    first, last = max(pairwise(edges), key=lambda run: run[1] - run[0])
    outside = np.ones(len(frames), np.bool_)
    outside[first:last] = False
    return outside


def repeated(
    frames: Sequence[UInt8[np.ndarray, "h w 3"]], points: Float32[np.ndarray, "n 68 2"]
) -> Bool[np.ndarray, "n"]:
    """Mark the frames whose face is the picture of the last unmarked one again."""
    marks = np.zeros(len(frames), np.bool_)
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    last = 0
    for i in range(1, len(frames)):
        # Points on the same picture may differ by a pixel, so both are seen through one square.
        square = square_of(points[last : last + 1], margin=0.0)
        before, now = (_thumb(greys[k], square) for k in (last, i))
        marks[i] = np.abs(now - before).max() <= FROZEN_LEVELS
        last = last if marks[i] else i
    return marks


def _view(frame: UInt8[np.ndarray, "h w 3"], points: Float32[np.ndarray, "1 68 2"]) -> View:
    square = square_of(points, FACE_MARGIN)
    face = _thumb(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), square)
    return View(frame, square, _colours(frame), face)


def _is_cut(before: View, now: View) -> bool:
    """Tell a cut by the colours that two pictures share and by the faces in them."""
    shared = _shared(before.colours, now.colours)
    if shared < CUT_COLOURS:
        return True
    if _correlation(before.face, now.face) >= CUT_FACES:
        return False
    near = [_colours(crop(view.frame, view.square, COUNTED_PX)) for view in (before, now)]
    return shared < DOUBTFUL_COLOURS or _shared(*near) < DOUBTFUL_FACE_COLOURS


def _correlation(a: Float32[np.ndarray, "t t"], b: Float32[np.ndarray, "t t"]) -> float:
    """Correlate two thumbnails: 1 for the same picture in any light; 0 if one has no contrast."""
    a, b = a - a.mean(), b - b.mean()
    return float(np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6))


def _thumb(grey: UInt8[np.ndarray, "h w"], square: Square) -> Float32[np.ndarray, "t t"]:
    return crop(grey, square, THUMB_PX).astype(np.float32)


def _shared(a: Float32[np.ndarray, "216"], b: Float32[np.ndarray, "216"]) -> float:
    """Say what share of their colours two pictures have in common, 0 to 1."""
    return float(np.minimum(a, b).sum())


def _colours(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "216"]:
    """Give each of 6 x 6 x 6 colours its share of the picture."""
    some = cv2.resize(picture, (COUNTED_PX, COUNTED_PX), interpolation=cv2.INTER_NEAREST)
    counts = cv2.calcHist([some], [0, 1, 2], None, [6, 6, 6], [0, 256] * 3).ravel()
    return counts / np.float32(counts.sum())
