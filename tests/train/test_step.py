"""The step: everything trainable moves and nothing else, terms are the paper's, ranks add up."""

import copy
from dataclasses import replace

import pytest
import torch

from model.perceptual import make_perceptual
from tests.train.bases import MODEL
from train.config import DataConfig, LossWeights, MetaConfig, OptimiserConfig, PerceptualConfig
from train.data import VisitBatch
from train.learner import Learner, make_learner
from train.loop import split_batch
from train.step import NonFiniteError, meta_step
from train.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
CONFIG = MetaConfig(
    model=MODEL,
    data=DataConfig(num_sources=2, batch_size=4),
    perceptual=PerceptualConfig(name="lite"),
    loss=LossWeights(l1=1.0),
    optimiser=OptimiserConfig(lr_generator=1e-3, lr_discriminator=1e-3),
    precision="fp32",
)
NUM_ROWS = 9


@pytest.fixture(scope="module")
def perceptual():
    return make_perceptual("lite")


def make_batch(rows: list[int], seed: int = 0) -> VisitBatch:
    generator = torch.Generator().manual_seed(seed)

    def picture(*lead: int) -> torch.Tensor:
        return torch.rand(len(rows), *lead, 3, 32, 32, generator=generator) * 2 - 1

    return VisitBatch(
        rows=torch.tensor(rows),
        sources=picture(2),
        source_rasters=picture(2),
        target=picture(),
        target_raster=picture(),
        keys=tuple(f"person/{row}" for row in rows),
    )


def take_step(learner: Learner, batch: VisitBatch, perceptual, config: MetaConfig = CONFIG, **kw):
    parts = split_batch(batch, config.accumulate)
    return meta_step(learner, parts, config, perceptual=perceptual, world=ALONE, **kw)


def named_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name in ("embedder", "generator", "discriminator", "ema_embedder", "ema_generator")
        for key, value in getattr(learner, name).state_dict().items()
    }


def test_after_a_step_every_trainable_tensor_has_moved(perceptual):
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    before = named_tensors(learner)
    frozen = {key: value.clone() for key, value in perceptual.state_dict().items()}
    # Self-attention starts with gain 0, so what lies behind the gain moves from the second step on.
    for seed in range(2):
        take_step(learner, make_batch([1, 3, 4, 7], seed), perceptual)
    trainable = {
        f"{network}.{name}"
        for network in ("embedder", "generator", "discriminator")
        for name, _ in getattr(learner, network).named_parameters()
        # Softmax over the keys doesn't see what is added to all of them.
        if not name.endswith("key.bias")
    }
    after = named_tensors(learner)
    assert not [name for name in sorted(trainable) if torch.equal(after[name], before[name])]
    assert all(torch.equal(value, frozen[key]) for key, value in perceptual.state_dict().items())


def test_only_the_rows_of_the_batch_move(perceptual):
    config = replace(CONFIG, rows=replace(CONFIG.rows, start="uniform"))
    learner = make_learner(config, NUM_ROWS, ALONE.device)
    before = learner.rows.values.clone()
    take_step(learner, make_batch([1, 3, 4, 7]), perceptual, config)
    moved = (learner.rows.values != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [1, 3, 4, 7]


@pytest.mark.parametrize("turn", ["generator", "discriminator"])
def test_a_turn_moves_its_own_side_only(perceptual, turn):
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    turns = ("generator",) if turn == "generator" else ("generator", "discriminator")
    other = "discriminator" if turn == "generator" else "generator"
    generator_turn_only = copy.deepcopy(named_tensors(learner))
    if turn == "discriminator":
        twin = make_learner(CONFIG, NUM_ROWS, ALONE.device)
        take_step(twin, make_batch([0, 2]), perceptual, replace(CONFIG, turns=("generator",)))
        generator_turn_only = named_tensors(twin)
    take_step(learner, make_batch([0, 2]), perceptual, replace(CONFIG, turns=turns))
    for name, parameter in getattr(learner, other).named_parameters():
        assert torch.equal(parameter, generator_turn_only[f"{other}.{name}"]), name


def test_the_report_has_every_term_and_the_gauges(perceptual):
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    values = take_step(learner, make_batch([1, 3, 4, 7]), perceptual, gauge=True)
    terms = {"content", "l1", "adversarial", "feature_matching", "matching", "hinge"}
    assert {f"loss/{term}" for term in terms} <= values.keys()
    assert {f"pull/{term}" for term in terms - {"hinge", "matching"}} <= values.keys()
    assert {"size/e", "size/w", "size/scale_spread", "score/ranked_right"} <= values.keys()
    shares = [value for name, value in values.items() if name.startswith("share/")]
    assert sum(shares) == pytest.approx(1.0)


def test_parts_of_a_batch_add_up_to_the_whole(perceptual):
    config = replace(CONFIG, optimiser=OptimiserConfig(beta1=0.9, eps=1.0, lr_generator=1.0))
    whole, parts = (make_learner(config, NUM_ROWS, ALONE.device) for _ in range(2))
    batch = make_batch([1, 3, 4, 7])
    # Power iteration runs once a forward: freeze it, as parts take more forwards than the whole.
    for learner in (whole, parts):
        for network in (learner.embedder, learner.generator, learner.discriminator):
            network.eval()
    take_step(whole, batch, perceptual, config)
    take_step(parts, batch, perceptual, replace(config, accumulate=2))
    for name, value in named_tensors(whole).items():
        torch.testing.assert_close(named_tensors(parts)[name], value, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(parts.rows.values, whole.rows.values, atol=1e-5, rtol=1e-4)


def test_a_non_finite_loss_stops_before_the_update(perceptual):
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    before = named_tensors(learner)
    batch = make_batch([1, 3])
    batch.target[0, 0, 5, 7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"generator turn is not finite: .*content nan"):
        take_step(learner, batch, perceptual)
    for network in ("embedder", "generator", "discriminator"):
        for name, parameter in getattr(learner, network).named_parameters():
            assert torch.equal(parameter, before[f"{network}.{name}"])


def test_the_weights_at_the_start_are_a_function_of_the_seed():
    torch.manual_seed(1)
    one = named_tensors(make_learner(CONFIG, NUM_ROWS, ALONE.device))
    torch.manual_seed(2)
    two = named_tensors(make_learner(CONFIG, NUM_ROWS, ALONE.device))
    other = named_tensors(make_learner(replace(CONFIG, seed=1), NUM_ROWS, ALONE.device))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
