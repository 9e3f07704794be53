"""The Triton kernels of `sigreg` compile without a GPU, do not spill and fit shared memory."""

import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from fastssl.kernels import sigreg as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
FLOATS = {"spacing", "per_pi", "pi_1", "pi_2", "pi_3"}


def cases():
    """(name, kernel, constants, types of arguments that have no usual ones) of every launch."""
    walk = kernels.walk_constants()
    for knots in (16, 40):
        for anchors in kernels.anchors_of(knots):
            known = walk | anchors | {"KNOTS": knots}
            place = f"{knots}-{anchors['FIRST']}"
            yield f"fwd-{place}", kernels.sigreg_fwd_kernel, known, {}
            yield f"bwd-{place}", kernels.sigreg_bwd_kernel, known, {}
    known = kernels.merge_constants() | {"KNOTS": 16, "SPACING": 3 / 16}
    yield "merge", kernels.sigreg_merge_kernel, known | {"left_ptr": None}, {}
    yield "merge-masked", kernels.sigreg_merge_kernel, known, {"left_ptr": "*i64"}
    known, types = kernels.directions_constants(), {"step_ptr": "*i64", "seed": "i64"}
    yield "directions", kernels.sigreg_directions_kernel, known, types
    for dtype in ("fp32", "bf16", "fp16"):
        for name, terms, narrow, one in (
            ("projections", 2, "x_ptr", "stride_ym"),
            ("dz", 1, "out_ptr", "stride_yk"),
        ):
            known = kernels.product_constants(0 if dtype == "fp32" else terms) | {one: 1}
            yield f"{name}-{dtype}", kernels.sigreg_product_kernel, known, {narrow: f"*{dtype}"}


CASES = {name: case for name, *case in cases()}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, capability, tmp_path):
    kernel, known, types = CASES[case]
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in known:
            signature[argument], constants[argument] = "constexpr", known[argument]
            continue
        usual = "*fp32" if argument.endswith("_ptr") else "fp32" if argument in FLOATS else "i32"
        signature[argument] = types.get(argument, usual)
        whole = argument.startswith("stride") or argument in "SMKD"
        if argument.endswith("_ptr") or whole and not kernel.params[index].do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={key: known[key] for key in OPTIONS if key in known},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = next(pathlib.Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", report) == ["0", "0"], report
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    ptx = compiled.asm["ptx"]
    if case == "directions":
        # Of a number close to 1 the approximate logarithm may be positive, its square root NaN.
        assert "lg2.approx" not in ptx and ptx.count("sqrt.rn") >= 4
    if case.startswith(("projections", "dz")):
        # fp32 is multiplied by the plain units alone: no TF32.
        assert ("tf32" in ptx) == (not case.endswith("fp32"))
    if case.startswith(("fwd", "bwd")):
        assert not re.search(r"(sin|cos)\.approx", ptx)
