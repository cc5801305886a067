"""The loop: 6 steps are 3 + save + load + 3 to the bit; a stop leaves a checkpoint; ranks add."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.storage import hold
from tests.train.bases import MODEL
from tests.train.ranks import environments
from tests.train.shards import make_shards
from train import checkpoint
from train.config import DataConfig, LossWeights, MetaConfig, OptimiserConfig, PerceptualConfig
from train.loop import train
from train.step import NonFiniteError
from train.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


def make_config(shards: Path, run: Path, **changes) -> MetaConfig:
    config = MetaConfig(
        shards=str(shards),
        run=run,
        model=MODEL,
        data=DataConfig(num_sources=3, batch_size=3, num_workers=0, augment=True),
        perceptual=PerceptualConfig(name="lite"),
        loss=LossWeights(l1=2.0, matching=0.2),
        optimiser=OptimiserConfig(lr_generator=1e-3, lr_discriminator=1e-3, beta1=0.5),
        precision="fp32",
        max_steps=6,
        report_every=1,
    )
    return replace(config, **changes)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    def walk(prefix: str, value: object):
        if isinstance(value, torch.Tensor):
            yield prefix, value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{prefix}/{key}", item)

    return {
        name: tensor
        for file in ("model.pt", "resume.pt", "rows.pt")
        for name, tensor in walk(file, checkpoint.load(folder / file))
    }


def assert_same_bits(one: Path, two: Path) -> None:
    first, second = tensors_of(one), tensors_of(two)
    assert first.keys() == second.keys()
    assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def torchrun(config_flags: list[str], *, processes: int = 1, **popen) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--standalone", "train/meta_train.py", *config_flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def flags(config: MetaConfig, *, num_workers: int = 0) -> list[str]:
    return [
        "--preset", "tiny", "--shards", config.shards, "--run-dir", str(config.run),
        "--data.num-sources", "3", "--data.batch-size", "4", "--data.num-workers", str(num_workers),
        "--precision", "fp32", "--report-every", "1", "--rows.start", "uniform",
        "--model.image-px", "32", "--model.min-channels", "8", "--model.max-channels", "24",
    ]  # fmt: skip


def test_three_steps_and_three_more_are_six_to_the_bit(shards, tmp_path):
    whole = train(make_config(shards, tmp_path / "whole"), ALONE)
    cut = make_config(shards, tmp_path / "cut", max_steps=3)
    train(cut, ALONE)
    resumed = train(replace(cut, max_steps=6), ALONE)
    assert_same_bits(whole, resumed)


def test_the_log_has_a_line_a_report_and_pictures_are_drawn(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=2)
    train(config, ALONE)
    lines = [json.loads(line) for line in (config.run / "log.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "loss/content" in line]
    assert [line["step"] for line in reports] == [1, 2]
    assert [line["visits"] for line in reports] == [3, 6]
    looks = [line for line in lines if "val/ssim" in line]
    assert [line["step"] for line in looks] == [0, 2]
    assert {"val/l1", "val/ranked_right", "val/score_gap"} <= looks[0].keys()
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert (config.run / "panel-train.png").is_file()
    assert (config.run / "panel-val.png").is_file()
    assert list((config.run / "tensorboard").iterdir())


def test_only_the_newest_checkpoints_stay(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=4, checkpoint_every=1, keep=2)
    train(config, ALONE)
    assert [path.name for path in checkpoint.steps(config.run)] == [
        "step-000000003",
        "step-000000004",
    ]
    assert not list((config.run / "checkpoints").glob(".tmp*"))


def test_other_settings_or_other_videos_are_refused_by_name(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=1)
    train(config, ALONE)
    with pytest.raises(ValueError, match=r"optimiser\.lr_generator was 0\.001 and is now 0\.002"):
        changed = replace(config.optimiser, lr_generator=2e-3)
        train(replace(config, optimiser=changed), ALONE)
    make_shards(tmp_path / "fewer", persons=("ada", "bob", "eve"))
    with pytest.raises(ValueError, match=r"4 are gone \(cyd/v1, cyd/v2, dan/v1\)"):
        train(replace(config, shards=str(tmp_path / "fewer")), ALONE)


def test_tensorboard_keeps_what_came_before_a_stop(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=2)
    train(config, ALONE)
    train(replace(config, max_steps=3), ALONE)
    board = EventAccumulator(str(config.run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/content")] == [3, 6, 9]


def test_a_time_limit_leaves_a_checkpoint(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=None, max_minutes=1 / 600)
    folder = train(config, ALONE)
    assert folder == checkpoint.steps(config.run)[-1]
    assert 0 <= checkpoint.load(folder / "resume.pt")["step"] < 50


def test_steps_that_a_kill_undid_leave_the_log(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=2)
    train(config, ALONE)
    log = config.run / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "visits": 9}\n{"step": 4, "vis')
    train(replace(config, max_steps=3), ALONE)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/content" in line] == [1, 2, 3]
    assert all(line.keys() & {"loss/content", "val/ssim"} for line in lines)


def test_what_is_not_finite_is_named_with_the_last_good_checkpoint(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=1)
    folder = train(config, ALONE)
    state = checkpoint.load(folder / "resume.pt")
    state["embedder"]["blocks.0.conv1.bias"].fill_(math.nan)
    checkpoint.save_file(folder / "resume.pt", state)
    expected = (
        rf"step 2: the generator turn is not finite: .*content nan.* is {re.escape(str(folder))}"
    )
    with pytest.raises(NonFiniteError, match=expected):
        train(replace(config, max_steps=2), ALONE)
    assert checkpoint.steps(config.run) == [folder]


def test_a_run_folder_is_held_by_one_process(shards, tmp_path):
    config = make_config(shards, tmp_path / "run")
    with hold(str(config.run)):
        output, _ = torchrun([*flags(config), "--max-steps", "1"]).communicate(timeout=240)
    assert f"meta_train: Another process is at work in {config.run}." in output
    assert "give another --run-dir" in output
    assert not checkpoint.steps(config.run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_run_trains_and_gauges(shards, tmp_path):
    plain = make_config(shards, tmp_path / "plain", max_steps=2)
    train(plain, ALONE)
    compiled = replace(plain, run=tmp_path / "compiled", compile=True)
    train(compiled, ALONE)
    reports = [
        [line for line in map(json.loads, log.read_text().splitlines()) if "pull/content" in line]
        for log in (plain.run / "log.jsonl", compiled.run / "log.jsonl")
    ]
    assert [len(lines) for lines in reports] == [2, 2]
    for ours, theirs in zip(*reports, strict=True):
        assert theirs.keys() == ours.keys()
        for name in (name for name in ours if name.startswith("loss/")):
            assert theirs[name] == pytest.approx(ours[name], rel=2e-2, abs=1e-2), name


def test_a_batch_that_ranks_and_parts_cannot_share_is_refused(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", accumulate=2)
    with pytest.raises(ValueError, match=r"make --data\.batch-size a multiple of 2"):
        train(config, ALONE)


def test_other_faces_and_other_weights_are_refused(shards, tmp_path):
    config = make_config(shards, tmp_path / "run", max_steps=1)
    model = train(config, ALONE) / "model.pt"
    state = checkpoint.load(model)
    faces = {**state, "face": {**state["face"], "crop_margin": 0.7}}
    checkpoint.save_file(model, faces)
    with pytest.raises(ValueError, match="crop_margin"):
        train(config, ALONE)
    checkpoint.save_file(model, {**state, "perceptual": {"name": "lite", "weights_sha256": {}}})
    with pytest.raises(ValueError, match="trained with other weights of lite"):
        train(config, ALONE)


def test_ranks_that_see_different_run_folders_are_refused(shards, tmp_path):
    config = make_config(shards, tmp_path / "0")
    output, _ = torchrun([*flags(config), "--max-steps", "1"]).communicate(timeout=240)
    assert checkpoint.steps(config.run), output
    processes = [
        subprocess.Popen(
            [sys.executable, "train/meta_train.py",
             *flags(replace(config, run=tmp_path / rank["RANK"])), "--max-steps", "3"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **rank},
        )
        for rank in environments()
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "this one is at step 1 of" in said[0] and "this one is at step 0 of" in said[1]
    assert all("a folder that every node shares" in text for text in said)


def test_two_ranks_learn_what_one_does(shards, tmp_path):
    runs = {}
    for processes in (1, 2):
        config = make_config(shards, tmp_path / str(processes))
        process = torchrun([*flags(config), "--max-steps", "2"], processes=processes)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        runs[processes] = tensors_of(checkpoint.steps(config.run)[-1])
    assert runs[1].keys() == runs[2].keys()
    for name, tensor in runs[1].items():
        torch.testing.assert_close(runs[2][name], tensor, atol=2e-3, rtol=1e-2, msg=name)
    moved = [name for name in runs[1] if name == "rows.pt/updates"]
    assert moved and runs[2]["rows.pt/updates"].sum() == runs[1]["rows.pt/updates"].sum() > 0


def stop_after_two_steps(process: subprocess.Popen, number: int, to_group: bool = False) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2 "):
            break
    (os.killpg if to_group else os.kill)(process.pid, number)
    process.communicate(timeout=120)


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_to_all_processes_leaves_a_checkpoint(shards, tmp_path, processes, number):
    config = make_config(shards, tmp_path / "run")
    process = torchrun(
        [*flags(config, num_workers=1), "--max-steps", "100000"],
        processes=processes,
        start_new_session=True,
    )
    stop_after_two_steps(process, number, to_group=True)
    (folder,) = checkpoint.steps(config.run)
    assert (folder / "resume.pt").is_file()


def test_sigterm_to_torchrun_leaves_a_checkpoint_and_the_same_command_goes_on(shards, tmp_path):
    config = make_config(shards, tmp_path / "stopped")
    command = [*flags(config, num_workers=1), "--checkpoint-every", "1000"]
    process = torchrun([*command, "--max-steps", "100000"])
    stop_after_two_steps(process, signal.SIGTERM)
    stopped_at = int(checkpoint.steps(config.run)[-1].name.removeprefix("step-"))
    assert stopped_at >= 2

    process = torchrun([*command, "--max-steps", str(stopped_at + 2)])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    whole = make_config(shards, tmp_path / "whole")
    process = torchrun([*flags(whole), "--max-steps", str(stopped_at + 2)])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert_same_bits(checkpoint.steps(config.run)[-1], checkpoint.steps(whole.run)[-1])
