"""Frames -> samples: their landmarks, and how the good ones become face and raster.

    segment -> [frames -> landmarks -> raster -> sample] -> shard

The one way from frames to samples: that of the shards and of a user's own video or photos, so what
a network meets later looks like what it was trained on.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Shaped

from pipeline.align import Aligner, Box, Identified, Landmarks, Lasts
from pipeline.config import CropConfig, DecodeConfig, FaceSpec, rules_id
from pipeline.crop import Square, crop, crop_id, square_of, to_crop
from pipeline.decode import SegmentFrames, decode_video, iter_frames
from pipeline.judge import GOOD, judge_files
from pipeline.plan import VIDEO_SUFFIXES, Segment, Video, safe_id
from pipeline.rasterize import draw, palette_id, round_points
from pipeline.sample import PNG_FLAGS, Reject, Sample, thumbnail_of

PHOTO_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"])

PHOTO_SCALE = 2
"""Photos are read at so many times the size of video frames: a face takes less of them."""

TOO_FEW = "too few frames"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Frames of a video with their landmarks and verdicts, one entry of each a segment.

    A verdict names a frame GOOD or what is wrong with it.
    """

    segments: Sequence[SegmentFrames]
    landmarks: Sequence[Landmarks]
    verdicts: Sequence[Shaped[np.ndarray, "_"]]

    @property
    def all_good(self) -> bool:
        """Tell whether there is nothing wrong with any of them."""
        return all((verdict == GOOD).all() for verdict in self.verdicts)


def faces_id() -> str:
    """Name the rules by which good frames become samples: a hash that changes when one does."""
    return rules_id(*PNG_FLAGS, "num_frames first, the others where one of them is bad")


def face_spec(aligner: Identified, config: CropConfig) -> FaceSpec:
    """Record how frames become faces and rasters, to be bound to all that is made of them."""
    return FaceSpec(
        image_px=config.image_px,
        crop_margin=config.margin,
        crop_rules=crop_id(),
        palette=palette_id(),
        backend=aligner.backend,
        detector=aligner.detector,
        align_rules=aligner.rules,
        weights_sha256=aligner.weights_sha256,
    )


def find_and_judge(
    aligner: Aligner, videos: Sequence[Sequence[SegmentFrames]], num_frames: Sequence[int]
) -> list[Judged]:
    """Find the faces in the candidate frames of videos and judge them, each video as if alone.

    Looks at num_frames of a video's candidates first, evenly over them. Mostly these are all good,
    and will do. Where one is not, looks at the others too, each of which continues the track of
    those before it; then all are judged together. So no frame is looked at twice, and each round is
    one call of the aligner, which has the frames of all videos for its batches.
    """
    marks = [_spread(video, wanted) for video, wanted in zip(videos, num_frames, strict=True)]
    firsts = [_only(video, marked) for video, marked in zip(videos, marks, strict=True)]
    found = _find(aligner, firsts)
    judged = [_judged(video, seen) for video, seen in zip(firsts, found, strict=True)]
    again = [
        v
        for v, first in enumerate(judged)
        if not first.all_good and not np.concatenate(marks[v]).all()
    ]
    others = [_only(videos[v], [~marked for marked in marks[v]]) for v in again]
    lasts = [_last_box(*part) for v in again for part in zip(marks[v], found[v], strict=True)]
    for v, rest in zip(again, _find(aligner, others, lasts), strict=True):
        parts = zip(marks[v], found[v], rest, strict=True)
        judged[v] = _judged(videos[v], [_in_order(*part) for part in parts])
    return judged


def _spread(video: Sequence[SegmentFrames], num_frames: int) -> list[Bool[np.ndarray, "_"]]:
    """Mark num_frames of a video's frames, evenly over its segments laid end to end."""
    ends = np.cumsum([len(segment.pixels) for segment in video])
    marks = np.zeros(ends[-1], np.bool_)
    marks[evenly(len(marks), num_frames)] = True
    return np.split(marks, ends[:-1])


def _only(
    video: Sequence[SegmentFrames], marks: Sequence[Bool[np.ndarray, "_"]]
) -> list[SegmentFrames]:
    """Take the marked frames of a video's segments."""
    return [
        replace(segment, pixels=segment.pixels[marked], pts_s=segment.pts_s[marked])
        for segment, marked in zip(video, marks, strict=True)
    ]


def _find(
    aligner: Aligner, videos: Sequence[Sequence[SegmentFrames]], lasts: Sequence[Lasts] = ()
) -> list[list[Landmarks]]:
    """Find the landmarks of all segments of all videos in one go."""
    segments = [segment.pixels for video in videos for segment in video]
    found = iter(aligner.landmarks_of(segments, lasts))
    return [[next(found) for _ in video] for video in videos]


def _judged(segments: Sequence[SegmentFrames], landmarks: Sequence[Landmarks]) -> Judged:
    verdicts = judge_files(segments, landmarks)
    return Judged(segments=segments, landmarks=landmarks, verdicts=verdicts)


def _last_box(marks: Bool[np.ndarray, "n"], marked: Landmarks) -> list[Box | None]:
    """Say of each unmarked frame where the face was in the last marked one that shows it."""
    boxes = [None, *map(tuple, marked.boxes[marked.found].tolist())]
    shown = np.flatnonzero(marks)[marked.found]
    return [boxes[k] for k in np.searchsorted(shown, np.flatnonzero(~marks))]


def _in_order(marks: Bool[np.ndarray, "n"], marked: Landmarks, others: Landmarks) -> Landmarks:
    """Put the landmarks of marked and unmarked frames in order of time."""
    places = np.concatenate([np.flatnonzero(marks), np.flatnonzero(~marks)])
    return Landmarks.joined([marked, others]).at(np.argsort(places))


