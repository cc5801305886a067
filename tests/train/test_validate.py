from dataclasses import replace

import pytest
import torch

from model.perceptual import make_perceptual
from tests.train.test_step import ALONE, CONFIG, NUM_ROWS, make_batch, named_tensors, take_step
from train.learner import make_learner
from train.validate import feed_forward, validate


def test_a_look_at_held_out_people_changes_nothing():
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    take_step(learner, make_batch([1, 3]), make_perceptual("lite"))
    before = named_tensors(learner)
    validate(learner, make_batch([-1, -1], seed=5))
    after = named_tensors(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert learner.embedder.training
    assert not learner.ema_embedder.training


def test_pictures_equal_to_their_targets_are_as_similar_as_can_be_and_never_ranked_below():
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    batch = make_batch([-1, -1, -1], seed=5)
    with torch.no_grad():
        drawn, _ = feed_forward(learner.ema_embedder, learner.ema_generator, batch)
    values = validate(learner, replace(batch, target=drawn))
    assert values["val/ssim"] == pytest.approx(1, abs=1e-3)
    assert values["val/l1"] == pytest.approx(0, abs=1e-6)
    # Untrained, the averaged networks are those in training: the discriminator sees one picture.
    assert values["val/score_gap"] == pytest.approx(0, abs=1e-4)
    assert validate(learner, batch)["val/ssim"] < 0.5
