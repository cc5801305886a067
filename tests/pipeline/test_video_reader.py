"""What a video file says of itself, and the size at which it is shown."""

from fractions import Fraction

import av
import pytest

from pipeline.video_reader import screen_size, video_info
from tests.pipeline.videos import write_video


def test_info(tmp_path):
    info = video_info(write_video(tmp_path / "a.mp4", num_frames=50, sound=True))
    assert (info.fps, info.has_audio) == (25.0, True)
    assert info.duration_s == pytest.approx(2.0, abs=0.05)
    assert not video_info(write_video(tmp_path / "b.mp4")).has_audio


def test_frames_are_shrunk_to_fit_and_never_enlarged():
    assert screen_size(1920, 1080, Fraction(1), 512) == (512, 288)
    assert screen_size(300, 200, Fraction(1), 512) == (300, 200)
    assert screen_size(720, 576, Fraction(16, 15), None) == (720, 540)
    assert screen_size(720, 480, Fraction(8, 9), None) == (640, 480)


@pytest.mark.parametrize("tagged", [True, False])
def test_the_length_is_that_of_the_picture_however_long_the_sound(tmp_path, tagged):
    """Matroska says how long a track is in a tag, if at all."""
    path = write_video(tmp_path / "a.mkv", num_frames=10, sound=True)
    if not tagged:
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"SOMEWHAT"))
    with av.open(str(path)) as container:
        assert container.duration / av.time_base > 1
        assert ("DURATION" in container.streams.video[0].metadata) == tagged
    assert video_info(path).duration_s == pytest.approx(0.4, abs=0.05)
