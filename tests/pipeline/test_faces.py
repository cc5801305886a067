"""Only good frames become samples, every other one is accounted for, and photos go the same way."""

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from pipeline.align import (
    Aligner,
    Box,
    DlibAligner,
    Landmarks,
    Lasts,
    NullAligner,
    ScoredBox,
    follow_face,
    template,
)
from pipeline.config import CropConfig, DecodeConfig
from pipeline.crop import crop_id
from pipeline.decode import SegmentFrames, decode_video
from pipeline.faces import (
    Judged,
    evenly,
    face_spec,
    faces_id,
    faces_of,
    find_and_judge,
    read_faces,
    require_aligner,
)
from pipeline.judge import GOOD, judge_files
from pipeline.plan import Segment, Video
from pipeline.rasterize import draw
from pipeline.sample import Reject, thumbnail_of
from tests.pipeline.scenes import astronaut_sways, face_at, other_talks, scene, segment
from tests.pipeline.videos import write_video

SPEC = face_spec(NullAligner(), CropConfig(image_px=48, margin=0.3))


@pytest.fixture(scope="module")
def dlib_aligner():
    return DlibAligner()


def judged(segments: Sequence[SegmentFrames], landmarks: Sequence[Landmarks]) -> Judged:
    verdicts = judge_files(segments, landmarks)
    return Judged(segments=segments, landmarks=landmarks, verdicts=verdicts)


def make(pixels, found, num_frames=6, min_frames=3):
    return faces_of(
        "ann", "talk", "train", judged([segment(pixels)], [found]),
        num_frames=num_frames, min_frames=min_frames, spec=SPEC,
    )  # fmt: skip


def counts(judged: Judged) -> tuple[int, int]:
    """Count the good frames, and all that were looked at."""
    verdicts = np.concatenate(judged.verdicts)
    return int((verdicts == GOOD).sum()), len(verdicts)


class Counted:
    """A backend that counts the frames of each call, and finds what another finds."""

    def __init__(self, aligner: Aligner) -> None:
        self.calls: list[int] = []
        self._aligner = aligner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._aligner, name)

    def landmarks_of(
        self, segments: Sequence[np.ndarray], lasts: Sequence[Lasts] = ()
    ) -> list[Landmarks]:
        self.calls.append(sum(map(len, segments)))
        return self._aligner.landmarks_of(segments, lasts)


class ByLight(NullAligner):
    """Finds the face of the null backend in frames that are not black."""

    def landmarks(self, frames: np.ndarray, last: Box | None = None) -> Landmarks:
        found = super().landmarks(frames, last)
        found.found[:] = frames.any(axis=(1, 2, 3))
        return found


class Crowd(NullAligner):
    """Sees two faces in frames that are not black, of which the second is smaller in frame 0."""

    def landmarks_of(
        self, segments: Sequence[np.ndarray], lasts: Sequence[Lasts] = ()
    ) -> list[Landmarks]:
        parts = zip_longest(segments, lasts, fillvalue=())
        return [self._follow(frames, known) for frames, known in parts]

    def _follow(self, frames: np.ndarray, lasts: Lasts) -> Landmarks:
        found = Landmarks.empty(len(frames))
        for i, face in enumerate(follow_face(frames, self._detect, lasts)):
            if face:
                found.boxes[i], found.found[i] = face[0], True
                found.points[i] = template() * 40 + face[0][:2]
        return found

    def _detect(self, frame: np.ndarray, last: Box | None) -> list[ScoredBox]:
        side = 30.0 + 15 * frame[0, 0, 0]
        faces = [((5.0, 20.0, 45.0, 60.0), 1.0), ((60.0, 20.0, 60 + side, 20 + side), 1.0)]
        return faces if frame.any() else []


def test_samples_are_numbered_timed_and_cropped():
    samples = make(scene(1, 12), face_at(12), num_frames=5)
    assert [s.number for s in samples] == [0, 1, 2, 3, 4]
    assert [s.pts_s for s in samples] == sorted(s.pts_s for s in samples)
    for sample in samples:
        assert (sample.person, sample.video, sample.split) == ("ann", "talk", "train")
        assert (sample.segment, sample.original) == ("s", "s.mp4")
        assert sample.frame.shape == sample.raster.shape == (48, 48, 3)


def test_a_raster_is_drawn_from_exactly_the_stored_landmarks():
    for sample in make(scene(1, 8), face_at(8, left=33.3)):
        np.testing.assert_array_equal(sample.landmarks * 8, np.round(sample.landmarks * 8))
        np.testing.assert_array_equal(sample.raster, draw(sample.landmarks, 48))


def test_the_crop_does_not_depend_on_how_many_frames_are_wanted():
    pixels, found = scene(2, 12), face_at(12)
    found.points[3] += 4
    many, few = make(pixels, found, num_frames=12), make(pixels, found, num_frames=4)
    by_time = {s.pts_s: s for s in many}
    for sample in few:
        np.testing.assert_array_equal(sample.frame, by_time[sample.pts_s].frame)


