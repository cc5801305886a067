"""The meta-training loop: batches in, checkpoints and reports out.

Progress is counted in visits seen. With the seed it decides everything that comes next, so going
on after a stop is running the same command again.
"""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch._functorch.config

from model.perceptual import Perceptual, make_perceptual
from train import checkpoint
from train.config import MetaConfig
from train.data import Shards, VisitBatch, fixed_batch, make_loader
from train.learner import Learner, make_learner
from train.report import Reporter, make_panel
from train.step import NonFiniteError, meta_step
from train.stop import StopRequest
from train.validate import validate
from train.world import World

PANEL_PERSONS = 6


def train(config: MetaConfig, world: World) -> Path:
    """Train until the configured end or a stop; return the last checkpoint's folder."""
    started = time.monotonic()
    _require_divisible(config, world)
    shards = Shards(config.shards, image_px=config.model.image_px)
    perceptual = make_perceptual(
        config.perceptual.name,
        weights_dir=config.perceptual.weights_dir,
        vggface=config.perceptual.vggface,
    ).to(world.device)
    learner = make_learner(config, len(shards.train), world.device)
    step, visits = resume(learner, config, shards, perceptual)
    _require_one_start(learner, step, config, world)
    last_step = _last_step(config, len(shards.train))
    if config.compile:
        torch._functorch.config.donated_buffer = False  # the gauges go back through a graph twice
        for network in (learner.embedder, learner.generator, learner.discriminator, perceptual):
            network.compile()

    batches = _batches(config, shards, world, visits)
    panels = _panel_batches(shards, config, world) if world.is_main else {}
    stop = StopRequest()
    reporter = (
        Reporter(config.run, first_step=step, first_visit=visits, last_step=last_step)
        if world.is_main
        else nullcontext()
    )
    with reporter as report, stop.listening():
        if report:
            report.settings(primitives(config))
            if perceptual.name == "vgg" and not config.perceptual.vggface:
                report.say("content loss: VGG19 alone, as --perceptual.vggface names no file")
        while True:
            # Look at held-out people and save, on schedule and at the end.
            out_of_time = config.max_minutes is not None and (
                time.monotonic() - started > 60 * config.max_minutes
            )
            done = step >= last_step or world.any(stop.requested or out_of_time)
            if report and (done or step % config.panel_every == 0):
                report.panel(step, visits, {k: make_panel(learner, b) for k, b in panels.items()})
                report.line(step, visits, validate(learner, panels["val"]))
            if done or (step and step % config.checkpoint_every == 0):
                folder = save(learner, config, shards, perceptual, world, step, visits)
                if done:
                    return folder

            # Take one step; a report also gauges the health of the run.
            gauge = (step + 1) % config.report_every == 0
            tick = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - tick
            try:
                values = meta_step(
                    learner,
                    split_batch(batch, config.accumulate),
                    config,
                    perceptual=perceptual,
                    world=world,
                    step=step,
                    gauge=gauge,
                )
            except NonFiniteError as error:
                raise NonFiniteError(_explain(error, config.run, step + 1)) from error
            step, visits = step + 1, visits + config.data.batch_size

            # Tell how it goes.
            if report:
                report.advance()
                if gauge:
                    values["speed/step_s"] = time.perf_counter() - tick
                    values["speed/waited_s"] = waited_s
                    report.line(step, visits, values)


def resume(
    learner: Learner, config: MetaConfig, shards: Shards, perceptual: Perceptual
) -> tuple[int, int]:
    """Load the newest checkpoint of the run, if any; return the steps and visits done."""
    finished = checkpoint.steps(config.run)
    if not finished:
        return 0, 0
    newest = finished[-1]
    saved = checkpoint.load_step(newest)
    _require_same_run(config, saved.resume["config"], newest)
    _require_same_videos([video.key for video in shards.train], saved.keys, newest)
    shards.index.face.require_same(checkpoint.face_of(saved.model), str(newest))
    checkpoint.require_same_weights(perceptual, saved.model["perceptual"], newest)
    learner.load(saved.model, saved.resume, saved.rows)
    return saved.resume["step"], saved.resume["visits"]


