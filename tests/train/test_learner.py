"""The learner: its averages follow the networks as the decay says, and a user takes them away."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.perceptual import make_perceptual
from tests.train.shards import make_shards
from tests.train.test_step import (
    ALONE,
    CONFIG,
    NUM_ROWS,
    make_batch,
    named_tensors,
    take_step,
    weights_of,
)
from train import checkpoint
from train.learner import Learner, make_learner
from train.loop import train

AVERAGES = {"ema_embedder": "embedder", "ema_generator": "generator"}


@pytest.fixture(scope="module")
def stepped() -> tuple[dict[str, Tensor], Learner]:
    """The tensors of a fresh learner, and the learner a step later."""
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    start = named_tensors(learner)
    take_step(learner, make_batch([1, 3]), make_perceptual("lite"))
    return start, learner


def test_each_step_moves_the_averages_by_its_own_decay() -> None:
    config = replace(CONFIG, ema=0.9)
    learner, perceptual = make_learner(config, NUM_ROWS, ALONE.device), make_perceptual("lite")
    expected = start = weights_of(learner, *AVERAGES)
    for step, decay in ((0, 1 / 10), (1, 2 / 11), (90, 0.9)):
        take_step(learner, make_batch([1, 3], seed=step), perceptual, config, step=step)
        raw = weights_of(learner, *AVERAGES.values()).values()
        expected = {
            name: decay * average + (1 - decay) * weight
            for (name, average), weight in zip(expected.items(), raw, strict=True)
        }
        averages = weights_of(learner, *AVERAGES)
        torch.testing.assert_close(averages, expected, atol=1e-6, rtol=1e-5)
    still = [name for name in start if torch.equal(averages[name], start[name])]
    assert not [name for name in still if not name.endswith("key.bias")]


def test_a_run_tells_the_averages_how_many_steps_came_before(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    config = replace(
        CONFIG,
        shards=str(tmp_path / "shards"),
        run=tmp_path / "run",
        data=replace(CONFIG.data, num_workers=0),
        max_steps=2,
        checkpoint_every=1,
    )
    train(config, ALONE)
    first, second = checkpoint.steps(config.run)
    before, after = (checkpoint.load(step / "model.pt")["embedder"] for step in (first, second))
    raw = checkpoint.load(second / "resume.pt")["embedder"]
    for name, _ in make_learner(config, NUM_ROWS, ALONE.device).embedder.named_parameters():
        expected = before[name] * 2 / 11 + raw[name] * 9 / 11
        torch.testing.assert_close(after[name], expected, atol=1e-6, rtol=1e-5)


def test_the_averages_take_over_the_singular_vectors(stepped) -> None:
    start, learner = stepped
    now = named_tensors(learner)
    buffers = {
        f"{average}.{name}": f"{network}.{name}"
        for average, network in AVERAGES.items()
        for name, _ in getattr(learner, network).named_buffers()
    }
    assert not [mine for mine, theirs in buffers.items() if not torch.equal(now[mine], now[theirs])]
    assert not all(torch.equal(now[name], start[name]) for name in buffers)


def test_a_user_takes_the_averages_away_and_a_resume_needs_the_networks_in_training(stepped):
    _, learner = stepped
    tensors = named_tensors(learner)
    sources = {
        "ema_embedder": learner.model_state()["embedder"],
        "ema_generator": learner.model_state()["generator"],
        "discriminator": learner.model_state()["discriminator"],
        "embedder": learner.resume_state()["embedder"],
        "generator": learner.resume_state()["generator"],
    }
    for source, state in sources.items():
        assert all(torch.equal(state[name], tensors[f"{source}.{name}"]) for name in state)
    for average, network in AVERAGES.items():
        both = zip(sources[average].values(), sources[network].values(), strict=True)
        assert not all(torch.equal(mine, theirs) for mine, theirs in both)
