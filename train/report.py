"""What a run shows of itself: progress, JSON lines, TensorBoard, a fixed panel of pictures."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train.data import VisitBatch, to_pixels
from train.learner import Learner
from train.validate import feed_forward

SOURCES_SHOWN = 3


class Reporter:
    """Writes log.jsonl, tensorboard/ and panels/ in the run folder, and to the terminal.

    Only the main rank has one.
    """

    def __init__(self, run: Path, *, first_step: int, first_visit: int, last_step: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._run = run
        log = run / "log.jsonl"
        if log.exists():
            log.write_text("".join(_until(first_step, log.read_text())))
        self._log = log.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_visit + 1)
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            disable=self._plain,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._board.close()
        self._log.close()

    def settings(self, resolved: Mapping[str, object]) -> None:
        """Save the resolved config."""
        (self._run / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")

    def advance(self) -> None:
        self._bar.update()

    def line(self, step: int, visits: int, values: Mapping[str, float]) -> None:
        """Log one report: the step, the visits seen and every value by name."""
        record = {"step": step, "visits": visits, **values}
        print(json.dumps({k: _short(v) for k, v in record.items()}), file=self._log, flush=True)
        for name, value in values.items():
            self._board.add_scalar(name, value, visits)
        said = f"step {step}  " + "  ".join(
            f"{name.removeprefix('loss/')} {value:.3g}"
            for name, value in values.items()
            if name.startswith(("loss/", "score/ranked", "speed/", "val/"))
        )
        self.say(said)

    def panel(
        self, step: int, visits: int, pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]]
    ) -> None:
        """Save the panel of each split as a PNG and to TensorBoard."""
        folder = self._run / "panels"
        folder.mkdir(exist_ok=True)
        for split, picture in pictures.items():
            save_picture(folder / f"{split}-{step:09d}.png", picture)
            save_picture(self._run / f"panel-{split}.png", picture)
            self._board.add_image(f"panel/{split}", picture, visits, dataformats="HWC")

    def say(self, text: str) -> None:
        """Print a line for people, above the bar if there is one."""
        if self._plain:
            print(text, flush=True)
        else:
            self._bar.write(text)


@torch.no_grad()
def make_panel(learner: Learner, batch: VisitBatch) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a row a person: sources | driving raster | target | output of the EMA networks."""
    x_hat, _ = feed_forward(learner.ema_embedder, learner.ema_generator, batch)
    rows = [
        np.concatenate(
            [*to_pixels(sources[:SOURCES_SHOWN]), *map(to_pixels, (raster, target, output))], axis=1
        )
        for sources, raster, target, output in zip(
            batch.sources, batch.target_raster, batch.target, x_hat, strict=True
        )
    ]
    return np.concatenate(rows, axis=0)


def save_picture(path: Path, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write an RGB picture as PNG."""
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path} could not be written")


def _until(step: int, log: str) -> list[str]:
    """Keep the lines up to a step: a run that was killed goes on from before its last ones."""
    whole = [line for line in log.splitlines(keepends=True) if line.endswith("}\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
