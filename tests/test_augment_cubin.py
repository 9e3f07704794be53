"""The Triton kernels of `render_views` compile without a GPU, do not spill, fit shared memory."""

import itertools
import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: unset TRITON_INTERPRET", allow_module_level=True)

from fastssl.kernels import augment as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
INT64 = ("offsets_ptr", "sizes_ptr", "source_ptr", "key_ptr")


def cases():
    """(channels, size, pixels, result, noise, bicubic, channels_last)"""
    yield "simclr", (3, 224, "u8", "bf16", False, False, False)
    yield "simclr-32-last", (3, 32, "u8", "fp16", False, False, True)
    yield "float-bicubic", (3, 96, "fp32", "fp32", False, True, False)
    yield "noise", (1, 64, "u8", "fp32", True, False, False)
    yield "everything", (3, 448, "fp32", "bf16", True, True, True)
    yield "four-last", (4, 224, "u8", "fp32", False, False, True)


CASES = dict(cases())
LAUNCHES = list(itertools.product(CASES, ["crop", "colour", "blur"]))
LAUNCHES += [("noise", "noise"), ("everything", "noise")]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("case, name", LAUNCHES)
def test_compiles_without_spills(case, name, capability, tmp_path):
    channels, size, pixels, result, noise, bicubic, channels_last = CASES[case]
    kernel, own = {
        "crop": (kernels.render_crop_kernel, kernels.crop_constants(bicubic)),
        "colour": (kernels.render_colour_kernel, kernels.COLOUR),
        "blur": (kernels.render_blur_kernel, kernels.BLUR),
        "noise": (kernels.render_noise_kernel, kernels.PAIRS),
    }[name]
    known = own | {
        "C": channels, "SIZE": size, "CHANNELS_LAST": channels_last, "PER_SIZE": 1.0 / size,
        "BICUBIC": bicubic, "ANTIALIAS": True, "PARTS": kernels.parts_of(channels, size),
        "RADIUS": max(1, size // 20), "NANS": pixels == "fp32", "COUNT": channels * size**2,
    }  # fmt: skip
    if not noise:
        known["noise_ptr"] = None
    types = dict.fromkeys(INT64, "*i64") | {
        "pixels_ptr": f"*{pixels}", "out_ptr": f"*{result}", "P": "i64", "B": "i32", "steps": "i32",
        "work_ptr": "*fp32" if result == "fp32" else "*fp16",
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in known:
            signature[argument], constants[argument] = "constexpr", known[argument]
            continue
        signature[argument] = types.get(argument, "*fp32")
        if argument.endswith("_ptr"):
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
