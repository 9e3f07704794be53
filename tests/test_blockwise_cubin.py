"""The Triton kernels of `blockwise` compile without a GPU and do not spill; whole tiles load and
store whole vectors."""

import itertools
import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from fastssl.kernels import blockwise as kernels  # noqa: E402
from fastssl.kernels import tables  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastssl.ops.blockwise import RULES  # noqa: E402

TYPES = {"T": "i32", "n": "i64", "seed": "i64", "part_ptr": "*fp64"}
TYPES |= dict.fromkeys(["table_ptr", "counters_ptr"], "*i64") | {"books_ptr": "*i32"}
CODED = kernels.CODES.value * (16 + 64)
BF16 = tables.BF16.value * (1 + 4)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
both = pytest.mark.parametrize("capability", [80, 90])


def ptx_of(kernel, known, capability, folder, absent=()):
    """Compiled as launched, which must need no memory of its own."""
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in known or argument in absent:
            signature[argument], constants[argument] = "constexpr", known.get(argument)
            continue
        signature[argument] = TYPES.get(argument, "*u8" if argument == "codes_ptr" else "*fp32")
        if argument.endswith("_ptr"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={option: known[option] for option in OPTIONS if option in known},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = next(pathlib.Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", report) == ["0", "0"], report
    return compiled.asm["ptx"]


def constants(rule, block=256, common=CODED, root=False, finite_only=False, stochastic=False):
    return kernels.constants(block, stochastic) | {
        "RULE": RULES.index(rule), "CHUNK": kernels.CHUNK, "COMMON": common, "ROOT": root,
        "FINITE_ONLY": finite_only, "STOCHASTIC": stochastic,
    }  # fmt: skip


@pytest.mark.parametrize(
    "rule, capability", list(zip(RULES, itertools.cycle([80, 90]), strict=False))
)
def test_rules(rule, capability, tmp_path):
    adapts = rule in ("lars", "lamb")
    absent = ("found_inf_ptr",) if adapts else ("found_inf_ptr", "trust_ptr")
    second = rule not in ("sgd", "nesterov", "lion", "lars")
    common = 16 * (rule != "adagrad") + 64 * second
    known = constants(rule, common=common)
    ptx = ptx_of(kernels.blockwise_step_kernel, known, capability, tmp_path, absent)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 4  # p and g
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 2
    if adapts:
        ptx_of(kernels.blockwise_norms_kernel, known, capability, tmp_path)
        known |= kernels.TRUST
        ptx_of(kernels.blockwise_trust_kernel, known, capability, tmp_path)


@pytest.mark.parametrize(
    "rule, block, capability",
    [("lamb", block, capability) for block in (64, 256, 2048) for capability in (80, 90)]
    + [("ademamix", 64, 80), ("ademamix", 256, 90), ("ademamix", 2048, 80)],
)
def test_with_everything(rule, block, capability, tmp_path):
    """bf16 rounded at random, roots, a flag, and gradients that are not finite left out."""
    known = constants(rule, block, CODED + BF16, True, True, True)
    ptx_of(kernels.blockwise_step_kernel, known, capability, tmp_path)
    if rule == "lamb":
        ptx_of(kernels.blockwise_norms_kernel, known, capability, tmp_path)


@both
@pytest.mark.parametrize("name", ["quantize_blockwise_kernel", "dequantize_blockwise_kernel"])
def test_codec(name, capability, tmp_path):
    known = kernels.constants(256) | {"SIGNED": True}
    ptx_of(getattr(kernels, name), known, capability, tmp_path)
