"""Everything that a meta-training step changes: networks, EMA, optimisers, W."""

import copy
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model.discriminator import Discriminator
from model.embedder import Embedder
from model.generator import Generator
from train.config import MetaConfig, OptimiserConfig
from train.rows import RowTable

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The state of a meta-training run, which a step changes in place."""

    embedder: Embedder
    generator: Generator
    discriminator: Discriminator
    ema_embedder: Embedder
    ema_generator: Generator
    generator_optimiser: torch.optim.Adam
    """Steps the embedder and the generator."""
    discriminator_optimiser: torch.optim.Adam
    rows: RowTable

    def model_state(self) -> dict[str, Any]:
        """Return what a user takes away: EMA embedder and generator, the live discriminator."""
        return {
            "embedder": self.ema_embedder.state_dict(),
            "generator": self.ema_generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
        }

    def resume_state(self) -> dict[str, Any]:
        """Return what going on needs besides model_state and W."""
        return {
            "embedder": self.embedder.state_dict(),
            "generator": self.generator.state_dict(),
            "generator_optimiser": self.generator_optimiser.state_dict(),
            "discriminator_optimiser": self.discriminator_optimiser.state_dict(),
        }

    def fingerprint(self, step: int) -> int:
        """Return a checksum of the step, every weight and W: equal learners have equal ones."""
        networks = (self.embedder, self.generator, self.discriminator)
        weights = [p for network in networks for p in network.parameters()]
        checksum = zlib.crc32(str(step).encode())
        for tensor in (*weights, self.rows.values):
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data, checksum)
        return checksum

    def load(
        self, model: Mapping[str, Any], resume: Mapping[str, Any], rows: Mapping[str, Tensor]
    ) -> None:
        """Restore all three parts of a checkpoint in place, strictly."""
        self.ema_embedder.load_state_dict(model["embedder"])
        self.ema_generator.load_state_dict(model["generator"])
        self.discriminator.load_state_dict(model["discriminator"])
        self.embedder.load_state_dict(resume["embedder"])
        self.generator.load_state_dict(resume["generator"])
        self.generator_optimiser.load_state_dict(resume["generator_optimiser"])
        self.discriminator_optimiser.load_state_dict(resume["discriminator_optimiser"])
        self.rows.load_state_dict(rows)


def make_learner(config: MetaConfig, num_rows: int, device: torch.device) -> Learner:
    """Build a fresh learner; every weight is a function of config.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        networks = Embedder(config.model), Generator(config.model), Discriminator(config.model)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    embedder, generator, discriminator = (
        network.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]
        for network in networks
    )
    optimiser = config.optimiser
    return Learner(
        embedder=embedder,
        generator=generator,
        discriminator=discriminator,
        ema_embedder=freeze(copy.deepcopy(embedder)),
        ema_generator=freeze(copy.deepcopy(generator)),
        generator_optimiser=make_adam(
            [*embedder.parameters(), *generator.parameters()], optimiser.lr_generator, optimiser
        ),
        discriminator_optimiser=make_adam(
            discriminator.parameters(), optimiser.lr_discriminator, optimiser
        ),
        rows=RowTable(
            num_rows,
            config.model.embedding_dim,
            config.rows,
            betas=(optimiser.beta1, optimiser.beta2),
            eps=optimiser.eps,
            seed=config.seed,
            device=device,
        ),
    )


def make_adam(parameters: Any, lr: float, config: OptimiserConfig) -> torch.optim.Adam:
    """Build Adam over the parameters; the fused kernel gives the same update in one pass."""
    return torch.optim.Adam(
        parameters, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def freeze(network: Network) -> Network:
    """Set a network aside: eval mode, no gradients."""
    return network.eval().requires_grad_(False)


@torch.no_grad()
def follow_(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the average's parameters a step towards the network's; buffers are copied."""
    for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)
