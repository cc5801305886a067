"""Whatever decides the bytes of shards is bound to them: each setting, and each constant."""

from dataclasses import asdict

import pytest
from av.video.reformatter import Interpolation

from pipeline import decode, ledger
from pipeline.config import BuildConfig
from pipeline.plan import Plan
from tests.pipeline.samples import SPEC

IN_FACE_SPEC = {"align.backend", "align.detector", "crop.image_px", "crop.margin"}
"""Bound to the shards by their FaceSpec."""

EXEMPT = {
    "input": "the plan's hash holds the names of the files",
    "output": "where the record itself is",
    "max_reject_rate": "fails a job whose shards are finished",
    "align.weights_dir": "the FaceSpec holds the sha256 of the weights",
    "align.device": "the record holds the device that was found",
    "align.batch_frames": "how many faces wait for each other",
    "decode.cpu_deadline_s": "what hangs is a reject, with the reason",
    "decode.wall_deadline_s": "what hangs is a reject, with the reason",
    "dry_run": "another job",
    "verify": "another job",
    "retry_rejects": "which shards are built, not how",
    "ray_address": "where it runs",
    "num_cpus": "where it runs",
}
"""Settings that decide nothing, or are bound in another way: why."""


def settings() -> set[str]:
    names = set()
    for name, value in asdict(BuildConfig()).items():
        names |= {f"{name}.{part}" for part in value} if isinstance(value, dict) else {name}
    return names


def test_every_setting_is_bound_or_exempt_for_a_reason():
    deciding = ledger.deciding(BuildConfig()).keys()
    bound = {name for name in settings() if name.rsplit(".", 1)[-1] in deciding}
    assert len(bound) == len(deciding)
    assert settings() == bound | IN_FACE_SPEC | EXEMPT.keys()
    assert not bound & EXEMPT.keys()


@pytest.mark.parametrize(
    "constant",
    [
        *(f"judge.{name}" for name in (
            "MIN_FACE_PX", "THUMB_PX", "FROZEN_LEVELS", "SAME_FACE_IOU", "CUT_COLOURS",
            "DOUBTFUL_COLOURS", "DOUBTFUL_FACE_COLOURS", "CUT_FACES", "FACE_MARGIN",
        )),
        *(f"decode.{name}" for name in (
            "SEEK_GAP_S", "SEEK_STEPS_S", "UNINDEXED", "MIN_LENGTH_S", "MIN_READABLE",
        )),
    ],
)  # fmt: skip
def test_a_build_by_other_rules_is_not_gone_on_with(tmp_path, monkeypatch, constant):
    def record() -> ledger.Record:
        return ledger.record_of(Plan(shards=()), BuildConfig(), SPEC, "cpu")

    ledger.claim(str(tmp_path), record())
    ledger.claim(str(tmp_path), record())
    other = ("0.25",) if constant.split(".")[1] in ("SEEK_STEPS_S", "UNINDEXED") else 0.25
    monkeypatch.setattr(f"pipeline.{constant}", other)
    with pytest.raises(ValueError, match=rf"rules\.{constant.split('.')[0]} was \w+, is \w+"):
        ledger.claim(str(tmp_path), record())


def test_a_build_with_another_scaler_is_not_gone_on_with(monkeypatch):
    before = decode.decode_id()
    monkeypatch.setattr(decode, "SCALING", Interpolation.BILINEAR)
    assert decode.decode_id() != before
