"""One square holds the head of a segment, wherever it goes and wherever the picture ends."""

import numpy as np
import pytest

from pipeline.align import template
from pipeline.crop import LIFT, Square, crop, square_of, to_crop


def moving_face(num_frames: int, side: float = 100.0) -> np.ndarray:
    """A face that drifts 2 px right and 1 px down a frame."""
    drift = np.arange(num_frames)[:, None, None] * np.array([2.0, 1.0])
    return (template() * side + np.array([300.0, 200.0]) + drift).astype(np.float32)


def gradient(height: int, width: int) -> np.ndarray:
    """A picture whose red is its column and whose green is its row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, rows * 0 + 7], axis=2).astype(np.uint8)


def test_the_square_is_as_large_as_the_margin_says():
    points = moving_face(1)
    longest = (points[0].max(axis=0) - points[0].min(axis=0)).max()
    for margin in (0.0, 0.4, 1.5):
        assert square_of(points, margin).side == round(longest * (1 + 2 * margin))


def test_the_square_is_centred_on_the_face_and_lifted_to_the_hair():
    points = moving_face(1)
    left, top, side = square_of(points, 0.4)
    low, high = points[0].min(axis=0), points[0].max(axis=0)
    longest = (high - low).max()
    assert left + side / 2 == pytest.approx((low[0] + high[0]) / 2, abs=1)
    assert top + side / 2 == pytest.approx((low[1] + high[1]) / 2 - LIFT * longest, abs=1)


def test_all_landmarks_of_a_segment_lie_in_its_square():
    points = moving_face(20)
    inside = to_crop(points, square_of(points, 0.4), 64)
    assert inside.min() >= 0
    assert inside.max() <= 64


@pytest.mark.parametrize("num_bad", [1, 2])
def test_one_bad_frame_in_24_does_not_move_the_square_much(num_bad):
    points = moving_face(48)
    spoilt = points.copy()
    spoilt[30 : 30 + num_bad] = spoilt[30 : 30 + num_bad] * 3 - 250
    assert square_of(spoilt, 0.4).side <= square_of(points, 0.4).side * 1.05


def test_a_square_needs_a_frame():
    with pytest.raises(ValueError, match="at least one frame"):
        square_of(np.zeros((0, 68, 2), np.float32), 0.4)


def test_a_crop_of_the_same_size_is_the_picture():
    picture = gradient(60, 90)
    np.testing.assert_array_equal(crop(picture, Square(20, 10, 32), 32), picture[10:42, 20:52])


def test_beyond_the_picture_its_edge_goes_on():
    picture = gradient(60, 90)
    square = Square(-8, -5, 80)
    inside = crop(picture, square, 80)
    assert (inside[:5] == inside[5]).all()
    assert (inside[:, :8] == inside[:, 8:9]).all()
    np.testing.assert_array_equal(inside[5:65, 8:80], picture[:, :72])
    np.testing.assert_array_equal(inside[70, 8:80], picture[59, :72])


def test_a_square_anywhere_holds_the_nearest_pixels_of_the_picture():
    picture = gradient(23, 37)
    for left in (-90, -30, -1, 0, 12, 30, 36, 37, 80):
        for top in (-70, -29, 0, 5, 22, 23, 60):
            rows = np.arange(top, top + 30).clip(0, 22)
            columns = np.arange(left, left + 30).clip(0, 36)
            inside = crop(picture, Square(left, top, 30), 30)
            np.testing.assert_array_equal(inside, picture[rows][:, columns])


@pytest.mark.parametrize("image_px", [16, 48])
def test_points_stay_on_what_they_point_at(image_px):
    picture = np.zeros((70, 110, 3), np.uint8)
    picture[40:44, 60:64] = 200  # its centre is (62, 42)
    square = Square(46, 20, 32)
    small = crop(picture, square, image_px).astype(np.float64)[..., 0]
    weight = small / small.sum()
    rows, columns = np.mgrid[:image_px, :image_px] + 0.5
    seen = ((columns * weight).sum(), (rows * weight).sum())
    expected = to_crop(np.array([[62.0, 42.0]], np.float32), square, image_px)[0]
    np.testing.assert_allclose(seen, expected, atol=0.05)
