"""The page shows what was built, holds all it needs, and stays small however much there is."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.align import template
from pipeline.rasterize import draw, round_points
from pipeline.report import (
    MAX_MEASURED,
    MAX_OTHERS,
    MAX_REJECTS,
    MAX_SUSPECTS,
    Measured,
    choose,
    histogram,
    measure,
    normalised,
    page,
    write_report,
)
from pipeline.sample import Reject, Sample, thumbnail_of
from pipeline.shard import Index, VideoEntry
from tests.pipeline.samples import SPEC, make_sample, write_shard


def video(person: str, num_frames: int, shift: float = 0.0) -> list[Sample]:
    """A schematic face that moves right; in its last frame, jaw and brows shift by `shift` px."""
    samples = []
    for number in range(num_frames):
        sample = make_sample(person, "talk", number)
        points = (template() * 0.6 + np.array([0.1 + 0.01 * number, 0.2])) * 48
        if number == num_frames - 1:
            points[:27, 0] += shift
        landmarks = round_points(points)
        samples.append(replace(sample, landmarks=landmarks, raster=draw(landmarks, 48)))
    return samples


@pytest.fixture
def folder(tmp_path):
    """Two shards: nine videos, of which zed's has landmarks that jump, and rejects."""
    videos = [video(f"p{i}", 3 + i) for i in range(8)] + [video("zed", 5, shift=6.0)]
    refused = Reject(id="<b>&/talk", stage="faces", reason="no face: 0 good frames of 9, 4 needed")
    manifests = [
        write_shard(str(tmp_path), "train-000000", videos[:4], 90),
        write_shard(str(tmp_path), "train-000001", [*videos[4:], refused], 90),
    ]
    Index.of(manifests, SPEC, {"seed": 3}, {"libraries": {"av": "18.1"}}).save(str(tmp_path))
    return tmp_path


def test_the_page_stands_alone(folder):
    write_report(str(folder))
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    sources = re.findall(r"(?:src|href)='(.{11})", text)
    assert set(sources) == {"data:image/"}
    assert "http" not in text


def test_the_page_counts_and_names_what_there_is(folder):
    write_report(str(folder))
    text = (folder / "report.html").read_text()
    assert "<b>9</b><span>videos of 10" in text
    assert "<b>57</b><span>frames" in text
    for number in range(8):
        assert f"p{number}/talk" in text
    assert "<td>no face: 0 good frames of 9, 4 needed" in text
    assert "<td>seed<td>3" in text
    assert "Every stored frame. A face's distance from its video's mean shape" in html.unescape(
        text
    )


def test_names_cannot_break_the_page(folder):
    write_report(str(folder))
    text = (folder / "report.html").read_text()
    assert "&lt;b&gt;&amp;/talk" in text
    assert "<b>&/talk" not in text


def test_the_video_with_odd_landmarks_comes_first(folder):
    write_report(str(folder))
    text = (folder / "report.html").read_text()
    suspects = text[text.index("Look at these first") : text.index("Faces and rasters")]
    assert suspects.index("zed/talk") < suspects.index("<img")


def test_a_report_needs_an_index(tmp_path):
    with pytest.raises(ValueError, match=r"no index\.json"):
        write_report(str(tmp_path))


def test_a_build_of_rejects_alone_has_a_page(tmp_path):
    refused = Reject(id="ann/talk", stage="decode", reason="not a video")
    manifest = write_shard(str(tmp_path), "train-000000", [refused], 90)
    Index.of([manifest], SPEC, {}, {}).save(str(tmp_path))
    write_report(str(tmp_path))
    assert "not a video" in (tmp_path / "report.html").read_text()


def test_a_reject_shows_its_thumbnail(folder):
    index = Index.load(str(folder))
    grey = thumbnail_of(np.full((9, 12, 3), 90, np.uint8))
    text = page(replace(index, rejects=(replace(index.rejects[0], thumbnail=grey),)), [])
    assert text.count("<img") == 1
    assert f"<img alt='&lt;b&gt;&amp;/talk' src='data:image/jpeg;base64,{grey}'>" in text


def test_many_videos_make_a_page_of_bounded_size(folder):
    index = Index.load(str(folder))
    measured = [measure(str(folder), index, entry) for entry in index.videos] * 30
    many = replace(index, rejects=index.rejects * 1000)
    text = page(many, measured[:MAX_MEASURED])
    assert text.count("<img") == MAX_SUSPECTS + MAX_OTHERS
    assert text.count("&lt;b&gt;") == MAX_REJECTS
    assert "900 more" in text


def test_videos_are_chosen_by_name_alone():
    entries = [
        VideoEntry(person=f"p{i}", video="v", split="train", shard="s", offset=0, num_bytes=1,
                   sha256="", num_frames=1)
        for i in range(40)
    ]  # fmt: skip
    chosen = choose(entries, 7)
    assert chosen == choose(entries[::-1], 7)
    assert chosen == choose([e for e in entries if e in chosen or e.person < "p3"], 7)


def measured(points: np.ndarray) -> Measured:
    entry = VideoEntry(
        person="p", video="v", split="val", shard="s", offset=0, num_bytes=1, sha256="",
        num_frames=len(points),
    )  # fmt: skip
    return Measured(entry=entry, points=points, scores=np.ones(len(points)), span=b"")


def test_a_face_that_moves_grows_and_tilts_keeps_its_shape():
    angles, sizes = np.linspace(-0.4, 0.4, 6), np.linspace(0.3, 0.6, 6)
    turns = np.stack([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    points = np.einsum("xyn,py->npx", turns, template() - 0.5) * sizes[:, None, None] + 0.5
    assert measured(points).strays.max() < 1e-9
    points[4, 36:48, 1] += 0.1
    assert measured(points).strays.argmax() == 4


def test_a_turned_head_has_a_yaw_with_a_sign():
    points = np.repeat(template()[None], 3, axis=0)
    points[1, 30, 0] += 0.1
    points[2, 30, 0] -= 0.1
    ahead, right, left = measured(points).yaws_deg
    assert ahead == pytest.approx(0, abs=1e-6)
    assert right == pytest.approx(-left)
    assert right > 5


def test_normalised_shapes_have_no_place_size_or_angle():
    points = np.random.default_rng(1).normal(size=(4, 10, 2))
    shapes = normalised(points)
    np.testing.assert_allclose(shapes.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(shapes, axis=1), 1)


def test_a_histogram_of_one_value_is_drawn():
    drawn = histogram(np.full(5, 2.5), "Score", "of the backend")
    assert drawn.count("<rect") == 28
    assert ">2.5<" in drawn
