"""What is installed, what was built, and which kernel serves each operation here."""

import importlib.util
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, extension
from .evaluate.table import align
from .ops import contrastive


def info() -> str:
    """Text: versions, hardware, instruction sets, and each op's implementation with its reason."""
    facts = [
        ("fastssl", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", _version("triton")),
        ("extension", extension.why_missing or _extension_path()),
        ("cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads"),
        ("torch's cpu kernels", torch.backends.cpu.get_cpu_capability()),
        ("fastssl's cpu kernels", ", ".join(extension.cpu_features()) or "none"),
        *_gpus(),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    rows = [["op", "on", "runs", "because"]]
    for op in ("contrastive", "queue", "siglip"):
        for row in contrastive.implementations(op):
            rows.append([row[key] for key in ("op", "device", "implementation", "reason")])
    return "\n".join([*lines, "", align(rows, left=4)])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _extension_path() -> str:
    return importlib.util.find_spec("fastssl._C").origin


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("gpu", "none that torch can use")]
    gpus = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        text = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        gpus.append((f"gpu {number}", text))
    return gpus
