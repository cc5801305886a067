"""The settings of the job, and what a face picture is: frozen values that check themselves.

`BuildConfig` is what `build_shards.py` turns into flags. `FaceSpec` is what every later part of the
program is held to: how a frame became a face picture and its raster.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Backend = Literal["fan", "dlib", "null"]


@dataclass(frozen=True, kw_only=True)
class FaceSpec:
    """How a frame becomes a face picture and its raster.

    Bound into the index of the shards, every checkpoint and every person file. Pictures made by two
    different specs must never meet: what training saw and what a user's own video gives are the
    same. crop_rules, palette and align_rules stand for constants of this program: see `rules_id`.
    """

    image_px: int
    crop_margin: float
    crop_rules: str
    palette: str
    backend: str
    detector: str
    align_rules: str
    weights_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Turn the spec into JSON's primitives."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FaceSpec":
        """Read what `to_dict` wrote; raises ValueError on a missing or unknown field."""
        known = {f.name for f in fields(cls)}
        if known != set(values):
            odd = sorted(known ^ set(values))
            raise ValueError(
                f"A face spec has the fields {sorted(known)}; these differ: {odd}. It was written "
                "by another version of this program: build or train again with this one."
            )
        return cls(**values)

    def require_same(self, other: "FaceSpec", where: str) -> None:
        """Raise ValueError naming each field in which `other`, which came from `where`, differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        differing = [
            f"{name} is {theirs[name]!r}, not {value!r}"
            for name, value in mine.items()
            if theirs[name] != value
        ]
        if differing:
            raise ValueError(
                f"The face pictures of {where} were made in another way: {'; '.join(differing)}. "
                "Use the same crop, palette and landmark backend for both, or build them again."
            )


def rules_id(*rules: object) -> str:
    """Name a set of constants: a short hash that changes whenever one of them does."""
    return hashlib.sha256(repr(rules).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """How landmarks are found."""

    backend: Backend = "fan"
    """fan: the paper's face-alignment network (GPU wanted). dlib: 68 points on the CPU, for trying
    things out; needs the `dlib` extra. null: a fixed face, to measure all the rest."""
    detector: str = "sfd"
    """Face detector of the fan backend: sfd, blazeface, retinaface or yunet. Other backends have
    their own."""
    weights_dir: str | None = None
    """Folder with the fan backend's weights. Default: where torch.hub keeps its downloads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where fan runs. auto: on the GPUs that the cluster has when the job starts, one actor each;
    where it has none, on the CPU with a warning."""
    batch_frames: int = 64
    """Faces that fan takes through the network at once. 64 need about 6 GB of GPU memory."""

    def __post_init__(self) -> None:
        if self.batch_frames < 1:
            raise ValueError(f"align.batch_frames must be at least 1, not {self.batch_frames}.")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How the square around a face is cut out."""

    image_px: int = 256
    """Side of the stored face pictures and rasters. Training may shrink them, never enlarge
    them."""
    margin: float = 0.4
    """Room added on each side of the landmarks' box, as a fraction of its longer side."""

    def __post_init__(self) -> None:
        if self.image_px < 16:
            raise ValueError(f"crop.image_px must be at least 16, not {self.image_px}.")
        if not 0 <= self.margin <= 4:
            raise ValueError(f"crop.margin is a fraction of the face, 0 to 4, not {self.margin}.")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How frames are taken out of video files."""

    decode_px: int = 512
    """Frames leave the decoder with at most this many pixels on the longest side."""
    segment_s: float = 10.0
    """Longer files are cut into equal segments of at most this length: a crop and a track hold for
    one."""
    oversample: float = 1.5
    """Candidate frames per stored frame. Those above one are looked at where some of the others are
    bad, so that these don't cost the video."""
    cpu_deadline_s: float = 120.0
    """Seconds of CPU time that decoding one video, with all of its files, may take; then its
    decoder is killed. A video that two fresh decoders die of is rejected."""
    wall_deadline_s: float = 1800.0
    """Seconds by the clock that decoding one video may take, with the same end. For a decoder that
    waits for ever: keep it long, since waiting for slow storage counts."""

    def __post_init__(self) -> None:
        if self.decode_px < 16:
            raise ValueError(f"decode.decode_px must be at least 16, not {self.decode_px}.")
        if self.segment_s <= 0:
            raise ValueError(f"decode.segment_s must be above 0 seconds, not {self.segment_s}.")
        if self.oversample < 1:
            raise ValueError(f"decode.oversample must be at least 1, not {self.oversample}.")
        if min(self.cpu_deadline_s, self.wall_deadline_s) <= 0:
            raise ValueError(
                "decode.cpu_deadline_s and decode.wall_deadline_s must be above 0 seconds."
            )


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Raw video -> shards: finds people's faces and landmarks in a folder of videos."""

    input: str = "data/videos"
    """Folder or s3:// address of the videos: <person>/<video>/<segment>.mp4 as in VoxCeleb2 (also
    under dev/mp4, test/mp4), <person>/<video>.mp4, or files directly in it, each its own person."""
    output: str = "data/shards"
    """Folder or s3:// address for the shards. The same command again finishes what is missing."""
    seed: int = 0
    """Chooses the persons held out and the order of videos in shards."""
    train_frames: int = 32
    """Frames stored per training video."""
    val_frames: int = 64
    """Frames stored per video of a person held out."""
    min_frames: int = 16
    """A video with fewer frames that show a face is rejected. Training needs K + 1 of them."""
    val_fraction: float = 0.05
    """Share of the persons held out for validation: at least one where there are three or more."""
    jpeg_quality: int = 95
    """Quality of the stored frames, 1 to 100."""
    max_reject_rate: float = 0.2
    """The job fails, its shards finished, when a larger share of the videos was rejected."""
    align: AlignConfig = field(default_factory=AlignConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    dry_run: bool = False
    """Print the settings and the size of the plan, and stop."""
    verify: bool = False
    """Read every shard again, compare it with the index, name what is wrong, and stop."""
    retry_rejects: bool = False
    """Build the shards that hold rejected videos once more."""
    ray_address: str | None = None
    """Where to run: host:port, auto for the Ray of this machine, local for a Ray of its own.
    Default: the cluster, where this machine is the head that `ray up` made, else local."""
    num_cpus: int | None = None
    """Cores that a Ray of its own may use. Default: all."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= min(self.train_frames, self.val_frames):
            raise ValueError(
                f"min_frames is {self.min_frames}: it must be at least 1 and at most train_frames "
                f"({self.train_frames}) and val_frames ({self.val_frames})."
            )
        for name in ("val_fraction", "max_reject_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {getattr(self, name)}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality must be 1 to 100, not {self.jpeg_quality}.")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ValueError(f"num_cpus must be at least 1, not {self.num_cpus}.")
        if self.dry_run and self.verify:
            raise ValueError("dry_run and verify are two different jobs: give one of them.")

    def num_frames(self, split: str) -> int:
        """Say how many frames are stored of a video of this split."""
        return self.val_frames if split == "val" else self.train_frames
