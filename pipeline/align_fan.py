"""The paper's landmark network, FAN of face-alignment, batched over frames and videos.

    segment -> frames -> [landmarks] -> raster -> sample -> shard

The library's own calls put one picture at a time through the network. Here its detector, cropping
and reading of heatmaps are kept and only the network is given batches: same points as its
`get_landmarks_from_image`. Weights are read from files that must be there; nothing is ever
downloaded.
"""

import importlib
import logging
import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from face_alignment import utils as fan_utils
from face_alignment.api import models_urls
from face_alignment.detection.core import FaceDetector
from face_alignment.models import FAN
from jaxtyping import Float32, UInt8

from pipeline.align import (
    SAME_FACE_IOU,
    Box,
    Identity,
    Landmarks,
    Lasts,
    ScoredBox,
    area,
    file_sha256,
    follow_face,
)
from pipeline.config import AlignConfig, rules_id

FAN_URL = models_urls["2DFAN-4"]

DETECTOR_FILES = {
    "sfd": ("s3fd-619a316812.pth",),
    "blazeface": ("blazeface.pth", "anchors.npy"),
    "retinaface": ("retinaface_mobilenet0.25.pth",),
    "yunet": ("face_detection_yunet_2023mar.onnx",),
}
"""Files of each detector, as its constructor takes them: weights, then anchors."""


class FaceView(NamedTuple):
    """A face cut out for the network, and where it was: box centre and scale, as the library has
    them."""

    picture: UInt8[np.ndarray, "256 256 3"]
    centre: np.ndarray
    scale: float


class FanAligner:
    """2D-FAN-4 behind a detector of face-alignment, without the flip test that doubles its cost."""

    backend = "fan"
    rules = rules_id(SAME_FACE_IOU, "no flip test")

    def __init__(self, config: AlignConfig) -> None:
        folder = weights_folder(config.weights_dir)
        fan_file, *detector_files = fan_weights(config.detector, folder)
        self.detector = config.detector
        self.weights_sha256 = identify_fan(config).weights_sha256
        self._device = choose_device(config.device)
        self._batch_frames = config.batch_frames
        try:
            self._net = load_fan(fan_file, self._device)
            self._face_detector = load_detector(config.detector, detector_files, self._device)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"Weights in {folder} can't be read, as after a download cut short. Delete "
                f"and get again: {', '.join(f.name for f in (fan_file, *detector_files))}."
            ) from error

    def landmarks(self, frames: UInt8[np.ndarray, "n h w 3"], last: Box | None = None) -> Landmarks:
        return self.landmarks_of([frames], [[last]])[0]

    def landmarks_of(
        self, segments: Sequence[np.ndarray], lasts: Sequence[Lasts] = ()
    ) -> list[Landmarks]:
        """Detect frame by frame, then run the network over the faces of all segments together."""
        results = [Landmarks.empty(len(frames)) for frames in segments]
        where = []
        parts = zip(segments, lasts or [()] * len(segments), strict=True)
        for s, (frames, known) in enumerate(parts):
            for i, face in enumerate(follow_face(frames, self._detect, known)):
                if face is not None:
                    results[s].boxes[i] = face[0]
                    results[s].found[i] = True
                    where.append((s, i, face[0]))
        faces = (self._view(segments[s][i], box) for s, i, box in where)
        for (s, i, _), (points, score) in zip(where, self._points(faces), strict=True):
            results[s].points[i], results[s].scores[i] = points, score
        return results

    def _detect(self, frame: UInt8[np.ndarray, "h w 3"], last: Box | None) -> list[ScoredBox]:
        """Find the faces of a frame, wherever the last one was."""
        del last
        found = [np.asarray(f, np.float64) for f in self._face_detector.detect_from_image(frame)]
        boxes = [((f[0], f[1], f[2], f[3]), 1.0) for f in found if np.isfinite(f).all()]
        return [face for face in boxes if face[0][2] > face[0][0] and area(face[0]) > 1]

    def _view(self, frame: UInt8[np.ndarray, "h w 3"], box: Box) -> FaceView:
        """Cut out a face in the library's way."""
        width, height = box[2] - box[0], box[3] - box[1]
        centre = np.array([box[2] - width / 2.0, box[3] - height / 2.0])
        centre[1] = centre[1] - height * fan_utils.CENTER_Y_OFFSET
        scale = (width + height) / self._face_detector.reference_scale
        return FaceView(fan_utils.crop(frame, centre, scale), centre, scale)

    def _points(
        self, faces: Iterator[FaceView]
    ) -> Iterator[tuple[Float32[np.ndarray, "68 2"], float]]:
        """Run the network over batches of faces, and read points and mean peak height off its
        heatmaps."""
        while batch := list(islice(faces, self._batch_frames)):
            heatmaps = self._heatmaps(np.stack([face.picture for face in batch]))
            for face, heatmap in zip(batch, heatmaps, strict=True):
                _, points, peaks = fan_utils.get_preds_fromhm(
                    heatmap[None], face.centre, face.scale
                )
                # The library counts whole pixels; their centres lie half a pixel further.
                yield (points[0] + 0.5).astype(np.float32), float(peaks.mean())

    @torch.no_grad()
    def _heatmaps(
        self, pictures: UInt8[np.ndarray, "b 256 256 3"]
    ) -> Float32[np.ndarray, "b 68 64 64"]:
        planes = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32) / 255.0
        last_stack = self._net(torch.from_numpy(planes).to(self._device))[-1]
        return last_stack.float().cpu().numpy()


