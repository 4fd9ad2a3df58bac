"""kuberay.yaml: fields that KubeRay's definitions have, a cluster that Ray's autoscaler reads, a run that is valid."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start

from sae.jobs import cli
from sae.schemas import config
from sae.schemas.config import Run

ROOT = Path(__file__).resolve().parent.parent
Manifest = dict[str, Any]


def fields(required: str, **known: Any) -> dict[str, Any]:
    """The schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": required.split(),
        "additionalProperties": False,
    }


STRING, INTEGER, BOOLEAN, OBJECT = ({"type": name} for name in ("string", "integer", "boolean", "object"))
STRINGS = {"type": "object", "additionalProperties": STRING}
CONTAINER = fields(
    "name image resources",
    name=STRING,
    image=STRING,
    env={"type": "array", "items": fields("name value", name=STRING, value=STRING)},
    resources=fields("limits", limits=STRINGS, requests=STRINGS),
    volumeMounts={"type": "array", "items": fields("name mountPath", name=STRING, mountPath=STRING, readOnly=BOOLEAN)},
)
POD = fields(
    "containers",
    containers={"type": "array", "minItems": 1, "items": CONTAINER},
    volumes={"type": "array", "items": OBJECT},
    securityContext=OBJECT,
    tolerations={"type": "array", "items": fields("key", key=STRING, operator=STRING, effect=STRING)},
)
GROUP = {"rayStartParams": STRINGS, "template": fields("spec", spec=POD)}
# Written down from the definitions of KubeRay 1.5, those fields alone that the manifest uses.
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name=STRING),
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint=STRING,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
        backoffLimit=INTEGER,
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=INTEGER,
        rayClusterSpec=fields(
            "headGroupSpec workerGroupSpecs",
            rayVersion=STRING,
            authOptions=fields("mode", mode={"enum": ["token", "disabled"]}),
            enableInTreeAutoscaling=BOOLEAN,
            autoscalerOptions=fields(
                "",
                idleTimeoutSeconds=INTEGER,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            headGroupSpec=fields("template", **GROUP),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    "groupName minReplicas maxReplicas template",
                    groupName=STRING,
                    replicas=INTEGER,
                    minReplicas=INTEGER,
                    maxReplicas=INTEGER,
                    **GROUP,
                ),
            },
        ),
    ),
)


@pytest.fixture
def documents() -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "kuberay.yaml").read_text("utf-8")))


@pytest.fixture
def cluster(documents: list[Manifest]) -> Manifest:
    of_job: Manifest = documents[1]["spec"]["rayClusterSpec"]
    return of_job


@pytest.fixture
def run(documents: list[Manifest]) -> Run:
    (text,) = documents[0]["data"].values()
    return config.parse(text)


def pods(cluster: Manifest) -> Iterator[Manifest]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_its_fields_are_those_of_a_ray_job(documents: list[Manifest]) -> None:
    jsonschema.validate(documents[1], RAY_JOB)


def unknown_field(manifest: Manifest) -> None:
    manifest["spec"]["rayClusterSpec"]["idleTimeoutSeconds"] = 600


def number_for_an_option(manifest: Manifest) -> None:
    manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def number_of_gpus(manifest: Manifest) -> None:
    (worker,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = 8


@pytest.mark.parametrize("damage", [unknown_field, number_for_an_option, number_of_gpus])
def test_a_damaged_one_is_noticed(documents: list[Manifest], damage: Callable[[Manifest], None]) -> None:
    damaged = copy.deepcopy(documents[1])
    damage(damaged)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, RAY_JOB)


def test_rays_autoscaler_finds_gpu_workers_that_scale_to_zero(cluster: Manifest) -> None:
    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "sae", "namespace": "default"}, "spec": cluster}
    )
    types = derived["available_node_types"]
    assert types[derived["head_node_type"]]["resources"]["CPU"] == 0
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 8)
    assert types["gpu"]["resources"]["GPU"] == 8
    assert derived["idle_timeout_minutes"] == 10


def test_nodes_start_with_options_that_ray_has(cluster: Manifest) -> None:
    known = {option for parameter in start.params for option in parameter.opts}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_image_and_cluster_are_of_the_pinned_ray(cluster: Manifest) -> None:
    assert cluster["rayVersion"] == ray.__version__
    assert all(f":{ray.__version__}-py3" in pod["containers"][0]["image"] for pod in pods(cluster))
    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text("utf-8"))
    assert aws["docker"]["image"] in (ROOT / "kuberay.yaml").read_text("utf-8")


def test_the_job_finds_its_config_and_every_node_the_folders(
    documents: list[Manifest], cluster: Manifest, run: Run
) -> None:
    _, step, path = documents[1]["spec"]["entrypoint"].split()
    assert step in (*cli.STEPS, "run")
    (name,) = documents[0]["data"]
    for pod in pods(cluster):
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts) == set(volumes)
        assert volumes["run"]["configMap"]["name"] == documents[0]["metadata"]["name"]
        assert f"{mounts['run']}/{name}" == path
        for folder in (run.lake, run.export.folder, *run.corpus.paths):
            assert PurePosixPath(folder).is_relative_to(mounts["lake"])


def test_objects_spill_to_a_volume(cluster: Manifest) -> None:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert group["rayStartParams"]["object-spilling-directory"] in [mount["mountPath"] for mount in mounts]


def test_the_run_asks_for_gpus_that_are_not_there_yet_and_not_for_too_many(cluster: Manifest, run: Run) -> None:
    (worker,) = cluster["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert run.cluster.gpus_per_worker == 1
    assert run.cluster.tp <= int(limits["nvidia.com/gpu"])
    assert run.cluster.tp * run.cluster.dp <= int(limits["nvidia.com/gpu"]) * worker["maxReplicas"]


def test_nothing_listens_without_a_token(cluster: Manifest) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
