"""The folder table of CONTRIBUTING.md, enforced: who may import whom, and who may touch files."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("schemas", "kernels", "sae", "jobs", "tests", "benchmarks")
LINKS = ("jobs", "kernels", "schemas")
STEPS = frozenset(
    {
        "tokenize",
        "harvest",
        "train",
        "encode",
        "compact",
        "aggregate",
        "evaluate",
        "export",
        "effects",
        "explain",
    }
)

# Everything a folder may import beside the standard library.
ONLY = {
    "schemas": ("pyarrow", "pydantic", "pydantic_core", "yaml", "sae.schemas"),
    "kernels": ("torch", "triton", "sae.kernels"),
}
ENGINES = ("ray", "duckdb")
READS = frozenset({"read_text", "read_bytes"})
WRITES = frozenset({"write_text", "write_bytes"})

Import = tuple[int, str]


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    """Whether the dotted `name` is one of `packages` or lies inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def package_of(path: PurePosixPath) -> tuple[str, ...]:
    """The dotted package that a file's relative imports start from."""
    folder = path.parent.parts
    return ("sae", *folder) if path.parts[0] in LINKS else folder


def imports(path: PurePosixPath, tree: ast.AST) -> Iterator[Import]:
    """Every import as (line, absolute dotted name); `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            texts = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from ((node.lineno, text) for text in texts if isinstance(text, str))


def forbidden(path: PurePosixPath, name: str) -> str | None:
    """Why the file at `path` may not import `name`, or None."""
    folder = path.parts[0]
    if name.split(".")[0] in LINKS:
        return f"import it as sae.{name.split('.')[0]}: two import names make two copies of a module"
    if folder in ONLY:
        standard = name.split(".")[0] in sys.stdlib_module_names
        return None if standard or is_in(name, ONLY[folder]) else f"{folder}/ may not import it"
    if folder == "sae" and is_in(name, (*ENGINES, "sae.jobs")):
        return "sae/ is pure mathematics: no ray, no duckdb, no jobs"
    if folder not in ("jobs", "tests", "benchmarks") and is_in(name, ENGINES):
        return "ray and duckdb live in jobs/ only"
    if folder == "jobs":
        step = path.with_suffix("").parts[1]
        others = tuple(f"sae.jobs.{other}" for other in STEPS - {step})
        if step in STEPS and is_in(name, others):
            return "steps never import each other"
    return None


def file_calls(tree: ast.AST) -> Iterator[Import]:
    """Calls that open a file by path, as (line, what was called).

    storage.read_bytes() and its like are the way to do it; a file that imports importlib.resources may read
    the package's own data.
    """
    names = {name for _, name in imports(PurePosixPath("jobs/any.py"), tree)}
    methods = WRITES if "importlib.resources" in names else READS | WRITES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        owner, _, called = ast.unparse(node.func).rpartition(".")
        if (called == "open" and not owner) or (called in methods and owner not in ("", "storage")):
            yield node.lineno, called


def violations(path: PurePosixPath, source: str) -> list[str]:
    """One line for each broken rule of a file, given its path from the repository's root."""
    tree = ast.parse(source)
    found = [
        f"{path}:{line}: {name}: {reason}" for line, name in imports(path, tree) if (reason := forbidden(path, name))
    ]
    if path.parts[0] == "jobs" and path != PurePosixPath("jobs/storage.py"):
        found += [f"{path}:{line}: {call}(): only jobs/storage.py opens files" for line, call in file_calls(tree)]
    return found


def layout_faults(root: Path) -> list[str]:
    """What is wrong with the three links and with kernels/, one line each."""
    faults = [
        f"sae/{name} must be a link to ../{name}"
        for name in LINKS
        if not (root / "sae" / name).is_symlink() or (root / "sae" / name).readlink() != Path("..", name)
    ]
    if (root / "kernels" / "__init__.py").exists():
        faults.append("kernels/__init__.py hides Hugging Face's package of that name: remove it")
    return faults


def python_files() -> list[PurePosixPath]:
    # rglob does not follow the links of sae/, so every file is seen once, under its own folder.
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted(PurePosixPath(path.relative_to(ROOT).as_posix()) for path in [*files, *ROOT.glob("*.py")])


def test_every_file_keeps_the_folder_table() -> None:
    files = python_files()
    assert {path.parts[0] for path in files} >= {"schemas", "sae", "jobs", "tests"}
    assert [line for path in files for line in violations(path, (ROOT / path).read_text("utf-8"))] == []


