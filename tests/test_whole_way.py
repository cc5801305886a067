"""The commands as a person types them, on the demo's footage: raw video to a film."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import cv2
import pytest
import torch

ROOT = Path(__file__).parents[1]
VIDEOS = ROOT / "data/demo/videos"
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> str:
    """Run a command from the project's root and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("way")


@pytest.fixture(scope="module")
def shards(folder) -> Path:
    run(
        BIN / "python", "pipeline/build_shards.py", "--input", VIDEOS,
        "--output", folder / "shards", "--align.backend", "dlib", "--max-reject-rate", "0.6",
    )  # fmt: skip
    return folder / "shards"


@pytest.fixture(scope="module")
def base(folder, shards) -> Path:
    run(
        BIN / "torchrun", "train/meta_train.py", "--preset", "tiny", "--shards", shards,
        "--run-dir", folder / "run", "--max-steps", "3",
    )  # fmt: skip
    return folder / "run"


def film_facts(path: Path) -> tuple[int, float, bool, dict[str, str]]:
    """Return frames, frames a second, whether there is sound, and the tags of a film."""
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        frames = sum(1 for _ in film.decode(stream))
        assert stream.average_rate is not None
        return frames, float(stream.average_rate), bool(film.streams.audio), film.metadata


def test_shards_tell_the_faces_from_the_rest(shards):
    index = json.loads((shards / "index.json").read_text())
    assert {video["person"] for video in index["videos"]} == {
        "carphone",
        "single_face",
        "wolfgang_langer",
    }
    assert {reject["id"].split("/")[0] for reject in index["rejects"]} == {
        "bigbuckbunny",
        "bikes",
        "no_face",
    }
    assert (shards / "report.html").stat().st_size > 10_000


def test_meta_training_leaves_a_model_and_its_panels(base):
    assert (base / "checkpoints/step-000000003/model.pt").is_file()
    panel = cv2.imread(str(base / "panel-train.png"))
    assert panel is not None
    assert panel.shape == (2 * 64, 6 * 64, 3)


def test_a_full_person_drives_a_film_with_the_drivers_rate_and_sound(folder, base):
    person, film = folder / "wolfgang.pt", folder / "film.mp4"
    run(
        BIN / "torchrun", "train/finetune.py", "--person", VIDEOS / "wolfgang_langer",
        "--base", base, "--output", person, "--tuning.steps", "3",
    )  # fmt: skip
    driver = VIDEOS / "single_face/single_face.mp4"
    printed = run(
        BIN / "python", "train/drive.py", "--person", person, "--driver", driver, "--output", film
    )
    assert str(film) in printed
    frames, rate, sound, tags = film_facts(film)
    assert (frames, rate, sound) == film_facts(driver)[:3]
    assert "synthetic" in " ".join(tags.values()).lower()


def test_a_feed_forward_person_is_a_small_file_that_needs_its_base(folder, base, shards):
    person, film = folder / "carphone.pt", folder / "still.mp4"
    run(
        BIN / "torchrun", "train/finetune.py", "--person", "carphone", "--shards", shards,
        "--base", base, "--output", person, "--feed-forward",
    )  # fmt: skip
    assert person.stat().st_size < 200_000
    assert "generator" not in torch.load(person, weights_only=True) or (
        torch.load(person, weights_only=True)["generator"] is None
    )
    driver = VIDEOS / "carphone/carphone_pristine.mp4"
    run(
        BIN / "python", "train/drive.py", "--person", person, "--driver", driver,
        "--output", film, "--base", base, "--side-by-side",
    )  # fmt: skip
    assert film_facts(film)[0] == film_facts(driver)[0]
