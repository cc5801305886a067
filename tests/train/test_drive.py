"""A person driven by a video: every frame drawn, whatever the driver's face is."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipeline.align import Landmarks, follow_face, make_aligner, template
from pipeline.config import AlignConfig
from pipeline.crop import to_crop
from tests.pipeline.videos import write_video
from tests.train.bases import MODEL, face_spec, make_base
from tests.train.shards import make_samples
from train.checkpoint import load_base
from train.data import faces_of_samples
from train.drive import DriveConfig, Motion, drive, find_motion, main, steer
from train.person import load_generator, load_person, save_person
from train.personalise import embed

PX = MODEL.image_px


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("person")
    face = face_spec()
    base = load_base(make_base(folder / "run", face))
    faces = faces_of_samples(make_samples("ada", "v1", "train", 3, face.image_px), PX)
    embedded = embed(base, faces, torch.device("cpu"))
    save_person(folder / "ada.pt", embedded.as_person("ada", "feed-forward", base, faces))
    return folder / "ada.pt"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "driver.mp4"
    return write_video(path, num_frames=21, rate=30, sound=True)


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]


def test_a_film_has_every_frame_of_its_driver(person, driver, tmp_path, capsys) -> None:
    film = tmp_path / "film.mp4"
    main(["--person", str(person), "--driver", str(driver), "--output", str(film)])
    assert [p.shape for p in pictures(film)] == [(PX, PX, 3)] * 21
    with av.open(str(film)) as container:
        assert container.streams.video[0].average_rate == 30
        assert container.streams.audio
        assert "ynthetic" in container.metadata["comment"]
    said = capsys.readouterr().out
    assert re.search(r"film\.mp4: 21 frames at 30 fps, 0 held without a face", said)


@pytest.mark.parametrize("absolute", [False, True])
def test_side_by_side_shows_driver_raster_and_film(person, driver, tmp_path, absolute) -> None:
    film = tmp_path / "film.mp4"
    flags = ["--absolute"] if absolute else []
    named = ["--person", str(person), "--driver", str(driver), "--output", str(film)]
    main([*named, "--side-by-side", *flags])
    shown = pictures(film)
    assert len(shown) == 21
    assert {p.shape for p in shown} == {(PX, 3 * PX, 3)}


class Blinkered:
    """A landmark backend that finds no face in some frames."""

    backend, detector, rules, weights_sha256 = "null", "none", "", ""

    def __init__(self, missing: set[int]) -> None:
        self._missing = missing
        self._seen = 0
        self._aligner = make_aligner(AlignConfig(backend="null"))

    def landmarks_of(self, segments):
        return [self.landmarks(frames) for frames in segments]

    def landmarks(self, frames, last=None) -> Landmarks:
        numbers = range(self._seen, self._seen + len(frames))
        self._seen += len(frames)
        seen = self._aligner.landmarks(frames)
        seen.found[[n in self._missing for n in numbers]] = False
        seen.points[~seen.found] = 0
        return seen


def test_frames_without_a_face_are_held_and_counted(person, driver, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("train.drive.aligner_of", lambda *_, **__: Blinkered({0, 5, 6, 20}))
    config = DriveConfig(person=person, driver=driver, output=tmp_path / "film.mp4")
    ada = load_person(person)
    motion = drive(config, ada, load_generator(ada))
    assert np.flatnonzero(~motion.found).tolist() == [0, 5, 6, 20]
    assert len(pictures(config.output)) == 21


def test_a_driver_without_a_face_is_an_error(person, driver, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("train.drive.aligner_of", lambda *_, **__: Blinkered(set(range(21))))
    with pytest.raises(SystemExit, match="no frame of the driver shows a face"):
        main(
            ["--person", str(person), "--driver", str(driver), "--output", str(tmp_path / "f.mp4")]
        )
    assert not list(tmp_path.iterdir())


def test_a_long_driver_is_read_in_pieces(driver, monkeypatch) -> None:
    whole = find_motion(driver, make_aligner(AlignConfig(backend="null")))
    monkeypatch.setattr("train.drive.CHUNK_FRAMES", 4)
    pieces = find_motion(driver, make_aligner(AlignConfig(backend="null")))
    assert (whole.points == pieces.points).all()
    assert (whole.pts_s == pieces.pts_s).all()


class Crowded:
    """A landmark backend that sees two faces, of which the second soon becomes the larger."""

    backend, detector, rules, weights_sha256 = "null", "none", "", ""

    def __init__(self) -> None:
        self._seen = 0

    def _detect(self, frame, last):
        side = 8 + 3 * self._seen
        self._seen += 1
        left = float(self._seen)
        return [((left, 0.0, left + 20, 20.0), 1.0), ((60.0, 60.0, 60.0 + side, 60.0 + side), 1.0)]

    def landmarks_of(self, segments):
        return [self.landmarks(frames) for frames in segments]

    def landmarks(self, frames, last=None) -> Landmarks:
        result = Landmarks.empty(len(frames))
        for i, face in enumerate(follow_face(frames, self._detect, [last])):
            assert face is not None
            result.boxes[i], result.found[i] = face[0], True
            result.points[i] = face[0][:2]
        return result


def test_a_long_driver_stays_the_same_face(driver, monkeypatch) -> None:
    monkeypatch.setattr("train.drive.CHUNK_FRAMES", 4)
    motion = find_motion(driver, Crowded())
    assert motion.points[:, 0, 0].tolist() == list(range(1, 22))


def trembling() -> Motion:
    """A face that moves to and fro from frame to frame, not where the person's face is."""
    noise = np.random.default_rng(0).normal(0, 2, (21, 68, 2))
    points = (template() * 80 + [300, 100] + noise).astype(np.float32)
    return Motion(points=points, found=np.ones(21, np.bool_), pts_s=np.arange(21) / 25)


