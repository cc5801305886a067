"""Landmarks -> one square that holds the head for a whole segment, and the picture inside it.

    segment -> frames -> landmarks -> [crop] -> raster -> sample -> shard

One square a segment, so the picture stays put while the head moves in it. The square is set from
the landmarks alone, never from a detector's box: what training sees and what a user's own video
gives are framed alike.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from pipeline.config import rules_id

LIFT = 0.16
"""How far the square's centre lies above the landmarks', in sides of their box: hair is above
them."""

TRIM = 24
"""One frame in this many may be wrong at each edge of the square without moving it."""


class Square(NamedTuple):
    """A square in whole pixels of the frame, which may reach beyond its borders."""

    left: int
    top: int
    side: int


def square_of(points: Float[np.ndarray, "n 68 2"], margin: float) -> Square:
    """Frame a head by the landmarks of its segment.

    Takes the union of the frames' landmark boxes, without the n // 24 outermost at each edge, so
    that one bad frame doesn't decide it; pads the longer side by `margin` of itself at each end;
    and moves it up, since landmarks end at the brows.
    """
    if len(points) == 0:
        raise ValueError("A crop needs the landmarks of at least one frame, and got none.")
    trimmed = len(points) // TRIM
    left, top = np.sort(points.min(axis=1), axis=0)[trimmed]
    right, bottom = np.sort(points.max(axis=1), axis=0)[len(points) - 1 - trimmed]
    longest = max(float(right - left), float(bottom - top), 1.0)
    side = max(1, round(longest * (1 + 2 * margin)))
    centre_x = (float(left) + float(right)) / 2
    centre_y = (float(top) + float(bottom)) / 2 - LIFT * longest
    return Square(round(centre_x - side / 2), round(centre_y - side / 2), side)


def crop(
    frame: UInt8[np.ndarray, "h w *c"], square: Square, image_px: int
) -> UInt8[np.ndarray, "p p *c"]:
    """Cut the square out of the frame and resize it to image_px.

    What lies outside the frame is filled with the pixels of its edge. Resizing is by area when
    shrinking and cubic when growing.
    """
    height, width = frame.shape[:2]
    rows, above, below = _reach(square.top, square.side, height)
    columns, before, after = _reach(square.left, square.side, width)
    inside = frame[rows, columns]
    if inside.shape[:2] != (square.side, square.side):
        inside = cv2.copyMakeBorder(inside, above, below, before, after, cv2.BORDER_REPLICATE)
    how = cv2.INTER_AREA if image_px < square.side else cv2.INTER_CUBIC
    return cv2.resize(inside, (image_px, image_px), interpolation=how).astype(np.uint8, copy=False)


def _reach(first: int, side: int, length: int) -> tuple[slice, int, int]:
    """Say which of a frame's rows or columns a square has, at least one, and how often the first
    and the last of them are to be repeated."""
    start, stop = min(max(first, 0), length - 1), max(min(first + side, length), 1)
    before = min(max(0, start - first), side - 1)
    return slice(start, stop), before, side - (stop - start) - before


def to_crop(
    points: Float[np.ndarray, "*n 2"], square: Square, image_px: int
) -> Float[np.ndarray, "*n 2"]:
    """Carry points from pixels of the frame to pixels of the crop."""
    corner = np.array([square.left, square.top], np.float64)
    return ((points - corner) * (image_px / square.side)).astype(np.float32)


def crop_id() -> str:
    """Name the rules of this file: a short hash that changes whenever a square or crop could."""
    return rules_id(LIFT, TRIM, "area or cubic", "edges repeated")
