"""The Triton kernels of `prototype_loss` compile without a GPU, do not spill, and load and store
whole vectors."""

import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from fastssl.kernels import prototype_loss as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SCORES = {"x_ptr", "student_ptr", "teacher_ptr", "out_ptr"}


def argument_type(name, dtype):
    if name.endswith("_ptr"):
        return f"*{dtype}" if name in SCORES else "*fp32"
    return "fp32" if name.endswith("_scale") or name == "scale" else "i32"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize("name", ["row", "loss_fwd", "loss_bwd", "merge"])
def test_compiles_without_spills(name, ignore_diagonal, capability, dtype, tmp_path):
    kernel = getattr(kernels, f"prototype_{name}_kernel")
    known = kernels._block(65536) | {"IGNORE": ignore_diagonal, "BLOCKS": 16}
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in known:
            signature[argument], constants[argument] = "constexpr", known[argument]
            continue
        signature[argument] = argument_type(argument, dtype)
        if argument.endswith("_ptr") or argument.startswith("stride") or argument == "K":
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": known["num_warps"]},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = next(pathlib.Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", report) == ["0", "0"], report
    if name != "merge":  # scalars are loaded one by one, rows of scores never
        assert not re.search(r"(ld|st)\.global\S*\.[bu]16 ", compiled.asm["ptx"])
