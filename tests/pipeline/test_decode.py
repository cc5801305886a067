"""Frames out of files: the ones that a player would show, of every kind of file, sound or not."""

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.config import DecodeConfig
from pipeline.decode import (
    Decoded,
    SegmentFrames,
    decode_video,
    iter_frames,
    place_times,
)
from pipeline.plan import Segment, Video
from pipeline.sample import Reject
from pipeline.storage import StorageError
from pipeline.video_reader import video_info
from tests.pipeline.videos import (
    HEIGHT,
    WIDTH,
    flip_bits,
    noisy,
    picture,
    rotate,
    truncate,
    write_sound,
    write_video,
)

CONFIG = DecodeConfig()


def decode(*paths: Path, wanted: int = 10, config: DecodeConfig = CONFIG) -> Decoded:
    segments = tuple(Segment(path=str(p), name=p.stem) for p in paths)
    return decode_video(
        Video(person="ann", video="talk", split="train", segments=segments), wanted, config
    )


def frames_of(decoded: Decoded) -> tuple[SegmentFrames, ...]:
    assert not isinstance(decoded.segments, Reject), decoded.segments
    return decoded.segments


def numbers_in(pixels: np.ndarray) -> list[int]:
    """Read the numbers of test pictures off the place of their square."""
    side = HEIGHT // 4
    rows = pixels[:, side + 2 : 2 * side - 2].astype(int).min(axis=(1, 3)) > 200
    return [round(int(np.flatnonzero(row)[0]) / 2) for row in rows]


@pytest.mark.parametrize(
    ("codec", "suffix", "pix_fmt"),
    [
        ("libx264", "mp4", "yuv420p"),
        ("libx264", "mkv", "yuv444p"),
        ("libx264", "mov", "yuv422p10le"),
        ("libx265", "mp4", "yuv420p10le"),
        ("libvpx-vp9", "webm", "yuv420p"),
        ("libsvtav1", "mp4", "yuv420p10le"),
        ("mpeg4", "avi", "yuv420p"),
        ("mpeg1video", "mpg", "yuv420p"),
    ],
)
def test_every_codec_gives_the_frames_shown(tmp_path, codec, suffix, pix_fmt):
    path = write_video(tmp_path / f"a.{suffix}", codec=codec, pix_fmt=pix_fmt)
    (segment,) = frames_of(decode(path))
    assert segment.pixels.shape == (10, HEIGHT, WIDTH, 3)
    numbers = [round(t * 25) for t in segment.pts_s]
    assert numbers == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    assert np.abs(np.array(numbers_in(segment.pixels)) - numbers).max() <= 1
    red, _, blue = segment.pixels[0, 3, 3].astype(int)
    assert red > 120
    assert blue < 60


def test_frames_have_times_of_their_own(tmp_path):
    """With a rate that varies, a frame is on screen until the next one's time."""
    times_ms = [0, 40, 400, 440, 1000, 1600]
    path = write_video(tmp_path / "a.mp4", num_frames=6, pts_ms=times_ms)
    found = list(iter_frames(path))
    assert [round(t * 1000) for _, t in found] == times_ms
    (segment,) = frames_of(decode(path, wanted=4))
    length_s = video_info(path).duration_s
    wanted_s = [(i + 0.5) * length_s / 4 for i in range(4)]
    shown = sorted({max(t for t in times_ms if t <= 1000 * w) for w in wanted_s})
    assert [round(t * 1000) for t in segment.pts_s] == shown


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mpg"])
def test_seeking_finds_the_same_frames_as_decoding_on(tmp_path, suffix):
    codec = {"avi": "mpeg4", "mpg": "mpeg1video"}.get(suffix, "libx264")
    path = write_video(
        tmp_path / f"a.{suffix}", num_frames=1500, rate=25, codec=codec, key_every=100
    )
    every = list(iter_frames(path))
    segments = frames_of(decode(path, wanted=3))
    assert [len(s.pts_s) for s in segments] == [1, 1, 1]
    for segment, time_s in zip(segments, place_times([every[-1][1]], 3)[0], strict=True):
        pixels, pts_s = min(every, key=lambda item: abs(item[1] - segment.pts_s[0]))
        assert pts_s == segment.pts_s[0]
        assert abs(pts_s - time_s) < 0.1
        assert np.array_equal(pixels, segment.pixels[0])


