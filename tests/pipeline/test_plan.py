"""The plan: a pure function of names, seed and settings."""

import contextlib
import os
import random

import pytest

from pipeline.config import BuildConfig
from pipeline.plan import Segment, cut, find_videos, make_plan, safe_id

MIXED = [
    "dev/mp4/id00012/21Uxsk56VDQ/00001.mp4",
    "dev/mp4/id00012/21Uxsk56VDQ/00002.mp4",
    "dev/mp4/id00012/_a-bc/00001.mp4",
    "test/mp4/id00017/xyz/00001.mp4",
    "maria/holiday.mov",
    "maria/holiday.mp4",
    "maria/speech.mp4",
    "solo.mp4",
]


def videos_of(listing, **settings):
    plan = make_plan(listing, BuildConfig(**settings))
    return {v.key: v for shard in plan.shards for v in shard.videos}


def test_a_mixed_tree():
    videos = videos_of(MIXED)
    assert len(videos) == 7
    assert [s.path for s in videos["id00012/21Uxsk56VDQ"].segments] == MIXED[:2]
    assert [s.name for s in videos["id00012/21Uxsk56VDQ"].segments] == ["00001", "00002"]
    assert {"id00017/xyz", "maria/speech", "solo/solo"} <= videos.keys()
    # Two files whose names differ in the suffix alone are two videos.
    assert sum(key.startswith("maria/maria-holiday-") for key in videos) == 2
    # A YouTube id may begin with "_", which webdataset takes for metadata.
    assert sum(key.startswith("id00012/a-bc-") for key in videos) == 1


def test_nested_folders_keep_persons_apart():
    videos = videos_of(["a/ann/v/1.mp4", "b/ann/v/1.mp4", "x/dev/mp4/ann/v/1.mp4"])
    assert len({v.person for v in videos.values()}) == 3
    assert "ann/v" in videos


def test_file_and_folder_of_one_name():
    videos = videos_of(["ann/talk.mp4", "ann/talk/1.mp4"])
    assert len(videos) == 2
    assert [s.path for s in videos["ann/talk"].segments] == ["ann/talk/1.mp4"]


def paths_of(listing):
    return {key: [s.path for s in video.segments] for key, video in videos_of(listing).items()}


def test_files_of_a_folder_are_of_one_person_whatever_they_are_called():
    videos = videos_of(["a/a.mp4", "a/a.mkv", "a/b.mp4", "a.mov", "c.mp4", "d/d.mp4"])
    assert len(videos) == 6
    assert {v.person for v in videos.values() if v.segments[0].path[0] == "a"} == {"a"}
    assert {"a/b", "c/c", "d/d"} <= videos.keys()


@pytest.mark.parametrize(
    "listing",
    [
        ["a.mp4", "a.mkv"],
        ["a/a.mp4", "a/a.mkv", "a/a.mp4.mp4"],
        ["a/t.mp4", "a/t/1.mp4", "a/t.mp4/1.mp4"],
        ["dev/mp4/a/t.mp4", "test/mp4/a/t.mp4"],
        ["a.mp4", "a/a.mp4", "a/v.mp4"],
    ],
)  # fmt: skip
def test_files_whose_names_clash_are_videos_of_one_person(listing):
    paths = paths_of(listing)
    assert sorted(path for video in paths.values() for path in video) == sorted(listing)
    assert len(paths) == len(listing)
    assert {key.split("/")[0] for key in paths} == {"a"}


def test_one_id_of_two_names_is_refused():
    with pytest.raises(ValueError, match=r"would both be called .* rename one of them"):
        videos_of(["a b/t.mp4", f"{safe_id('a b')}/u.mp4"])


def test_segments_with_equal_stems_get_names_of_their_own():
    video = videos_of(["ann/talk/1.mp4", "ann/talk/1.mov", "ann/talk/2.mp4"])["ann/talk"]
    names = [s.name for s in video.segments]
    assert len(set(names)) == 3
    assert names[2] == "2"


@pytest.mark.parametrize(
    "name", ["a.b", "_x_", "__yt__", "ü", "a b", "..", "", "x" * 300, "a/b", "caf\udce9", "-n"]
)
def test_ids_are_safe(name):
    safe = safe_id(name)
    assert 0 < len(safe) <= 64
    assert safe.isascii()
    assert not set(safe) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert safe[0] not in "_-"
    assert safe == safe_id(name) != safe_id(name + "!")


def test_good_ids_stay():
    assert [safe_id(x) for x in ("id00012", "21Uxsk56VDQ", "a_b-c")] == [
        "id00012",
        "21Uxsk56VDQ",
        "a_b-c",
    ]


