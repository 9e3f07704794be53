"""Builds the one extension, fastssl._C, on libtorch's stable ABI and Python's limited API.

FASTSSL_CPP=0 builds nothing, FASTSSL_CUDA=0|1 refuses or demands the CUDA sources (default: where
nvcc is present), TORCH_CUDA_ARCH_LIST overrides the GPU architectures.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

STABLE_ABI = "0x020b000000000000"  # libtorch 2.11: loads there and in everything newer
COMMON = ["-DPy_LIMITED_API=0x030a0000", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]


def cuda_architectures() -> str:
    """8.0, 9.0a, and every newer family that this nvcc knows."""
    nvcc = shutil.which("nvcc") or str(Path(os.environ["CUDA_HOME"], "bin/nvcc"))
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    newer = [f"{code[3:-1]}.{code[-1]}" for code in codes.split() if int(code[3:]) >= 100]
    return " ".join(["8.0", "9.0a", *newer])


def extension():
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        raise SystemExit(
            "setup.py: the extension is built against the installed torch, and there is none here. "
            "Install torch >= 2.11 first, then use `pip install --no-build-isolation`."
        ) from None

    sources = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
    cuda_sources = sorted(str(p) for p in Path("csrc").glob("*.cu"))
    wanted = os.environ.get("FASTSSL_CUDA", "")
    has_nvcc = shutil.which("nvcc") is not None or "CUDA_HOME" in os.environ
    if wanted == "1" and not has_nvcc:
        raise SystemExit("setup.py: FASTSSL_CUDA=1 needs nvcc on PATH, found none.")
    cuda = bool(cuda_sources) and has_nvcc and wanted != "0"
    flags = {
        "cxx": ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", *COMMON]
    }
    if platform.machine() in ("x86_64", "AMD64"):  # only loops cloned for AVX-512 are that wide
        flags["cxx"].append("-mprefer-vector-width=512")
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures())
        flags["nvcc"] = ["-std=c++20", "-O3", "-DUSE_CUDA", *COMMON]
    build = CUDAExtension if cuda else CppExtension
    module = build(
        "fastssl._C",
        sources + (cuda_sources if cuda else []),
        extra_compile_args=flags,
        py_limited_api=True,
    )
    return [module], {"build_ext": BuildExtension.with_options(use_ninja=True)}


modules, commands = [], {}
if os.environ.get("FASTSSL_CPP", "1") != "0":
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler):
        modules, commands = extension()
    else:
        print(f"setup.py: no C++ compiler ({compiler}): no fast CPU kernels.", file=sys.stderr)
packages = sorted(str(p.parent).replace(os.sep, ".") for p in Path("fastssl").rglob("__init__.py"))
setup(
    packages=[*packages, "fastssl.kernels"],
    package_dir={"fastssl.kernels": "kernels"},
    ext_modules=modules,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
