"""Finds the compiled extension and says what it found."""

import importlib.util

import torch

why_missing = ""
if importlib.util.find_spec("fastssl._C") is None:
    why_missing = (
        "the C++ extension was not built (no compiler at installation, or FASTSSL_CPP=0); "
        "reinstall with a C++20 compiler for the fast CPU kernels"
    )
else:
    try:
        import fastssl._C  # noqa: F401  registers the CPU kernels
    except (ImportError, OSError, RuntimeError) as error:
        why_missing = f"the C++ extension does not load: {error}"

FEATURES = {"AVX2": 1, "AVX-512": 2, "AVX512-BF16": 4, "AVX512-VBMI": 64, "AMX-BF16": 8}


def cpu_features() -> list[str]:
    """Instruction sets in use at run time, widest last; empty if the extension is missing."""
    if why_missing:
        return []
    bits = torch.ops.fastssl.cpu_features()
    return ["portable", *(name for name, bit in FEATURES.items() if bits & bit)]


def wider_than_mkl() -> bool:
    """Whether float32 products are our own: MKL runs narrower code on AMD."""
    return "AVX-512" in cpu_features() and bool(torch.ops.fastssl.cpu_features() & 16)


def cpu_products() -> tuple[str, str]:
    """Which matrix products the blockwise CPU kernels run on, and why."""
    if why_missing:
        return "reference", why_missing
    bits, features = torch.ops.fastssl.cpu_features(), cpu_features()
    if "AMX-BF16" in features and bits & 32:
        bf16 = "MKL (AMX)"
    elif "AVX512-BF16" in features:
        bf16 = "own AVX512-BF16 products"
    else:
        bf16 = "converted to float32"
    fp32 = "own AVX-512 products, wider than MKL's on AMD" if wider_than_mkl() else "torch's BLAS"
    return "C++", f"fp32: {fp32}; bf16: {bf16}; fp16: converted to float32"
