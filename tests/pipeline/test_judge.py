"""Which frames of a video are good."""

import dataclasses

import numpy as np
import pytest

from pipeline.align import DlibAligner
from pipeline.judge import (
    CUT,
    FROZEN,
    GOOD,
    MIN_FACE_PX,
    NO_FACE,
    TOO_SMALL,
    judge,
    judge_files,
    outside_longest_shot,
)
from tests.pipeline.scenes import astronaut_sways, face_at, other_talks, scene, segment


def test_frames_without_a_face_are_left_out():
    found = face_at(6)
    found.found[[1, 4]] = False
    assert judge([*scene(1, 6)], found).tolist() == [GOOD, NO_FACE, GOOD, GOOD, NO_FACE, GOOD]


def test_small_faces_are_left_out():
    found = face_at(5, side=MIN_FACE_PX * 2)
    found.points[2] = face_at(1, side=MIN_FACE_PX * 0.9).points[0]
    assert judge([*scene(1, 5)], found)[2] == TOO_SMALL


def test_a_jump_to_another_face_keeps_the_longer_stay():
    found = face_at(9, left=5, side=40)
    found.points[6:] = face_at(3, left=70, side=40).points
    assert judge([*scene(1, 9)], found).tolist() == [GOOD] * 6 + [CUT] * 3


def test_a_cut_to_another_scene_keeps_the_longer_shot():
    frames = [*scene(1, 4), *(255 - scene(1, 7))]
    assert judge(frames, face_at(11)).tolist() == [CUT] * 4 + [GOOD] * 7


def test_a_frozen_picture_counts_once():
    pixels = scene(1, 8)
    pixels[3:6] = pixels[2]
    found = face_at(8)
    found.points[4] += 1.5  # backends tremble
    assert judge([*pixels], found).tolist() == [GOOD] * 3 + [FROZEN] * 3 + [GOOD] * 2


def test_a_cut_between_segments_of_one_file_is_seen():
    pixels, found = [scene(1, 4), 255 - scene(1, 7)], [face_at(4), face_at(7)]
    files = [segment(part, name) for part, name in zip(pixels, "ab", strict=True)]
    assert [v.tolist() for v in judge_files(files, found)] == [[GOOD] * 4, [GOOD] * 7]
    one_file = [dataclasses.replace(part, original="film.mp4") for part in files]
    assert [v.tolist() for v in judge_files(one_file, found)] == [[CUT] * 4, [GOOD] * 7]


@pytest.mark.parametrize("wall_px", [60, 120, 240])
def test_a_cut_to_another_person_before_the_same_wall_is_seen(wall_px):
    size = 150
    heads = np.stack([p[:size, 50:190] for p in astronaut_sways(7) + other_talks(12)])
    wall = scene(5, 1, height=size + wall_px, width=140 + wall_px)
    pixels = np.repeat(wall, len(heads), axis=0)
    pixels[:, wall_px // 2 :][:, :size, wall_px // 2 :][:, :, :140] = heads
    found = DlibAligner().landmarks(pixels)
    assert found.found.all()
    assert outside_longest_shot([*pixels], found.points).tolist() == [True] * 7 + [False] * 12
