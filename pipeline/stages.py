"""The work on one shard, stage by stage, as `build_shards.py` strings it together.

    plan -> [decode -> align -> draw -> pack -> write]

A stage takes a `Work` and returns one that has got further. Nothing that is wrong with a video
stops it: a video that gives nothing becomes a `Reject`. Storage that fails is another matter, since
trying again may help: it fails the shard, and the others go on. Where no GPU asks for stages of
their own, `Builder` does all but the last in one go.
"""

import functools
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2

from pipeline.align import make_aligner
from pipeline.config import BuildConfig, DecodeConfig, FaceSpec
from pipeline.decode import Decoded
from pipeline.faces import Judged, faces_of, find_and_judge
from pipeline.isolate import Decoder
from pipeline.plan import Shard, Video
from pipeline.sample import Reject
from pipeline.shard import Outcome, PackedShard, pack_shard, write_packed
from pipeline.storage import StorageError

STORAGE_TRIES = 3
"""Attempts at a video that storage failed to deliver, before its shard fails."""

STORAGE_PAUSE_S = 2.0
"""Pause before the second attempt; doubled before each further one."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A shard on its way: what each of its videos has become so far, one entry a video.

    cpu_s is the CPU time each stage took. failed says why the shard can't be finished in this run.
    """

    shard: Shard
    decoded: Sequence[Decoded] = ()
    judged: Sequence[Judged | Reject] = ()
    outcomes: Sequence[Outcome] = ()
    damaged: Sequence[Reject] = ()
    packed: PackedShard | None = None
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    def after(self, stage: str, cpu_s: float) -> "Work":
        """Note what a stage cost."""
        return replace(self, cpu_s={**self.cpu_s, stage: cpu_s})


@functools.cache
def decoder_of(config: DecodeConfig, worker: int) -> Decoder:
    """Keep one decoder for each worker process, over all of its shards."""
    return Decoder(config)


def decode(work: Work, config: BuildConfig) -> Work:
    """Take each video's candidate frames: more than are stored, as some will show no face."""
    start_s = time.process_time()
    decoder = decoder_of(config.decode, os.getpid())
    child_start_s = decoder.cpu_s
    try:
        decoded = [_decode_patiently(decoder, video, config) for video in work.shard.videos]
        work = replace(work, decoded=decoded)
    except StorageError as error:
        work = replace(work, failed=str(error))
    spent_s = time.process_time() - start_s + decoder.cpu_s - child_start_s
    return work.after("decode", spent_s)


def _decode_patiently(decoder: Decoder, video: Video, config: BuildConfig) -> Decoded:
    """Decode a video; where storage fails, again after a pause."""
    wanted = math.ceil(config.num_frames(video.split) * config.decode.oversample)
    for attempt in range(STORAGE_TRIES - 1):
        try:
            return decoder.decode(video, wanted, config.input)
        except StorageError:
            time.sleep(STORAGE_PAUSE_S * 2**attempt)
    return decoder.decode(video, wanted, config.input)


class Align:
    """Finds and judges the faces in a shard's frames; holds the network, one an actor."""

    def __init__(self, config: BuildConfig) -> None:
        cv2.setNumThreads(1)
        self._config = config
        self._aligner = make_aligner(config.align)

    def __call__(self, work: Work) -> Work:
        """Align the frames of every video at once, so that a GPU gets full batches."""
        start_s = time.process_time()
        readable = [
            (decoded.segments, self._config.num_frames(video.split))
            for video, decoded in zip(work.shard.videos, work.decoded, strict=True)
            if not isinstance(decoded.segments, Reject)
        ]
        found = iter(
            find_and_judge(self._aligner, [r[0] for r in readable], [r[1] for r in readable])
        )
        judged = [
            d.segments if isinstance(d.segments, Reject) else next(found) for d in work.decoded
        ]
        damaged = [reject for d in work.decoded for reject in d.damaged]
        # Candidates that nobody needs go no further.
        work = replace(work, decoded=(), judged=judged, damaged=damaged)
        return work.after("align", time.process_time() - start_s)


def draw(work: Work, config: BuildConfig, spec: FaceSpec) -> Work:
    """Cut out the faces of the frames that are stored, and draw their rasters."""
    start_s = time.process_time()
    cv2.setNumThreads(1)
    outcomes = [
        judged
        if isinstance(judged, Reject)
        else faces_of(
            video.person,
            video.video,
            video.split,
            judged,
            num_frames=config.num_frames(video.split),
            min_frames=config.min_frames,
            spec=spec,
        )
        for video, judged in zip(work.shard.videos, work.judged, strict=True)
    ]
    # The frames have served: from here on the work is small.
    work = replace(work, judged=(), outcomes=outcomes)
    return work.after("draw", time.process_time() - start_s)


def pack(work: Work, jpeg_quality: int) -> Work:
    """Encode the samples: from here on a shard is its files."""
    start_s = time.process_time()
    packed = pack_shard(work.shard.name, work.outcomes, jpeg_quality, work.damaged)
    work = replace(work, packed=packed, outcomes=(), damaged=())
    return work.after("pack", time.process_time() - start_s)


def write(work: Work, folder: str) -> Work:
    """Write a shard, and return what remains to be told of it: its name, cost and failure."""
    start_s = time.process_time()
    if work.packed and not work.failed:
        write_packed(folder, work.packed)
    work = replace(work, packed=None)
    return work.after("write", time.process_time() - start_s)


class Builder:
    """Does all of a shard's work but the writing, a video at a time: it holds one video's frames,
    however many the shard has, and they go nowhere but through the decoder's pipe."""

    def __init__(self, config: BuildConfig, spec: FaceSpec) -> None:
        self._config = config
        self._spec = spec
        self._align = Align(config)

    def __call__(self, work: Work) -> Work:
        """Decode, align, draw and pack."""
        cpu_s: defaultdict[str, float] = defaultdict(float)
        damaged: list[Reject] = []
        outcomes = self._outcomes(work.shard, cpu_s, damaged)
        start_s = time.process_time()
        try:
            packed = pack_shard(work.shard.name, outcomes, self._config.jpeg_quality, damaged)
        except StorageError as error:
            return replace(work, failed=str(error))
        spent_s = time.process_time() - start_s - cpu_s.pop("building")
        return replace(work, packed=packed, cpu_s=cpu_s).after("pack", spent_s)

    def _outcomes(
        self, shard: Shard, cpu_s: defaultdict[str, float], damaged: list[Reject]
    ) -> Iterator[Outcome]:
        """Build one video after another; adds up their costs, and what was wrong with files."""
        for video in shard.videos:
            start_s = time.process_time()
            part = decode(Work(shard=replace(shard, videos=(video,))), self._config)
            if part.failed:
                raise StorageError(part.failed)
            part = draw(self._align(part), self._config, self._spec)
            for stage, spent_s in part.cpu_s.items():
                cpu_s[stage] += spent_s
            cpu_s["building"] += time.process_time() - start_s
            damaged += part.damaged
            yield part.outcomes[0]
