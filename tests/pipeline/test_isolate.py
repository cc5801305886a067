"""A file that kills or hangs the decoder is one reject; the files around it are unharmed.

The decoders that crash are real ones: children that die of real signals, at files named for it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.decode import decode_video
from pipeline.isolate import Decoder
from pipeline.plan import Segment, Video
from pipeline.sample import Reject
from pipeline.storage import StorageError
from tests.pipeline.videos import write_video

POISONED = """
import os, signal, sys, time
from pipeline.decode import decode_video
from pipeline.isolate import serve
from pipeline.storage import StorageError

def decode(video, wanted, config, root):
    with open("calls", "a") as calls:
        print(os.getpid(), video.video, file=calls)
    if video.video == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if video.video == "leave":
        os._exit(3)
    if video.video == "spin":
        while True:
            pass
    if video.video == "sleep":
        time.sleep(60)
    if video.video == "storage":
        raise StorageError("Can't read it: Input/output error.")
    if video.video == "wear" and len(open("calls").readlines()) == 2:
        os.abort()
    print("libraries print what they like")
    return decode_video(video, wanted, config, root)

serve(decode)
"""


def video(name: str) -> Video:
    return Video(
        person="ann", video=name, split="train", segments=(Segment(path="good.mp4", name="good"),)
    )


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    write_video(tmp_path / "good.mp4")
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)
    monkeypatch.chdir(tmp_path)
    decoder = Decoder(
        DecodeConfig(cpu_deadline_s=1.5, wall_deadline_s=6.0), (sys.executable, str(script))
    )
    yield decoder
    decoder.close()


def calls() -> list[str]:
    return [line.split()[1] for line in Path("calls").read_text().splitlines()]


def test_a_child_gives_what_decoding_here_gives(tmp_path):
    write_video(tmp_path / "good.mp4")
    config = DecodeConfig()
    decoder = Decoder(config)
    try:
        there = decoder.decode(video("talk"), 7, str(tmp_path))
    finally:
        decoder.close()
    here = decode_video(video("talk"), 7, config, str(tmp_path))
    assert there.damaged == here.damaged == ()
    assert len(there.segments) == len(here.segments) == 1
    for a, b in zip(there.segments, here.segments, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert np.array_equal(a.pts_s, b.pts_s)
        assert (a.segment, a.original) == (b.segment, b.original)
    assert decoder.cpu_s > 0


def test_one_child_serves_many_videos(decoder):
    for name in ("a", "b", "c"):
        assert not isinstance(decoder.decode(video(name), 5, ".").segments, Reject)
    children = {line.split()[0] for line in Path("calls").read_text().splitlines()}
    assert len(children) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "the decoder died 2 times: SIGSEGV"),
        ("leave", "the decoder died 2 times: exit status 3"),
        ("spin", "the decoder died 2 times: more than 1.5 s of CPU time"),
        ("sleep", "the decoder died 2 times: no answer within 6 s"),
    ],
)
def test_poison_is_one_reject_and_the_rest_goes_on(decoder, name, reason):
    decoded = decoder.decode(video(name), 5, ".")
    assert decoded.segments == Reject(id=f"ann/{name}", stage="decode", reason=reason)
    assert calls() == [name] * 2
    assert not isinstance(decoder.decode(video("after"), 5, ".").segments, Reject)


def test_only_deaths_of_fresh_children_count(decoder):
    """A child that has served others may die of them: that is no proof against this video."""
    decoder.decode(video("first"), 5, ".")
    assert not isinstance(decoder.decode(video("wear"), 5, ".").segments, Reject)
    assert calls() == ["first", "wear", "wear"]
    assert isinstance(decoder.decode(video("crash"), 5, ".").segments, Reject)
    assert calls()[3:] == ["crash"] * 3


def test_storage_failure_is_no_reject(decoder):
    with pytest.raises(StorageError, match="Input/output error"):
        decoder.decode(video("storage"), 5, ".")
    assert not isinstance(decoder.decode(video("after"), 5, ".").segments, Reject)


def test_a_killed_child_is_replaced(decoder):
    decoder.decode(video("a"), 5, ".")
    child = decoder._child
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not isinstance(decoder.decode(video("b"), 5, ".").segments, Reject)


@pytest.mark.parametrize("is_busy", [False, True])
def test_no_orphan_is_left(tmp_path, is_busy):
    """The child dies with its parent, waiting for work or in the midst of it."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED)
    write_video(tmp_path / "good.mp4")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from tests.pipeline.test_isolate import video\n"
            "from pipeline.config import DecodeConfig\n"
            "from pipeline.isolate import Decoder\n"
            "decoder = Decoder(DecodeConfig(), (sys.executable, 'poisoned.py'))\n"
            "decoder.decode(video('good'), 5, '.')\n"
            "print(decoder._child.pid, flush=True)\n"
            f"decoder.decode(video('spin'), 5, '.') if {is_busy} else time.sleep(60)\n",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    try:
        facts = Path(f"/proc/{pid}/stat").read_text()
        return facts.rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
