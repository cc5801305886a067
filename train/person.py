"""A person: what a few frames add to a meta-learned model, and the file it is kept in.

    base + frames -> e, psi' -> [person] -> film

A *feed-forward* person is embedded and nothing more. A *light* one has psi' trained for it. A
*full* one has its own generator, which its file carries; the other two refer to their base's by its
hash.
"""

import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from model.config import ModelConfig
from model.discriminator import Discriminator
from model.generator import Generator
from model.spectral import fold_spectral_norm
from pipeline.align import Aligner, file_sha256, make_aligner
from pipeline.config import AlignConfig, Backend, FaceSpec
from pipeline.faces import require_aligner
from train.checkpoint import MODEL_HOLDS, find_model, load, load_base, save_file

SCHEMA = 1

Kind = Literal["feed-forward", "light", "full"]
Device = Literal["auto", "cpu", "cuda"]


class PersonalGenerator(nn.Module):
    """A copy of the generator with psi' in the place of P, started at P e (section 3.4)."""

    def __init__(self, generator: Generator, psi: Float[Tensor, " p"]) -> None:
        super().__init__()
        self.generator = copy.deepcopy(generator)
        del self.generator.P
        self.psi = nn.Parameter(psi.detach().clone())

    def forward(self, y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.generator(y, self.psi.expand(len(y), -1))


class PersonalDiscriminator(nn.Module):
    """A copy of the discriminator with w' = w0 + e in the place of w0 + W_i (section 3.4)."""

    def __init__(self, discriminator: Discriminator, e: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.discriminator = copy.deepcopy(discriminator)
        with torch.no_grad():
            self.discriminator.w0.add_(e)

    def forward(
        self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, " b"], tuple[Tensor, ...]]:
        nothing = torch.zeros_like(self.discriminator.w0).expand(len(x), -1)
        return self.discriminator(x, y, nothing)


@dataclass(frozen=True, kw_only=True)
class Person:
    """All that driving one person needs, but for the base's generator where `kind` shares it."""

    name: str
    kind: Kind
    base: str
    """Path of the base's model.pt when this person was made."""
    base_sha256: str
    model: ModelConfig
    face: FaceSpec
    e: Float32[Tensor, " d"]
    psi: Float32[Tensor, " p"]
    landmarks: Float32[np.ndarray, "n 68 2"]
    """Of the source frames, in pixels of the model's pictures."""
    thumbnail: UInt8[np.ndarray, "h w 3"]
    generator: dict[str, Tensor] | None
    """A full person's generator in half precision, spectral norm folded in, without P."""
    step: int
    """How many steps of fine-tuning were kept."""
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        if (self.kind == "full") != (self.generator is not None):
            raise ValueError(
                f"{self.name} is a {self.kind} person, but its generator "
                f"{'is missing' if self.generator is None else 'is given'}: only a full person "
                "carries one"
            )


def aligner_of(face: FaceSpec, *, weights_dir: str | None, device: Device) -> Aligner:
    """Load the landmark backend that a base or person is bound to; raise if it's another one."""
    aligner = make_aligner(
        AlignConfig(
            backend=cast(Backend, face.backend),
            detector=face.detector,
            weights_dir=weights_dir,
            device=device,
        )
    )
    require_aligner(face, aligner)
    return aligner


def save_person(path: Path, person: Person) -> None:
    """Write a person's file, whole or not at all: tensors and primitives only."""
    state = {field.name: getattr(person, field.name) for field in fields(person)}
    state |= {
        "model": asdict(person.model),
        "face": person.face.to_dict(),
        "landmarks": torch.from_numpy(person.landmarks),
        "thumbnail": torch.from_numpy(person.thumbnail),
    }
    save_file(path, {"schema": SCHEMA, **state})


def load_person(path: Path) -> Person:
    """Read a person's file; raise ValueError for one that isn't whole or of another schema."""
    if not path.is_file():
        raise ValueError(
            f"{path} is not a person's file: `torchrun train/finetune.py --person PERSON "
            f"--output {path}` makes one"
        )
    state = load(path)
    if state.keys() >= MODEL_HOLDS:
        raise ValueError(
            f"{path} is a meta-learned model, expected a person's file: "
            f"`torchrun train/finetune.py --person PERSON --base {path}` makes one"
        )
    schema = state.pop("schema", None)
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}: make it anew")
    names = {field.name for field in fields(Person)}
    if state.keys() != names:
        raise ValueError(f"{path} differs from a person's file in {sorted(state.keys() ^ names)}")
    try:
        model = ModelConfig(**state["model"])
    except TypeError as error:
        raise ValueError(f"{path} was made by another version, make it anew: {error}") from error
    state |= {
        "model": model,
        "face": FaceSpec.from_dict(state["face"]),
        "landmarks": state["landmarks"].numpy(),
        "thumbnail": state["thumbnail"].numpy(),
    }
    return Person(**state)


def packed_generator(personal: PersonalGenerator) -> dict[str, Tensor]:
    """Return the weights that a full person's file carries."""
    generator = fold_spectral_norm(copy.deepcopy(personal.generator))
    return {name: value.half().cpu() for name, value in generator.state_dict().items()}


def load_generator(person: Person, base: Path | None = None) -> PersonalGenerator:
    """Build what draws this person, in eval mode; `base` overrides the path of its base.

    A full person needs no base, but one that is given must be the person's all the same.
    """
    if person.generator is None:
        base = _base_of(person, Path(person.base) if base is None else base)
        personal = PersonalGenerator(load_base(base).generator, person.psi)
    else:
        if base is not None:
            _base_of(person, base)
        personal = PersonalGenerator(Generator(person.model), person.psi)
        fold_spectral_norm(personal.generator)
        weights = {name: value.float() for name, value in person.generator.items()}
        personal.generator.load_state_dict(weights)
    return personal.eval().requires_grad_(False)


def _base_of(person: Person, path: Path) -> Path:
    """Find the model.pt that the person was made with; raise if it isn't there, or is another."""
    advice = "leave --base out" if person.kind == "full" else "give the right place with --base"
    if not path.exists():
        raise ValueError(
            f"the base of {person.name}, a {person.kind} person, is not at {path}: {advice}"
        )
    found = find_model(path, person.base_sha256)
    sha256 = file_sha256(found)
    if sha256 != person.base_sha256:
        raise ValueError(
            f"{person.name} was made with another base than {found}: expected sha256 "
            f"{person.base_sha256[:12]}, found {sha256[:12]}; {advice}"
        )
    return found
