"""The reader: every video once an epoch, one order for all, and no bad bytes."""

import json
import multiprocessing
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.sample import from_fields
from pipeline.shard import FrameReader, Index, VideoEntry, read_span, samples_in_span
from pipeline.storage import _filesystem
from tests.train.shards import HELD_OUT, make_shards
from train.data import Shards, VisitBatch, fixed_batch, make_loader, to_pixels, to_tensor

NUM_TRAIN = 8
PX = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> Shards:
    return Shards(folder, image_px=PX)


def steps(shards: Shards, num_steps: int, **settings) -> list[VisitBatch]:
    settings = {"num_sources": 3, "batch_size": 4, "seed": 11, **settings}
    return list(islice(make_loader(shards, **settings), num_steps))


def same(a: VisitBatch, b: VisitBatch) -> bool:
    names = ("rows", "sources", "source_rasters", "target", "target_raster")
    return a.keys == b.keys and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def joined(parts: list[VisitBatch]) -> VisitBatch:
    return VisitBatch(
        rows=torch.cat([p.rows for p in parts]),
        sources=torch.cat([p.sources for p in parts]),
        source_rasters=torch.cat([p.source_rasters for p in parts]),
        target=torch.cat([p.target for p in parts]),
        target_raster=torch.cat([p.target_raster for p in parts]),
        keys=tuple(key for p in parts for key in p.keys),
    )


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)[..., None].expand(-1, -1, -1, 3)
    x = to_tensor(pixels)
    assert x.shape == (2, 3, 4, 32)
    assert (x.min(), x.max()) == (-1, 1)
    assert (to_pixels(x) == pixels.numpy()).all()
    assert (to_pixels(torch.full((1, 3, 2, 5), 7.0)) == 255).all()


def test_every_training_video_comes_once_an_epoch(shards: Shards) -> None:
    epoch = steps(shards, 2)
    keys = [key for batch in epoch for key in batch.keys]
    assert sorted(keys) == [entry.key for entry in shards.train]
    assert not any(key.startswith(HELD_OUT) for key in keys)
    for batch in epoch:
        assert [shards.train[row].key for row in batch.rows.tolist()] == list(batch.keys)


def test_shapes_and_range_of_a_batch(shards: Shards) -> None:
    (batch,) = steps(shards, 1, num_sources=5)
    assert batch.sources.shape == batch.source_rasters.shape == (4, 5, 3, PX, PX)
    assert batch.target.shape == batch.target_raster.shape == (4, 3, PX, PX)
    assert batch.sources.min() >= -1
    assert batch.target.max() <= 1


