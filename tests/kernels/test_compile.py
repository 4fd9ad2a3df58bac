"""Every shipped variant of every kernel compiles for sm_80 and sm_90, and fits; no GPU is needed.

That of each kernel the first one does is known in seconds, of all in minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae.kernels.compiled import SHARED_BYTES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # two minutes of compiling, with a core to itself and nothing cached


@pytest.fixture(scope="module", params=["--first", pytest.param("--all", marks=pytest.mark.long)])
def lines(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    # A process of its own: triton's decorators have read TRITON_INTERPRET in this one.
    done = subprocess.run(
        [sys.executable, "-m", "sae.kernels.compiled", *(["--first"] if request.param == "--first" else [])],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_in_a_list(lines: list[dict[str, Any]]) -> None:
    unlisted = {line["module"]: line["unlisted"] for line in lines if "module" in line}
    assert "sae.kernels.decode" in unlisted
    forgotten = {module: names for module, names in unlisted.items() if names}
    assert not forgotten, "add these to COMPILED of their module"


def test_every_variant_fits_both_architectures(lines: list[dict[str, Any]]) -> None:
    built = [line for line in lines if "kernel" in line]
    assert {line["capability"] for line in built} == set(SHARED_BYTES)
    for line in built:
        assert line["shared"] <= SHARED_BYTES[line["capability"]], line
        assert line["stack"] <= line["spilled"], line


MODULE = """
import triton
import triton.language as tl

@triton.jit
def helper(x):
    return x + x

@triton.jit
def listed(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr, helper(tl.load(x_ptr)))

@triton.jit
def lost(x_ptr):
    tl.store(x_ptr, 0.0)
"""
CHECKS = """
import forgotten
from sae.kernels.compiled import Compiled, compile_for, unlisted

variant = Compiled(forgotten.listed, "*fp32, i32:16", {"BLOCK": 16})
assert unlisted(forgotten, [variant]) == {"lost"}
assert unlisted(forgotten, []) == {"helper", "listed", "lost"}
assert compile_for(variant, 80)["registers"] > 0
try:
    Compiled(forgotten.listed, "*fp32", {"BLOCK": 16}).source()
except ValueError as error:
    print(error)
"""


def test_a_kernel_in_no_list_and_types_of_another_kernel_are_found(tmp_path: Path) -> None:
    (tmp_path / "forgotten.py").write_text(MODULE)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", CHECKS], env=environment, check=True, capture_output=True, text=True)
    expected = "listed takes x_ptr, n and constexprs ['BLOCK'], received types '*fp32' and constexprs ['BLOCK']"
    assert done.stdout.strip() == expected


LANES = """
import re
import triton
from triton.backends.compiler import GPUTarget
from sae.kernels import reconstruct, tuning, update
from sae.kernels.compiled import Compiled

RECONSTRUCT = "*fp32, *i32, *fp32, *fp32, *fp32, *fp32, *fp32, *fp32, i32, i32, i32"

def reconstructs():
    for d, k in ((1, 1), (13, 4), (17, 5), (33, 37)):
        for settings, _ in tuning.variants("reconstruct"):
            tile, block, warps = reconstruct._shape(d, k, settings)
            constexprs = {"ADD": True, "COMPARE": True, "TILE": tile, "BLOCK": block}
            yield Compiled(reconstruct._reconstruct_kernel, RECONSTRUCT, constexprs, num_warps=warps)

def updates():
    for d in (17, 64, 300, 1031):
        for settings, capabilities in tuning.variants(update.update_op(d)):
            # Of the update the variant that stores gradients; a sum that others project with goes no further.
            yield from update._compiled("bf16", d, settings, capabilities)[:4:3]

seen = 0
for variant in [*reconstructs(), *updates()]:
    target = GPUTarget("cuda", variant.capabilities[-1], 32)
    built = triton.compile(variant.source(), target=target, options={"num_warps": variant.num_warps}).asm["llir"]
    products = set(re.findall(r"(%\\d+) = fmul ", built))
    shuffled = set(re.findall(r"(%\\d+) = tail call i32 @llvm.nvvm.shfl", built))
    as_float = {f for f, i in re.findall(r"(%\\d+) = bitcast i32 (%\\d+) to float", built) if i in shuffled}
    seen += len(as_float)
    for pair in re.findall(r"fadd (?:contract )?float (%\\d+), (%\\d+)", built):
        fused = products & set(pair) and as_float & set(pair)
        assert not fused, (variant.kernel.__name__, dict(variant.constexprs), variant.num_warps, pair)
assert seen
"""


def test_sums_over_lanes_take_no_product_that_could_be_fused() -> None:
    # Fused, lanes that hold the same sum would disagree in its last bit, and which of them is stored is open.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", LANES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
