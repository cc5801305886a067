"""One random change of view and colour, shared by all frames of a visit.

The landmarks follow the picture, so a raster drawn from them still fits it. Frames of one visit
must change alike: what the embedder sees of a person is what the generator has to draw. Colours
change a lot, so that a generator with few people to learn from can't know theirs by heart.
"""

from dataclasses import dataclass, replace
from math import cos, log, radians, sin

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8

from train.order import AUGMENT, random_bits

MAX_TURN = radians(8)
MAX_ZOOM = log(1.25)
MAX_STRETCH = log(1.08)  # of width against height
MAX_SHIFT = 0.08  # of the picture's side
MAX_GAIN = log(1.4)  # for every colour channel
MAX_OFFSET = 24.0  # in steps of 255
SWAPPED = 0.5  # share of visits whose colour channels change places

# fmt: off
MIRRORED = np.array([
    *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
    *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1),
])
# fmt: on
"""Which point takes each of the 68 places when a face is seen in a mirror."""


@dataclass(frozen=True, kw_only=True)
class View:
    """An affine map of coordinates, an order of colour channels with a gain and an offset each,
    and a mirror."""

    affine: Float[np.ndarray, "2 3"]
    channels: Int64[np.ndarray, " 3"]
    gain: Float[np.ndarray, " 3"]
    offset: Float[np.ndarray, " 3"]
    flip: bool

    @classmethod
    def draw(cls, seed: int, visit: int, image_px: int) -> "View":
        """Draw the view of one visit: it depends on (seed, visit) alone."""
        random = np.random.Generator(random_bits(seed, visit, AUGMENT))
        turn, zoom, stretch = random.uniform(-1, 1, 3) * [MAX_TURN, MAX_ZOOM, MAX_STRETCH]
        shift = random.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
        sizes = np.exp([zoom + stretch / 2, zoom - stretch / 2])
        return View(
            affine=_about_centre(turn, sizes, shift, image_px),
            channels=random.permutation(3) if random.random() < SWAPPED else np.arange(3),
            gain=np.exp(random.uniform(-MAX_GAIN, MAX_GAIN, 3)),
            offset=random.uniform(-MAX_OFFSET, MAX_OFFSET, 3),
            flip=bool(random.integers(2)),
        )

    def in_place(self) -> "View":
        """Return the same change of place and size, without a mirror or other colours."""
        return replace(self, channels=np.arange(3), gain=np.ones(3), offset=np.zeros(3), flip=False)

    def of_frame(self, frame: UInt8[np.ndarray, "p p 3"]) -> UInt8[np.ndarray, "p p 3"]:
        """Return the frame in this view; its edges are repeated where it doesn't reach."""
        size = (frame.shape[1], frame.shape[0])
        # OpenCV puts the centre of the first pixel at 0, the landmarks' coordinates put it at 0.5.
        by_index = self.affine + np.column_stack(
            [np.zeros((2, 2)), self.affine[:, :2].sum(1) / 2 - 0.5]
        )
        turned = cv2.warpAffine(frame, by_index, size, borderMode=cv2.BORDER_REPLICATE)
        table = np.arange(256)[:, None] * self.gain + self.offset
        table = table.round().clip(0, 255).astype(np.uint8)
        coloured = cv2.LUT(turned[..., self.channels], table[None])
        return np.ascontiguousarray(coloured[:, ::-1]) if self.flip else coloured

    def of_points(
        self, points: Float32[np.ndarray, "68 2"], image_px: int
    ) -> Float32[np.ndarray, "68 2"]:
        """Return the landmarks in this view, each in the place of its scheme."""
        moved = points @ self.affine[:, :2].T + self.affine[:, 2]
        if self.flip:
            moved = (moved * [-1, 1] + [image_px, 0])[MIRRORED]
        return moved.astype(np.float32)


def _about_centre(
    turn: float,
    sizes: Float[np.ndarray, " 2"],
    shift: Float[np.ndarray, " 2"],
    image_px: int,
) -> Float[np.ndarray, "2 3"]:
    matrix = np.array([[cos(turn), -sin(turn)], [sin(turn), cos(turn)]]) * sizes
    centre = np.full(2, image_px / 2)
    return np.column_stack([matrix, centre - matrix @ centre + shift * image_px])
