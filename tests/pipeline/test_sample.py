"""The contract of a stored frame: what is encoded comes back."""

import base64
import json

import numpy as np
import pytest

from pipeline.sample import decode_picture, from_fields, read_landmarks, thumbnail_of, to_fields
from tests.pipeline.samples import make_sample


def test_fields_hold_the_sample():
    sample = make_sample(number=7)
    again = from_fields(sample.key, to_fields(sample, 95))
    for name in ("person", "video", "number", "segment", "split", "original", "score", "box"):
        assert getattr(again, name) == getattr(sample, name), name
    assert again.pts_s == pytest.approx(sample.pts_s)
    assert np.array_equal(again.landmarks, sample.landmarks)
    assert np.array_equal(again.raster, sample.raster)
    assert np.abs(again.frame.astype(int) - sample.frame).max() <= 3


def test_colours_keep_their_order():
    sample = make_sample()
    sample.frame[:] = (200, 100, 30)
    pixel = from_fields(sample.key, to_fields(sample, 95)).frame[5, 9]
    assert np.abs(pixel.astype(int) - (200, 100, 30)).max() <= 3


def test_same_sample_same_bytes():
    assert to_fields(make_sample(), 90) == to_fields(make_sample(), 90)


def test_keys_sort_by_number():
    keys = [make_sample(number=n).key for n in (0, 9, 10, 99)]
    assert keys == sorted(keys)
    assert keys[0] == "ann/talk/000"


def test_missing_field_is_named():
    fields = to_fields(make_sample(), 95)
    del fields["png"]
    with pytest.raises(ValueError, match=r"ann/talk/000 has the fields \['jpg', 'json'\]"):
        from_fields("ann/talk/000", fields)


def test_other_schema_is_refused():
    fields = to_fields(make_sample(), 95)
    fields["json"] = json.dumps({**json.loads(fields["json"]), "schema": 99}).encode()
    with pytest.raises(ValueError, match="schema 99"):
        from_fields("ann/talk/000", fields)
    with pytest.raises(ValueError, match="ann/talk/000 has schema 99"):
        read_landmarks("ann/talk/000", fields["json"])


def test_landmarks_alone_are_those_of_the_sample():
    sample = make_sample()
    sample.landmarks[:4] = [[-3.125, 0], [4096, 1e-3], [-0.0, 1e6], [31.875, -4000.5]]
    fields = to_fields(sample, 95)
    facts = json.loads(fields["json"])
    otherwise = [
        json.dumps(facts, indent=1).encode(),
        json.dumps(facts, separators=(",", ":"), sort_keys=True).encode(),
        json.dumps({**facts, "more": [[1, 2]]}, separators=(",", ":")).encode(),
    ]
    for data in (fields["json"], *otherwise):
        assert np.array_equal(read_landmarks(sample.key, data), sample.landmarks)


def test_broken_picture_is_named():
    fields = {**to_fields(make_sample(), 95), "jpg": b"not a picture"}
    with pytest.raises(ValueError, match=r"ann/talk/000\.jpg holds 13 bytes"):
        from_fields("ann/talk/000", fields)


@pytest.mark.parametrize(("shape", "size"), [((300, 150), (96, 48)), ((20, 31), (20, 31))])
def test_a_thumbnail_is_a_small_picture(shape, size):
    text = thumbnail_of(np.full((*shape, 3), (200, 90, 40), np.uint8))
    picture = decode_picture(base64.b64decode(text, validate=True), "thumbnail")
    assert picture.shape == (*size, 3)
    assert np.abs(picture.astype(int) - (200, 90, 40)).max() <= 3


def test_odd_names_survive_json():
    """File names on Linux are bytes; those that are no text reach the json as surrogates."""
    sample = make_sample()
    object.__setattr__(sample, "original", "caf\udce9/ü.mp4")
    assert from_fields(sample.key, to_fields(sample, 95)).original == "caf\udce9/ü.mp4"
