"""Rasters are the authors' drawing, bit for bit, whoever draws them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.align import template
from pipeline.rasterize import (
    NUM_POINTS,
    PALETTE,
    draw,
    draw_each,
    line_px,
    palette_id,
    round_points,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def face(image_px: int) -> np.ndarray:
    """A face that fills most of the picture, with room for the width of its lines."""
    return round_points((template() * 0.8 + 0.1) * image_px)


@pytest.mark.parametrize("image_px", [256, 64])
def test_a_real_face_is_drawn_as_in_the_reference(image_px):
    points = np.array(json.loads((GOLDEN / "raster.json").read_text()), np.float32)
    reference = cv2.imread(str(GOLDEN / f"raster_{image_px}.png"))[..., ::-1]
    np.testing.assert_array_equal(draw(points * (image_px / 256), image_px), reference)


def test_only_the_colours_of_the_table_appear_and_all_of_them():
    raster = draw(face(192), 192)
    assert raster.shape == (192, 192, 3)
    colours = {tuple(int(c) for c in pixel) for pixel in raster.reshape(-1, 3)}
    assert colours == {(0, 0, 0)} | {stroke.rgb for stroke in PALETTE}


def test_the_table_is_the_authors():
    drawn = {(s.first, s.last): (s.closed, s.rgb) for s in PALETTE}
    assert drawn == {
        (0, 16): (False, (255, 255, 255)),
        (17, 21): (False, (255, 0, 0)),
        (22, 26): (False, (0, 255, 0)),
        (27, 30): (False, (0, 0, 255)),
        (31, 35): (False, (0, 0, 255)),
        (36, 41): (True, (255, 0, 255)),
        (42, 47): (True, (0, 255, 255)),
        (48, 59): (True, (255, 255, 0)),
    }


def test_the_inner_lips_are_not_drawn():
    points = face(96)
    moved = points.copy()
    moved[60:] += 7
    np.testing.assert_array_equal(draw(moved, 96), draw(points, 96))


def test_rounding_to_eighths_changes_nothing_and_an_eighth_is_seen():
    points = face(128)
    np.testing.assert_array_equal(draw(points + np.float32(0.03), 128), draw(points, 128))
    shifts = [draw(points + np.float32(k / 8), 128) for k in range(9)]
    assert len({shift.tobytes() for shift in shifts}) == 9


def test_eighths_survive_float32_and_json():
    points = np.random.default_rng(3).uniform(-40, 400, (5, NUM_POINTS, 2))
    rounded = round_points(points)
    assert np.abs(rounded - points).max() <= 1 / 16 + 1e-4
    np.testing.assert_array_equal(rounded * 8, np.round(rounded * 8))
    np.testing.assert_array_equal(np.float32(json.loads(json.dumps(rounded.tolist()))), rounded)


def test_a_point_lies_in_the_middle_of_its_pixel():
    points = np.full((NUM_POINTS, 2), -100.0, np.float32)
    points[27:31] = (20.5, 10.5)  # the nose bridge shrunk to the centre of column 20, row 10
    rows, columns = np.nonzero(draw(points, 48).any(axis=2))
    assert (rows.mean(), columns.mean()) == (10, 20)


def test_faces_are_drawn_together_as_alone():
    faces = np.stack([face(96), face(96)[::-1] * 1.3 - 20])
    for raster, points in zip(draw_each(faces, 96), faces, strict=True):
        assert (raster == draw(points, 96)).all()


def test_lines_that_leave_the_picture_are_cut_not_moved():
    big, small = face(160), face(160) - 50
    different = (draw(small, 160)[:100, :100] != draw(big, 160)[50:150, 50:150]).any(axis=2)
    assert different.mean() < 0.002  # OpenCV clips a line before it draws it, a pixel at the border


def test_far_points_are_harmless():
    points = face(64)
    points[8] = (1e12, -1e12)
    assert draw(points, 64).any()


@pytest.mark.parametrize(("image_px", "width"), [(64, 1), (128, 1), (192, 2), (256, 2), (512, 4)])
def test_lines_grow_with_the_picture(image_px, width):
    assert line_px(image_px) == width


def test_points_that_are_not_numbers_are_refused():
    points = face(64)
    points[40, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite: drop frames"):
        draw(points, 64)


def test_the_palette_has_a_short_stable_name():
    assert palette_id() == "de6fbbd6b551"