def save(
    learner: Learner,
    config: MetaConfig,
    shards: Shards,
    perceptual: Perceptual,
    world: World,
    step: int,
    visits: int,
) -> Path:
    """Write a checkpoint on the main rank while the others wait; return its folder."""
    if world.is_main:
        checkpoint.save_step(
            config.run,
            step,
            model={
                "model": asdict(config.model),
                "face": shards.index.face.to_dict(),
                "perceptual": {
                    "name": perceptual.name,
                    "weights_sha256": perceptual.weights_sha256,
                },
                "loss": asdict(config.loss),
                "visits": visits,
                **learner.model_state(),
            },
            resume={
                "config": primitives(config),
                "step": step,
                "visits": visits,
                **learner.resume_state(),
            },
            rows=learner.rows.state_dict(),
            keys=[video.key for video in shards.train],
        )
        checkpoint.drop_old(config.run, config.keep)
    world.barrier()
    return checkpoint.folder_of(config.run, step)


def split_batch(batch: VisitBatch, parts: int) -> list[VisitBatch]:
    """Cut a batch into equal parts along its visits; their number must be a multiple of `parts`."""
    size, rest = divmod(len(batch.keys), parts)
    assert size and not rest, f"{len(batch.keys)} visits in {parts} parts"
    return [
        replace(
            batch,
            **{
                field.name: getattr(batch, field.name)[start : start + size]
                for field in fields(batch)
            },
        )
        for start in range(0, size * parts, size)
    ]


def primitives(config: MetaConfig) -> dict:
    """Return the config as JSON would hold it, for the run folder and the checkpoint."""
    return json.loads(json.dumps(asdict(config), default=str))


def _require_divisible(config: MetaConfig, world: World) -> None:
    parts = world.size * config.accumulate
    if config.data.batch_size % parts:
        raise ValueError(
            f"a batch of {config.data.batch_size} visits can't be divided by {world.size} ranks "
            f"and {config.accumulate} parts each: make --data.batch-size a multiple of {parts}"
        )


def _require_one_start(learner: Learner, step: int, config: MetaConfig, world: World) -> None:
    """Raise on every rank where they don't begin with the same step and weights."""
    if world.size > 1 and not world.all_equal(learner.fingerprint(step)):
        raise ValueError(
            f"the ranks don't start alike: this one is at step {step} of {config.run}. Give "
            "--run-dir a folder that every node shares, and all ranks the same settings"
        )


def _last_step(config: MetaConfig, num_videos: int) -> int:
    """Return the step that completes the configured epochs, or max_steps where that is earlier."""
    last = -(-config.max_epochs * num_videos // config.data.batch_size)
    return last if config.max_steps is None else min(last, config.max_steps)


def _batches(config: MetaConfig, shards: Shards, world: World, visits: int) -> Iterator[VisitBatch]:
    return make_loader(
        shards,
        num_sources=config.data.num_sources,
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_visit=visits,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.data.num_workers,
        augment=config.data.augment,
        device=world.device,
    )


def _panel_batches(shards: Shards, config: MetaConfig, world: World) -> dict[str, VisitBatch]:
    return {
        split: fixed_batch(
            shards,
            split,
            num_sources=config.data.num_sources,
            num_visits=PANEL_PERSONS,
            device=world.device,
        )
        for split in ("train", "val")
    }


# Settings that may change between two sessions of one run: they don't decide what is learned.
_FREE = {
    "shards", "run", "max_epochs", "max_minutes", "max_steps", "report_every", "panel_every",
    "checkpoint_every", "keep", "accumulate", "channels_last", "compile", "data.num_workers",
    "rows.device", "perceptual.weights_dir", "perceptual.vggface",
}  # fmt: skip


def _require_same_run(config: MetaConfig, saved: dict, folder: Path) -> None:
    now, then = _flatten(primitives(config)), _flatten(saved)
    differing = [
        f"{name} was {then.get(name)} and is now {now.get(name)}"
        for name in sorted(now.keys() | then.keys())
        if name not in _FREE and now.get(name) != then.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} was trained with other settings: {'; '.join(differing)}. "
            "Go on with the same ones, or give --run-dir another folder"
        )


def _require_same_videos(now: list[str], then: list[str], folder: Path) -> None:
    if now == then:
        return
    gone, new = sorted(set(then) - set(now)), sorted(set(now) - set(then))
    raise ValueError(
        f"{folder} was trained on other videos: {len(gone)} are gone ({', '.join(gone[:3])}), "
        f"{len(new)} are new ({', '.join(new[:3])}). Give --shards the folder it was trained on"
    )


def _flatten(nested: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in nested.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


def _explain(error: NonFiniteError, run: Path, step: int) -> str:
    finished = checkpoint.steps(run)
    last = (
        f"the last good checkpoint is {finished[-1]}"
        if finished
        else "no checkpoint was written yet"
    )
    return f"step {step}: {error}; the step is in no checkpoint, {last}"
