"""Embedding and fine-tuning: a base and a person's frames -> the person's own networks.

    faces -> e, psi' = P e, w' = w0 + e -> turns of G and D on those frames -> the best step

Personal networks are constructed from the meta-learned ones, and optimisers made last, over the
parameters the personal networks hold. The losses are those of meta-training without L_MCH.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from tqdm import tqdm

from model.perceptual import Perceptual
from train.augment import View
from train.checkpoint import Base
from train.config import LossWeights, OptimiserConfig
from train.data import Faces, faces_in_view, to_pixels, to_tensor
from train.learner import follow_, freeze, make_adam
from train.losses import content_loss
from train.order import spread
from train.person import (
    Kind,
    Person,
    PersonalDiscriminator,
    PersonalGenerator,
    packed_generator,
)
from train.step import NonFiniteError, picture_terms, sum_terms, verdict_terms

FEWEST_TO_CHOOSE = 4
"""With fewer frames none can be spared to choose the step at which to stop."""

THUMBNAIL_PX = 96
LANDMARKS_KEPT = 64
ROWS_SHOWN = 4
SOURCES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a person is learned."""

    steps: int | None = None
    """Steps at most; without it 300, or 125 where there are fewer than 4 frames."""
    check_every: int = 20
    """Steps between two looks at the frames that choose where to stop."""
    batch_size: int = 8
    """Frames in a step, or as many as there are."""
    lr_generator: float = 5e-4
    """Learning rate of the generator."""
    lr_psi: float = 2e-2
    """Learning rate of psi'."""
    lr_discriminator: float = 4e-4
    """Learning rate of the discriminator and w'."""
    discriminator_turns: int = 2
    """Discriminator turns in a step."""
    ema: float = 0.972
    """Decay of the averaged generator that is kept."""
    augment: bool = True
    """Turn, zoom and shift frames and rasters alike."""
    seed: int = 0
    """Decides which frames a step sees, and how."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the networks."""

    def __post_init__(self) -> None:
        for name in ("lr_generator", "lr_psi", "lr_discriminator"):
            rate = getattr(self, name)
            if not (rate >= 0 and math.isfinite(rate)):
                raise ValueError(f"tuning.{name} is {rate}: give a finite rate of 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"tuning.ema is {self.ema}: give a decay from 0 to below 1")
        if self.seed < 0:
            raise ValueError(f"tuning.seed is {self.seed}: give 0 or more")
        for name in ("check_every", "batch_size", "discriminator_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"tuning.{name} is {getattr(self, name)}: give at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"tuning.steps is {self.steps}: give at least 1")

    def num_steps(self, shots: int) -> int:
        """Return the steps at most for T = shots frames."""
        return self.steps or (300 if shots >= FEWEST_TO_CHOOSE else 125)


@dataclass(frozen=True, kw_only=True)
class Personal:
    """A person's own generator, in eval mode, and how it came about."""

    generator: PersonalGenerator
    e: Float32[Tensor, " d"]
    step: int
    metrics: dict[str, float]

    def as_person(self, name: str, kind: Kind, base: Base, faces: Faces) -> Person:
        """Return what the person's file holds."""
        thumbnail = cv2.resize(
            faces.frames[0], (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA
        )
        kept = list(spread(range(len(faces)), LANDMARKS_KEPT))
        return Person(
            name=name,
            kind=kind,
            base=str(base.path.resolve()),
            base_sha256=base.sha256,
            model=base.model,
            face=base.face,
            e=self.e.cpu(),
            psi=self.generator.psi.detach().cpu(),
            landmarks=faces.landmarks[kept],
            thumbnail=thumbnail.astype(np.uint8, copy=False),
            generator=packed_generator(self.generator) if kind == "full" else None,
            step=self.step,
            metrics=self.metrics,
        )


def divide(num_frames: int) -> tuple[list[int], list[int]]:
    """Return the frames to train on, and the quarter that chooses the step, if any."""
    held = spread(range(num_frames), num_frames // 4 if num_frames >= FEWEST_TO_CHOOSE else 0)
    return [n for n in range(num_frames) if n not in held], list(held)


@torch.no_grad()
def embed(base: Base, faces: Faces, device: torch.device) -> Personal:
    """Return the feed-forward person: e is the mean over these frames, and psi' = P e.

    For a person that isn't trained that is all T frames, as in the paper (section 3.4). A trained
    one starts from, and keeps, the e of the frames it is trained on: those that choose the step and
    are told about as held out would else have had a part in it.
    """
    x, y = _tensors(faces, device)
    e = base.embedder.to(device)(x[None], y[None])
    psi = base.generator.to(device).psi(e)[0]
    generator = freeze(PersonalGenerator(base.generator, psi))
    return Personal(generator=generator, e=e[0].float(), step=0, metrics={})


def fine_tune(
    embedded: Personal,
    base: Base,
    faces: Faces,
    perceptual: Perceptual,
    tuning: Tuning,
    *,
    light: bool = False,
) -> Personal:
    """Train a copy of the base on the person's frames; keep its best step by the held-out ones.

    `embedded` is the start, made of the frames to train on (see `divide`) alone.
    `light` trains psi' alone. Raises NonFiniteError where the loss leaves the finite numbers.
    """
    device = embedded.e.device
    trained, held = divide(len(faces))
    weights = LossWeights(**base.loss)
    generator = copy.deepcopy(embedded.generator).requires_grad_(True).train()
    discriminator = PersonalDiscriminator(base.discriminator.to(device), embedded.e)
    discriminator.requires_grad_(True).train()
    average = freeze(copy.deepcopy(generator))
    if light:
        generator.generator.requires_grad_(False).eval()
    optimisers = _optimisers(generator, discriminator, tuning, light)

    watched = _tensors(faces.take(held or trained), device)
    first = _unlikeness(average, *watched, perceptual, weights)
    best, best_step, best_state = first, 0, copy.deepcopy(average.state_dict())
    num_steps = tuning.num_steps(len(faces))
    batches = _batches(faces.take(trained), tuning, device)
    with tqdm(range(1, num_steps + 1), unit="step", desc="fine-tuning", disable=None) as bar:
        for step in bar:
            _step(generator, discriminator, optimisers, next(batches), perceptual, weights, tuning)
            follow_(average, generator, tuning.ema)
            if step % tuning.check_every and step < num_steps:
                continue
            now = _unlikeness(average, *watched, perceptual, weights)
            said = f"unlikeness {first:.3g} -> {now:.3g}"
            bar.set_postfix_str(said)
            if bar.disable:
                print(f"step {step} of {num_steps}, {said}", flush=True)
            if now < best or not held:
                best, best_step, best_state = now, step, copy.deepcopy(average.state_dict())
    average.load_state_dict(best_state)
    where = "held_out" if held else "trained"
    metrics = {f"{where}/before": first, f"{where}/after": best, "frames": float(len(faces))}
    return replace(embedded, generator=average, step=best_step, metrics=metrics)


def picture_of(faces: Faces, *persons: Personal) -> UInt8[np.ndarray, "h w 3"]:
    """Draw rows of sources | driving raster | target | one column for each way of making a person.

    Targets are frames that were neither embedded nor trained on, where there are any.
    """
    device = persons[0].e.device
    trained, held = divide(len(faces))
    shown = [(held or trained)[n] for n in spread(range(len(held or trained)), ROWS_SHOWN)]
    sources = faces.frames[[trained[n] for n in spread(range(len(trained)), SOURCES_SHOWN)]]
    y = to_tensor(torch.from_numpy(faces.rasters[shown])).to(device)
    columns = [faces.rasters[shown], faces.frames[shown]]
    with torch.no_grad():
        columns += [to_pixels(personal.generator(y)) for personal in persons]
    rows = [np.concatenate([*sources, *row], axis=1) for row in zip(*columns, strict=True)]
    return np.concatenate(rows, axis=0)


Pair = tuple[Float32[Tensor, "b 3 h w"], Float32[Tensor, "b 3 h w"]]
Optimisers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


def _optimisers(
    generator: PersonalGenerator,
    discriminator: PersonalDiscriminator,
    tuning: Tuning,
    light: bool,
) -> Optimisers:
    """Build both over what the personal networks hold by now: psi' and w' are among it."""
    adam = OptimiserConfig(beta1=0.5)
    groups = [{"params": [generator.psi], "lr": tuning.lr_psi}]
    if not light:
        groups.append({"params": [*generator.generator.parameters()], "lr": tuning.lr_generator})
    return (
        make_adam(groups, tuning.lr_generator, adam),
        make_adam(discriminator.parameters(), tuning.lr_discriminator, adam),
    )


def _step(
    generator: PersonalGenerator,
    discriminator: PersonalDiscriminator,
    optimisers: Optimisers,
    batch: Pair,
    perceptual: Perceptual,
    weights: LossWeights,
    tuning: Tuning,
) -> None:
    """Take one generator turn and the discriminator turns that judge its picture."""
    x, y = batch
    cast = torch.autocast(x.device.type, torch.bfloat16, enabled=tuning.precision == "bf16")
    of_generator, of_discriminator = optimisers
    with cast:
        x_hat = generator(y)
        terms = picture_terms(
            x, y, x_hat, judge=discriminator, perceptual=perceptual, weights=weights
        )
    learned = [p for group in of_generator.param_groups for p in group["params"]]
    _update(of_generator, sum_terms(terms), learned)
    for _ in range(tuning.discriminator_turns):
        with cast:
            verdict, _, _ = verdict_terms(x, y, x_hat.detach(), judge=discriminator)
        _update(of_discriminator, sum_terms(verdict), list(discriminator.parameters()))


def _update(optimiser: torch.optim.Optimizer, loss: Tensor, learned: list[Tensor]) -> None:
    """Move these parameters alone; the other side's take no gradient from this loss."""
    if not math.isfinite(loss.item()):
        raise NonFiniteError(
            f"the loss of fine-tuning is {loss.item()}: try smaller learning rates "
            "(--tuning.lr-generator, --tuning.lr-discriminator, --tuning.lr-psi)"
        )
    optimiser.zero_grad()
    loss.backward(inputs=learned)
    optimiser.step()


def _batches(faces: Faces, tuning: Tuning, device: torch.device) -> Iterator[Pair]:
    """Yield frames in random order, every one as often as the others, each in a view of its own."""
    random = np.random.default_rng(tuning.seed)
    size = min(tuning.batch_size, len(faces))
    waiting: list[int] = []
    drawn = 0
    while True:
        while len(waiting) < size:
            waiting += random.permutation(len(faces)).tolist()
        chosen, waiting = faces.take(waiting[:size]), waiting[size:]
        if tuning.augment:
            px = chosen.frames.shape[1]
            views = [View.draw(tuning.seed, drawn + n, px).in_place() for n in range(size)]
            chosen = faces_in_view(chosen, views)
        drawn += size
        yield _tensors(chosen, device)


@torch.no_grad()
def _unlikeness(
    generator: PersonalGenerator,
    x: Float32[Tensor, "b 3 h w"],
    y: Float32[Tensor, "b 3 h w"],
    perceptual: Perceptual,
    weights: LossWeights,
) -> float:
    """Return the content and L1 terms of these frames: what is left to learn of a person."""
    x_hat = generator(y)
    content = content_loss(perceptual(x_hat), perceptual(x), perceptual.layer_weights)
    return (weights.content * content + weights.l1 * (x - x_hat).abs().mean()).item()


def _tensors(faces: Faces, device: torch.device) -> Pair:
    x, y = (torch.from_numpy(pixels).to(device) for pixels in (faces.frames, faces.rasters))
    return to_tensor(x), to_tensor(y)
