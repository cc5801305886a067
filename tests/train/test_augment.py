"""A view moves the landmarks where it moves the picture."""

from dataclasses import replace

import cv2
import numpy as np
from jaxtyping import Float32

from pipeline.rasterize import draw
from train.augment import MIRRORED, View


def face(image_px: int) -> Float32[np.ndarray, "68 2"]:
    """Return points well inside the picture, no two alike."""
    turn = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    radius = image_px * np.linspace(0.15, 0.3, 68)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1) * radius[:, None]
    return (circle + image_px / 2).astype(np.float32)


def test_mirror_twice_is_the_identity() -> None:
    assert sorted(MIRRORED) == list(range(68))
    assert (MIRRORED[MIRRORED] == np.arange(68)).all()


def test_mirror_keeps_the_parts_of_a_face() -> None:
    for first, last in [(0, 17), (27, 31), (31, 36), (48, 60), (60, 68)]:
        assert set(MIRRORED[first:last]) == set(range(first, last))
    assert set(MIRRORED[17:22]) == set(range(22, 27))
    assert set(MIRRORED[36:42]) == set(range(42, 48))


def test_landmarks_follow_the_picture() -> None:
    points = face(96)
    for number in range(12):
        view = View.draw(3, number, 96)
        moved = view.of_points(points, 96)
        for place in (5, 30, 62):
            frame = np.zeros((96, 96, 3), np.uint8)
            spot = tuple(int(c) for c in points[MIRRORED[place] if view.flip else place])
            cv2.circle(frame, spot, 3, (255, 255, 255), -1)
            bright = view.of_frame(frame).astype(int).sum(axis=2)
            y, x = np.nonzero(bright > (bright.min() + bright.max()) / 2)
            assert abs(x.mean() + 0.5 - moved[place, 0]) < 1
            assert abs(y.mean() + 0.5 - moved[place, 1]) < 1


def test_a_mirrored_raster_is_the_raster_of_mirrored_points() -> None:
    still = replace(View.draw(0, 0, 96).in_place(), affine=np.eye(2, 3), flip=True)
    points = np.round(face(96)) + np.float32(0.5)
    drawn = draw(still.of_points(points, 96), 96)
    mirrored = draw(points, 96)[:, ::-1]
    assert ((drawn > 0).any(axis=2) == (mirrored > 0).any(axis=2)).mean() > 0.97


def test_a_view_depends_on_seed_and_visit_alone() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    one, same, other = (View.draw(3, n, 32).of_frame(frame) for n in (7, 7, 8))
    assert (one == same).all()
    assert (one != other).any()


def test_colour_channels_change_places_in_about_half_of_the_views_and_never_in_place() -> None:
    orders = [tuple(View.draw(3, number, 32).channels) for number in range(400)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    kept = orders.count((0, 1, 2)) / len(orders)
    assert 0.5 < kept < 0.67  # a sixth of the swaps change nothing
    frame = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    red = frame * np.array([1, 0, 0], np.uint8)
    still = replace(View.draw(3, 0, 32).in_place(), affine=np.eye(2, 3))
    assert (still.of_frame(frame) == frame).all()
    swapped = replace(still, channels=np.array([2, 0, 1]))
    assert (swapped.of_frame(red)[..., 1] == red[..., 0]).all()
