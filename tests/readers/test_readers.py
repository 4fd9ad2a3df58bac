"""SAELens' and sparsify's own packages read what is exported and write what is imported: encodings equal to 1e-5.

Each package is installed into an environment of its own below $SAE_READERS (by default one that is deleted afterwards),
which takes minutes and two gigabytes: `make test-readers`. An environment that is there is used as it is.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.foreign import FORMATS, About
from sae.jobs import importing
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError
from tests.foreign_models import EXPRESSED, KINDS, D, K, N, inputs
from tests.pages import Page

pytestmark = [pytest.mark.readers, pytest.mark.timeout(3000)]

HERE: Final = Path(__file__).resolve().parent
TORCH: Final = f"torch=={torch.__version__.partition('+')[0]}"
PACKAGES: Final = {"saelens": ["sae-lens==6.54.*", "transformer-lens<4"], "sparsify": ["eai-sparsify==1.3.*"]}
OUT: Final = 20
# Absolute errors of float32 sums of a few dozen products, in another order; reconstructions are of the order of 10.
LATENTS, RECONS = 1e-5, 5e-5

Work = Callable[[list[dict[str, Any]]], None]


def environment(package: str, folder: Path) -> Path:
    """The interpreter of the package's environment, which is made where it is not there."""
    python = folder / package / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / package], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # First and alone, so that pip takes the build of this machine.
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, *PACKAGES[package]], check=True)
    return python


