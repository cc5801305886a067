"""The job as people run it: whole, interrupted, repeated, and fed with what it can't use.

Small videos with the null backend, so that every video with a picture has a face. A face that is
really found is in test_faces.py and in the demo.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.data.exceptions import SystemException
from ray.exceptions import RayError, RayTaskError

from pipeline import build_shards
from pipeline.build_shards import Attempt, Resources, explain, root_of, to_row, to_work
from pipeline.config import AlignConfig, BuildConfig
from pipeline.plan import Shard
from pipeline.sample import from_fields
from pipeline.shard import Index, read_span, samples_in_span
from pipeline.stages import Work
from tests.pipeline.videos import (
    flip_bits,
    noisy,
    picture,
    rotate,
    truncate,
    write_sound,
    write_video,
)

pytestmark = [
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray warns of itself
    pytest.mark.filterwarnings(r"ignore::FutureWarning:ray\..*"),
]

FLAGS = (
    *("--align.backend", "null", "--ray-address", "local", "--crop.image-px", "48"),
    *("--train-frames", "6", "--val-frames", "8", "--min-frames", "4"),
)

PERSONS = ("ann", "bob", "cat", "dan")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Make eight videos of four people, one of them in three files."""
    folder = tmp_path_factory.mktemp("videos")
    for number, person in enumerate(PERSONS):
        write_video(folder / person / "home.mp4", noisy(number))
        write_video(folder / person / "office" / "00001.mp4", noisy(10 + number))
    write_video(folder / "ann" / "office" / "00002.mp4", noisy(20))
    rotate(write_video(folder / "ann" / "office" / "00003.mp4", noisy(21)), 90)
    return folder


def start_ray() -> None:
    """Start a Ray, with a GPU in name only."""
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=300_000_000,
    )


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """Share a Ray: main joins one that runs in its process."""
    start_ray()
    yield
    ray.shutdown()


def build(videos: Path, output: Path, *flags: str) -> int:
    return build_shards.main(["--input", str(videos), "--output", str(output), *FLAGS, *flags])


@pytest.fixture(scope="module")
def built(videos, tmp_path_factory) -> Path:
    """Build the shards once; tests that change them take a copy."""
    output = tmp_path_factory.mktemp("built") / "shards"
    assert build(videos, output) == 0
    return output


