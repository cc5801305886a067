"""The whole job against the limit of its own stages, and against the script everybody starts with.

    python tests/bench/whole_job.py [--clips DIR] [--backend null|dlib] [--minutes 5] [--rounds 3]

The limit is the core-seconds that the stages take, each measured alone in a bare loop, without Ray,
child processes or object store. Efficiency is that over what the job took: core-seconds of wall
time (wall x cores, Ray's start not counted) and, on a machine that others use too, CPU time. Cores
share caches and memory, so the same loops are also run on all cores at once: what they then cost
more is the machine's doing, not the job's. Decode has a limit of its own: decoding to the last
wanted frame and converting the wanted ones alone.
The classic script is one process: OpenCV decodes every frame, landmarks one frame at a time, raster
by matplotlib (of the `dev` extra) and by OpenCV, pickle. Memory is the peak sum of all processes'
proportional shares (PSS, so what they share counts once), for the clips once and ten times.
Takes half an hour as it is; `--minutes 0.5 --rounds 1` is a look.
"""

import contextlib
import json
import math
import multiprocessing
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import av
import cv2
import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt

from pipeline.align import Aligner, identify, make_aligner
from pipeline.config import AlignConfig, BuildConfig
from pipeline.crop import crop, square_of, to_crop
from pipeline.decode import decode_video
from pipeline.faces import face_spec, faces_of, find_and_judge
from pipeline.plan import Video, find_videos, make_plan
from pipeline.rasterize import draw
from pipeline.sample import Reject
from pipeline.shard import pack_shard, write_packed
from pipeline.video_reader import Converter

matplotlib.use("Agg")

JOB = """
import json, sys, threading, time
import ray, psutil  # Ray brings psutil
from pipeline import build_shards

spent_s, peak_bytes = {}, 0

def watch(with_memory):  # processes come and go: the last that was seen of each counts
    global peak_bytes
    own = psutil.Process()
    while True:
        held_bytes = 0
        for process in (own, *own.children(recursive=True)):
            try:
                times = process.cpu_times()
                spent_s[process.pid] = times.user + times.system
                held_bytes += process.memory_full_info().pss if with_memory else 0
            except psutil.Error:
                pass
        peak_bytes = max(peak_bytes, held_bytes)
        time.sleep(0.2)

before = time.monotonic()
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, logging_level=40)
threading.Thread(target=watch, args=(sys.argv[2] == "memory",), daemon=True).start()
time.sleep(1)
started, before_s = time.monotonic(), sum(spent_s.values())
status = build_shards.main(sys.argv[3:])
wall_s = time.monotonic() - started
time.sleep(0.3)
cpu_s = sum(spent_s.values()) - before_s
found = {"start_s": started - before - 1, "wall_s": wall_s, "cpu_s": cpu_s}
print(json.dumps({**found, "peak_bytes": peak_bytes}))
sys.exit(status)
"""

