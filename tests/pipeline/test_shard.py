"""Shards: plain tars that every tool reads, an index, and spans that are checked."""

import dataclasses
import importlib
import io
import json
import tarfile
import warnings
from pathlib import Path

import pytest
import webdataset as wds

from pipeline.sample import FIELDS, Reject, from_fields, to_fields
from pipeline.shard import Index, Manifest, read_span, samples_in_span
from tests.pipeline.samples import SPEC, make_video, write_shard

VIDEOS = (make_video("ann", "talk", 5), make_video("bob", "news", 3), make_video("bob", "sea", 4))
REJECT = Reject(id="cat/nap", stage="faces", reason="no face: 0 good frames")


def build(folder: Path) -> Index:
    manifests = [
        write_shard(str(folder), "train-000000", [VIDEOS[2], REJECT, VIDEOS[0]], 95),
        write_shard(str(folder), "train-000001", [VIDEOS[1]], 95),
    ]
    index = Index.of(manifests, SPEC, {"seed": 3}, {"plan_sha256": "abc"})
    index.save(str(folder))
    return index


def test_spans_hold_exactly_their_video(tmp_path):
    index = build(tmp_path)
    assert [v.key for v in index.videos] == ["ann/talk", "bob/news", "bob/sea"]
    for entry, samples in zip(index.videos, VIDEOS, strict=True):
        found = samples_in_span(read_span(str(tmp_path), entry))
        assert list(found) == list(range(entry.num_frames))
        assert [found[s.number] for s in samples] == [to_fields(s, 95) for s in samples]


def test_index_comes_back(tmp_path):
    index = build(tmp_path)
    assert Index.load(str(tmp_path)) == index
    assert index.totals["planned"] == index.totals["accepted"] + index.totals["rejected"] == 4
    assert index.rejects == (REJECT,)
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["cat/nap"]


def test_reasons_are_counted_the_most_frequent_first(tmp_path):
    found = [("faces", "no face: 0"), ("faces", "no face: 3"), ("decode", "cut"), ("faces", "cut")]
    rejects = tuple(Reject(id=f"cat/{n}", stage=s, reason=r) for n, (s, r) in enumerate(found))
    index = dataclasses.replace(build(tmp_path), rejects=rejects)
    assert index.reasons() == [("faces", "no face", 2), ("decode", "cut", 1), ("faces", "cut", 1)]


