"""A person driven by a video: every frame drawn, whatever the driver's face is."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipeline.align import Landmarks, make_aligner
from pipeline.config import AlignConfig
from tests.pipeline.videos import write_video
from tests.train.bases import MODEL, face_spec, make_base
from tests.train.shards import make_samples
from train.checkpoint import load_base
from train.data import faces_of_samples
from train.drive import DriveConfig, drive, find_motion, main
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

    def landmarks(self, frames) -> Landmarks:
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


def test_what_cannot_be_used_is_named(person, driver, tmp_path) -> None:
    output = ["--output", str(tmp_path / "film.mp4")]
    with pytest.raises(SystemExit, match=r"drive: .*nobody\.pt is not a person's file"):
        main(["--person", str(tmp_path / "nobody.pt"), "--driver", str(driver), *output])
    text = tmp_path / "driver.mp4"
    text.write_text("not a video")
    with pytest.raises(SystemExit, match=r"drive: .*driver\.mp4.*not a video"):
        main(["--person", str(person), "--driver", str(text), *output])
    with pytest.raises(SystemExit, match=r"drive: .*gone\.mp4"):
        main(["--person", str(person), "--driver", str(tmp_path / "gone.mp4"), *output])
    with pytest.raises(ValueError, match=r"film\.gif: give a name that ends in \.mp4"):
        DriveConfig(person=person, driver=driver, output=Path("film.gif"))