def content(folder: Path) -> dict[str, str]:
    """Hash the files of an output folder, but for the page for people."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.suffix in (".tar", ".json", ".jsonl")
    }


def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


def test_every_video_is_stored_whole(built):
    index = Index.load(str(built))
    assert [v.key for v in index.videos] == [
        f"{person}/{video}" for person in PERSONS for video in ("home", "office")
    ]
    assert len({v.person for v in index.of_split("val")}) == 1
    for entry in index.videos:
        assert entry.num_frames == (8 if entry.split == "val" else 6)
        samples = samples_in_span(read_span(str(built), entry))
        for number, fields in samples.items():
            sample = from_fields(f"{entry.key}/{number:03}", fields)
            assert sample.frame.shape == (48, 48, 3)
            assert (sample.person, sample.split) == (entry.person, entry.split)
            assert np.array_equal(sample.landmarks, np.round(sample.landmarks * 8) / 8)
    assert {p.suffix for p in built.iterdir()} == {".tar", ".json", ".jsonl", ".html"}


def test_frames_come_from_all_files_of_a_video(built):
    index = Index.load(str(built))
    entry = next(v for v in index.videos if v.key == "ann/office")
    samples = samples_in_span(read_span(str(built), entry))
    originals = [json.loads(fields["json"])["original"] for fields in samples.values()]
    assert sorted(set(originals)) == [f"ann/office/0000{i}.mp4" for i in (1, 2, 3)]


def test_a_second_run_does_nothing(built, videos):
    before = {p: p.stat().st_mtime_ns for p in built.glob("train-*")}
    assert build(videos, built) == 0
    assert {p: p.stat().st_mtime_ns for p in built.glob("train-*")} == before


def test_a_rerun_makes_good_what_is_missing_or_broken(built, videos, tmp_path, capfd):
    output = copy(built, tmp_path)
    tars = sorted(output.glob("train-*.tar"))
    tars[0].unlink()
    truncate(tars[1], 0.7)
    tars[2].with_suffix(".json").unlink()
    truncate(tars[3].with_suffix(".json"), 0.5)
    (output / "index.json").unlink()
    (output / ".tmp-train-000009.tar-dead").write_bytes(b"half a shard")
    assert build(videos, output) == 0
    assert "4 of 8 shards are done already" in capfd.readouterr().err
    assert content(output) == content(built)
    assert not list(output.glob(".tmp-*"))


def test_files_in_another_order_give_the_same_bytes(built, videos, tmp_path, monkeypatch):
    found = build_shards.find_videos

    def shuffled(folder: str) -> list[str]:
        return random.Random(5).sample(found(folder), len(found(folder)))

    monkeypatch.setattr(build_shards, "find_videos", shuffled)
    assert build(videos, tmp_path / "shards") == 0
    assert content(tmp_path / "shards") == content(built)


def test_aligners_on_a_gpu_give_the_same_bytes(built, videos, tmp_path, monkeypatch):
    """There decoding is a stage of its own, and the aligner holds the GPU and no CPU."""
    on_gpu(monkeypatch)
    assert build(videos, tmp_path / "shards") == 0
    assert content(tmp_path / "shards") == content(built)


@pytest.mark.parametrize(
    ("cluster", "backend", "device", "expected"),
    [
        ({"CPU": 1}, "dlib", "auto", (1, 0, "cpu")),
        ({"CPU": 64, "GPU": 4}, "fan", "auto", (4, 1, "cuda")),
        ({"CPU": 64, "GPU": 4}, "fan", "cpu", (64, 0, "cpu")),
        ({"CPU": 64, "GPU": 4}, "dlib", "auto", (64, 0, "cpu")),
        ({"CPU": 8}, "fan", "auto", (8, 0, "cpu")),
        ({"CPU": 8}, "fan", "cuda", (1, 1, "cuda")),  # nodes with GPUs may yet be started
    ],
)
def test_aligners_never_hold_all_cpus(cluster, backend, device, expected):
    config = BuildConfig(align=AlignConfig(backend=backend, device=device))
    found = Resources.of(cluster, config)
    assert (found.num_aligners, found.aligner_gpus, found.device) == expected
    assert found.num_aligners * found.aligner_cpus + found.task_cpus <= cluster["CPU"]


def test_another_job_is_refused_by_name(built, videos, tmp_path, capfd):
    output = copy(built, tmp_path)
    assert build(videos, output, "--crop.margin", "0.9") == 1
    assert "face.crop_margin was 0.4, is 0.9" in capfd.readouterr().err
    assert build(videos, output, "--seed", "3") == 1
    assert "config.seed was 0, is 3" in capfd.readouterr().err
    more = Path(shutil.copytree(videos, tmp_path / "videos"))
    write_video(more / "eve" / "home.mp4", noisy(99))
    assert build(more, output) == 1
    assert "plan.videos was 8, is 9" in capfd.readouterr().err
    assert content(output) == content(built)


def test_a_folder_of_something_else_is_refused(videos, tmp_path, capfd):
    (tmp_path / "photos.tar").write_bytes(b"my holiday")
    assert build(videos, tmp_path) == 1
    assert "holds photos.tar but no build.json" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["photos.tar"]


def test_verify_finds_what_is_wrong(built, tmp_path, capfd):
    output = copy(built, tmp_path)
    assert build_shards.main(["--output", str(output), "--verify"]) == 0
    tars = sorted(output.glob("train-*.tar"))
    entry = next(v for v in Index.load(str(output)).videos if v.shard == tars[2].stem)
    tars[0].unlink()
    truncate(tars[1], 0.5)
    data = bytearray(tars[2].read_bytes())
    data[1000] ^= 1
    tars[2].write_bytes(data)
    shutil.copy(tars[3], output / "copy.tar")
    assert build_shards.main(["--output", str(output), "--verify"]) == 1
    said = capfd.readouterr().err
    assert f"{tars[0].name} is missing" in said
    assert f"{tars[1].name} is truncated" in said
    assert f"{tars[2].name} was altered; of its videos {entry.key} are hurt" in said
    assert "copy.tar is not in the index" in said


def test_dry_run_writes_nothing(videos, tmp_path, capfd):
    assert build(videos, tmp_path / "shards", "--dry-run") == 0
    said = capfd.readouterr().out
    assert "4 persons" in said
    assert '"train_frames": 6' in said
    assert not (tmp_path / "shards").exists()


POISON = "train-000002"
"""The shard that workers fail at in the next tests."""


def poisoned(what: str, fail: Callable[[], Any]) -> Any:
    """Make a stage that fails at one shard, and is itself otherwise.

    Ray sends it to its workers whole; they see the module itself, unpatched.
    """
    poison = POISON

    def spoilt(stage):
        def run(work):
            if work.shard.name == poison:
                fail()
            return stage(work)

        return run

    class Actor:
        def __init__(self, *args):
            self._attempt = getattr(build_shards, what)(*args)
            self._attempt._stage = spoilt(self._attempt._stage)

        def __call__(self, row):
            return self._attempt(row)

    def draw(row, config, spec):
        spoilt(lambda work: work)(build_shards.to_work(row))
        return build_shards.draw(row, config, spec)

    return draw if what == "draw" else Actor


def on_gpu(monkeypatch) -> None:
    """Let aligners be a stage of their own."""
    gpu = Resources(num_aligners=1, aligner_cpus=0, aligner_gpus=1, task_cpus=1, device="cpu")
    monkeypatch.setattr(Resources, "of", classmethod(lambda cls, cluster, config: gpu))


@pytest.mark.parametrize("what", ["BuildActor", "AlignActor", "draw"])
def test_a_worker_that_dies_at_a_shard_ends_the_job(
    built, videos, tmp_path, monkeypatch, capfd, what
):
    if what != "BuildActor":
        on_gpu(monkeypatch)
    tries, output = tmp_path / "tries", tmp_path / "shards"

    def die() -> None:
        with tries.open("a") as file:
            file.write("x")
        os._exit(1)

    with monkeypatch.context() as patch:
        patch.setattr(build_shards, what, poisoned(what, die))
        assert build(videos, output) == 1
    ray.shutdown()  # as the end of the process would: the actor still holds what it reserved
    start_ray()
    said = capfd.readouterr().err
    assert "error: The worker of a shard died, 3 times in a row: " in said, said[-1500:]
    assert tries.read_text() == "xxx"
    assert not (output / "index.json").exists()
    assert_nothing_is_half_written(output, built)
    assert build(videos, output) == 0
    assert content(output) == content(built)


@pytest.mark.parametrize("what", ["BuildActor", "AlignActor"])
def test_an_exception_fails_its_shard_alone(built, videos, tmp_path, monkeypatch, capfd, what):
    if what != "BuildActor":
        on_gpu(monkeypatch)

    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory.")

    output = tmp_path / "shards"
    with monkeypatch.context() as patch:
        patch.setattr(build_shards, what, poisoned(what, out_of_memory))
        assert build(videos, output) == 1
    said = capfd.readouterr().err
    assert f"{POISON}: RuntimeError: CUDA out of memory.\n1 shards are not done." in said
    assert len(whole_shards(output)) == 7
    assert build(videos, output) == 0
    assert content(output) == content(built)


def test_an_actor_that_can_do_no_shard_ends_the_job():
    def broken(work: Work) -> Work:
        raise RuntimeError("CUDA error: an illegal memory access")

    attempt = Attempt(broken)
    row = to_row(Work(shard=Shard(name="train-000000", videos=())))
    for _ in range(2):
        assert to_work(attempt(row)).failed == "RuntimeError: CUDA error: an illegal memory access"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        attempt(row)


def test_errors_are_never_empty():
    ours = RuntimeError("net.pth is damaged. Get it again.")
    ours.__cause__ = EOFError()
    assert root_of(RayTaskError("align", "a traceback", ours).as_instanceof_cause()) is ours
    nothing = RayError()
    nothing.__cause__ = SystemException()
    assert root_of(nothing) is nothing
    assert [explain(e) for e in (ours, nothing, EOFError())] == [str(ours), "RayError", "EOFError"]


def test_an_actor_that_cannot_work_says_why(videos, tmp_path, monkeypatch, capfd):
    class Failing:
        def __init__(self, *args):
            pass

        def __call__(self, row):
            raise RuntimeError("the network gave nothing") from EOFError()

    monkeypatch.setattr(build_shards, "BuildActor", Failing)
    assert build(videos, tmp_path / "shards") == 1
    assert capfd.readouterr().err.endswith("error: the network gave nothing\n")


def test_an_actor_that_cannot_start_says_why(videos, tmp_path, monkeypatch, capfd):
    class Damaged:
        def __init__(self, *args):
            try:
                raise EOFError
            except EOFError as error:
                raise RuntimeError("net.pth is damaged. Get it again.") from error

        def __call__(self, row):
            return row

    monkeypatch.setattr(build_shards, "BuildActor", Damaged)
    assert build(videos, tmp_path / "shards") == 1
    assert capfd.readouterr().err.endswith("error: net.pth is damaged. Get it again.\n")


BAD = {
    "empty": "decode: the file is empty",
    "text": "decode: not a video, or its header is cut off or damaged",
    "tail": "decode: not a video, or its header is cut off or damaged",
    "noise": "decode: damaged after 0.00 s",
    "sound": "decode: no picture track",
    "gone": "decode: can't be opened",
    "one": "faces: too few frames",
    "frozen": "faces: frozen picture",
    "pipe": "decode: not a file",
}


def add_bad_files(folder: Path) -> None:
    """Put one of each bad kind beside the good ones, each as a person's only video."""
    (folder / "empty").mkdir(parents=True)
    (folder / "empty" / "a.mp4").touch()
    (folder / "text").mkdir()
    (folder / "text" / "a.mp4").write_text("This is not a video.")
    truncate(write_video(folder / "tail" / "a.mp4", noisy(1)), 0.6)
    flip_bits(write_video(folder / "noise" / "a.mp4", noisy(2)), 0.02, 1.0, every=31)
    (folder / "sound").mkdir()
    write_sound(folder / "sound" / "a.mp4")
    (folder / "gone").mkdir()
    (folder / "gone" / "a.mp4").symlink_to("nowhere.mp4")
    write_video(folder / "one" / "a.mp4", noisy(3, num_frames=1))
    write_video(folder / "frozen" / "a.mp4", [picture(0, 96, 80)] * 25)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "a.mp4")  # opening it would wait for ever