def test_bytes_follow_from_samples(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_shard_of_rejects_has_a_manifest_and_no_tar(tmp_path):
    manifest = write_shard(str(tmp_path), "train-000000", [REJECT], 95)
    assert [p.name for p in tmp_path.iterdir()] == ["train-000000.json"]
    assert Manifest.from_json((tmp_path / "train-000000.json").read_bytes()) == manifest


def test_a_tar_goes_when_its_shard_comes_to_hold_rejects_alone(tmp_path):
    write_shard(str(tmp_path), "train-000000", [VIDEOS[0]], 95)
    assert (tmp_path / "train-000000.tar").exists()
    assert write_shard(str(tmp_path), "train-000000", [REJECT], 95).num_bytes == 0
    assert [p.name for p in tmp_path.iterdir()] == ["train-000000.json"]


def test_plain_tar_reads_it(tmp_path):
    build(tmp_path)
    with tarfile.open(tmp_path / "train-000001.tar") as tar:
        names = tar.getnames()
    assert names == [f"bob/news/{n:03}.{field}" for n in range(3) for field in FIELDS]


def test_webdataset_reads_it(tmp_path):
    build(tmp_path)
    urls = sorted(str(p) for p in tmp_path.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset warns of its own defaults
        samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 12
    for sample in samples:
        fields = {name: sample[name] for name in FIELDS}
        assert from_fields(sample["__key__"], fields).key == sample["__key__"]


def test_hugging_face_reads_it(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # both are read at the import
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = importlib.import_module("datasets")
    urls = sorted(str(p) for p in tmp_path.glob("*.tar"))
    found = datasets.load_dataset("webdataset", data_files=urls, split="train", streaming=True)
    samples = {sample["__key__"]: sample for sample in found.decode(False)}
    assert samples.keys() == {s.key for video in VIDEOS for s in video}
    for expected in (s for video in VIDEOS for s in video):
        fields, sample = to_fields(expected, 95), samples[expected.key]
        assert sample.keys() == {*FIELDS, "__key__", "__url__"}
        assert sample["json"] == json.loads(fields["json"])
        assert [sample[n]["bytes"] for n in ("jpg", "png")] == [fields["jpg"], fields["png"]]


def entry_of(folder: Path, key: str = "bob/sea"):
    return next(v for v in build(folder).videos if v.key == key)


def test_missing_shard_is_named(tmp_path):
    entry = entry_of(tmp_path)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000000\.tar is missing"):
        read_span(str(tmp_path), entry)


def test_truncated_shard_is_named(tmp_path):
    entry = entry_of(tmp_path)
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[: entry.offset + entry.num_bytes - 1])
    with pytest.raises(ValueError, match=r"train-000000\.tar is truncated: video bob/sea"):
        read_span(str(tmp_path), entry)


@pytest.mark.parametrize("place", [3, 700, -5])
def test_altered_shard_is_named(tmp_path, place):
    entry = entry_of(tmp_path)
    tar = tmp_path / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[entry.offset + place % entry.num_bytes] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"altered: the bytes of video bob/sea"):
        read_span(str(tmp_path), entry)


def test_folder_without_index_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"holds no shards. Run `python pipeline/build_shards.py"):
        Index.load(str(tmp_path))
    write_shard(str(tmp_path), "train-000000", [VIDEOS[0]], 95)
    with pytest.raises(ValueError, match="shards of an unfinished build"):
        Index.load(str(tmp_path))


def test_other_schema_is_refused(tmp_path):
    build(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(ValueError, match="schema 99, and this program reads 1"):
        Index.load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts.pop("videos"), "KeyError('videos')"),
        (lambda facts: facts.update(videos=None), "NoneType"),
        (lambda facts: facts.update(shards=["train-000000"]), ""),
        (lambda facts: facts["videos"][0].pop("sha256"), "sha256"),
        (lambda facts: facts["videos"][0].update(colour=3), "colour"),
        (lambda facts: facts["videos"][0].update(offset="0"), "offset is '0', expected int"),
        (lambda facts: facts["face"].pop("palette"), "palette"),
        (lambda facts: facts.update(face=5), ""),
    ],
)
def test_a_malformed_index_is_named(tmp_path, change, said):
    build(tmp_path)
    path = tmp_path / "index.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"index\.json is not the index of shards: ") as caught:
        Index.load(str(tmp_path))
    assert said in str(caught.value)


@pytest.mark.parametrize("data", ["[]", "3", "null"])
def test_json_that_is_no_index_is_named(tmp_path, data):
    (tmp_path / "index.json").write_text(data)
    with pytest.raises(ValueError, match=r"index\.json has schema None"):
        Index.load(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b'{"schema": 99}'])
def test_half_a_manifest_is_refused(data):
    with pytest.raises(ValueError, match="Not the manifest of a shard"):
        Manifest.from_json(data)


def test_foreign_member_is_refused():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("ann/talk/000.pkl")
        tar.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match=r"not 'ann/talk/000\.pkl'"):
        samples_in_span(buffer.getvalue())


def test_specs_that_differ_are_refused_by_name():
    other = dataclasses.replace(SPEC, backend="fan", image_px=64)
    with pytest.raises(ValueError, match=r"image_px is 64, not 48; backend is 'fan', not 'null'"):
        SPEC.require_same(other, "the checkpoint")
    SPEC.require_same(dataclasses.replace(SPEC), "itself")
