"""The step: everything trainable moves and nothing else, terms are the paper's, ranks add up."""

import copy
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch

from model.perceptual import make_perceptual
from tests.train.bases import MODEL
from tests.train.ranks import on_ranks
from train.config import DataConfig, LossWeights, MetaConfig, OptimiserConfig, PerceptualConfig
from train.data import VisitBatch
from train.learner import Learner, make_learner
from train.loop import split_batch
from train.step import NonFiniteError, _score_gauges, meta_step
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
UNIFORM = replace(CONFIG, rows=replace(CONFIG.rows, start="uniform"))
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


def take_step(
    learner: Learner,
    batch: VisitBatch,
    perceptual,
    config: MetaConfig = CONFIG,
    world: World = ALONE,
    **kw,
):
    parts = split_batch(batch, config.accumulate)
    return meta_step(learner, parts, config, perceptual=perceptual, world=world, **kw)


def named_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name in ("embedder", "generator", "discriminator", "ema_embedder", "ema_generator")
        for key, value in getattr(learner, name).state_dict().items()
    }


TRAINED = ("embedder", "generator", "discriminator")


def weights_of(learner: Learner, *networks: str) -> dict[str, torch.Tensor]:
    return {
        f"{network}.{name}": parameter.detach().clone()
        for network in networks
        for name, parameter in getattr(learner, network).named_parameters()
    }


def what_learned(one: Learner, other: Learner) -> list[str]:
    """List the weights, and W, in which two learners differ."""
    mine, theirs = (weights_of(each, *TRAINED) | {"W": each.rows.values} for each in (one, other))
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def hold_spectral_norm(learner: Learner) -> Learner:
    """Stop power iteration, which takes a step each forward."""
    for network in TRAINED:
        getattr(learner, network).eval()
    return learner


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_a_step_every_trainable_tensor_has_moved(perceptual, precision):
    config = replace(CONFIG, precision=precision)
    learner = make_learner(config, NUM_ROWS, ALONE.device)
    before = named_tensors(learner)
    frozen = {key: value.clone() for key, value in perceptual.state_dict().items()}
    # Self-attention starts with gain 0, so what lies behind the gain moves from the second step on.
    for seed in range(2):
        take_step(learner, make_batch([1, 3, 4, 7], seed), perceptual, config)
    # Softmax over the keys doesn't see what is added to all of them.
    trainable = [n for n in weights_of(learner, *TRAINED) if not n.endswith("key.bias")]
    after = named_tensors(learner)
    assert not [name for name in trainable if torch.equal(after[name], before[name])]
    assert all(torch.equal(value, frozen[key]) for key, value in perceptual.state_dict().items())
    assert {value.dtype for value in (*after.values(), learner.rows.values)} == {torch.float32}


def test_bf16_is_the_default_and_its_losses_are_nearly_those_of_fp32(perceptual):
    losses = {}
    for precision in ("fp32", MetaConfig().precision):
        config = replace(CONFIG, precision=precision)
        learner = make_learner(config, NUM_ROWS, ALONE.device)
        values = take_step(learner, make_batch([1, 3, 4, 7]), perceptual, config)
        losses[precision] = {name: v for name, v in values.items() if name.startswith("loss/")}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05, abs=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_only_the_rows_of_the_batch_move(perceptual):
    learner = make_learner(UNIFORM, NUM_ROWS, ALONE.device)
    before = learner.rows.values.clone()
    take_step(learner, make_batch([1, 3, 4, 7]), perceptual, UNIFORM)
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
    learner = make_learner(UNIFORM, NUM_ROWS, ALONE.device)
    values = take_step(learner, make_batch([1, 3, 4, 7]), perceptual, UNIFORM, gauge=True)
    terms = {"content", "l1", "adversarial", "feature_matching", "matching", "hinge"}
    assert {f"loss/{term}" for term in terms} <= values.keys()
    assert {f"pull/{term}" for term in terms - {"hinge", "matching"}} <= values.keys()
    assert {"size/e", "size/w", "size/scale_spread", "score/ranked_right"} <= values.keys()
    shares = [value for name, value in values.items() if name.startswith("share/")]
    assert sum(shares) == pytest.approx(1.0)
    # Where no score is beyond the margin, the hinge is 1 - r + 1 + r_hat.
    assert values["score/inside_margin"] == 1
    apart = values["score/real"] - values["score/generated"]
    assert values["loss/hinge"] == pytest.approx(2 - apart, rel=1e-4)