@pytest.mark.parametrize("augment", [False, True])
def test_workers_do_not_change_the_order(shards: Shards, augment: bool) -> None:
    alone = steps(shards, 5, augment=augment)
    for num_workers in (1, 2):
        helped = steps(shards, 5, augment=augment, num_workers=num_workers)
        assert all(map(same, alone, helped))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_steps_of_one(shards: Shards, world_size: int) -> None:
    ranks = [
        steps(shards, 5, batch_size=8, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for whole, parts in zip(steps(shards, 5, batch_size=8), zip(*ranks, strict=True), strict=True):
        assert same(whole, joined(list(parts)))


def test_a_run_resumes_mid_epoch_on_another_number_of_ranks(shards: Shards) -> None:
    whole = steps(shards, 6)
    ranks = [
        steps(shards, 3, start_visit=12, rank=r, world_size=2, num_workers=r) for r in range(2)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert same(whole[3 + step], joined(list(parts)))


def test_frames_and_rasters_are_the_stored_ones(folder: Path, shards: Shards) -> None:
    entry = shards.train[3]
    stored = samples_in_span(read_span(str(folder), entry))
    for numbers in ([4, 2], [2, 11, 3]):  # a first visit, and one that goes by what it learned
        faces = shards.read(entry, numbers)
        for place, number in enumerate(numbers):
            sample = from_fields(f"{entry.key}/{number:03d}", stored[number])
            assert (faces.frames[place] == sample.frame).all()
            assert (faces.rasters[place] == sample.raster).all()
            assert (faces.landmarks[place] == sample.landmarks).all()


def test_a_smaller_model_sees_smaller_frames_with_rasters_of_its_own(folder: Path) -> None:
    whole, half = (Shards(folder, image_px=px) for px in (PX, PX // 2))
    entry = whole.train[0]
    large, small = whole.read(entry, [5]), half.read(entry, [5])
    mean = large.frames.reshape(1, PX // 2, 2, PX // 2, 2, 3).mean((2, 4))
    assert np.abs(small.frames - mean).max() <= 0.51
    assert (small.landmarks * 2 == large.landmarks).all()
    assert small.rasters.shape == (1, PX // 2, PX // 2, 3)
    assert set(np.unique(small.rasters)) <= {0, 255}


def test_a_larger_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"48 px, the model asks for 64 px.*--crop\.image-px 64"):
        Shards(folder, image_px=64)


def test_more_frames_than_a_video_has_are_refused(shards: Shards) -> None:
    steps(shards, 1, num_sources=15)
    with pytest.raises(ValueError, match=r"17 frames, but video .* offers 16"):
        steps(shards, 1, num_sources=16)


def test_augmentation_changes_a_visit_alike_and_depends_on_its_number(shards: Shards) -> None:
    plain, moved, again = (steps(shards, 2, augment=a)[1] for a in (False, True, True))
    assert same(moved, again)
    assert plain.keys == moved.keys
    assert (plain.target != moved.target).any()
    assert (plain.target_raster != moved.target_raster).any()


def test_the_panel_is_the_same_every_time_and_of_different_persons(shards: Shards) -> None:
    for split, num_visits, rows in (("train", 3, [0, 2, 4]), ("val", 2, [-1, -1])):
        one, two = (
            fixed_batch(shards, split, num_sources=4, num_visits=num_visits) for _ in range(2)
        )
        assert same(one, two)
        assert one.rows.tolist() == rows
        assert one.sources.shape == (num_visits, 4, 3, PX, PX)


def test_held_out_frames_come_from_disjoint_stretches(shards: Shards) -> None:
    for split in ("train", "val"):
        for clip in shards.held_out(split, num_sources=9, num_targets=32):
            assert max(clip.sources) < min(clip.targets)
            assert len(clip.sources) == min(9, clip.entry.num_frames // 2)
    assert {clip.entry.person for clip in shards.held_out("val", num_sources=2, num_targets=2)} == {
        HELD_OUT
    }


def test_with_two_persons_the_last_frames_of_each_video_are_val(tmp_path: Path) -> None:
    make_shards(tmp_path, persons=("ada", "bob"), held_out="")
    shards = Shards(tmp_path, image_px=PX)
    clips = shards.held_out("val", num_sources=5, num_targets=99)
    assert [clip.entry.key for clip in clips] == ["ada/v1", "ada/v2", "bob/v1", "bob/v2"]
    for clip, trained in zip(clips, shards.frames_for_training(3), strict=True):
        assert set(clip.sources) <= set(trained)
        assert set(trained).isdisjoint(clip.targets)
        assert {*trained, *clip.targets} == set(range(clip.entry.num_frames))
    with pytest.raises(ValueError, match="offers 12"):
        shards.frames_for_training(12)


def test_a_person_is_found_by_id(shards: Shards) -> None:
    assert [entry.key for entry in shards.person("cyd")] == ["cyd/v1", "cyd/v2"]
    assert shards.person("nobody") == ()


def cut_at_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6]
    path.write_bytes(path.read_bytes()[: third.offset])


def cut_inside_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        third = tar.getmembers()[6]
    path.write_bytes(path.read_bytes()[: third.offset_data + third.size // 2])


def break_header(path: Path) -> None:
    with tarfile.open(path) as tar:
        place = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[place : place + 100] = b"\xff" * 100
    path.write_bytes(data)


def flip_payload(path: Path) -> None:
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    data = bytearray(path.read_bytes())
    data[member.offset_data + member.size // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def put_another_in_its_place(path: Path) -> None:
    other = path.with_name("shard-0001.tar")
    path.write_bytes(other.read_bytes())


HARMS = [
    (cut_at_member, "shard-0000.tar is truncated"),
    (cut_inside_member, "shard-0000.tar is truncated"),
    (break_header, "shard-0000.tar was altered"),
    (flip_payload, "shard-0000.tar was altered"),
    (remove, "shard-0000.tar is missing"),
    (put_another_in_its_place, "shard-0000.tar (was altered|is truncated)"),
]


@pytest.mark.parametrize(("harm", "message"), HARMS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_harmed_shard_is_named_before_its_samples_are_used(
    tmp_path: Path, harm: Callable[[Path], None], message: str, num_workers: int
) -> None:
    index = make_shards(tmp_path)
    shards = Shards(tmp_path, image_px=PX)
    harm(tmp_path / "shard-0000.tar")
    harmed = index.videos[0]
    seen: list[str] = []
    with pytest.raises(ValueError, match=message):
        for batch in islice(
            make_loader(
                shards,
                num_sources=3,
                batch_size=1,
                seed=0,
                num_workers=num_workers,
            ),
            NUM_TRAIN,
        ):
            seen.extend(batch.keys)
    assert harmed.key not in seen


@pytest.mark.parametrize(("harm", "message"), HARMS)
def test_a_shard_that_is_harmed_between_two_visits_is_named(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    entry = make_shards(tmp_path).videos[0]
    shards = Shards(tmp_path, image_px=PX)
    shards.read(entry, range(4))
    harm(tmp_path / "shard-0000.tar")
    with pytest.raises(ValueError, match=message):
        shards.read(entry, range(4))


def test_a_changed_byte_never_reaches_a_sample(tmp_path: Path) -> None:
    """Neither on a first visit, for which all bytes must be right, nor later, when the frames'."""
    entry = make_shards(tmp_path).videos[0]
    reader = FrameReader(str(tmp_path))
    right = reader.read(entry, range(entry.num_frames))
    path = tmp_path / "shard-0000.tar"
    data = path.read_bytes()
    num_named = 0
    for place in range(entry.offset, entry.offset + entry.num_bytes, 211):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([data[place] ^ 4]))
        with pytest.raises(ValueError, match="was altered"):
            FrameReader(str(tmp_path)).read(entry, [0])
        named = [n for n in range(entry.num_frames) if not gives(reader, entry, n, right[n])]
        assert len(named) <= 1
        num_named += len(named)
        path.write_bytes(data)
    assert num_named > entry.num_frames


def gives(reader: FrameReader, entry: VideoEntry, number: int, right: dict[str, bytes]) -> bool:
    try:
        assert reader.read(entry, [number]) == [right]
    except ValueError as error:
        assert "shard-0000.tar was altered" in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("harm", "state"),
    [
        (cut_at_member, r"11264 bytes, not \d+"),
        (remove, "missing"),
        (put_another_in_its_place, r"\d+ bytes, not \d+"),
    ],
)
def test_a_shard_of_another_size_is_named_before_the_first_step(
    tmp_path: Path, harm: Callable[[Path], None], state: str
) -> None:
    make_shards(tmp_path)
    harm(tmp_path / "shard-0000.tar")
    with pytest.raises(ValueError, match=rf"shard-0000\.tar is {state}; 1 of 3 shards"):
        Shards(tmp_path, image_px=PX)


def test_an_index_that_promises_too_much_is_an_error(tmp_path: Path) -> None:
    make_shards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["videos"][0]["num_frames"] += 1
    (tmp_path / "index.json").write_text(json.dumps(index))
    shards = Shards(tmp_path, image_px=PX)
    with pytest.raises(ValueError, match=r"shard-0000: video ada/v1 has no frames \[17\]"):
        shards.read(shards.train[0], [3, 17])


def test_shards_without_an_index_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"build_shards\.py"):
        Shards(tmp_path, image_px=PX)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # leaves tars open
def test_webdataset_reads_the_shards(folder: Path, shards: Shards) -> None:
    webdataset = pytest.importorskip("webdataset")
    for entry in shards.index.shards:
        url = str(folder / f"{entry.name}.tar")
        samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
        assert len(samples) == num_frames(shards.index, entry.name)
        assert {"jpg", "png", "json"} <= samples[0].keys()
        assert samples[0]["jpg"].shape == (PX, PX, 3)
        assert len(samples[0]["json"]["landmarks"]) == 68


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_reads_the_shards(folder: Path, shards: Shards) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        names = [entry.name for entry in shards.index.shards]
        rows = ray.data.read_webdataset([str(folder / f"{n}.tar") for n in names]).take_all()
    finally:
        ray.shutdown()
    assert len(rows) == sum(num_frames(shards.index, name) for name in names)
    assert {"jpg", "png", "json"} <= rows[0].keys()
    assert rows[0]["jpg"].shape == (PX, PX, 3)


def test_a_worker_opens_object_stores_anew() -> None:
    """Connections to object stores refuse to work in a process that was forked off theirs."""
    _filesystem("http://127.0.0.1:1/shards")[0].loop  # noqa: B018 (starts its thread)
    child = multiprocessing.get_context("fork").Process(target=use_object_store)
    child.start()
    child.join()
    assert child.exitcode == 0


def use_object_store() -> None:
    assert _filesystem("http://127.0.0.1:1/shards")[0].loop


def test_tar_reads_the_shards(folder: Path, shards: Shards) -> None:
    for entry in shards.index.shards:
        with tarfile.open(folder / f"{entry.name}.tar") as tar:
            names = [member.name for member in tar]
        assert len(names) == len(set(names)) == 3 * num_frames(shards.index, entry.name)


def num_frames(index: Index, shard: str) -> int:
    return sum(video.num_frames for video in index.videos if video.shard == shard)