@pytest.fixture(scope="module", params=PACKAGES)
def package(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def python(package: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter that has the package."""
    given = os.environ.get("SAE_READERS")
    return environment(package, Path(given).absolute() if given else tmp_path_factory.mktemp("environments"))


@pytest.fixture(scope="module")
def work(package: str, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Has the package do jobs; one process does many, for to import it takes long."""
    folder = tmp_path_factory.mktemp("jobs")

    def do(jobs: list[dict[str, Any]]) -> None:
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [python, HERE / f"with_{package}.py", folder / "jobs.json"]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.endswith("done\n")

    return do


def assert_same(model: Autoencoder, output: Path) -> None:
    latents, info = model.encode(inputs())
    found = load_file(output)
    assert int((found["latents"] > 0).sum()) > 100
    torch.testing.assert_close(latents, found["latents"], rtol=1e-5, atol=LATENTS)
    torch.testing.assert_close(model.decode(latents, info), found["recons"], rtol=1e-5, atol=RECONS)


@pytest.fixture
def x(tmp_path: Path) -> Path:
    save_file({"x": inputs()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_it_reads_what_is_exported(package: str, work: Work, tmp_path: Path, x: Path) -> None:
    jobs, format_ = [], FORMATS[package]
    for kind in EXPRESSED[package]:
        folder = tmp_path / kind
        folder.mkdir()
        config, tensors = format_.write(KINDS[kind](), About("gpt2", "blocks.8.hook_resid_pre"))
        (folder / "cfg.json").write_text(json.dumps(config))
        save_file(tensors, folder / format_.weights)
        jobs.append({"do": "load", "folder": str(folder), "input": str(x), "output": str(tmp_path / f"{kind}.out")})
    work(jobs)
    for kind in EXPRESSED[package]:
        assert_same(KINDS[kind](), tmp_path / f"{kind}.out")


NO_BIAS: Final = {"apply_b_dec_to_input": False}
THEIRS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "saelens": {
        "standard": {"d_sae": N},
        "standard-no-bias": {"d_sae": N, **NO_BIAS},
        "standard-layer_norm": {"d_sae": N, "normalize_activations": "layer_norm"},
        "topk": {"d_sae": N, "k": K},
        "topk-layer_norm": {"d_sae": N, "k": K, "normalize_activations": "layer_norm"},
        "topk-rescaled": {"d_sae": N, "k": K, "rescale_acts_by_decoder_norm": True},
        "jumprelu": {"d_sae": N},
        "jumprelu-no-bias": {"d_sae": N, **NO_BIAS},
        "batchtopk": {"d_sae": N, "k": 6.0, "rescale_acts_by_decoder_norm": False},
        "batchtopk-rescaled": {"d_sae": N, "k": 6.5, "rescale_acts_by_decoder_norm": True},
        "matryoshka_batchtopk": {"d_sae": N, "k": 6.0, "matryoshka_widths": [8, 20, N]},
        "transcoder": {"d_sae": N, "d_out": OUT, **NO_BIAS},
        "transcoder-layer_norm": {"d_sae": N, "d_out": OUT, "normalize_activations": "layer_norm", **NO_BIAS},
        "skip_transcoder": {"d_sae": N, "d_out": OUT, **NO_BIAS},
        "jumprelu_transcoder": {"d_sae": N, "d_out": OUT, **NO_BIAS},
        "jumprelu_skip_transcoder": {"d_sae": N, "d_out": OUT, **NO_BIAS},
    },
    "sparsify": {
        "topk": {"num_latents": N, "k": K},
        "topk-expanded": {"expansion_factor": 4, "k": K},
        "groupmax": {"num_latents": N, "k": K, "activation": "groupmax"},
        "transcoder": {"num_latents": N, "k": K, "transcode": True},
        "skip-transcoder": {"num_latents": N, "k": K, "transcode": True, "skip_connection": True},
    },
}


def test_what_it_writes_is_imported(package: str, work: Work, tmp_path: Path, x: Path) -> None:
    jobs = [
        {
            "do": "save",
            "architecture": name.partition("-")[0],
            "config": config,
            "seed": seed,
            "folder": str(tmp_path / name),
            "input": str(x),
            "output": str(tmp_path / f"{name}.out"),
        }
        for seed, (name, config) in enumerate(THEIRS[package].items())
    ]
    work(jobs)
    format_ = FORMATS[package]
    for name in THEIRS[package]:
        files = {file: str(tmp_path / name / file) for file in ("cfg.json", format_.weights)}
        found = importing.read(format_, files).autoencoder
        assert found.d_model == D
        assert_same(found, tmp_path / f"{name}.out")
        if (inference := tmp_path / f"{name}-inference").exists():
            files = {file: str(inference / file) for file in files}
            assert_same(importing.read(format_, files).autoencoder, tmp_path / f"{name}.out")


def test_the_page_s_python_loads_what_is_exported(package: str, python: Path, tmp_path: Path) -> None:
    """That of docs/pretrained.md, run by the package's interpreter where `sae export` leaves its files."""
    format_ = FORMATS[package]
    folder = tmp_path / {"saelens": "weights/gpt2/v5", "sparsify": "coders/gpt2/coder"}[package]
    folder.mkdir(parents=True)
    config, tensors = format_.write(KINDS["topk"](), About("gpt2", "blocks.8.hook_resid_post"))
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder / format_.weights)
    page = Page(HERE.parent.parent / "docs" / "pretrained.md")
    (block,) = (block for block in page.of("python") if block.lower().startswith(f"# with {package}"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_it_writes_beyond_ours_is_refused(package: str, work: Work, tmp_path: Path, x: Path) -> None:
    beyond = {
        "saelens": [("gated", {"d_sae": N}, "its architecture is 'gated'"), ("abstopk", {"d_sae": N, "k": K}, "abst")],
        "sparsify": [("skip", {"num_latents": N, "k": K, "skip_connection": True}, "it has a skip_connection but is")],
    }[package]
    jobs = [
        {
            "do": "save", "architecture": name, "config": config, "seed": 1, "folder": str(tmp_path / name),
            "input": str(x), "output": str(tmp_path / f"{name}.out"),
        }
        for name, config, _ in beyond
    ]  # fmt: skip
    work(jobs)
    for name, _, expected in beyond:
        files = {file: str(tmp_path / name / file) for file in ("cfg.json", FORMATS[package].weights)}
        with pytest.raises(AutoencoderError, match=expected):
            importing.read(FORMATS[package], files)
