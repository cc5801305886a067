"""A personal model + a driving video -> a film of that person, moving as the driver does.

    python train/drive.py --person people/ada.pt --driver clips/bob.mp4 --output ada-as-bob.mp4

Any face drives any person: the driver's landmarks are fitted to the person's face. Rate and sound
are the driver's. The film says in its metadata that it is synthetic.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, Float64, UInt8
from tqdm import tqdm

from pipeline.align import Aligner, Box
from pipeline.config import DecodeConfig
from pipeline.crop import Square, crop, square_of, to_crop
from pipeline.decode import iter_frames
from pipeline.rasterize import draw
from pipeline.video_reader import UnreadableError, video_info
from train.data import to_pixels, to_tensor
from train.entry import claim_output, said_plainly
from train.film import Film
from train.motion import adapt, hold, smooth
from train.person import Device, Person, PersonalGenerator, aligner_of, load_generator, load_person
from train.world import connect

CHUNK_FRAMES = 128
"""Driver frames that are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class DriveConfig:
    """Drive a person with a video."""

    person: Path
    """The person's file, from train/finetune.py."""
    driver: Path
    """A video of anybody's face."""
    output: Path
    """The film to write, an mp4."""
    base: Path | None = None
    """The person's base, where it isn't at the path in the file. A full person needs none."""
    absolute: bool = False
    """Draw the driver's own landmarks, not fitted to the person: for driving with oneself."""
    side_by_side: bool = False
    """Show driver, raster and film beside each other."""
    smooth_s: float = 0.05
    """How far in time landmarks are smoothed, in seconds; 0 leaves them as found."""
    batch_size: int = 16
    """Frames drawn at once."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the generator."""
    weights_dir: str | None = None
    """Folder with the fan landmark backend's weights, where torch hub's cache lacks them."""
    device: Device = "auto"
    """Where landmarks are found."""

    def __post_init__(self) -> None:
        if self.output.suffix.lower() != ".mp4":
            raise ValueError(f"output is {self.output}: give a name that ends in .mp4")
        if not (self.smooth_s >= 0 and math.isfinite(self.smooth_s)):
            raise ValueError(f"smooth_s is {self.smooth_s}: give 0 or more seconds")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What a driver does: landmarks in pixels of its frames, and where no face was found."""

    points: Float[np.ndarray, "n 68 2"]
    found: Bool[np.ndarray, " n"]
    pts_s: Float64[np.ndarray, " n"]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, make the film, and say what it is."""
    started = time.monotonic()
    with said_plainly("drive"), connect() as world:
        config = tyro.cli(DriveConfig, args=argv, description=__doc__)
        inputs = [config.person, config.driver, *([config.base] if config.base else [])]
        claim_output(config.output, inputs)
        person = load_person(config.person)
        generator = load_generator(person, config.base).to(world.device)
        motion = drive(config, person, generator)
    took_s = time.monotonic() - started
    num_frames, held = len(motion.pts_s), int((~motion.found).sum())
    print(
        f"{config.output}: {num_frames} frames at {video_info(config.output).fps:.4g} fps, "
        f"{held} held without a face, {num_frames / took_s:.1f} frames/s, {took_s:.0f} s"
    )


def drive(config: DriveConfig, person: Person, generator: PersonalGenerator) -> Motion:
    """Write the film; return the driver's motion as it was found."""
    aligner = aligner_of(person.face, weights_dir=config.weights_dir, device=config.device)
    motion = find_motion(config.driver, aligner)
    points, square = steer(motion, person, config)
    px = person.model.image_px
    beside = driver_views(config.driver, square, px) if config.side_by_side else None
    with Film(config.output, config.driver) as film:
        drawn = draw_person(generator, points, config)
        bar = tqdm(drawn, total=len(points), unit="frame", desc="drawing", disable=None)
        for (raster, picture), pts_s in zip(bar, motion.pts_s, strict=True):
            shown = [picture] if beside is None else [next(beside), raster, picture]
            film.add(np.concatenate(shown, axis=1), float(pts_s))
    return motion


def steer(
    motion: Motion, person: Person, config: DriveConfig
) -> tuple[Float[np.ndarray, "n 68 2"], Square]:
    """Return every frame's landmarks in pixels of the film, and the square the driver is seen in.

    Raises ValueError for a driver without a face.
    """
    steady = smooth(hold(motion.points, motion.found), motion.pts_s, config.smooth_s)
    square = square_of(motion.points[motion.found], person.face.crop_margin)
    points = to_crop(steady, square, person.model.image_px)
    if not config.absolute:
        points = adapt(points, motion.found, person.landmarks)
    return points, square


def find_motion(driver: Path, aligner: Aligner) -> Motion:
    """Find the landmarks of every frame, of one face throughout; the frames are not kept."""
    points, found, times = [], [], []
    last: Box | None = None
    with tqdm(unit="frame", desc="landmarks", disable=None) as bar:
        for chunk in _chunks(driver):
            seen = aligner.landmarks(np.stack([pixels for pixels, _ in chunk]), last)
            if seen.found.any():
                left, top, right, bottom = seen.boxes[seen.found][-1].tolist()
                last = left, top, right, bottom
            points.append(seen.points)
            found.append(seen.found)
            times += [pts_s for _, pts_s in chunk]
            bar.update(len(chunk))
    if not times:
        raise ValueError(f"--driver {driver} holds no frame that can be decoded")
    return Motion(points=np.concatenate(points), found=np.concatenate(found), pts_s=np.array(times))


def _chunks(driver: Path) -> Iterator[list[tuple[UInt8[np.ndarray, "h w 3"], float]]]:
    """Yield the driver's frames, with their times, a few at once."""
    if not driver.is_file():
        raise ValueError(f"--driver {driver} is not a file: give a video of somebody's face")
    frames = iter_frames(driver, DecodeConfig().decode_px)
    try:
        while chunk := list(islice(frames, CHUNK_FRAMES)):
            yield chunk
    except UnreadableError as error:
        raise ValueError(f"--driver {driver} can't be used: {error}") from error


@torch.no_grad()
def draw_person(
    generator: PersonalGenerator, points: Float[np.ndarray, "n 68 2"], config: DriveConfig
) -> Iterator[tuple[UInt8[np.ndarray, "p p 3"], UInt8[np.ndarray, "p p 3"]]]:
    """Yield every frame's raster and the person's picture for it, drawn batch by batch."""
    device, px = generator.psi.device, generator.generator.config.image_px
    for start in range(0, len(points), config.batch_size):
        batch = points[start : start + config.batch_size]
        rasters = np.stack([draw(shape, px) for shape in batch])
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            x_hat = generator(to_tensor(torch.from_numpy(rasters).to(device)))
        yield from zip(rasters, to_pixels(x_hat), strict=True)


def driver_views(driver: Path, square: Square, px: int) -> Iterator[UInt8[np.ndarray, "p p 3"]]:
    """Yield the driver's frames as the model would have seen them."""
    for pixels, _ in iter_frames(driver, DecodeConfig().decode_px):
        yield crop(pixels, square, px)


if __name__ == "__main__":
    main()
