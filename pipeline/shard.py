"""Samples -> a tar with its manifest, and back: the index, and the bytes of one video.

    segment -> frames -> landmarks -> raster -> sample -> [shard]

A shard is a plain WebDataset tar; its bytes depend on its samples alone. Beside it lies a manifest,
written after it, which says that the shard is done and what is in it. `index.json` gathers the
manifests: for each video the shard, the span of bytes, their sha256 and the number of frames.
Readers take spans, and a span is checked before it is used. The tar is written with the standard
library: importing webdataset imports torch, 1.2 s and 200 MB in each of a node's workers.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt32

from pipeline.config import FaceSpec
from pipeline.sample import FIELDS, SCHEMA, Reject, Sample, to_fields
from pipeline.storage import join, list_files, read_file, read_parts, remove_file, write_file

INDEX = "index.json"
REJECTS = "rejects.jsonl"

Outcome = Sequence[Sample] | Reject
"""What became of a video."""

Entry = TypeVar("Entry", "VideoEntry", "ShardEntry", Reject)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoEntry:
    """Where a video's frames lie: shard, span of bytes in it, sha256 of the span."""

    person: str
    video: str
    split: str
    shard: str
    offset: int
    num_bytes: int
    sha256: str
    num_frames: int

    @property
    def key(self) -> str:
        """Name the video: "person/video"."""
        return f"{self.person}/{self.video}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A tar file of the output folder: its name, size and sha256."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one shard holds, written when its tar is in place. A shard of rejects alone has no
    tar."""

    name: str
    num_bytes: int
    sha256: str
    videos: tuple[VideoEntry, ...]
    rejects: tuple[Reject, ...]
    damaged_files: tuple[Reject, ...]

    def to_json(self) -> bytes:
        """Turn it into the bytes of its file, always the same ones."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Read what `to_json` wrote; ValueError when it is something else."""
        try:
            facts = json.loads(data)
            schema = facts.pop("schema")
            if schema != SCHEMA:
                raise ValueError(f"schema {schema}, expected {SCHEMA}")
            return cls(
                name=facts.pop("name"),
                num_bytes=facts.pop("num_bytes"),
                sha256=facts.pop("sha256"),
                videos=_entries(VideoEntry, facts.pop("videos")),
                rejects=_entries(Reject, facts.pop("rejects")),
                damaged_files=_entries(Reject, facts.pop("damaged_files")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"Not the manifest of a shard: {error!r}") from error


def _entries(kind: type[Entry], rows: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    """Read a list of entries; TypeError when a field is missing, unknown or of another type."""
    types: dict[str, Any] = {f.name: f.type for f in fields(kind)}
    for row in rows:
        for name, value in row.items():
            if not isinstance(value, types.get(name, object)):
                raise TypeError(f"{name} is {value!r}, expected {types[name].__name__}")
    return tuple(kind(**row) for row in rows)


def tar_name(shard: str) -> str:
    """Name a shard's tar."""
    return f"{shard}.tar"


def manifest_name(shard: str) -> str:
    """Name a shard's manifest."""
    return f"{shard}.json"


def pack(
    shard: str, videos: Iterable[Outcome], jpeg_quality: int
) -> tuple[bytes, list[VideoEntry], list[Reject]]:
    """Make the bytes of a tar, the span of each accepted video in it, and the rejects.

    Takes one video at a time, so that no more than one need be in memory.
    """
    buffer, entries, rejects = io.BytesIO(), [], []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for samples in videos:
            if isinstance(samples, Reject):
                rejects.append(samples)
                continue
            start = buffer.tell()
            for sample in samples:
                for name, data in to_fields(sample, jpeg_quality).items():
                    member = tarfile.TarInfo(f"{sample.key}.{name}")
                    member.size, member.mode = len(data), 0o444
                    tar.addfile(member, io.BytesIO(data))
            span = buffer.getbuffer()[start : buffer.tell()]
            entries.append(_entry(shard, samples, start, span))
            span.release()
    return buffer.getvalue(), entries, rejects


def _entry(shard: str, samples: Sequence[Sample], offset: int, span: memoryview) -> VideoEntry:
    """Describe the span of one video's samples."""
    return VideoEntry(
        person=samples[0].person,
        video=samples[0].video,
        split=samples[0].split,
        shard=shard,
        offset=offset,
        num_bytes=len(span),
        sha256=hashlib.sha256(span).hexdigest(),
        num_frames=len(samples),
    )


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """A shard's files, ready to be written. A shard of rejects alone has no tar."""

    tar: bytes
    manifest: Manifest


def pack_shard(
    name: str,
    videos: Iterable[Outcome],
    jpeg_quality: int,
    damaged_files: Sequence[Reject] = (),
) -> PackedShard:
    """Make a shard's files. damaged_files is read last: taking a video may add to it."""
    data, entries, rejects = pack(name, videos, jpeg_quality)
    tar = data if entries else b""
    manifest = Manifest(
        name=name,
        num_bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest() if tar else "",
        videos=tuple(entries),
        rejects=tuple(rejects),
        damaged_files=tuple(damaged_files),
    )
    return PackedShard(tar=tar, manifest=manifest)


def write_packed(folder: str, shard: PackedShard) -> None:
    """Write a shard's tar, then its manifest, each whole or not at all.

    Doing it twice writes the same bytes, so a retry, or two workers at once, do no harm.
    """
    name = shard.manifest.name
    if shard.tar:
        write_file(folder, tar_name(name), shard.tar)
    else:  # a build before this one may have accepted what is rejected now
        remove_file(folder, tar_name(name))
    write_file(folder, manifest_name(name), shard.manifest.to_json())


@dataclass(frozen=True, kw_only=True)
class Index:
    """All that an output folder holds, and how it was made. videos and shards are sorted."""

    face: FaceSpec
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]
    videos: tuple[VideoEntry, ...]
    rejects: tuple[Reject, ...]
    damaged_files: tuple[Reject, ...] = ()

    @classmethod
    def of(
        cls,
        manifests: Sequence[Manifest],
        face: FaceSpec,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> "Index":
        """Gather the manifests of a job's shards."""
        return cls(
            face=face,
            config=config,
            provenance=provenance,
            shards=tuple(
                ShardEntry(name=m.name, num_bytes=m.num_bytes, sha256=m.sha256)
                for m in sorted(manifests, key=lambda m: m.name)
                if m.videos
            ),
            videos=_sorted(v for m in manifests for v in m.videos),
            rejects=_sorted((r for m in manifests for r in m.rejects), key="id"),
            damaged_files=_sorted((r for m in manifests for r in m.damaged_files), key="id"),
        )

    @cached_property
    def totals(self) -> dict[str, int]:
        """Count what was planned, accepted, rejected and stored."""
        return {
            "planned": len(self.videos) + len(self.rejects),
            "accepted": len(self.videos),
            "rejected": len(self.rejects),
            "damaged_files": len(self.damaged_files),
            "persons": len({v.person for v in self.videos}),
            "frames": sum(v.num_frames for v in self.videos),
            "shards": len(self.shards),
            "bytes": sum(s.num_bytes for s in self.shards),
        }

    def of_split(self, split: str) -> tuple[VideoEntry, ...]:
        """Take the videos of one split, in the order of their keys."""
        return tuple(v for v in self.videos if v.split == split)

    def reasons(self) -> list[tuple[str, str, int]]:
        """Count rejects by stage and by what comes before a reason's first colon; most first."""
        counts = Counter((r.stage, r.reason.split(":")[0]) for r in self.rejects)
        most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [(stage, reason, count) for (stage, reason), count in most_first]

    def rejects_lines(self) -> bytes:
        """List the rejects for people and grep, a line each, without their thumbnails."""
        lines = [
            json.dumps({"what": what, "id": r.id, "stage": r.stage, "reason": r.reason}) + "\n"
            for what, rejects in (("video", self.rejects), ("file", self.damaged_files))
            for r in rejects
        ]
        return "".join(lines).encode()

    def to_json(self) -> bytes:
        """Turn it into the bytes of index.json."""
        facts = {
            "schema": SCHEMA,
            "face": self.face.to_dict(),
            "config": self.config,
            "provenance": self.provenance,
            "totals": self.totals,
            "shards": [asdict(s) for s in self.shards],
            "videos": [{"key": v.key, **asdict(v)} for v in self.videos],
            "rejects": [asdict(r) for r in self.rejects],
            "damaged_files": [asdict(r) for r in self.damaged_files],
        }
        return json.dumps(facts, indent=1).encode()

    def save(self, folder: str) -> None:
        """Write rejects.jsonl, then index.json."""
        write_file(folder, REJECTS, self.rejects_lines())
        write_file(folder, INDEX, self.to_json())

    @classmethod
    def load(cls, folder: str) -> "Index":
        """Read a folder's index; ValueError says what is missing and which command makes it."""
        try:
            facts = json.loads(read_file(folder, INDEX))
        except FileNotFoundError:
            raise ValueError(_no_index(folder)) from None
        except ValueError as error:
            raise ValueError(f"{join(folder, INDEX)} is not JSON: {error}") from error
        schema = facts.get("schema") if isinstance(facts, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"{join(folder, INDEX)} has schema {schema}, and this program reads {SCHEMA}. "
                "Build the shards again with this version."
            )
        try:
            return cls._from_facts(facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{join(folder, INDEX)} is not the index of shards: {error!r}. Delete it, and run "
                "the build again."
            ) from error

    @classmethod
    def _from_facts(cls, facts: Mapping[str, Any]) -> "Index":
        videos = [{k: value for k, value in v.items() if k != "key"} for v in facts["videos"]]
        return cls(
            face=FaceSpec.from_dict(facts["face"]),
            config=facts["config"],
            provenance=facts["provenance"],
            shards=_entries(ShardEntry, facts["shards"]),
            videos=_sorted(_entries(VideoEntry, videos)),
            rejects=_entries(Reject, facts["rejects"]),
            damaged_files=_entries(Reject, facts["damaged_files"]),
        )


def _sorted(items: Any, key: str = "key") -> tuple[Any, ...]:
    return tuple(sorted(items, key=lambda item: getattr(item, key)))


def _no_index(folder: str) -> str:
    """Say why there is no index, as far as the folder tells."""
    found = list_files(folder)
    begun = any(name.endswith(".tar") for name in found)
    state = "holds shards of an unfinished build" if begun else "holds no shards"
    return (
        f"There is no {INDEX} in {folder}: it {state}. "
        f"Run `python pipeline/build_shards.py --input VIDEOS --output {folder}`."
    )


def read_span(folder: str, entry: VideoEntry) -> bytes:
    """Read the bytes of one video's samples, checked against the index.

    Raises ValueError naming shard and video when the shard is missing, too short or altered.
    """
    (span,) = _read_parts(folder, entry, [(entry.offset, entry.num_bytes)])
    if hashlib.sha256(span).hexdigest() != entry.sha256:
        raise _altered(folder, entry)
    return span


class FrameReader:
    """Reads frames of a folder's videos, and gives no byte that it didn't check.

    A video's whole span is checked against the sha256 of the index when it is first read. From then
    on its frames' places and their crc32 are kept, 12 bytes a frame, so that the next visit reads
    and checks only the frames that it takes.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._known: dict[VideoEntry, UInt32[np.ndarray, "n 3"]] = {}

    def read(self, entry: VideoEntry, numbers: Sequence[int]) -> list[dict[str, bytes]]:
        """Read jpg and json of these frames of a video: for each, field -> bytes, undecoded.

        Raises ValueError naming the shard that is missing, too short or altered, or that doesn't
        hold these frames.
        """
        known, span = self._known.get(entry), None
        if known is None:
            span = read_span(self.folder, entry)
            known = self._known[entry] = _frames_in_span(span, entry.num_frames)
        places = known.tolist()
        missing = [n for n in numbers if n >= len(places) or not places[n][1]]
        if missing:
            raise ValueError(
                f"shard {entry.shard}: video {entry.key} has no frames {missing}, though the index "
                "says so: build the shards again"
            )
        chosen = [places[number] for number in numbers]
        if span is None:
            frames = self._read_again(entry, chosen)
        else:
            frames = [span[start:end] for start, end, _ in chosen]
        return [samples_in_span(f)[n] for f, n in zip(frames, numbers, strict=True)]

    def _read_again(self, entry: VideoEntry, places: Sequence[Sequence[int]]) -> list[bytes]:
        """Read the frames at these places, and check them."""
        spans = [(entry.offset + start, end - start) for start, end, _ in places]
        frames = _read_parts(self.folder, entry, spans)
        for frame, (*_, checksum) in zip(frames, places, strict=True):
            if zlib.crc32(frame) != checksum:
                raise _altered(self.folder, entry)
        return frames


def _frames_in_span(span: bytes, num_frames: int) -> UInt32[np.ndarray, "n 3"]:
    """Find where each frame's jpg and json start and end, and their crc32; zeros without a frame.

    A frame's files are adjacent, as every reader of WebDataset expects.
    """
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for number, field, start, size in _members(span):
        if field != "png":
            starts.setdefault(number, start - tarfile.BLOCKSIZE)
            ends[number] = start + size
    places = [(0, 0, 0)] * num_frames
    for number in starts.keys() & range(num_frames):
        start, end = starts[number], ends[number]
        places[number] = start, end, zlib.crc32(memoryview(span)[start:end])
    return np.array(places, np.uint32)


def _read_parts(folder: str, entry: VideoEntry, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read parts of a video's shard, given as offset and size, unchecked but for their size."""
    name = tar_name(entry.shard)
    try:
        parts = read_parts(folder, name, spans)
    except FileNotFoundError:
        raise ValueError(f"Shard {join(folder, name)} is missing. {_again(folder)}") from None
    came, expected = sum(map(len, parts)), sum(size for _, size in spans)
    if came != expected:
        raise ValueError(
            f"Shard {join(folder, name)} is truncated: video {entry.key} has {came} of its "
            f"{expected} bytes. {_again(folder)}"
        )
    return parts


def _altered(folder: str, entry: VideoEntry) -> ValueError:
    return ValueError(
        f"Shard {join(folder, tar_name(entry.shard))} was altered: the bytes of video {entry.key} "
        f"are not those of the index. {_again(folder)}"
    )


def _again(folder: str) -> str:
    return (
        f"Run `python pipeline/build_shards.py --output {folder} --verify`, delete the shards it "
        "names, and build again."
    )


def samples_in_span(span: bytes) -> dict[int, dict[str, bytes]]:
    """Take a video's bytes apart: number of the frame -> field -> bytes, undecoded."""
    samples: dict[int, dict[str, bytes]] = {}
    for number, field, start, size in _members(span):
        samples.setdefault(number, {})[field] = span[start : start + size]
    return samples


def _members(span: bytes) -> Iterator[tuple[int, str, int, int]]:
    """Walk a span's files: number of the frame, field, start and size of the content.

    The span was checked against the index and `pack` wrote it, so the headers are plain USTAR ones
    and are walked as such: `tarfile` takes ten times as long, which readers feel at every visit.
    """
    place = 0
    while place < len(span):
        name = span[place : place + 100].rstrip(b"\0").decode()
        size = int(span[place + 124 : place + 135], 8)
        key, _, field = name.partition(".")
        if field not in FIELDS:
            raise ValueError(f"A shard holds {', '.join(FIELDS)} files, not {name!r}.")
        start = place + tarfile.BLOCKSIZE
        yield int(key.rpartition("/")[2]), field, start, size
        place = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
