"""Every Triton kernel of the package compiles to machine code for sm_80 and sm_90, with no GPU present.

The interpreter runs a kernel as Python and forgives much that the compiler refuses. A kernel's module lists typical
calls in ``compile_examples()``: (kernel, signature, constexprs, num_warps). A subprocess compiles them all, because the
tests' own process may have loaded the kernels for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import importlib, inspect, sys
from pathlib import Path

import mambakit.kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

root = Path(mambakit.kernels.__file__).parent
names = ["mambakit.kernels." + ".".join(p.relative_to(root).with_suffix("").parts) for p in root.glob("*/triton_*.py")]
modules = [importlib.import_module(name) for name in sorted(names)]
defined = {(f.__module__, f.__name__): f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}
compiled = set()
for module in modules:
    if not hasattr(module, "compile_examples"):
        continue
    for kernel, signature, constants, num_warps in module.compile_examples():
        for arch in (80, 90):
            source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
            binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
            assert len(binary.asm["cubin"]) > 1000
            assert f".target sm_{arch}" in binary.asm["ptx"]
        compiled.add((kernel.__module__, kernel.__name__))
sources = {key: inspect.getsource(function.fn) for key, function in defined.items()}
helpers = {key for key in defined if any(key[1] + "(" in text for other, text in sources.items() if other != key)}
missing = sorted(set(defined) - helpers - compiled)
assert not missing, f"no compile_examples() for {missing}"
print(f"compiled {sorted(compiled)}")
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # an old result must not stand for this one
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for kernel in ("scan_forward_kernel", "scan_backward_kernel", "state_update_kernel"):
        assert kernel in run.stdout
