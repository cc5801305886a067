"""A film keeps its driver's times and sound, says that it is synthetic, and appears whole."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.pipeline.videos import write_video
from train.film import SYNTHETIC, Film


def shoot(driver: Path, film: Path) -> list[float]:
    """Write a film of grey pictures at the driver's times, and return them."""
    times = times_of(driver)
    with Film(film, driver) as out:
        for number, pts_s in enumerate(times):
            out.add(np.full((32, 48, 3), 5 * number % 256, np.uint8), pts_s)
    return times


def times_of(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        track = container.streams.video[0]
        start = track.start_time or 0
        return [float((frame.pts - start) * track.time_base) for frame in container.decode(track)]


def sound_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def sound_s(path: Path) -> float:
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        return sum(frame.samples for frame in container.decode(track)) / track.rate


def test_frames_rate_and_mark_survive(tmp_path: Path) -> None:
    driver = write_video(tmp_path / "driver.mp4", num_frames=23, rate=30)
    times = shoot(driver, tmp_path / "film.mp4")
    assert times_of(tmp_path / "film.mp4") == times
    with av.open(str(tmp_path / "film.mp4")) as film:
        track = film.streams.video[0]
        assert (track.frames, track.average_rate) == (23, 30)
        assert (track.width, track.height, track.codec_context.name) == (48, 32, "h264")
        assert not film.streams.audio
        assert film.metadata["comment"] == film.metadata["description"] == SYNTHETIC
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_an_uneven_rate_survives(tmp_path: Path) -> None:
    pts_ms = [0, 40, 73, 150, 190, 260, 300, 301, 420]
    driver = write_video(tmp_path / "driver.mp4", num_frames=9, pts_ms=pts_ms)
    times = shoot(driver, tmp_path / "film.mp4")
    assert times == pytest.approx([t / 1000 for t in pts_ms])
    assert times_of(tmp_path / "film.mp4") == pytest.approx(times)


def test_sound_that_fits_is_copied_packet_by_packet(tmp_path: Path) -> None:
    driver = write_video(tmp_path / "driver.mp4", num_frames=25, sound=True)
    shoot(driver, tmp_path / "film.mp4")
    assert sound_packets(tmp_path / "film.mp4") == sound_packets(driver)
    assert sound_s(tmp_path / "film.mp4") == sound_s(driver)
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert [track.type for track in film.streams] == ["video", "audio"]


def test_sound_keeps_its_place_where_a_driver_does_not_start_at_zero(tmp_path: Path) -> None:
    driver = write_video(tmp_path / "driver.ts", num_frames=25, sound=True)
    shoot(driver, tmp_path / "film.mp4")
    assert sound_s(tmp_path / "film.mp4") == pytest.approx(sound_s(driver), abs=0.13)
    assert offset_s(tmp_path / "film.mp4") == pytest.approx(max(0, offset_s(driver)), abs=0.07)


def offset_s(path: Path) -> float:
    """Return how much later the sound starts than the pictures."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        starts = [float((t.start_time or 0) * t.time_base) for t in (video, audio)]
    return starts[1] - starts[0]


def test_other_sound_becomes_aac(tmp_path: Path) -> None:
    driver = write_video_with_pcm(tmp_path / "driver.mov", num_samples=range(20))
    shoot(driver, tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert film.streams.audio[0].codec_context.name == "aac"
    assert sound_s(tmp_path / "film.mp4") == pytest.approx(20 * 800 / 16000, abs=0.13)


def write_video_with_pcm(path: Path, num_samples: Sequence[int]) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for number in num_samples:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(video.encode(frame))
            wave = (3000 * np.sin(np.arange(800) / 9)).astype(np.int16)[None]
            block = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            block.sample_rate, block.pts = 16000, 800 * number
            block.time_base = Fraction(1, 16000)
            container.mux(sound.encode(block))
        container.mux(video.encode())
        container.mux(sound.encode())
    return path


def test_a_film_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    driver = write_video(tmp_path / "driver.mp4", num_frames=5)
    (tmp_path / "film.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), Film(tmp_path / "film.mp4", driver) as out:
        out.add(np.zeros((32, 48, 3), np.uint8), 0.0)
        raise RuntimeError("half way")
    assert (tmp_path / "film.mp4").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["driver.mp4", "film.mp4"]
