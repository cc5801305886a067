"""A person from a video, a photo or the shards, by all three ways, with the flags people type."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from model.perceptual import Perceptual, make_perceptual
from tests.pipeline.videos import picture, write_video
from tests.train.bases import MODEL, face_spec, make_base
from tests.train.shards import make_samples, make_shards
from train.checkpoint import Base, load_base
from train.data import Faces, faces_of_samples
from train.finetune import FinetuneConfig, find_faces, load_perceptual, main
from train.person import load_generator, load_person
from train.personalise import Tuning, divide, embed, fine_tune

PX = MODEL.image_px
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("run"), face_spec())


@pytest.fixture(scope="module")
def base(run: Path) -> Base:
    return load_base(run)


@pytest.fixture(scope="module")
def faces() -> Faces:
    return faces_of_samples(make_samples("ada", "v1", "train", 9, 48), PX)


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return make_perceptual("lite")


def write_face(path: Path) -> Path:
    return write_video(path, [picture(number, 192, 128) for number in range(60)])


def make(run: Path, output: Path, person: Path | str, *flags: str):
    named = ["--person", str(person), "--base", str(run), "--output", str(output)]
    main([*named, "--tuning.steps", "4", "--tuning.check-every", "2", *flags])
    return load_person(output)


@pytest.mark.parametrize(("num_frames", "num_held"), [(1, 0), (3, 0), (4, 1), (8, 2), (33, 8)])
def test_a_quarter_of_four_or_more_frames_chooses_the_step(num_frames, num_held) -> None:
    trained, held = divide(num_frames)
    assert len(held) == num_held
    assert sorted(trained + held) == list(range(num_frames))


def test_the_start_is_the_feed_forward_person(base: Base, faces: Faces, perceptual) -> None:
    embedded = embed(base, faces, CPU)
    assert torch.allclose(embedded.generator.psi, base.generator.psi(embedded.e[None])[0])
    learned = fine_tune(embedded, base, faces, perceptual, Tuning(steps=1, lr_psi=0.0))
    assert torch.equal(learned.generator.psi, embedded.generator.psi)


def test_training_moves_everything_of_a_full_person(base: Base, faces: Faces, perceptual) -> None:
    embedded = embed(base, faces.take([0, 4, 8]), CPU)
    learned = fine_tune(embedded, base, faces.take([0, 4, 8]), perceptual, Tuning(steps=3))
    before = dict(embedded.generator.named_parameters())
    stuck = [n for n, p in learned.generator.named_parameters() if torch.equal(p, before[n])]
    # A softmax over places doesn't see what is added to every key.
    assert [name for name in stuck if not name.endswith("key.bias")] == []
    assert learned.step == 3


def test_training_moves_psi_alone_of_a_light_person(base: Base, faces: Faces, perceptual) -> None:
    embedded = embed(base, faces.take([0, 4, 8]), CPU)
    learned = fine_tune(
        embedded, base, faces.take([0, 4, 8]), perceptual, Tuning(steps=3), light=True
    )
    before = embedded.generator.state_dict()
    moved = {n for n, p in learned.generator.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {"psi"}


@pytest.mark.parametrize("light", [False, True])
def test_a_person_grows_more_like_itself(base, faces, perceptual, light) -> None:
    tuning = Tuning(steps=60)
    learned = fine_tune(embed(base, faces, CPU), base, faces, perceptual, tuning, light=light)
    assert learned.metrics["held_out/after"] < 0.9 * learned.metrics["held_out/before"]
    assert learned.step % tuning.check_every == 0


def test_a_seed_gives_the_same_person_again(base: Base, faces: Faces, perceptual) -> None:
    one, two = (
        fine_tune(embed(base, faces, CPU), base, faces, perceptual, Tuning(steps=3))
        for _ in range(2)
    )
    assert torch.equal(one.generator.psi, two.generator.psi)


def test_a_full_person_from_a_video(run: Path, tmp_path: Path, capsys) -> None:
    video = write_face(tmp_path / "grace-h.mp4")
    person = make(run, tmp_path / "grace.pt", video, "--shots", "5")
    assert (person.name, person.kind, len(person.landmarks)) == ("grace-h", "full", 5)
    picture = cv2.imread(str(tmp_path / "grace-panel.png"))
    assert picture.shape == (PX, 7 * PX, 3)
    said = capsys.readouterr().out
    assert str(tmp_path / "grace.pt") in said
    assert "grace-h: full, 5 frames, step" in said
    load_generator(person)(torch.zeros(2, 3, PX, PX))


def test_a_light_person_from_the_shards_is_a_small_file(run: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    output = tmp_path / "cyd.pt"
    person = make(run, output, "cyd", "--shards", str(tmp_path / "shards"), "--light")
    assert (person.name, person.kind, len(person.landmarks)) == ("cyd", "light", 8)
    assert output.stat().st_size < 200_000
    load_generator(person)


def test_a_feed_forward_person_from_a_photo(run: Path, tmp_path: Path) -> None:
    photo = np.random.default_rng(1).integers(0, 255, (90, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "alan.png"), photo)
    person = make(run, tmp_path / "out.pt", tmp_path / "alan.png", "--feed-forward")
    assert (person.name, person.kind, person.step) == ("alan", "feed-forward", 0)
    assert (tmp_path / "out.pt").stat().st_size < 200_000


def test_a_person_that_is_not_there_is_an_error(run: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    for shards, words in ((tmp_path, r"build_shards\.py"), (tmp_path / "shards", "ada, bob, cyd")):
        with pytest.raises(SystemExit, match=f"finetune: --person zoe is no file.*{words}"):
            make(run, tmp_path / "zoe.pt", "zoe", "--shards", str(shards))
    assert not (tmp_path / "zoe.pt").exists()


def test_shards_made_in_another_way_are_refused(run: Path, tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", face=face_spec(backend="dlib"))
    with pytest.raises(SystemExit, match="backend is 'dlib', not 'null'"):
        make(run, tmp_path / "ada.pt", "ada", "--shards", str(tmp_path / "shards"))


def test_the_best_step_is_kept_not_the_last(base: Base, faces: Faces, perceptual) -> None:
    """With far too large a rate every step is worse than the start."""
    trained, _ = divide(len(faces))
    embedded = embed(base, faces.take(trained), CPU)
    tuning = Tuning(steps=4, check_every=1, lr_psi=0.0, lr_generator=0.3, ema=0.0)
    learned = fine_tune(embedded, base, faces, perceptual, tuning)
    assert learned.step == 0
    assert learned.metrics["held_out/after"] == learned.metrics["held_out/before"]
    before = embedded.generator.state_dict()
    assert all(torch.equal(v, before[n]) for n, v in learned.generator.state_dict().items())


@pytest.mark.parametrize(("flags", "held_out"), [(["--feed-forward"], 0), (["--light"], 2)])
def test_frames_that_choose_the_step_are_not_embedded(run, base, tmp_path, flags, held_out) -> None:
    """A person that isn't trained is embedded by all of its frames."""
    video = write_face(tmp_path / "ada.mp4")
    person = make(run, tmp_path / "ada.pt", video, *flags)
    _, faces = find_faces(FinetuneConfig(person=str(video)), base)
    used = divide(len(faces))[0] if held_out else range(len(faces))
    assert len(faces) - len(used) == held_out
    assert torch.allclose(person.e, embed(base, faces.take(list(used)), CPU).e, atol=1e-5)