def test_landmarks_are_smoothed_as_far_as_is_asked_for(person, driver) -> None:
    def tremor(smooth_s: float) -> float:
        config = DriveConfig(
            person=person, driver=driver, output=Path("f.mp4"), smooth_s=smooth_s, absolute=True
        )
        points, _ = steer(trembling(), load_person(person), config)
        return float(np.abs(np.diff(points, axis=0)).mean())

    assert tremor(0.2) < 0.8 * tremor(0.05) < 0.8 * 0.8 * tremor(0.0)


def test_absolute_draws_the_drivers_own_landmarks(person, driver) -> None:
    ada, motion = load_person(person), trembling()
    config = DriveConfig(person=person, driver=driver, output=Path("f.mp4"), smooth_s=0)
    fitted, square = steer(motion, ada, config)
    own, _ = steer(motion, ada, replace(config, absolute=True))
    assert np.allclose(own, to_crop(motion.points, square, PX))
    persons = ada.landmarks.mean(axis=(0, 1))
    assert np.allclose(fitted.mean(axis=(0, 1)), persons, atol=0.01)
    assert np.abs(own.mean(axis=(0, 1)) - persons).max() > 0.1


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(
    person, driver, tmp_path, monkeypatch, capsys
) -> None:
    def interrupted(generator, points, config):
        raster = np.zeros((PX, PX, 3), np.uint8)
        yield raster, raster
        raise KeyboardInterrupt

    monkeypatch.setattr("train.drive.draw_person", interrupted)
    with pytest.raises(SystemExit) as end:
        main(
            ["--person", str(person), "--driver", str(driver), "--output", str(tmp_path / "f.mp4")]
        )
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("drive: stopped\n")
    assert not list(tmp_path.iterdir())


def test_the_driver_and_the_person_are_not_overwritten(person, driver, tmp_path) -> None:
    own = Path(shutil.copy(driver, tmp_path / "own.mp4"))
    (tmp_path / "link.mp4").symlink_to(own)
    for output in (own, tmp_path / "link.mp4"):
        with pytest.raises(SystemExit, match=r"mp4 would replace an input"):
            main(["--person", str(person), "--driver", str(own), "--output", str(output)])
    assert own.read_bytes() == driver.read_bytes()


def test_a_base_that_is_given_must_be_there(person, driver, tmp_path) -> None:
    named = ["--person", str(person), "--driver", str(driver), "--output", str(tmp_path / "f.mp4")]
    with pytest.raises(SystemExit, match=r"the base of ada.* is not at .*gone"):
        main([*named, "--base", str(tmp_path / "gone")])


@pytest.mark.parametrize(
    ("name", "value"), [("smooth_s", float("nan")), ("smooth_s", -1.0), ("batch_size", 0)]
)
def test_settings_that_make_no_sense_are_refused(person, driver, name, value) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}: give"):
        DriveConfig(person=person, driver=driver, output=Path("f.mp4"), **{name: value})


def test_what_cannot_be_used_is_named(person, driver, tmp_path) -> None:
    output = ["--output", str(tmp_path / "film.mp4")]
    with pytest.raises(SystemExit, match=r"drive: .*nobody\.pt is not a person's file"):
        main(["--person", str(tmp_path / "nobody.pt"), "--driver", str(driver), *output])
    (tmp_path / "p.txt").write_text("a person")
    with pytest.raises(SystemExit, match=r"drive: .*p\.txt is not a readable checkpoint"):
        main(["--person", str(tmp_path / "p.txt"), "--driver", str(driver), *output])
    text = tmp_path / "driver.mp4"
    text.write_text("not a video")
    with pytest.raises(SystemExit, match=r"drive: .*driver\.mp4.*not a video"):
        main(["--person", str(person), "--driver", str(text), *output])
    with pytest.raises(SystemExit, match=r"drive: .*gone\.mp4"):
        main(["--person", str(person), "--driver", str(tmp_path / "gone.mp4"), *output])
    with pytest.raises(ValueError, match=r"film\.gif: give a name that ends in \.mp4"):
        DriveConfig(person=person, driver=driver, output=Path("film.gif"))
