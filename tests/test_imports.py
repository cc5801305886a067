"""Data goes one way: who may import whom, and which library has one owner."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"pipeline": set(), "model": set(), "train": {"pipeline", "model"}}
OWNERS = {
    "ray": {"pipeline/build_shards.py"},
    "face_alignment": {"pipeline/align_fan.py"},
    "torch.distributed": {"train/world.py"},
}
FILES = sorted(path for package in OURS for path in (ROOT / package).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Return every module name that a file imports, with its parents."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_one_way_and_owners_are_alone(path):
    package, names = path.parent.name, imported(path)
    assert names & OURS.keys() <= OURS[package] | {package}
    for library, owners in OWNERS.items():
        if f"{package}/{path.name}" not in owners:
            assert library not in names
