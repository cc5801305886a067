"""How a run does on held-out people, while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.embedder import Embedder
from model.generator import Generator
from train.data import VisitBatch
from train.learner import Learner
from train.metrics import ssim


def feed_forward(
    embedder: Embedder, generator: Generator, batch: VisitBatch
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b d"]]:
    """Return x_hat = G(y, P e) for the batch's targets, and e."""
    e = embedder(batch.sources, batch.source_rasters)
    return generator(batch.target_raster, generator.psi(e)), e


@torch.no_grad()
def validate(learner: Learner, batch: VisitBatch) -> dict[str, float]:
    """Measure a batch of held-out visits, feed-forward.

    Similarity is that of the averaged networks' pictures, which a user takes away. The
    discriminator ranks the real target against the picture of the generator in training, with
    W_i = e, as fine-tuning begins.
    """
    averaged, _ = feed_forward(learner.ema_embedder, learner.ema_generator, batch)
    with _evaluating(learner.embedder, learner.generator, learner.discriminator):
        x_hat, e = feed_forward(learner.embedder, learner.generator, batch)
        r, _ = learner.discriminator(batch.target, batch.target_raster, e)
        r_hat, _ = learner.discriminator(x_hat, batch.target_raster, e)
    return {
        "val/ssim": ssim(averaged, batch.target).mean().item(),
        "val/l1": (averaged - batch.target).abs().mean().item(),
        "val/ranked_right": (r > r_hat).float().mean().item(),
        "val/score_gap": (r - r_hat).mean().item(),
    }


@contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Keep spectral norm from iterating, which a look at the networks must not do."""
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network in networks:
            network.train()
