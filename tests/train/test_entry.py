"""What the entries share: one plain line for a failure, no harm to inputs, a whole --help."""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from pipeline.storage import StorageError
from train import drive, finetune, meta_train
from train.config import MetaConfig
from train.entry import claim_output, said_plainly
from train.step import NonFiniteError


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, StorageError, NonFiniteError])
def test_a_failure_is_one_line(error: type[Exception]) -> None:
    with pytest.raises(SystemExit, match=r"^drive: no driver$"), said_plainly("drive"):
        raise error("no driver")


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_mistake_of_ours_or_of_torchs_keeps_its_traceback(error: type[Exception]) -> None:
    with pytest.raises(error), said_plainly("drive"):
        raise error("shapes cannot be multiplied")


def test_ctrl_c_is_said_once(monkeypatch, capsys) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end, said_plainly("meta_train"):
            raise KeyboardInterrupt
        assert end.value.code == 130
    assert capsys.readouterr().err == "meta_train: stopped\n"


def test_a_process_that_fails_alone_says_which_it_is(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("train.entry.GRACE_S", 0)
    said = r"^meta_train \(rank 3\): gone$"
    with pytest.raises(SystemExit, match=said), said_plainly("meta_train"):
        raise OSError("gone")


def test_an_output_must_be_a_file_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "in" / "ada.mp4"
    claim_output(source, [])
    source.write_bytes(b"film")
    (tmp_path / "link.mp4").symlink_to(source)
    for output in (source, tmp_path / "in" / ".." / "in" / "ada.mp4", tmp_path / "link.mp4"):
        with pytest.raises(ValueError, match="would replace an input"):
            claim_output(output, [source])
    with pytest.raises(ValueError, match="lies in the folder"):
        claim_output(tmp_path / "in" / "new.pt", [tmp_path / "in"])
    with pytest.raises(ValueError, match="is a folder"):
        claim_output(tmp_path / "in", [source])
    with pytest.raises(OSError, match=r"ada\.mp4"):
        claim_output(source / "new.pt", [])
    claim_output(tmp_path / "new" / "ada.pt", [source])
    assert (tmp_path / "new").is_dir()


def docs(config: type) -> list[str]:
    """Collect the docstring under each field, those of configs within it as well."""
    (body,) = [n for n in ast.parse(inspect.getsource(config)).body if isinstance(n, ast.ClassDef)]
    found = [
        inspect.cleandoc(n.value.value)
        for n in body.body
        if isinstance(n, ast.Expr)
        and isinstance(n.value, ast.Constant)
        and n is not body.body[0]
        and isinstance(n.value.value, str)
    ]
    within = [field.type for field in fields(config) if is_dataclass(field.type)]
    return found + [doc for inner in within for doc in docs(inner)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("main", "config"),
    [
        (finetune.main, finetune.FinetuneConfig),
        (drive.main, drive.DriveConfig),
        (meta_train.main, MetaConfig),
    ],
)
def test_help_says_what_each_setting_does(main: Callable, config: type, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "noqa" not in shown
    letters = re.sub(r"[\s│]", "", shown)
    missing = [doc for doc in docs(config) if re.sub(r"\s", "", doc) not in letters]
    assert missing == []
    assert len(docs(config)) > 8
