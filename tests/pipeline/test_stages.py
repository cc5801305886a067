"""The stages on one shard: rejects, failures of storage, and what is handed on."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import stages
from pipeline.align import NullAligner
from pipeline.config import AlignConfig, BuildConfig, CropConfig, DecodeConfig
from pipeline.faces import Judged, face_spec
from pipeline.isolate import Decoder
from pipeline.judge import GOOD
from pipeline.plan import Segment, Shard, Video
from pipeline.sample import Reject
from pipeline.shard import Manifest
from pipeline.stages import Align, Builder, Work
from tests.pipeline.videos import noisy, write_video

FAILING = """
from pathlib import Path
from pipeline.decode import decode_video
from pipeline.isolate import serve
from pipeline.storage import StorageError

def decode(video, wanted, config, root):
    with open("tries", "a") as tries:
        print(video.video, file=tries)
    num_tries = Path("tries").read_text().split().count(video.video)
    if video.video == "never" or (video.video == "third" and num_tries < 3):
        raise StorageError("Can't read it: Input/output error.")
    return decode_video(video, wanted, config, root)

serve(decode)
"""


def shard_of(*names: str) -> Shard:
    segments = (Segment(path="good.mp4", name="good"),)
    videos = (Video(person="ann", video=n, split="train", segments=segments) for n in names)
    return Shard(name="train-000000", videos=tuple(videos))


@pytest.fixture
def config(tmp_path, monkeypatch) -> BuildConfig:
    """Give a job whose storage fails at videos named for it, by a real child that says so."""
    write_video(tmp_path / "good.mp4", noisy(1))
    (tmp_path / "bad.mp4").touch()
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "STORAGE_PAUSE_S", 0.01)
    decoder = Decoder(DecodeConfig(), (sys.executable, str(script)))
    monkeypatch.setattr(stages, "decoder_of", lambda config, worker: decoder)
    yield BuildConfig(
        input=str(tmp_path),
        train_frames=6,
        val_frames=8,
        min_frames=4,
        crop=CropConfig(image_px=48),
        align=AlignConfig(backend="null"),
    )
    decoder.close()


def counts(judged: Judged) -> tuple[int, int]:
    """Count the good frames, and all that were looked at."""
    verdicts = np.concatenate(judged.verdicts)
    return int((verdicts == GOOD).sum()), len(verdicts)


def tries() -> list[str]:
    return Path("tries").read_text().split()


def test_storage_gets_three_tries(config):
    work = stages.decode(Work(shard=shard_of("third")), config)
    assert not work.failed
    assert tries() == ["third"] * 3
    assert not isinstance(work.decoded[0].segments, Reject)


def test_storage_that_never_answers_fails_the_shard_and_rejects_nobody(config, tmp_path):
    work = stages.decode(Work(shard=shard_of("fine", "never")), config)
    assert work.failed == "Can't read it: Input/output error."
    assert work.decoded == ()
    written = stages.write(work, str(tmp_path / "out"))
    assert written.failed == work.failed
    assert not (tmp_path / "out").exists()


def test_a_shard_goes_through_all_stages(config, tmp_path):
    spec = face_spec(NullAligner(), config.crop)
    work = stages.decode(Work(shard=shard_of("a", "b")), config)
    work = pickle.loads(pickle.dumps(work, protocol=5))
    work = Align(config)(work)
    assert [counts(judged) for judged in work.judged] == [(6, 6)] * 2
    assert work.decoded == ()
    work = stages.draw(work, config, spec)
    assert work.judged == ()
    assert [len(samples) for samples in work.outcomes] == [6, 6]
    work = stages.pack(work, 95)
    assert work.outcomes == ()
    together = Builder(config, spec)(Work(shard=work.shard))
    assert together.packed == work.packed
    work = stages.write(work, str(tmp_path / "out"))
    assert work.packed is None
    assert list(work.cpu_s) == ["decode", "align", "draw", "pack", "write"]
    assert list(together.cpu_s) == list(work.cpu_s)[:-1]
    assert min(together.cpu_s.values()) > 0
    manifest = Manifest.from_json((tmp_path / "out" / "train-000000.json").read_bytes())
    assert [v.key for v in manifest.videos] == ["ann/a", "ann/b"]


def test_rejects_pass_through_all_stages(config, tmp_path):
    bad = (Segment(path="bad.mp4", name="bad"),)
    video = Video(person="bob", video="bad", split="train", segments=bad)
    shard = Shard(name="train-000000", videos=(video, *shard_of("a").videos))
    work = Align(config)(stages.decode(Work(shard=shard), config))
    assert isinstance(work.judged[0], Reject)
    work = stages.draw(work, config, face_spec(NullAligner(), config.crop))
    reject, samples = work.outcomes
    assert isinstance(reject, Reject)
    assert reject.id == "bob/bad"
    assert np.array_equal([s.number for s in samples], range(6))
    assert [d.id for d in work.damaged] == ["bob/bad/bad"]
    together = Builder(config, face_spec(NullAligner(), config.crop))(Work(shard=shard))
    assert together.packed == stages.pack(work, config.jpeg_quality).packed


def test_a_second_round_gives_the_same_shard_in_stages_and_in_one_go(config, tmp_path):
    pictures = noisy(2)
    pictures[9:16] = [pictures[9]] * 7
    write_video(tmp_path / "frozen.mp4", pictures, codec="ffv1", pix_fmt="bgr0")
    frozen = Video(
        person="ann", video="b", split="train", segments=(Segment(path="frozen.mp4", name="f"),)
    )
    a, c = shard_of("a", "c").videos
    shard = Shard(name="train-000000", videos=(a, frozen, c))
    work = Align(config)(stages.decode(Work(shard=shard), config))
    assert [counts(judged) for judged in work.judged] == [(6, 6), (7, 9), (6, 6)]
    spec = face_spec(NullAligner(), config.crop)
    work = stages.pack(stages.draw(work, config, spec), config.jpeg_quality)
    assert [video.num_frames for video in work.packed.manifest.videos] == [6, 6, 6]
    assert Builder(config, spec)(Work(shard=shard)).packed == work.packed


def test_storage_that_fails_a_builder_fails_the_shard(config):
    build = Builder(config, face_spec(NullAligner(), config.crop))
    work = build(Work(shard=shard_of("fine", "never")))
    assert work.failed == "Can't read it: Input/output error."
    assert work.packed is None