def test_same_file_same_bytes(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    first, second = frames_of(decode(path)), frames_of(decode(path))
    assert first[0].pixels.tobytes() == second[0].pixels.tobytes()


def test_long_files_are_cut_and_frames_stay_in_their_part(tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=100, rate=25)
    segments = frames_of(decode(path, wanted=20, config=DecodeConfig(segment_s=1.5)))
    assert [s.segment for s in segments] == ["a-0", "a-1", "a-2"]
    assert {s.original for s in segments} == {str(path)}
    for i, segment in enumerate(segments):
        assert (segment.pts_s >= i * 4 / 3).all()
        assert (segment.pts_s < (i + 1) * 4 / 3).all()
    assert sum(len(s.pts_s) for s in segments) == 20


def test_files_give_frames_by_their_length(tmp_path):
    short = write_video(tmp_path / "short.mp4", num_frames=25)
    long = write_video(tmp_path / "long.mp4", num_frames=75)
    segments = frames_of(decode(short, long, wanted=16))
    assert [(s.segment, len(s.pts_s)) for s in segments] == [("short", 4), ("long", 12)]


def test_a_short_file_gives_each_frame_once(tmp_path):
    (segment,) = frames_of(decode(write_video(tmp_path / "a.mp4", num_frames=5), wanted=48))
    assert numbers_in(segment.pixels) == [0, 1, 2, 3, 4]


def test_one_frame(tmp_path):
    (segment,) = frames_of(decode(write_video(tmp_path / "a.mp4", num_frames=1)))
    assert segment.pixels.shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(tmp_path, degrees):
    path = rotate(write_video(tmp_path / "a.mp4"), degrees)
    pixels, _ = next(iter(iter_frames(path)))
    upright = np.rot90(picture(0), -degrees // 90).astype(int)  # clockwise
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright)[4:-4, 4:-4].mean() < 12


@pytest.mark.parametrize(
    ("shape", "size"), [(Fraction(2), (32, 96)), (Fraction(1, 2), (64, 48)), (None, (64, 96))]
)
def test_pixels_become_square(tmp_path, shape, size):
    path = write_video(tmp_path / "a.mp4", pixel_shape=shape)
    assert frames_of(decode(path))[0].pixels.shape[1:3] == size


def test_frames_leave_no_larger_than_asked(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    (segment,) = frames_of(decode(path, config=DecodeConfig(decode_px=60)))
    assert segment.pixels.shape[1:3] == (40, 60)


def test_odd_sizes(tmp_path):
    pictures = [picture(i, 97, 63) for i in range(12)]
    path = write_video(tmp_path / "a.mp4", pictures, pix_fmt="yuv444p")
    assert frames_of(decode(path))[0].pixels.shape[1:3] == (63, 97)


def test_photo_is_a_video_of_one_frame(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture(3)[..., ::-1])
    ((pixels, pts_s),) = iter_frames(tmp_path / "a.png")
    assert pts_s == 0
    assert np.array_equal(pixels, picture(3))


def spoil_text(path: Path) -> None:
    path.write_text("This is not a video.")


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_folder(path: Path) -> None:
    path.mkdir()


def spoil_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone.mp4"))


def spoil_sound(path: Path) -> None:
    write_sound(path)


def spoil_tail(path: Path) -> None:
    truncate(write_video(path), 0.6)


def spoil_all(path: Path) -> None:
    flip_bits(write_video(path), 0.0, 1.0)


BAD_FILES = [
    (spoil_empty, "the file is empty"),
    (spoil_text, "not a video, or its header is cut off"),
    (spoil_tail, "not a video, or its header is cut off"),
    (spoil_sound, "no picture track"),
    (spoil_folder, "not a file, but a folder"),
    (spoil_link, "No such file"),
    (spoil_all, "damaged after 0.00 s"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD_FILES)
def test_bad_files_are_rejected_by_name(tmp_path, spoil, reason):
    spoil(tmp_path / "bad.mp4")
    decoded = decode(tmp_path / "bad.mp4")
    assert isinstance(decoded.segments, Reject)
    assert (decoded.segments.id, decoded.segments.stage) == ("ann/talk", "decode")
    assert reason in decoded.segments.reason
    assert [d.id for d in decoded.damaged] == ["ann/talk/bad"]


def test_a_file_that_went_away_is_no_reject(tmp_path):
    """The next try, or the next node, may see it again."""
    with pytest.raises(StorageError, match=r"gone\.mp4 was there when the job was planned"):
        decode(tmp_path / "gone.mp4")


@pytest.mark.parametrize(("spoil", "reason"), BAD_FILES)
def test_a_bad_file_costs_only_itself(tmp_path, spoil, reason):
    spoil(tmp_path / "bad.mp4")
    good = write_video(tmp_path / "good.mp4")
    decoded = decode(tmp_path / "bad.mp4", good)
    assert [s.segment for s in frames_of(decoded)] == ["good"]
    assert reason in decoded.damaged[0].reason


def test_bad_files_are_errors_to_those_who_want_one(tmp_path):
    spoil_text(tmp_path / "bad.mp4")
    with pytest.raises(ValueError, match="not a video"):
        list(iter_frames(tmp_path / "bad.mp4"))
    with pytest.raises(ValueError, match="not a video"):
        video_info(tmp_path / "bad.mp4")


def test_damage_costs_frames_up_to_the_next_key_frame(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", noisy(0, 75))
    hurt = tmp_path / "hurt.mp4"
    hurt.write_bytes(whole.read_bytes())
    flip_bits(hurt, 0.35, 0.4, every=97)
    clean = {t: pixels for pixels, t in iter_frames(whole)}
    decoded = decode(hurt, wanted=25)
    (segment,) = frames_of(decoded)
    assert 12 <= len(segment.pts_s) < 25
    assert "damaged after" in decoded.damaged[0].reason
    same = [
        np.array_equal(pixels, clean[t])
        for pixels, t in zip(segment.pixels, segment.pts_s, strict=True)
    ]
    # A decoder may notice a few frames late, depending on what the encoder made of the noise.
    assert same.count(False) <= 3


def test_a_file_cut_off_early_is_lost_and_late_is_not(tmp_path):
    early = write_video(tmp_path / "early.mp4", noisy(0, 75), faststart=True)
    late = write_video(tmp_path / "late.mp4", noisy(0, 75), faststart=True)
    decoded = decode(truncate(early, 0.3))
    assert isinstance(decoded.segments, Reject)
    assert "of 10 wanted frames could be read" in decoded.segments.reason
    decoded = decode(truncate(late, 0.8))
    assert 5 <= len(frames_of(decoded)[0].pts_s) < 10
    assert len(decoded.damaged) == 1


def test_times_cover_all_files_evenly():
    placed = place_times([2.0, 0.5, 7.5], 20)
    assert [len(p) for p in placed] == [4, 1, 15]
    assert placed[0] == [0.25, 0.75, 1.25, 1.75]
    assert sum(len(p) for p in place_times([0.1] * 7, 5)) == 5