def test_the_links_are_links_and_kernels_is_no_package() -> None:
    assert layout_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("schemas/config.py", "import torch"),
        ("schemas/config.py", "from sae import model"),
        ("schemas/config.py", "from ..model import Autoencoder"),
        ("schemas/tables.py", "def f():\n    import duckdb"),
        ("kernels/topk.py", "import numpy as np"),
        ("kernels/topk.py", "from sae.schemas.errors import SaeError"),
        ("sae/model.py", "import ray"),
        ("sae/model.py", "import os, ray.data as rd"),
        ("sae/model.py", "from duckdb import connect"),
        ("sae/model.py", "from sae.jobs.lake import connect"),
        ("sae/model.py", "from sae import jobs"),
        ("sae/model.py", "from . import jobs"),
        ("sae/model.py", "from .jobs import lake"),
        ("sae/model.py", "import importlib\nimportlib.import_module('ray')"),
        ("setup.py", "import ray"),
        ("jobs/encode.py", "from sae.jobs import train"),
        ("jobs/encode.py", "from sae.jobs.train import step"),
        ("jobs/encode.py", "import sae.jobs.compact"),
        ("jobs/encode.py", "from . import aggregate"),
        ("jobs/encode.py", "from .aggregate import merge"),
        ("jobs/cli.py", "import jobs.encode"),
        ("jobs/cli.py", "from schemas import config"),
        ("tests/sae/test_model.py", "from kernels import topk"),
        ("benchmarks/bench_topk.py", "import kernels.topk"),
        ("jobs/encode.py", "with open('x') as f: pass"),
        ("jobs/encode.py", "Path('x').write_text('y')"),
        ("jobs/encode.py", "p.write_bytes(b'')"),
        ("jobs/cli.py", "p.read_text()"),
        ("jobs/cli.py", "p.read_bytes()"),
        ("jobs/views.py", "from importlib import resources\np.write_text('y')"),
    ],
)
def test_a_broken_rule_is_named_with_its_place(path: str, source: str) -> None:
    (found,) = violations(PurePosixPath(path), source)
    line = len(source.splitlines())
    assert found.startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("schemas/config.py", "import json, yaml, pyarrow.parquet\nfrom sae.schemas.errors import SaeError"),
        ("schemas/config.py", "from .errors import SaeError"),
        ("kernels/topk.py", "import torch, triton.language as tl\nfrom sae.kernels import gather"),
        (
            "sae/model.py",
            "import numpy, transformers\nfrom sae import kernels\nfrom sae.schemas import errors",
        ),
        ("sae/smollm2.py", "Path('x').write_text('y')"),
        ("sae/model.py", "import raylib"),
        ("jobs/storage.py", "open('x')"),
        ("jobs/encode.py", "import ray, duckdb\nfrom sae.jobs import lake, encode\nfile.read()"),
        ("jobs/views.py", "from importlib import resources\nresources.files('sae').read_text()"),
        ("jobs/lake.py", "from sae.jobs import storage\nstorage.read_bytes('x')"),
        ("jobs/cli.py", "from sae.jobs import encode, train"),
        ("tests/jobs/test_lake.py", "import ray, duckdb\nPath('x').read_text()"),
        ("benchmarks/bench_lake.py", "import duckdb"),
    ],
)
def test_what_the_table_allows_passes(path: str, source: str) -> None:
    assert violations(PurePosixPath(path), source) == []


def copied_folder(root: Path) -> None:
    (root / "sae" / "jobs").unlink()
    (root / "sae" / "jobs").mkdir()


def absolute_link(root: Path) -> None:
    (root / "sae" / "jobs").unlink()
    (root / "sae" / "jobs").symlink_to(root / "jobs")


def kernels_package(root: Path) -> None:
    (root / "kernels" / "__init__.py").touch()


@pytest.mark.parametrize("damage", [copied_folder, absolute_link, kernels_package])
def test_a_damaged_layout_is_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    (tmp_path / "sae").mkdir()
    for name in LINKS:
        (tmp_path / name).mkdir()
        (tmp_path / "sae" / name).symlink_to(Path("..", name))
    assert layout_faults(tmp_path) == []
    damage(tmp_path)
    assert len(layout_faults(tmp_path)) == 1
