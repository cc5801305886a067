"""The record of an output folder: what is done, and whether the index tells the truth."""

import dataclasses
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline import ledger
from pipeline.config import AlignConfig, BuildConfig
from pipeline.ledger import Record
from pipeline.plan import Plan, Segment, Shard, Video
from pipeline.sample import Reject, thumbnail_of
from pipeline.shard import Index
from tests.pipeline.samples import SPEC, make_video, write_shard

TALK, NEWS, SEA = (
    make_video("ann", "talk", 5),
    make_video("bob", "news", 3),
    make_video("bob", "sea", 4),
)
REJECT = Reject(
    id="cat/nap",
    stage="faces",
    reason="no face",
    thumbnail=thumbnail_of(np.zeros((300, 200, 3), np.uint8)),
)
RECORD = Record(
    plan={"sha256": "abc", "videos": 4, "shards": 3},
    config={"seed": 3},
    face=SPEC,
    rules={"faces": "0f1e"},
    libraries={"av": "18"},
)


@pytest.fixture
def folder(tmp_path) -> str:
    """Give a finished build of three shards, one of them of rejects alone."""
    folder = str(tmp_path)
    manifests = [
        write_shard(folder, "train-000000", [TALK, SEA], 95),
        write_shard(folder, "train-000001", [NEWS], 95),
        write_shard(folder, "val-000000", [REJECT], 95),
    ]
    Index.of(manifests, SPEC, RECORD.config, RECORD.provenance).save(folder)
    (tmp_path / "build.json").write_bytes(RECORD.to_json())
    return folder


def edit(folder: str, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    path = Path(folder, name)
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_a_sound_build_is_verified(folder):
    assert ledger.verify(folder) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i["videos"].pop(0), "videos.ann/talk is nothing, by the manifests it is {"),
        (lambda i: i["videos"].append(i["videos"][1]), "videos.bob/news (again) is {"),
        (
            lambda i: i["videos"][0].update(shard="train-000077"),
            "videos.ann/talk.shard is train-000077, by the manifests it is train-000000",
        ),
        (
            lambda i: i["videos"][2].update(split="val"),
            "videos.bob/sea.split is val, by the manifests it is train",
        ),
        (
            lambda i: i["videos"][0].update(person="eve"),
            "videos.ann/talk.person is eve, by the manifests it is ann",
        ),
        (lambda i: i["videos"][0].update(key="eve/talk"), "videos.eve/talk is {"),
        (
            lambda i: i["face"].update(crop_margin=0.9),
            "face.crop_margin is 0.9, by the build.json it is 0.4",
        ),
        (lambda i: i["config"].update(seed=4), "config.seed is 4, by the build.json it is 3"),
        (lambda i: i["provenance"].update(plan_sha256="x"), "provenance.plan_sha256 is x"),
        (lambda i: i["totals"].update(frames=11), "totals.frames is 11, by the manifests it is 12"),
        (lambda i: i["shards"].pop(), "shards.train-000001 is nothing, by the manifests it is {"),
        (lambda i: i["rejects"].pop(), "rejects.cat/nap is nothing, by the manifests it is {"),
    ],
)
def test_a_false_index_is_found_out(folder, change, said):
    edit(folder, "index.json", change)
    assert any(p.startswith(f"index.json: {said}") for p in ledger.verify(folder)), ledger.verify(
        folder
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train-000001.json", "train-000001.json is missing"),
        ("val-000000.json", "2 manifests are there, build.json says 3 shards"),
        ("build.json", "build.json is missing: nothing says how the shards were made"),
        ("rejects.jsonl", "rejects.jsonl is missing"),
    ],
)
def test_a_missing_file_is_named(folder, name, said):
    Path(folder, name).unlink()
    problems = ledger.verify(folder)
    assert any(p.startswith(said) for p in problems), problems


@pytest.mark.parametrize("name", ["train-000001.json", "val-000000.json", "build.json"])
def test_a_damaged_file_is_named(folder, name):
    path = Path(folder, name)
    path.write_bytes(path.read_bytes()[:40])
    (problem,) = ledger.verify(folder)
    assert name in problem


def test_a_manifest_of_another_shard_is_named(folder):
    edit(folder, "train-000001.json", lambda m: m.update(name="train-000005"))
    assert ledger.verify(folder) == [
        "train-000001.json is the manifest of another shard, train-000005"
    ]


def test_a_plan_of_more_videos_is_found_out(folder):
    edit(folder, "build.json", lambda record: record["plan"].update(videos=5))
    assert ledger.verify(folder) == ["the manifests have 4 videos, build.json says 5"]


def test_rejects_that_are_wrong_are_named(folder):
    index = Index.load(folder)
    hurt = dataclasses.replace(REJECT, thumbnail=REJECT.thumbnail[:40])
    dataclasses.replace(index, rejects=(hurt,)).save(folder)
    Path(folder, "rejects.jsonl").write_text("")
    problems = ledger.verify(folder)
    assert problems[0].startswith("index.json: rejects.cat/nap.thumbnail is /9j/4")
    assert problems[1:] == [
        "rejects.jsonl isn't what the index says",
        "index.json: the thumbnail of cat/nap is not a picture",
    ]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"plan": '])
def test_a_damaged_record_is_named_before_a_build_goes_on(folder, data):
    Path(folder, "build.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"build\.json is not the record of a build"):
        ledger.claim(folder, RECORD)


@pytest.mark.parametrize("backend", ["dlib", "null"])
def test_versions_are_those_of_the_modules(monkeypatch, backend):
    """Whatever the distribution is called that they came in."""
    if backend == "dlib":
        pytest.importorskip("dlib")

    def version(name: str) -> str:
        if name.startswith(("opencv", "dlib")):
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(metadata, "version", version)
    config = BuildConfig(align=AlignConfig(backend=backend))
    libraries = ledger.record_of(Plan(shards=()), config, SPEC, "cpu").libraries
    assert libraries["cv2"] == cv2.__version__
    assert ("dlib" in libraries) == (backend == "dlib")


def test_a_shard_whose_videos_have_all_come_to_be_rejected_is_done(folder):
    segments = (Segment(path="bob/news.mp4", name="news"),)
    video = Video(person="bob", video="news", split="train", segments=segments)
    plan = Plan(shards=(Shard(name="train-000001", videos=(video,)),))
    assert ledger.read_done(folder, plan).keys() == {"train-000001"}
    ledger.reopen(folder, plan.shards)
    assert not ledger.read_done(folder, plan)
    reject = Reject(id="bob/news", stage="decode", reason="the file is empty")
    write_shard(folder, "train-000001", [reject], 95)
    assert ledger.read_done(folder, plan).keys() == {"train-000001"}
