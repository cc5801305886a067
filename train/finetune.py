"""A meta-learned model + a few frames of one person -> a personal model.

    torchrun train/finetune.py --person clips/ada.mp4                   # runs/meta -> people/ada.pt
    torchrun train/finetune.py --person photos/ada --shots 4 --light    # a file of some 100 kB
    torchrun train/finetune.py --person id00017 --feed-forward          # no training: in a moment

PERSON is a video, a photo, a folder of either, or the id of a person in the shards. Beside the
person's file lies a picture of what was learned.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro

from model.perceptual import Perceptual, make_perceptual
from pipeline.faces import read_faces
from pipeline.sample import Reject
from train.checkpoint import Base, load_base, pin, require_same_weights
from train.data import Faces, Shards, faces_of_samples
from train.entry import claim_output, said_plainly
from train.order import spread
from train.person import Device, Kind, Person, aligner_of, save_person
from train.personalise import Tuning, divide, embed, fine_tune, picture_of
from train.report import save_picture
from train.world import connect


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Make a personal model from a few frames of one person."""

    person: str
    """A video, a photo, a folder of either, or the id of a person in the shards."""
    base: Path = Path("runs/meta")
    """Run folder, checkpoint folder or model.pt of the meta-learned model."""
    output: Path | None = None
    """File to write. Default: people/<name>.pt."""
    shards: str = "data/shards"
    """Where a person's id is looked up."""
    shots: int = 8
    """T: frames to learn from, evenly spread over what there is."""
    feed_forward: bool = False
    """Embed the person and don't train."""
    light: bool = False
    """Train psi' alone: the file stays small and needs its base."""
    weights_dir: str | None = None
    """Folder with the fan landmark backend's weights, where torch hub's cache lacks them."""
    device: Device = "auto"
    """Where landmarks are found."""
    perceptual_dir: str | None = None
    """Folder with VGG19's file, where the base was trained with it and it isn't in the cache."""
    vggface: str | None = None
    """File with VGGFace, where the base was trained with it."""
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ValueError(f"shots is {self.shots}: give at least 1")
        if self.feed_forward and self.light:
            raise ValueError("feed_forward and light are two kinds of person: give one of them")

    @property
    def kind(self) -> Kind:
        return "feed-forward" if self.feed_forward else "light" if self.light else "full"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, make the person, and say where it is."""
    with said_plainly("finetune"), connect() as world:
        config = tyro.cli(FinetuneConfig, args=argv, description=__doc__)
        if world.size > 1:
            raise ValueError("one person is learned by one process; leave --nproc-per-node at 1")
        started = time.monotonic()
        base = load_base(config.base)
        name, faces = find_faces(config, base)
        output = config.output or Path("people") / f"{name}.pt"
        picture = output.with_name(f"{output.stem}-panel.png")
        for file in (output, picture):
            claim_output(file, [Path(config.person), base.path])

        # What is held out is held out of e, too: it chooses the step, and is shown.
        trained, _ = divide(len(faces))
        embedded = embed(base, faces.take(trained), world.device)
        if config.kind == "feed-forward":
            learned = embed(base, faces, world.device)
            shown = picture_of(faces, embedded)
        else:
            perceptual = load_perceptual(config, base).to(world.device)
            learned = fine_tune(
                embedded, base, faces, perceptual, config.tuning, light=config.light
            )
            shown = picture_of(faces, embedded, learned)
        if config.kind != "full":
            base = replace(base, path=pin(base))
        person = learned.as_person(name, config.kind, base, faces)
        save_person(output, person)
        save_picture(picture, shown)
    print(f"person     {output}  ({output.stat().st_size / 1000:.0f} kB)")
    print(f"picture    {picture}")
    print(summary(person, time.monotonic() - started))


def load_perceptual(config: FinetuneConfig, base: Base) -> Perceptual:
    """Build the network that the base was trained with; raise where its weights are others."""
    perceptual = make_perceptual(
        base.perceptual["name"], weights_dir=config.perceptual_dir, vggface=config.vggface
    )
    require_same_weights(perceptual, base.perceptual, base.path)
    return perceptual


def find_faces(config: FinetuneConfig, base: Base) -> tuple[str, Faces]:
    """Return a name and T faces of the person at the model's size, fewer where there are fewer."""
    path = Path(config.person)
    if not path.exists():
        return config.person, _faces_in_shards(config, base)
    aligner = aligner_of(base.face, weights_dir=config.weights_dir, device=config.device)
    samples = read_faces(path, aligner, base.face, config.shots)
    if isinstance(samples, Reject):
        raise ValueError(f"{path} can't be used: {samples.reason}")
    return samples[0].person, faces_of_samples(samples, base.model.image_px)


def _faces_in_shards(config: FinetuneConfig, base: Base) -> Faces:
    """Spread T frames over all videos of a person that was built into shards."""
    unknown = (
        f"--person {config.person} is no file or folder, and no person of that id is in the "
        f"shards at {config.shards}"
    )
    try:
        shards = Shards(config.shards, image_px=base.model.image_px)
    except ValueError as error:
        raise ValueError(f"{unknown}: {error}") from error
    videos = shards.person(config.person)
    if not videos:
        known = sorted({entry.person for entry in shards.index.videos})
        raise ValueError(f"{unknown}, which holds {', '.join(known[:8])}, ...")
    base.face.require_same(shards.index.face, config.shards)
    frames = [(entry, n) for entry in videos for n in range(entry.num_frames)]
    chosen = [frames[i] for i in spread(range(len(frames)), config.shots)]
    read = [
        shards.read(entry, [n for of, n in chosen if of is entry])
        for entry in videos
        if any(of is entry for of, _ in chosen)
    ]
    return Faces(
        frames=np.concatenate([faces.frames for faces in read]),
        rasters=np.concatenate([faces.rasters for faces in read]),
        landmarks=np.concatenate([faces.landmarks for faces in read]),
    )


def summary(person: Person, took_s: float) -> str:
    """Say in one line what was made, and how much fine-tuning gained."""
    said = f"{person.name}: {person.kind}, {len(person.landmarks)} frames"
    for where, words in (("held_out", "on held-out frames"), ("trained", "on its own frames")):
        if f"{where}/before" in person.metrics:
            before, after = (person.metrics[f"{where}/{when}"] for when in ("before", "after"))
            said += f", step {person.step}, unlikeness {words} {before:.3g} -> {after:.3g}"
    return f"{said}, {took_s:.0f} s"


if __name__ == "__main__":
    main()
