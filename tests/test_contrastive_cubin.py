"""The Triton kernels compile for A100 and H100 without a GPU, fit shared memory and do not spill.

Every kernel is compiled with the constants that its launcher passes, once for each distinct set:
the launches with the most arguments at every width, the others at one width. Pointers and row
strides are declared divisible by 16, which is what a launch on whole, contiguous tensors of these
widths specialises on.
"""

import concurrent.futures
import importlib
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

from fastssl.kernels import (  # noqa: E402
    contrastive,
    launch,
    panels,
    prototypes,
    queue,
    siglip,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_BYTES = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = (32, 64, 96, 128, 192, 256, 384, 768)
PROTOTYPES = (17, 3000, 8192, 16000, 65536)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")

IDS = {"x_ids_ptr", "y_ids_ptr"}
LIMITS = {"x_limit_ptr", "y_limit_ptr"}
BIASES = {"x_bias_ptr", "y_bias_ptr"}
ALIKE = {"x_label_ptr", "x_alike_ptr", "y_label_ptr", "y_alike_ptr"}
ALL = IDS | LIMITS | BIASES | ALIKE
Y_SIDE = {"y_lse_ptr", "y_dlse_ptr", "y_target_ptr", "y_dpos_ptr"}
# Optional arguments a launch leaves out (None) and the mask by index, first the largest launches:
# these are compiled at every width, the others at one.
FWD = (
    ({"x_bias_ptr", "y_limit_ptr", "logits_ptr"}, False),  # both directions, with everything
    (ALL | {"col_ptr", "logits_ptr"}, False),  # rows
    (ALL | {"logits_ptr"}, False),  # both directions
    ({"y_bias_ptr", "x_limit_ptr", "col_ptr", "logits_ptr"}, False),  # columns, from the keys
    (LIMITS | BIASES | {"col_ptr", "logits_ptr"}, True),  # q against itself
)
BWD = (
    (LIMITS | BIASES | {"dbias_ptr"}, True),  # the symmetric gradient
    (ALIKE | LIMITS | BIASES | {"dbias_ptr"}, True),  # and that without labels
    ({"y_bias_ptr", "x_limit_ptr", "x_target_ptr", "x_dpos_ptr"}, False),  # dk with everything
    ({"x_bias_ptr", "y_limit_ptr", "y_target_ptr", "y_dpos_ptr", "dbias_ptr"}, False),  # dq
    (ALL | Y_SIDE | {"dbias_ptr"}, False),  # dq of rows
    (ALL | {"dbias_ptr", "y_target_ptr", "y_dpos_ptr"}, False),  # dq of CLIP
)
PANEL = (
    ({"y_target_ptr", "y_dpos_ptr", "logits_ptr"}, False),  # with everything
    ({"y_bias_ptr", "x_limit_ptr", "dbias_ptr", "logits_ptr"}, True),  # the symmetric gradient
    ({"y_target_ptr", "y_dpos_ptr", "dscale_ptr"}, False),  # from stored logits
    (ALL | Y_SIDE | {"x_target_ptr", "x_dpos_ptr", "dscale_ptr", "dbias_ptr", "logits_ptr"}, False),
    (  # sums only, of all pairs
        {"x_label_ptr", "y_label_ptr", "y_target_ptr", "y_dpos_ptr"}
        | {"panel_ptr", "factor_ptr", "logits_ptr"},
        False,
    ),
)
QUEUE = (set(), IDS | {"y_bias_ptr", "x_limit_ptr"})
SIGLIP = (set(), IDS | {"panel_ptr", "factor_ptr", "weight_ptr", "dscale_ptr", "dbias_ptr"})


def _cases(capability, dtype):
    """(kernel, constants and options, absent arguments) of every launch."""
    unit = set() if dtype == torch.float16 else {"unit_ptr"}
    lift = {"LIFT": queue.LIFT if dtype == torch.float16 else 1.0}
    for D in WIDTHS:
        fwd, store, bwd, alike, panel = (
            launch.constants(kind, capability, dtype, D) | {"KEEP_EQUAL": D == 128}
            for kind in ("fwd", "store", "bwd", "alike", "panel")
        )
        for absent, index in FWD if D == 128 else FWD[:1]:
            yield contrastive.contrastive_fwd_kernel, fwd | {"SELF": index}, absent
        if D in (128, 256, 768):
            absent = {"x_bias_ptr", "y_limit_ptr"}
            yield contrastive.contrastive_fwd_kernel, store | {"SELF": False}, absent
        if launch.in_registers(dtype, D):
            for absent, index in BWD if D == 128 else BWD[:3]:
                known = bwd if absent >= ALIKE else alike
                known = known | {"SELF": index, "SPLIT": False}
                yield contrastive.contrastive_bwd_kernel, known, absent | unit
            known = bwd | {"SELF": BWD[2][1], "SPLIT": True}
            yield contrastive.contrastive_bwd_kernel, known, BWD[2][0] | ALIKE | unit
            for absent in QUEUE if D == 128 else QUEUE[:1]:
                yield queue.queue_fwd_kernel, bwd | lift, absent
        # Panels go in steps of BLOCK_D: wider ones compile to the same code.
        if D in (32, 96, 768):
            for absent, index in PANEL if D == 768 else PANEL[:1]:
                yield panels.contrastive_panel_kernel, panel | {"SELF": index}, absent
            for absent in SIGLIP if D == 768 else SIGLIP[:1]:
                yield siglip.siglip_panel_kernel, panel, absent
    for D in (96, 768):
        yield contrastive.contrastive_finish_kernel, contrastive.finish_constants(D), set()
    yield queue.queue_merge_kernel, queue.merge_constants(256), set()
    yield contrastive.contrastive_bwd_reduce_kernel, contrastive.reduce_constants(), set()
    for K in PROTOTYPES:
        sizes = {"K": K, "STRIDE": K}
        by_columns = prototypes.columns_constants(K) | sizes
        yield prototypes.sinkhorn_columns_kernel, by_columns, {"bias_ptr", "lse_ptr", "codes_ptr"}
        if K > prototypes.WIDEST_IN_REGISTERS:
            yield prototypes.sinkhorn_lse_kernel, prototypes.lse_constants() | sizes, set()
            known, kernel = by_columns, prototypes.sinkhorn_columns_kernel
        else:
            known, kernel = prototypes.rows_constants(K) | sizes, prototypes.sinkhorn_rows_kernel
        yield kernel, known, {"codes_ptr"}
        yield kernel, known, {"part_ptr"}
    yield prototypes.sinkhorn_merge_kernel, prototypes.merge_constants(), set()


def _argument_type(name, known, dtype):
    if name in ("x_ptr", "y_ptr", "q_ptr", "k_ptr", "panel_ptr"):
        return "*" + DTYPES[dtype]
    if name == "dx_ptr":
        return "*fp32" if known.get("SPLIT") else "*" + DTYPES[dtype]
    if name.endswith(("ids_ptr", "label_ptr", "target_ptr")):
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name == "scale" else "i32"


def _compile(case):
    """Registers, stack and shared memory, in bytes, of one compiled kernel."""
    module, name, known, absent, capability, dtype = case
    kernel = getattr(importlib.import_module(module), name)
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
    # A kernel travels to another process by its name.
    cases = [
        (kernel.__module__, kernel.__name__, *rest, capability, dtype)
        for kernel, *rest in _cases(capability, dtype)
    ]
    for (_, name, known, absent, *_), usage in zip(cases, pool.map(_compile, cases), strict=True):
        launch = f"{name} {known} without {sorted(absent)}: {usage}"
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"spills: {launch}"
        assert usage["SHARED"] <= SHARED_BYTES[capability], f"too much shared memory: {launch}"


@pytest.mark.parametrize("switch, expected", [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")])
def test_fp32_products_follow_torchs_own_switch(switch, expected):
    torch.backends.cuda.matmul.fp32_precision = switch
    try:
        assert launch.constants("fwd", (9, 0), torch.float32, 64)["PRECISION"] == expected
        assert launch.constants("fwd", (9, 0), torch.bfloat16, 64)["PRECISION"] == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
