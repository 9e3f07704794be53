"""The Triton kernel of `view_parameters` compiles without a GPU and does not spill."""

import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from fastssl.kernels import view_parameters as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@pytest.mark.parametrize("seed", ["i32", "i64"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(capability, seed, tmp_path):
    known = kernels.options()
    types = {
        "index_ptr": "*i64", "sizes_ptr": "*i64", "spec_ptr": "*fp64", "out_ptr": "*fp32",
        "B": "i32", "seed": seed, "epoch": seed, "BLOCK": "constexpr",
    }  # fmt: skip
    source = ASTSource(kernels.view_parameters_kernel, types, {"BLOCK": known.pop("BLOCK")})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=known)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = next(pathlib.Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = (int(n) for n in re.findall(r"\b(?:STACK|LOCAL):(\d+)", report))
    assert stack <= 8 and local == 0, report  # a quotient in fp64 is a call that may need 8 bytes
    # Roots and quotients of boxes are the correctly rounded ones, as on the CPU.
    assert compiled.asm["ptx"].count("sqrt.rn.f64") >= 2
    assert "approx" not in re.sub(r"rcp\.approx\.ftz\.f64", "", compiled.asm["ptx"])
