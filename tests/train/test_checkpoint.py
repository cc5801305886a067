"""Checkpoints: whole or not at all, primitives and tensors only, and errors that help."""

import re
import resource
import signal
from pathlib import Path

import pytest
import torch

from train import checkpoint


def save(run: Path, step: int) -> Path:
    return checkpoint.save_step(
        run,
        step,
        model={"weights": torch.arange(3)},
        resume={"step": step},
        rows={"values": torch.ones(2, 5)},
        keys=["ada/v1", "bob/v1"],
    )


def test_a_step_is_a_folder_that_appears_at_once(tmp_path):
    folder = save(tmp_path, 12)
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "model.pt",
        "resume.pt",
        "rows.pt",
    ]
    assert list(folder.parent.iterdir()) == [folder]
    assert checkpoint.load(folder / "resume.pt") == {"step": 12}


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path):
    first = save(tmp_path, 1)
    half = first.with_name(".tmp-step-000000002")
    half.mkdir()
    (half / "model.pt").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == [first]
    assert checkpoint.steps(tmp_path)[-1:] == [first]
    assert save(tmp_path, 2).name == "step-000000002"
    assert not list(first.parent.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["model.pt", "resume.pt", "rows.pt", "index.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_a_step_that_is_not_whole_is_refused_by_file_and_with_a_way_out(tmp_path, name, harm):
    file = save(tmp_path, 1) / name
    whole = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(whole[: len(whole) // 2 if harm == "cut" else 0])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(file))} .*Remove {file.parent} to go on"
    ):
        checkpoint.load_step(file.parent)


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path):
    first = save(tmp_path, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*model\.pt, with \d+ MB free there"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(first.parent.iterdir()) == [first]


def test_the_newest_checkpoints_stay(tmp_path):
    folders = [save(tmp_path, step) for step in (1, 5, 30)]
    checkpoint.drop_old(tmp_path, keep=2)
    assert checkpoint.steps(tmp_path) == folders[1:]


@pytest.mark.parametrize(
    "where", [".", "checkpoints/step-000000007", "checkpoints/step-000000007/model.pt"]
)
def test_a_model_is_found_by_run_by_step_and_by_file(tmp_path, where):
    folder = save(tmp_path, 7)
    assert checkpoint.find_model(tmp_path / where) == folder / "model.pt"


def test_a_folder_without_a_model_says_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint.*meta_train.py --run-dir"):
        checkpoint.find_model(tmp_path)


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save({"bomb": Bomb()}, path)
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint"):
        checkpoint.load(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"a person", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.txt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "p.txt")


def test_a_file_of_a_checkpoint_that_is_no_model_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"resume\.pt lacks discriminator.*expected a meta-learned"
    ):
        checkpoint.load_base(save(tmp_path, 1) / "resume.pt")


def test_a_save_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "ada.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        checkpoint.save_file(tmp_path / "ada.pt", {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["ada.pt"]


def test_a_truncated_file_is_named(tmp_path):
    path = save(tmp_path, 1) / "rows.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"rows\.pt is not a readable checkpoint"):
        checkpoint.load(path)