def test_frames_are_chosen_evenly_over_all_segments():
    first, second = scene(3, 4), scene(4, 12, height=70)
    samples = faces_of(
        "ann",
        "talk",
        "val",
        judged([segment(first, "a"), segment(second, "b")], [face_at(4), face_at(12, top=10)]),
        num_frames=8,
        min_frames=1,
        spec=SPEC,
    )
    assert [s.segment for s in samples] == ["a"] * 2 + ["b"] * 6


def test_evenly_takes_all_when_there_are_few_and_spreads_otherwise():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(9, 3) == [1, 4, 7]
    for num_items in range(1, 40):
        for num_wanted in range(1, 12):
            chosen = evenly(num_items, num_wanted)
            assert len(set(chosen)) == min(num_items, num_wanted)
            assert set(chosen) <= set(range(num_items))


def test_two_people_one_after_the_other_in_a_file_are_not_one_person(dlib_aligner, tmp_path):
    """The cut lies inside the second of three segments."""
    pictures = astronaut_sways(48) + other_talks(64)
    path = write_video(tmp_path / "film.mp4", pictures, rate=4)
    video = Video(
        person="ann", video="talk", split="", segments=(Segment(path=str(path), name="f"),)
    )
    segments = decode_video(video, 48, DecodeConfig()).segments
    assert not isinstance(segments, Reject)
    assert len(segments) == 3
    (seen,) = find_and_judge(dlib_aligner, [segments], [32])
    samples = faces_of("ann", "talk", "train", seen, num_frames=32, min_frames=16, spec=SPEC)
    assert not isinstance(samples, Reject)
    assert min(s.pts_s for s in samples) >= 12
    assert len(samples) > 24


def test_only_good_frames_become_samples():
    found = face_at(6)
    found.found[[1, 4]] = False
    assert {s.pts_s * 4 for s in make(scene(1, 6), found)} == {0, 2, 3, 5}


def test_too_few_good_frames_are_a_reject_that_accounts_for_all():
    found = face_at(10, side=50)
    found.found[:6] = False
    found.points[6] *= 0.1
    frames = scene(1, 10)
    reject = make(frames, found, min_frames=4)
    assert reject == Reject(
        id="ann/talk",
        stage="faces",
        reason="no face: 3 good frames of 10, 4 needed (no face in 6, face too small in 1)",
        thumbnail=thumbnail_of(frames[5]),
    )


def test_a_video_that_is_too_short_says_so():
    reject = make(scene(1, 2), face_at(2), min_frames=4)
    assert isinstance(reject, Reject)
    assert reject.reason == "too few frames: 2 good frames of 2, 4 needed (all good)"


def test_where_all_are_good_no_more_frames_are_aligned_than_are_stored():
    parts = [segment(scene(1, 9), "a"), segment(scene(2, 6, height=70), "b")]
    videos = [parts, [segment(scene(3, 8))]]
    aligner = Counted(NullAligner())
    first, second = find_and_judge(aligner, videos, [10, 5])
    assert aligner.calls == [10 + 5, 0]
    assert counts(first) == (10, 10)
    assert counts(second) == (5, 5)
    pts_s = np.concatenate([part.pts_s for part in first.segments])
    np.testing.assert_array_equal(pts_s * 4, np.r_[0:9, 0:6][evenly(15, 10)])