def faces_of(
    person: str,
    video: str,
    split: str,
    judged: Judged,
    *,
    num_frames: int,
    min_frames: int,
    spec: FaceSpec,
) -> list[Sample] | Reject:
    """Make at most num_frames samples of a video, evenly over its good frames, in order of time.

    Rejects a video with fewer than min_frames good frames, and says what was wrong with the others.
    The crop of a segment is set by all its good frames, whichever of them are chosen.
    """
    segments, landmarks, verdicts = judged.segments, judged.landmarks, judged.verdicts
    good = [(s, i) for s, verdict in enumerate(verdicts) for i in np.flatnonzero(verdict == GOOD)]
    if len(good) < min_frames:
        return Reject(
            id=f"{person}/{video}",
            stage="faces",
            reason=_why(verdicts, min_frames),
            thumbnail=_middle(segments),
        )
    squares = {
        s: square_of(landmarks[s].points[verdicts[s] == GOOD], spec.crop_margin)
        for s in {s for s, _ in good}
    }
    samples = []
    for number, (s, i) in enumerate(good[k] for k in evenly(len(good), num_frames)):
        segment, found = segments[s], landmarks[s]
        points = round_points(to_crop(found.points[i], squares[s], spec.image_px))
        samples.append(
            Sample(
                person=person,
                video=video,
                number=number,
                segment=segment.segment,
                pts_s=float(segment.pts_s[i]),
                frame=crop(segment.pixels[i], squares[s], spec.image_px),
                raster=draw(points, spec.image_px),
                landmarks=points,
                box=_box_in_crop(found.boxes[i], squares[s], spec.image_px),
                score=float(found.scores[i]),
                split=split,
                original=segment.original,
            )
        )
    return samples


def read_faces(
    path: str | Path,
    aligner: Aligner,
    spec: FaceSpec,
    num_frames: int,
    config: DecodeConfig = DecodeConfig(),  # noqa: B008 (frozen)
) -> list[Sample] | Reject:
    """Make at most num_frames samples of a person's own video, photo, or folder of either.

    Every photo counts as a segment of its own. Raises ValueError for a path or photo that can't be
    used, and for an aligner that isn't the one the spec was made with.
    """
    require_aligner(spec, aligner)
    path = Path(path)
    name = safe_id(path.stem)
    photos, videos = find_media(path)
    wanted = math.ceil(num_frames * config.oversample)
    segments = [_read_photo(photos[i], config) for i in evenly(len(photos), wanted)]
    if videos:
        files = tuple(Segment(path=str(video), name=safe_id(video.stem)) for video in videos)
        video = Video(person=name, video=name, split="", segments=files)
        decoded = decode_video(video, wanted, config).segments
        if isinstance(decoded, Reject):
            return decoded
        segments += decoded
    (judged,) = find_and_judge(aligner, [segments], [num_frames])
    return faces_of(name, name, "", judged, num_frames=num_frames, min_frames=1, spec=spec)


def require_aligner(spec: FaceSpec, aligner: Identified) -> None:
    """Raise ValueError unless the aligner, and this program's crop and raster, are the spec's."""
    here = face_spec(aligner, CropConfig(image_px=spec.image_px, margin=spec.crop_margin))
    spec.require_same(here, "this machine")


def find_media(path: Path) -> tuple[list[Path], list[Path]]:
    """List the photos and videos that a path stands for; raises ValueError if there are none."""
    if not path.exists():
        raise ValueError(
            f"There is no file or folder {path}. Expected a video, a photo or a folder."
        )
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name[0] != ".")
    photos = [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES]
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    if not photos and not videos:
        known = " ".join(sorted(PHOTO_SUFFIXES | VIDEO_SUFFIXES))
        raise ValueError(
            f"{path} is or holds no photo or video. Expected files ending in: {known}."
        )
    return photos, videos


def _read_photo(path: Path, config: DecodeConfig) -> SegmentFrames:
    first = next(iter_frames(path, config.decode_px * PHOTO_SCALE), None)
    if first is None:
        raise ValueError(f"{path} holds no picture: replace it, or take it out of its folder")
    pixels, _ = first
    return SegmentFrames(
        segment=safe_id(path.stem), pixels=pixels[None], pts_s=np.zeros(1), original=path.name
    )


def evenly(num_items: int, num_wanted: int) -> list[int]:
    """Choose num_wanted of num_items positions at equal distances, all if there are fewer."""
    if num_items <= num_wanted:
        return list(range(num_items))
    return [(2 * k + 1) * num_items // (2 * num_wanted) for k in range(num_wanted)]


def _box_in_crop(
    box: Float32[np.ndarray, "4"], square: Square, image_px: int
) -> tuple[float, float, float, float]:
    left, top, right, bottom = to_crop(box.reshape(2, 2), square, image_px).ravel().tolist()
    return left, top, right, bottom


def _middle(segments: Sequence[SegmentFrames]) -> str:
    """Show the middle one of a video's frames; nothing where there are none."""
    frames = [frame for segment in segments for frame in segment.pixels]
    return thumbnail_of(frames[len(frames) // 2]) if frames else ""


def _why(verdicts: Sequence[Shaped[np.ndarray, "_"]], min_frames: int) -> str:
    """Name the commonest flaw first, then give the account of all frames."""
    counts = Counter(str(word) for verdict in verdicts for word in verdict)
    num_good = counts.pop(GOOD, 0)
    flaws = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = num_good + sum(counts.values())
    account = ", ".join(f"{word} in {count}" for word, count in flaws)
    name = flaws[0][0] if flaws else TOO_FEW
    return (
        f"{name}: {num_good} good frames of {total}, {min_frames} needed ({account or 'all good'})"
    )