def test_bad_videos_are_rejected_and_the_rest_is_unharmed(videos, tmp_path, capfd):
    mixed = Path(shutil.copytree(videos, tmp_path / "videos"))
    add_bad_files(mixed)
    output = tmp_path / "shards"
    limits = ("--max-reject-rate", "0.6")
    assert build(mixed, output, *limits) == 0
    index = Index.load(str(output))
    rejects = {r.id.split("/")[0]: f"{r.stage}: {r.reason}" for r in index.rejects}
    assert rejects.keys() == BAD.keys()
    for person, reason in BAD.items():
        assert rejects[person].startswith(reason), person
    assert index.totals["planned"] == 17 == index.totals["accepted"] + index.totals["rejected"]
    assert {v.person for v in index.videos} == set(PERSONS)
    assert {r.id for r in index.rejects if r.thumbnail} == {"frozen/a", "one/a"}
    assert build_shards.main(["--output", str(output), "--verify"]) == 0
    lines = [json.loads(x) for x in (output / "rejects.jsonl").read_text().splitlines()]
    assert {x["id"] for x in lines if x["what"] == "video"} == {r.id for r in index.rejects}
    assert "9 of 17 videos" in capfd.readouterr().err

    # Mended files get another try, which nothing else is touched by.
    untouched = {p.name: p.stat().st_mtime_ns for p in output.glob("*.tar")}
    write_video(mixed / "text" / "a.mp4", noisy(7))
    assert build(mixed, output, *limits, "--retry-rejects") == 0
    assert {r.id for r in Index.load(str(output)).rejects} == {
        f"{person}/a" for person in BAD if person != "text"
    }
    assert untouched.items() <= {p.name: p.stat().st_mtime_ns for p in output.glob("*.tar")}.items()