def test_the_persons_own_files_are_not_overwritten(run: Path, tmp_path: Path) -> None:
    photo = tmp_path / "ph" / "ada.png"
    photo.parent.mkdir()
    cv2.imwrite(str(photo), np.random.default_rng(1).integers(0, 255, (90, 120, 3), np.uint8))
    bytes_before = photo.read_bytes()
    make(run, tmp_path / "ph" / "ada.pt", photo, "--feed-forward")
    assert photo.read_bytes() == bytes_before
    with pytest.raises(SystemExit, match=r"ada\.png would replace an input"):
        make(run, photo, photo, "--feed-forward")
    with pytest.raises(SystemExit, match=r"lies in the folder .*ph, all of which is read"):
        make(run, tmp_path / "ph" / "new.pt", tmp_path / "ph", "--feed-forward")
    model = load_base(run).path
    with pytest.raises(SystemExit, match=r"model\.pt would replace an input"):
        make(run, model, photo, "--feed-forward")


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    make_shards(tmp_path / "shards")
    monkeypatch.setattr("train.finetune.fine_tune", interrupted)
    with pytest.raises(SystemExit) as end:
        make(run, tmp_path / "people" / "ada.pt", "ada", "--shards", str(tmp_path / "shards"))
    assert end.value.code == 130
    assert capsys.readouterr().err == "finetune: stopped\n"
    assert not list((tmp_path / "people").iterdir())


def test_what_cannot_be_used_is_named(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "ada.jpg"
    text.write_text("not a photo")
    with pytest.raises(SystemExit, match=r"finetune: .*ada\.jpg"):
        make(run, tmp_path / "ada.pt", text, "--feed-forward")
    made = tmp_path / "bob.pt"
    make(run, made, write_face(tmp_path / "bob.mp4"), "--feed-forward")
    with pytest.raises(
        SystemExit, match=r"finetune: .*bob\.pt is a person's file: expected a meta"
    ):
        make(made, tmp_path / "cyd.pt", tmp_path / "bob.mp4", "--feed-forward")
    with pytest.raises(SystemExit, match=r"finetune: the output .* is a folder"):
        make(run, tmp_path, tmp_path / "bob.mp4", "--feed-forward")
    with pytest.raises(SystemExit, match=r"finetune: .*ada\.jpg"):
        make(run, text / "people" / "ada.pt", tmp_path / "bob.mp4", "--feed-forward")


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr_psi", -1.0), ("lr_generator", float("nan")), ("ema", 1.0), ("seed", -1), ("steps", 0)],
)
def test_tuning_that_makes_no_sense_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"tuning\.{name} is {value}: give"):
        Tuning(**{name: value})


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward and light"):
        FinetuneConfig(person="ada", feed_forward=True, light=True)
    with pytest.raises(ValueError, match="shots is 0"):
        FinetuneConfig(person="ada", shots=0)


def test_the_command_runs_as_typed(run: Path, tmp_path: Path) -> None:
    video = write_face(tmp_path / "ada.mp4")
    command = [sys.executable, "-m", "torch.distributed.run", "train/finetune.py"]
    flags = ["--person", str(video), "--base", str(run), "--feed-forward"]
    root = Path(__file__).parents[2]
    subprocess.run(
        [*command, *flags, "--output", str(tmp_path / "ada.pt")], cwd=root, check=True, timeout=100
    )
    assert load_person(tmp_path / "ada.pt").kind == "feed-forward"


def test_weights_other_than_those_of_meta_training_are_refused(base: Base) -> None:
    other = {"name": "lite", "weights_sha256": {"lite.pth": "0" * 64}}
    with pytest.raises(ValueError, match="trained with other weights of lite"):
        load_perceptual(FinetuneConfig(person="ada"), replace(base, perceptual=other))
    assert load_perceptual(FinetuneConfig(person="ada"), base).name == "lite"
