"""cluster.yaml is what Ray accepts, and puts the project on every node."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(cluster):
    validate_config(prepare_config(cluster))


def test_every_node_installs_the_mounted_project(cluster):
    mounted = [remote for remote, local in cluster["file_mounts"].items() if local == "."]
    assert len(mounted) == 1
    assert any(
        command.startswith("pip install") and command.endswith(f"-e {mounted[0]}[s3]")
        for command in cluster["setup_commands"]
    )


def test_the_nodes_run_the_ray_that_the_project_is_tested_with(cluster):
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    (ray,) = [line.removeprefix("ray==") for line in pinned if line.startswith("ray==")]
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{ray}-py311")


def test_there_are_nodes_that_decode_and_nodes_with_gpus(cluster):
    resources = [kind["resources"] for kind in cluster["available_node_types"].values()]
    assert any(r["CPU"] > 0 and not r.get("GPU") for r in resources)
    assert any(r.get("GPU") for r in resources)
