"""Who is measured against: each library's distribution and how to tell that it is there."""

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Sequence
from types import ModuleType

from ..extras import nearest

# Provider names begin with one of these; the distribution that holds it.
DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "lightly": "lightly",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "inf_cl": "inf_cl",
    "memeff": "memeff",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "apex": "apex",
    "kornia": "kornia",
    "torchvision": "torchvision",
    "torch": "torch",
}
PLAIN = ("eager", "compiled", "published", "torch")
"""Those that torch alone can do: plain code, the same compiled, a paper's published formula."""


class Absent(Exception):
    """A library that is not installed."""


def library(module: str) -> ModuleType:
    """The module, if it is there.

    Raises:
        Absent: it is not. What PyPI calls apex is not NVIDIA's, which is installed from source.
    """
    if module.startswith("apex") and importlib.util.find_spec("amp_C") is None:
        raise Absent("apex")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(module.partition(".")[0]) from error


def add(found: dict, absent: list[str], name: str, build: Callable) -> None:
    """Puts build()'s provider among those found, or the name among the absent."""
    try:
        found[name] = build()
    except Absent:
        absent.append(name)


def versions() -> dict[str, str]:
    """Of every library measured against, "absent" where it is not installed."""
    found = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            if name == "apex" and importlib.util.find_spec("amp_C") is None:
                raise importlib.metadata.PackageNotFoundError  # PyPI's is not NVIDIA's
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def refuse_unknown(wanted: Sequence[str] | None) -> None:
    """Raises: ValueError: one of them begins with no library's name, nor with one of `PLAIN`."""
    words = (*PLAIN, *DISTRIBUTIONS)
    for name in wanted or ():
        if not any(chosen(name, [word]) for word in words):
            raise ValueError(
                f"bench: baselines must begin with a known name, got {name!r}. "
                f"{nearest(name, words)}".rstrip()
            )


def chosen(name: str, wanted: list[str] | None) -> bool:
    """Whether a provider is among those wanted, all where that is None."""
    return wanted is None or any(re.match(rf"{re.escape(w)}\b", name) for w in wanted)
