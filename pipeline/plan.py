"""A listing of video files -> the plan: who is in which video, which split, and in which shard.

    [segment] -> frames -> landmarks -> raster -> sample -> shard

The plan is a pure function of (listing, seed, settings): ids, splits and shards come from hashes of
names, so the order of the listing, the machine and the time don't matter. No file is opened here:
VoxCeleb2 has 1.1 million.
"""

import hashlib
import heapq
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipeline.config import BuildConfig
from pipeline.storage import find_files, is_remote

VIDEO_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("3gp", "asf", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg"),
        *("mts", "ogv", "ts", "vob", "webm", "wmv"),
    )
)

VOXCELEB = re.compile(r"^(?:.*/)?(?:dev|test)/mp4/")
"""What comes before the person in an unpacked VoxCeleb2 tree."""

MAX_ID_CHARS = 64
"""Two ids, a number and a suffix must fit into the 255 characters of a name in a tar."""

MAX_VIDEOS_PER_SHARD = 32
"""With stages of their own on GPUs, a shard's candidate frames travel through the cluster as one
row. 48 from each training video take 0.2 GB at the 224 px of VoxCeleb2, and up to 1.2 GB at 512 px;
those of videos held out twice that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of a video file, within which a face can be followed. end_s None: to the file's
    end."""

    path: str
    name: str
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One recording of one person, in one or more files. Its row in W, when it is a training video.

    Each planned segment is a whole file, its path relative to the input folder; the decoder, which
    is first to know how long a file is, cuts it with `cut`.
    """

    person: str
    video: str
    split: str
    segments: tuple[Segment, ...]

    @property
    def key(self) -> str:
        """Name the video: "person/video"."""
        return f"{self.person}/{self.video}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The videos whose frames go into one tar."""

    name: str
    videos: tuple[Video, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All the work there is, shard by shard."""

    shards: tuple[Shard, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash everything that is planned: two plans with the same hash are the same."""
        digest = hashlib.sha256()
        for shard in self.shards:
            for video in shard.videos:
                files = "\0".join(f"{s.name}\0{s.path}" for s in video.segments)
                line = f"{shard.name}\0{video.key}\0{video.split}\0{files}\n"
                digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def num_videos(self) -> int:
        """Count the videos."""
        return sum(len(s.videos) for s in self.shards)

    def describe(self) -> dict[str, int]:
        """Count persons, videos and files, and how many are in each split."""
        videos = [v for s in self.shards for v in s.videos]
        return {
            "persons": len({v.person for v in videos}),
            "held-out persons": len({v.person for v in videos if v.split == "val"}),
            "videos": len(videos),
            "held-out videos": sum(v.split == "val" for v in videos),
            "files": sum(len(v.segments) for v in videos),
            "shards": len(self.shards),
        }


def find_videos(folder: str) -> list[str]:
    """List the video files below a folder, relative to it, in no particular order.

    Follows links to folders, each folder once. Raises ValueError when there is nothing to be found.
    """
    if is_remote(folder):
        found = [name for name in find_files(folder) if _is_video(name)]
    else:
        if not Path(folder).is_dir():
            raise ValueError(f"There is no folder {folder}. Give the videos with --input FOLDER.")
        found = list(_walk(folder))
    if not found:
        known = " ".join(sorted(VIDEO_SUFFIXES))
        raise ValueError(
            f"There are no videos in {folder}. Expected <person>/<video>/<segment>.mp4, "
            f"<person>/<video>.mp4 or video files directly in it, ending in one of: {known}."
        )
    return found


def _is_video(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in VIDEO_SUFFIXES  # noqa: PTH122


def _walk(folder: str) -> Iterable[str]:
    """Yield the video files below a folder. Strings, not Paths: a million of them take their time.

    A folder is listed once: under its own name if it has one here, else under that of its first
    link.
    """
    waiting, links, listed = [("", os.path.realpath(folder))], [], set()
    while waiting or links:
        if not waiting:
            name = heapq.heappop(links)
            waiting.append((f"{name}/", os.path.realpath(f"{folder}/{name}")))
        prefix, real = waiting.pop()
        if real in listed:
            continue
        listed.add(real)
        for entry in _entries(f"{folder}/{prefix}"):
            name = prefix + entry.name
            if not _is_folder(entry):
                if _is_video(name):
                    yield name
            elif entry.is_symlink():
                heapq.heappush(links, name)
            else:
                waiting.append((f"{name}/", f"{real}/{entry.name}"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell folders; a link that leads nowhere, or to itself, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """List a folder in order of names, which scandir leaves to the file system."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"Can't list the folder {folder}: {error.strerror}. "
            "Make it readable, or move it out of the input."
        ) from error


def make_plan(listing: Iterable[str], config: BuildConfig) -> Plan:
    """Plan the job for files given by their paths relative to the input folder."""
    grouped = _group(sorted(set(listing)))
    persons = sorted({person for person, _ in grouped})
    held_out = _held_out(persons, config.val_fraction, config.seed)
    videos = [
        Video(
            person=person,
            video=video,
            split="val" if person in held_out else "train",
            segments=_segments(files),
        )
        for (person, video), files in grouped.items()
    ]
    return Plan(shards=tuple(_shards(videos, config.seed)))


def _group(paths: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Gather the files of each (person, video), as safe ids."""
    named = [(path, *_names(path)) for path in paths]
    # Two files that are videos of their own may differ in their suffix alone, or share the name of
    # a folder: these videos are called by their whole paths, and their person stays who it is.
    taken = Counter((person, video) for _, person, video, alone in named if alone)
    taken.update({(person, video) for _, person, video, alone in named if not alone})
    grouped = defaultdict(list)
    names: dict[tuple[str, ...], str] = {}
    for path, person, video, alone in named:
        if alone and taken[person, video] > 1:
            video = path  # noqa: PLW2901
        key = safe_id(person), safe_id(video)
        _require_one_name(names, key[:1], person)
        _require_one_name(names, key, path if alone else f"{person}/{video}/")
        grouped[key].append(path)
    return dict(grouped)


def _require_one_name(names: dict[tuple[str, ...], str], key: tuple[str, ...], name: str) -> None:
    """Note what a person's or a video's id stands for; raise ValueError if it is something else."""
    before = names.setdefault(key, name)
    if before != name:
        raise ValueError(
            f"{before} and {name} would both be called {'/'.join(key)} in the shards. Expected one "
            "name for each: rename one of them."
        )


def _names(path: str) -> tuple[str, str, bool]:
    """Read person and video from a path, and whether the file is a whole video by itself."""
    *folders, file = VOXCELEB.sub("", path).split("/")
    stem = PurePosixPath(file).stem
    if not folders:
        return stem, stem, True
    if len(folders) == 1:
        return folders[0], stem, True
    return "/".join(folders[:-1]), folders[-1], False


def safe_id(name: str) -> str:
    """Turn a name into an id that a tar, webdataset and a URL all take unharmed.

    Letters, digits, "-" and "_" stay, no leading "_" or "-", at most 64 characters. A name that had
    to be changed gets a hash of itself, so that two names never become one id.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).lstrip("_-")
    if safe == name and 0 < len(safe) <= MAX_ID_CHARS:
        return safe
    mark = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{safe[: MAX_ID_CHARS - 17].rstrip('_-') or 'x'}-{mark}"


def _held_out(persons: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Choose the persons of the val split: at least one of three or more, none of fewer."""
    if len(persons) < 3 or fraction == 0:
        return set()
    count = min(len(persons) - 1, math.ceil(fraction * len(persons)))
    return set(sorted(persons, key=lambda person: _chance(seed, person))[:count])


def _chance(seed: int, name: str) -> bytes:
    """Draw from (seed, name): the same ones give the same bytes, on any machine."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()


def _segments(files: Sequence[str]) -> tuple[Segment, ...]:
    """Name a video's files by their stems, or by all of their path where two stems agree."""
    stems = [PurePosixPath(file).stem for file in files]
    repeated = {stem for stem, count in Counter(stems).items() if count > 1}
    return tuple(
        Segment(path=path, name=safe_id(path if stem in repeated else stem))
        for path, stem in zip(files, stems, strict=True)
    )


def _shards(videos: Sequence[Video], seed: int) -> Iterable[Shard]:
    """Deal the videos of each split to shards, in an order drawn from their names."""
    per_shard = min(max(math.ceil(len(videos) / 64), 1), MAX_VIDEOS_PER_SHARD)
    for split in ("train", "val"):
        members = [v for v in videos if v.split == split]
        members.sort(key=lambda video: _chance(seed, video.key))
        for number, start in enumerate(range(0, len(members), per_shard)):
            chosen = sorted(members[start : start + per_shard], key=lambda video: video.key)
            yield Shard(name=f"{split}-{number:06d}", videos=tuple(chosen))


def cut(segment: Segment, duration_s: float, segment_s: float) -> tuple[Segment, ...]:
    """Cut a whole file into the fewest equal segments of at most segment_s seconds."""
    count = max(1, math.ceil(duration_s / segment_s - 1e-6))
    if count == 1:
        return (segment,)
    edges = [duration_s * i / count for i in range(count)]
    digits = len(str(count - 1))
    return tuple(
        Segment(path=segment.path, name=f"{segment.name}-{i:0{digits}d}", start_s=start, end_s=end)
        for i, (start, end) in enumerate(zip(edges, [*edges[1:], None], strict=True))
    )