def test_different_names_give_different_ids():
    names = ["a.b", "a b", "a-b", "a_b", "a+b", "ab", "A.b"]
    assert len({safe_id(n) for n in names}) == len(names)


def listing(num_persons: int, num_videos: int = 3, num_segments: int = 2) -> list[str]:
    return [
        f"p{p:03}/v{v}/{s:05}.mp4"
        for p in range(num_persons)
        for v in range(num_videos)
        for s in range(num_segments)
    ]


def test_order_of_the_listing_does_not_matter():
    names = listing(23)
    shuffled = random.Random(1).sample(names, len(names))
    assert make_plan(shuffled, BuildConfig()) == make_plan(names, BuildConfig())
    assert make_plan([*names, names[5]], BuildConfig()) == make_plan(names, BuildConfig())


def test_seed_files_and_names_decide_the_hash():
    plans = [
        make_plan(listing(23), BuildConfig()),
        make_plan(listing(23), BuildConfig(seed=1)),
        make_plan(listing(22), BuildConfig()),
        make_plan([*listing(23), "p000/v0/00009.mp4"], BuildConfig()),
    ]
    assert len({plan.sha256 for plan in plans}) == len(plans)


@pytest.mark.parametrize(("persons", "held_out"), [(1, 0), (2, 0), (3, 1), (20, 1), (21, 2)])
def test_persons_not_videos_are_held_out(persons, held_out):
    videos = videos_of(listing(persons), val_fraction=0.05).values()
    by_split = {split: {v.person for v in videos if v.split == split} for split in ("train", "val")}
    assert len(by_split["val"]) == held_out
    assert not by_split["val"] & by_split["train"]


def test_split_can_be_turned_off():
    assert all(v.split == "train" for v in videos_of(listing(9), val_fraction=0.0).values())


@pytest.mark.parametrize(("num_videos", "largest"), [(5, 1), (64, 1), (65, 2), (3000, 32)])
def test_shards_grow_with_the_job(num_videos, largest):
    plan = make_plan([f"p{i}/v.mp4" for i in range(num_videos)], BuildConfig())
    assert max(len(s.videos) for s in plan.shards) == largest
    keys = [v.key for s in plan.shards for v in s.videos]
    assert len(keys) == len(set(keys)) == num_videos == plan.num_videos
    assert all(s.name.startswith(v.split) for s in plan.shards for v in s.videos)


@pytest.mark.parametrize(("length_s", "parts"), [(0.04, 1), (10.0, 1), (10.1, 2), (95.0, 10)])
def test_long_files_are_cut_into_equal_parts(length_s, parts):
    segments = cut(Segment(path="a.mp4", name="a"), length_s, 10.0)
    assert len(segments) == parts == len({s.name for s in segments})
    ends = [length_s if s.end_s is None else s.end_s for s in segments]
    assert max(e - s.start_s for s, e in zip(segments, ends, strict=True)) <= 10.0 + 1e-6
    assert ends[:-1] == [s.start_s for s in segments[1:]]
    assert (segments[0].start_s, segments[-1].end_s) == (0.0, None)


def test_finds_videos_and_nothing_else(tmp_path):
    for name in ("a/v/1.mp4", "a/b.MOV", "c.webm", "a/notes.txt", ".hidden.mp4", "a/._1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outside = tmp_path.with_name("elsewhere")
    outside.mkdir()
    (outside / "d.mp4").touch()
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert sorted(find_videos(str(tmp_path))) == ["a/b.MOV", "a/v/1.mp4", "c.webm", "link/d.mp4"]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_folder_is_listed_once_in_whatever_order_the_disk_gives(tmp_path, monkeypatch, backwards):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for file in (inside / "m/v/1.mp4", outside / "o.mp4", outside / "sub/s.mp4"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name, target in {
        "a": inside / "m",  # a link that comes before the folder it leads to
        "z": inside / "m/v",
        "k": outside,
        "l": outside,
        "b": outside / "sub",
        "m/up": inside,
    }.items():
        (inside / name).symlink_to(target)
    scan = os.scandir

    @contextlib.contextmanager
    def in_other_order(folder):
        with scan(folder) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

    monkeypatch.setattr("os.scandir", in_other_order)
    assert sorted(find_videos(str(inside))) == ["b/s.mp4", "k/o.mp4", "m/v/1.mp4"]


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There are no videos in"):
        find_videos(str(tmp_path))
    with pytest.raises(ValueError, match="There is no folder"):
        find_videos(str(tmp_path / "none"))
