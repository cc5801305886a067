"""Landmarks -> the coloured image a network is driven by. The one colour table of the project.

    segment -> frames -> landmarks -> [raster] -> sample -> shard

The drawing is the authors': open and closed lines of 2 px on black (Zakharov et al. 2019; the
colours of their latent-pose release). Wherever a raster is needed, `draw` makes it: for the shards,
for smaller presets, for fine-tuning and for driving.

Coordinates here and everywhere in `pipeline` are continuous: a picture of w x h pixels spans [0, w]
x [0, h] and the centre of its first pixel is (0.5, 0.5). So points go from one size to another by a
multiplication.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from pipeline.config import rules_id

NUM_POINTS = 68
REFERENCE_PX = 256
REFERENCE_LINE_PX = 2
SUBPIXEL_BITS = 3  # OpenCV draws in fixed point; three bits are the 1/8 px landmarks are stored in
MAX_COORDINATE_PX = 4096.0  # beyond it nothing can show, and OpenCV's fixed point must not overflow


class Stroke(NamedTuple):
    """One line: points first to last joined in order, and the last to the first if closed."""

    name: str
    first: int
    last: int
    closed: bool
    rgb: tuple[int, int, int]


PALETTE = (
    Stroke("jaw", 0, 16, False, (255, 255, 255)),
    Stroke("right brow", 17, 21, False, (255, 0, 0)),
    Stroke("left brow", 22, 26, False, (0, 255, 0)),
    Stroke("nose bridge", 27, 30, False, (0, 0, 255)),
    Stroke("nose base", 31, 35, False, (0, 0, 255)),
    Stroke("right eye", 36, 41, True, (255, 0, 255)),
    Stroke("left eye", 42, 47, True, (0, 255, 255)),
    Stroke("outer lips", 48, 59, True, (255, 255, 0)),
)
"""In drawing order; right and left are the person's own. The inner lips (60-67) are not drawn."""


def round_points(points: Shaped[np.ndarray, "*shape 2"]) -> Float[np.ndarray, "*shape 2"]:
    """Round coordinates to the nearest 1/8 px, exactly representable in float32 and in a json."""
    steps = 1 << SUBPIXEL_BITS
    return (np.round(np.asarray(points, np.float64) * steps) / steps).astype(np.float32)


def line_px(image_px: int) -> int:
    """Give the line width for a picture size: 2 px at 256, elsewhere in proportion, at least 1."""
    return max(1, round(REFERENCE_LINE_PX * image_px / REFERENCE_PX))


def draw(points: Float[np.ndarray, "68 2"], image_px: int) -> UInt8[np.ndarray, "p p 3"]:
    """Draw 68 points, given in pixels of the picture, as an RGB raster of image_px x image_px.

    Coordinates are first rounded to 1/8 px, and OpenCV then works in integers, so equal landmarks
    give equal bytes. Lines are not antialiased: every pixel is black or a colour of the table.
    Points may lie outside the picture; their lines are cut at its border.
    """
    return draw_each(points[None], image_px)[0]


def draw_each(points: Float[np.ndarray, "n 68 2"], image_px: int) -> UInt8[np.ndarray, "n p p 3"]:
    """Draw several faces, each as `draw` does: together they take less time than one by one."""
    if not np.isfinite(points).all():
        raise ValueError(
            "Landmarks to draw must be finite numbers, but some are NaN or infinite: "
            "drop frames whose landmarks were not found before drawing them."
        )
    # In steps of 1/8 px, rounded as in round_points. OpenCV puts the centre of the first pixel at
    # 0, which is 0.5 here.
    steps = 1 << SUBPIXEL_BITS
    limit = MAX_COORDINATE_PX * steps
    rounded = np.rint(np.asarray(points, np.float64) * steps).clip(-limit, limit)
    fixed = rounded.astype(np.int32) - steps // 2
    rasters = np.zeros((len(points), image_px, image_px, 3), np.uint8)
    width = line_px(image_px)
    for raster, face in zip(rasters, fixed, strict=True):
        for _, first, last, closed, rgb in PALETTE:
            line = face[first : last + 1]
            cv2.polylines(raster, [line], closed, rgb, width, cv2.LINE_8, SUBPIXEL_BITS)
    return rasters


def palette_id() -> str:
    """Name the drawing rules: a short hash that changes whenever a raster could."""
    return rules_id(PALETTE, REFERENCE_LINE_PX, REFERENCE_PX, SUBPIXEL_BITS, "LINE_8", "centre .5")
