"""Shards -> batches of visits: the reader of training, evaluation and fine-tuning.

    index -> Visit (train/order.py) -> a video's bytes -> K + 1 Faces -> VisitBatch

A video's span is read at its place in the shard and checked before anything in it is decoded; only
the frames that were drawn are decoded, and rasters are drawn anew from the stored landmarks.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.rasterize import draw_each
from pipeline.sample import Sample, decode_picture, key_of, read_landmarks
from pipeline.shard import FrameReader, Index, VideoEntry, tar_name
from pipeline.storage import StorageError, list_files
from train.augment import View
from train.order import (
    Visit,
    held_out_stretches,
    rank_batches,
    spread,
    training_frames,
    visit,
)
from train.stop import STOP_SIGNALS

Split = Literal["train", "val"]

KEPT_BYTES = 24 << 20  # below 32 MB, where glibc stops learning


def to_tensor(pixels: UInt8[Tensor, "*n h w 3"]) -> Float32[Tensor, "*n 3 h w"]:
    """Convert pixels of 0..255 to the networks' [-1, 1], on the device they are on."""
    return pixels.movedim(-1, -3).float().div_(127.5).sub_(1)


def to_pixels(x: Float[Tensor, "*n 3 h w"]) -> UInt8[np.ndarray, "*n h w 3"]:
    """Convert the networks' [-1, 1] to pixels of 0..255; values outside are clipped."""
    scaled = x.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.byte().movedim(-3, -1).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Faces:
    """Frames of one person, their landmarks in pixels of these frames, and the rasters of those."""

    frames: UInt8[np.ndarray, "n p p 3"]
    rasters: UInt8[np.ndarray, "n p p 3"]
    landmarks: Float32[np.ndarray, "n 68 2"]

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, places: Sequence[int]) -> "Faces":
        """Return the faces at these places, in this order."""
        chosen = list(places)
        return Faces(
            frames=self.frames[chosen],
            rasters=self.rasters[chosen],
            landmarks=self.landmarks[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class VisitBatch:
    """A batch of visits in [-1, 1]; `rows` are the videos' rows of W, -1 for a held-out video."""

    rows: Int64[Tensor, " b"]
    sources: Float32[Tensor, "b k 3 h w"]
    source_rasters: Float32[Tensor, "b k 3 h w"]
    target: Float32[Tensor, "b 3 h w"]
    target_raster: Float32[Tensor, "b 3 h w"]
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A clip's frames for judging: sources and targets come from disjoint stretches of it."""

    entry: VideoEntry
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class Shards:
    """The videos of one folder of shards, read as faces of `image_px`.

    With fewer than three persons nobody is held out: the last quarter of every video's frames is
    kept from training instead and serves as val.
    """

    def __init__(self, folder: Path | str, *, image_px: int) -> None:
        self.folder = str(folder)
        self.index = Index.load(self.folder)
        self.frame_reader = FrameReader(self.folder)
        self.image_px = image_px
        if image_px > self.index.face.image_px:
            raise ValueError(
                f"{self.folder} holds frames of {self.index.face.image_px} px, the model asks for "
                f"{image_px} px: build shards with --crop.image-px {image_px} or choose a smaller "
                "preset"
            )
        self.train = tuple(entry for entry in self.index.videos if entry.split == "train")
        held_out = tuple(entry for entry in self.index.videos if entry.split == "val")
        self.hold_out = not held_out
        self.val = held_out or self.train
        _require_shards(self.folder, self.index)
        if not self.train:
            raise ValueError(f"{self.folder}/index.json lists no training video: build more shards")

    def row_of(self, entry: VideoEntry) -> int:
        """Return the video's row of W: its place among the training videos, -1 for val."""
        return self.train.index(entry) if entry.split == "train" else -1

    def person(self, person: str) -> tuple[VideoEntry, ...]:
        """Return the videos of one person, train or val; none when the person isn't here."""
        return tuple(entry for entry in self.index.videos if entry.person == person)

    def frames_for_training(self, num_sources: int) -> list[range]:
        """Return what every training video offers; raise where K + 1 frames can't be had."""
        offered = [training_frames(v.num_frames, hold_out=self.hold_out) for v in self.train]
        fewest = min(range(len(offered)), key=lambda i: len(offered[i]))
        if num_sources + 1 > len(offered[fewest]):
            raise ValueError(
                f"K = {num_sources} sources and a target need {num_sources + 1} frames, but video "
                f"{self.train[fewest].key} in {self.folder} offers {len(offered[fewest])}: lower "
                "--data.num-sources, or build shards with a larger --min-frames"
            )
        return offered

    def held_out(self, split: Split, *, num_sources: int, num_targets: int) -> list[HeldOut]:
        """Return a split's videos with frames for judging, evenly spread over each stretch.

        A short clip gives fewer than asked for. Of a training person, `targets` may have been
        trained on; of a val person nothing has been.
        """
        chosen = []
        for entry in self.train if split == "train" else self.val:
            sources, targets = held_out_stretches(entry.num_frames, hold_out=self.hold_out)
            chosen.append(
                HeldOut(
                    entry=entry,
                    sources=spread(sources, num_sources),
                    targets=spread(targets, num_targets),
                )
            )
        return chosen

    def read(self, entry: VideoEntry, numbers: Sequence[int], view: View | None = None) -> Faces:
        """Read these frames of a video; raise an error that names a shard that isn't right."""
        samples = self.frame_reader.read(entry, numbers)
        keys = [key_of(entry.person, entry.video, number) for number in numbers]
        px = self.image_px
        # One kind of work at a time: what each needs then stays in the processor's caches. Pictures
        # go into place one by one: a list of them, stacked, doubles the pages to map.
        landmarks = np.stack(
            [read_landmarks(k, s["json"]) for k, s in zip(keys, samples, strict=True)]
        ) * np.float32(px / self.index.face.image_px)
        frames = np.empty((len(numbers), px, px, 3), np.uint8)
        for i, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            frame = _at_size(decode_picture(sample["jpg"], f"{key}.jpg"), px)
            frames[i] = frame if view is None else view.of_frame(frame)
        if view is not None:
            landmarks = np.stack([view.of_points(points, px) for points in landmarks])
        return Faces(frames=frames, rasters=draw_each(landmarks, px), landmarks=landmarks)


def faces_of_samples(samples: Sequence[Sample], image_px: int) -> Faces:
    """Return samples that were just made, from a user's own video, as shards would give them."""
    landmarks = np.stack([s.landmarks * np.float32(image_px / len(s.frame)) for s in samples])
    return Faces(
        frames=np.stack([_at_size(s.frame, image_px) for s in samples]),
        rasters=draw_each(landmarks, image_px),
        landmarks=landmarks,
    )


def faces_in_view(faces: Faces, views: Sequence[View]) -> Faces:
    """Return every face in a view of its own, with rasters drawn anew."""
    px = faces.frames.shape[1]
    landmarks = np.stack([v.of_points(p, px) for v, p in zip(views, faces.landmarks, strict=True)])
    return Faces(
        frames=np.stack([v.of_frame(f) for v, f in zip(views, faces.frames, strict=True)]),
        rasters=draw_each(landmarks, px),
        landmarks=landmarks,
    )


def make_loader(
    shards: Shards,
    *,
    num_sources: int,
    batch_size: int,
    seed: int,
    start_visit: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    augment: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[VisitBatch]:
    """Yield this rank's part of every step from `start_visit` on, without end.

    `batch_size` counts the visits of all ranks. The order doesn't depend on `num_workers` or
    `world_size`, so a run resumes at its number of visits seen, on any number of either.
    """
    dataset = _Visits(shards, num_sources=num_sources, seed=seed, augment=augment)
    batches = rank_batches(
        start=start_visit, batch_size=batch_size, rank=rank, world_size=world_size
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.device(device).type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=start_worker,
    )
    return (_to_batch(pixels, torch.device(device)) for pixels in loader)


def fixed_batch(
    shards: Shards,
    split: Split,
    *,
    num_sources: int,
    num_visits: int,
    device: torch.device | str = "cpu",
) -> VisitBatch:
    """Return the same few visits every time, of different persons, for the panel of pictures."""
    visits = shards.held_out(split, num_sources=num_sources, num_targets=1)
    shortest = min(len(v.sources) for v in visits)
    if shortest < num_sources:
        visits = shards.held_out(split, num_sources=shortest, num_targets=1)
    chosen = _one_a_person(visits, num_visits)
    read = [
        _pixels(shards.read(v.entry, [*v.sources, *v.targets]), shards.row_of(v.entry), v.entry.key)
        for v in chosen
    ]
    return _to_batch(_collate(read), torch.device(device))


class _Pixels(NamedTuple):
    """A visit or, stacked, what a worker hands over: a quarter of the bytes that networks see."""

    rows: Int64[Tensor, "*b"]
    frames: UInt8[Tensor, "*b k1 p p 3"]
    rasters: UInt8[Tensor, "*b k1 p p 3"]
    keys: tuple[str, ...]


_Read = _Pixels | ValueError | StorageError


class _Visits(Dataset[_Read]):
    """Visits by number; the order is the sampler's."""

    def __init__(self, shards: Shards, *, num_sources: int, seed: int, augment: bool) -> None:
        self.shards = shards
        self.num_sources = num_sources
        self.seed = seed
        self.augment = augment
        self.frames = shards.frames_for_training(num_sources)

    def visit(self, number: int) -> Visit:
        return visit(number, frames=self.frames, num_sources=self.num_sources, seed=self.seed)

    def __getitem__(self, number: int) -> _Read:
        drawn = self.visit(number)
        entry = self.shards.train[drawn.video]
        view = View.draw(self.seed, number, self.shards.image_px) if self.augment else None
        try:
            faces = self.shards.read(entry, [*drawn.sources, drawn.target], view)
        except (ValueError, StorageError) as error:
            return error  # raised where the batch is asked for, not under a worker's traceback
        return _pixels(faces, drawn.video, entry.key)


def _at_size(frame: UInt8[np.ndarray, "s s 3"], px: int) -> UInt8[np.ndarray, "p p 3"]:
    if len(frame) == px:
        return frame
    return cv2.resize(frame, (px, px), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _pixels(faces: Faces, row: int, key: str) -> _Pixels:
    return _Pixels(
        rows=torch.tensor(row),
        frames=torch.from_numpy(faces.frames),
        rasters=torch.from_numpy(faces.rasters),
        keys=(key,),
    )


def _collate(visits: Sequence[_Read]) -> _Read:
    """Stack visits; in a worker default_collate does it in the memory that is handed over."""
    pixels = []
    for read in visits:
        if not isinstance(read, _Pixels):
            return read
        pixels.append(read)
    return _Pixels(
        rows=default_collate([p.rows for p in pixels]),
        frames=default_collate([p.frames for p in pixels]),
        rasters=default_collate([p.rasters for p in pixels]),
        keys=tuple(key for p in pixels for key in p.keys),
    )


def _to_batch(pixels: _Read, device: torch.device) -> VisitBatch:
    """Move bytes to the device, then convert there; the last frame of a visit is its target."""
    if not isinstance(pixels, _Pixels):
        raise type(pixels)(str(pixels))
    x = to_tensor(pixels.frames.to(device, non_blocking=True))
    y = to_tensor(pixels.rasters.to(device, non_blocking=True))
    return VisitBatch(
        rows=pixels.rows.to(device, non_blocking=True),
        sources=x[:, :-1],
        source_rasters=y[:, :-1],
        target=x[:, -1],
        target_raster=y[:, -1],
        keys=pixels.keys,
    )


def _one_a_person(visits: Sequence[HeldOut], count: int) -> list[HeldOut]:
    """Take one video of each person, then the rest, up to `count`."""
    first = {v.entry.person: v for v in reversed(visits)}
    rest = [v for v in visits if first[v.entry.person] is not v]
    return [*sorted(first.values(), key=lambda v: v.entry.key), *rest][:count]


def _require_shards(folder: str, index: Index) -> None:
    """Raise where a shard is missing or of another size, before hours are spent on the others."""
    sizes = list_files(folder)
    wrong = [
        f"{tar_name(shard.name)} is "
        + ("missing" if size is None else f"{size} bytes, not {shard.num_bytes}")
        for shard in index.shards
        if (size := sizes.get(tar_name(shard.name))) != shard.num_bytes
    ]
    if wrong:
        raise ValueError(
            f"{folder} is not as its index says: {', '.join(wrong[:5])}; {len(wrong)} of "
            f"{len(index.shards)} shards. Build what is missing with pipeline/build_shards.py"
        )


def start_worker(_: int = 0) -> None:
    """Keep a worker to one core, and leave the signals that ask to stop to the training process.

    torchrun and terminals send them to all; a worker that died of one would fail the last step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # glibc gives a visit's few MB back to the system when they are freed, and mapping them again
    # costs as much as decoding. Freeing one large block teaches it to keep them.
    np.empty(KEPT_BYTES, np.uint8)
