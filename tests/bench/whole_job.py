"""The whole job against the limit of its own stages, and against the script everybody starts with.

    python tests/bench/whole_job.py [--clips DIR] [--copies 4] [--rounds 3] [--backend null]

The limit is the core-seconds that the stages take one after another in a bare loop, without Ray,
child processes or object store. Efficiency is that over what the job took: core-seconds of wall
time (wall x cores, Ray's start not counted) and, on a machine that others use too, CPU time.
The classic script is one process: OpenCV decodes every frame, landmarks one frame at a time, raster
by matplotlib where it is installed and by OpenCV, pickle.
"""

import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import tyro

from pipeline.align import Aligner, identify, make_aligner
from pipeline.config import AlignConfig, BuildConfig
from pipeline.crop import crop, square_of, to_crop
from pipeline.decode import decode_video
from pipeline.faces import face_spec, faces_of
from pipeline.plan import find_videos, make_plan
from pipeline.rasterize import draw
from pipeline.sample import Reject
from pipeline.shard import pack_shard

JOB = """
import json, sys, threading, time
import ray, psutil  # Ray brings psutil
from pipeline import build_shards

spent_s = {}

def watch():  # processes come and go: the last that was seen of each counts
    own = psutil.Process()
    while True:
        for process in (own, *own.children(recursive=True)):
            try:
                times = process.cpu_times()
                spent_s[process.pid] = times.user + times.system
            except psutil.Error:
                pass
        time.sleep(0.2)

before = time.monotonic()
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, logging_level=40)
threading.Thread(target=watch, daemon=True).start()
time.sleep(1)
started, before_s = time.monotonic(), sum(spent_s.values())
status = build_shards.main(sys.argv[2:])
wall_s = time.monotonic() - started
cpu_s = sum(spent_s.values()) - before_s
print(json.dumps({"start_s": started - before, "wall_s": wall_s, "cpu_s": cpu_s}))
sys.exit(status)
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the job."""

    clips: Path = Path("data/demo/videos")
    """Folder of videos: those of `make demo-footage`, if no other is given."""
    copies: int = 4
    """How often each is taken, under another person's name."""
    rounds: int = 3
    """Measurements of each kind; their median counts."""
    backend: Literal["null", "dlib"] = "null"
    """Landmark backend."""


def make_input(clips: Path, copies: int, folder: Path) -> None:
    """Link the clips into a tree in which they occur so many times."""
    for copy in range(copies):
        for number, name in enumerate(sorted(find_videos(str(clips)))):
            path = clips / name
            (folder / f"p{copy}x{number}").mkdir(parents=True)
            (folder / f"p{copy}x{number}" / f"v{path.suffix}").symlink_to(path.resolve())


def ideal_s(folder: Path, config: BuildConfig) -> float:
    """Measure the CPU time of the bare stages, for all videos of a folder."""
    aligner, spec = make_aligner(config.align), face_spec(identify(config.align), config.crop)
    plan = make_plan(find_videos(str(folder)), config)
    start_s = time.process_time()
    for shard in plan.shards:
        outcomes = []
        for video in shard.videos:
            num_frames = config.num_frames(video.split)
            wanted = round(num_frames * config.decode.oversample)
            segments = decode_video(video, wanted, config.decode, str(folder)).segments
            if isinstance(segments, Reject):
                continue
            found = aligner.landmarks_of([s.pixels for s in segments])
            outcomes.append(
                faces_of(
                    video.person,
                    video.video,
                    video.split,
                    segments,
                    found,
                    num_frames=num_frames,
                    min_frames=config.min_frames,
                    spec=spec,
                )
            )
        pack_shard(shard.name, outcomes, config.jpeg_quality)
    return time.process_time() - start_s