def test_score_gauges_by_hand():
    gauges = _score_gauges(torch.tensor([2.0, 0.5, -3.0]), torch.tensor([-2.0, 0.9, -0.5]))
    assert {name: value.item() for name, value in gauges.items()} == pytest.approx(
        {
            "score/real": -0.5 / 3,
            "score/generated": -1.6 / 3,
            "score/ranked_right": 1 / 3,  # 2 above -2
            "score/inside_margin": 4 / 6,  # all but 2, above 1, and -2, below -1
        }
    )


def test_pulls_and_sizes_by_hand(perceptual):
    loss = LossWeights(content=0, adversarial=0, feature_matching=0, l1=3.0, matching=2.0)
    config = replace(UNIFORM, loss=loss)
    learner = hold_spectral_norm(make_learner(config, NUM_ROWS, ALONE.device))
    batch = make_batch([1, 3, 4])
    e = learner.embedder(batch.sources, batch.source_rasters).detach().requires_grad_()
    x_hat = learner.generator(batch.target_raster, learner.generator.psi(e))
    (at_e,) = torch.autograd.grad(3 * (batch.target - x_hat).abs().mean(), e)
    e = e.detach()
    learner.rows.values[batch.rows] = w = e + 0.5
    values = take_step(learner, batch, perceptual, config, gauge=True)
    expected = {
        "pull/l1": 3 / math.sqrt(x_hat.numel()),  # the gradient of a mean |.| is +-1 / n, n times
        "pull_e/matching": 2 / math.sqrt(e.numel()),
        "pull_e/rest": at_e.norm().item(),
        "size/e": sum(row.norm().item() for row in e) / 3,
        "size/w": sum(row.norm().item() for row in w) / 3,
        "size/e_minus_w": 0.5 * math.sqrt(MODEL.embedding_dim),
        "size/e_spread": e.var(dim=0, correction=0).sqrt().mean().item(),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_the_spread_of_scales_is_that_of_the_gammas(perceptual):
    learner = make_learner(CONFIG, NUM_ROWS, ALONE.device)
    P = learner.generator.P
    with torch.no_grad():
        P.weight.zero_()
        for bias in P.bias.split(learner.generator.psi_sizes):
            beta, gamma = bias.chunk(2)
            beta.copy_(torch.linspace(-7, 7, len(beta)))
            gamma.copy_(2 + (-1.0) ** torch.arange(len(gamma)))  # 3, 1, 3, 1 ...
    values = take_step(learner, make_batch([1, 3]), perceptual, gauge=True)
    assert values["size/scale_spread"] == pytest.approx(1, abs=0.01)


def test_parts_of_a_batch_add_up_to_the_whole(perceptual):
    config = replace(CONFIG, optimiser=OptimiserConfig(beta1=0.9, eps=1.0, lr_generator=1.0))
    batch = make_batch([1, 3, 4, 7])
    # Parts take more forwards than the whole.
    whole, parts = (
        hold_spectral_norm(make_learner(config, NUM_ROWS, ALONE.device)) for _ in range(2)
    )
    take_step(whole, batch, perceptual, config)
    take_step(parts, batch, perceptual, replace(config, accumulate=2))
    for name, value in named_tensors(whole).items():
        torch.testing.assert_close(named_tensors(parts)[name], value, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(parts.rows.values, whole.rows.values, atol=1e-5, rtol=1e-4)


def assert_stops(learner: Learner, turn: str, perceptual, batch=None, config=UNIFORM) -> str:
    """Take a step that must stop in a turn before its update; return what was said."""
    batch = batch or make_batch([1, 3])
    as_before = make_learner(config, NUM_ROWS, ALONE.device)
    if turn == "discriminator":
        take_step(as_before, batch, perceptual, replace(config, turns=("generator",)))
    with pytest.raises(NonFiniteError, match=f"{turn} turn is not finite") as error:
        take_step(learner, batch, perceptual, config)
    assert not what_learned(learner, as_before)
    return str(error.value)


def infinite(gradient: torch.Tensor) -> torch.Tensor:
    """Break the first row of a gradient."""
    return gradient.index_fill(0, torch.tensor([0]), torch.inf)


def test_a_non_finite_loss_stops_before_the_update(perceptual):
    batch = make_batch([1, 3])
    batch.target[0, 0, 5, 7] = torch.nan
    learner = make_learner(UNIFORM, NUM_ROWS, ALONE.device)
    assert "content nan" in assert_stops(learner, "generator", perceptual, batch)


def test_a_loss_of_the_discriminator_alone_stops_before_its_update(perceptual):
    # The generator's turn throws W so far off that the next scores overflow.
    config = replace(UNIFORM, rows=replace(UNIFORM.rows, lr=1e38))
    learner = make_learner(config, NUM_ROWS, ALONE.device)
    said = assert_stops(learner, "discriminator", perceptual, config=config)
    assert re.search(r"hinge (inf|nan)", said)


@pytest.mark.parametrize("network", TRAINED)
def test_a_gradient_that_is_not_finite_stops_before_the_update(perceptual, network):
    turn = "discriminator" if network == "discriminator" else "generator"
    learner = make_learner(UNIFORM, NUM_ROWS, ALONE.device)
    next(getattr(learner, network).parameters()).register_hook(infinite)
    said = assert_stops(learner, turn, perceptual)
    assert not re.search(r"loss/\w+ (inf|nan)", said)


@pytest.mark.parametrize(("turn", "number"), [("generator", 0), ("discriminator", 1)])
def test_a_gradient_of_one_row_that_is_not_finite_stops_before_the_update(
    perceptual, monkeypatch, turn, number
):
    learner = make_learner(UNIFORM, NUM_ROWS, ALONE.device)
    gather, calls = learner.rows.gather, itertools.count()

    def gather_broken(rows: torch.Tensor) -> torch.Tensor:
        w = gather(rows)
        if next(calls) == number:
            w.register_hook(infinite)
        return w

    monkeypatch.setattr(learner.rows, "gather", gather_broken)
    said = assert_stops(learner, turn, perceptual)
    assert not re.search(r"loss/\w+ (inf|nan)", said)


def step_on_a_broken_frame(world: World) -> tuple[str, list[str]]:
    """Return a rank's error, and what learned, where rank 1 alone has a frame that isn't finite."""
    learner, fresh = (make_learner(UNIFORM, NUM_ROWS, world.device) for _ in range(2))
    batch = make_batch([world.rank, 5], seed=world.rank)
    if world.rank == 1:
        batch.sources[0, 1, 2, 5, 7] = torch.nan
    try:
        take_step(learner, batch, make_perceptual("lite"), UNIFORM, world)
    except NonFiniteError as error:
        return str(error), what_learned(learner, fresh)
    return "no error", what_learned(learner, fresh)


def test_a_broken_frame_of_one_rank_stops_all_before_the_update():
    (said, learned), other = on_ranks(step_on_a_broken_frame)
    assert "generator turn is not finite" in said
    assert learned == []
    assert other == (said, learned)


def test_the_weights_at_the_start_are_a_function_of_the_seed():
    torch.manual_seed(1)
    one = named_tensors(make_learner(CONFIG, NUM_ROWS, ALONE.device))
    torch.manual_seed(2)
    two = named_tensors(make_learner(CONFIG, NUM_ROWS, ALONE.device))
    other = named_tensors(make_learner(replace(CONFIG, seed=1), NUM_ROWS, ALONE.device))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
