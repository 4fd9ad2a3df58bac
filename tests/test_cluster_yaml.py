"""cluster.yaml is accepted by the checks that `ray up` runs before it talks to a cloud."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).resolve().parent.parent
Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))
    return loaded


def validated(config: Config) -> Config:
    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(config: Config) -> None:
    prepared = validated(config)
    assert prepared["head_setup_commands"][: len(config["setup_commands"])] == config["setup_commands"]
    assert prepared["worker_setup_commands"][: len(config["setup_commands"])] == config["setup_commands"]


def unknown_key(config: Config) -> None:
    config["idle_timeout"] = 10


def unknown_head(config: Config) -> None:
    config["head_node_type"] = "leader"


def too_few_workers(config: Config) -> None:
    config["available_node_types"]["gpu"]["min_workers"] = config["max_workers"] + 1


def fractional_gpu(config: Config) -> None:
    config["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5


@pytest.mark.parametrize("damage", [unknown_key, unknown_head, too_few_workers, fractional_gpu])
def test_ray_refuses_a_damaged_one(config: Config, damage: Callable[[Config], None]) -> None:
    damage(config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validated(config)


def test_work_lands_on_gpu_workers_that_scale_to_zero(config: Config) -> None:
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    workers = [node for name, node in types.items() if name != config["head_node_type"]]
    assert all(node["resources"]["GPU"] > 0 and node["min_workers"] == 0 for node in workers)


def test_every_node_installs_this_checkout_with_the_pinned_ray(config: Config) -> None:
    (target,) = (remote for remote, local in config["file_mounts"].items() if local == ".")
    commands = "\n".join(config["setup_commands"])
    assert f"cd {target} " in commands
    for named in set(re.findall(r"\S+\.lock", commands)):
        assert (ROOT / named).is_file()
    assert f"ray=={ray.__version__}\n" in (ROOT / "requirements.lock").read_text("utf-8")
    assert config["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py3")


def test_nothing_listens_without_a_token(config: Config) -> None:
    for role in ("head", "worker"):
        (start,) = (line for line in config[f"{role}_start_ray_commands"] if "ray start" in line)
        assert "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start


def test_every_node_starts_with_options_that_ray_has_and_spills_to_disk(config: Config) -> None:
    known = {option for parameter in start.params for option in parameter.opts}
    for role in ("head", "worker"):
        (line,) = (line for line in config[f"{role}_start_ray_commands"] if "ray start" in line)
        options = dict(re.findall(r"(--[a-z-]+)(?:=(\S+))?", line))
        assert set(options) <= known
        assert options["--object-spilling-directory"].startswith("/tmp/")
        assert int(options["--object-store-memory"]) <= 8e9, "it holds run numbers and reports"


def test_a_host_of_eight_gpus_is_there_for_tensor_parallel_groups(config: Config) -> None:
    gpus = [node["resources"].get("GPU", 0) for node in config["available_node_types"].values()]
    assert max(gpus) == 8
    of_workers = [node["max_workers"] for node in config["available_node_types"].values() if "max_workers" in node]
    assert sum(of_workers) == config["max_workers"]