def identify_fan(config: AlignConfig) -> Identity:
    """Hash the files that the config names, FAN's first."""
    files = fan_weights(config.detector, weights_folder(config.weights_dir))
    sha256 = "+".join(file_sha256(file) for file in files)
    return Identity("fan", config.detector, FanAligner.rules, sha256)


def weights_folder(weights_dir: str | None) -> Path:
    """Name the folder of weights: the one that is set, or where the library's downloads are
    kept."""
    return Path(weights_dir) if weights_dir else Path(torch.hub.get_dir()) / "checkpoints"


def fan_weights(detector: str, folder: Path) -> list[Path]:
    """List FAN's file and the detector's, or say which are missing and what to do about it."""
    if detector not in DETECTOR_FILES:
        raise ValueError(
            f"align.detector is {detector!r}; the fan backend has {', '.join(DETECTOR_FILES)}."
        )
    files = [folder / Path(FAN_URL).name, *(folder / name for name in DETECTOR_FILES[detector])]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--align.backend fan needs {' and '.join(missing)}, not found in {folder}. Put "
            "them there (face-alignment's own first run does, where it reaches the web: FAN is "
            f"{FAN_URL}), name their folder with --align.weights_dir, or use --align.backend dlib, "
            "which brings its own."
        )
    return files


def choose_device(device: str) -> str:
    """Resolve `auto` to a GPU where there is one; a CPU is worth a warning."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("align.device is cuda, but torch sees no GPU here: use auto or cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        logging.getLogger(__name__).warning(
            "FAN runs on the CPU here: about 0.3 s a frame on top of the detector, many times a "
            "GPU's time. --align.backend dlib takes milliseconds a frame."
        )
    return device


def load_fan(weights: Path, device: str) -> torch.nn.Module:
    """Load the network as the library does, from a given file."""
    net = FAN(4)
    net.load_state_dict(torch.load(weights, map_location=device, weights_only=True))
    return net.to(device).eval().requires_grad_(False)


def load_detector(name: str, files: Sequence[Path], device: str) -> FaceDetector:
    """Construct one of the library's detectors from given files."""
    module = importlib.import_module(f"face_alignment.detection.{name}")
    paths = dict(zip(("path_to_detector", "path_to_anchor"), map(str, files), strict=False))
    # YuNet runs in OpenCV, on the CPU whatever the device, and warns when it is told another.
    return module.FaceDetector(device="cpu" if name == "yunet" else device, **paths)