def test_too_many_rejects_fail_the_job_with_its_shards_finished(videos, tmp_path, capfd):
    mixed = Path(shutil.copytree(videos, tmp_path / "videos"))
    (mixed / "eve.mp4").write_text("This is not a video.")
    assert build(mixed, tmp_path / "shards", "--max-reject-rate", "0.1") == 1
    said = capfd.readouterr().err
    assert "11% of the videos were rejected, more than" in said, said[-500:]
    assert Index.load(str(tmp_path / "shards")).totals["accepted"] == 8


def test_nothing_but_rejects(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_text("This is not a video.")
    assert build(tmp_path / "videos", tmp_path / "shards") == 1
    assert Index.load(str(tmp_path / "shards")).totals["rejected"] == 1


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_no_videos_is_a_clear_error(tmp_path, capfd, what):
    (tmp_path / "empty").mkdir()
    assert build(tmp_path / what, tmp_path / "shards") == 1
    assert "error: There " in capfd.readouterr().err


def test_it_is_soon_known_that_nobody_answers():
    with socket.socket() as door:
        door.bind(("localhost", 0))
        address = f"localhost:{door.getsockname()[1]}"
        with pytest.raises(ConnectionRefusedError):
            build_shards.knock(address)
        door.listen()
        build_shards.knock(address)
    for elsewhere in ("auto", "local", "ray://localhost:1"):
        build_shards.knock(elsewhere)


def test_a_full_disk_stops_the_job_with_nothing_half_written(videos, tmp_path, capfd):
    output = tmp_path / "small"
    output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(output)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        assert build(videos, output) == 1
        said = capfd.readouterr().err
        assert "error: Can't write" in said
        assert said.rstrip().endswith("No space left on device.")
        assert not (output / "index.json").exists()
        for tar in output.glob("*.tar"):
            assert tar.stat().st_size > 0
            assert tar.stat().st_size % 10240 == 0
    finally:
        subprocess.run(["umount", str(output)], check=True)


def start(script: Path, videos: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Start the job as a process of its own, from elsewhere, as `ray submit` does."""
    command = [sys.executable, str(script), "--input", str(videos), "--output", str(output)]
    return subprocess.Popen(
        [*command, *FLAGS, *flags],
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.fixture
def script(tmp_path) -> Path:
    """Copy the one script, as `ray submit` does."""
    home = tmp_path / "home"
    home.mkdir()
    return Path(shutil.copy(build_shards.__file__, home / "build_shards.py"))


def test_a_copied_script_on_one_cpu_gives_the_same_bytes(built, videos, script, tmp_path):
    output = tmp_path / "shards"
    status, said = finish(start(script, videos, output, "--num-cpus", "1"))
    assert status == 0, said
    assert content(output) == content(built)
    for name in ("index.json", "rejects.jsonl", "report.html"):
        assert str(output / name) in said.split()


def test_a_gpu_that_is_not_there_is_not_waited_for(videos, script, tmp_path):
    flags = ("--align.backend", "fan", "--align.device", "cuda", "--num-cpus", "1")
    status, said = finish(start(script, videos, tmp_path / "shards", *flags))
    assert status == 1
    assert "error: --align.device cuda needs a GPU, and Ray sees none on this machine." in said
    assert not (tmp_path / "shards").exists()


def test_a_folder_is_built_by_one_job_at_a_time(built, videos, script, tmp_path, monkeypatch):
    output = tmp_path / "shards"
    run_graph = build_shards.run_graph

    def start_another_then_go_on(*args):
        unfinished = output / ".tmp-train-000000.tar-1234"
        unfinished.write_bytes(b"half a shard")
        status, said = finish(start(script, videos, output, "--num-cpus", "1"))
        assert status == 1
        assert f"error: Another process is at work in {output}." in said, said
        assert unfinished.exists()
        return run_graph(*args)

    monkeypatch.setattr(build_shards, "run_graph", start_another_then_go_on)
    assert build(videos, output) == 0
    assert content(output) == content(built)
    assert {p.suffix for p in output.iterdir()} == {".tar", ".json", ".jsonl", ".html"}


def whole_shards(output: Path) -> Sequence[Path]:
    return sorted(output.glob("*-*.json"))


def kill_midway(process: subprocess.Popen[str], output: Path, number: int, num_shards: int) -> None:
    """Send a signal when so many shards are done."""
    end = time.monotonic() + 300
    while len(whole_shards(output)) < num_shards:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {num_shards} shards in five minutes"
        time.sleep(0.01)
    process.send_signal(number)


def assert_nothing_is_half_written(output: Path, built: Path) -> None:
    sound = content(built)
    for name, digest in content(output).items():
        if name != "build.json":
            assert digest == sound[name], name


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),  # handled as SIGTERM is
        signal.SIGKILL,
    ],
)
def test_what_is_finished_survives_a_signal(built, videos, script, tmp_path, number):
    output = tmp_path / "shards"
    process = start(script, videos, output)
    kill_midway(process, output, number, 3)
    status, said = finish(process)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130), said
    time.sleep(1.0)  # workers of a killed driver take a moment to notice
    done = len(whole_shards(output))
    assert done >= 3
    assert_nothing_is_half_written(output, built)
    assert build(videos, output) == 0
    assert content(output) == content(built)


@pytest.mark.slow
def test_any_number_of_kills_at_any_moment_changes_no_byte(built, videos, script, tmp_path):
    output = tmp_path / "shards"
    moments = random.Random(0)
    for _ in range(10):
        process = start(script, videos, output)
        end = time.monotonic() + moments.uniform(1, 14)
        while process.poll() is None and time.monotonic() < end:
            if output.exists():
                assert_nothing_is_half_written(output, built)
            time.sleep(0.02)
        process.kill()
        finish(process)
    time.sleep(2.0)
    assert build(videos, output) == 0
    assert content(output) == content(built)
