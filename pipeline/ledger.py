"""What an output folder holds: whose it is, which of its shards are done, and whether they are
sound.

The folder itself is the record. `build.json` says which job it belongs to, each shard's manifest
that the shard is done, and `index.json` that all are. A rerun reads these and does the rest.
"""

import base64
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import av

from pipeline.config import BuildConfig, FaceSpec
from pipeline.decode import decode_id
from pipeline.faces import faces_id
from pipeline.judge import judge_id
from pipeline.plan import Plan, Shard
from pipeline.sample import FIELDS, SCHEMA, decode_picture
from pipeline.shard import (
    INDEX,
    REJECTS,
    Index,
    Manifest,
    ShardEntry,
    VideoEntry,
    manifest_name,
    samples_in_span,
    tar_name,
)
from pipeline.storage import join, list_files, read_file, remove_file, sweep, write_file

RECORD = "build.json"

LIBRARIES = {
    "fan": ("face-alignment", "torch", "torchvision"),
    "dlib": ("dlib",),
    "null": (),
}
"""What decides a backend's points, beside its weights."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that decides the bytes of a job's shards, settings and surroundings."""

    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    face: FaceSpec
    rules: Mapping[str, str]
    libraries: Mapping[str, str]

    def to_json(self) -> bytes:
        """Turn it into the bytes of build.json."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True).encode()

    @classmethod
    def load(cls, folder: str) -> "Record":
        """Read a folder's build.json; ValueError when it isn't one."""
        facts = _read_record(folder)
        try:
            return cls(
                plan={"sha256": None, "videos": None, "shards": None, **facts["plan"]},
                config=facts["config"],
                face=FaceSpec.from_dict(facts["face"]),
                rules=facts["rules"],
                libraries=facts["libraries"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(_no_record(folder, repr(error))) from error

    @property
    def provenance(self) -> dict[str, Any]:
        """Say where shards come from: for the index."""
        return {"plan_sha256": self.plan["sha256"], "libraries": dict(self.libraries)}


def record_of(plan: Plan, config: BuildConfig, face: FaceSpec, device: str) -> Record:
    """Write down the job."""
    libraries = {
        name: _version(name) for name in ("av", "cv2", "numpy", *LIBRARIES[config.align.backend])
    }
    libraries["libavcodec"] = ".".join(map(str, av.library_versions["libavcodec"]))
    return Record(
        plan={**plan.describe(), "sha256": plan.sha256},
        config={**deciding(config), "device": device},
        face=face,
        rules={"decode": decode_id(), "judge": judge_id(), "faces": faces_id()},
        libraries=libraries,
    )


def _version(name: str) -> str:
    """Say a library's version; cv2 and dlib come in distributions of several names."""
    if name in ("cv2", "dlib"):
        return importlib.import_module(name).__version__
    return metadata.version(name)


def deciding(config: BuildConfig) -> dict[str, Any]:
    """Take the settings that decide the content of shards."""
    return {
        "seed": config.seed,
        "train_frames": config.train_frames,
        "val_frames": config.val_frames,
        "min_frames": config.min_frames,
        "val_fraction": config.val_fraction,
        "jpeg_quality": config.jpeg_quality,
        "image_px": config.crop.image_px,
        "decode_px": config.decode.decode_px,
        "segment_s": config.decode.segment_s,
        "oversample": config.decode.oversample,
    }


def claim(folder: str, record: Record) -> None:
    """Make the folder this job's, or raise ValueError saying whose it is or what has changed."""
    names = set(list_files(folder))
    if RECORD not in names:
        foreign = sorted(n for n in names if n == INDEX or n.endswith(".tar"))
        if foreign:
            raise ValueError(
                f"{folder} holds {foreign[0]} but no {RECORD}: it isn't this program's output, or "
                "not all of it. Give another --output."
            )
        write_file(folder, RECORD, record.to_json())
        return
    changes = [
        f"{name} was {before}, is {now}"
        for name, before, now in _changes(_read_record(folder), json.loads(record.to_json()))
    ]
    if changes:
        raise ValueError(
            f"{folder} belongs to another build: {'; '.join(changes)}. "
            "Give another --output, or the settings and videos it was begun with."
        )
    sweep(folder)


