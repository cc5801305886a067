"""One step of adversarial meta-learning, as its turns.

    generator turn       e = E(sources), x_hat = G(y, P e)
                         L_CNT - r_hat + L_FM + L_MCH moves E, G and W
    discriminator turn   max(0, 1 + r_hat) + max(0, 1 - r) moves D (w0 and b with it) and W;
                         x_hat is detached

`picture_terms` and `verdict_terms` are the losses of the two turns for a given picture and judge:
fine-tuning uses them as they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.perceptual import Perceptual
from train.config import LossWeights, MetaConfig
from train.data import VisitBatch
from train.learner import Learner, follow_
from train.losses import (
    adversarial_loss,
    content_loss,
    feature_matching_loss,
    hinge_loss,
    matching_loss,
)
from train.world import World

Judge = Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]
"""(x, y) -> (r, features): the discriminator with w filled in."""
Terms = dict[str, Tensor]


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; raised on every rank before its turn's update."""


def picture_terms(
    x: Float[Tensor, "b 3 h w"],
    y: Float[Tensor, "b 3 h w"],
    x_hat: Float[Tensor, "b 3 h w"],
    *,
    judge: Judge,
    perceptual: Perceptual,
    weights: LossWeights,
) -> Terms:
    """Return the weighted terms of L_CNT + L_ADV for a generated picture."""
    with torch.no_grad():
        real_activations = perceptual(x)
        _, real_features = judge(x, y)
    r_hat, features = judge(x_hat, y)
    terms = {
        "content": weights.content
        * content_loss(perceptual(x_hat), real_activations, perceptual.layer_weights),
        "adversarial": weights.adversarial * adversarial_loss(r_hat),
        "feature_matching": weights.feature_matching
        * feature_matching_loss(features, real_features),
    }
    if weights.l1:
        terms["l1"] = weights.l1 * (x - x_hat).abs().mean()
    return terms


