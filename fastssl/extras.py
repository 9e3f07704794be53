"""Optional packages, imported where they are used and explained where they are missing."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of fastssl-kernels brings it.

    Raises:
        ImportError: the package is missing, or it is there and cannot be loaded (PyPI's
            torchvision beside a CPU-only torch, which takes timm down with it).
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module} is not installed ({error}). "
            f'Install it with: pip install "fastssl-kernels[{extra}]"'
        ) from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = f"{package} is installed but cannot be imported: {error}. "
        if package in ("torchvision", "timm"):
            reason += (
                "PyPI's torchvision needs PyPI's torch (built with CUDA, which also runs without a "
                "GPU) and fails beside a CPU-only torch. Install both from the same index, or use "
                "a built-in backbone: resnet_small, vit_small."
            )
        raise ImportError(reason) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all if few."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return hint + (f"Known: {', '.join(names)}." if len(names) <= 12 else "")