def test_where_some_are_bad_the_others_of_their_video_are_aligned_in_one_more_round():
    fine, dark, frozen, lost = (scene(seed, 12) for seed in range(4))
    dark[5:7] = 0
    frozen[6:8] = frozen[5]
    lost[:] = 0
    videos = [[segment(frames)] for frames in (fine, dark, frozen, lost)]
    aligner = Counted(ByLight())
    seen = find_and_judge(aligner, videos, [8] * 4)
    assert aligner.calls == [4 * 8, 3 * 4]
    assert [counts(judged) for judged in seen] == [(8, 8), (10, 12), (10, 12), (0, 12)]
    samples = faces_of("ann", "a", "", seen[1], num_frames=8, min_frames=4, spec=SPEC)
    good = [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert [s.pts_s * 4 for s in samples] == [good[k] for k in evenly(10, 8)]


def test_a_few_candidates_are_looked_at_once(dlib_aligner):
    pixels = scene(1, 4)
    aligner = Counted(dlib_aligner)
    (seen,) = find_and_judge(aligner, [[segment(pixels)]], [6])
    assert aligner.calls == [4, 0]
    assert counts(seen) == (0, 4)


@pytest.mark.parametrize("lost", [0, 3, 11])
def test_landmarks_of_both_rounds_lie_with_their_frames(dlib_aligner, lost):
    """A head that moves 8 px a frame is found where it is."""
    pixels = np.stack([astronaut()[:210, 150 - 8 * i :][:, :240] for i in range(12)])
    pixels[lost] = 0
    parts = [pixels[:7], pixels[7:]]
    aligner = Counted(dlib_aligner)
    (seen,) = find_and_judge(aligner, [[*map(segment, parts, "ab")]], [8])
    assert aligner.calls == [8, 4]
    found, whole = (Landmarks.joined(f) for f in (seen.landmarks, aligner.landmarks_of(parts)))
    assert np.flatnonzero(~found.found).tolist() == [lost]
    np.testing.assert_array_equal(found.found, whole.found)
    np.testing.assert_allclose(found.points, whole.points, atol=3)
    np.testing.assert_allclose(found.boxes, whole.boxes, atol=16)


def test_the_others_keep_to_the_face_that_the_first_frames_follow():
    pixels = scene(1, 12)
    pixels[:, 0, 0, 0] = range(12)
    pixels[6] = 0
    (seen,) = find_and_judge(Crowd(), [[segment(pixels)]], [8])
    assert counts(seen) == (11, 12)
    assert set(seen.landmarks[0].boxes[:, 0].tolist()) == {0.0, 5.0}


def test_a_video_is_judged_alike_in_any_company(dlib_aligner):
    sways, talks = np.stack(astronaut_sways(12)), np.stack(other_talks(9))
    talks[3] = 0
    videos = [[segment(sways)], [segment(talks[:5], "a"), segment(talks[5:], "b")]]
    together = find_and_judge(dlib_aligner, videos, [8, 6])
    for video, wanted, seen in zip(videos, [8, 6], together, strict=True):
        (alone,) = find_and_judge(dlib_aligner, [video], [wanted])
        assert [v.tolist() for v in alone.verdicts] == [v.tolist() for v in seen.verdicts]
        for a, b in zip(alone.landmarks, seen.landmarks, strict=True):
            np.testing.assert_array_equal(a.points, b.points)
    assert [counts(judged) for judged in together] == [(8, 8), (8, 9)]


def test_a_photo_and_a_folder_of_photos_become_samples(dlib_aligner, tmp_path):
    spec = face_spec(dlib_aligner, CropConfig(image_px=64))
    for name, left in (("b.png", 100), ("a.jpg", 60)):
        cv2.imwrite(str(tmp_path / name), astronaut()[:220, left : left + 260, ::-1])
    (tmp_path / "notes.txt").write_text("not a photo")
    (photo,) = read_faces(tmp_path / "b.png", dlib_aligner, spec, 8)
    samples = read_faces(tmp_path, dlib_aligner, spec, 8)
    assert [s.original for s in samples] == ["a.jpg", "b.png"]
    np.testing.assert_array_equal(samples[1].frame, photo.frame)
    # The same head is framed alike, wherever the photo was cut.
    assert np.abs(samples[0].landmarks - samples[1].landmarks).mean() < 2


def test_a_photo_without_a_face_is_a_reject(dlib_aligner, tmp_path):
    spec = face_spec(dlib_aligner, CropConfig(image_px=64))
    cv2.imwrite(str(tmp_path / "wall.png"), np.full((80, 130, 3), 90, np.uint8))
    reject = read_faces(tmp_path / "wall.png", dlib_aligner, spec, 4)
    assert isinstance(reject, Reject)
    assert reject.reason.startswith("no face: 0 good frames of 1")


def test_paths_that_hold_nothing_are_errors_for_people(tmp_path):
    aligner = NullAligner()
    with pytest.raises(ValueError, match=r"no file or folder .*gone\.mp4"):
        read_faces(tmp_path / "gone.mp4", aligner, SPEC, 4)
    with pytest.raises(ValueError, match=r"no photo or video. Expected files ending in: .*\.mp4"):
        read_faces(tmp_path, aligner, SPEC, 4)
    (tmp_path / "text.jpg").write_text("not a photo")
    with pytest.raises(ValueError, match=r"text\.jpg holds no picture"):
        read_faces(tmp_path, aligner, SPEC, 4)


def test_an_aligner_crop_or_palette_other_than_the_specs_is_refused():
    spec = face_spec(NullAligner(), CropConfig())
    require_aligner(spec, NullAligner())
    for name in ("backend", "detector", "align_rules", "weights_sha256", "palette", "crop_rules"):
        other = dataclasses.replace(spec, **{name: "crayons"})
        with pytest.raises(ValueError, match=f"{name} is '.*', not 'crayons'"):
            require_aligner(other, NullAligner())


def test_a_constant_that_changes_the_crop_changes_its_name(monkeypatch):
    before = crop_id()
    monkeypatch.setattr("pipeline.crop.LIFT", 0.2)
    assert crop_id() != before


def test_a_constant_that_changes_samples_changes_the_name_of_their_rules(monkeypatch):
    before = faces_id()
    monkeypatch.setattr("pipeline.faces.PNG_FLAGS", (7,))
    assert faces_id() != before
