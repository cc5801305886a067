"""FAN in batches gives the points of the library's own call, and nothing is ever downloaded."""

import hashlib
from dataclasses import replace

import cv2
import face_alignment
import numpy as np
import pytest
import torch
from face_alignment.detection.sfd.net_s3fd import s3fd
from face_alignment.models import FAN
from skimage.data import astronaut

from pipeline.align import identify, make_aligner
from pipeline.align_fan import FanAligner, fan_weights
from pipeline.config import AlignConfig

FAN_FILE = "2DFAN4-11f355bf06.pth.tar"
SFD_FILE = "s3fd-619a316812.pth"


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """A torch.hub cache with networks of the real architecture and random weights.

    Random weights suffice: FAN's 68 peaks then lie in 60-odd places that depend on the picture, and
    SFD fires here and there.
    """
    home = tmp_path_factory.mktemp("torch")
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(5)
    torch.save(FAN(4).state_dict(), checkpoints / FAN_FILE)
    torch.save(s3fd().state_dict(), checkpoints / SFD_FILE)
    return home


@pytest.fixture
def config(torch_home, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return AlignConfig(backend="fan", device="cpu", batch_frames=3)


def segments() -> list[np.ndarray]:
    """Two segments of different lengths and sizes, five different pictures."""
    face = astronaut()[:240, 120:320]
    wide = [cv2.resize(face, (112, 96)), cv2.resize(face[:, ::-1], (112, 96))]
    tall = [cv2.resize(face[y:], (80, 104)) for y in (0, 20, 40)]
    return [np.stack(wide), np.stack(tall)]


def test_batches_over_segments_give_the_librarys_points_frame_by_frame(config):
    library = face_alignment.FaceAlignment(
        face_alignment.LandmarksType.TWO_D, device="cpu", flip_input=False, compile=False
    )
    found = make_aligner(config).landmarks_of(segments())
    for frames, landmarks in zip(segments(), found, strict=True):
        assert landmarks.found.all()
        for i, frame in enumerate(frames):
            boxes = library.face_detector.detect_from_image(frame)
            (box,) = [b for b in boxes if np.allclose(b[:4], landmarks.boxes[i], atol=1e-3)]
            (points,), (scores,), _ = library.get_landmarks_from_image(
                frame, detected_faces=[box], return_landmark_score=True
            )
            np.testing.assert_array_equal(landmarks.points[i], points + 0.5)
            np.testing.assert_allclose(landmarks.scores[i], scores.mean(), rtol=1e-4)


def test_a_picture_in_which_the_detector_sees_nothing_is_not_found(config, torch_home, tmp_path):
    blind = s3fd()
    for name, parameter in blind.named_parameters():
        if "conf" in name and name.endswith("bias"):
            parameter.data[0] = 20.0  # all background
    torch.save(blind.state_dict(), tmp_path / SFD_FILE)
    (tmp_path / FAN_FILE).symlink_to(torch_home / "hub" / "checkpoints" / FAN_FILE)
    aligner = make_aligner(AlignConfig(backend="fan", device="cpu", weights_dir=str(tmp_path)))
    landmarks = aligner.landmarks(segments()[0])
    assert not landmarks.found.any()
    assert not landmarks.points.any()


def test_the_weights_are_recorded_by_hash(config, torch_home):
    checkpoints = torch_home / "hub" / "checkpoints"
    hashes = [hashlib.sha256((checkpoints / f).read_bytes()) for f in (FAN_FILE, SFD_FILE)]
    aligner = make_aligner(config)
    assert aligner.weights_sha256 == "+".join(h.hexdigest() for h in hashes)
    assert identify(config) == ("fan", "sfd", FanAligner.rules, aligner.weights_sha256)


def test_missing_weights_are_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=rf"{FAN_FILE} and {SFD_FILE}.*align.backend dlib"):
        make_aligner(AlignConfig(backend="fan", device="cpu"))
    (tmp_path / FAN_FILE).touch()
    with pytest.raises(FileNotFoundError, match=r"needs face_detection_yunet.*align.weights_dir"):
        fan_weights("yunet", tmp_path)


def test_a_detector_that_face_alignment_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match="'hog'; the fan backend has sfd, blazeface"):
        fan_weights("hog", tmp_path)


def test_weights_cut_short_are_an_error_that_names_the_files(config, torch_home, tmp_path):
    for name in (FAN_FILE, SFD_FILE):
        data = (torch_home / "hub" / "checkpoints" / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"cut short.*{FAN_FILE}"):
        make_aligner(AlignConfig(backend="fan", device="cpu", weights_dir=str(tmp_path)))


def test_cuda_is_refused_where_there_is_none(config, torch_home):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    folder = str(torch_home / "hub" / "checkpoints")
    with pytest.raises(ValueError, match=r"align.device is cuda"):
        make_aligner(AlignConfig(backend="fan", device="cuda", weights_dir=folder))


@pytest.mark.gpu
def test_a_gpu_gives_the_points_of_a_cpu(config):
    on_cpu = make_aligner(config).landmarks_of(segments())
    on_gpu = make_aligner(replace(config, device="cuda")).landmarks_of(segments())
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_array_equal(gpu.found, cpu.found)
        # A peak of even height may fall to its neighbour: not bit for bit, but nearly everywhere.
        assert (gpu.points == cpu.points).mean() > 0.95
