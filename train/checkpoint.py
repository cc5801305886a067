"""Checkpoints: one folder a step, written beside and renamed once.

    checkpoints/step-000001200/
      model.pt     what a user takes away: EMA embedder and generator, the discriminator,
                   and what they are bound to
      resume.pt    what going on needs besides: raw networks, optimisers, counters
      rows.pt      W and its moments
      index.json   the training videos in the order of W's rows
    pinned/        models that persons refer to, by their hash

Tensors and primitives only, read with `weights_only=True`; loading is strict.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.discriminator import Discriminator
from model.embedder import Embedder
from model.generator import Generator
from model.perceptual import Perceptual
from pipeline.align import file_sha256
from pipeline.config import FaceSpec

SCHEMA = 1

MODEL_HOLDS = frozenset(
    ["discriminator", "embedder", "face", "generator", "loss", "model", "perceptual"]
)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A meta-learned model as fine-tuning, driving and evaluating take it."""

    path: Path
    sha256: str
    model: ModelConfig
    face: FaceSpec
    perceptual: dict[str, Any]
    """Name and weights' sha256 of the perceptual network that the content loss used."""
    loss: dict[str, float]
    """Weights of the generator's terms, which fine-tuning takes over."""
    embedder: Embedder
    generator: Generator
    discriminator: Discriminator


def save_step(
    run: Path,
    step: int,
    *,
    model: Mapping[str, Any],
    resume: Mapping[str, Any],
    rows: Mapping[str, Any],
    keys: list[str],
) -> Path:
    """Write one step's folder under run/checkpoints, whole or not at all, and return it."""
    final = folder_of(run, step)
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(".tmp-*"):
        shutil.rmtree(stale)
    folder = final.parent / f".tmp-{final.name}"
    folder.mkdir()
    try:
        _save(folder / "model.pt", {"schema": SCHEMA, **model})
        _save(folder / "resume.pt", resume)
        _save(folder / "rows.pt", rows)
        _write_synced(folder / "index.json", json.dumps(keys, indent=0).encode())
        _sync_folder(folder)
        folder.rename(final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _sync_folder(final.parent)
    return final


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step's folder holds."""

    model: dict[str, Any]
    resume: dict[str, Any]
    rows: dict[str, Any]
    keys: list[str]


def load_step(folder: Path) -> Step:
    """Read a step's folder onto the CPU; raises ValueError that names a file that isn't right."""
    index = folder / "index.json"
    try:
        try:
            keys = json.loads(index.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{index} can't be read: {error}") from error
        model, resume, rows = (load(folder / f"{part}.pt") for part in ("model", "resume", "rows"))
    except ValueError as error:
        raise ValueError(
            f"{error}. Remove {folder} to go on from the checkpoint before it, if any"
        ) from error
    return Step(model=model, resume=resume, rows=rows, keys=keys)


def folder_of(run: Path, step: int) -> Path:
    """Name the folder of a step."""
    return run / "checkpoints" / f"step-{step:09d}"


def steps(run: Path) -> list[Path]:
    """List a run's finished checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def drop_old(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for folder in steps(run)[:-keep]:
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def load(path: Path) -> dict[str, Any]:
    """Read one file of a checkpoint onto the CPU; raises ValueError for a file that is not one."""
    unreadable = f"{path} is not a readable checkpoint file"
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{unreadable}: it is cut short, or something else altogether")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{unreadable}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{unreadable}: it holds a {type(state).__name__}, expected names")
    return state


def find_model(path: Path, sha256: str = "") -> Path:
    """Resolve a run folder, a checkpoint folder or a file to its model.pt.

    Of a run it is the newest one, or the pinned one of this hash.
    """
    if path.is_file():
        return path
    if (path / "model.pt").is_file():
        return path / "model.pt"
    if sha256 and _pinned(path, sha256).is_file():
        return _pinned(path, sha256)
    finished = steps(path)
    if not finished:
        raise ValueError(
            f"{path} holds no checkpoint: give --base a run folder, a checkpoint folder or a "
            "model.pt (`torchrun train/meta_train.py --run-dir DIR` makes one)"
        )
    return finished[-1] / "model.pt"


def face_of(model: Mapping[str, Any]) -> FaceSpec:
    """Return the crop, raster and landmark backend that a model.pt is bound to."""
    return FaceSpec.from_dict(model["face"])


def require_same_weights(perceptual: Perceptual, saved: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError unless the content loss has the weights that a model was trained with."""
    if perceptual.weights_sha256 != saved["weights_sha256"]:
        raise ValueError(
            f"{where} was trained with other weights of {perceptual.name} than are here: expected "
            f"sha256 {saved['weights_sha256']}, found {perceptual.weights_sha256}; name the files "
            "it was trained with"
        )


def pin(base: Base) -> Path:
    """Keep a run's model where dropping old steps doesn't reach it; return that place.

    A person that shares its base's generator needs that very file. A model that lies in no run is
    its user's to keep, and stays where it is.
    """
    model = base.path.resolve()
    if model.parent.parent.name != "checkpoints":
        return model
    place = _pinned(model.parents[2], base.sha256)
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        try:
            os.link(model, place)
        except OSError:  # a file system without links
            temporary = place.with_name(f".tmp-{place.name}")
            shutil.copyfile(model, temporary)
            temporary.rename(place)
    return place


def load_base(path: Path) -> Base:
    """Build the networks of a meta-learned model in eval mode on the CPU."""
    path = find_model(path)
    state = load(path)
    missing = sorted(MODEL_HOLDS - state.keys())
    if missing:
        found = "is a person's file" if "psi" in state else f"lacks {', '.join(missing)}"
        raise ValueError(f"{path} {found}: expected a meta-learned model, a model.pt")
    if state.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {state.get('schema')}, this version reads {SCHEMA}")
    try:
        config = ModelConfig(**state["model"])
    except TypeError as error:
        raise ValueError(f"{path} was made by another version: {error}") from error
    networks = Embedder(config), Generator(config), Discriminator(config)
    for network, name in zip(networks, ("embedder", "generator", "discriminator"), strict=True):
        network.load_state_dict(state[name])
        network.eval()
    embedder, generator, discriminator = networks
    return Base(
        path=path,
        sha256=file_sha256(path),
        model=config,
        face=face_of(state),
        perceptual=state["perceptual"],
        loss=state["loss"],
        embedder=embedder,
        generator=generator,
        discriminator=discriminator,
    )


def save_file(path: Path, state: Mapping[str, Any]) -> None:
    """Write one file of tensors and primitives, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        _save(temporary, state)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _pinned(run: Path, sha256: str) -> Path:
    return run / "pinned" / f"{sha256}.pt"


def _save(path: Path, state: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch hides what the disk said
        free_mb = shutil.disk_usage(path.parent).free >> 20
        raise OSError(f"could not write {path}, with {free_mb} MB free there: {error}") from error


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
