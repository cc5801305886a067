"""What a meta-training run has learned, on people it never saw.

    python tests/bench/learning.py --shards DIR --runs RUN [RUN ...] [--sheet PICTURE.png]

For every held-out video, the embedding comes from K frames of its first half and each target from
its second half, feed-forward, by the averaged networks. Landmark errors (NME) are in inter-ocular
distances, found by dlib, which no loss knows; `floor` is what it finds on the real target, and
`random source` the error of showing a source frame instead, by which a video is said to move.
`wrong e` is the mean SSIM with another held-out person's embedding. The spectrum is the energy
above half the Nyquist frequency, as a share of the real frames'.

For every checkpoint of the run that is still there, the discriminator ranks each real target
against what the generator in training makes of it (`ranked right`), and the averaged one
(`averaged`), with W_i = e as fine-tuning begins; `pull / content` is the norm of its score's
gradient at x_hat over the content term's, from the run's log.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from model.config import ModelConfig
from model.discriminator import Discriminator
from model.embedder import Embedder
from model.generator import Generator
from pipeline.align import Aligner, make_aligner
from pipeline.config import AlignConfig
from train import checkpoint
from train.data import Faces, HeldOut, Shards, to_pixels, to_tensor
from train.metrics import high_frequency_energy, landmark_error, ssim
from train.report import save_picture

MOVING = 0.06
"""Random-source NME above which a video is said to move."""
SEEN_PX = 256
"""Side to which pictures are enlarged for dlib, which finds no face in smaller ones."""
SHEET_TARGETS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Judge runs on held-out people."""

    shards: Path = Path("data/shards")
    """Folder of shards with held-out people."""
    runs: tuple[Path, ...] = (Path("runs/meta"),)
    """Run folders of train/meta_train.py."""
    num_sources: int = 8
    """K."""
    num_targets: int = 16
    """Frames judged of each video."""
    sheet: Path | None = None
    """Where to save targets and outputs of the first run's people, side by side."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A held-out video, read; targets share nothing with the sources."""

    key: str
    person: str
    sources: Faces
    targets: Faces


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Networks of one checkpoint, in eval mode."""

    embedder: Embedder
    generator: Generator
    discriminator: Discriminator

    def embed(self, clip: Clip) -> Float[Tensor, "1 d"]:
        """Return the mean embedding of a clip's sources."""
        x, y = tensors(clip.sources)
        return self.embedder(x[None], y[None])

    def draw(self, clip: Clip, e: Float[Tensor, "1 d"]) -> Float[Tensor, "n 3 h w"]:
        """Return G(y, P e) for every target of a clip."""
        _, y = tensors(clip.targets)
        return self.generator(y, self.generator.psi(e).expand(len(y), -1)).float()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is found of one clip; medians or means over its targets."""

    moves: float
    nme: float
    floor: float
    ssim: float
    ssim_wrong: float
    spectrum: float


def read_clip(shards: Shards, held_out: HeldOut) -> Clip:
    """Read a held-out video's sources and targets."""
    return Clip(
        key=held_out.entry.key,
        person=held_out.entry.person,
        sources=shards.read(held_out.entry, held_out.sources),
        targets=shards.read(held_out.entry, held_out.targets),
    )


def tensors(faces: Faces) -> tuple[Float32[Tensor, "n 3 h w"], Float32[Tensor, "n 3 h w"]]:
    """Return frames and rasters as the networks take them."""
    frames, rasters = torch.from_numpy(faces.frames), torch.from_numpy(faces.rasters)
    return to_tensor(frames), to_tensor(rasters)


def load(folder: Path, *, averaged: bool) -> Networks:
    """Load a checkpoint: the averaged embedder and generator, or those in training."""
    model = checkpoint.load(folder / "model.pt")
    state = model if averaged else checkpoint.load(folder / "resume.pt")
    config = ModelConfig(**model["model"])
    networks = Embedder(config), Generator(config), Discriminator(config)
    states = state["embedder"], state["generator"], model["discriminator"]
    for network, weights in zip(networks, states, strict=True):
        network.load_state_dict(weights)
        network.eval()
    return Networks(embedder=networks[0], generator=networks[1], discriminator=networks[2])


def find(aligner: Aligner, frames: UInt8[np.ndarray, "n p p 3"], expected: np.ndarray) -> float:
    """Return the median NME of the landmarks found in frames, each looked at by itself."""
    size, scale = (SEEN_PX, SEEN_PX), SEEN_PX / frames.shape[1]
    errors = []
    for frame, points in zip(frames, expected, strict=True):
        large = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
        seen = aligner.landmarks(np.asarray(large, np.uint8)[None])
        errors.append(landmark_error(seen.points / scale, points[None], seen.found)[0])
    return float(np.median(errors))


def random_source_error(clip: Clip) -> float:
    """Return the median over targets of the mean NME of showing a source frame instead."""
    of_targets = []
    for points in clip.targets.landmarks:
        expected = np.repeat(points[None], len(clip.sources), axis=0)
        of_targets.append(landmark_error(clip.sources.landmarks, expected).mean())
    return float(np.median(of_targets))


