"""What is said at the end of a build."""

import dataclasses

import pytest
from rich.console import Console

from pipeline.progress import summary
from pipeline.sample import Reject
from pipeline.shard import Index
from tests.pipeline.samples import SPEC, make_video, write_shard


@pytest.mark.parametrize(
    ("split", "num_held_out", "warns"), [("train", 1, True), ("train", 0, False), ("val", 1, False)]
)
def test_an_empty_val_split_is_warned_of(tmp_path, split, num_held_out, warns):
    samples = [dataclasses.replace(s, split=split) for s in make_video("ann", "talk", 5)]
    reject = Reject(id="bob/news", stage="decode", reason="the file is empty")
    manifest = write_shard(str(tmp_path), f"{split}-000000", [samples, reject], 90)
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as captured:
        console.print(summary(Index.of([manifest], SPEC, {}, {}), num_held_out, {}, 0, 1.0, 2))
    assert ("all 1 videos of the val split were rejected" in captured.get()) == warns