def job(folder: Path, config: BuildConfig, num_cpus: int) -> tuple[float, float, float]:
    """Run the job; returns its wall time, Ray's start not counted, that start, and all CPU time."""
    with tempfile.TemporaryDirectory() as output:
        flags = ["--input", str(folder), "--output", output, "--align.backend"]
        command = [sys.executable, "-c", JOB, str(num_cpus), *flags, config.align.backend]
        limit = ["--max-reject-rate", "1"]
        done = subprocess.run([*command, *limit], check=True, capture_output=True, text=True)
    times = json.loads(done.stdout.splitlines()[-1])
    return times["wall_s"], times["start_s"], times["cpu_s"]


def classic(
    folder: Path, config: BuildConfig, raster: Callable[[np.ndarray, int], np.ndarray]
) -> tuple[float, float]:
    """Measure wall and CPU time of the classic script over all videos of a folder."""
    aligner = make_aligner(config.align)
    start_s, cpu_start_s = time.monotonic(), time.process_time()
    for name in find_videos(str(folder)):
        classic_video(str(folder / name), config, aligner, raster)
    return time.monotonic() - start_s, time.process_time() - cpu_start_s


def classic_video(
    path: str,
    config: BuildConfig,
    aligner: Aligner,
    raster: Callable[[np.ndarray, int], np.ndarray],
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
    from matplotlib import pyplot as plt  # noqa: PLC0415  not a dependency

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


def rasters() -> dict[str, Callable[[np.ndarray, int], np.ndarray]]:
    """List the ways to draw that this machine has."""
    ways: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"OpenCV": draw}
    try:
        import matplotlib  # noqa: PLC0415

        matplotlib.use("Agg")
        ways["matplotlib"] = matplotlib_raster
    except ImportError:
        print("matplotlib is not installed: its raster is left out")
    return ways


def main() -> None:
    """Measure in turns, and print medians."""
    settings = tyro.cli(Settings)
    cv2.setNumThreads(1)
    num_cpus = os.cpu_count() or 1
    config = BuildConfig(align=AlignConfig(backend=settings.backend))
    with tempfile.TemporaryDirectory() as temporary:
        once, many = Path(temporary) / "once", Path(temporary) / "many"
        make_input(settings.clips, 1, once)
        make_input(settings.clips, settings.copies, many)
        num_once, num_many = len(find_videos(str(once))), len(find_videos(str(many)))
        ways = rasters()
        ideal, jobs = [], []
        scripts: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(settings.rounds):
            ideal.append(ideal_s(once, config) / num_once)
            jobs.append(job(many, config, num_cpus))
            for name, raster in ways.items():
                scripts[name].append(classic(once, config, raster))
    each_s = statistics.median(ideal)
    wall_s = statistics.median(j[0] for j in jobs) / num_many
    start_s = statistics.median(j[1] for j in jobs)
    cpu_s = statistics.median(j[2] for j in jobs) / num_many
    print(f"{num_cpus} cores, load {os.getloadavg()[0]:.1f}, backend {settings.backend}, ", end="")
    print(f"{num_many} videos, median of {settings.rounds}")
    print(f"bare stages       {each_s * 1e3:7.0f} ms of CPU a video")
    print(f"the job           {cpu_s * 1e3:7.0f} ms of CPU a video, Ray's own included")
    print(
        f"                  {wall_s * 1e3:7.0f} ms of wall time a video "
        f"(Ray's start {start_s:.1f} s)"
    )
    print(f"efficiency        {each_s / (wall_s * num_cpus):7.0%} of wall x cores")
    print(f"                  {each_s / cpu_s:7.0%} of CPU time")
    for name, times_s in scripts.items():
        script_s = statistics.median(wall for wall, _ in times_s) / num_once
        script_cpu_s = statistics.median(cpu for _, cpu in times_s) / num_once
        print(
            f"classic, {name:10}{script_s * 1e3:6.0f} ms of wall time a video, "
            f"{script_s / wall_s:.1f} x the job's; by CPU time {script_cpu_s * 1e3:.0f} ms, "
            f"{script_cpu_s / (cpu_s / num_cpus):.1f} x"
        )


if __name__ == "__main__":
    main()
