"""Ahead-of-time compilation of the Triton kernels, for machines without a GPU.

A module with kernels lists the variants that it ships:

    COMPILED = [Compiled(_double_kernel, "*bf16, *bf16, i32", {"BLOCK": 256}, num_warps=4)]

`TRITON_INTERPRET=0 python -m sae.kernels.compiled` builds them all for sm_80 and sm_90 and prints one line of
JSON each (module names as arguments: only theirs; --first: of each kernel only its first variant).
tests/kernels/test_compile.py checks those lines. A kernel that is launched must be in a list; a jit function that
only other kernels call is compiled with them.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # a block's limit, CUDA C++ Programming Guide, "Compute Capabilities"


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel.

    types: of the parameters that are not constexpr, in order, separated by commas: "*bf16" (pointer, 16-byte
    aligned), "i32", "fp32"; "i32:16" is an integer known to be a multiple of 16.
    constexprs: by name, one for each constexpr parameter.
    capabilities: the architectures that it is shipped for; 80 is sm_80.
    spilled: bytes of a thread that its registers may take in memory: by default a few saved around a loop.
    """

    kernel: Any
    types: str
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    capabilities: tuple[int, ...] = (80, 90)
    spilled: int = 64

    def source(self) -> ASTSource:
        """Return what triton compiles. Raises ValueError when the types or constexprs are not the kernel's."""
        fn = jit_function(self.kernel)
        types = re.split(r",\s*(?![^\[]*\])", self.types)  # not within the shape of a tensor descriptor
        runtime = [p for p in fn.params if not p.is_constexpr]
        constant = {p.name for p in fn.params if p.is_constexpr}
        if len(types) != len(runtime) or constant != set(self.constexprs):
            raise ValueError(
                f"{fn.__name__} takes {', '.join(p.name for p in runtime)} and constexprs {sorted(constant)}, "
                f"received types {self.types!r} and constexprs {sorted(self.constexprs)}"
            )
        aligned = [p.num for p, t in zip(runtime, types, strict=True) if t.startswith("*") or t.endswith(":16")]
        signature = {p.name: t.removesuffix(":16") for p, t in zip(runtime, types, strict=True)}
        signature |= dict.fromkeys(constant, "constexpr")
        # In the order of the parameters, as the launcher builds it.
        signature = {p.name: signature[p.name] for p in fn.params}
        attributes = {(number,): [["tt.divisibility", 16]] for number in aligned}
        return ASTSource(fn, signature, dict(self.constexprs), attributes)


def jit_function(kernel: Any) -> Any:
    """Return the function below @triton.autotune and @triton.heuristics."""
    while not isinstance(kernel, triton.JITFunction) and hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def compile_for(variant: Compiled, capability: int) -> dict[str, Any]:
    """Build one variant for one architecture, without a GPU: its name, shared and stack bytes, registers."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    built = triton.compile(variant.source(), target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": built.metadata.name,
        "constexprs": {name: str(value) for name, value in variant.constexprs.items()},
        "types": variant.types,
        "capability": capability,
        "shared": built.metadata.shared,
        "spilled": variant.spilled,
        **_resources(built.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a thread: spilled registers live on the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(item.split(":") for item in text.split("Function")[1].split() if ":" in item)
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"])}


def modules(names: Sequence[str] = ()) -> list[ModuleType]:
    """Import the named modules of this folder, or all but this one."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "compiled")
    return [importlib.import_module(f"sae.kernels.{name}") for name in names or found]


def unlisted(module: ModuleType, variants: Sequence[Compiled]) -> set[str]:
    """Return the names of the module's jit functions that no variant compiles, itself or through a call."""
    own = {value for value in map(jit_function, vars(module).values()) if isinstance(value, triton.JITFunction)}
    reached: set[Any] = set()
    waiting = [jit_function(variant.kernel) for variant in variants]
    while waiting:
        fn = waiting.pop()
        if fn not in reached:
            reached.add(fn)
            waiting += _called(fn)
    return {fn.__name__ for fn in own - reached if fn.__module__ == module.__name__}


def _called(kernel: Any) -> list[Any]:
    """Return the jit functions that a kernel names: its bytecode is never run, but holds the names."""
    named = (jit_function(kernel.fn.__globals__.get(name)) for name in kernel.fn.__code__.co_names)
    return [fn for fn in named if isinstance(fn, triton.JITFunction)]


def main(arguments: Sequence[str]) -> None:
    """Print, one JSON object a line, what each variant became, and the kernels that no variant covers."""
    found = modules([name for name in arguments if name != "--first"])
    variants = [variant for module in found for variant in getattr(module, "COMPILED", [])]
    for module in found:
        print(json.dumps({"module": module.__name__, "unlisted": sorted(unlisted(module, variants))}))
    for variant in _first_ones(variants) if "--first" in arguments else variants:
        for capability in variant.capabilities:
            print(json.dumps(compile_for(variant, capability)), flush=True)


def _first_ones(variants: Sequence[Compiled]) -> list[Compiled]:
    """Return of each kernel, and each set of architectures that it is shipped for, the first variant."""
    first: dict[Any, Compiled] = {}
    for variant in variants:
        first.setdefault((jit_function(variant.kernel), variant.capabilities), variant)
    return list(first.values())


if __name__ == "__main__":
    main(sys.argv[1:])