Raster = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the job."""

    clips: Path = Path("data/demo/videos")
    """Folder of videos: those of `make demo-footage`, if no other is given."""
    backend: Literal["null", "dlib"] = "null"
    """Landmark backend."""
    minutes: float = 5.0
    """Length of a run of the job: the clips occur as often as it takes, under other names."""
    rounds: int = 3
    """Measurements of each kind, in turns; their median counts."""
    memory: bool = True
    """Measure peak memory too, with the clips once and ten times."""


def make_input(clips: Path, copies: int, folder: Path) -> None:
    """Link the clips into a tree in which they occur so many times."""
    for copy in range(copies):
        for number, name in enumerate(sorted(find_videos(str(clips)))):
            path = clips / name
            (folder / f"p{copy}x{number}").mkdir(parents=True)
            (folder / f"p{copy}x{number}" / f"v{path.suffix}").symlink_to(path.resolve())


@contextlib.contextmanager
def clock(spent_s: dict[str, float], stage: str) -> Iterator[None]:
    """Add the CPU time of a block to what its stage has spent."""
    start_s = time.process_time()
    yield
    spent_s[stage] = spent_s.get(stage, 0.0) + time.process_time() - start_s


def stages_s(folder: Path, config: BuildConfig) -> dict[str, float]:
    """Measure the CPU time of each bare stage, for all videos of a folder."""
    aligner, spec = make_aligner(config.align), face_spec(identify(config.align), config.crop)
    spent_s: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as output:
        for shard in make_plan(find_videos(str(folder)), config).shards:
            outcomes = []
            for video in shard.videos:
                num_frames = config.num_frames(video.split)
                wanted = math.ceil(num_frames * config.decode.oversample)
                with clock(spent_s, "limit"):
                    least_decode(video, wanted, config, folder)
                with clock(spent_s, "decode"):
                    segments = decode_video(video, wanted, config.decode, str(folder)).segments
                if isinstance(segments, Reject):
                    outcomes.append(segments)
                    continue
                with clock(spent_s, "align"):
                    (judged,) = find_and_judge(aligner, [segments], [num_frames])
                names = video.person, video.video, video.split
                limits = {"num_frames": num_frames, "min_frames": config.min_frames}
                with clock(spent_s, "draw"):
                    outcomes.append(faces_of(*names, judged, **limits, spec=spec))
            with clock(spent_s, "pack"):
                packed = pack_shard(shard.name, outcomes, config.jpeg_quality)
            with clock(spent_s, "write"):
                write_packed(output, packed)
    return spent_s


def crowded_s(folder: Path, config: BuildConfig, num_cpus: int) -> float:
    """Measure the CPU time of the bare stages with as many processes at it as there are cores."""
    with multiprocessing.get_context("spawn").Pool(num_cpus) as pool:
        runs = pool.starmap(stages_s, [(folder, config)] * num_cpus)
    return statistics.mean(sum(run.values()) - run["limit"] for run in runs)


def least_decode(video: Video, wanted: int, config: BuildConfig, folder: Path) -> list[np.ndarray]:
    """Do the least that gives the frames: decode to the last, convert each when it comes by."""
    frames: list[np.ndarray] = []
    for segment in video.segments:
        with av.open(str(folder / segment.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            length_s = float(container.duration or 0) / av.time_base
            times_s = [(i + 0.5) * length_s / wanted for i in range(wanted)]
            convert = Converter(stream, config.decode.decode_px)
            start_s = None
            for frame in container.decode(stream):
                start_s = frame.time if start_s is None else start_s
                if frame.time is not None and start_s is not None:
                    due = len(times_s)
                    times_s = [t for t in times_s if t > frame.time - start_s]
                    if len(times_s) < due:
                        frames.append(convert(frame))
                if not times_s:
                    break
    return frames


def job(folder: Path, config: BuildConfig, what: Literal["time", "memory"]) -> dict[str, float]:
    """Run the job on all cores; returns wall time and CPU time after Ray's start, and more."""
    with tempfile.TemporaryDirectory() as output:
        flags = ["--input", str(folder), "--output", output, "--max-reject-rate", "1"]
        command = [sys.executable, "-c", JOB, str(os.cpu_count() or 1), what, *flags]
        backend = ["--align.backend", config.align.backend]
        done = subprocess.run([*command, *backend], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def classic(folder: Path, config: BuildConfig, raster: Raster) -> float:
    """Measure the wall time of the classic script over all videos of a folder."""
    aligner = make_aligner(config.align)
    start_s = time.monotonic()
    for name in find_videos(str(folder)):
        classic_video(str(folder / name), config, aligner, raster)
    return time.monotonic() - start_s


def classic_video(
    path: str,
    config: BuildConfig,
    aligner: Aligner,
    raster: Raster,
) -> bytes:
    """Do what public scripts do: every frame to RGB, some at random, one by one to the network."""
    capture, frames = cv2.VideoCapture(path), []
    while True:
        is_frame, frame = capture.read()
        if not is_frame:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    stored = []
    for frame in random.sample(frames, min(len(frames), config.train_frames)):
        found = aligner.landmarks(frame[None])
        if found.found[0]:
            square = square_of(found.points, config.crop.margin)
            points = to_crop(found.points[0], square, config.crop.image_px)
            face = crop(frame, square, config.crop.image_px)
            stored.append((face, raster(points, config.crop.image_px)))
    return pickle.dumps(stored)


def matplotlib_raster(points: np.ndarray, image_px: int) -> np.ndarray:
    """Draw landmarks as the public scripts do."""
    figure = plt.figure(figsize=(image_px / 100, image_px / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.ones((image_px, image_px, 3)))
    for first, last in pairwise((0, 17, 22, 27, 31, 36, 42, 48, 60)):
        axes.plot(points[first:last, 0], points[first:last, 1], linewidth=2)
    axes.axis("off")
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return picture


def measure_classic(folder: Path, config: BuildConfig) -> dict[str, float]:
    """Measure the wall time of the classic script, for each way to draw."""
    return {
        "OpenCV": classic(folder, config, draw),
        "matplotlib": classic(folder, config, matplotlib_raster),
    }


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Take the median of each figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def print_table(
    stages: dict[str, float],
    crowded_s: float,
    run: dict[str, float],
    scripts: dict[str, float],
    num_cpus: int,
) -> None:
    """Print figures that are all for one video, in seconds."""
    limit_s, stages = stages["limit"], {k: v for k, v in stages.items() if k != "limit"}
    ideal_s, wall_s, cpu_s = sum(stages.values()), run["wall_s"], run["cpu_s"]
    for stage, spent_s in stages.items():
        print(f"{stage:18}{1e3 * spent_s:8.1f} ms of CPU a video, {spent_s / ideal_s:4.0%}", end="")
        print(f"; its limit {1e3 * limit_s:.1f} ms" if stage == "decode" else "")
    print(f"{'ideal':18}{1e3 * ideal_s:8.1f} ms of CPU a video")
    print(f"{'on all cores':18}{1e3 * crowded_s:8.1f} ms of CPU a video, the same at once")
    print(f"{'the job':18}{1e3 * cpu_s:8.1f} ms of CPU a video, Ray's own included")
    print(f"{'':18}{1e3 * wall_s:8.1f} ms of wall time a video, {1 / wall_s:.2f} videos/s")
    print(f"{'efficiency':18}{ideal_s / (wall_s * num_cpus):8.0%} of wall x cores")
    print(f"{'':18}{ideal_s / cpu_s:8.0%} of the CPU time it took")
    print(
        f"{'':18}{crowded_s / (wall_s * num_cpus):8.0%} of wall x cores, of what all cores can do"
    )
    for name, script_s in scripts.items():
        print(f"{'classic, ' + name:20}{1e3 * script_s:6.0f} ms of wall time a video, ", end="")
        print(f"{script_s / wall_s:.1f} x the job's")


def main() -> None:
    """Measure in turns, and print medians."""
    settings = tyro.cli(Settings)
    cv2.setNumThreads(1)
    num_cpus = os.cpu_count() or 1
    config = BuildConfig(align=AlignConfig(backend=settings.backend))
    with tempfile.TemporaryDirectory() as temporary:
        once, many, ten = (Path(temporary) / name for name in ("once", "many", "ten"))
        make_input(settings.clips, 1, once)
        num_once = len(find_videos(str(once)))
        stages = [stages_s(once, config)]
        ideal_s = sum(stages[0].values()) - stages[0]["limit"]
        copies = max(1, math.ceil(60 * settings.minutes * num_cpus / ideal_s))
        make_input(settings.clips, copies, many)
        num_many = num_once * copies
        print(
            f"{num_cpus} cores, load {os.getloadavg()[0]:.1f}, backend {settings.backend}, ", end=""
        )
        print(f"{num_many} videos a run, medians of {settings.rounds}", flush=True)
        jobs, scripts = [], []
        for number in range(settings.rounds):
            stages += [stages_s(once, config)] if number else []
            jobs.append(job(many, config, "time"))
            scripts.append(measure_classic(once, config))
        run = median(jobs)
        print_table(
            {name: s / num_once for name, s in median(stages).items()},
            crowded_s(once, config, num_cpus) / num_once,
            {name: s / num_many for name, s in run.items()},
            {name: s / num_once for name, s in median(scripts).items()},
            num_cpus,
        )
        print(f"{'Ray':18}{run['start_s']:8.1f} s to start, not counted; ", end="")
        print(f"a run took {run['wall_s'] / 60:.1f} minutes")
        if settings.memory:
            make_input(settings.clips, 10, ten)
            peaks = [job(folder, config, "memory")["peak_bytes"] for folder in (once, ten)]
            print(f"{'peak memory':18}{peaks[0] / 1e6:8.0f} MB with {num_once} videos, ", end="")
            print(f"{peaks[1] / 1e6:.0f} MB with {10 * num_once}: {peaks[1] / peaks[0]:.2f} x")


if __name__ == "__main__":
    main()