def judge(networks: Networks, clips: Sequence[Clip], aligner: Aligner) -> list[Verdict]:
    """Judge every clip, with its own embedding and with those of all other people."""
    embeddings = [networks.embed(clip) for clip in clips]
    verdicts = []
    for clip, e in zip(clips, embeddings, strict=True):
        x, _ = tensors(clip.targets)
        x_hat = networks.draw(clip, e)
        wrong = [
            ssim(networks.draw(clip, other), x).mean().item()
            for whose, other in zip(clips, embeddings, strict=True)
            if whose.person != clip.person
        ]
        points = clip.targets.landmarks
        verdicts.append(
            Verdict(
                moves=random_source_error(clip),
                nme=find(aligner, to_pixels(x_hat), points),
                floor=find(aligner, clip.targets.frames, points),
                ssim=ssim(x_hat, x).mean().item(),
                ssim_wrong=statistics.mean(wrong),
                spectrum=(
                    high_frequency_energy(x_hat).mean() / high_frequency_energy(x).mean()
                ).item(),
            )
        )
    return verdicts


def score_gaps(networks: Networks, clips: Sequence[Clip]) -> Float[Tensor, " n"]:
    """Return r - r_hat for every pair of a real target and the picture generated for it."""
    gaps = []
    for clip in clips:
        x, y = tensors(clip.targets)
        e = networks.embed(clip)
        w = e.expand(len(x), -1)
        r, _ = networks.discriminator(x, y, w)
        r_hat, _ = networks.discriminator(networks.draw(clip, e), y, w)
        gaps.append(r - r_hat)
    return torch.cat(gaps)


def print_people(clips: Sequence[Clip], verdicts: Sequence[Verdict]) -> None:
    """Print a line a clip, and medians."""
    titles = ("random source", "NME", "floor", "SSIM", "wrong e", "spectrum")
    print(f"{'':40}" + "".join(f"{title:>15}" for title in titles))
    rows = [(clip.key, list(vars(v).values())) for clip, v in zip(clips, verdicts, strict=True)]
    medians = [statistics.median(column) for column in zip(*(row for _, row in rows), strict=True)]
    for name, row in [*rows, ("median", medians)]:
        star = "*" if name != "median" and row[0] > MOVING else " "
        print(f"{name[:38]:38} {star}" + "".join(f"{value:15.3f}" for value in row))
    print("* moves")


def print_discriminator(run: Path, clips: Sequence[Clip]) -> None:
    """Print how the discriminator ranks held-out pairs at each checkpoint, and what it pulls."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    pulls = {
        line["step"]: line["pull/adversarial"] / line["pull/content"]
        for line in lines
        if line.get("pull/content")
    }
    titles = f"{'ranked right':>15}{'median gap':>13}{'averaged':>15}{'pull / content':>17}"
    print(f"{'step':>8}{titles}")
    before = 0
    for folder in checkpoint.steps(run):
        step = int(folder.name.removeprefix("step-"))
        training, averaged = (
            score_gaps(load(folder, averaged=which), clips) for which in (False, True)
        )
        shares = [(gaps > 0).float().mean().item() for gaps in (training, averaged)]
        since = [pull for at, pull in pulls.items() if before < at <= step]
        pull = f"{statistics.median(since):17.3f}" if since else ""
        print(f"{step:8}{shares[0]:15.2f}{training.median():13.3f}{shares[1]:15.2f}{pull}")
        before = step


def save_sheet(path: Path, networks: Networks, clips: Sequence[Clip]) -> None:
    """Save, for each clip: a source, then targets with their outputs beside them."""
    rows = []
    for clip in clips:
        outputs = to_pixels(networks.draw(clip, networks.embed(clip)))
        places = np.linspace(0, len(outputs) - 1, SHEET_TARGETS).astype(int)
        tiles = [clip.sources.frames[0]]
        for place in places:
            tiles += [clip.targets.frames[place], outputs[place]]
        rows.append(np.concatenate(tiles, axis=1))
    sheet = np.concatenate(rows, axis=0)
    save_picture(path, np.repeat(np.repeat(sheet, 2, axis=0), 2, axis=1))


@torch.no_grad()
def main() -> None:
    """Judge each run's last checkpoint, and its discriminator at all of them."""
    settings = tyro.cli(Settings)
    aligner = make_aligner(AlignConfig(backend="dlib"))
    for number, run in enumerate(settings.runs):
        last = checkpoint.steps(run)[-1]
        networks = load(last, averaged=True)
        shards = Shards(settings.shards, image_px=networks.generator.config.image_px)
        held_out = shards.held_out(
            "val", num_sources=settings.num_sources, num_targets=settings.num_targets
        )
        clips = [read_clip(shards, one) for one in held_out]
        print(f"{last}: {len(clips)} videos of held-out people, K = {settings.num_sources}")
        print_people(clips, judge(networks, clips, aligner))
        print_discriminator(run, clips)
        if settings.sheet and not number:
            save_sheet(settings.sheet, networks, clips)


if __name__ == "__main__":
    main()
