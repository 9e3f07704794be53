"""The Triton kernels compile for A100 and H100 without a GPU, fit shared memory and do not spill.

Every kernel is compiled with the constants that its launcher passes, once for each distinct set:
the launch with the most arguments at every width, the others at one width. Pointers and row
strides are declared divisible by 16, which is what a launch on whole, contiguous tensors of these
widths specialises on.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from fastssl.kernels import contrastive as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_BYTES = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = (32, 64, 96, 128, 192, 256, 384, 768)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")

IDS = {"x_ids_ptr", "y_ids_ptr"}
X_SIDE = {"x_lse_ptr", "x_dlse_ptr", "x_target_ptr", "x_dpos_ptr"}
Y_SIDE = {"y_lse_ptr", "y_dlse_ptr", "y_target_ptr", "y_dpos_ptr"}
# Optional arguments a launch leaves out (None): plain rows, everything for one role of q and k.
FWD_ABSENT = (
    {"x_bias_ptr"},  # both directions, with everything
    IDS | {"x_bias_ptr", "y_bias_ptr", "col_ptr"},  # rows
    IDS | {"x_bias_ptr", "y_bias_ptr"},  # both directions
    {"y_bias_ptr", "col_ptr"},  # columns only, seen from the keys
)
BWD_ABSENT = (
    {"x_bias_ptr", "y_bias_ptr", "dbias_ptr"},  # the symmetric gradient
    IDS | {"x_bias_ptr", "y_bias_ptr", "dbias_ptr"} | Y_SIDE,  # dq of rows
    IDS | {"x_bias_ptr", "y_bias_ptr", "dbias_ptr", "y_target_ptr", "y_dpos_ptr"},  # dq of CLIP
    {"y_bias_ptr", "dscale_ptr", "x_target_ptr", "x_dpos_ptr"},  # dk with everything
)
PANEL_ABSENT = (
    {"y_bias_ptr", "dbias_ptr"},  # the symmetric gradient
    IDS | {"y_bias_ptr", "dbias_ptr", "y_target_ptr", "y_dpos_ptr"},  # CLIP
    {"y_target_ptr", "y_dpos_ptr"},  # with everything
    {"y_target_ptr", "y_dpos_ptr", "panel_ptr", "factor_ptr"},  # sums only
)


def _cases(capability, dtype):
    """(kernel, constants and options, absent arguments) of every launch."""
    unit = set() if dtype == torch.float16 else {"unit_ptr"}
    for D in WIDTHS:
        fwd = kernels.constants("fwd", capability, dtype, D)
        for absent in FWD_ABSENT if D == 128 else FWD_ABSENT[:1]:
            yield "contrastive_fwd_kernel", fwd, absent
        if kernels.in_registers(dtype, D):
            bwd = kernels.constants("bwd", capability, dtype, D)
            for absent in BWD_ABSENT if D == 128 else BWD_ABSENT[:1]:
                yield "contrastive_bwd_kernel", bwd | {"SPLIT": False}, absent | unit
            yield "contrastive_bwd_kernel", bwd | {"SPLIT": True}, BWD_ABSENT[0] | unit
        else:
            panel = kernels.constants("panel", capability, dtype, D)
            for absent in PANEL_ABSENT if D == 768 else PANEL_ABSENT[:1]:
                yield "contrastive_panel_kernel", panel, absent
    for D in (96, 768):
        yield "contrastive_finish_kernel", kernels.finish_constants(D), set()
    sums = kernels.constants("panel", capability, dtype, 128)
    yield "contrastive_panel_kernel", sums, PANEL_ABSENT[-1]
    yield "contrastive_bwd_reduce_kernel", kernels.reduce_constants(), set()


def _argument_type(name, known, dtype):
    if name in ("x_ptr", "y_ptr", "q_ptr", "k_ptr", "panel_ptr"):
        return "*" + DTYPES[dtype]
    if name == "dx_ptr":
        return "*fp32" if known.get("SPLIT") else "*" + DTYPES[dtype]
    if name.endswith(("ids_ptr", "target_ptr")):
        return "*i32"
    return "*fp32" if name.endswith("_ptr") else "i32"


def _compile(case):
    """Registers, stack and shared memory, in bytes, of one compiled kernel."""
    name, known, absent, capability, dtype = case
    kernel = getattr(kernels, name)
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in known or argument in absent:
            signature[argument] = "constexpr"
            constants[argument] = known.get(argument)
            continue
        signature[argument] = _argument_type(argument, known, dtype)
        if argument.endswith("_ptr") or argument.startswith("stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={key: known[key] for key in OPTIONS if key in known},
    )
    cuobjdump = next(pathlib.Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return usage | {"SHARED": compiled.metadata.shared}


@pytest.fixture(scope="module")
def pool():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as executor:
        yield executor


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: DTYPES[dtype])
@pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_compiles_without_spills(capability, dtype, pool):
    cases = [(*case, capability, dtype) for case in _cases(capability, dtype)]
    for (name, known, absent, *_), usage in zip(cases, pool.map(_compile, cases), strict=True):
        launch = f"{name} {known} without {sorted(absent)}: {usage}"
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"spills: {launch}"
        assert usage["SHARED"] <= SHARED_BYTES[capability], f"too much shared memory: {launch}"