def _read_record(folder: str) -> dict[str, Any]:
    """Read build.json, whatever its content; ValueError when it isn't even JSON."""
    try:
        facts = json.loads(read_file(folder, RECORD))
    except ValueError as error:
        raise ValueError(_no_record(folder, str(error))) from error
    if not isinstance(facts, dict):
        raise ValueError(_no_record(folder, f"it is a {type(facts).__name__}"))
    return facts


def _no_record(folder: str, why: str) -> str:
    return (
        f"{join(folder, RECORD)} is not the record of a build ({why}): nothing else says how the "
        "shards beside it were made. Put the file back, or build into another --output."
    )


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """List the leaves in which two nested dicts differ: name, before, now."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def read_done(
    folder: str, plan: Plan, known: Mapping[str, Manifest] | None = None
) -> dict[str, Manifest]:
    """Read the manifests of the shards that are done, by name, but for those already known.

    A shard is done when its manifest accounts for all of its planned videos and its tar has the
    manifest's size.
    """
    sizes = list_files(folder)
    done = dict(known or {})
    waiting = [s for s in plan.shards if s.name not in done and manifest_name(s.name) in sizes]
    with ThreadPoolExecutor(16) as pool:
        for shard, manifest in zip(
            waiting, pool.map(lambda shard: _manifest(folder, shard, sizes), waiting), strict=True
        ):
            if manifest is not None:
                done[shard.name] = manifest
    return done


def _manifest(folder: str, shard: Shard, sizes: Mapping[str, int]) -> Manifest | None:
    """Read a shard's manifest, None if it doesn't hold for the shard and its tar."""
    try:
        manifest = Manifest.from_json(read_file(folder, manifest_name(shard.name)))
    except (ValueError, FileNotFoundError):
        return None
    accounted = {v.key for v in manifest.videos} | {r.id for r in manifest.rejects}
    is_whole = sizes.get(tar_name(shard.name), 0) == manifest.num_bytes
    return manifest if is_whole and accounted == {v.key for v in shard.videos} else None


def pending(plan: Plan, done: Mapping[str, Manifest], retry_rejects: bool) -> list[Shard]:
    """List the shards still to be built: those not done and, if wanted, those with rejects."""
    return [
        shard
        for shard in plan.shards
        if shard.name not in done
        or (retry_rejects and (done[shard.name].rejects or done[shard.name].damaged_files))
    ]


def reopen(folder: str, shards: Sequence[Shard]) -> None:
    """Take back that these shards are done, and that the whole is, before they are built."""
    present = list_files(folder)
    names = [INDEX, REJECTS, *(manifest_name(s.name) for s in shards)]
    for name in names if shards else ():
        if name in present:
            remove_file(folder, name)


def close(folder: str, plan: Plan, done: Mapping[str, Manifest], record: Record) -> Index:
    """Write the index of a build whose shards are all done; each planned video is accounted for."""
    index = Index.of(list(done.values()), record.face, record.config, record.provenance)
    assert index.totals["planned"] == plan.num_videos, "a planned video is unaccounted for"
    index.save(folder)
    sweep(folder)
    return index


def verify(folder: str) -> list[str]:
    """Read everything again, compare it with the index, and list what is wrong.

    The index is compared with what it was made of: the manifests, and build.json.
    """
    index = Index.load(folder)
    sizes = list_files(folder)
    expected = {tar_name(s.name) for s in index.shards}
    problems = [
        f"{name} is not in the index: a copy, or of another build"
        for name in sorted(sizes)
        if name.endswith(".tar") and name not in expected
    ]
    problems += _misindexed(folder, index, sizes)
    spans: dict[str, list[VideoEntry]] = {s.name: [] for s in index.shards}
    for video in index.videos:
        spans.setdefault(video.shard, []).append(video)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda s: list(_faults(folder, s, spans[s.name])), index.shards):
            problems += found
    return problems + list(_misreported(folder, index))


def _misindexed(folder: str, index: Index, sizes: Mapping[str, int]) -> Iterator[str]:
    """Compare the index with the one that the manifests and build.json give."""
    if RECORD not in sizes:
        yield f"{RECORD} is missing: nothing says how the shards were made; it can't be made again"
        return
    try:
        record = Record.load(folder)
    except ValueError as error:
        yield str(error)
        return
    manifests, problems = _read_manifests(folder, index, sizes)
    if not problems and len(manifests) != record.plan["shards"]:
        planned = record.plan["shards"]
        problems = [f"{len(manifests)} manifests are there, {RECORD} says {planned} shards"]
    if problems:  # without all of them, videos would seem to be too many in the index
        yield from problems
        return
    made = Index.of(manifests, record.face, record.config, record.provenance)
    if made.totals["planned"] != record.plan["videos"]:
        planned = record.plan["videos"]
        yield f"the manifests have {made.totals['planned']} videos, {RECORD} says {planned}"
    found, expected = json.loads(read_file(folder, INDEX)), json.loads(made.to_json())
    for facts in (found, expected):
        for kind, key in (("shards", "name"), ("videos", "key"), ("rejects", "id")):
            facts[kind] = _by_name(facts[kind], key)
        facts["damaged_files"] = _by_name(facts["damaged_files"], "id")
    for name, told, right in _changes(found, expected):
        source = RECORD if name.split(".")[0] in ("face", "config", "provenance") else "manifests"
        yield f"{INDEX}: {name} is {_brief(told)}, by the {source} it is {_brief(right)}"


def _read_manifests(
    folder: str, index: Index, sizes: Mapping[str, int]
) -> tuple[list[Manifest], list[str]]:
    """Read all manifests, and list those that are missing or no manifests."""
    needed = {manifest_name(s.name) for s in index.shards}
    present = {n for n in sizes if n.endswith(".json") and n not in (INDEX, RECORD)}
    problems = [f"{name} is missing" for name in sorted(needed - present)]
    manifests = []
    for name in sorted(present):
        try:
            manifest = Manifest.from_json(read_file(folder, name))
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if manifest_name(manifest.name) != name:
            problems.append(f"{name} is the manifest of another shard, {manifest.name}")
        manifests.append(manifest)
    return manifests, problems


def _by_name(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """Turn a list of entries into a dict; an entry that comes again gets a name of its own."""
    named: dict[str, Any] = {}
    for row in rows:
        name = str(row.get(key))
        while name in named:
            name += " (again)"
        named[name] = row
    return named


def _brief(value: Any) -> str:
    """Write a value in a line, not the whole of a thumbnail."""
    said = "nothing" if value is None else str(value)
    return said if len(said) <= 80 else f"{said[:80]}..."


def _misreported(folder: str, index: Index) -> Iterator[str]:
    """Check the list of rejects, and the thumbnails that the index holds of them."""
    try:
        if read_file(folder, REJECTS) != index.rejects_lines():
            yield f"{REJECTS} isn't what the index says"
    except FileNotFoundError:
        yield f"{REJECTS} is missing"
    for reject in index.rejects:
        try:
            if reject.thumbnail:
                decode_picture(base64.b64decode(reject.thumbnail, validate=True), "thumbnail")
        except ValueError:
            yield f"{INDEX}: the thumbnail of {reject.id} is not a picture"


def _faults(folder: str, shard: ShardEntry, videos: Sequence[VideoEntry]) -> Iterator[str]:
    """Compare one tar, and each video in it, with the index."""
    name = tar_name(shard.name)
    try:
        data = read_file(folder, name)
    except FileNotFoundError:
        yield f"{name} is missing"
        return
    if hashlib.sha256(data).hexdigest() == shard.sha256 and len(data) == shard.num_bytes:
        yield from (fault for video in videos for fault in _miscounted(name, data, video))
        return
    what = "is truncated" if len(data) < shard.num_bytes else "was altered"
    hurt = [v.key for v in videos if not _is_intact(data, v)]
    yield f"{name} {what}; of its videos {', '.join(hurt) or 'none'} are hurt"


def _is_intact(data: bytes, video: VideoEntry) -> bool:
    span = data[video.offset : video.offset + video.num_bytes]
    return hashlib.sha256(span).hexdigest() == video.sha256


def _miscounted(name: str, data: bytes, video: VideoEntry) -> Iterator[str]:
    """Check that a video's span holds what the index says."""
    if not _is_intact(data, video):
        yield f"{name}: the index has another sha256 for {video.key}"
        return
    samples = samples_in_span(data[video.offset : video.offset + video.num_bytes])
    whole = sum(set(fields) == set(FIELDS) for fields in samples.values())
    if whole != video.num_frames:
        yield f"{name}: {video.key} has {whole} whole frames, the index says {video.num_frames}"