def verdict_terms(
    x: Float[Tensor, "b 3 h w"],
    y: Float[Tensor, "b 3 h w"],
    x_hat: Float[Tensor, "b 3 h w"],
    *,
    judge: Judge,
) -> tuple[Terms, Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Return L_DSC, and the scores r and r_hat of the real and the generated pictures."""
    scores, _ = judge(torch.cat([x, x_hat]), torch.cat([y, y]))
    r, r_hat = scores.float().chunk(2)
    return {"hinge": hinge_loss(r, r_hat)}, r, r_hat


def meta_step(
    learner: Learner,
    parts: Sequence[VisitBatch],
    config: MetaConfig,
    *,
    perceptual: Perceptual,
    world: World,
    step: int = 0,
    gauge: bool = False,
) -> dict[str, float]:
    """Take all turns of one step, after `step` others, on this rank's parts of the batch.

    Returns the weighted terms and, where `gauge` is set, the health gauges, averaged over parts and
    ranks. Raises NonFiniteError, on every rank and before its turn's update, where one isn't
    finite.
    """
    report: dict[str, float] = {}
    pictures: list[Tensor] = []
    for turn in config.turns:
        if turn == "generator":
            pictures, seen = _generator_turn(learner, parts, config, perceptual, world, gauge)
        else:
            seen = _discriminator_turn(learner, parts, pictures, config, world)
        report |= seen
    for average, network in (
        (learner.ema_embedder, learner.embedder),
        (learner.ema_generator, learner.generator),
    ):
        follow_(average, network, ema_decay(config.ema, step))
    return report


def ema_decay(decay: float, step: int) -> float:
    """Return the decay at a step: small at first, so that the average forgets the first weights."""
    return min(decay, (1 + step) / (10 + step))


def _generator_turn(
    learner: Learner,
    parts: Sequence[VisitBatch],
    config: MetaConfig,
    perceptual: Perceptual,
    world: World,
    gauge: bool,
) -> tuple[list[Tensor], dict[str, float]]:
    learner.generator_optimiser.zero_grad()
    pictures, rows, meters = [], [], []
    with _frozen(learner.discriminator):
        for part in parts:
            with autocast(config, world):
                e = learner.embedder(part.sources, part.source_rasters).float()
                learner.rows.start(*world.gather_pairs(part.rows, e.detach()))
                w = learner.rows.gather(part.rows)
                psi = learner.generator.psi(e)
                x_hat = learner.generator(part.target_raster, psi)
                terms = picture_terms(
                    part.target,
                    part.target_raster,
                    x_hat,
                    judge=_judge(learner.discriminator, w.detach()),
                    perceptual=perceptual,
                    weights=config.loss,
                )
            terms["matching"] = config.loss.matching * matching_loss(e, w)
            meter = _loss_meters(terms) | _shares(terms)
            if gauge:
                meter |= _generator_gauges(learner, terms, x_hat, e, w, psi)
            (sum_terms(terms) / len(parts)).backward()
            pictures.append(x_hat.detach())
            rows.append((part.rows, w))
            meters.append(meter)
    report = _reduce(learner.generator_optimiser, rows, meters, world, turn="generator")
    learner.generator_optimiser.step()
    _update_rows(learner, rows, world)
    return pictures, report


def _discriminator_turn(
    learner: Learner,
    parts: Sequence[VisitBatch],
    pictures: Sequence[Tensor],
    config: MetaConfig,
    world: World,
) -> dict[str, float]:
    learner.discriminator_optimiser.zero_grad()
    rows, meters = [], []
    for part, x_hat in zip(parts, pictures, strict=True):
        w = learner.rows.gather(part.rows)
        with autocast(config, world):
            terms, r, r_hat = verdict_terms(
                part.target,
                part.target_raster,
                x_hat,
                judge=_judge(learner.discriminator, torch.cat([w, w])),
            )
        (sum_terms(terms) / len(parts)).backward()
        rows.append((part.rows, w))
        meters.append(_loss_meters(terms) | _score_gauges(r, r_hat))
    report = _reduce(learner.discriminator_optimiser, rows, meters, world, turn="discriminator")
    learner.discriminator_optimiser.step()
    _update_rows(learner, rows, world)
    return report


def sum_terms(terms: Mapping[str, Tensor]) -> Tensor:
    """Add weighted terms into the loss of a turn."""
    return torch.stack(list(terms.values())).sum()


def autocast(config: MetaConfig, world: World) -> AbstractContextManager:
    """Run the networks in the configured arithmetic."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _judge(discriminator: nn.Module, w: Float[Tensor, "b d"]) -> Judge:
    return lambda x, y: discriminator(x, y, w)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


Rows = Sequence[tuple[Tensor, Tensor]]
"""Of each part: row numbers, and their gathered W_i with a gradient."""


def _reduce(
    optimiser: torch.optim.Optimizer,
    rows: Rows,
    meters: Sequence[Mapping[str, Tensor]],
    world: World,
    *,
    turn: str,
) -> dict[str, float]:
    """Average gradients and meters over parts and ranks; refuse what isn't finite."""
    gradients = [
        parameter.grad
        for group in optimiser.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    names = list(meters[0])
    values = torch.stack(
        [torch.stack([meter[name].float().mean() for meter in meters]).mean() for name in names]
    )
    of_rows = torch.stack([w.grad.norm() for _, w in rows if w.grad is not None]).norm()[None]
    world.average_([*gradients, values, of_rows])
    total = torch.nn.utils.get_total_norm(gradients)
    report = dict(zip(names, values.tolist(), strict=True)) | {
        f"gradient/{turn}": total.item(),
        f"gradient/{turn}_rows": of_rows.item(),
    }
    if not all(map(math.isfinite, report.values())):
        listed = ", ".join(f"{name} {value:.4g}" for name, value in report.items())
        raise NonFiniteError(f"the {turn} turn is not finite: {listed}")
    return report


def _update_rows(learner: Learner, rows: Rows, world: World) -> None:
    numbers = torch.cat([number for number, _ in rows])
    gradients = torch.cat([w.grad for _, w in rows if w.grad is not None])
    all_numbers, all_gradients = world.gather_pairs(numbers, gradients)
    learner.rows.update(all_numbers, all_gradients / world.size)


def _loss_meters(terms: Terms) -> dict[str, Tensor]:
    return {f"loss/{name}": term.detach() for name, term in terms.items()}


def _shares(terms: Terms) -> dict[str, Tensor]:
    """Return each weighted term's part of the sum of their sizes."""
    sizes = {name: term.detach().abs() for name, term in terms.items()}
    total = torch.stack(list(sizes.values())).sum()
    return {f"share/{name}": size / total.clamp_min(1e-12) for name, size in sizes.items()}


def _score_gauges(r: Float[Tensor, " b"], r_hat: Float[Tensor, " b"]) -> dict[str, Tensor]:
    r, r_hat = r.detach(), r_hat.detach()
    return {
        "score/real": r.mean(),
        "score/generated": r_hat.mean(),
        "score/ranked_right": (r > r_hat).float().mean(),
        "score/inside_margin": torch.cat([r < 1, r_hat > -1]).float().mean(),
    }


def _generator_gauges(
    learner: Learner, terms: Terms, x_hat: Tensor, e: Tensor, w: Tensor, psi: Tensor
) -> dict[str, Tensor]:
    """Measure what tells a collapse early: pulls of terms, sizes of e and W, spread of scales."""
    pulls = {
        f"pull/{name}": torch.autograd.grad(term, x_hat, retain_graph=True)[0].float().norm()
        for name, term in terms.items()
        if name != "matching"
    }
    rest = sum_terms({name: term for name, term in terms.items() if name != "matching"})
    at_e = {
        "pull_e/matching": torch.autograd.grad(terms["matching"], e, retain_graph=True)[0].norm(),
        "pull_e/rest": torch.autograd.grad(rest, e, retain_graph=True)[0].norm(),
    }
    return (
        pulls
        | at_e
        | {
            "size/e": e.detach().norm(dim=1).mean(),
            "size/w": w.detach().norm(dim=1).mean(),
            "size/e_minus_w": (e - w).detach().norm(dim=1).mean(),
            "size/e_spread": e.detach().std(dim=0, correction=0).mean(),
            "size/scale_spread": _scales(learner, psi.detach()).std(),
        }
    )


def _scales(learner: Learner, psi: Float[Tensor, "b p"]) -> Float[Tensor, "b s"]:
    """Return the gammas of psi, which holds betas and then gammas for each norm."""
    norms = psi.split(learner.generator.psi_sizes, dim=1)
    return torch.cat([norm.chunk(2, dim=1)[1] for norm in norms], dim=1)
